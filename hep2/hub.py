"""Weights to the Hugging Face Hub and back: what travels, the card, push and pull. The package's only network code."""

import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx2
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, snapshot_download
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
from hep2.weights import BUNDLED, Weights, load_weights, specimen_models

# All that is ever fetched: JSON, safetensors and pictures. A pickle in a repository is neither fetched nor opened.
READ = ["metrics.json", "*/config.json", "*/model.safetensors", "*/log.jsonl", "examples/*/*.png"]
WRITTEN = [*READ, "*.png", "*/curves.png", "specimen/reliability_*.png"]
TRIES = 3


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
    repository, _, revision = name.partition("@")
    instead = "use the bundled weights by leaving the name out"
    try:
        _reach(repository, revision or None)
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=READ)), ()
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise FileNotFoundError(
            f"{repository} is no folder here, and is not on the Hub, or is private: check the name, give a token "
            f"(HF_TOKEN), or {instead}"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repository} has no revision {revision!r}: check it, or {instead}") from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub repository's OWNER/NAME: {instead}") from error
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else f"the Hub failed ({error})"
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=READ, local_files_only=True)
    except (LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is no folder here; {reason}, and no whole copy is cached: try again later, or {instead}"
        ) from error
    return Path(folder), (f"{reason}: the cached revision of {repository} answers",)


def _reach(repository: str, revision: str | None) -> None:
    """Ask the Hub for the revision, a few times if it is busy: a download would fall back to its cache in silence."""
    for attempt in range(TRIES):
        try:
            HfApi().model_info(repository, revision=revision, timeout=10)
            return
        except HfHubHTTPError as error:
            if error.response.status_code < 500 or attempt == TRIES - 1:
                raise
            time.sleep(2**attempt)


def stage(run: Path, destination: Path, repository: str, examples: dict[str, tuple[str, bytes]] | None = None) -> None:
    """Lay out in `destination` what a push of the training run would send, card included.

    `examples` maps file names to (class name, PNG bytes) of held-out cells.

    Raises what `load_weights` raises, and FileNotFoundError if the run was not measured: only whole runs travel.
    """
    weights = load_weights(run)
    again = "measure the run with `python -m hep2 evaluate`"
    if not weights.metrics:
        raise FileNotFoundError(f"{run / 'metrics.json'} is missing: {again}")
    if weights.metrics.get("revision") != weights.revision or set(weights.metrics["models"]) != set(weights.models):
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
        If the Hub refuses or fails; the run stays as it is, and the message says how to push it again.
    """
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        stage(run, Path(folder), repository, examples)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            # What an earlier push has left goes: its held-out cells may be among those that this run was trained on.
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"hep2 {version}", delete_patterns=WRITTEN
            )
            with suppress(RevisionNotFoundError):
                api.delete_tag(repository, tag=f"v{version}")
            api.create_tag(repository, tag=f"v{version}", revision=commit.oid)
        except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError) as error:
            raise ConnectionError(
                f"the push to {repository} failed ({error}); the run is whole in {run}: push it again with "
                f"`python train.py --output {run} --push {repository}`, which trains nothing that is trained"
            ) from error
    return commit.oid


def model_card(weights: Weights, repository: str) -> ModelCard:
    """Write the card from the run's own figures, with metadata that the Hub reads."""
    metrics = weights.metrics
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=metrics["dataset"],
            dataset_name=f"HEp-2 cells, {metrics['protocol']} protocol, seed {metrics['seed']}",
            dataset_split="test",
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
    published = training["dataset"] == DEFAULT_DATASET
    cells, origin = f"`{training['dataset']}`", "none of the published cells"
    if published:
        cells = f"[{DEFAULT_DATASET}](https://huggingface.co/datasets/{DEFAULT_DATASET})"
        origin = f"{DEFAULT_DATASET}, from the contests on HEp-2 cell classification at ICPR and ICIP"
    elif is_synthetic(training["dataset"]):
        cells = f"synthetic cells, drawn by a program (`{training['dataset']}`), not for reading real ones"
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
Homogeneous, NuMem, Nucleolar or Speckled. **Not for clinical use.**

## How they do

Protocol {metrics["protocol"]}, seed {metrics["seed"]}, {metrics["test_size"]:,} test cells that took no part in
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

```sh
python -m hep2 classify --weights {repository} cell.png
```

## Limits

A random split has cells of one specimen on both sides and measures mostly whether a specimen is recognised. Labels
were given to specimens and inherited by their cells. Intensity (titre) cannot be read. A pattern is not a diagnosis.

## Citation

Cells: {origin}. Licence: MIT.
"""


def _figures_text(weights: Weights) -> str:
    """Show what figures the run has: the push sends them along."""
    figures = {"confusion_ensemble.png": "Confusion matrix", "reliability_ensemble.png": "Reliability"}
    figures["specimen/reliability_ensemble.png"] = "Reliability on held-out specimens"
    figures |= {f"{name}/curves.png": f"Training of the {MODEL_TITLES[name]}" for name in MODELS}
    return "".join(f"![{text}]({file})\n" for file, text in figures.items() if (weights.folder / file).is_file())


def _specimen_text(metrics: dict) -> str:
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
From all its cells together, the stack ensemble reads {blocks["right"]} of {blocks["total"]} specimens right."""
