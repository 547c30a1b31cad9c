"""From cells to a folder of measured weights: training, calibration, rejection and evaluation, each entered once."""

import csv
import hashlib
import io
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from PIL import Image
from torch import Generator, Tensor, nn

from hep2.augmentation import as_strangers
from hep2.checkpoints import Weights, load_classifier, read_json, save_classifier, write_atomically, write_json
from hep2.data import Cells, Split, dataset_files, specimens_of, split
from hep2.evaluation import draw_confusion, draw_curves, draw_reliability, fit_temperature, metrics, save_figure
from hep2.images import decode
from hep2.losses import AuxiliarySpecimenLoss, Examples, predict_logits
from hep2.models import BASE_MODELS, MODELS, Classifier, StackEnsemble, build_model
from hep2.patterns import CLASS_NAMES, MODEL_TITLES
from hep2.predictor import Predictor
from hep2.recipes import Plan
from hep2.teacher import Teacher, Teachers
from hep2.training import fit


def train_models(
    cells: Cells,
    parts: Split,
    output: Path,
    *,
    plan: Plan,
    names: tuple[str, ...] = BASE_MODELS,
    files: dict[str, Path] | None = None,
    seed: int = 0,
    accelerator: Accelerator,
    progress: bool = True,
) -> dict[str, nn.Module]:
    """Train CNN, ResCNN and ViT, or some of them, on the train cells; what is finished in `output` is not repeated.

    Parameters
    ----------
    files
        For some teachers of the plan, a local file of their pretrained weights.
    """
    models = {}
    for name in names:
        torch.manual_seed(seed)  # a model begins with the same weights, whichever others are trained
        models[name] = build_model(name, plan.architectures.get(name))
    train, validation = examples_of(cells, parts.train), examples_of(cells, parts.validation)
    settings = {
        "seed": seed,
        "accelerator": accelerator,
        "progress": progress,
        "computed_from": identity_of(cells, parts),
    }

    def teacher() -> nn.Module:
        return Teachers(train_teachers(train, validation, output, plan, files or {}, settings))

    if plan.teachers:
        recipe, taught = plan.models[names[0]], {"teacher": teacher, "taught_by": ", ".join(plan.teachers)}
        fit(models, train, validation, recipe, directory=output / "students", **taught, **settings)
    else:
        specimens, class_of_specimen = specimens_of(cells, parts.train)
        for name, model in models.items():
            recipe, losses = plan.models[name], {}
            if recipe.auxiliary_specimen_loss:
                losses[name] = AuxiliarySpecimenLoss(class_of_specimen, model.head.in_features, recipe.label_smoothing)
            known = train._replace(specimens=specimens)
            fit({name: model}, known, validation, recipe, directory=output / name, losses=losses, **settings)
    for name, model in models.items():
        if plan.models[name].class_balance == "logits":
            frequency = train.labels.bincount(minlength=len(CLASS_NAMES)) / len(train.labels)
            model.head.bias.data -= frequency.log()
    return models


def train_teachers(
    train: Examples, validation: Examples, output: Path, plan: Plan, files: dict[str, Path], settings: dict
) -> list[nn.Module]:
    """Fine-tune the plan's pretrained networks one after the other."""
    teachers = []
    for name, recipe in plan.teachers.items():
        directory = output / f"teacher-{name}"
        started = (directory / "checkpoint.pt").exists()
        torch.manual_seed(settings["seed"])
        teacher = Teacher(name, files.get(name), pretrained=not started)
        fit({directory.name: teacher}, train, validation, recipe, directory=directory, **settings)
        teachers.append(teacher)
    return teachers


def examples_of(cells: Cells, positions: np.ndarray) -> Examples:
    """Return the cells at some positions to train or measure on; those of the pattern Homogeneous are diffuse."""
    labels = cells.labels[positions]
    homogeneous = (labels == CLASS_NAMES.index("Homogeneous")).nonzero()[:, 0]
    return Examples(cells.images[positions], labels, diffuse=homogeneous)


def identity_of(cells: Cells, parts: Split) -> str:
    """Identify a split of some cells; not by their pixels, which differ in roundings between machines."""
    digest = hashlib.sha256(b"|".join(part.astype(np.int64).tobytes() for part in parts)).hexdigest()[:16]
    return f"{cells.fingerprint}-{digest}"


def assemble(
    models: dict[str, nn.Module],
    validation: Examples,
    output: Path,
    *,
    plan: Plan,
    seed: int = 0,
    accelerator: Accelerator,
    progress: bool = True,
    computed_from: str,
) -> Classifier:
    """Calibrate the models, fit the stack on what CNN and ViT say, and put all into one classifier.

    All is fitted on validation cells shifted as a stranger's, and even on these a model is right more often than on a
    new patient's cells. So a temperature (Guo et al. 2017) may soften a model's probabilities, and never sharpen them.
    """
    classifier = Classifier(**models).eval()
    images, labels = as_strangers(validation.inputs, Generator().manual_seed(seed)), validation.labels
    if plan.models["cnn"].class_balance != "none":
        evenly = repeated_evenly(labels)
        images, labels = images[evenly], labels[evenly]
    logits = {name: predict_logits(model, images) for name, model in models.items()}
    temperatures = {name: max(1.0, fit_temperature(values, labels)) for name, values in logits.items()}
    members = [(logits[name] / temperatures[name]).softmax(1) for name in StackEnsemble.members]
    shares = torch.cat(members, dim=1).clone()
    # A fifth of the cells is kept aside to watch the fit.
    watched = np.arange(len(shares)) % 5 == 0
    fit(
        {"ensemble": classifier.ensemble},
        Examples(shares[~watched], labels[~watched]),
        Examples(shares[watched], labels[watched]),
        plan.models["ensemble"],
        directory=output / "ensemble",
        seed=seed,
        accelerator=accelerator,
        progress=progress,
        computed_from=computed_from,
    )
    of_stack = predict_logits(classifier.ensemble, shares)
    temperatures["ensemble"] = max(1.0, fit_temperature(of_stack, labels))
    classifier.temperatures.copy_(torch.tensor([temperatures[name] for name in MODELS]))
    return classifier


def repeated_evenly(labels: Tensor) -> Tensor:
    """Return positions of labels, int64, that name each as often as the most frequent class has cells."""
    of_class = [(labels == number).nonzero()[:, 0].numpy() for number in range(len(CLASS_NAMES))]
    return torch.from_numpy(np.concatenate([np.resize(own, max(map(len, of_class))) for own in of_class]))


def train(
    cells: Cells,
    output: Path,
    *,
    plan: Plan,
    recipe: str,
    names: tuple[str, ...] = tuple(MODELS),
    protocol: str = "deduplicated",
    seed: int = 0,
    fold: int = 0,
    files: dict[str, Path] | None = None,
    fit_rejection: Callable[[Classifier, Examples, Examples, int], dict],
    accelerator: Accelerator,
    progress: bool = True,
) -> dict:
    """Train, calibrate, measure and save; returns the content of `metrics.json`, on the main process alone.

    Without all models in `names` there is nothing to save but their checkpoints: they are measured, no more.

    Parameters
    ----------
    fit_rejection
        Fits a classifier's rejection on train and validation cells, and returns how, JSON-able; see `hep2.rejection`.

    Raises
    ------
    ValueError
        If the cells do not suffice, or `output` holds another run, or another process trains into it.
    """
    parts = split(cells, protocol, seed, fold)
    if missing := set(range(len(CLASS_NAMES))) - set(cells.labels[parts.train].tolist()):
        lacking = ", ".join(CLASS_NAMES[number] for number in sorted(missing))
        raise ValueError(f"{cells.source}: no cell of {lacking} to train on: give some of each of the six patterns")
    validation = examples_of(cells, parts.validation)
    whole = "ensemble" in names
    if whole and validation.labels.bincount(minlength=len(CLASS_NAMES)).min() < 5:
        raise ValueError(
            f"the ensemble needs 5 validation cells of each class; of {len(cells)} cells {len(validation.labels)} are "
            "for validation: use more cells, or train single models with --models"
        )
    settings = {"plan": plan, "seed": seed, "accelerator": accelerator, "progress": progress}
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            try:  # two trainings would write over each other's weights
                stack.enter_context(FileLock(output / ".lock", timeout=0))
            except Timeout as error:
                raise ValueError(
                    f"another process trains into {output}: wait for its end, or give another --output"
                ) from error
        models = train_models(
            cells, parts, output, names=tuple(n for n in BASE_MODELS if n in names), files=files, **settings
        )
        if not accelerator.is_main_process:
            return {}
        if not whole:
            return measure_models(models, cells, parts.test, output)
        classifier = assemble(models, validation, output, computed_from=identity_of(cells, parts), **settings)
        rejection = fit_rejection(classifier, examples_of(cells, parts.train), validation, seed)
        origin = {
            "recipe": recipe,
            "protocol": protocol,
            "seed": seed,
            "fold": fold if protocol == "specimen" else None,
            "dataset": cells.source,
            "dataset_fingerprint": cells.fingerprint,
            "mixed_precision": accelerator.mixed_precision,
            "versions": {package: version(package) for package in ("torch", "timm", "accelerate")},
            "teachers": {name: asdict(settings) for name, settings in plan.teachers.items()},
        }
        how = {name: {"settings": asdict(plan.models[name])} for name in MODELS}
        save_classifier(output, classifier, training=origin, models=how, rejection=rejection)
        return evaluate(load_classifier(output), cells, output)


def evaluate(
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
    `metrics.json`, which takes in what `python -m benchmarks.held_out_specimens` has left in `output/held_out`.

    Raises
    ------
    ValueError
        If any test cell was among the cells that the weights were trained, calibrated or stacked on.
    """
    trained = weights.training
    protocol = trained["protocol"] if protocol is None else protocol
    seed = trained["seed"] if seed is None else seed
    fold = (trained["fold"] or 0) if fold is None else fold
    test = split(cells, protocol, seed, fold).test
    check_unseen(weights, cells, test)
    result = {
        "protocol": protocol,
        "seed": seed,
        "fold": fold if protocol == "specimen" else None,
        "test_size": len(test),
        "dataset": cells.source,
        "dataset_fingerprint": cells.fingerprint,
        "trained_on_fingerprint": trained["dataset_fingerprint"],
        "revision": weights.revision,
    }
    answers = Predictor(weights)(cells.images[test])
    # Measured over all cells, rejected ones among them.
    result |= {"rejected": float(answers.rejected.mean()), **measure(answers.probabilities, cells, test, output)}
    if (output / "held_out" / "metrics.json").exists():
        result["specimen"] = read_json(output / "held_out" / "metrics.json")
    for name, measured in result["models"].items():
        title = f"{MODEL_TITLES[name]}, {protocol} protocol, {len(test):,} test cells"
        save_figure(draw_confusion(measured, title), output / f"confusion_{name}.png")
        save_figure(draw_reliability(measured, MODEL_TITLES[name]), output / f"reliability_{name}.png")
        if history := weights.history(name):
            (output / name).mkdir(exist_ok=True)
            save_figure(draw_curves(history, MODEL_TITLES[name]), output / name / "curves.png")
    write_json(output / "metrics.json", result)  # last: where it lies, the rest lies too
    return result


def measure_models(models: dict[str, nn.Module], cells: Cells, test: np.ndarray, output: Path) -> dict:
    """Measure single models, uncalibrated, on the cells at some positions."""
    images = cells.images[test]
    return measure({n: predict_logits(m, images).softmax(1).numpy() for n, m in models.items()}, cells, test, output)


def measure(probabilities: dict[str, np.ndarray], cells: Cells, test: np.ndarray, output: Path) -> dict:
    """Measure each model's probabilities (cells, 6) at some positions, and write them into `predictions.csv`."""
    labels = cells.labels[test].numpy()
    output.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = [f"{model}_{column}" for model in probabilities for column in ("verdict", *CLASS_NAMES)]
    table.writerow(["file", "label", *columns])
    for row, position in enumerate(test):
        line = [cells.names[position], CLASS_NAMES[labels[row]]]
        for values in probabilities.values():
            line += [CLASS_NAMES[int(values[row].argmax())], *(f"{p:.6f}" for p in values[row])]
        table.writerow(line)
    write_atomically(output / "predictions.csv", text.getvalue().encode())
    return {"models": {name: metrics(values, labels) for name, values in probabilities.items()}}


def split_of(weights: Weights, cells: Cells) -> Split:
    """Divide the cells as the training of the weights has."""
    trained = weights.training
    return split(cells, trained["protocol"], trained["seed"], trained["fold"] or 0)


def check_unseen(weights: Weights, cells: Cells, test: np.ndarray) -> None:
    """Raise ValueError if the weights have seen any of the `test` positions, in training or in choosing.

    Of another dataset than theirs that cannot be told.
    """
    trained = weights.training
    if trained["dataset_fingerprint"] != cells.fingerprint:
        return
    parts = split_of(weights, cells)
    seen = np.isin(test, np.concatenate([parts.train, parts.validation]))
    if seen.any():
        raise ValueError(
            f"{int(seen.sum()):,} of the {len(test):,} test cells were used to train the weights (protocol "
            f"{trained['protocol']!r}, seed {trained['seed']}): evaluate with that protocol and seed, or train "
            "weights for this one"
        )


def held_out_examples(
    weights: Weights, cells: Cells, dataset: str | Path, count: int = 5
) -> dict[str, tuple[str, bytes]]:
    """Draw `count` cells of each class from the test part of the weights' own split.

    Returns file names, mapped to class name and PNG bytes.

    Raises
    ------
    ValueError
        If the weights were trained on other cells, of which it can't be told which they have seen.
    """
    trained = weights.training
    if trained["dataset_fingerprint"] != cells.fingerprint:
        raise ValueError(f"the weights were trained on {trained['dataset']}, not on {cells.source}: give that dataset")
    parts = split_of(weights, cells)
    # The protocol `reference` has duplicates on both sides.
    seen = {cells.digests[position] for position in (*parts.train, *parts.validation)}
    test = np.array([position for position in parts.test if cells.digests[position] not in seen])
    labels, random = cells.labels.numpy()[test], np.random.default_rng(trained["seed"])
    chosen = [random.permutation(test[labels == label])[:count] for label in range(len(CLASS_NAMES))]
    names = {cells.names[position] for position in np.concatenate(chosen)}
    examples = {}
    for file in dataset_files(dataset):
        if file.name in names:
            intensity = decode(file.image).intensity
            data = io.BytesIO()
            Image.fromarray(np.clip(intensity, 0, 65535).astype("uint8" if intensity.max() < 256 else "uint16")).save(
                data, "PNG"
            )
            examples[f"{Path(file.name).stem}.png"] = (file.class_name, data.getvalue())
    return examples
