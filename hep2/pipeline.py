"""From cells to trained weights in a folder, and from weights to measured figures: what the command lines run."""

import csv
import hashlib
import io
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn.model_selection import train_test_split

from hep2.data import Cells, Split, blocks_of, dataset_files, split
from hep2.evaluation import (
    draw_confusion,
    draw_curves,
    draw_reliability,
    fit_temperature,
    metrics,
    save_figure,
    train_label,
)
from hep2.files import read_json, write_atomically, write_json
from hep2.imaging import read_intensity
from hep2.models import MODELS, SpecimenSupervision, StackEnsemble, build_model, pooled_features
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET, MODEL_TITLES
from hep2.reader import predict
from hep2.recipes import ARCHITECTURES, RECIPES
from hep2.refusal import fit_refusal
from hep2.stress import measure_refusals, measure_robustness
from hep2.training import Examples, Recipe, fit, predict_logits, tells_specimens_apart
from hep2.weights import Weights, load_weights, refusal_fits, save_model, save_refusal


def train_models(
    cells: Cells,
    output: Path,
    *,
    names: tuple[str, ...] = tuple(MODELS),
    recipe: str = "tuned",
    protocol: str = "clean",
    seed: int = 0,
    fold: int = 0,
    changes: dict | None = None,
    accelerator: Accelerator,
    progress: bool = True,
) -> None:
    """Train the named models into `output`, each in a folder of its own; a model that is finished is not repeated.

    `changes` replaces fields of every model's recipe but the ensemble's, for a shorter run, say. The ensemble is
    fitted on the validation cells, from the members that lie in `output`.

    Raises
    ------
    ValueError
        If a name or recipe is unknown, if a class has no train cell, if `output` holds another run, or if the
        ensemble's members there were trained on other cells.
    FileNotFoundError
        If the ensemble's members are not there.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: choose one of {tuple(RECIPES)}")
    if unknown := set(names) - set(MODELS):
        raise ValueError(f"unknown models {sorted(unknown)}: choose from {tuple(MODELS)}")
    parts = split(cells, protocol, seed, fold)
    if missing := set(range(len(CLASS_NAMES))) - set(cells.labels[parts.train].tolist()):
        lacking = ", ".join(CLASS_NAMES[number] for number in sorted(missing))
        raise ValueError(f"{cells.source}: no cell of {lacking} to train on: give some of each of the six patterns")
    origin = {
        "recipe": recipe,
        "protocol": protocol,
        "seed": seed,
        "fold": fold if protocol == "specimen" else None,
        "dataset": cells.source,
        "dataset_fingerprint": cells.fingerprint,
    }
    for name in (name for name in MODELS if name in names):
        if name == "ensemble":
            settings = RECIPES[recipe][name]
            _train_ensemble(cells, parts, output, settings, origin, accelerator, progress)
            continue
        settings = replace(RECIPES[recipe][name], **(changes or {}))
        torch.manual_seed(seed)
        model = build_model(name, ARCHITECTURES[recipe][name])
        fitted, train = to_train(model, cells, parts.train, settings)
        validation = examples_of(cells, parts.validation)
        history = fit(
            fitted,
            train,
            validation,
            settings,
            directory=output / name,
            seed=seed,
            accelerator=accelerator,
            progress=progress,
        )
        if accelerator.is_main_process:
            logits = predict_logits(model.cpu(), validation.inputs)
            temperature = fit_temperature(logits, validation.labels)
            _save(output, name, model, settings, origin, history, temperature, accelerator)
        accelerator.wait_for_everyone()


def to_train(
    model: torch.nn.Module, cells: Cells, positions: np.ndarray, recipe: Recipe
) -> tuple[torch.nn.Module, Examples]:
    """Return what to fit so that `model` is trained by a recipe on the cells at some positions, and the examples."""
    specimens, class_of_specimen = specimens_of(cells, positions)
    examples = examples_of(cells, positions)._replace(specimens=specimens)
    if tells_specimens_apart(recipe):
        model = SpecimenSupervision(model, class_of_specimen)
    return model, examples


def specimens_of(cells: Cells, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Number the specimens of some cells: each cell's number, int64, and each number's class, int64.

    Where the specimens are not known, as for phantoms, each class counts as one.
    """
    known = cells.source == DEFAULT_DATASET
    specimens = torch.from_numpy(blocks_of(cells)) if known else cells.labels
    _, first, number = np.unique(specimens[positions].numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(number), cells.labels[positions][torch.from_numpy(first)]


def _train_ensemble(
    cells: Cells, parts: Split, output: Path, settings: Recipe, origin: dict, accelerator: Accelerator, progress: bool
) -> None:
    members = load_weights(output, StackEnsemble.member_names, with_refusal=False)
    for name in StackEnsemble.member_names:
        trained = members.configs[name]["training"]
        for key in ("dataset_fingerprint", "protocol", "seed", "fold"):
            if trained[key] != origin[key]:
                raise ValueError(
                    f"{output / name} was trained with {key} {trained[key]!r}, the ensemble is to be fitted with "
                    f"{origin[key]!r}: it would learn from cells its members know; train them again"
                )
    ensemble = StackEnsemble(*members.models.values(), tuple(map(members.temperature, StackEnsemble.member_names)))
    ensemble.eval()
    images, labels, *_ = examples_of(cells, parts.validation)
    with torch.no_grad():
        inputs = torch.cat([ensemble.member_probabilities(batch) for batch in images.split(256)])
    if labels.bincount(minlength=len(CLASS_NAMES)).min() < 5:
        raise ValueError(
            f"the ensemble needs 5 validation cells of each class; there are {len(labels)} in all: use more"
        )
    # The members never trained on the validation cells. A fifth of them is kept aside to watch the fit.
    fitted, watched = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=origin["seed"], stratify=labels.numpy()
    )
    history = fit(
        ensemble.linear,
        Examples(inputs[fitted], labels[fitted]),
        Examples(inputs[watched], labels[watched]),
        settings,
        directory=output / "ensemble",
        seed=origin["seed"],
        accelerator=accelerator,
        progress=progress,
        computed_from=_content_of_members(output, cells),
    )
    if accelerator.is_main_process:
        temperature = fit_temperature(ensemble.linear.cpu()(inputs), labels)
        _save(output, "ensemble", ensemble, settings, origin, history, temperature, accelerator)
        train_refusal(cells, parts, output, origin)
    accelerator.wait_for_everyone()


def _content_of_members(output: Path, cells: Cells) -> str:
    # Not their folders' revision: that has temperatures in it, which other roundings change.
    digest = hashlib.sha256(cells.fingerprint.encode())
    for name in StackEnsemble.member_names:
        digest.update((output / name / "model.safetensors").read_bytes())
    return digest.hexdigest()[:16]


def train_refusal(cells: Cells, parts: Split, output: Path, origin: dict) -> None:
    """Teach the single models in `output` what is no cell, unless that is done: see `hep2.refusal`."""
    members = tuple(name for name in MODELS if name != "ensemble" and (output / name / "config.json").exists())
    if refusal_fits(output, members, origin):
        return
    weights = load_weights(output, members, with_refusal=False)

    @torch.inference_mode()
    def features_of(images: torch.Tensor) -> list[torch.Tensor]:
        return [
            torch.cat([pooled_features(model, batch) for batch in images.split(64)])
            for model in weights.models.values()
        ]

    train, validation = examples_of(cells, parts.train), cells.images[parts.validation]
    refusal = fit_refusal(members, features_of, train.inputs, train.labels, validation, origin["seed"])
    save_refusal(output, refusal, members, training=origin)


def _save(
    output: Path,
    name: str,
    model: torch.nn.Module,
    settings: Recipe,
    origin: dict,
    history: list[dict],
    temperature: float,
    accelerator: Accelerator,
) -> None:
    versions = {package: version(package) for package in ("torch", "timm", "accelerate")}
    last = {key: history[-1][key] for key in ("epoch", "validation_loss", "validation_accuracy")}
    training = origin | {
        "settings": asdict(settings),
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "versions": versions,
        "seconds": round(sum(record["seconds"] for record in history)),
    }
    save_model(output, name, model, training=training, temperature=temperature, metrics=last)
    curves = draw_curves(history, MODEL_TITLES[name], train_label(training))
    save_figure(curves, output / name / "curves.png")


def evaluate_weights(
    weights: Weights,
    cells: Cells,
    output: Path,
    *,
    protocol: str | None = None,
    seed: int | None = None,
    fold: int | None = None,
) -> dict:
    """Measure weights on the test part of a protocol, and write `metrics.json`, `predictions.csv` and the figures.

    Protocol, seed and fold are those the weights were trained with, unless given. Returns the content of
    `metrics.json`, which takes in what `hep2.specimens` has left in `output/specimen` and `output/specimen-own`.

    Raises
    ------
    ValueError
        If any test cell was among the cells that the weights were trained, calibrated or stacked on.
    """
    trained = _trained(weights)
    protocol = trained["protocol"] if protocol is None else protocol
    seed = trained["seed"] if seed is None else seed
    fold = (trained["fold"] or 0) if fold is None else fold
    test = split(cells, protocol, seed, fold).test
    check_unseen(weights, cells, test)
    answers, refused = predict(weights, cells.images[test])
    labels = cells.labels[test].numpy()
    result = {
        "protocol": protocol,
        "seed": seed,
        "fold": fold if protocol == "specimen" else None,
        "test_size": len(test),
        "dataset": cells.source,
        "dataset_fingerprint": cells.fingerprint,
        "trained_on_fingerprint": trained["dataset_fingerprint"],
        "revision": weights.revision,
        # Measured over all cells, those that would get no verdict among them.
        "models": {name: metrics(values, labels) for name, values in answers.items()},
        "refused": float(refused.mean()),
    }
    # Where the run was also measured on held-out specimens, its figures travel with the others: those of the recipe
    # that does best there, and, if that is another, those of the weights' own.
    if (output / "specimen" / "metrics.json").exists():
        result["specimen"] = read_json(output / "specimen" / "metrics.json")
    if (output / "specimen-own" / "metrics.json").exists():
        own = read_json(output / "specimen-own" / "metrics.json")
        kept = ("folds", "seed", "recipe", "changes", "refused", "models", "blocks")
        result["specimen_own"] = {key: own[key] for key in kept}
    output.mkdir(parents=True, exist_ok=True)
    names = [cells.names[position] for position in test]
    text = predictions_csv(names, [CLASS_NAMES[label] for label in labels], answers)
    write_atomically(output / "predictions.csv", text.encode())
    for name, measured in result["models"].items():
        title = f"{MODEL_TITLES[name]}, {protocol} protocol, {len(test):,} test cells"
        save_figure(draw_confusion(measured, title), output / f"confusion_{name}.png")
        save_figure(draw_reliability(measured, MODEL_TITLES[name]), output / f"reliability_{name}.png")
    write_json(output / "metrics.json", result)  # last: where it lies, the rest lies too
    return result


def stress_weights(weights: Weights, cells: Cells, dataset: str | Path) -> dict:
    """Measure weights on spoilt cells of the test part of their own split, and on images that are no cells."""
    test, trained = own_split(weights, cells).test, _trained(weights)
    wanted = {cells.names[position]: int(cells.labels[position]) for position in test}
    published = [file for file in dataset_files(dataset) if file.name in wanted]
    images = [read_intensity(file.image)[0] for file in published]
    labels = np.array([wanted[file.name] for file in published])
    return {
        "protocol": trained["protocol"],
        "seed": trained["seed"],
        "test_size": len(test),
        "revision": weights.revision,
        "robustness": measure_robustness(weights, images, labels),
        "refusals": measure_refusals(weights, cells.images[test][:, 0].numpy()),
    }


def own_split(weights: Weights, cells: Cells) -> Split:
    """Return the split that the weights were trained by.

    Raises
    ------
    ValueError
        If they were trained on other cells than these, or have seen a cell of its test part.
    """
    trained = _trained(weights)
    if trained["dataset_fingerprint"] != cells.fingerprint:
        raise ValueError(
            f"the weights were trained on {trained['dataset']} (fingerprint {trained['dataset_fingerprint']}), and "
            f"which cells of {cells.source} (fingerprint {cells.fingerprint}) they have not seen cannot be told: "
            "give the whole of that dataset"
        )
    parts = split(cells, trained["protocol"], trained["seed"], trained["fold"] or 0)
    check_unseen(weights, cells, parts.test)
    return parts


def _trained(weights: Weights) -> dict:
    """Return how the weights were trained, of the ensemble's members if they are there."""
    return weights.configs["cnn" if "cnn" in weights.configs else next(iter(weights.configs))]["training"]


def held_out_examples(
    weights: Weights, cells: Cells, dataset: str | Path, per_class: int = 5
) -> dict[str, tuple[str, bytes]]:
    """Draw cells of each class from the test part of the weights' own split: file name to class name and PNG bytes.

    The names are those of the published files, as PNG.
    """
    parts, random = own_split(weights, cells), np.random.default_rng(_trained(weights)["seed"])
    # The protocol `paper` has duplicates on both sides.
    seen = {cells.digests[position] for position in (*parts.train, *parts.validation)}
    test = np.array([position for position in parts.test if cells.digests[position] not in seen])
    chosen = [
        random.permutation(test[cells.labels.numpy()[test] == label])[:per_class] for label in range(len(CLASS_NAMES))
    ]
    names = {cells.names[position] for positions in chosen for position in positions}
    examples = {}
    for published in dataset_files(dataset):
        if published.name in names:
            intensity, _ = read_intensity(published.image)
            file = io.BytesIO()
            Image.fromarray(_whole_numbers(intensity)).save(file, "PNG")
            name = published.name if published.name.lower().endswith(".png") else f"{published.name}.png"
            examples[name] = (published.class_name, file.getvalue())
    return examples


def _whole_numbers(intensity: np.ndarray) -> np.ndarray:
    """Turn an image of any range into 8 bits where they are enough, else 16; what fits neither is scaled into them."""
    low, high = float(intensity.min()), float(intensity.max())
    if low < 0 or high > 65535:
        intensity, high = 65535 * (intensity.astype(np.float64) - low) / (high - low), 65535
    elif high <= 1:
        intensity, high = 255 * intensity, 255
    return intensity.astype(np.uint16 if high > 255 else np.uint8)


def check_unseen(weights: Weights, cells: Cells, test: np.ndarray) -> None:
    """Raise ValueError if the weights have seen any of the `test` positions, in training or in choosing.

    Of another dataset than theirs that cannot be told.
    """
    for name, config in weights.configs.items():
        trained = config["training"]
        if trained["dataset_fingerprint"] != cells.fingerprint:
            continue
        parts = split(cells, trained["protocol"], trained["seed"], trained["fold"] or 0)
        seen = np.isin(test, np.concatenate([parts.train, parts.validation]))
        if seen.any():
            raise ValueError(
                f"{int(seen.sum()):,} of the {len(test):,} test cells were used to train {name} (protocol "
                f"{trained['protocol']!r}, seed {trained['seed']}): evaluate with that protocol and seed, or train "
                "weights for this one"
            )


def predictions_csv(names: list[str], labels: list[str], answers: dict[str, np.ndarray]) -> str:
    """Write one line a cell: file, label, then each model's verdict and six probabilities."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = [f"{model}_{column}" for model in answers for column in ("verdict", *CLASS_NAMES)]
    table.writerow(["file", "label", *columns])
    for position, (name, label) in enumerate(zip(names, labels, strict=True)):
        row = [name, label]
        for values in answers.values():
            row += [CLASS_NAMES[int(values[position].argmax())], *(f"{p:.6f}" for p in values[position])]
        table.writerow(row)
    return text.getvalue()


def examples_of(cells: Cells, positions: np.ndarray) -> Examples:
    """Return the cells at some positions to train or measure on; those of the pattern Homogeneous are diffuse."""
    labels = cells.labels[positions]
    homogeneous = (labels == CLASS_NAMES.index("Homogeneous")).nonzero()[:, 0]
    return Examples(cells.images[positions], labels, diffuse=homogeneous)
