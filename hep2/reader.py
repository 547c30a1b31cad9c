"""Reads cells with all models and gives verdicts: what page, API and command line all call."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hep2.explain import logits_and_maps
from hep2.imaging import Cell, ImageError, ImageSource, load_cell
from hep2.models import StackEnsemble, probabilities
from hep2.patterns import CLASS_NAMES
from hep2.weights import Weights

T, R = TypeVar("T"), TypeVar("R")

BATCH = 64
# One pass in each of these threads: threads that share a pass as small as this one mostly wait for each other.
_CORES = ThreadPoolExecutor(torch.get_num_threads(), "cores", initializer=torch.set_num_threads, initargs=(1,))
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


def predict(weights: Weights, images: Tensor) -> dict[str, np.ndarray]:
    """Return calibrated probabilities (cells, 6), float32, of each model for images (cells, 1, 78, 78).

    On a CPU each cell is a pass of its own, which costs no more than its share of a batch, and a cell gets the same
    answer to the last digit whatever it comes together with. On a GPU cells go in batches.
    """
    batches = images.split(1 if weights.device == "cpu" else BATCH)
    logits = _run(weights, lambda model, batch: model(batch), batches)
    parts = [
        _combined(weights, {name: values[part] for name, values in logits.items()}) for part in range(len(batches))
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in weights.models}


def _run(weights: Weights, forward: Callable[[nn.Module, Tensor], R], batches: Sequence[Tensor]) -> dict[str, list[R]]:
    """Take every batch through every model but the ensemble; returns what `forward` gives, a list for each model."""

    @torch.inference_mode()
    def task(model: nn.Module, batch: Tensor) -> R:
        return forward(model, batch.to(weights.device))

    names = [name for name in weights.models if name != "ensemble"]
    # A card does one thing after the other; the cores of a CPU share out models and cells.
    if weights.device != "cpu":
        return {name: [task(weights.models[name], batch) for batch in batches] for name in names}
    waiting = {name: [_CORES.submit(task, weights.models[name], batch) for batch in batches] for name in names}
    return {name: [future.result() for future in futures] for name, futures in waiting.items()}


@torch.inference_mode()
def _combined(weights: Weights, logits: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Turn the single models' logits into calibrated probabilities of all."""
    result = {name: probabilities(values, weights.temperature(name)) for name, values in logits.items()}
    if "ensemble" in weights.models:
        # The stack takes the probabilities that its members have just given, and does not run them again.
        stacked = torch.cat([result[name] for name in StackEnsemble.member_names], dim=1)
        stacked = weights.models["ensemble"].linear(stacked)
        result["ensemble"] = probabilities(stacked, weights.temperature("ensemble"))
    return {name: values.cpu().numpy() for name, values in result.items()}


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
        looked = _run(self.weights, logits_and_maps, [torch.from_numpy(cell.pixels)[None]])
        answers = _combined(self.weights, {model: logits for model, [(logits, _)] in looked.items()})
        maps = {model: values[0].cpu().numpy() for model, [(_, values)] in looked.items()}
        maps["ensemble"] = np.mean([maps[model] for model in StackEnsemble.member_names], axis=0)
        return Explanation(Reading(name, cell, {m: values[0] for m, values in answers.items()}, self._origin), maps)

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


class Gathering(Generic[T, R]):
    """Hands over what several threads ask at the same time in one list, as a batch costs a GPU no more than one."""

    def __init__(self, function: Callable[[list[T]], list[R]], most: int = BATCH) -> None:
        """Take a function that answers each item of a list, and how many items it gets at most."""
        self.function, self.most = function, most
        self.waiting: SimpleQueue[tuple[T, Future]] = SimpleQueue()
        self.lock = Lock()

    def __call__(self, item: T) -> R:
        """Return the answer to one item; what the function raises is raised for each item of its list."""
        own: Future[R] = Future()
        self.waiting.put((item, own))
        # While one thread works others queue up here, and the next to come in takes all of them along.
        with self.lock:
            while not own.done():
                self._answer([self.waiting.get() for _ in range(min(self.most, self.waiting.qsize()))])
        return own.result()

    def _answer(self, batch: list[tuple[T, Future]]) -> None:
        try:
            for (_, future), answer in zip(batch, self.function([item for item, _ in batch]), strict=True):
                future.set_result(answer)
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
