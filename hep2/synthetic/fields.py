"""Synthetic slide fields: cells of one pattern and their mitoses, with their true places; cameras and resolutions."""

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import find_objects, zoom

from hep2.patterns import CLASS_NAMES
from hep2.synthetic.cells import stain_of
from hep2.synthetic.drawing import Random, draw_body, draw_nucleus, photograph
from hep2.synthetic.stains import draw_mitosis

CYTOPLASM = 21  # pixels from the rim of a Golgi cell's nucleus to where its cytoplasm's light has fallen to a sixth
FULL_SCALE = {8: np.uint8(255), 16: np.uint16(65535), 32: np.float32(1)}  # of a camera, by its bits


class SyntheticCell(NamedTuple):
    """Where a cell lies in a synthetic field: the box (top, left, height, width), in pixels, round its nucleus.

    Of Golgi, round the cell, to where the light of its cytoplasm has fallen to a sixth or where a neighbour is nearer:
    no pixel belongs to two cells. `stained_plate` tells whether the chromatin of a mitosis is stained.
    """

    bbox: tuple[int, int, int, int]
    mitotic: bool
    stained_plate: bool = False


def synthetic_field(
    pattern: str,
    random: Random,
    *,
    shape: tuple[int, int] = (966, 1296),
    nucleus: float = 90.0,
    density: float = 0.5,
    mitoses: float | None = None,
    cytoplasm: float = 0.0,
) -> tuple[np.ndarray, list[SyntheticCell]]:
    """Draw a slide field of `shape` of one of the six patterns or of `OTHER_PATTERNS`.

    Parameters
    ----------
    nucleus, density
        The diameter of a nucleus in pixels; and how crowded: at 1 there is hardly room for one more cell.
    mitoses
        Share of the cells that are in mitosis; by default .05, more of the mitotic patterns.
    cytoplasm
        Light of a stain in all cells' cytoplasm, where a nucleus has about 1.

    Returns
    -------
    The field, uint8, with uneven background and light, touching cells and often a scale bar; and the cells that lie
    whole in it.

    Raises
    ------
    ValueError
        If the pattern is unknown.
    """
    stain = stain_of(pattern)
    light, deepest, owner, kinds = np.zeros(shape), np.zeros(shape), np.full(shape, -1), []
    scale = nucleus / 55  # of the cells that `draw_nucleus` gives at a radius of 25 to 30
    canvas = (136, 136)  # room for cytoplasm at all sides
    # Generators of their own: what they draw leaves the other cells as they are.
    serum, others = random.bit_generator.seed_seq.spawn(1)[0], random.spawn(1)[0]
    for place, mitotic in _places(shape, nucleus, density, stain.mitoses if mitoses is None else mitoses, random):
        drawn = draw_nucleus(canvas, (68, 68), random.uniform(24, 30), random)
        if mitotic:
            own = draw_mitosis(drawn, random.uniform(0, np.pi), stain, others)
        else:
            own = random.uniform(0.7, 1.1) * stain.draw(drawn, random, np.random.default_rng(serum))
        if cytoplasm and not mitotic:
            own = np.maximum(own, cytoplasm * others.uniform(0.7, 1.1) * draw_body(drawn, others))
        depth = drawn.depth + (CYTOPLASM if pattern == "Golgi" and not mitotic else 0)
        own, depth = zoom(own, scale, order=1), zoom(depth, scale, order=1)
        top, left = (int(centre - len(own) / 2) for centre in place)
        there = (slice(max(top, 0), max(0, top + len(own))), slice(max(left, 0), max(0, left + len(own))))
        rows, columns = light[there].shape
        here = (slice(max(-top, 0), max(-top, 0) + rows), slice(max(-left, 0), max(-left, 0) + columns))
        np.maximum(light[there], own[here], out=light[there])
        owner[there][depth[here] > deepest[there]] = len(kinds)
        np.maximum(deepest[there], depth[here], out=deepest[there])
        kinds.append((mitotic, mitotic and stain.mitosis in ("stained plate", "kinetochores")))
    cells = []
    for box, kind in zip(find_objects(owner + 1, len(kinds)), kinds, strict=True):
        if box and all(part.start > 0 and part.stop < side for part, side in zip(box, shape, strict=True)):
            top, left = (part.start for part in box)
            cells.append(SyntheticCell((top, left, box[0].stop - top, box[1].stop - left), *kind))
    row, column = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    direction = random.uniform(0, 2 * np.pi)
    background = random.uniform(0, 0.06) * (1 + np.cos(direction) * row + np.sin(direction) * column)
    vignette = 1 - random.uniform(0, 0.3) * (row**2 + column**2) / 2
    image = photograph((light + background) * vignette, random, stain.full)
    if random.random() < 0.5:
        image[18:30, 20 : 20 + int(1.6 * nucleus)] = 220
    return image, cells


def _places(
    shape: tuple[int, int], nucleus: float, density: float, mitoses: float, random: Random
) -> Iterator[tuple[tuple[float, float], bool]]:
    """Yield centres (row, column) of cells, and whether each is in mitosis."""
    places: list[tuple[float, float]] = []
    wanted = density * shape[0] * shape[1] / (2.2 * nucleus**2)
    for _ in range(int(20 * wanted)):
        place = tuple(random.uniform(-0.3 * nucleus, side + 0.3 * nucleus) for side in shape)
        apart = 1.25
        if places and random.random() < 0.1:
            direction, apart = random.uniform(0, 2 * np.pi), 0.97
            row, column = places[random.integers(len(places))]
            distance = nucleus * random.uniform(0.98, 1.08)
            place = (row + distance * np.sin(direction), column + distance * np.cos(direction))
        near = all(-0.3 * nucleus < centre < side + 0.3 * nucleus for centre, side in zip(place, shape, strict=True))
        if near and all(np.hypot(place[0] - row, place[1] - column) > apart * nucleus for row, column in places):
            places.append(place)
            yield place, bool(random.random() < mitoses)
        if len(places) >= wanted:
            return


def synthetic_fields(seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (class name, field) for a small field of each of the six patterns, uint8 (600, 800), fixed by the seed."""
    for position, pattern in enumerate(CLASS_NAMES):
        random = np.random.default_rng((seed, position))
        yield pattern, synthetic_field(pattern, random, shape=(600, 800), nucleus=70.0)[0]


def expose(
    image: np.ndarray,
    random: Random | None = None,
    *,
    light: float = 1.0,
    bits: int = 8,
    offset: float = 0.0,
    photons: float = 1000.0,
) -> np.ndarray:
    """Take a field (rows, columns) uint8 again with another camera: `light` times its light, in 8, 16 or 32 `bits`.

    With `random` come the noise of so many `photons` in full light and of the camera, which weigh the more the less
    light there is. `offset` is a share of full scale. Returns uint8, uint16 or float32, where 1 is full scale.
    """
    signal = light * image / 255.0
    if random is not None:
        signal = random.poisson(signal * photons) / photons + random.normal(0, 2 / photons, image.shape)
    full = FULL_SCALE[bits]
    signal = ((signal + offset) * full).clip(0, full)
    return (signal if bits == 32 else signal.round()).astype(full.dtype)


def reduce_field(
    image: np.ndarray, cells: list[SyntheticCell], factor: float, quality: int | None = None
) -> tuple[np.ndarray, list[SyntheticCell]]:
    """Shrink a field (rows, columns) uint8 and its cells' boxes by a `factor` below 1, as a web page would.

    With a JPEG `quality` it is stored as a green picture, whose colour JPEG keeps at half the resolution.
    """
    picture = Image.fromarray(image)
    picture = picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS)
    if quality is not None:
        file, black = io.BytesIO(), Image.new("L", picture.size)
        Image.merge("RGB", (black, picture, black)).save(file, "JPEG", quality=quality)
        picture = Image.open(file).getchannel("G")
    cells = [cell._replace(bbox=tuple(round(factor * side) for side in cell.bbox)) for cell in cells]
    return np.asarray(picture), cells
