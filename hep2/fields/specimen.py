"""Whole slide fields in, a specimen's pattern out: finds the cells, classifies each, and pools what the models say."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hep2.fields.segmentation import NUCLEUS_MICRONS, ONE_CELL, FoundCell, FoundField, crop, find_cells
from hep2.images import Cell, Decoded, ImageError, ImageSource, decode
from hep2.patterns import CLASS_NAMES, PATTERNS

if TYPE_CHECKING:
    from hep2.predictor import Prediction, Predictor

FAINT = 0.06  # of the full range of 8 bits, or of a deeper image's brightest light, that cells must rise
FAINT_PEAK = 0.08  # the same for the brightest fifth of a cell: one of the two is enough,
FAINT_STAIN = 0.04  # and this for cells whose stain lies outside the nucleus
MOST_REJECTED = 0.5  # of the cells, above which the specimen has no pattern of the six
LEAST_STAIN = 0.35  # of the stained area that must lie in cells, for the same reason
LEAST_PROBABILITY = 0.4  # of a specimen's likeliest pattern, below which none stands out
LOW_CONFIDENCE = 0.7  # probability of the verdict, below which the answer says so
SECOND = 0.2  # of the pooled probability, at the lower end of its interval, that makes a second pattern real
CONDENSED = 1.6  # times the median brightness of the brightest fifth of a cell, from which it is taken as mitotic,
CONDENSED_SPREADS = 2  # if it also stands out by so many spreads: nucleoli are of very unlike brightness
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
    mitotic: bool

    @property
    def counted(self) -> bool:
        return not self.mitotic and not self.prediction.rejected

    def as_dict(self) -> dict:
        answer = self.prediction.as_dict()
        kept = {key: answer[key] for key in ("verdict", "probability", "agreement", "models")}
        flags = {"rejected": self.prediction.rejected, "mitotic": self.mitotic}
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
    pixel_sizes: tuple[float | None, ...] = ()  # micrometres, of each field, where they are known

    @property
    def counts(self) -> dict[str, int]:
        verdicts = [cell.prediction.verdict for cell in self.cells if cell.counted]
        return {name: verdicts.count(name) for name in CLASS_NAMES}

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
            "pixel_size": list(self.pixel_sizes),
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
    found = [find_cells(decoded.intensity, size) for (_, decoded), size in steps]
    warnings = [
        warning if len(fields) == 1 else f"{name}: {warning}"
        for (name, decoded), one in zip(fields, found, strict=True)
        for warning in (*decoded.warnings, *one.notes)
    ]
    placed, crops = [], []
    for number, ((_, decoded), one) in enumerate(zip(fields, found, strict=True)):
        for cell, mitotic in zip(one.cells, in_mitosis(one), strict=True):
            try:
                crops.append(crop(decoded.intensity, cell, one.nucleus))
            except ImageError:  # a crop without any light
                continue
            placed.append((number, cell, mitotic))
    cells = [(f"cell {number + 1}", Cell(pixels, ())) for number, pixels in enumerate(crops)]
    predictions = list(progress((classify_cells or predictor.classify_cells)(cells), len(cells), "Classifying cells"))
    read = [
        CellPrediction(number=place + 1, field=number, found=cell, prediction=prediction, mitotic=mitotic)
        for place, ((number, cell, mitotic), prediction) in enumerate(zip(placed, predictions, strict=True))
    ]
    faint = all(_is_faint(decoded.intensity, one) for (_, decoded), one in zip(fields, found, strict=True))
    # A field without cells says nothing of how they are stained.
    stained = float(np.mean([one.stained for one in found if one.cells] or [0.0]))
    hollow = sum(len(one.cells) for one in found if one.hollow) > len(placed) / 2
    pooled = _pool(read, faint, stained, hollow)
    if not read and pixel_size:
        low, high = (diameter / pixel_size for diameter in NUCLEUS_MICRONS)
        warnings.append(
            f"with {pixel_size:g} micrometres a pixel nuclei would be {low:.0f} to {high:.0f} pixels: leave the size out "
            "if unsure"
        )
    pooled["warnings"] = warnings + pooled["warnings"]
    return SpecimenPrediction(cells=read, **known, **pooled)


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


def in_mitosis(found: FoundField) -> list[bool]:
    """Tell which cells of a field are in mitosis, by their chromatin: packed, and so brighter than the others'.

    Fields of one specimen may differ in exposure, so a cell is compared with those of its own field. Where the stain
    lies outside the nuclei, no chromatin shines.
    """
    if len(found.cells) < 5 or found.hollow:
        return [False] * len(found.cells)
    peaks = np.log([max(cell.peak, 1e-9) for cell in found.cells])
    above = peaks - np.median(peaks)
    spread = 1.4826 * np.median(abs(above))  # the standard deviation, but for those that stand out
    return ((above > np.log(CONDENSED)) & (above > CONDENSED_SPREADS * spread)).tolist()


def _is_faint(intensity: np.ndarray, found: FoundField) -> bool:
    if not found.cells:
        return True
    brightest = float(intensity.max())
    full = next((limit for limit in (1.0, 255.0) if brightest <= limit), brightest)
    peak = float(np.median([cell.peak for cell in found.cells])) / full
    if found.hollow:
        return peak < FAINT_STAIN
    return float(np.median([cell.brightness for cell in found.cells])) / full < FAINT and peak < FAINT_PEAK


def _pool(cells: list[CellPrediction], faint: bool, stained: float, hollow: bool) -> dict:
    """Weigh the cells' calibrated probabilities; returns the fields of `SpecimenPrediction` that say what they show."""
    counted = [cell for cell in cells if cell.counted]
    if not cells:
        remark = "no whole cell was found: is it a field of cells, bright on dark?"
        return {"verdict": NO_CELLS, "warnings": [remark]}
    if faint:
        remark = "the cells hardly rise above the background: expose longer, or it is negative"
        return {"verdict": NEGATIVE, "warnings": [remark]}
    interphase = [cell for cell in cells if not cell.mitotic]
    rejected = sum(cell.prediction.rejected for cell in interphase) / max(1, len(interphase))
    if rejected > MOST_REJECTED or not counted:
        remark = f"rejected: {rejected:.0%} of the cells show none of the six patterns"
        return {"verdict": NO_PATTERN, "warnings": [remark]}
    if stained < LEAST_STAIN:
        remark = f"rejected: only {stained:.0%} of what is stained lies in cells that can be told apart"
        return {"verdict": NO_PATTERN, "warnings": [remark]}
    values = np.stack([cell.prediction.probabilities["ensemble"] for cell in counted])  # (cells, 6)
    mean = values.mean(0)
    random = np.random.default_rng(0)
    # How often each resample draws each cell: (resamples, cells), which takes less memory than the drawn cells.
    often = random.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
    draws = often @ values / len(values)  # (resamples, 6)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    first, next_one = mean.argsort()[::-1][:2]
    if hollow and PATTERNS[first].nuclear:
        remark = f"rejected: the cells resemble {CLASS_NAMES[first]}, but the stain lies outside the nuclei"
        return {"verdict": NO_PATTERN, "warnings": [remark]}
    if mean[first] < LEAST_PROBABILITY:
        remark = f"rejected: no pattern stands out; the likeliest, {CLASS_NAMES[first]}, has {mean[first]:.0%}"
        return {"verdict": NO_PATTERN, "warnings": [remark]}
    warnings = []
    if mean[first] < LOW_CONFIDENCE:
        warnings.append(f"low confidence: the verdict has a probability of {mean[first]:.0%}")
    if len(counted) < FEW:
        warnings.append(f"only {len(counted)} cells were read: the verdict rests on few")
    there = low[next_one] > SECOND and not (hollow and PATTERNS[next_one].nuclear)
    second = CLASS_NAMES[next_one] if there else None
    if second:
        warnings.append(f"mixed: {second} is there too, with a probability of {mean[next_one]:.0%}")
    return {
        "verdict": CLASS_NAMES[first],
        "probability": round(float(mean[first]), DIGITS),
        "interval": (round(float(low[first]), DIGITS), round(float(high[first]), DIGITS)),
        "second": second,
        "warnings": warnings,
    }
