"""Weights to the Hugging Face Hub and back: what travels, the card, push and pull. The package's only network code."""

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
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
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET, MODEL_TITLES, SOURCE_RESULTS, is_synthetic
from hep2.weights import BUNDLED, Weights, load_weights, own_specimens_text, specimen_models

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


def open_weights(name: str | Path | None = None) -> Weights:
    """Load the weights that a name stands for: OWNER/NAME[@revision] on the Hub, a local folder, or the bundled ones.

    A folder of that name comes first. If the Hub cannot be reached, the revision in the cache is taken, and `notes`
    of the result says so.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, repository or revision, or the Hub cannot be reached and nothing is cached.
    ValueError
        If what was found does not fit this version; see `hep2.weights.load_weights`.
    """
    repository = str(name).partition("@")[0]
    if name is None or Path(name).is_dir() or repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        return load_weights(BUNDLED if name is None else name)
    folder, notes = pull(str(name))
    return load_weights(folder, source=repository, revision=folder.name, notes=notes)


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


def stage(run: Path, destination: Path, repository: str, examples: dict[str, tuple[str, bytes]] | None = None) -> None:
    """Lay out in `destination` what a push of the training run would send, card included.

    `examples` maps file names to (class name, PNG bytes) of held-out cells.

    Raises what `load_weights` raises, and FileNotFoundError if the run was not measured: only whole runs travel.
    """
    weights = load_weights(run)
    again = "measure the run with `python -m hep2 evaluate`"
    if not (run / "metrics.json").exists():
        raise FileNotFoundError(f"{run / 'metrics.json'} is missing: {again}")
    own = weights.metrics.get("revision") == weights.revision
    if not own or set(weights.metrics["models"]) != set(weights.models):
        raise ValueError(f"{run / 'metrics.json'} is not of these four models as they are now: {again}")
    for pattern in WRITTEN:
        for path in sorted(run.glob(pattern)):
            target = destination / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for file, (label, data) in (examples or {}).items():
        target = destination / "examples" / label / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    card = model_card(weights, repository)
    card.save(destination / "README.md")


def create_repository(repository: str, *, private: bool = False) -> None:
    """Create a repository for weights, if it is not there, and so find out what would stop a push.

    Raises
    ------
    ConnectionError
        If the Hub refuses or fails.
    PermissionError
        If the repository was to be private and is there, and public.
    """
    api = HfApi()
    try:
        # Not asked to be private, it becomes what its owner's new repositories are.
        _patiently(lambda: api.create_repo(repository, private=private or None, exist_ok=True))
        public = private and not _patiently(lambda: api.model_info(repository)).private
    except HUB_ERRORS as error:
        raise ConnectionError(
            f"the Hub at {constants.ENDPOINT} does not let us push to {repository} ({error})"
        ) from error
    if public:
        raise PermissionError(f"{repository} is public already: make it private on the Hub first; nothing was sent")


def push(
    run: Path,
    repository: str,
    *,
    version: str,
    private: bool = False,
    examples: dict[str, tuple[str, bytes]] | None = None,
) -> str:
    """Send a training run to the Hub in one commit, tag it with the version, and return the commit.

    A tag of that version moves here from an earlier push.

    Raises
    ------
    ConnectionError
        If the Hub refuses or fails; the run stays as it is.
    PermissionError
        If the repository was to be private and is there, and public: nothing is sent.
    """
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        stage(run, Path(folder), repository, examples)
        try:
            create_repository(repository, private=private)
        except ConnectionError as error:
            raise ConnectionError(f"{error}; {_kept(run)}") from error
        try:
            # What an earlier push has left goes: its held-out cells may be among those that this run was trained on.
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"hep2 {version}", delete_patterns=WRITTEN
            )
        except HUB_ERRORS as error:
            raise ConnectionError(f"the push to {repository} failed ({error}); {_kept(run)}") from error
        try:
            with suppress(RevisionNotFoundError):
                _patiently(lambda: api.delete_tag(repository, tag=f"v{version}"))
            _patiently(lambda: api.create_tag(repository, tag=f"v{version}", revision=commit.oid))
        except HUB_ERRORS as error:
            raise ConnectionError(
                f"the push to {repository} went through, but for its tag v{version} ({error}); {_kept(run)}"
            ) from error
    return commit.oid


def _kept(run: Path) -> str:
    return f"the run is whole in {run}: push it again"


def model_card(weights: Weights, repository: str) -> ModelCard:
    """Write the card from the run's own figures, with metadata that the Hub reads."""
    metrics = weights.metrics
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=metrics["dataset"],
            # Not the split that the dataset was published with.
            dataset_name=f"HEp-2 cells, test part of the {metrics['protocol']} protocol, seed {metrics['seed']}",
            dataset_args={
                key: metrics[key]
                for key in ("protocol", "seed", "fold", "dataset_fingerprint")
                if metrics[key] is not None
            },
            metric_type=kind,
            metric_name=f"{MODEL_TITLES[name]} {label}",
            metric_value=round(result[field], 4),
        )
        for name, result in metrics["models"].items()
        for kind, label, field in (
            ("accuracy", "accuracy", "accuracy"),
            ("recall", "mean class accuracy", "mean_class_accuracy"),
            ("f1", "macro F1", "macro_f1"),
        )
    ]
    data = ModelCardData(
        language="en",
        license="mit",
        library_name="pytorch",
        pipeline_tag="image-classification",
        tags=["hep-2", "immunofluorescence", "autoimmunity", "medical", "timm"],
        datasets=[DEFAULT_DATASET] if metrics["dataset"] == DEFAULT_DATASET else None,
        model_name=repository.rpartition("/")[2],
        eval_results=results,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{_card_text(weights, repository)}")


def _card_text(weights: Weights, repository: str) -> str:
    metrics = weights.metrics
    training = weights.configs["ensemble"]["training"]
    published, synthetic = training["dataset"] == DEFAULT_DATASET, is_synthetic(training["dataset"])
    cells, origin = f"`{training['dataset']}`", "Whether published cells are among those is not known here."
    if published:
        cells = f"[{DEFAULT_DATASET}](https://huggingface.co/datasets/{DEFAULT_DATASET})"
        origin = (
            f"The cells have terms of their own: {DEFAULT_DATASET} on the Hugging Face Hub,\ncut out of the slides of "
            "the contests on HEp-2 cell classification at ICPR and ICIP. Please name them,\nand these weights by their "
            "revision."
        )
    elif synthetic:
        cells = f"synthetic cells, drawn by a program (`{training['dataset']}`)"
        origin = "They were trained on none of the published cells."
    drawn = "\n\n**Trained on synthetic cells, drawn by a program: not for reading real ones.**" if synthetic else ""
    apart = metrics["protocol"] == "specimen"
    limit = "" if synthetic or apart else SPLIT_LIMIT
    fold = f", fold {metrics['fold']} (specimens kept away from training)" if apart else ""
    rows, classes = "", ""
    for name in MODELS:
        ours = metrics["models"][name]
        source = f"{SOURCE_RESULTS[name]['accuracy']:.2f}" if published else "on other cells"
        rows += (
            f"| {MODEL_TITLES[name]} | {ours['accuracy']:.4f} | {ours['mean_class_accuracy']:.4f} | "
            f"{ours['macro_f1']:.4f} | {ours['ece']:.4f} | {source} |\n"
        )
    for label in CLASS_NAMES:
        row = metrics["models"]["ensemble"]["per_class"][label]
        classes += f"| {label} | {row['precision']:.4f} | {row['recall']:.4f} | {row['f1']:.4f} | {row['support']} |\n"
    return f"""
# {repository}: the staining pattern of a HEp-2 cell, read by four models

A CNN, a ResCNN, a vision transformer and a stack ensemble read one cell image, 1 x 78 x 78, as Centromere, Golgi,
Homogeneous, NuMem, Nucleolar or Speckled, or say that it shows no such cell. **Not for clinical use.**{drawn}

## How they do

Protocol {metrics["protocol"]}, seed {metrics["seed"]}{fold}, {metrics["test_size"]:,} test cells that took no part in
training, calibration or stacking.

| model | accuracy | mean class accuracy | macro F1 | calibration error | the source's accuracy |
|---|---|---|---|---|---|
{rows}
The stack ensemble, class by class:

| class | precision | recall | F1 | cells |
|---|---|---|---|---|
{classes}
{_figures_text(weights)}
{_specimen_text(metrics)}

## How they were trained

On {cells} (fingerprint
`{training["dataset_fingerprint"]}`), recipe {training["recipe"]}, protocol {training["protocol"]}, seed
{training["seed"]}. Probabilities are calibrated by temperature on validation cells. Each `config.json` holds all
settings, each `log.jsonl` every epoch.

## How to use them

With the package `hep2`, whose version this repository is tagged with:

```sh
python -m hep2 classify --weights {repository} cell.png        # or {repository}@REVISION
python app.py --weights {repository}
```

## Limits

{limit}Intensity (titre) cannot be read. A pattern is not a diagnosis.

## Licence and citation

These weights: MIT. {origin}
"""


def _figures_text(weights: Weights) -> str:
    """Show what figures the run has: the push sends them along."""
    figures = {"confusion_ensemble.png": "Confusion matrix", "reliability_ensemble.png": "Reliability"}
    figures["specimen/reliability_ensemble.png"] = "Reliability on held-out specimens"
    figures |= {f"{name}/curves.png": f"Training of the {MODEL_TITLES[name]}" for name in MODELS}
    return "".join(f"![{text}]({file})\n" for file, text in figures.items() if (weights.folder / file).is_file())


def _specimen_text(metrics: dict) -> str:
    if metrics["protocol"] == "specimen":
        return ""
    if "specimen" not in metrics:
        return "Held-out specimens were not measured for these weights: expect less on a new patient."
    specimen = metrics["specimen"]
    blocks = specimen["blocks"]["ensemble"]
    rows = "".join(
        f"| {MODEL_TITLES[name]} | {result['accuracy']:.4f} | {result['mean_class_accuracy']:.4f} | "
        f"{result['ece']:.4f} |\n"
        for name, result in specimen["models"].items()
    )
    return f"""On held-out specimens, which is what a new patient is like: {specimen["folds"]} folds that divide none,
with {specimen_models(specimen)}.

| model | accuracy | mean class accuracy | calibration error |
|---|---|---|---|
{rows}
From all its cells together, the stack ensemble reads {blocks["right"]} of {blocks["total"]} specimens right.
{own_specimens_text(metrics)}"""
