"""Weights to the Hugging Face Hub and back: what travels, the card, push and pull. The package's only network code."""

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx2
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hep2.models import MODELS
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET, MODEL_TITLES, REFERENCE_RESULTS, is_synthetic
from hep2.checkpoints import BUNDLED, Weights, load_classifier

FILES = ("config.json", "model.safetensors", "log.jsonl")
FOLDERS = [*MODELS, "refusal"]
EXAMPLES = [f"examples/{label}/*.png" for label in CLASS_NAMES]
# All that is ever fetched: JSON, safetensors and pictures. A pickle in a repository is neither fetched nor opened.
READ = ["metrics.json", *(f"{name}/{file}" for name in FOLDERS for file in FILES), *EXAMPLES]
FIGURES = [f"{kind}_{name}.png" for kind in ("confusion", "reliability") for name in MODELS]
FIGURES += [f"specimen/reliability_{name}.png" for name in MODELS] + [f"{name}/curves.png" for name in MODELS]
WRITTEN = [*READ, *FIGURES]
# What a request to the Hub can end in: large files have protocols of their own, with errors of their own.
HUB_ERRORS = (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError, RuntimeError, ValueError)
TRIES = 3
SPLIT_LIMIT = """A random split has cells of one specimen on both sides and measures mostly whether a specimen is
recognised. Labels were given to specimens and inherited by their cells. """


def find_weights(name: str | Path | None = None) -> Weights:
    """Load the weights that a name stands for: OWNER/NAME[@revision] on the Hub, a local folder, or the bundled ones.

    A folder of that name comes first. If the Hub cannot be reached, the revision in the cache is taken, and `notes`
    of the result says so.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, repository or revision, or the Hub cannot be reached and nothing is cached.
    ValueError
        If what was found does not fit this version; see `hep2.checkpoints.load_classifier`.
    """
    repository = str(name).partition("@")[0]
    if name is None or Path(name).is_dir() or repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        return load_classifier(BUNDLED if name is None else name)
    folder, notes = pull(str(name))
    weights = load_classifier(folder, source=repository, revision=folder.name)
    return replace(weights, notes=notes + weights.notes)


def pull(name: str) -> tuple[Path, tuple[str, ...]]:
    """Fetch OWNER/NAME[@revision] and return its folder, which is named by the commit, and notes in words."""
    repository, at, revision = name.partition("@")
    if at and not revision:
        raise FileNotFoundError(f"{name} names no revision: put a branch, tag or commit behind the @, or leave it out")
    instead = "use the bundled weights: leave the name out, and HEP2_WEIGHTS unset"
    try:
        # By its commit: asked by name, a download falls back to what is cached in silence.
        commit = _patiently(lambda: HfApi().model_info(repository, revision=revision or None, timeout=10).sha)
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=READ))
        with suppress(*HUB_ERRORS):
            # Now that all is here, the cache may learn what the name stands for; until then the older copy was its.
            snapshot_download(repository, revision=revision or None, allow_patterns=READ)
        return folder, ()
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise FileNotFoundError(
            f"{repository} is no folder here, and is not on the Hub, or is private: check the name, give a token "
            f"(HF_TOKEN), or {instead}"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repository} has no revision {revision!r}: check it, or {instead}") from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub repository's OWNER/NAME: {instead}") from error
    except (OfflineModeIsEnabled, *HUB_ERRORS) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise FileNotFoundError(
                f"the Hub refuses the token for {repository}: set HF_TOKEN to one that is good, or unset it"
            ) from error
        offline = isinstance(error, OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else f"the Hub at {constants.ENDPOINT} failed ({error})"
        then = "unset it" if offline else "try again later"
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=READ, local_files_only=True)
    except (LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is no folder here; {reason}, and no whole copy is cached: {then}, or {instead}"
        ) from error
    return Path(folder), (f"{reason}: the cached revision of {repository} answers",)


def _patiently(ask: Callable):
    """Ask the Hub, and a few times more if it is busy."""
    for attempt in range(TRIES):
        try:
            return ask()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if (status < 500 and status != 429) or attempt == TRIES - 1:
                raise
            time.sleep(2**attempt)
