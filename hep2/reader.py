"""Reads cells with all models and gives verdicts: what page, API and command line all call."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hep2.explain import logits_and_maps
from hep2.imaging import Cell, ImageError, ImageSource, load_cell
from hep2.models import StackEnsemble, probabilities
from hep2.patterns import CLASS_NAMES
from hep2.weights import Weights

BATCH = 64
DIGITS = 6  # of a probability in an answer; what lies behind depends on the machine


@dataclass(frozen=True)
class Failure:
    """An image that could not be read, and why, in words for its sender."""

    file: str
    error: str

    def as_dict(self) -> dict:
        return {"file": self.file, "error": self.error}


@dataclass(frozen=True)
class Reading:
    """What the models say of one cell.

    `probabilities` maps each model to an array of shape (6,), calibrated, in the order of `CLASS_NAMES`. The verdict
    is the ensemble's; `agreement` counts the models, the ensemble among them, that say the same.
    """

    file: str
    cell: Cell
    probabilities: dict[str, np.ndarray]
    weights: dict[str, str]

    @property
    def verdict(self) -> str:
        return CLASS_NAMES[int(self.probabilities["ensemble"].argmax())]

    @property
    def probability(self) -> float:
        return round(float(self.probabilities["ensemble"].max()), DIGITS)

    @property
    def agreement(self) -> int:
        return sum(CLASS_NAMES[int(p.argmax())] == self.verdict for p in self.probabilities.values())

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
            "warnings": list(self.cell.warnings),
            "weights": self.weights,
        }


@torch.inference_mode()
def predict(weights: Weights, images: Tensor) -> dict[str, np.ndarray]:
    """Return calibrated probabilities (cells, 6), float32, of each model for images (cells, 1, 78, 78)."""
    parts = [_probabilities(weights, batch) for batch in images.split(BATCH)]
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in weights.models}


def _probabilities(weights: Weights, images: Tensor) -> dict[str, Tensor]:
    single = (name for name in weights.models if name != "ensemble")
    return _combined(weights, {name: weights.models[name](images) for name in single})


@torch.inference_mode()
def _combined(weights: Weights, logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the single models' logits into calibrated probabilities of all."""
    result = {name: probabilities(values, weights.temperature(name)) for name, values in logits.items()}
    if "ensemble" in weights.models:
        # The stack takes the probabilities that its members have just given, and does not run them again.
        stacked = torch.cat([result[name] for name in StackEnsemble.member_names], dim=1)
        stacked = weights.models["ensemble"].linear(stacked)
        result["ensemble"] = probabilities(stacked, weights.temperature("ensemble"))
    return result


def csv_header(models: Iterable[str]) -> list[str]:
    """Name the columns of `csv_row`."""
    probabilities = [f"{model}_{name}" for model in models for name in CLASS_NAMES]
    return ["file", "verdict", "probability", "agreement", *probabilities, "warnings", "error"]


def csv_row(answer: Reading | Failure, models: Iterable[str]) -> list:
    """Give one answer as a line of a table; what a failure lacks is left empty."""
    values = answer.as_dict()
    first = [values.get(column, "") for column in ("file", "verdict", "probability", "agreement")]
    models = values.get("models", {model: {} for model in models}).values()
    numbers = [model.get(name, "") for model in models for name in CLASS_NAMES]
    return [*first, *numbers, "; ".join(values.get("warnings", [])), values.get("error", "")]


@dataclass(frozen=True)
class Explanation:
    """A reading and, for each model, a map (78, 78) in [0, 1] of what it looked at; see `hep2.explain`.

    The ensemble has no eyes of its own: its map is the mean of its members'.
    """

    reading: Reading
    maps: dict[str, np.ndarray]


class Reader:
    """Holds loaded weights and reads images with them; made once and used for every request."""

    def __init__(self, weights: Weights) -> None:
        """Take weights of all four models.

        Raises
        ------
        ValueError
            If the ensemble is missing, whose verdict every reading carries.
        """
        if "ensemble" not in weights.models:
            raise ValueError(f"a reader needs the ensemble, but only {list(weights.models)} were loaded")
        self.weights = weights

    def read(self, sources: Iterable[tuple[str, ImageSource]]) -> Iterator[Reading | Failure]:
        """Read (name, image) pairs in order, a batch at a time; an image that cannot be read costs no other."""
        batch: list[tuple[str, Cell | Failure]] = []
        for name, source in sources:
            try:
                batch.append((name, load_cell(source)))
            except (ImageError, OSError) as error:
                batch.append((name, Failure(name, str(error))))
            if len(batch) == BATCH:
                yield from self._read_batch(batch)
                batch = []
        yield from self._read_batch(batch)

    def read_files(self, paths: Iterable[Path | str]) -> Iterator[Reading | Failure]:
        """Read image files in order, each under the name it was given by."""
        return self.read((str(path), Path(path)) for path in paths)

    def explain(self, name: str, source: ImageSource) -> Explanation:
        """Read one image and say where each model looked, in one forward pass.

        Raises what `hep2.imaging.load_cell` raises.
        """
        cell = load_cell(source)
        image = torch.from_numpy(cell.pixels)[None]
        looked = {
            model: logits_and_maps(self.weights.models[model], image)
            for model in self.weights.models
            if model != "ensemble"
        }
        answers = _combined(self.weights, {model: logits for model, (logits, _) in looked.items()})
        maps = {model: values[0].numpy() for model, (_, values) in looked.items()}
        maps["ensemble"] = np.mean([maps[model] for model in StackEnsemble.member_names], axis=0)
        reading = Reading(name, cell, {model: values[0].numpy() for model, values in answers.items()}, self._origin)
        return Explanation(reading, maps)

    @property
    def _origin(self) -> dict[str, str]:
        return {"source": self.weights.source, "revision": self.weights.revision}

    def _read_batch(self, batch: list[tuple[str, Cell | Failure]]) -> Iterator[Reading | Failure]:
        cells = [cell for _, cell in batch if isinstance(cell, Cell)]
        if cells:
            images = torch.from_numpy(np.stack([cell.pixels for cell in cells]))
            answers = predict(self.weights, images)
        position = 0
        for name, cell in batch:
            if isinstance(cell, Failure):
                yield cell
                continue
            yield Reading(name, cell, {model: values[position] for model, values in answers.items()}, self._origin)
            position += 1
