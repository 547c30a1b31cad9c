"""A folder of trained weights: one folder a model with `config.json` and `model.safetensors`, and `metrics.json`.

Beside the models lies `refusal`, a small layer on what they see, which knows images that are no cells.

The same layout lies inside the package (`hep2/bundled`), in a training run's output and in a Hub repository.
Only JSON and safetensors are ever read.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from hep2.files import missing, read_json, write_atomically, write_json
from hep2.imaging import PREPROCESSING
from hep2.inference import ready_to_read
from hep2.models import MODELS, Refusal, StackEnsemble, build_model
from hep2.patterns import CLASS_NAMES

FORMAT = 1
BUNDLED = Path(__file__).with_name("bundled")
CONFIG_FIELDS = {"format", "model", "architecture", "labels", "preprocessing", "training", "calibration", "metrics"}
TRAINING_FIELDS = {"recipe", "protocol", "seed", "fold", "dataset", "dataset_fingerprint"}
LOG_FIELDS = {"epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"}
REFUSAL_FIELDS = {"format", "members", "preprocessing", "training"}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Loaded models in evaluation mode, by name in the order of `MODELS`, with their configs and where they are from.

    `metrics` is the content of `metrics.json`, or empty. `revision` is the Hub's commit, or for a local folder a hash
    of the weights themselves.
    """

    models: dict[str, nn.Module]
    configs: dict[str, dict]
    metrics: dict
    source: str
    revision: str
    folder: Path
    refusal: Refusal | None = None  # absent where it was not trained
    device: str = "cpu"
    notes: tuple[str, ...] = ()  # what was odd about getting them, in words

    def to(self, device: str) -> "Weights":
        """Move the models, these very modules, to a device, and return weights that say so."""
        refusal = self.refusal and self.refusal.to(device)
        return replace(self, device=device, refusal=refusal, models={n: m.to(device) for n, m in self.models.items()})

    def history(self, name: str) -> list[dict]:
        """Return the records of a model's training epochs, or none if they did not travel with it."""
        path = self.folder / name / "log.jsonl"
        try:
            records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        except (ValueError, RecursionError):
            records = [None]
        whole = all(_are_numbers(record, LOG_FIELDS) for record in records)
        return records if whole else []  # damaged: no verdict depends on it

    def examples(self) -> list[tuple[Path, str]]:
        """Return the images of held-out cells that came with the weights, and their labels, in the order of classes."""
        return [(path, label) for label in CLASS_NAMES for path in sorted(self.folder.glob(f"examples/{label}/*.png"))]

    def temperature(self, name: str) -> float:
        return self.configs[name]["calibration"]["temperature"]


def best_device() -> str:
    """Name the device that reads fastest here. Training leaves that to accelerate."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def save_model(
    folder: Path, name: str, model: nn.Module, *, training: dict, temperature: float, metrics: dict | None = None
) -> None:
    """Write one model's config and weights into `folder/name`, whole or not at all.

    Filters and matrices are stored at half precision, which halves the download and changes no verdict; the rest,
    and so the running variances of batch norm, which half precision cannot hold, at single precision.
    """
    directory = folder / name
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(model, StackEnsemble):
        tensors = model.linear.state_dict()
        architecture = {"members": {member: _digest(folder / member) for member in StackEnsemble.member_names}}
    else:
        tensors = {key: t.half() if t.ndim > 1 else t for key, t in model.state_dict().items()}
        architecture = asdict(model.config)
    config = {
        "format": FORMAT,
        "model": name,
        "architecture": architecture,
        "labels": list(CLASS_NAMES),
        "preprocessing": PREPROCESSING,
        "training": training,
        "calibration": {"temperature": temperature},
        "metrics": metrics or {},
    }
    data = save({key: tensor.contiguous().cpu() for key, tensor in tensors.items()})
    write_atomically(directory / "model.safetensors", data)
    write_json(directory / "config.json", config)


def save_refusal(folder: Path, refusal: Refusal, members: tuple[str, ...], *, training: dict) -> None:
    """Write into `folder/refusal` what knows images that are no cells; it reads features of the models `members`."""
    directory = folder / "refusal"
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "members": {name: _digest(folder / name) for name in members},
        "preprocessing": PREPROCESSING,
        "training": training,
    }
    write_atomically(directory / "model.safetensors", save(refusal.state_dict()))
    write_json(directory / "config.json", config)


def refusal_fits(folder: Path, members: tuple[str, ...], training: dict) -> bool:
    """Tell whether `save_refusal` has written a refusal for the members as they lie in `folder`."""
    path = folder / "refusal" / "config.json"
    if not path.is_file():
        return False
    config = read_json(path)
    return config["members"] == {name: _digest(folder / name) for name in members} and config["training"] == training


def load_weights(
    folder: Path | str = BUNDLED,
    names: tuple[str, ...] = tuple(MODELS),
    *,
    source: str | None = None,
    revision: str | None = None,
    notes: tuple[str, ...] = (),
    with_refusal: bool = True,
) -> Weights:
    """Load the named models strictly, with the ensemble its members, and the refusal if it and its members are there.

    `with_refusal=False` leaves the refusal alone, which may belong to other members where some are being trained.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is damaged, a config does not fit this version (other labels, preprocessing or fields), a tensor is
        missing, superfluous or of another shape, or the ensemble was fitted on other members.
    """
    folder = Path(folder)
    if unknown := set(names) - set(MODELS):
        raise ValueError(f"unknown models {sorted(unknown)}: choose from {list(MODELS)}")
    if not folder.is_dir():
        what = "is a file: give the folder it lies in" if folder.is_file() else "there is no such folder of weights"
        raise FileNotFoundError(f"{folder}: {what}; train some, or use the bundled ones")
    needed = set(names) | (set(StackEnsemble.member_names) if "ensemble" in names else set())
    models: dict[str, nn.Module] = {}
    configs: dict[str, dict] = {}
    for name in MODELS:
        if name not in needed:
            continue
        configs[name] = _read_config(folder / name / "config.json", name)
        path = folder / name / "model.safetensors"
        if name == "ensemble":
            models[name] = _load_ensemble(folder, path, models, configs).eval()
        else:
            try:
                models[name] = build_model(name, configs[name]["architecture"])
            except (ValueError, TypeError, RuntimeError, MemoryError) as error:  # a size that no memory holds among it
                raise ValueError(f"{folder / name / 'config.json'}: {error}") from error
            _load_tensors(models[name], path)
            ready_to_read(models[name])
    refusal = None
    if with_refusal and (folder / "refusal").is_dir():
        refusal = _load_refusal(folder / "refusal", models)
    if refusal is None and "ensemble" in models:
        notes += ("these weights give every image a verdict: what knows images that are no cells is not there",)
    read = [*models, "refusal"] if refusal is not None else list(models)
    digest = hashlib.sha256("".join(_digest(folder / name) for name in read).encode()).hexdigest()[:12]
    metrics = _read_metrics(folder / "metrics.json")
    if not metrics and set(names) == set(MODELS):
        notes += ("metrics.json is not there: how good these weights are is not known",)
    if set(names) == set(MODELS) and metrics.get("revision", digest) != digest:
        metrics, notes = {}, (*notes, "the figures in metrics.json are of other weights, and are left out")
    return Weights(
        models=models,
        configs=configs,
        metrics=metrics,
        # Answers go to strangers: they learn the folder's name, not where it lies.
        source=source or ("bundled" if folder == BUNDLED else f"folder {folder.resolve().name}"),
        revision=revision or digest,
        folder=folder,
        refusal=refusal,
        notes=notes,
    )


def _read_metrics(path: Path) -> dict:
    metrics = read_json(path) if path.exists() else {}
    if metrics and not isinstance(metrics.get("models"), dict):
        raise ValueError(f"{path}: models is {metrics.get('models')!r}, expected the figures of each model")
    for name, figures in metrics.get("models", {}).items():
        if name not in MODELS or not _are_figures(figures):
            raise ValueError(f"{path}: models holds no whole figures of {name!r}; measure the weights again")
    for key in ("specimen", "specimen_own"):
        if metrics.get(key) is not None and not _are_specimen_figures(metrics[key]):
            raise ValueError(f"{path}: {key} holds no whole figures; measure the four folds again")
    return metrics


def _are_specimen_figures(specimen: object) -> bool:
    """Tell whether these are the figures of `hep2.specimens.evaluate_specimens`, as far as pages show them."""
    if not _are_numbers(specimen, ("folds", "refused")) or not isinstance(specimen.get("recipe"), str):
        return False
    models, blocks = specimen.get("models"), specimen.get("blocks")
    if not isinstance(models, dict) or not isinstance(blocks, dict):
        return False
    if "ensemble" not in models or not all(map(_are_figures, models.values())):
        return False
    return _are_numbers(blocks.get("ensemble"), ("right", "total"))


def _are_figures(figures: object) -> bool:
    """Tell whether these are a model's figures as `hep2.evaluation.metrics` gives them, as far as pages show them."""
    if not _are_numbers(figures, ("accuracy", "mean_class_accuracy", "macro_f1", "ece")):
        return False
    classes, confusion = figures.get("per_class"), figures.get("confusion")
    bins = figures.get("reliability")
    if not isinstance(bins, list) or not all(_are_numbers(row, ("probability", "accuracy", "cells")) for row in bins):
        return False
    if not isinstance(classes, dict) or list(classes) != list(CLASS_NAMES):
        return False
    if not all(_are_numbers(row, ("precision", "recall", "f1", "support")) for row in classes.values()):
        return False
    if not isinstance(confusion, list) or not all(isinstance(row, list) for row in confusion):
        return False
    counts = [count for row in confusion for count in row]
    square = [len(row) for row in confusion] == [len(CLASS_NAMES)] * len(CLASS_NAMES)
    return square and all(isinstance(count, int) for count in counts)


def _are_numbers(values: object, keys: Iterable[str]) -> bool:
    return isinstance(values, dict) and all(isinstance(values.get(key), (int, float)) for key in keys)


def own_specimens_text(metrics: dict) -> str:
    """Say in words how the weights' own recipe does on held-out specimens, if another's figures stand for it."""
    own = metrics.get("specimen_own")
    if own is None:
        return ""
    ensemble, blocks = own["models"]["ensemble"], own["blocks"]["ensemble"]
    return (
        f"These weights' own recipe does otherwise: {specimen_models(own)}, have a mean class accuracy of "
        f"{ensemble['mean_class_accuracy']:.4f} (stack ensemble; calibration error {ensemble['ece']:.4f}), and "
        f"{blocks['right']:d} of {blocks['total']:d} specimens right."
    )


def specimen_models(specimen: dict) -> str:
    """Say in words which models gave the figures under `specimen` in a `metrics.json`: not the weights beside it."""
    epochs = specimen.get("changes", {}).get("epochs")
    return f"models of the recipe {specimen['recipe']}, " + (
        f"{epochs} epochs each" if epochs else "trained to its end"
    )


def _read_config(path: Path, name: str) -> dict:
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise ValueError(f"{path}: format {config.get('format')!r}, but this version reads {FORMAT}; update hep2")
    if set(config) != CONFIG_FIELDS:
        odd = sorted(set(config) ^ CONFIG_FIELDS)
        raise ValueError(f"{path}: fields {odd} are missing or unknown; expected {sorted(CONFIG_FIELDS)}")
    for field, expected in (("model", name), ("labels", list(CLASS_NAMES)), ("preprocessing", PREPROCESSING)):
        if config[field] != expected:
            raise ValueError(
                f"{path}: {field} is {config[field]!r}, expected {expected!r}; use weights of this version"
            )
    for field, needed in (("training", TRAINING_FIELDS), ("architecture", set())):
        if not isinstance(config[field], dict) or not needed <= set(config[field]):
            raise ValueError(f"{path}: {field} is {config[field]!r}, expected an object with {sorted(needed)}")
    if not isinstance(config["training"].get("seconds", 0), (int, float)):
        raise ValueError(f"{path}: training.seconds is {config['training']['seconds']!r}, expected a number")
    settings = config["training"].get("settings", {})  # from which curves take their labels
    changes = settings.get("finish_changes") if isinstance(settings, dict) else None
    for field, value in (("settings", settings), ("settings.finish_changes", changes or {})):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: training.{field} is {value!r}, expected an object; get the weights again")
    temperature = config["calibration"].get("temperature") if isinstance(config["calibration"], dict) else None
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"{path}: calibration is {config['calibration']!r}, expected a positive temperature")
    return config


def _load_ensemble(folder: Path, path: Path, models: dict[str, nn.Module], configs: dict[str, dict]) -> StackEnsemble:
    expected = configs["ensemble"]["architecture"].get("members")
    found = {member: _digest(folder / member) for member in StackEnsemble.member_names}
    if expected != found:
        raise ValueError(
            f"{folder / 'ensemble' / 'config.json'}: the ensemble was fitted on members {expected}, but the folder "
            f"holds {found}; train the ensemble again on these members"
        )
    temperatures = tuple(configs[member]["calibration"]["temperature"] for member in StackEnsemble.member_names)
    ensemble = StackEnsemble(*(models[member] for member in StackEnsemble.member_names), temperatures)
    _load_tensors(ensemble.linear, path)
    return ensemble


def _load_refusal(directory: Path, models: dict[str, nn.Module]) -> Refusal | None:
    config = read_json(directory / "config.json")
    path = directory / "config.json"
    if config.get("format") != FORMAT or set(config) != REFUSAL_FIELDS or config["preprocessing"] != PREPROCESSING:
        raise ValueError(f"{path} does not fit this version; expected {sorted(REFUSAL_FIELDS)} of format {FORMAT}")
    members = config["members"]
    if not isinstance(members, dict) or not set(members) <= set(MODELS) - {"ensemble"}:
        raise ValueError(f"{path}: members is {members!r}, expected single models and their digests")
    if not set(members) <= set(models):
        return None
    found = {name: _digest(directory.parent / name) for name in members}
    if members != found:
        raise ValueError(
            f"{path}: it was fitted on members {members}, but the folder holds {found}; train the ensemble again"
        )
    refusal = Refusal(tuple(members), sum(models[name].head.in_features for name in members))
    _load_tensors(refusal, directory / "model.safetensors")
    return refusal.eval()


def _load_tensors(module: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise missing(path)
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(f"{path}: some weights are NaN or infinite; get it again")
    try:
        module.load_state_dict({key: _restored(tensor) for key, tensor in tensors.items()}, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its config: {' '.join(str(error).split())}") from error


def _restored(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _digest(directory: Path) -> str:
    path = directory / "model.safetensors"
    if not path.is_file():
        raise missing(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
