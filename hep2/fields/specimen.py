"""A whole slide field in, a specimen's pattern out: finds the cells, reads each, and pools what the models say."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from hep2.imaging import Cell, ImageError
from hep2.patterns import CLASS_NAMES, MODEL_TITLES, PATTERNS
from hep2.reader import DIGITS, LOW_CONFIDENCE, Reader, Reading
from hep2.segmentation import NUCLEUS_MICRONS, ONE_CELL, FoundCell, FoundField, crop, find_cells

FAINT = 0.06  # of the full range of 8 bits, or of a deeper image's brightest light, that cells must rise above ground
FAINT_PEAK = 0.08  # the same for the brightest fifth of a cell: one of the two is enough,
FAINT_STAIN = 0.04  # and this for cells whose stain lies outside the nucleus
MOST_REFUSED = 0.5  # of the cells, above which the specimen has no pattern of the six
LEAST_STAIN = 0.35  # of the stained area that must lie in cells, for the same reason
LEAST_PROBABILITY = (
    0.4  # of a specimen's likeliest pattern, below which none stands out: of two that are mixed, one does
)
SECOND = 0.2  # of the pooled probability, at the lower end of its interval, that makes a second pattern real
CONDENSED = 1.6  # times the median brightness of the brightest fifth of a cell, from which it is taken as mitotic,
CONDENSED_SPREADS = 2  # if it also stands out by so many spreads: nucleoli are of very unlike brightness
FEW = 10  # cells, below which a verdict says that it rests on few
RESAMPLES = 1000
PIXEL_SIZES = (0.02, 1.0)  # micrometres, in the specimen: from an oversampled 100x objective to a 10x

NEGATIVE = "negative or too faint"
NO_PATTERN = "no pattern of the six"
NO_CELLS = "no cells found"


def check_pixel_size(pixel_size: float | None) -> None:
    """Raise ValueError for what are no micrometres a pixel of a microscope for such slides; None is right."""
    low, high = PIXEL_SIZES
    if pixel_size is not None and not (isinstance(pixel_size, (int, float)) and low <= pixel_size <= high):
        raise ValueError(f"the pixel size is {pixel_size!r}: give micrometres, {low} to {high}, or leave it out")


@dataclass(frozen=True, kw_only=True)
class CellReading:
    """One cell of a specimen: the field it lies in, where, and its reading."""

    field: int
    found: FoundCell
    reading: Reading
    mitotic: bool

    @property
    def counted(self) -> bool:
        return not self.mitotic and not self.reading.refused

    def as_dict(self) -> dict:
        answer = self.reading.as_dict()
        kept = {key: answer[key] for key in ("verdict", "probability", "agreement", "models")}
        refused = {"refused": self.reading.refused, "mitotic": self.mitotic}
        return {"field": self.field, "bbox": list(self.found.bbox), **kept, **refused}


@dataclass(frozen=True, kw_only=True)
class SpecimenReading:
    """What one specimen shows, from all its cells together.

    `verdict` is one of the six patterns, or `NEGATIVE`, `NO_PATTERN` or `NO_CELLS`, which have no probability.
    `second` names another pattern that is really there, if there is one.
    """

    files: list[str]
    cells: list[CellReading]
    weights: dict[str, str]
    verdict: str
    warnings: list[str]
    probability: float | None = None
    interval: tuple[float, float] | None = None
    second: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        verdicts = [cell.reading.verdict for cell in self.cells if cell.counted]
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
            "refused": sum(cell.reading.refused and not cell.mitotic for cell in self.cells),
            "mitotic": sum(cell.mitotic for cell in self.cells),
            "per_cell": [cell.as_dict() for cell in self.cells],
            "warnings": self.warnings,
            "weights": self.weights,
        }


def read_specimen(
    reader: Reader,
    fields: list[tuple[str, np.ndarray, list[str]]],
    *,
    pixel_size: float | None = None,
    progress: Callable[[Iterable, int, str], Iterable] = lambda items, total, step: items,
    read_cells: Callable[[list[tuple[str, Cell]]], Iterable[Reading]] | None = None,
) -> SpecimenReading:
    """Read one specimen from its fields: (name, intensity, notes) each, as `hep2.imaging.read_intensity` gives them.

    `pixel_size` is in micrometres. `progress` wraps the fields whose cells are found, and then the cells as they are
    read, and is told how many there are and which step it is.
    `read_cells` takes the place of the reader's own, where that is to run on a card that is lent.

    Raises
    ------
    ValueError
        If `pixel_size` is none that a microscope for such slides can have.
    """
    check_pixel_size(pixel_size)
    names = [name for name, _, _ in fields]
    if all(max(intensity.shape) < ONE_CELL for _, intensity, _ in fields):
        remark = "the image is no larger than one cell is: give it as a cell, not as a field"
        return SpecimenReading(files=names, cells=[], weights=reader.origin, verdict=NO_CELLS, warnings=[remark])
    found = [find_cells(field, pixel_size) for _, field, _ in progress(fields, len(fields), "Finding cells")]
    warnings = [
        note if len(fields) == 1 else f"{name}: {note}"
        for (name, _, notes), one in zip(fields, found, strict=True)
        for note in (*notes, *one.notes)
    ]
    placed, crops = [], []
    for number, ((_, intensity, _), one) in enumerate(zip(fields, found, strict=True)):
        for cell, mitotic in zip(one.cells, in_mitosis(one), strict=True):
            try:
                crops.append(crop(intensity, cell, one.nucleus))
            except ImageError:  # a crop without any light
                continue
            placed.append((number, cell, mitotic))
    cells = [(f"cell {number + 1}", Cell(pixels, ())) for number, pixels in enumerate(crops)]
    readings = list(progress((read_cells or reader.read_cells)(cells), len(cells), "Reading cells"))
    read = [
        CellReading(field=number, found=cell, reading=reading, mitotic=mitotic)
        for (number, cell, mitotic), reading in zip(placed, readings, strict=True)
    ]
    faint = all(_is_faint(intensity, one) for (_, intensity, _), one in zip(fields, found, strict=True))
    # A field without cells says nothing of how they are stained.
    stained = float(np.mean([one.stained for one in found if one.cells] or [0.0]))
    hollow = sum(len(one.cells) for one in found if one.hollow) > len(placed) / 2
    pooled = _pool(read, faint, stained, hollow)
    if not read and pixel_size:
        low, high = (across / pixel_size for across in NUCLEUS_MICRONS)
        warnings.append(
            f"with {pixel_size:g} micrometres a pixel nuclei would be {low:.0f} to {high:.0f} pixels across: leave the "
            "size out if unsure"
        )
    pooled["warnings"] = warnings + pooled["warnings"]
    return SpecimenReading(files=names, cells=read, weights=reader.origin, **pooled)


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
    # Eight bits, and floats up to 1, are a range of their own. Deeper images rarely use theirs: their brightest light
    # takes its place.
    brightest = float(intensity.max())
    full = next((limit for limit in (1.0, 255.0) if brightest <= limit), brightest)
    # Most of a cell may be dark, as where nucleoli or the Golgi apparatus shine: then the brightest fifth counts.
    peak = float(np.median([cell.peak for cell in found.cells])) / full
    if found.hollow:
        return peak < FAINT_STAIN
    return float(np.median([cell.brightness for cell in found.cells])) / full < FAINT and peak < FAINT_PEAK


def _pool(cells: list[CellReading], faint: bool, stained: float, hollow: bool) -> dict:
    """Weigh the cells' calibrated probabilities; returns the fields of `SpecimenReading` that say what they show.

    `hollow` tells that the stain lies outside the nuclei, of most cells at least.
    """
    counted = [cell for cell in cells if cell.counted]
    if not cells:
        remark = "no whole cell was found: is it a field of cells, bright on dark?"
        return {"verdict": NO_CELLS, "warnings": [remark]}
    if faint:
        remark = "the cells hardly rise above the ground: expose longer, or it is negative"
        return {"verdict": NEGATIVE, "warnings": [remark]}
    interphase = [cell for cell in cells if not cell.mitotic]
    refused = sum(cell.reading.refused for cell in interphase) / max(1, len(interphase))
    if refused > MOST_REFUSED or not counted:
        remark = f"refused: {refused:.0%} of the cells show none of the six patterns"
        return {"verdict": NO_PATTERN, "warnings": [remark]}
    if stained < LEAST_STAIN:
        remark = f"refused: only {stained:.0%} of what is stained lies in cells that can be told apart"
        return {"verdict": NO_PATTERN, "warnings": [remark]}
    values = np.stack([cell.reading.probabilities["ensemble"] for cell in counted])  # (cells, 6)
    mean = values.mean(0)
    random = np.random.default_rng(0)
    # How often each resample draws each cell: (resamples, cells), which takes less memory than the drawn cells.
    often = random.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
    draws = often @ values / len(values)  # (resamples, 6)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    first, next_one = mean.argsort()[::-1][:2]
    # In single cells mitochondria pass for a nuclear membrane. That the nuclei are dark, the whole field tells better.
    if hollow and PATTERNS[first].nuclear:
        remark = f"refused: the cells resemble {CLASS_NAMES[first]}, but the stain lies outside the nuclei"
        return {"verdict": NO_PATTERN, "warnings": [remark]}
    if mean[first] < LEAST_PROBABILITY:
        remark = f"refused: no pattern stands out; the likeliest, {CLASS_NAMES[first]}, has {mean[first]:.0%}"
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


def specimen_rows(specimen: SpecimenReading) -> list[list]:
    """Lay out the cells as a table, its header first."""
    columns = [f"{model}_{name}" for model in MODEL_TITLES for name in CLASS_NAMES]
    place = ["top", "left", "height", "width"]
    rows = [["field", *place, "verdict", "probability", "agreement", "refused", "mitotic", *columns]]
    for cell in specimen.cells:
        answer = cell.as_dict()
        first = [answer[key] for key in ("verdict", "probability", "agreement", "refused", "mitotic")]
        numbers = [answer["models"][model][name] for model in MODEL_TITLES for name in CLASS_NAMES]
        rows.append([specimen.files[cell.field], *answer["bbox"], *first, *numbers])
    return rows


def draw_overlays(specimen: SpecimenReading, intensities: Iterable[np.ndarray]) -> Iterator[Image.Image]:
    """Draw the specimen's cells into each of its fields; see `draw_overlay`."""
    for number, intensity in enumerate(intensities):
        yield draw_overlay(intensity, [cell for cell in specimen.cells if cell.field == number])


def draw_overlay(intensity: np.ndarray, cells: list[CellReading]) -> Image.Image:
    """Draw a field (rows, columns) with each cell outlined in its pattern's colour: white is refused, red mitotic."""
    low, high = np.quantile(intensity, [0.01, 0.998])
    grey = ((intensity - low) / max(high - low, 1e-9)).clip(0, 1)
    picture = Image.fromarray((255 * grey).astype(np.uint8)).convert("RGB")
    pen = ImageDraw.Draw(picture)
    width = max(2, round(max(intensity.shape) / 500))
    for cell in cells:
        outline = [(float(column), float(row)) for row, column in cell.found.outline]
        pen.line([*outline, outline[0]], fill=colour_of(cell), width=width, joint="curve")
    return picture


def colour_of(cell: CellReading) -> str:
    """Return the colour of a cell's outline."""
    if cell.mitotic:
        return "#FF0000"
    colours = {pattern.name: pattern.colour for pattern in PATTERNS}
    return colours.get(cell.reading.verdict, "#FFFFFF")
