"""Reads cells with all models and gives verdicts: what page, API and command line all call."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hep2.explain import look
from hep2.imaging import Cell, ImageError, ImageSource, load_cell
from hep2.models import StackEnsemble, pooled_features, probabilities
from hep2.patterns import CLASS_NAMES, MODEL_TITLES
from hep2.weights import Weights

T, R = TypeVar("T"), TypeVar("R")

BATCH = 64  # images that are decoded before the models read them
PASS = 8  # of these go through a model together on a CPU: more would not stay in its cache
GPU_BATCH = 1024
# One pass in each of these threads: threads that share a pass as small as this one mostly wait for each other.
CORES = torch.get_num_threads()
_PASSES = ThreadPoolExecutor(CORES, "passes", initializer=torch.set_num_threads, initargs=(1,))
_DECODERS = ThreadPoolExecutor(min(2, CORES), "decoders")  # few: each may hold an image of many megapixels
LOW_CONFIDENCE = 0.7  # below this probability of the verdict a reading says so
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
    is the ensemble's; `agreement` counts the models, the ensemble among them, that say the same. An image that is
    `refused`, being no cell of the six patterns, has no verdict, and what the models say of it means nothing.
    """

    file: str
    cell: Cell
    probabilities: dict[str, np.ndarray]
    refused: bool
    weights: dict[str, str]

    @property
    def verdict(self) -> str | None:
        return None if self.refused else CLASS_NAMES[int(self.probabilities["ensemble"].argmax())]

    @property
    def probability(self) -> float | None:
        return None if self.refused else round(float(self.probabilities["ensemble"].max()), DIGITS)

    @property
    def agreement(self) -> int | None:
        return None if self.refused else list(self._said.values()).count(self.verdict)

    @property
    def warnings(self) -> list[str]:
        """What speaks against trusting the verdict, in words: refusal, disagreement, low confidence, odd images."""
        warnings = list(self.cell.warnings)
        if self.refused:
            return [
                "refused: this does not look like a HEp-2 cell of the six patterns; give one sharp cell, bright on "
                "dark, whose nucleus fills most of the image",
                *warnings,
            ]
        dissent = [f"{MODEL_TITLES[name]} says {said}" for name, said in self._said.items() if said != self.verdict]
        if dissent:
            warnings.append(f"disagreement: {', '.join(dissent)}")
        if self.probability < LOW_CONFIDENCE:
            warnings.append(f"low confidence: the verdict has a probability of {self.probability:.0%}")
        return warnings

    @property
    def _said(self) -> dict[str, str]:
        return {name: CLASS_NAMES[int(values.argmax())] for name, values in self.probabilities.items()}

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


class Predictions(NamedTuple):
    """Calibrated probabilities (cells, 6), float32, of each model, and which cells are refused, bool (cells,)."""

    probabilities: dict[str, np.ndarray]
    refused: np.ndarray


def predict(weights: Weights, images: Tensor) -> Predictions:
    """Let all models read images (cells, 1, 78, 78), float32 in [0, 1].

    On a CPU the kernels do with each cell of a pass what they would do with it alone, and what follows is computed in
    double precision: a cell gets the same answer to the last digit whatever it comes together with.
    """
    size = GPU_BATCH if weights.device != "cpu" else min(PASS, -(-len(images) // CORES))
    passes = _run(weights, pooled_features, images.split(max(1, size)))
    return _combined(weights, {name: torch.cat(features) for name, features in passes.items()})


def _run(weights: Weights, forward: Callable[[nn.Module, Tensor], R], batches: Sequence[Tensor]) -> dict[str, list[R]]:
    """Take every batch through every model but the ensemble; returns what `forward` gives, a list for each model."""

    @torch.inference_mode()
    def task(model: nn.Module, batch: Tensor) -> R:
        return forward(model, batch.to(weights.device))

    single = {name: model for name, model in weights.models.items() if name != "ensemble"}
    # A card does one thing after the other; the cores of a CPU share out models and cells.
    if weights.device != "cpu":
        return {name: [task(model, batch) for batch in batches] for name, model in single.items()}
    # The ViT takes longest, and is the last of them: begun first, it keeps no core busy alone at the end.
    waiting = {
        name: [_PASSES.submit(task, model, batch) for batch in batches] for name, model in reversed(single.items())
    }
    return {name: [future.result() for future in waiting[name]] for name in single}


@torch.inference_mode()
def _combined(weights: Weights, features: dict[str, Tensor]) -> Predictions:
    """Turn the single models' pooled features (cells, width) into probabilities of all, and refusals."""
    result = {
        name: probabilities(_linear(weights.models[name].head, values), weights.temperature(name))
        for name, values in features.items()
    }
    if "ensemble" in weights.models:
        # The stack takes the probabilities that its members have just given, and does not run them again.
        stacked = torch.cat([result[name] for name in StackEnsemble.member_names], dim=1)
        logits = _linear(weights.models["ensemble"].linear, stacked)
        result["ensemble"] = probabilities(logits, weights.temperature("ensemble"))
    first = next(iter(result.values()))
    refused = torch.zeros(len(first), dtype=torch.bool)
    if weights.refusal is not None:
        refusal, seen = weights.refusal, torch.cat([features[name] for name in weights.refusal.members], dim=1)
        refused = _linear(refusal.linear, refusal.standardised(seen))[:, 0] < refusal.threshold
    return Predictions({name: values.cpu().numpy() for name, values in result.items()}, refused.cpu().numpy())


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    # One row and many go through different kernels, whose roundings differ: beyond the digits that are kept.
    return F.linear(inputs.double(), layer.weight.double(), layer.bias.double())


def csv_header(weights: Weights) -> list[str]:
    """Name the columns of `csv_row`."""
    probabilities = [f"{model}_{name}" for model in weights.models for name in CLASS_NAMES]
    return ["file", "verdict", "probability", "agreement", *probabilities, "warnings", "error", "revision"]


def csv_row(answer: Reading | Failure, weights: Weights) -> list:
    """Give one answer of these weights as a line of a table; what a failure lacks is left empty."""
    values = answer.as_dict()
    first = [values.get(column) for column in ("file", "verdict", "probability", "agreement")]
    models = values.get("models", {model: {} for model in weights.models})
    numbers = [models[model].get(name, "") for model in weights.models for name in CLASS_NAMES]
    remarks = "; ".join(values.get("warnings", []))
    return [*first, *numbers, remarks, values.get("error", ""), weights.revision]


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

    def read(
        self,
        sources: Iterable[tuple[str, ImageSource]],
        read_cells: Callable[[Sequence[tuple[str, Cell]]], Iterable[Reading]] | None = None,
    ) -> Iterator[Reading | Failure]:
        """Read (name, image) pairs in order, a batch at a time; an image that cannot be read costs no other.

        `read_cells` may stand in for the method of that name, for cells that are read elsewhere than they are decoded.
        """
        read_cells = read_cells or self.read_cells
        for batch in _batches(sources):
            decoded = list(_DECODERS.map(_decoded, *zip(*batch, strict=True)))
            cells = [(name, cell) for (name, _), cell in zip(batch, decoded, strict=True) if isinstance(cell, Cell)]
            readings = iter(read_cells(cells) if cells else ())
            yield from (cell if isinstance(cell, Failure) else next(readings) for cell in decoded)

    def explain(self, name: str, cell: Cell) -> Explanation:
        """Read one cell and say where each model looked, in one forward pass."""
        looked = _run(self.weights, look, [torch.from_numpy(cell.pixels)[None]])
        answers = _combined(self.weights, {model: features for model, [(features, _)] in looked.items()})
        maps = {model: values[0].cpu().numpy() for model, [(_, values)] in looked.items()}
        maps["ensemble"] = np.mean([maps[model] for model in StackEnsemble.member_names], axis=0)
        return Explanation(self._reading(name, cell, answers, 0), maps)

    def read_cells(self, cells: Sequence[tuple[str, Cell]]) -> Iterator[Reading]:
        """Read (name, cell) pairs that are prepared already, in order, a batch at a time."""
        for batch in _batches(cells):
            answers = predict(self.weights, torch.from_numpy(np.stack([cell.pixels for _, cell in batch])))
            yield from (self._reading(name, cell, answers, number) for number, (name, cell) in enumerate(batch))

    @property
    def origin(self) -> dict[str, str]:
        """Which weights answer: their source and revision."""
        return {"source": self.weights.source, "revision": self.weights.revision}

    def _reading(self, name: str, cell: Cell, answers: Predictions, position: int) -> Reading:
        own = {model: values[position] for model, values in answers.probabilities.items()}
        return Reading(name, cell, own, bool(answers.refused[position]), self.origin)


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    items = iter(items)
    while batch := list(islice(items, BATCH)):
        yield batch


def _decoded(name: str, source: ImageSource) -> Cell | Failure:
    try:
        return load_cell(source)
    except (ImageError, OSError) as error:
        return Failure(name, str(error))


class Gathering(Generic[T, R]):
    """Hands over what several threads ask at the same time in one list, as a batch costs a GPU no more than one."""

    def __init__(self, function: Callable[[list[T]], list[R]], most: int = BATCH) -> None:
        """Take a function that answers each item of a list, and how many items it gets at most."""
        self.function, self.most = function, most
        self.waiting: SimpleQueue[tuple[T, Future]] = SimpleQueue()
        self.lock = Lock()

    def __call__(self, item: T) -> R:
        """Return the answer to one item, or raise what the function raises for it alone."""
        own: Future[R] = Future()
        self.waiting.put((item, own))
        # While one thread works others queue up here, and the next to come in takes all of them along.
        with self.lock:
            while not own.done():
                self._answer([self.waiting.get() for _ in range(min(self.most, self.waiting.qsize()))])
        return own.result()

    def _answer(self, batch: list[tuple[T, Future]]) -> None:
        try:
            answers = self.function([item for item, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            # One item may spoil a list for strangers: each gets a try of its own.
            for item, future in batch:
                if not future.done():
                    self._answer([(item, future)])
