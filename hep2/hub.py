"""Weights to the Hugging Face Hub and back: pull, push and the card. The package's only network code."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, constants, errors, snapshot_download
from huggingface_hub.utils import httpx  # the library's own export of what it speaks HTTP with

from hep2 import patterns
from hep2.checkpoints import BUNDLED, Weights, load_classifier
from hep2.models import MODELS

# All that is ever fetched: JSON, safetensors and pictures. A pickle in a repository is neither fetched nor opened.
READ = ["config.json", "model.safetensors", "metrics.json", *(f"{name}/log.jsonl" for name in MODELS)]
READ += [f"examples/{label}/*.png" for label in patterns.CLASS_NAMES]
FIGURES = [f"{kind}_{name}.png" for kind in ("confusion", "reliability") for name in MODELS]
FIGURES = [*(f"held_out/{file}" for file in FIGURES), *FIGURES, *(f"{name}/curves.png" for name in MODELS)]
WRITTEN = READ + FIGURES
# What a request to the Hub can end in: large files have a protocol of their own, whose errors are RuntimeErrors.
HUB_ERRORS = (httpx.HTTPError, OSError, RuntimeError, ValueError)
TRIES = 3


def find_weights(name: str | Path | None = None) -> Weights:
    """Load the weights that a name stands for: OWNER/NAME[@revision] on the Hub, a local folder, or the bundled ones.

    A folder of that name comes first. If the Hub cannot be reached, the revision in the cache is taken, and `notes`
    of the result says so. Raises what `hep2.checkpoints.load_classifier` and `pull` raise.
    """
    repository = str(name).partition("@")[0]
    if name is None or Path(name).is_dir() or repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        return load_classifier(BUNDLED if name is None else name)
    folder, notes = pull(str(name))
    weights = load_classifier(folder, source=repository, revision=folder.name)
    return replace(weights, notes=notes + weights.notes)


def pull(name: str) -> tuple[Path, tuple[str, ...]]:
    """Fetch OWNER/NAME[@revision] and return its folder, which is named by the commit, and notes in words.

    Raises FileNotFoundError if there is no such repository or revision, or if the Hub fails and nothing is cached;
    OSError if the cache cannot be written.
    """
    repository, at, revision = name.partition("@")
    if at and not revision:
        raise FileNotFoundError(f"{name} names no revision: put a branch, tag or commit behind the @, or leave it out")
    asked, instead = revision or None, "use the bundled weights: leave the name out, and HEP2_WEIGHTS unset"
    try:
        # By its commit: asked by name, a download falls back to what is cached in silence.
        commit = _patiently(lambda: HfApi().model_info(repository, revision=asked, timeout=10).sha)
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=READ))
        with suppress(*HUB_ERRORS):
            # Now that all is here, the cache may learn what the name stands for; until then the older copy was its.
            snapshot_download(repository, revision=asked, allow_patterns=READ)
        return folder, ()
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"{repository} is no folder here, and is not on the Hub, or is private: check the name, give a token "
            f"(HF_TOKEN), or {instead}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repository} has no revision {revision!r}: check it, or {instead}") from error
    except HUB_ERRORS as error:
        if getattr(error, "errno", None) and not isinstance(error, ConnectionError):  # of a file here, not of the Hub
            raise OSError(
                f"{repository} cannot be kept in the cache {constants.HF_HUB_CACHE} ({error}): let it be written, make "
                "room there, or set HF_HOME to another folder"
            ) from error
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise FileNotFoundError(
                f"the Hub does not accept the token for {repository}: set HF_TOKEN to one that is good, or unset it"
            ) from error
        reason, then = f"the Hub at {constants.ENDPOINT} failed ({_line(error)})", "try again later"
        if isinstance(error, errors.OfflineModeIsEnabled):
            reason, then = "HF_HUB_OFFLINE is set", "unset it"
    try:
        folder = snapshot_download(repository, revision=asked, allow_patterns=READ, local_files_only=True)
    except OSError as error:
        missing = f"{name} is no folder here; {reason}, and no whole copy is cached"
        raise FileNotFoundError(f"{missing}: {then}, or {instead}") from error
    return Path(folder), (f"{reason}: the cached revision of {repository} answers",)


def create_repository(repository: str, *, tag: str | None = None, private: bool = False) -> None:
    """Create a repository for weights, if it is not there, and find out now what would stop a push.

    Raises ConnectionError if the Hub refuses or fails, PermissionError if the repository was to be private and is
    public, and ValueError if it has the tag, or a branch of that name.
    """
    with _as_connection_error(f"the Hub does not let us push to {repository}"):
        # Not asked to be private, it becomes what its owner's new repositories are.
        _patiently(lambda: HfApi().create_repo(repository, private=private or None, exist_ok=True))
        public = private and not _patiently(lambda: HfApi().model_info(repository)).private
        taken = _names(repository)
    if public:
        raise PermissionError(f"{repository} is public already: make it private on the Hub first; nothing was sent")
    if tag in taken:
        raise ValueError(f"{repository} has {tag!r} already, and a tag stays: name another; nothing was sent")


def push(
    run: Path,
    repository: str,
    *,
    version: str,
    tag: str | None = None,
    private: bool = False,
    examples: dict[str, tuple[str, bytes]] | None = None,
) -> tuple[str, str]:
    """Send a training run to the Hub in one commit, tag it, and return the commit and the tag.

    A tag never moves. Unless `tag` names one, it is `v{version}` or, where an earlier push has that, the first that
    is free of `v{version}-2`, `v{version}-3` and so on.

    Raises what `create_repository` and `stage` raise; the run stays as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        stage(run, Path(folder), repository, examples)
        create_repository(repository, tag=tag, private=private)
        with _as_connection_error(f"the push to {repository} failed"):
            # What an earlier push left goes: its held-out cells may be among those that this run was trained on.
            options = {"commit_message": f"hep2 {version}", "delete_patterns": WRITTEN}
            commit = HfApi().upload_folder(repo_id=repository, folder_path=folder, **options).oid
    with _as_connection_error(f"{repository} has the run as {commit}, but without a tag"):
        names, taken = chain([f"v{version}"], (f"v{version}-{number}" for number in count(2))), _names(repository)
        tag = tag or next(name for name in names if name not in taken)
        _patiently(lambda: HfApi().create_tag(repository, tag=tag, revision=commit))
    return commit, tag


def _names(repository: str) -> set[str]:
    refs = _patiently(lambda: HfApi().list_repo_refs(repository))
    return {ref.name for ref in (*refs.tags, *refs.branches)}


@contextmanager
def _as_connection_error(what: str) -> Iterator[None]:
    try:
        yield
    except HUB_ERRORS as error:
        raise ConnectionError(f"{what}: {constants.ENDPOINT} failed ({_line(error)})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _patiently(ask: Callable):
    """Ask the Hub, and a few times more if it is busy."""
    for attempt in range(TRIES):
        try:
            return ask()
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if (status < 500 and status != 429) or attempt == TRIES - 1:
                raise
            time.sleep(2**attempt)


def stage(run: Path, destination: Path, repository: str, examples: dict[str, tuple[str, bytes]] | None = None) -> None:
    """Lay out in `destination` what a push of the training run would send, card included.

    `examples` maps file names to (class name, PNG bytes) of held-out cells. Raises what `load_classifier` raises, and
    ValueError if the run was not measured: only whole runs travel.
    """
    weights = load_classifier(run)
    if set(weights.metrics.get("models", ())) != set(MODELS):
        reason = weights.notes[0] if weights.notes else "metrics.json does not have all four models"
        raise ValueError(f"{run}: {reason}; measure the run with `python -m hep2 evaluate`")
    files = {path.relative_to(run): path.read_bytes() for pattern in WRITTEN for path in run.glob(pattern)}
    files |= {Path("examples", label, file): data for file, (label, data) in (examples or {}).items()}
    for path, data in files.items():
        (destination / path).parent.mkdir(parents=True, exist_ok=True)
        (destination / path).write_bytes(data)
    model_card(weights, repository).save(destination / "README.md")


def model_card(weights: Weights, repository: str) -> ModelCard:
    """Write the card from the run's own figures, with metadata that the Hub reads."""
    metrics, dataset = weights.metrics, weights.metrics["dataset"]
    results = _results(dataset, metrics["protocol"], metrics)
    if "specimen" in metrics:
        results = _results(dataset, "held-out specimens", metrics["specimen"]) + results
    data = ModelCardData(
        language="en",
        license="mit",
        library_name="pytorch",
        pipeline_tag="image-classification",
        tags=["hep-2", "immunofluorescence", "autoimmunity", "medical", "timm"],
        datasets=[dataset] if dataset == patterns.DEFAULT_DATASET else None,
        model_name=repository.rpartition("/")[2],
        eval_results=results,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md")),
        repository=repository,
        metrics=metrics,
        training=weights.training,
        patterns=patterns,
        figures=[file for file in FIGURES if (weights.folder / file).is_file()],
    )


def _results(dataset: str, protocol: str, measured: dict) -> list[EvalResult]:
    kept = ("seed", "fold", "folds", "recipe", "dataset_fingerprint")
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=f"HEp-2 cells, protocol: {protocol}",
            dataset_config=protocol,  # by this the Hub tells results apart
            dataset_args={key: measured[key] for key in kept if measured.get(key) is not None},
            metric_type=metric,
            metric_name=f"{patterns.MODEL_TITLES[model]} {field.replace('_', ' ')}",
            metric_value=round(result[field], 4),
        )
        for model, result in measured["models"].items()
        for field, metric in (("accuracy", "accuracy"), ("mean_class_accuracy", "recall"), ("macro_f1", "f1"))
    ]
