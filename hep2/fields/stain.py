"""What only a field shows: how far cells stand out, what is stained outside nuclei, how cells differ, and mitoses."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from hep2.fields.segmentation import FoundField, background, label_means, roundness, scaled

PATCH = 48  # pixels on a side of what is looked at round a cell, of which a nucleus takes
NUCLEUS = 28
ANGLES = np.arange(12) * np.pi / 12
BRIGHT_PLATE = 0.5  # logarithm of the light on a bar through the cell beside that at its sides, of a plate at least
DARK_PLATE = 0.28  # the same of a dark plate, beside the bar
COMPACT = 0.54  # roundness of a chromatin plate, at least
FEWEST = 5  # cells, below which a field has no typical one to compare with


@dataclass(frozen=True, kw_only=True)
class Stain:
    """How a field is stained.

    `signal` is how far the brightest tenth of a typical cell differs from what lies round it, in standard deviations of
    the background's noise, at the scale of the segmentation. `outside` is the light round a typical cell beside that in
    it, and `spread` how much cells differ in brightness: the standard deviation of its logarithm. `mitoses` holds, for
    each cell, "stained" or "unstained" by its chromatin, or None where it is in no mitosis.
    """

    signal: float
    outside: float
    spread: float
    mitoses: list[str | None]


def measure_stain(intensity: np.ndarray, found: FoundField) -> Stain:
    """Measure how a field (rows, columns) is stained whose cells were found; there must be one at least."""
    size = found.nucleus * found.scale
    picture, labels = scaled(intensity, found.scale), found.labels
    light = picture - background(picture, 4 * size)
    numbers = np.arange(1, len(found.cells) + 1)
    near = ndimage.grey_dilation(labels, size=2 * max(2, int(size / 6)) + 1)
    around = np.where(ndimage.binary_dilation(labels > 0), 0, near)
    inside, outside = (label_means(light, part, len(numbers)) for part in (labels, around))
    brightest = ndimage.labeled_comprehension(light, labels, numbers, lambda values: np.quantile(values, 0.9), float, 0)
    noise = _noise(picture)
    typical = max(float(np.median(inside)), 1e-9)
    logs = np.log(np.maximum(inside, 0.02 * typical))
    return Stain(
        signal=abs(float(np.median(brightest - outside))) / max(noise, 1e-6 * float(np.ptp(picture)) + 1e-12),
        outside=float(np.median(outside)) / typical,
        spread=1.4826 * float(np.median(abs(logs - np.median(logs)))),
        mitoses=_mitoses(ndimage.gaussian_filter(light, size / NUCLEUS), found),
    )


def _noise(picture: np.ndarray) -> float:
    """Return the noise of the darker half of a picture: what a median of neighbours takes away."""
    residual = picture - ndimage.median_filter(picture, 3)
    return float(residual[picture <= np.median(picture)].std())


def _mitoses(light: np.ndarray, found: FoundField) -> list[str | None]:
    """Tell metaphases and anaphases by shape: a bright bar or disc, or a dark one in a round cell without texture.

    Every measure is compared with the field's typical cell, so nucleoli or speckles that all cells have count for none.
    """
    if len(found.cells) < FEWEST or found.dark or found.rings:
        return [None] * len(found.cells)
    patches, own = _patches(light, found)
    floor = 0.03 * float(np.median([np.quantile(patch, 0.95) for patch in patches]))
    bright_bar, dark_bar = _bars(patches, floor)
    detail = patches - ndimage.gaussian_filter(patches, (0, NUCLEUS / 10, NUCLEUS / 10))
    rows = []
    for patch, mask, fine in zip(patches, own, detail, strict=True):
        mask = mask if mask.any() else np.ones_like(mask)
        middle = ndimage.binary_erosion(mask, iterations=4)
        middle = middle if middle.sum() > 20 else mask
        values = np.sort(patch[mask])
        half = (max(np.quantile(values, 0.05), 0) + np.quantile(values, 0.98)) / 2
        parts, _ = ndimage.label(mask & (patch >= half))
        areas = np.bincount(parts.ravel())[1:]
        _, shape = roundness((parts == areas.argmax() + 1).astype(int))
        texture = fine[middle].std() / max(patch[middle].mean(), floor)
        rows.append((values[int(0.8 * len(values)) :].mean(), values.mean(), texture, areas.sum(), shape[0]))
    measures = np.array(rows)
    # Of a typical cell: logarithms of the brightest fifth, the mean, the texture and the bright part's area.
    peak, mean, texture, part = np.log(np.maximum(measures[:, :4], 1e-9) / np.median(measures[:, :4], axis=0)).T
    compact = measures[:, 4] > COMPACT
    share = measures[:, 3] / (np.pi / 4 * NUCLEUS**2)
    bar = bright_bar > np.median(bright_bar) + BRIGHT_PLATE
    plate = compact & (part < np.log(0.6)) & (texture > 0.35) & (bar | (peak > 0.15))
    # Where the cell is too dim to see, little more than its plate is outlined.
    outstanding = peak > max(0.35, 2.5 * 1.4826 * np.median(abs(peak)))
    alone = outstanding & (mean > 0.15) & (part < -0.15) & (bright_bar > 0.15)
    dark = (dark_bar > max(DARK_PLATE, np.median(dark_bar) + 0.15)) & (share > 0.5) & (texture < 0.45)
    # Nucleoli are dissolved in mitosis: their stain fills the cell.
    diffuse = (mean > 0.5) & (texture < -0.5) & (part > np.log(2))
    stained = plate | alone
    return [
        "stained" if one else "unstained" if other else None
        for one, other in zip(stained, (dark | diffuse) & ~stained, strict=True)
    ]


def _patches(light: np.ndarray, found: FoundField) -> tuple[np.ndarray, np.ndarray]:
    """Cut out each cell, its nucleus as large as all others', and the mask of what is its own: (cells, 48, 48) both."""
    step = found.nucleus * found.scale / NUCLEUS
    offsets = (np.arange(PATCH) - (PATCH - 1) / 2) * step
    patches, own = [], []
    for number, cell in enumerate(found.cells, 1):
        row, column = np.array(cell.centre) * found.scale
        places = np.meshgrid(row + offsets, column + offsets, indexing="ij")
        patches.append(ndimage.map_coordinates(light, places, order=1, mode="reflect"))
        own.append(ndimage.map_coordinates(found.labels, places, order=0, mode="constant") == number)
    return np.stack(patches), np.stack(own)


def _bars(patches: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how much brighter, and how much darker, a bar through each cell's centre is than its sides, at best.

    Two bars side by side, as of an anaphase, count as one does. Both are logarithms.
    """
    row, column = np.indices((PATCH, PATCH)) - (PATCH - 1) / 2
    along = np.stack([row * np.cos(angle) + column * np.sin(angle) for angle in ANGLES])
    across = abs(np.stack([column * np.cos(angle) - row * np.sin(angle) for angle in ANGLES]))

    def light(part: np.ndarray) -> np.ndarray:
        part = part & (abs(along) < 6)
        return np.maximum(np.einsum("nij,aij->na", patches, part) / part.sum((1, 2)), floor)

    bar, sides = light(across < 2), light((across > 4.5) & (across < 8.5))
    pair, between, beyond = (
        light((across > 2.5) & (across < 6)),
        light(across < 1.5),
        light((across > 7.5) & (across < 10)),
    )
    bright = np.maximum(np.log(bar / sides), np.log(pair / np.maximum(between, beyond))).max(1)
    dark = np.maximum(np.log(sides / bar), np.log(np.minimum(between, beyond) / pair)).max(1)
    return bright, dark
