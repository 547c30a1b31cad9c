"""A whole slide field in, a specimen's pattern out: finds the cells, reads each, and pools what the models say."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage import feature, filters, measure, morphology, segmentation, transform

from hep2.imaging import Cell, ImageError, prepare
from hep2.patterns import CLASS_NAMES, IMAGE_SIZE, PATTERNS
from hep2.reader import DIGITS, LOW_CONFIDENCE, Reader, Reading

if TYPE_CHECKING:
    from skimage.measure._regionprops import RegionProperties

NUCLEUS_MICRONS = 11.0  # across, on average, of the HEp-2 nuclei that we measured against a scale bar
NUCLEUS_IN_CROP = 57  # pixels across, of a typical nucleus in the 78 that the models were trained on
WORKING = 32.0  # pixels across of a nucleus in the picture that is segmented: finer detail only costs time
SMALLEST = 24.0  # pixels across of a nucleus in the field: below, there is no texture to read
ONE_CELL = 120  # pixels: a picture that is smaller on both sides is no field
TO_ESTIMATE = 1_500_000  # pixels of a field, at most, on which the size of the nuclei is estimated
CELL_TO_NUCLEUS = 1.9  # how much larger a cell is than its nucleus, across, where its cytoplasm is stained
HOLLOW = 0.56  # light of a region's middle beside that half way out, below which its nucleus is dark
LEAST_FIT = 0.25  # of the regions found to round, whole ones of one size, below which they are no cells
GOOD_FIT = 0.55  # from which on the bright stain explains the field
SIZES = (0.5, 1.7)  # accepted equivalent diameters, in units of the nuclei's median
SOLID = 0.85  # of its convex hull that a cell must fill
FAINT = 0.06  # of the full range of 8 bits, or of a deeper image's brightest light, that cells must rise above ground
FAINT_PEAK = 0.08  # the same for the brightest fifth of a cell: one of the two is enough,
FAINT_STAIN = 0.04  # and this for cells whose stain lies outside the nucleus
MOST_REFUSED = 0.5  # of the cells, above which the specimen has no pattern of the six
LEAST_STAIN = 0.35  # of the stained area that must lie in cells, for the same reason
SECOND = 0.2  # of the pooled probability, at the lower end of its interval, that makes a second pattern real
CONDENSED = 1.6  # times the median brightness of the brightest fifth of a cell, from which it is taken as mitotic
FEW = 10  # cells, below which a verdict says that it rests on few
RESAMPLES = 1000
PIXEL_SIZES = (0.02, 1.0)  # micrometres, in the specimen: from an oversampled 100x objective to a 10x

NEGATIVE = "negative or too faint"
NO_PATTERN = "no pattern of the six"
NO_CELLS = "no cells found"


@dataclass(frozen=True, kw_only=True)
class FoundCell:
    """A cell in a field. Positions are in pixels of the field, rows first; `outline` is (points, 2)."""

    bbox: tuple[int, int, int, int]  # top, left, height, width
    centre: tuple[float, float]
    outline: np.ndarray
    diameter: float  # of the circle of the same area
    brightness: float  # mean above the ground, in the field's own units
    peak: float  # the same of the brightest fifth of its pixels


@dataclass(frozen=True, kw_only=True)
class FoundField:
    """The cells of one field; `nucleus` is the median nucleus across, in pixels, `stained` the share of the stained
    area that lies in the cells that were accepted, and `hollow` tells that the stain lies outside the nuclei."""

    cells: list[FoundCell]
    nucleus: float
    stained: float
    hollow: bool = False
    notes: list[str] = field(default_factory=list)


def find_cells(intensity: np.ndarray, pixel_size: float | None = None) -> FoundField:
    """Find the cells that lie whole in a field (rows, columns), float32 in any units, bright on dark.

    `pixel_size` is in micrometres; without it the size of the nuclei is estimated from the field itself. Cells that
    touch the border, debris, saturated blobs and drawn-in scale bars are left out. A nuclear stain is outlined by its
    nucleus, a cytoplasmic one by its cell.
    """
    drawn = _drawn(intensity)
    if drawn.any():
        intensity = np.where(drawn, np.median(intensity), intensity)
    notes = ["a scale bar, writing or saturated light was left out"] if drawn.any() else []
    known = NUCLEUS_MICRONS / pixel_size if pixel_size else None
    trial = _best_trial(intensity, known)
    if trial is None or trial.fit < LEAST_FIT:
        return FoundField(cells=[], nucleus=0.0, stained=0.0, notes=notes)
    # A stain outside the nucleus outlines the cell.
    hollow = trial.hollow < HOLLOW
    cell_to_nucleus = CELL_TO_NUCLEUS if hollow else 1.0
    nucleus = known or trial.size / cell_to_nucleus
    if hollow:
        notes.append("the stain lies outside the nuclei: whole cells are outlined")
    if nucleus < SMALLEST:
        notes.append(
            f"nuclei are only some {nucleus:.0f} pixels across: fine texture is missing, so the verdict is unsure"
        )
    labels, scale, working = _segment(intensity, trial.size, faint=trial.faint)
    drawn = transform.resize(drawn, labels.shape, order=0) if drawn.any() else np.zeros(labels.shape, bool)
    ground = float(np.median(working[labels == 0])) if (labels == 0).any() else float(working.min())
    regions = measure.regionprops(labels)
    whole = [region for region in regions if _is_whole(region, labels.shape) and not drawn[region.slice].any()]
    sizes = [r.equivalent_diameter_area for r in whole if r.equivalent_diameter_area > SIZES[0] * trial.size * scale]
    # The median is taken over what may be nuclei: dust is more frequent than cells in a thin field.
    median = float(np.median(sizes)) if sizes and not known else trial.size * scale
    accepted = [
        region
        for region in whole
        if SIZES[0] * median < region.equivalent_diameter_area < SIZES[1] * median and region.solidity > SOLID
    ]
    cells = [_found(region, scale, working, ground) for region in accepted]
    inner = sum(region.area for region in regions if _is_whole(region, labels.shape))
    stained = sum(region.area for region in accepted) / max(1.0, float(inner))
    nucleus = known or median / scale / cell_to_nucleus
    return FoundField(cells=cells, nucleus=nucleus, stained=stained, hollow=hollow, notes=notes)


class _Trial(NamedTuple):
    """How well a field falls into round, whole regions of one `size`, in pixels, that was looked for.

    `fit` is between 0 and 1, `score` also counts the regions. `hollow` is the light in the regions' middle beside that
    half way out: far below 1 where the stain lies round the nucleus. `faint` says how the field was segmented.
    """

    score: float
    fit: float
    size: float
    hollow: float
    faint: bool


def _best_trial(intensity: np.ndarray, nucleus: float | None) -> _Trial | None:
    """Look for regions of the size `nucleus`, or of many sizes; first in the bright stain, then in the faint too.

    A cell whose Golgi apparatus or mitochondria shine is whole only if the little light of its cytoplasm counts as
    much, but nuclei would then be outlined by their haze: faint stain is for regions with a dark middle.
    """
    rows, columns = intensity.shape
    if min(rows, columns) < 2 * SMALLEST:
        return None
    # The middle of a large field is enough, and keeps the cost of a field of 20 megapixels down.
    side = int(TO_ESTIMATE**0.5)
    top, left = max(0, (rows - side) // 2), max(0, (columns - side) // 2)
    middle = intensity[top : top + side, left : left + side]
    largest = max(min(middle.shape) / 3, 0.8 * ONE_CELL)
    sizes = SMALLEST * 2 ** np.arange(0, np.log2(largest / SMALLEST), 0.5)
    bright = _trial_of_sizes(middle, sizes if nucleus is None else [nucleus], faint=False)
    if bright is not None and bright.fit > GOOD_FIT and bright.hollow > HOLLOW:
        return bright
    faint = _trial_of_sizes(middle, sizes if nucleus is None else [CELL_TO_NUCLEUS * nucleus], faint=True)
    return faint if faint is not None and (bright is None or faint.score > bright.score) else bright


def _trial_of_sizes(intensity: np.ndarray, sizes: Iterable[float], *, faint: bool) -> _Trial | None:
    best = None
    for size in sizes:
        labels, scale, picture = _segment(intensity, size, faint=faint)
        regions = [r for r in measure.regionprops(labels) if r.equivalent_diameter_area > 0.3 * size * scale]
        across = np.array([region.equivalent_diameter_area for region in regions]) / scale
        fits = np.exp(-((np.log(across / size) / 0.35) ** 2)) * [region.solidity**4 for region in regions]
        # By its diameter: by area, a few clouds of cells win over the cells; by number, their grains do.
        score = float(across @ fits)
        if score > (0.0 if best is None else best.score):
            hollow = _hollowness(regions, picture, labels)
            if not faint or hollow < HOLLOW:
                best = _Trial(score, score / across.sum(), float(np.median(across)), hollow, faint)
    return best


def _hollowness(regions: "list[RegionProperties]", picture: np.ndarray, labels: np.ndarray) -> float:
    """Return the light in the middle of a typical region over that half way out, both above the ground."""
    ground = np.median(picture[labels == 0]) if (labels == 0).any() else picture.min()
    ratios = []
    for region in regions:
        depth = ndimage.distance_transform_edt(np.pad(region.image, 1))[1:-1, 1:-1]
        light, depth = picture[region.slice] - ground, depth / depth.max()
        ring = light[(depth > 0.25) & (depth < 0.5)]
        if ring.size:
            ratios.append(np.median(light[depth > 0.65]) / max(ring.mean(), 1e-6))
    return float(np.median(ratios)) if ratios else 1.0


def _segment(intensity: np.ndarray, size: float, *, faint: bool) -> tuple[np.ndarray, float, np.ndarray]:
    """Label what is stained, regions of about `size` pixels across that touch apart.

    With `faint`, what is brighter than a threshold counts no more than what just reaches it. Returns labels, their
    scale, and the picture at that scale.
    """
    scale = min(1.0, WORKING / size)
    picture = intensity
    if scale < 1:
        picture = transform.rescale(intensity, scale, anti_aliasing=True, preserve_range=True)
    picture, across = picture.astype(np.float32), size * scale
    # The ground, uneven as it is: what is left when everything narrower than a cell and a half is taken away.
    coarse = transform.downscale_local_mean(picture, (4, 4))
    ground = ndimage.grey_opening(ndimage.gaussian_filter(coarse, 1), size=2 * int(0.4 * across) + 1)
    ground = transform.resize(ndimage.gaussian_filter(ground, across / 4), picture.shape, order=1, preserve_range=True)
    # The root keeps a dim nucleus with bright dots in one piece.
    light = np.sqrt(np.clip(picture - ground, 0, None))
    if faint:
        light = np.minimum(light, 0.85 * filters.threshold_otsu(ndimage.gaussian_filter(light, across / 12)))
    light = ndimage.gaussian_filter(light, across / 12)
    if light.max() <= light.min():
        return np.zeros(picture.shape, int), scale, picture
    bright = (light > 0.85 * filters.threshold_otsu(light)) & (light > ndimage.gaussian_filter(light, 1.2 * across))
    mask = ndimage.binary_fill_holes(morphology.opening(bright, morphology.disk(max(1, int(across / 10)))))
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), across / 16)
    peaks = feature.peak_local_max(
        depth,
        min_distance=int(0.3 * across),
        threshold_abs=0.15 * across,
        labels=measure.label(mask),
        exclude_border=False,
    )
    seeds = np.zeros(picture.shape, int)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return segmentation.watershed(-depth, seeds, mask=mask), scale, picture


def _drawn(intensity: np.ndarray) -> np.ndarray:
    """Mark what no light has made: bright areas without any noise, such as scale bars and saturated blobs."""
    flat = ndimage.maximum_filter(intensity, 5) == ndimage.minimum_filter(intensity, 5)
    flat &= intensity > np.median(intensity) + 0.1 * (intensity.max() - np.median(intensity))
    if not flat.any():
        return flat
    # Writing lies in or beside its bar: the box round them goes as a whole.
    marked = np.zeros_like(flat)
    for region in measure.regionprops(measure.label(ndimage.binary_dilation(flat, iterations=8))):
        if flat[region.slice].sum() > 40:
            marked[region.slice] = True
    return marked


def _is_whole(region: "RegionProperties", shape: tuple[int, int]) -> bool:
    top, left, bottom, right = region.bbox
    return top > 0 and left > 0 and bottom < shape[0] and right < shape[1]


def _found(region: "RegionProperties", scale: float, working: np.ndarray, ground: float) -> FoundCell:
    top, left, bottom, right = (round(edge / scale) for edge in region.bbox)
    light = np.sort(working[region.slice][region.image]) - ground
    contour = max(measure.find_contours(np.pad(region.image, 1).astype(float), 0.5), key=len)
    contour = measure.approximate_polygon(contour, 0.6) - 1 + np.array(region.bbox[:2])
    return FoundCell(
        bbox=(top, left, bottom - top, right - left),
        centre=tuple(float(c) / scale for c in region.centroid),
        outline=contour / scale,
        diameter=float(region.equivalent_diameter_area) / scale,
        brightness=float(light.mean()),
        peak=float(light[int(0.8 * len(light)) :].mean()),
    )


def crop(intensity: np.ndarray, cell: FoundCell, nucleus: float) -> np.ndarray:
    """Cut out one cell as the models know cells: (1, 78, 78), float32 in [0, 1], the nucleus some 57 pixels across."""
    side = round(nucleus * IMAGE_SIZE / NUCLEUS_IN_CROP)
    top, left = (round(c - side / 2) for c in cell.centre)
    rows = _mirrored(np.arange(top, top + side), intensity.shape[0])
    columns = _mirrored(np.arange(left, left + side), intensity.shape[1])
    return prepare(np.ascontiguousarray(intensity[np.ix_(rows, columns)]))


def _mirrored(position: np.ndarray, size: int) -> np.ndarray:
    return np.clip((size - 1) - abs((size - 1) - abs(position)), 0, size - 1)


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
    warnings = [note for (_, _, notes), one in zip(fields, found, strict=True) for note in (*notes, *one.notes)]
    placed, crops = [], []
    for number, ((_, intensity, _), one) in enumerate(zip(fields, found, strict=True)):
        for cell in one.cells:
            try:
                crops.append(crop(intensity, cell, one.nucleus))
            except ImageError:  # a crop without any light
                continue
            placed.append((number, cell))
    cells = [(f"cell {number + 1}", Cell(pixels, ())) for number, pixels in enumerate(crops)]
    readings = list(progress((read_cells or reader.read_cells)(cells), len(cells), "Reading cells"))
    # Fields of one specimen may differ in exposure: cells in mitosis are bright among those of their own field.
    condensed = np.zeros(len(placed), bool)
    for number in range(len(fields)):
        own = [position for position, (place, _) in enumerate(placed) if place == number]
        condensed[own] = _condensed([placed[position][1] for position in own])
    read = [
        CellReading(field=number, found=cell, reading=reading, mitotic=bool(mitotic))
        for (number, cell), reading, mitotic in zip(placed, readings, condensed, strict=True)
    ]
    faint = all(_is_faint(intensity, one) for (_, intensity, _), one in zip(fields, found, strict=True))
    # A field without cells says nothing of how they are stained.
    stained = float(np.mean([one.stained for one in found if one.cells] or [0.0]))
    pooled = _pool(read, faint, stained)
    if not read and pixel_size:
        expected = NUCLEUS_MICRONS / pixel_size
        warnings.append(
            f"with {pixel_size:g} micrometres a pixel nuclei would be {expected:.0f} pixels across: leave the size "
            "out if unsure"
        )
    pooled["warnings"] = warnings + pooled["warnings"]
    return SpecimenReading(files=names, cells=read, weights=reader.origin, **pooled)


def _condensed(cells: list[FoundCell]) -> list[bool]:
    """Tell cells in mitosis by their chromatin, packed and so brighter than the others', where it stains."""
    if len(cells) < 5:
        return [False] * len(cells)
    usual = np.median([cell.peak for cell in cells])
    return [bool(cell.peak > CONDENSED * usual) for cell in cells]


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


def _pool(cells: list[CellReading], faint: bool, stained: float) -> dict:
    """Weigh the cells' calibrated probabilities; returns the fields of `SpecimenReading` that say what they show."""
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
    draws = values[random.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)  # (resamples, 6)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    first, next_one = mean.argsort()[::-1][:2]
    warnings = []
    if mean[first] < LOW_CONFIDENCE:
        warnings.append(f"low confidence: the verdict has a probability of {mean[first]:.0%}")
    if len(counted) < FEW:
        warnings.append(f"only {len(counted)} cells were read: the verdict rests on few")
    second = CLASS_NAMES[next_one] if low[next_one] > SECOND else None
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
    models = list(specimen.cells[0].reading.probabilities) if specimen.cells else []
    columns = [f"{model}_{name}" for model in models for name in CLASS_NAMES]
    place = ["top", "left", "height", "width"]
    rows = [["field", *place, "verdict", "probability", "agreement", "refused", "mitotic", *columns]]
    for cell in specimen.cells:
        answer = cell.as_dict()
        first = [answer[key] for key in ("verdict", "probability", "agreement", "refused", "mitotic")]
        numbers = [value for model in answer["models"].values() for value in model.values()]
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
