"""Finds the cells in a whole slide field: where they lie, how large their nuclei are, and a crop of each.

Two searches. A stain in the nuclei makes bright, round regions: threshold, distance transform, watershed. A stain round
the nuclei, as of the Golgi apparatus or of mitochondria, makes rings: they are looked for with a ring-shaped filter.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.signal import oaconvolve
from skimage import feature, filters, measure, morphology, segmentation, transform

from hep2.images import prepare
from hep2.patterns import IMAGE_SIZE

NUCLEUS_MICRONS = (6.0, 14.0)  # across, of HEp-2 nuclei: measured against the scale bars of eight fields, and some more
NUCLEUS_IN_CROP = 63  # pixels across, of a typical nucleus in the 78 that the models were trained on, as outlined here
WORKING = 32.0  # pixels across of a nucleus in the picture that is segmented: finer detail only costs time
SMALLEST = 24.0  # pixels across of a nucleus in the field: below, there is no texture to read
ONE_CELL = 120  # pixels: a picture that is smaller on both sides is no field
TO_ESTIMATE = 1_500_000  # pixels of a field, at most, on which the size of the nuclei is estimated
LEAST_FIT = 0.25  # of the regions found to round, whole ones of one size, below which they are no cells
GOOD_FIT = 0.55  # from which on the bright stain explains the field
HOLLOW = 0.8  # light of a region's middle beside that half way out, below which it may be a ring
RING_RADIUS = 9.0  # pixels, of a nucleus in the picture that is searched for rings
DARK = 0.8  # light inside a typical ring beside that on it, below which the nuclei are dark
LEAST_CONTRAST = 1.2  # of a typical ring with what lies in it and round it, in spreads of the picture's light
REACH = 1.75  # of a nucleus's radius, from its centre, to which its cell goes where no neighbour is nearer
EDGE = 0.65  # of the root of a region's light, at which it ends: somewhat less than half the light
SIZES = (0.5, 1.7)  # accepted equivalent diameters, in units of the nuclei's median
SOLID = 0.85  # of its convex hull that a cell must fill


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
    """The cells of one field; `nucleus` is how many pixels a nucleus is across: the median of what was found, or, where
    the stain lies outside the nuclei (`hollow`), what fits best. `stained` is the share of the stained area that lies
    in the cells."""

    cells: list[FoundCell]
    nucleus: float
    stained: float
    hollow: bool = False
    notes: list[str] = field(default_factory=list)


class Segmentation(NamedTuple):
    """Regions in a field that is shrunk by `scale`: `labels` int (rows, columns), 0 where there is none, the `picture`
    float32 (rows, columns), and where it is `stained`, bool (rows, columns)."""

    labels: np.ndarray
    scale: float
    picture: np.ndarray
    stained: np.ndarray


def find_cells(intensity: np.ndarray, pixel_size: float | None = None) -> FoundField:
    """Find the cells that lie whole in a field (rows, columns), float32 in any units, bright on dark.

    The size of the nuclei is estimated from the field itself, among all sizes, or, with a `pixel_size` in micrometres,
    among those that such nuclei have. Cells that
    touch the border, debris, saturated blobs and drawn-in scale bars are left out. A nuclear stain is outlined by its
    nucleus, a cytoplasmic one by its cell.
    """
    unit = float(np.ptp(intensity)) or 1.0
    intensity = intensity / unit
    drawn = _drawn(intensity)
    if drawn.any():
        intensity = np.where(drawn, np.median(intensity), intensity)
    notes = ["a scale bar, writing or saturated light was left out"] if drawn.any() else []
    trial, rings = _best_trial(intensity, pixel_size), None
    if trial is None or trial.fit < GOOD_FIT or trial.hollow < HOLLOW:
        rings = _best_rings(intensity, pixel_size)
    hollow = rings is not None and rings.middle < DARK and rings.contrast > LEAST_CONTRAST
    if not hollow and (trial is None or trial.fit < LEAST_FIT):
        return FoundField(cells=[], nucleus=0.0, stained=0.0, notes=notes)
    if hollow:
        notes.append("the stain lies outside the nuclei: whole cells are outlined")
        nucleus, found = rings.nucleus, _segment_rings(intensity, rings.nucleus)
        expected = REACH * nucleus * found.scale
    else:
        nucleus, found = trial.size, _segment(intensity, trial.size)
        expected = nucleus * found.scale
    drawn = transform.resize(drawn, found.labels.shape, order=0) if drawn.any() else np.zeros(found.labels.shape, bool)
    regions = measure.regionprops(found.labels)
    whole = [region for region in regions if _is_whole(region, drawn.shape) and not drawn[region.slice].any()]
    sizes = [r.equivalent_diameter_area for r in whole if r.equivalent_diameter_area > SIZES[0] * expected]
    # The median is taken over what may be nuclei: dust is more frequent than cells in a thin field.
    median = expected
    if sizes and not hollow:
        median = float(np.median(sizes))
        nucleus = median / found.scale
    accepted = [
        region
        for region in whole
        if SIZES[0] * median < region.equivalent_diameter_area < SIZES[1] * median and region.solidity > SOLID
    ]
    if accepted and nucleus < SMALLEST:
        notes.append(
            f"nuclei are only some {nucleus:.0f} pixels across: fine texture is missing, so the verdict is unsure"
        )
    if accepted and pixel_size and not NUCLEUS_MICRONS[0] <= nucleus * pixel_size <= NUCLEUS_MICRONS[1]:
        notes.append(
            f"nuclei are {nucleus * pixel_size:.1f} micrometres across by the pixel size that was given, which those "
            "of HEp-2 cells are not: leave it out if unsure"
        )
    outside = found.picture[found.labels == 0]
    ground = float(np.median(outside)) if outside.size else float(found.picture.min())
    # What lies in regions that are cut off by the border is none of the whole cells' fault.
    cut = np.isin(found.labels, [region.label for region in regions if not _is_whole(region, drawn.shape)])
    inside = np.isin(found.labels, [region.label for region in accepted])
    return FoundField(
        cells=[_found(region, found.scale, found.picture, ground, unit) for region in accepted],
        nucleus=nucleus if accepted else 0.0,
        stained=float((found.stained & inside).sum() / max(1, (found.stained & ~cut & ~drawn).sum())),
        hollow=hollow,
        notes=notes,
    )


class _Trial(NamedTuple):
    """How well a field falls into round, whole regions of one `size`, in pixels, that was looked for.

    `fit` is between 0 and 1, `score` also counts the regions. `hollow` is the light in the regions' middle beside that
    half way out: below 1 where the stain lies round the nucleus.
    """

    score: float
    fit: float
    size: float
    hollow: float


def _middle(intensity: np.ndarray) -> np.ndarray:
    # The middle of a large field is enough, and keeps the cost of a field of 20 megapixels down.
    side = int(TO_ESTIMATE**0.5)
    top, left = (max(0, (length - side) // 2) for length in intensity.shape)
    return intensity[top : top + side, left : left + side]


def _sizes(shape: tuple[int, int], step: float, pixel_size: float | None) -> np.ndarray:
    """List sizes of nuclei, in pixels, to look for in a field of this shape, each 2^`step` times the last."""
    largest = max(min(shape) / 3, 0.8 * ONE_CELL)
    sizes = SMALLEST * 2 ** np.arange(0, np.log2(largest / SMALLEST), step)
    if pixel_size is None:
        return sizes
    low, high = (across / pixel_size for across in NUCLEUS_MICRONS)
    sizes = sizes[(low <= sizes) & (sizes <= high)]
    return sizes if len(sizes) else np.array([(low * high) ** 0.5])


def _best_trial(intensity: np.ndarray, pixel_size: float | None) -> _Trial | None:
    """Look for bright regions of many sizes, and return the best, if there is any."""
    middle, best = _middle(intensity), None
    if min(middle.shape) < 2 * SMALLEST:
        return None
    for size in _sizes(middle.shape, 0.5, pixel_size):
        labels, scale, picture, _ = _bright(middle, size)
        regions = [r for r in measure.regionprops(labels) if r.equivalent_diameter_area > 0.3 * size * scale]
        across = np.array([region.equivalent_diameter_area for region in regions]) / scale
        fits = np.exp(-((np.log(across / size) / 0.35) ** 2)) * [region.solidity**4 for region in regions]
        # By its diameter: by area, a few clouds of cells win over the cells; by number, their grains do.
        score = float(across @ fits)
        if score > (0.0 if best is None else best.score):
            hollow = _hollowness(regions, picture, labels)
            best = _Trial(score, score / across.sum(), float(np.median(across)), hollow)
    return best


def _hollowness(regions: list, picture: np.ndarray, labels: np.ndarray) -> float:
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


def _shrunk(intensity: np.ndarray, scale: float) -> np.ndarray:
    if scale < 1:
        intensity = transform.rescale(intensity, scale, anti_aliasing=True, preserve_range=True)
    return intensity.astype(np.float32)


def _ground(picture: np.ndarray, across: float) -> np.ndarray:
    """Return the ground, uneven as it is: what is left when everything narrower than `across` is taken away."""
    # Whole blocks, lest the last ones be filled up with darkness.
    padded = np.pad(picture, [(0, -side % 4) for side in picture.shape], mode="edge")
    coarse = transform.downscale_local_mean(padded, (4, 4))
    ground = ndimage.grey_opening(ndimage.gaussian_filter(coarse, 1), size=2 * int(across / 8) + 1)
    ground = transform.resize(ndimage.gaussian_filter(ground, across / 13), padded.shape, order=1, preserve_range=True)
    return ground[: picture.shape[0], : picture.shape[1]]


class _Bright(NamedTuple):
    """Bright regions: `labels` and `light`, the root of what the smoothed `picture` has above the ground."""

    labels: np.ndarray
    scale: float
    picture: np.ndarray
    light: np.ndarray


def _bright(intensity: np.ndarray, size: float) -> _Bright:
    """Find bright regions of about `size` pixels across, by one threshold for the field."""
    scale = min(1.0, WORKING / size)
    picture, across = _shrunk(intensity, scale), size * scale
    # The root keeps a dim nucleus with bright dots in one piece.
    light = np.sqrt(np.clip(picture - _ground(picture, 3.2 * across), 0, None))
    light = ndimage.gaussian_filter(light, across / 12)
    labels = np.zeros(picture.shape, int)
    if light.max() > light.min():
        above = light > 0.85 * filters.threshold_otsu(light)
        labels = _apart(above & (light > ndimage.gaussian_filter(light, 1.2 * across)), across)
    return _Bright(labels, scale, picture, light)


def _segment(intensity: np.ndarray, size: float) -> Segmentation:
    """Outline bright regions of about `size` pixels across, each by its own light."""
    labels, scale, picture, light = _bright(intensity, size)
    # A threshold for the whole field takes the haze round bright nuclei for theirs.
    level = ndimage.median(light, labels, np.arange(labels.max() + 1))
    return Segmentation(_apart((labels > 0) & (light > EDGE * level[labels]), size * scale), scale, picture, labels > 0)


def _apart(mask: np.ndarray, across: float) -> np.ndarray:
    """Label the regions of a mask, those of about `across` pixels that touch apart; grains are left out."""
    mask = ndimage.binary_fill_holes(morphology.opening(mask, morphology.disk(max(1, int(across / 10)))))
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), across / 16)
    peaks = feature.peak_local_max(
        depth,
        min_distance=int(0.3 * across),
        threshold_abs=0.15 * across,
        labels=measure.label(mask),
        exclude_border=False,
    )
    return segmentation.watershed(-depth, _numbered(peaks, mask.shape), mask=mask)


def _numbered(places: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    numbers = np.zeros(shape, int)
    numbers[tuple(places.T)] = np.arange(1, len(places) + 1)
    return numbers


class _Rings(NamedTuple):
    """Rings round nuclei of one size: `nucleus` across in pixels of the field, the places (rings, 2) of their centres
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
    middle = _middle(intensity)
    if min(middle.shape) < 2 * SMALLEST:
        return None
    tried = [_rings(middle, size) for size in _sizes(middle.shape, 0.25, pixel_size)]
    return max((rings for rings in tried if len(rings.places)), key=lambda rings: rings.strength, default=None)


def _rings(intensity: np.ndarray, nucleus: float) -> _Rings:
    scale = min(1.0, 2 * RING_RADIUS / nucleus)
    picture, radius = _shrunk(intensity, scale), nucleus * scale / 2
    light = ndimage.gaussian_filter(picture, 1) - _ground(picture, 5.8 * radius)
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


def _segment_rings(intensity: np.ndarray, nucleus: float) -> Segmentation:
    """Find cells by the rings round their dark nuclei: each reaches so far, or to where a neighbour is nearer."""
    rings = _rings(intensity, nucleus)
    centres = _numbered(rings.places, rings.light.shape)
    distance, nearest = ndimage.distance_transform_edt(centres == 0, return_indices=True)
    labels = np.where(distance > REACH * nucleus * rings.scale / 2, 0, centres[tuple(nearest)])
    stained = rings.light > filters.threshold_otsu(rings.light)
    return Segmentation(labels, rings.scale, _shrunk(intensity, rings.scale), stained)


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


def _is_whole(region, shape: tuple[int, int]) -> bool:
    top, left, bottom, right = region.bbox
    return top > 0 and left > 0 and bottom < shape[0] and right < shape[1]


def _found(region, scale: float, picture: np.ndarray, ground: float, unit: float) -> FoundCell:
    top, left, bottom, right = (round(edge / scale) for edge in region.bbox)
    light = unit * (np.sort(picture[region.slice][region.image]) - ground)
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
    """Cut out one cell as the models know cells: (1, 78, 78), float32 in [0, 1], the nucleus some 63 pixels across."""
    side = round(nucleus * IMAGE_SIZE / NUCLEUS_IN_CROP)
    top, left = (round(c - side / 2) for c in cell.centre)
    rows = _mirrored(np.arange(top, top + side), intensity.shape[0])
    columns = _mirrored(np.arange(left, left + side), intensity.shape[1])
    return prepare(np.ascontiguousarray(intensity[np.ix_(rows, columns)]))


def _mirrored(position: np.ndarray, size: int) -> np.ndarray:
    return np.clip((size - 1) - abs((size - 1) - abs(position)), 0, size - 1)
