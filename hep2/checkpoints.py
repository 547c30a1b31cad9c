"""A folder of weights: `config.json`, `model.safetensors` and `metrics.json`; and how files are written and read.

The same layout lies inside the package (`hep2/weights`), in a training run's output and in a Hub repository. Only JSON
and safetensors are ever read.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from hep2.images import PREPROCESSING
from hep2.models import BASE_MODELS, MODELS, Classifier, build_model
from hep2.patterns import CLASS_NAMES

FORMAT = 2
BUNDLED = Path(__file__).with_name("weights")
CONFIG_FIELDS = {"format", "labels", "preprocessing", "models", "training", "rejection"}
MODEL_FIELDS = {"architecture", "temperature", "training"}
TRAINING_FIELDS = {"recipe", "protocol", "seed", "fold", "dataset", "dataset_fingerprint"}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A loaded classifier in evaluation mode, on the CPU, with its config and where it is from.

    `metrics` is the content of `metrics.json`, or empty. `revision` is the Hub's commit, or for a local folder a hash
    of the weights themselves. `notes` says in words what was odd about getting them.
    """

    classifier: Classifier
    config: dict
    metrics: dict
    source: str
    revision: str
    folder: Path
    notes: tuple[str, ...] = ()

    @property
    def training(self) -> dict:
        """On what, by which recipe and with which seed the weights were trained."""
        return self.config["training"]

    def history(self, name: str) -> list[dict]:
        """Return the records of a model's training epochs, or none if they did not travel with it."""
        path = self.folder / name / "log.jsonl"
        try:
            return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        except (ValueError, RecursionError):
            return []  # damaged: no answer depends on it

    def examples(self) -> list[tuple[Path, str]]:
        """Return the images of held-out cells that came with the weights, and their labels, in the order of classes."""
        return [(path, label) for label in CLASS_NAMES for path in sorted(self.folder.glob(f"examples/{label}/*.png"))]


def save_classifier(
    folder: Path, classifier: Classifier, *, training: dict, models: dict[str, dict], rejection: dict | None = None
) -> None:
    """Write a classifier into `folder`, whole or not at all.

    Filters and matrices of CNN, ResCNN and ViT are stored at half precision, which halves the download and changes no
    verdict. The rest is stored at single precision: half cannot hold the running variances of batch norm, for one.

    Parameters
    ----------
    training
        The fields of `TRAINING_FIELDS`, and any other.
    models
        For each model of `MODELS` how it was trained: its settings, JSON-able.
    rejection
        How the rejection was fitted, JSON-able.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: tensor.half() if tensor.ndim > 1 and key.partition(".")[0] in BASE_MODELS else tensor
        for key, tensor in classifier.state_dict().items()
    }
    data = save({key: tensor.contiguous().cpu() for key, tensor in tensors.items()})
    architectures = {name: asdict(getattr(classifier, name).config) for name in BASE_MODELS} | {"ensemble": {}}
    config = {
        "format": FORMAT,
        "labels": list(CLASS_NAMES),
        "preprocessing": PREPROCESSING,
        "training": training,
        "models": {
            name: {"architecture": architectures[name], "temperature": temperature, "training": models[name]}
            for name, temperature in zip(MODELS, classifier.temperatures.tolist(), strict=True)
        },
        "rejection": rejection or {},
    }
    write_atomically(folder / "model.safetensors", data)
    write_json(folder / "config.json", config)


def load_classifier(folder: Path | str = BUNDLED, *, source: str | None = None, revision: str | None = None) -> Weights:
    """Load a folder of weights strictly.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is damaged, the config does not fit this version (other labels, preprocessing or fields), or a tensor
        is missing, superfluous or of another shape.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file: give the folder it lies in" if folder.is_file() else "there is no such folder of weights"
        raise FileNotFoundError(f"{folder}: {what}; train some, or use the bundled ones")
    config, path = _read_config(folder / "config.json"), folder / "model.safetensors"
    if not path.is_file():
        raise _missing(path)
    data = path.read_bytes()
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(f"{path}: some weights are NaN or infinite; get it again")
    try:
        built = {name: build_model(name, config["models"][name]["architecture"]) for name in BASE_MODELS}
        classifier = Classifier(**built)
        halves = {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}
        classifier.load_state_dict(halves, strict=True)
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:  # a size that no memory holds among it
        raise ValueError(f"{path} does not fit {folder / 'config.json'}: {' '.join(str(error).split())}") from error
    for name, temperature in zip(MODELS, classifier.temperatures.tolist(), strict=True):
        if temperature != (written := config["models"][name]["temperature"]):
            raise ValueError(
                f"{folder / 'config.json'}: temperature of {name} is {written}, {temperature} in {path.name}"
            )
    digest = hashlib.sha256(data).hexdigest()[:12]
    metrics, notes = {}, ("metrics.json is not there: how good these weights are is not known",)
    if (folder / "metrics.json").exists():
        metrics, notes = read_json(folder / "metrics.json"), ()
        if metrics.get("revision") != digest:
            metrics, notes = {}, ("the figures in metrics.json are of other weights, and are left out",)
    return Weights(
        classifier=classifier.eval(),
        config=config,
        metrics=metrics,
        # Answers go to strangers: they learn the folder's name, not where it lies.
        source=source or ("bundled" if folder == BUNDLED else f"folder {folder.resolve().name}"),
        revision=revision or digest,
        folder=folder,
        notes=notes,
    )


def _read_config(path: Path) -> dict:
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise ValueError(f"{path}: format {config.get('format')!r}, but this version reads {FORMAT}; update hep2")
    if set(config) != CONFIG_FIELDS:
        odd = sorted(set(config) ^ CONFIG_FIELDS)
        raise ValueError(f"{path}: fields {odd} are missing or unknown; expected {sorted(CONFIG_FIELDS)}")
    for field, expected in (("labels", list(CLASS_NAMES)), ("preprocessing", PREPROCESSING)):
        if config[field] != expected:
            raise ValueError(
                f"{path}: {field} is {config[field]!r}, expected {expected!r}; use weights of this version"
            )
    models = config["models"]
    if not isinstance(models, dict) or set(models) != set(MODELS):
        raise ValueError(f"{path}: models is {models!r}, expected an object with {list(MODELS)}")
    for field, value, needed in (
        ("training", config["training"], TRAINING_FIELDS),
        *((f"models.{name}", model, MODEL_FIELDS) for name, model in models.items()),
    ):
        if not isinstance(value, dict) or not needed <= set(value):
            raise ValueError(f"{path}: {field} is {value!r}, expected an object with {sorted(needed)}")
    for name, model in models.items():
        temperature = model["temperature"]
        if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise ValueError(f"{path}: the temperature of {name} is {temperature!r}, expected a positive number")
        if not isinstance(model["architecture"], dict) or not isinstance(model["training"], dict):
            raise ValueError(f"{path}: models.{name} is {model!r}, expected objects for architecture and training")
    return config


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises
    ------
    FileNotFoundError
        If it is missing.
    ValueError
        If it is damaged, or no object.
    """
    if not path.is_file():
        raise _missing(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path} is missing: the folder does not hold complete weights; get them again, or train them"
    )
