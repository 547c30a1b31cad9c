"""Whole slide fields in, a specimen's pattern out: finds the cells, classifies each, and pools what the models say."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hep2.fields.segmentation import ONE_CELL, FoundCell, FoundField, crop, find_cells
from hep2.fields.stain import Stain, measure_stain
from hep2.images import Cell, Decoded, ImageError, ImageSource, decode
from hep2.patterns import CLASS_NAMES

if TYPE_CHECKING:
    from hep2.predictor import Prediction, Predictor

WEAK = 50.0  # signal of a typical cell over noise: below, what shows no pattern is negative, and what does is weak
NOTHING = 5.0  # the same, below which no pattern is believed
LEAST_FIT = 0.64  # of the cells to round ones of one size, below which nuclei were not seen: a cytoplasmic stain
CLEAR_FIT = 0.72  # from which they were; between the two the models must be sure,
SURE = 0.9  # the mean of the cells' top probability
CYCLING = 0.42  # spread of the cells' brightness, from which it goes by the cell cycle, as of PCNA and CENP-F
MOST_REJECTED = 0.6  # of the cells, above which the specimen has no pattern of the six
LEAST_PROBABILITY = 0.5  # of a specimen's likeliest pattern, below which none stands out
COARSE = 12.0  # pixels of a nucleus, below which speckles cannot be told from an even stain
MITOSES = 2  # in metaphase or anaphase, of one kind and none of the other, that settle what they can
SETTLED = 0.15  # probability of Homogeneous, from which stained chromatin makes it the verdict over Speckled
LOW_CONFIDENCE = 0.7  # probability of the verdict, below which the answer says so
SECOND = 0.2  # of the pooled probability, at the lower end of its interval, that makes a second pattern real
FEW = 10  # cells, below which a verdict says that it rests on few
RESAMPLES = 1000
DIGITS = 6  # of a probability in an answer
PIXEL_SIZES = (0.02, 1.0)  # micrometres, in the specimen: from an oversampled 100x objective to a 10x

NEGATIVE = "negative or too faint"
NO_PATTERN = "no pattern of the six"
NO_CELLS = "no cells found"
UNCLEAR = "no clear pattern"

Field = ImageSource | tuple[str, ImageSource | Decoded]


def check_pixel_size(pixel_size: float | None) -> None:
    """Raise ValueError for what are no micrometres a pixel of a microscope for such slides; None is right."""
    low, high = PIXEL_SIZES
    if pixel_size is not None and not (isinstance(pixel_size, (int, float)) and low <= pixel_size <= high):
        raise ValueError(f"the pixel size is {pixel_size!r}: give micrometres, {low} to {high}, or leave it out")


@dataclass(frozen=True, kw_only=True)
class CellPrediction:
    """One cell of a specimen: its number, the field it lies in, where, and its prediction."""

    number: int  # from 1, through all fields, as in picture and table
    field: int
    found: FoundCell
    prediction: "Prediction"
    mitosis: str | None = None  # "stained" or "unstained", by its chromatin

    @property
    def mitotic(self) -> bool:
        return self.mitosis is not None

    @property
    def counted(self) -> bool:
        return not self.mitotic and not self.prediction.rejected

    def as_dict(self) -> dict:
        answer = self.prediction.as_dict()
        kept = {key: answer[key] for key in ("verdict", "probability", "agreement", "models")}
        flags = {"rejected": self.prediction.rejected, "mitotic": self.mitotic, "mitosis": self.mitosis}
        return {"number": self.number, "field": self.field, "bbox": list(self.found.bbox), **kept, **flags}


@dataclass(frozen=True, kw_only=True)
class SpecimenPrediction:
    """What one specimen shows, from all its cells together.

    `verdict` is one of the six patterns, or `NEGATIVE`, `NO_PATTERN`, `UNCLEAR` or `NO_CELLS`, which have no
    probability. `second` names another pattern that is really there, if there is one.
    """

    files: list[str]
    cells: list[CellPrediction]
    weights: dict[str, str]
    verdict: str
    warnings: list[str]
    probability: float | None = None
    interval: tuple[float, float] | None = None
    second: str | None = None
    pixel_sizes: tuple[float | None, ...]  # micrometres, of each field, where they are known
    nuclei: tuple[float, ...] = ()  # diameter of a typical nucleus in each field, in pixels
    signal: float = 0.0  # of a typical cell over the background's noise

    @property
    def counts(self) -> dict[str, int]:
        verdicts = [cell.prediction.verdict for cell in self.cells if cell.counted]
        return {name: verdicts.count(name) for name in CLASS_NAMES}

    @property
    def mitoses(self) -> dict[str, int]:
        """How many cells in mitosis have stained chromatin, and how many have not."""
        kinds = [cell.mitosis for cell in self.cells]
        return {kind: kinds.count(kind) for kind in ("stained", "unstained")}

    def as_dict(self) -> dict:
        return {
            "files": self.files,
            "verdict": self.verdict,
            "probability": self.probability,
            "interval": None if self.interval is None else list(self.interval),
            "second": self.second,
            "cells": len(self.cells),
            "counts": self.counts,
            "rejected": sum(cell.prediction.rejected and not cell.mitotic for cell in self.cells),
            "mitotic": sum(cell.mitotic for cell in self.cells),
            "mitoses": self.mitoses,
            "pixel_size": list(self.pixel_sizes),
            "nucleus": [round(diameter, 1) for diameter in self.nuclei],
            "signal": round(self.signal, 1),
            "per_cell": [cell.as_dict() for cell in self.cells],
            "warnings": self.warnings,
            "weights": self.weights,
        }


def predict_specimen(
    predictor: "Predictor",
    sources: Iterable[Field],
    *,
    pixel_size: float | None = None,
    channel: str | int | None = None,
    plane: int | None = None,
    progress: Callable[[Iterable, int, str], Iterable] = lambda items, total, step: items,
    classify_cells: Callable[[Sequence[tuple[str, Cell]]], Iterable["Prediction"]] | None = None,
) -> SpecimenPrediction:
    """Read the pattern of one specimen from its fields.

    Parameters
    ----------
    predictor
        What `hep2.load` returns.
    sources
        The fields: paths, bytes or arrays, each alone or as (name, source), or decoded already as (name, `Decoded`).
    pixel_size
        Micrometres, in the place of what the files say.
    channel, plane
        As `hep2.images.decode` takes them.
    progress
        Wraps the fields whose cells are found, then the cells that are classified: (items, total, step) to items.
    classify_cells
        Takes the place of the predictor's own, where the models run elsewhere.

    Raises
    ------
    ValueError
        If `pixel_size` is none that a microscope for such slides can have, or a source is no image.
    FileNotFoundError
        If a path names no file.
    """
    check_pixel_size(pixel_size)
    fields = [_decoded(source, number, channel, plane) for number, source in enumerate(sources)]
    names = [name for name, _ in fields]
    sizes = tuple(_pixel_size(decoded, pixel_size) for _, decoded in fields)
    known = {"files": names, "weights": predictor.origin, "pixel_sizes": sizes}
    if all(max(decoded.intensity.shape) < ONE_CELL for _, decoded in fields):
        remark = "the image is no larger than one cell is: give it as a cell, not as a field"
        return SpecimenPrediction(cells=[], verdict=NO_CELLS, warnings=[remark], **known)
    steps = progress(list(zip(fields, sizes, strict=True)), len(fields), "Finding cells")
    found, stains = [], []
    for (_, decoded), size in steps:
        found.append(find_cells(decoded.intensity, size))
        stains.append(measure_stain(decoded.intensity, found[-1]) if found[-1].cells else None)
    warnings = [
        warning if len(fields) == 1 else f"{name}: {warning}"
        for (name, decoded), one in zip(fields, found, strict=True)
        for warning in (*decoded.warnings, *one.notes)
    ]
    placed, crops = [], []
    for number, ((_, decoded), one) in enumerate(zip(fields, found, strict=True)):
        for cell, mitosis in zip(one.cells, stains[number].mitoses if one.cells else (), strict=True):
            try:
                crops.append((f"cell {len(crops) + 1}", Cell(crop(decoded.intensity, cell, one.nucleus), ())))
            except ImageError:  # a crop without any light
                continue
            placed.append({"number": len(crops), "field": number, "found": cell, "mitosis": mitosis})
    predictions = progress((classify_cells or predictor.classify_cells)(crops), len(crops), "Classifying cells")
    cells = [
        CellPrediction(prediction=prediction, **place) for place, prediction in zip(placed, predictions, strict=True)
    ]
    # A field without cells says nothing of how they are stained.
    seen = [(one, stain) for one, stain in zip(found, stains, strict=True) if stain]
    decision = _decide(cells, seen)
    decision["warnings"] = warnings + decision["warnings"]
    nuclei = tuple(one.nucleus for one in found)
    signal = float(np.median([stain.signal for _, stain in seen])) if seen else 0.0
    return SpecimenPrediction(cells=cells, nuclei=nuclei, signal=signal, **known, **decision)


def _decoded(source: Field, number: int, channel: str | int | None, plane: int | None) -> tuple[str, Decoded]:
    name, image = source if isinstance(source, tuple) else (None, source)
    if name is None:
        name = str(image) if isinstance(image, (str, Path)) else f"field {number + 1}"
    return name, image if isinstance(image, Decoded) else decode(image, channel=channel, plane=plane)


def _pixel_size(decoded: Decoded, given: float | None) -> float | None:
    """Return what was given, or what the file says where a microscope for such slides can have it."""
    if given is not None:
        return given
    low, high = PIXEL_SIZES
    return decoded.pixel_size if decoded.pixel_size and low <= decoded.pixel_size <= high else None


def _decide(cells: list[CellPrediction], fields: list[tuple[FoundField, Stain]]) -> dict:
    """Say what the cells of some fields show together: the fields of `SpecimenPrediction` from `verdict` on."""
    if not cells:
        return {"verdict": NO_CELLS, "warnings": ["no whole cell was found: is it a field of cells, bright on dark?"]}
    weights = [len(found.cells) for found, _ in fields]

    def typical(values: Iterable[float]) -> float:
        return float(np.average(list(values), weights=weights))

    signal = typical(stain.signal for _, stain in fields)
    counted = [cell for cell in cells if cell.counted] or [cell for cell in cells if not cell.mitotic] or cells
    values = np.stack([cell.prediction.probabilities["ensemble"] for cell in counted])  # (cells, 6)
    mean, low, high = _interval(values)
    first, second = mean.argsort()[::-1][:2]
    reason, verdict = _objection(cells, fields, typical, mean, float(values.max(1).mean())), NO_PATTERN
    warnings = []
    if reason is None:
        first, remark = _settled(first, mean, cells)
        if first is None:
            reason = remark
        elif remark:
            warnings.append(remark)
    if reason is None and mean[first] < LEAST_PROBABILITY and not warnings:
        verdict = UNCLEAR
        reason = f"{CLASS_NAMES[first]} has {mean[first]:.0%} and {CLASS_NAMES[second]} {mean[second]:.0%}"
    if signal < NOTHING or (reason is not None and signal < WEAK):
        verdict = NEGATIVE
        reason = (
            f"a typical cell's light is {signal:.0f} times the background's noise: expose longer, or it is negative"
        )
        return {"verdict": verdict, "warnings": [reason]}
    if reason is not None:
        return {"verdict": verdict, "warnings": [f"rejected: {reason}"]}
    if signal < WEAK:
        warnings.append(f"weak signal: a typical cell's light is only {signal:.0f} times the background's noise")
    if mean[first] < LOW_CONFIDENCE:
        warnings.append(f"low confidence: the verdict has a probability of {mean[first]:.0%}")
    if len(counted) < FEW:
        warnings.append(f"only {len(counted)} cells were read: the verdict rests on few")
    others = [label for label in mean.argsort()[::-1] if label != first]
    there = low[others[0]] > SECOND
    if there:
        name = CLASS_NAMES[others[0]]
        warnings.append(f"mixed: {name} is there too, with a probability of {mean[others[0]]:.0%}")
    return {
        "verdict": CLASS_NAMES[first],
        "probability": round(float(mean[first]), DIGITS),
        "interval": (round(float(low[first]), DIGITS), round(float(high[first]), DIGITS)),
        "second": CLASS_NAMES[others[0]] if there else None,
        "warnings": warnings,
    }


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean of probabilities (cells, 6), and its 95 % bootstrap interval's ends, (6,) each."""
    random = np.random.default_rng(0)
    # How often each resample draws each cell: (resamples, cells), which takes less memory than the drawn cells.
    often = random.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
    low, high = np.quantile(often @ values / len(values), [0.025, 0.975], axis=0)
    return values.mean(0), low, high


def _objection(
    cells: list[CellPrediction],
    fields: list[tuple[FoundField, Stain]],
    typical: Callable[[Iterable[float]], float],
    mean: np.ndarray,
    top: float,
) -> str | None:
    """Say why the fields show none of the six patterns, or None where nothing speaks against it."""
    likeliest = CLASS_NAMES[int(mean.argmax())]
    interphase = [cell for cell in cells if not cell.mitotic] or cells
    rejected = sum(cell.prediction.rejected for cell in interphase) / len(interphase)
    if rejected > MOST_REJECTED:
        return f"{rejected:.0%} of the cells show none of the six patterns"
    if typical(found.dark for found, _ in fields) > 0.5:
        return f"the cells resemble {likeliest}, but the stain lies round dark nuclei"
    if typical(found.rings for found, _ in fields) > 0.5:
        return (
            None if likeliest == "Golgi" else f"the cells resemble {likeliest}, but the stain lies outside the nuclei"
        )
    fit = typical(found.fit for found, _ in fields)
    if fit < LEAST_FIT or (fit < CLEAR_FIT and top < SURE):
        return "what is stained is not round and of one size, as nuclei are"
    spread = typical(stain.spread for _, stain in fields)
    if spread > CYCLING and likeliest in ("Homogeneous", "Speckled", "Centromere"):
        return f"the cells resemble {likeliest}, but differ in brightness as by the cell cycle"
    return None


def _settled(first: int, mean: np.ndarray, cells: list[CellPrediction]) -> tuple[int | None, str | None]:
    """Let mitoses, and the resolution, decide between Homogeneous and Speckled; returns a class, or None, and why."""
    homogeneous, speckled = CLASS_NAMES.index("Homogeneous"), CLASS_NAMES.index("Speckled")
    if first not in (homogeneous, speckled):
        return first, None
    if np.median([cell.found.diameter for cell in cells]) < COARSE:
        return None, f"nuclei of less than {COARSE:.0f} pixels cannot tell Speckled from Homogeneous"
    kinds = [cell.mitosis for cell in cells]
    stained, unstained = kinds.count("stained"), kinds.count("unstained")
    if first == speckled and stained >= MITOSES and not unstained:
        if mean[homogeneous] >= SETTLED:
            return homogeneous, f"the chromatin of {stained} mitoses is stained: Homogeneous rather than Speckled"
        return None, f"the cells resemble Speckled, but the chromatin of {stained} mitoses is stained, as of AC-2"
    if first == homogeneous and unstained >= MITOSES and not stained:
        if mean[speckled] >= SETTLED:
            return speckled, f"the chromatin of {unstained} mitoses is not stained: Speckled rather than Homogeneous"
        return None, f"the cells resemble Homogeneous, but the chromatin of {unstained} mitoses is not stained"
    return first, None
