"""Finds the cells in a whole slide field: where they lie, how large their nuclei are, and a crop of each.

A nucleus is what is round, of one size, and brighter or darker than what lies round it. So the field is cut at many
levels of light, what comes out is taken apart where it touches, every piece is rated, and the best that do not overlap
are kept. A stain that shows no nucleus at all, as a Golgi apparatus alone, is looked for with a ring-shaped filter.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.signal import oaconvolve
from skimage import feature, measure, segmentation, transform

from hep2.images import prepare
from hep2.patterns import IMAGE_SIZE

NUCLEUS_MICRONS = (6.0, 14.0)  # diameter of HEp-2 nuclei: measured against the scale bars of eight fields, and more
NUCLEUS_IN_CROP = 63  # pixels, of a typical nucleus in the 78 that the models were trained on, as outlined here
# Pixels of a nucleus, to which finer fields are reduced before they are read: finer texture than a lens of low
# magnification shows is none that the training cells have.
READ_AT = 44.0
WORKING = 28.0  # pixels of a nucleus in the picture that is segmented: finer detail only costs time
ESTIMATING = 16.0  # the same where only the size of the nuclei is looked for
SMALLEST = 12.0  # pixels of a nucleus in the field, below which nothing is looked for
FINE_TEXTURE = 24.0  # pixels of a nucleus, below which fine texture is missing
ONE_CELL = 120  # pixels: a picture that is smaller on both sides is no field
WINDOW = 14  # nuclei that fit along the side of the part of a field on which their size is estimated
LEVELS = 14  # of light, at which a field is cut; half as many where only the size is looked for
LEAST_EDGE = 0.2  # steepness of a nucleus's rim beside the median, times its rating, below which it is none
CLEAR_FIT = 0.75  # of bright regions to round ones of one size, from which nothing else is looked for
CLEAR_ROUND = 0.8  # rating of a piece that is a round cell among rings
MOST_FOR_RINGS = 1200  # pixels along the side of the part of a field in which rings are looked for
RING_RADIUS = 9.0  # pixels, of a nucleus in the picture that is searched for rings
DARK = 0.8  # light inside a typical ring beside that on it, below which the nuclei are dark
LEAST_CONTRAST = 1.2  # of a typical ring with what lies in it and round it, in spreads of the picture's light
REACH = 1.75  # of a nucleus's radius, from its centre, to which its cell goes where no neighbour is nearer
LEAST_RATING = 0.25  # of a piece that is taken as a nucleus: roundness times nearness to the size looked for


@dataclass(frozen=True, kw_only=True)
class FoundCell:
    """A cell in a field. Positions are in pixels of the field, rows first; `outline` is (points, 2)."""

    bbox: tuple[int, int, int, int]  # top, left, height, width
    centre: tuple[float, float]
    outline: np.ndarray
    diameter: float  # of the circle of the same area


@dataclass(frozen=True, kw_only=True)
class FoundField:
    """The cells of one field, and where they lie: `labels` int (rows, columns), each cell's number from 1, 0 elsewhere,
    in the field scaled by `scale`.

    `nucleus` is the diameter of a typical nucleus, in pixels. `fit` is how round, and how much of one size, the cells
    are, 0 to 1. The nuclei are brighter than what lies round them, or `dark`; or none was seen, but the stain round
    them (`rings`): then whole cells are outlined.
    """

    cells: list[FoundCell]
    labels: np.ndarray
    scale: float = 1.0
    nucleus: float = 0.0
    fit: float = 0.0
    dark: bool = False
    rings: bool = False
    notes: list[str] = field(default_factory=list)


class _Light(NamedTuple):
    """A field that is scaled by `scale`, so that nuclei have some `size` pixels: its light above the background,
    smoothed, as its root."""

    light: np.ndarray
    scale: float
    size: float


class _Pieces(NamedTuple):
    """Pieces of a field that do not overlap: `labels` int (rows, columns), 0 where there is none, and of each piece its
    `diameters` in pixels of the field, its rating and how steeply the light falls at its rim."""

    labels: np.ndarray
    scale: float
    diameters: np.ndarray
    ratings: np.ndarray  # roundness times nearness to the size looked for, 0 to 1
    edges: np.ndarray

    @property
    def fit(self) -> float:
        return float(np.average(self.ratings, weights=self.diameters)) if np.any(self.diameters) else 0.0


def find_cells(intensity: np.ndarray, pixel_size: float | None = None) -> FoundField:
    """Find the cells that lie whole in a field (rows, columns), float32 in any units, bright on dark.

    The size of the nuclei is estimated from the field itself, among all sizes, or, with a `pixel_size` in micrometres,
    among those that such nuclei have. Cells that touch the border, debris, saturated blobs and drawn-in scale bars are
    left out.
    """
    intensity = (intensity - np.median(intensity)) / (float(np.ptp(intensity)) or 1.0)
    drawn = _drawn(intensity)
    notes = ["a scale bar, writing or saturated light was left out"] if drawn.any() else []
    intensity = np.where(drawn, 0, intensity) if drawn.any() else intensity
    best = _best_size(intensity, pixel_size)
    nothing = FoundField(cells=[], labels=np.zeros(intensity.shape, np.int32), notes=notes)
    if best is None:
        return nothing
    dark, rings = False, None
    if best.fit < CLEAR_FIT or best.hollow < 1:
        darkest = _best_size(intensity, pixel_size, dark=True)
        if darkest is not None and darkest.score > best.score:
            best, dark = darkest, True
        rings = _best_rings(intensity, pixel_size)
    if rings is not None and rings.middle < DARK and rings.contrast > LEAST_CONTRAST:
        nucleus, fit, scale = float(rings.nucleus), 0.0, rings.scale
        rings = _rings(intensity, nucleus)  # of the whole field
        labels = _ring_labels(rings)
        # A cell in mitosis has no ring: it is round and stained all over.
        pieces = _pieces(_light(intensity, nucleus, WORKING), LEVELS, dark=False)
        round_ones = np.isin(pieces.labels, np.flatnonzero(pieces.ratings > CLEAR_ROUND) + 1) * pieces.labels
        round_ones = transform.resize(round_ones, labels.shape, order=0, preserve_range=True).astype(labels.dtype)
        # Where it was taken for a ring none the less, the ring goes.
        doubled = np.flatnonzero(round_ones[tuple(rings.places.T)]) + 1
        labels = np.where(round_ones > 0, round_ones + labels.max(), np.where(np.isin(labels, doubled), 0, labels))
        notes.append("the stain lies outside the nuclei: whole cells are outlined")
    else:
        rings = None
        pieces = _pieces(_light(intensity, best.size, WORKING), LEVELS, dark)
        if not len(pieces.ratings):
            return nothing
        nucleus, fit, scale = float(np.median(pieces.diameters)), pieces.fit, pieces.scale
        faint = np.flatnonzero(pieces.edges * pieces.ratings < LEAST_EDGE * np.median(pieces.edges)) + 1
        labels = np.where(np.isin(pieces.labels, faint), 0, pieces.labels)
    if drawn.any():
        drawn = transform.resize(drawn, labels.shape, order=0)
    cells, kept = [], np.zeros_like(labels)
    for region in measure.regionprops(labels):
        top, left, bottom, right = region.bbox
        whole = top > 0 and left > 0 and bottom < labels.shape[0] and right < labels.shape[1]
        if whole and not (drawn.any() and drawn[region.slice].any()):
            cells.append(_found(region, scale))
            kept[region.slice][region.image] = len(cells)
    if cells and nucleus < FINE_TEXTURE:
        notes.append(f"nuclei have only some {nucleus:.0f} pixels: fine texture is missing, so the verdict is unsure")
    if cells and pixel_size and not NUCLEUS_MICRONS[0] <= nucleus * pixel_size <= NUCLEUS_MICRONS[1]:
        notes.append(
            f"nuclei measure {nucleus * pixel_size:.1f} micrometres by the pixel size, which those of HEp-2 cells do "
            "not: give the right one"
        )
    found = {"nucleus": nucleus if cells else 0.0, "fit": fit, "dark": dark, "rings": rings is not None}
    return FoundField(cells=cells, labels=kept, scale=scale, notes=notes, **found)


class _Best(NamedTuple):
    """What looking for nuclei of many sizes gave: their `size` in pixels, how well they stood out, their fit, and the
    light in the middle of a typical one beside that half way out."""

    score: float
    size: float
    fit: float
    hollow: float


def _best_size(intensity: np.ndarray, pixel_size: float | None, dark: bool = False) -> _Best | None:
    best, picture, halved = None, intensity, 1.0
    for size in _sizes(intensity.shape, pixel_size):
        while size * halved > 4 * ESTIMATING:  # to reduce the whole field anew for every size takes far longer
            picture, halved = scaled(picture, 0.5), halved / 2
        part = _light(_middle(picture, WINDOW * size * halved), size * halved, ESTIMATING)
        part = part._replace(scale=part.scale * halved)
        pieces = _pieces(part, LEVELS // 2, dark)
        if len(pieces.ratings):
            weight = pieces.ratings**4 * pieces.edges**0.5
            # Between number and area: grains are more than cells, and clouds of cells are larger.
            score = float(weight @ pieces.diameters**1.5) * part.scale**2 / part.light.size
            if weight.sum() > 0 and (best is None or score > best.score):
                diameter = float(np.average(pieces.diameters, weights=weight))
                best = _Best(score, diameter, pieces.fit, _hollow(pieces.labels, part.light))
    return best


def _hollow(labels: np.ndarray, light: np.ndarray) -> float:
    """Return the light in the middle of a typical region beside that half way out."""
    numbers, depth = np.arange(1, labels.max() + 1), ndimage.distance_transform_edt(labels > 0)
    depth /= np.maximum(np.append(1, ndimage.maximum(depth, labels, numbers))[labels], 1e-6)
    inner, outer = (
        label_means(light**2, np.where(part, labels, 0), len(numbers))
        for part in (depth > 0.65, (depth > 0.25) & (depth < 0.5))
    )
    return float(np.median(inner / np.maximum(outer, 1e-9)))


def label_means(values: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Return the mean of what lies under each of the labels 1 to `count`; 0 where nothing does."""
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return (np.bincount(labels.ravel(), values.ravel(), count + 1) / np.maximum(sizes, 1))[1:]


def _sizes(shape: tuple[int, int], pixel_size: float | None, step: float = 0.5) -> np.ndarray:
    """List diameters of nuclei, in pixels, to look for in a field of this shape, each 2^`step` times the last."""
    largest = max(min(shape) / 3, 0.8 * ONE_CELL)
    sizes = SMALLEST * 2 ** np.arange(0.25, np.log2(largest / SMALLEST), step)
    if pixel_size is None:
        return sizes
    low, high = (diameter / pixel_size for diameter in NUCLEUS_MICRONS)
    sizes = sizes[(low <= sizes) & (sizes <= high)]
    return sizes if len(sizes) else np.array([(low * high) ** 0.5])


def _middle(intensity: np.ndarray, side: float) -> np.ndarray:
    top, left = (max(0, (length - round(side)) // 2) for length in intensity.shape)
    return intensity[top : top + round(side), left : left + round(side)]


def _light(intensity: np.ndarray, size: float, working: float) -> _Light:
    scale = min(working / size, 2.0)
    across, picture = size * scale, scaled(intensity, scale)
    above = np.clip(picture - background(picture, 4 * across), 0, None)
    # The root keeps a dim nucleus with bright dots in one piece; far below the brightest it would only show noise.
    above += 0.002 * float(np.quantile(above, 0.995))
    return _Light(ndimage.gaussian_filter(np.sqrt(above), across / 14), scale, across)


def scaled(intensity: np.ndarray, scale: float) -> np.ndarray:
    if not 0.99 < scale < 1.01:
        options = {"order": 1, "anti_aliasing": scale < 1, "preserve_range": True}
        intensity = transform.rescale(intensity, scale, **options)
    return intensity.astype(np.float32)


def background(picture: np.ndarray, width: float) -> np.ndarray:
    """Return the background, uneven as it is: what is left when everything narrower than `width` is taken away."""
    # Whole blocks, lest the last ones be filled up with darkness.
    padded = np.pad(picture, [(0, -side % 4) for side in picture.shape], mode="edge")
    coarse = ndimage.gaussian_filter(transform.downscale_local_mean(padded, (4, 4)), 1)
    background = ndimage.gaussian_filter(ndimage.grey_opening(coarse, size=2 * int(width / 8) + 1), width / 13)
    background = transform.resize(background, padded.shape, order=1, preserve_range=True)
    return background[: picture.shape[0], : picture.shape[1]]


def _pieces(found: _Light, levels: int, dark: bool) -> _Pieces:
    """Cut a field at many levels of light, and keep the best pieces that do not overlap."""
    light = -found.light if dark else found.light
    slope = ndimage.gaussian_gradient_magnitude(found.light, 1.0)
    low, high = np.quantile(light, [0.02, 0.995])
    candidates = []
    masks = [light > level for level in np.linspace(low, high, levels + 2)[1:-1]]
    # Between nuclei that lie side by side it is darker than on the whole round there, if no darker than elsewhere.
    if levels == LEVELS:
        masks.append((light > ndimage.gaussian_filter(light, found.size / 4)) & masks[0])
    for mask in masks:
        labels = _apart(mask, found.size)
        area, round_ones = roundness(labels)
        diameters = np.sqrt(4 / np.pi * area)
        ratings = round_ones * np.exp(-((np.log(diameters / found.size) / 0.4) ** 2))
        rim = (labels > 0) & (ndimage.minimum_filter(labels, 3) != labels)
        edges = label_means(slope, np.where(rim, labels, 0), len(area))
        boxes = ndimage.find_objects(labels)
        for number in np.flatnonzero(ratings > LEAST_RATING):
            values = (diameters[number] / found.scale, ratings[number], edges[number])
            candidates.append(
                (ratings[number] * edges[number] ** 0.5, values, boxes[number], labels[boxes[number]] == number + 1)
            )
    labels, kept = np.zeros(light.shape, np.int32), []
    for _, values, box, mask in sorted(candidates, key=lambda candidate: -candidate[0]):
        taken = labels[box]
        if (taken[mask] > 0).mean() < 0.1:
            kept.append(values)
            taken[mask & (taken == 0)] = len(kept)
    return _Pieces(labels, found.scale, *np.array(kept).reshape(-1, 3).T)


def _apart(mask: np.ndarray, size: float) -> np.ndarray:
    """Label the regions of a mask, those of about `size` pixels that touch apart; spikes and grains are left out."""
    mask = ndimage.gaussian_filter(mask.astype(np.float32), size / 12) > 0.5
    holes, _ = ndimage.label(~mask)
    mask |= (np.bincount(holes.ravel()) < size**2 / 2)[holes]
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), size / 16)
    peaks = feature.peak_local_max(depth, min_distance=int(0.3 * size), threshold_abs=0.2 * size, exclude_border=False)
    return segmentation.watershed(-depth, _numbered(peaks, mask.shape), mask=mask)


def _numbered(places: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    numbers = np.zeros(shape, np.int32)
    numbers[tuple(places.T)] = np.arange(1, len(places) + 1)
    return numbers


def roundness(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each region's area in pixels, and how nearly it is an ellipse, 0 to 1: by its second moments."""
    rows, columns = np.nonzero(labels)
    which, count = labels[rows, columns], labels.max() + 1
    area = np.maximum(np.bincount(which, minlength=count), 1)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(which, values, count) / area

    rows, columns = rows - mean(rows)[which], columns - mean(columns)[which]
    spread = mean(rows * rows) * mean(columns * columns) - mean(rows * columns) ** 2
    # The spread of an ellipse is the smallest that so large a region can have.
    return area[1:], np.minimum(area / (4 * np.pi * np.sqrt(spread + 1e-9)), 1)[1:] ** 10


class _Rings(NamedTuple):
    """Rings round nuclei of one size: `nucleus` in pixels of the field, the places (rings, 2) of their centres
    in a picture shrunk by `scale`, the light in that picture, what the clearest rings have more of it than what lies in
    them and round them (`strength`), the same in spreads of the light (`contrast`), and the light inside a typical ring
    beside that on it (`middle`)."""

    nucleus: float
    places: np.ndarray
    scale: float
    light: np.ndarray
    strength: float
    contrast: float
    middle: float


def _best_rings(intensity: np.ndarray, pixel_size: float | None) -> _Rings | None:
    """Look for rings round nuclei of many sizes, and return those that stand out most."""
    middle = _middle(intensity, MOST_FOR_RINGS)
    sizes = _sizes(middle.shape, pixel_size, step=0.25)
    tried = [_rings(middle, size) for size in sizes if size > 2 * RING_RADIUS * 0.9]
    return max((rings for rings in tried if len(rings.places)), key=lambda rings: rings.strength, default=None)


def _rings(intensity: np.ndarray, nucleus: float) -> _Rings:
    scale = min(1.0, 2 * RING_RADIUS / nucleus)
    picture, radius = scaled(intensity, scale), nucleus * scale / 2
    light = ndimage.gaussian_filter(picture, 1) - background(picture, 5.8 * radius)
    # The logarithm lets the little light of a cytoplasm count beside a Golgi apparatus: in units of the unevenness.
    spread = np.median(np.abs(light - np.median(light)))
    light = np.log1p(np.clip(light, 0, None) / max(6 * spread, 1e-6))
    light = np.minimum(light, np.quantile(light, 0.97))
    reach = int(np.ceil(1.9 * radius))
    distance = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) / radius
    # Parts of a ring, in radii of the nucleus: round it, in it, and round the cell.
    on, within, around = (
        area / area.sum() for area in ((abs(distance - 1.125) < 0.225), distance < 0.75, abs(distance - 1.75) < 0.15)
    )
    padded = np.pad(light, reach, mode="reflect")
    answer = oaconvolve(padded, on - 0.25 * within - 0.75 * around, mode="valid")
    places = feature.peak_local_max(answer, min_distance=int(1.5 * radius), threshold_abs=1e-6, exclude_border=False)
    values = answer[tuple(places.T)]
    # The most distinct rings set the measure for the others.
    places = places[values > 0.4 * np.quantile(values, 0.95)] if len(values) else places
    windows = [padded[row : row + 2 * reach + 1, column : column + 2 * reach + 1] for row, column in places]
    middles = [float((window * within).sum() / max((window * on).sum(), 1e-6)) for window in windows]
    strength = float(np.sort(values)[-max(3, len(places) // 2) :].mean()) if len(places) else 0.0
    contrast, middle = strength / max(float(light.std()), 1e-6), float(np.median(middles)) if middles else 1.0
    return _Rings(nucleus, places, scale, light, strength, contrast, middle)


def _ring_labels(rings: _Rings) -> np.ndarray:
    """Give each ring's cell what lies so near to its centre, or, of what is near to two, the nearer half."""
    centres = _numbered(rings.places, rings.light.shape)
    distance, nearest = ndimage.distance_transform_edt(centres == 0, return_indices=True)
    return np.where(distance > REACH * rings.nucleus * rings.scale / 2, 0, centres[tuple(nearest)])


def _drawn(intensity: np.ndarray) -> np.ndarray:
    """Mark what no light has made: bright areas without any noise, such as scale bars and saturated blobs."""
    flat = ndimage.maximum_filter(intensity, 5) == ndimage.minimum_filter(intensity, 5)
    flat &= intensity > np.median(intensity) + 0.1 * (intensity.max() - np.median(intensity))
    if not flat.any():
        return flat
    marked = np.zeros_like(flat)
    for region in measure.regionprops(measure.label(ndimage.binary_dilation(flat, iterations=8))):
        if flat[region.slice].sum() > 40:
            # Writing lies in or beside its bar: the box round them goes as a whole. A frame's box is the field.
            is_frame = flat[region.slice].mean() < 0.1
            marked[region.slice] |= region.image if is_frame else True
    return marked


def _found(region, scale: float) -> FoundCell:
    top, left, bottom, right = (round(edge / scale) for edge in region.bbox)
    contour = max(measure.find_contours(np.pad(region.image, 1).astype(float), 0.5), key=len)
    contour = measure.approximate_polygon(contour, 0.6) - 1 + np.array(region.bbox[:2])
    return FoundCell(
        bbox=(top, left, bottom - top, right - left),
        centre=tuple(float(c) / scale for c in region.centroid),
        outline=contour / scale,
        diameter=float(region.equivalent_diameter_area) / scale,
    )


def crop(intensity: np.ndarray, cell: FoundCell, nucleus: float) -> np.ndarray:
    """Cut out one cell as the models know cells: (1, 78, 78), float32 in [0, 1], the nucleus some 63 pixels."""
    side = round(nucleus * IMAGE_SIZE / NUCLEUS_IN_CROP)
    top, left = (round(c - side / 2) for c in cell.centre)
    rows = _mirrored(np.arange(top, top + side), intensity.shape[0])
    columns = _mirrored(np.arange(left, left + side), intensity.shape[1])
    return prepare(scaled(np.ascontiguousarray(intensity[np.ix_(rows, columns)]), min(1.0, READ_AT / nucleus)))


def _mirrored(position: np.ndarray, size: int) -> np.ndarray:
    return np.clip((size - 1) - abs((size - 1) - abs(position)), 0, size - 1)
