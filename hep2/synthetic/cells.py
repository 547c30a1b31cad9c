"""Synthetic HEp-2 cells, made from nothing but a seed: for the examples, the tests and runs without the dataset.

A synthetic cell is drawn as a microscope would see it: a nucleus of an uneven oval shape, the antigen's place in it or round
it, neighbours at the border, the blur of the optics, the haze of what is out of focus, the noise of photons and of the
camera, and the stretch to 8 bits that the published cells have too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.ndimage import find_objects, gaussian_filter, zoom

from hep2.patterns import CLASS_NAMES, IMAGE_SIZE

Random = np.random.Generator
CYTOPLASM = 21  # pixels from the rim of a synthetic cell's nucleus to where its cytoplasm's light has fallen to a sixth


@dataclass(frozen=True)
class Nucleus:
    """Where a nucleus lies: for each pixel its depth below the rim, in pixels (negative outside), and its angle.

    `depth`, `angle` and `inside` are float arrays of the canvas's shape; `inside` runs softly from 0 to 1.
    """

    depth: np.ndarray
    angle: np.ndarray
    inside: np.ndarray
    centre: tuple[float, float]
    radius: float


def synthetic_cell(pattern: str, random: Random) -> np.ndarray:
    """Draw one cell of a pattern; returns uint8 of shape (78, 78), stretched to 0–255.

    Raises
    ------
    ValueError
        If the pattern is not one of the six.
    """
    if pattern not in STAINS:
        raise ValueError(f"unknown pattern {pattern!r}: choose one of {CLASS_NAMES}")
    shape = (IMAGE_SIZE, IMAGE_SIZE)
    middle = IMAGE_SIZE / 2
    radius = random.uniform(25, 30)
    centre = (middle + random.normal(0, 1.5), middle + random.normal(0, 1.5))
    light = STAINS[pattern](draw_nucleus(shape, centre, radius, random), random)
    for _ in range(random.choice(3, p=[0.45, 0.4, 0.15])):
        direction, distance = random.uniform(0, 2 * np.pi), radius * random.uniform(2.15, 2.5)
        place = (centre[0] + distance * np.sin(direction), centre[1] + distance * np.cos(direction))
        neighbour = draw_nucleus(shape, place, radius * random.uniform(0.85, 1.05), random)
        light = np.maximum(light, random.uniform(0.6, 1.1) * STAINS[pattern](neighbour, random))
    return photograph(light, random)


class SyntheticCell(NamedTuple):
    """Where a cell lies in a synthetic cell field: the box (top, left, height, width), in pixels, round its nucleus.

    Of Golgi, round the cell, to where the light of its cytoplasm has fallen to a sixth or where a neighbour is nearer:
    no pixel belongs to two cells.
    """

    bbox: tuple[int, int, int, int]
    mitotic: bool


def synthetic_field(
    pattern: str,
    random: Random,
    *,
    shape: tuple[int, int] = (966, 1296),
    nucleus: float = 90.0,
    density: float = 0.5,
) -> tuple[np.ndarray, list[SyntheticCell]]:
    """Draw a whole slide field of one pattern: uint8 of `shape`, and the cells that lie whole in it.

    `pattern` is one of the six, or one of `OTHER_PATTERNS`. `nucleus` is what a nucleus is across, in pixels; at a
    `density` of 1 there is hardly room for one more. A tenth of the cells touch another, and some are in mitosis;
    ground and light are uneven, and a scale bar may be drawn in.

    Raises
    ------
    ValueError
        If `pattern` is neither.
    """
    stain = (STAINS | OTHER_PATTERNS).get(pattern)
    if stain is None:
        raise ValueError(f"unknown pattern {pattern!r}: choose one of {(*CLASS_NAMES, *OTHER_PATTERNS)}")
    light, deepest, owner, mitoses = np.zeros(shape), np.zeros(shape), np.full(shape, -1), []
    scale = nucleus / 55  # of the cells that `draw_nucleus` gives at a radius of 25 to 30
    canvas = (136, 136)  # room for cytoplasm at all sides
    faded = np.outer(*2 * [np.hanning(canvas[0]) ** 0.5])  # fibres would show where the canvas ends
    for place, mitotic in _places(shape, nucleus, density, random):
        drawn = draw_nucleus(canvas, (68, 68), random.uniform(24, 30), random)
        own = _mitosis(drawn, random) if mitotic else random.uniform(0.7, 1.1) * stain(drawn, random)
        depth = drawn.depth + (CYTOPLASM if pattern == "Golgi" and not mitotic else 0)
        own *= faded if pattern in OTHER_PATTERNS else 1
        own, depth = zoom(own, scale, order=1), zoom(depth, scale, order=1)
        top, left = (int(centre - len(own) / 2) for centre in place)
        there = (slice(max(top, 0), max(0, top + len(own))), slice(max(left, 0), max(0, left + len(own))))
        rows, columns = light[there].shape
        here = (slice(max(-top, 0), max(-top, 0) + rows), slice(max(-left, 0), max(-left, 0) + columns))
        np.maximum(light[there], own[here], out=light[there])
        owner[there][depth[here] > deepest[there]] = len(mitoses)
        np.maximum(deepest[there], depth[here], out=deepest[there])
        mitoses.append(mitotic)
    cells = []
    for box, mitotic in zip(find_objects(owner + 1, len(mitoses)), mitoses, strict=True):
        if box and all(part.start > 0 and part.stop < side for part, side in zip(box, shape, strict=True)):
            top, left = (part.start for part in box)
            cells.append(SyntheticCell((top, left, box[0].stop - top, box[1].stop - left), mitotic))
    row, column = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    direction = random.uniform(0, 2 * np.pi)
    ground = random.uniform(0, 0.06) * (1 + np.cos(direction) * row + np.sin(direction) * column)
    vignette = 1 - random.uniform(0, 0.3) * (row**2 + column**2) / 2
    image = photograph((light + ground) * vignette, random)
    if random.random() < 0.5:
        image[18:30, 20 : 20 + int(1.6 * nucleus)] = 220
    return image, cells


def _places(
    shape: tuple[int, int], nucleus: float, density: float, random: Random
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
            yield place, bool(random.random() < 0.05)
        if len(places) >= wanted:
            return


def _mitosis(nucleus: Nucleus, random: Random) -> np.ndarray:
    """A plate of condensed chromatin in a round, dim cell."""
    row, column = np.indices(nucleus.depth.shape) - np.array(nucleus.centre)[:, None, None]
    tilt = random.uniform(0, np.pi)
    along, across = row * np.cos(tilt) + column * np.sin(tilt), column * np.cos(tilt) - row * np.sin(tilt)
    plate = np.exp(-((along / 15) ** 4) - (across / 6) ** 4)
    return 1.8 * plate + 0.15 / (1 + np.exp(np.hypot(row, column) - nucleus.radius))


def photograph(light: np.ndarray, random: Random) -> np.ndarray:
    """Take a picture of light (rows, columns), 0 to about 1: blur, haze, background, noise, then 8 bits."""
    haze = gaussian_filter(light, random.uniform(5, 9))
    image = gaussian_filter(light, random.uniform(0.7, 1.1)) + random.uniform(0.05, 0.2) * haze
    image += random.uniform(0.01, 0.05) * image.max()
    photons = random.uniform(150, 900)  # at the brightest spot
    image = random.poisson((image / image.max()).clip(0) * photons) / photons + random.normal(0, 0.01, light.shape)
    image = (image - image.min()) / (image.max() - image.min())
    return (255 * image).round().astype(np.uint8)


def draw_nucleus(shape: tuple[int, int], centre: tuple[float, float], radius: float, random: Random) -> Nucleus:
    """Lay an uneven oval of a mean `radius` in pixels at `centre` (row, column) on a canvas of `shape`."""
    row, column = np.indices(shape, dtype=float)
    row, column = row - centre[0], column - centre[1]
    angle = np.arctan2(row, column)
    flattening, tilt = random.uniform(0, 0.14), random.uniform(0, np.pi)
    rim = radius * (1 + flattening * np.cos(2 * (angle - tilt)))
    for order in (3, 4, 5):
        rim += radius * random.normal(0, 0.012) * np.cos(order * angle + random.uniform(0, 2 * np.pi))
    depth = rim - np.hypot(row, column)
    return Nucleus(depth, angle, 1 / (1 + np.exp(-1.6 * depth)), centre, radius)


def grain(shape: tuple[int, int], scale: float, random: Random) -> np.ndarray:
    """Make a random texture of grains of about `scale` pixels, with mean 0 and standard deviation 1."""
    texture = gaussian_filter(random.normal(size=shape), scale)
    return (texture - texture.mean()) / texture.std()


def spots(shape: tuple[int, int], places: np.ndarray, sizes: np.ndarray, brightness: np.ndarray) -> np.ndarray:
    """Add up round Gaussian spots at `places` (spots, 2), of standard deviation `sizes` in pixels."""
    row, column = np.arange(shape[0])[:, None], np.arange(shape[1])
    light = np.zeros(shape)
    for (top, left), size, peak in zip(places, sizes, brightness, strict=True):
        light += peak * np.exp(-((row - top) ** 2) / (2 * size**2)) * np.exp(-((column - left) ** 2) / (2 * size**2))
    return light


def _centromere(nucleus: Nucleus, random: Random) -> np.ndarray:
    # Some fifty kinetochores, one a chromosome: small sharp dots that keep apart.
    count = random.integers(35, 60)
    places = _scatter(nucleus, count, 0.9, random, apart=4.0)
    dots = spots(
        nucleus.depth.shape, places, random.uniform(0.8, 1.25, len(places)), random.lognormal(-0.2, 0.35, len(places))
    )
    return dots + random.uniform(0.04, 0.14) * nucleus.inside


def _golgi(nucleus: Nucleus, random: Random) -> np.ndarray:
    # Ribbons and granules beside the nucleus, on one side of it, in a faint cytoplasm; the nucleus stays dark.
    light = random.uniform(0.02, 0.1) * np.exp(np.minimum(nucleus.depth, 0) / 12) * (1 - 0.5 * nucleus.inside)
    for _ in range(random.integers(1, 3)):
        middle, arc = random.uniform(0, 2 * np.pi), random.uniform(0.5, 1.3)
        count = random.integers(10, 26)
        angle = middle + arc * random.uniform(-1, 1, count)
        distance = nucleus.radius * 1.02 + random.gamma(2.0, 1.8, count)
        places = np.stack(
            [nucleus.centre[0] + distance * np.sin(angle), nucleus.centre[1] + distance * np.cos(angle)], 1
        )
        sizes, peaks = random.uniform(1.1, 2.6, count), random.lognormal(-0.6, 0.4, count)
        light += spots(light.shape, places, sizes, peaks)
    return light


def _homogeneous(nucleus: Nucleus, random: Random) -> np.ndarray:
    texture = 1 + random.uniform(0.02, 0.08) * grain(nucleus.depth.shape, random.uniform(1.5, 3.0), random)
    return _dome(nucleus, 0.3, random.uniform(0.8, 2.5)) * texture


def _numem(nucleus: Nucleus, random: Random) -> np.ndarray:
    # A bright rim round an evenly grainy nucleus, in a faint cytoplasm.
    shape = nucleus.depth.shape
    uneven = 1 + 0.15 * grain(shape, 3.0, random)
    rim = np.exp(-((nucleus.depth - 1.5) ** 2) / (2 * random.uniform(1.0, 1.5) ** 2)) * uneven
    inner = random.uniform(0.35, 0.55) * (1 + 0.1 * grain(shape, 1.5, random))
    cytoplasm = random.uniform(0.05, 0.15) * np.exp(np.minimum(nucleus.depth, 0) / 10)
    return rim + nucleus.inside * inner + (1 - nucleus.inside) * cytoplasm * (1 + 0.3 * grain(shape, 1.5, random))


def _nucleolar(nucleus: Nucleus, random: Random) -> np.ndarray:
    # One to five nucleoli, each a clump of a few blobs, in a dim nucleus.
    shape = nucleus.depth.shape
    haze = gaussian_filter(nucleus.inside, random.uniform(1.5, 4.0))
    light = random.uniform(0.05, 0.18) * haze * (1 + 0.15 * grain(shape, 2.0, random))
    for place in _scatter(nucleus, random.integers(1, 6), 0.6, random, apart=9.0):
        count = random.integers(1, 4)
        places = place + random.normal(0, 2.0, (count, 2))
        light += spots(shape, places, random.uniform(1.6, 3.2, count), random.uniform(0.5, 1.0, count))
    return light


def _speckled(nucleus: Nucleus, random: Random) -> np.ndarray:
    # Grains of uneven brightness throughout the nucleus, few of them very bright, the nucleoli left out, and a dim
    # grainy cytoplasm.
    shape = nucleus.depth.shape
    fine = np.exp(random.uniform(0.38, 0.48) * grain(shape, random.uniform(0.75, 1.1), random))
    coarse = np.exp(0.25 * grain(shape, 4.0, random))
    nucleoli = _scatter(nucleus, random.integers(2, 5), 0.6, random, apart=13.0)
    holes = spots(shape, nucleoli, random.uniform(3.0, 4.2, len(nucleoli)), random.uniform(0.8, 1.0, len(nucleoli)))
    body = _dome(nucleus, 0.35, random.uniform(1.8, 2.8)) * fine * coarse * (1 - np.clip(holes, 0, 0.9))
    cytoplasm = random.uniform(0.06, 0.2) * np.exp(np.minimum(nucleus.depth, 0) / 10)
    return (body + cytoplasm * (1 + 0.3 * grain(shape, 1.5, random))) / 2


def _dome(nucleus: Nucleus, height: float, softness: float) -> np.ndarray:
    """Light a nucleus that is thicker in the middle: 1 - `height` at a rim of `softness` pixels, 1 at the centre."""
    thickness = 1 - height + height * np.clip(nucleus.depth / nucleus.radius, 0, 1)
    return gaussian_filter(nucleus.inside, softness) * thickness


def _mitochondrial(nucleus: Nucleus, random: Random) -> np.ndarray:
    # AC-21: grains all through the cytoplasm, a dark nucleus.
    cytoplasm = np.exp(np.minimum(nucleus.depth, 0) / random.uniform(6, 14)) * (
        1 - random.uniform(0.7, 1) * nucleus.inside
    )
    grains = np.exp(random.uniform(0.4, 0.9) * grain(nucleus.depth.shape, random.uniform(0.7, 1.5), random))
    return cytoplasm * grains + random.uniform(0, 0.15) * nucleus.inside


def _few_dots(nucleus: Nucleus, random: Random) -> np.ndarray:
    # AC-6, AC-7: a few dots in the nucleus, where centromeres would be fifty.
    shape, count = nucleus.depth.shape, random.integers(1, 12)
    angle, distance = random.uniform(0, 2 * np.pi, count), nucleus.radius * 0.85 * random.uniform(0, 1, count) ** 0.5
    places = np.stack([nucleus.centre[0] + distance * np.sin(angle), nucleus.centre[1] + distance * np.cos(angle)], 1)
    dots = spots(shape, places, random.uniform(0.8, 1.6, count), random.uniform(0.5, 1.2, count))
    body = np.exp(np.minimum(nucleus.depth, 0) / random.uniform(4, 14))
    texture = 1 + random.uniform(0, 0.2) * grain(shape, random.uniform(0.7, 1.5), random)
    return dots + random.uniform(0.05, 0.4) * body * texture.clip(0)


def _fibrillar(nucleus: Nucleus, random: Random) -> np.ndarray:
    # AC-15 to AC-17: fibres through the cytoplasm, past a darker nucleus or over it.
    row, column = np.indices(nucleus.depth.shape) - np.array(nucleus.centre)[:, None, None]
    light, direction = np.zeros(nucleus.depth.shape), random.uniform(0, np.pi)
    for _ in range(random.integers(8, 40)):
        tilt = direction + random.normal(0, random.choice([0.1, 1.0]))
        top, left = random.uniform(-IMAGE_SIZE / 2, IMAGE_SIZE / 2, 2)
        along = (column - left) * np.cos(tilt) + (row - top) * np.sin(tilt)
        across = (row - top) * np.cos(tilt) - (column - left) * np.sin(tilt) + random.normal(0, 0.004) * along**2
        light += random.uniform(0.3, 1) * np.exp(-((across / random.uniform(0.8, 1.6)) ** 2)) * (abs(along) < 40)
    return light * (1 - random.uniform(0, 0.8) * nucleus.inside) + 0.1


def _diffuse(nucleus: Nucleus, random: Random) -> np.ndarray:
    # AC-19, AC-20: a cytoplasm evenly or finely stained, a darker nucleus.
    edge = 1 / (1 + np.exp(-(nucleus.depth + random.uniform(10, 25)) / random.uniform(1, 4)))
    texture = 1 + random.uniform(0, 0.3) * grain(nucleus.depth.shape, random.uniform(0.7, 2), random)
    return edge * (1 - random.uniform(0.4, 1) * nucleus.inside) * texture.clip(0)


STAINS = {
    "Centromere": _centromere,
    "Golgi": _golgi,
    "Homogeneous": _homogeneous,
    "NuMem": _numem,
    "Nucleolar": _nucleolar,
    "Speckled": _speckled,
}
# Patterns that are none of the six: what a reader must not take for one of them.
OTHER_PATTERNS = {
    "mitochondria": _mitochondrial,
    "few nuclear dots": _few_dots,
    "fibres": _fibrillar,
    "diffuse cytoplasm": _diffuse,
}


def _scatter(nucleus: Nucleus, count: int, share: float, random: Random, *, apart: float) -> np.ndarray:
    """Draw up to `count` places (places, 2) within `share` of the nucleus's radius, at least `apart` pixels apart."""
    places = np.empty((0, 2))
    for _ in range(20 * count):
        angle, distance = random.uniform(0, 2 * np.pi), nucleus.radius * share * random.uniform(0, 1) ** 0.5
        place = np.array(nucleus.centre) + distance * np.array([np.sin(angle), np.cos(angle)])
        if (np.hypot(*(place - places).T) >= apart).all():
            places = np.concatenate([places, place[None]])
        if len(places) == count:
            break
    return places


def synthetic_files(count: int, seed: int = 0) -> Iterator[tuple[str, np.ndarray, str]]:
    """Yield (file name, image, class name) for `count` synthetic cells of every pattern, in an order fixed by the seed."""
    for position, pattern in enumerate(CLASS_NAMES):
        for number in range(count):
            # A generator for each cell: asking for more cells leaves the first ones as they were.
            random = np.random.default_rng((seed, position, number))
            yield f"{pattern}-{number + 1:05d}.png", synthetic_cell(pattern, random), pattern


def synthetic_fields(seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (class name, field) for one small field of every pattern, uint8 of (600, 800), fixed by the seed."""
    for position, pattern in enumerate(CLASS_NAMES):
        random = np.random.default_rng((seed, position))
        yield pattern, synthetic_field(pattern, random, shape=(600, 800), nucleus=70.0)[0]
