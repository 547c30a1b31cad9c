"""Images to predictions: what page, API, command line, fields and benchmarks all call."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hep2.checkpoints import Weights
from hep2.hub import find_weights
from hep2.images import Cell, ImageSource, load_cell
from hep2.models import BASE_MODELS, MODELS, Classifier, StackEnsemble
from hep2.patterns import CLASS_NAMES, IMAGE_SIZE, MODEL_TITLES
from hep2.saliency import saliency_map

if TYPE_CHECKING:
    from hep2.fields import SpecimenPrediction

BATCH = 64  # images that are decoded before the models see them
CPU_BATCH = 32  # of these go through the models together: more would not stay in the processor's cache
GPU_BATCH = 1024
LOW_CONFIDENCE = 0.7  # below this probability of the verdict a prediction says so
DIGITS = 6  # of a probability in an answer; what lies behind depends on the machine and on the batch


def load(weights: str | Path | None = None, device: str | None = None) -> "Predictor":
    """Load a predictor.

    Parameters
    ----------
    weights
        ``OWNER/NAME[@revision]`` on the Hugging Face Hub, a local folder, or None for the bundled weights.
    device
        A PyTorch device; None takes the GPU where there is one.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, repository or revision, or the Hub cannot be reached and nothing is cached.
    ValueError
        If what was found does not fit this version.
    """
    return Predictor(find_weights(weights), device)


@dataclass(frozen=True)
class Failure:
    """An image that could not be read, and why, in words for its sender."""

    file: str
    error: str
    verdict: None = None
    probability: None = None

    @property
    def warnings(self) -> list[str]:
        return [self.error]

    def as_dict(self) -> dict:
        return {"file": self.file, "error": self.error}


@dataclass(frozen=True)
class Prediction:
    """What the models say of one cell.

    `probabilities` maps each model to an array of shape (6,), calibrated, in the order of `CLASS_NAMES`. The verdict is
    the ensemble's; `agreement` counts the models, the ensemble among them, that say the same. An image that is
    `rejected`, since its `rejection` score is below the threshold or it is a whole field, has no verdict.
    """

    file: str
    cell: Cell
    probabilities: dict[str, np.ndarray]
    rejection: float
    rejected: bool
    weights: dict[str, str]

    @property
    def verdict(self) -> str | None:
        return None if self.rejected else self._says("ensemble")

    @property
    def probability(self) -> float | None:
        return None if self.rejected else round(float(self.probabilities["ensemble"].max()), DIGITS)

    @property
    def agreement(self) -> int | None:
        return None if self.rejected else sum(self._says(name) == self.verdict for name in self.probabilities)

    @property
    def warnings(self) -> list[str]:
        """What speaks against trusting the verdict: rejection, disagreement, low confidence, an odd image."""
        if self.rejected:
            return [
                "rejected: this does not look like a HEp-2 cell of the six patterns; give one sharp cell, bright on "
                "dark, whose nucleus fills most of the image",
                *self.cell.warnings,
            ]
        warnings = list(self.cell.warnings)
        others = [name for name in self.probabilities if self._says(name) != self.verdict]
        if others:
            warnings.append("disagreement: " + ", ".join(f"{MODEL_TITLES[n]} says {self._says(n)}" for n in others))
        if self.probability < LOW_CONFIDENCE:
            warnings.append(f"low confidence: the verdict has a probability of {self.probability:.0%}")
        return warnings

    def _says(self, model: str) -> str:
        return CLASS_NAMES[int(self.probabilities[model].argmax())]

    def as_dict(self) -> dict:
        return {
            "file": self.file,
            "verdict": self.verdict,
            "probability": self.probability,
            "agreement": self.agreement,
            "models": {
                name: {label: round(float(p), DIGITS) for label, p in zip(CLASS_NAMES, values, strict=True)}
                for name, values in self.probabilities.items()
            },
            "warnings": self.warnings,
            "weights": self.weights,
        }


class Output(NamedTuple):
    """Answers to some images: for each model calibrated probabilities (images, 6), float32; the rejection's scores,
    float32 (images,); and which images are rejected, bool (images,)."""

    probabilities: dict[str, np.ndarray]
    rejection: np.ndarray
    rejected: np.ndarray


@dataclass(frozen=True)
class Explanation:
    """A prediction, and for each model a saliency map (78, 78) in [0, 1]: for the ensemble the mean of its members'."""

    prediction: Prediction
    maps: dict[str, np.ndarray]


class Predictor:
    """Loaded weights, ready to answer; made once and used for every request."""

    def __init__(self, weights: Weights, device: str | None = None) -> None:
        self.weights = weights
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._classifier = optimized_for_serving(weights.classifier, self.device)
        self._dtype = next(self._classifier.cnn.parameters()).dtype

    @property
    def origin(self) -> dict[str, str]:
        """Which weights answer: their source and revision."""
        return {"source": self.weights.source, "revision": self.weights.revision}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Output:
        """Answer images (images, 1, 78, 78), float32 in [0, 1]."""
        if images.ndim != 4 or images.shape[1:] != (1, IMAGE_SIZE, IMAGE_SIZE) or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}: give floats in [0, 1] of shape (images, 1, "
                f"{IMAGE_SIZE}, {IMAGE_SIZE}), as `hep2.images.load_cell` makes them"
            )
        size = CPU_BATCH if self.device.type == "cpu" else GPU_BATCH
        answers = [self._classifier(batch.to(self.device, self._dtype)) for batch in images.split(size)]
        return _output(*map(torch.cat, zip(*answers, strict=True)))

    def classify(
        self,
        sources: Iterable[ImageSource | tuple[str, ImageSource]],
        *,
        channel: str | int | None = None,
        plane: int | None = None,
        classify_cells: Callable[[Sequence[tuple[str, Cell]]], Iterable[Prediction]] | None = None,
    ) -> Iterator[Prediction | Failure]:
        """Predict images in order, a batch at a time; one that cannot be read costs no other its answer.

        Parameters
        ----------
        sources
            Paths, bytes or arrays, or pairs of a name and one of these.
        channel, plane
            Which channel and plane of each image to read, if not the ones that `hep2.images.decode` would choose.
        classify_cells
            Takes the place of the method of that name, for models that run elsewhere than images are decoded.
        """
        if isinstance(sources, ImageSource):
            raise ValueError("classify takes several images: of one, give [image]")
        classify_cells = classify_cells or self.classify_cells
        sources = (_named(source, number) for number, source in enumerate(sources, start=1))
        while batch := list(islice(sources, BATCH)):
            loaded = [_load(name, source, channel, plane) for name, source in batch]
            cells = [(name, cell) for (name, _), cell in zip(batch, loaded, strict=True) if isinstance(cell, Cell)]
            predictions = iter(classify_cells(cells) if cells else ())
            yield from (cell if isinstance(cell, Failure) else next(predictions) for cell in loaded)

    def classify_cells(self, cells: Sequence[tuple[str, Cell]]) -> list[Prediction]:
        """Predict (name, cell) pairs that are decoded and prepared already, in order."""
        if not cells:
            return []
        return self._predictions(cells, self(torch.from_numpy(np.stack([cell.pixels for _, cell in cells]))))

    def _predictions(self, cells: Sequence[tuple[str, Cell]], output: Output) -> list[Prediction]:
        return [
            Prediction(
                name,
                cell,
                {model: values[number] for model, values in output.probabilities.items()},
                float(output.rejection[number]),
                bool(output.rejected[number]) or cell.is_field,
                self.origin,
            )
            for number, (name, cell) in enumerate(cells)
        ]

    def specimen(self, sources: Iterable[ImageSource | tuple[str, ImageSource]], **options) -> "SpecimenPrediction":
        """Predict the pattern of one specimen from its slide fields; see `hep2.fields.predict_specimen`."""
        from hep2.fields import predict_specimen  # a feature, which stands on this module

        return predict_specimen(self, sources, **options)

    def explain(
        self,
        image: ImageSource | Cell | tuple[str, ImageSource | Cell],
        *,
        channel: str | int | None = None,
        plane: int | None = None,
    ) -> Explanation:
        """Predict one cell, and say where it spoke for each model's answer.

        Takes a path, bytes, an array or a prepared `Cell`, or a pair of a name and one of these.

        Raises
        ------
        ValueError
            If it cannot be read.
        """
        name, cell = _named(image, 1)
        if not isinstance(cell, Cell):
            cell = load_cell(cell, channel=channel, plane=plane)
        pixels = torch.from_numpy(cell.pixels)[None].to(self.device, self._dtype)
        seen = {model: saliency_map(getattr(self._classifier, model), pixels) for model in BASE_MODELS}
        with torch.inference_mode():
            answers = self._classifier.answers({model: pooled for model, (_, pooled) in seen.items()})
        (prediction,) = self._predictions([(name, cell)], _output(*answers))
        maps = {model: values[0].cpu().numpy() for model, (values, _) in seen.items()}
        maps["ensemble"] = np.mean([maps[model] for model in StackEnsemble.members], axis=0)
        return Explanation(prediction, maps)


def optimized_for_serving(classifier: Classifier, device: torch.device) -> Classifier:
    """Return a copy on a device with norms folded into convolutions, and on a GPU with models in half precision."""
    served = deepcopy(classifier).eval().requires_grad_(False)
    for sequence in [module for module in served.modules() if isinstance(module, nn.Sequential)]:
        if [type(module) for module in sequence[:2]] == [nn.Conv2d, nn.BatchNorm2d]:
            sequence[0], sequence[1] = fuse_conv_bn_eval(sequence[0], sequence[1]), nn.Identity()
    served = served.to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        for name in BASE_MODELS:
            getattr(served, name).half()
    return served


def _output(probabilities: Tensor, scores: Tensor, rejected: Tensor) -> Output:
    shares, scores, rejected = (values.cpu().numpy() for values in (probabilities, scores, rejected))
    return Output({name: shares[:, number] for number, name in enumerate(MODELS)}, scores, rejected)


def _named(source: ImageSource | Cell | tuple, number: int) -> tuple[str, ImageSource | Cell]:
    if isinstance(source, tuple):
        return source
    return (str(source) if isinstance(source, (str, Path)) else f"image {number}"), source


def _load(name: str, source: ImageSource, channel: str | int | None, plane: int | None) -> Cell | Failure:
    try:
        return load_cell(source, channel=channel, plane=plane)
    except (ValueError, OSError) as error:
        return Failure(name, str(error))
