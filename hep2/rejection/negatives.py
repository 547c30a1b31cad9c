"""Negatives: images that show no cell of the six patterns, drawn from a seed or made from cells."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

from hep2.images import ImageError, prepare
from hep2.patterns import IMAGE_SIZE
from hep2.synthetic.cells import OTHER_PATTERNS, Nucleus, draw_nucleus, photograph

Random = np.random.Generator

SHAPE = (IMAGE_SIZE, IMAGE_SIZE)


def draw_negatives(count: int, cells: np.ndarray, random: Random) -> tuple[np.ndarray, list[str]]:
    """Draw `count` images that are no HEp-2 cells, kind after kind, some of them spoilt from `cells` (cells, 78, 78).

    Returns float32 images (count, 1, 78, 78) in [0, 1], preprocessed as an upload is, and the name of each one's kind.
    """
    images, names = [], []
    kinds = list(NEGATIVES.items())
    while len(images) < count:
        name, draw = kinds[len(images) % len(kinds)]
        try:
            images.append(prepare(np.asarray(draw(random, cells), dtype=np.float32)))
        except ImageError:  # drawn constant: draw another
            continue
        names.append(name)
    return np.stack(images), names


def noise(random: Random, cells: np.ndarray) -> np.ndarray:
    """From white noise to clouds: a power law in spatial frequency."""
    frequency = np.hypot(np.fft.fftfreq(IMAGE_SIZE)[:, None], np.fft.fftfreq(IMAGE_SIZE))
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(random.normal(size=SHAPE)) * frequency ** -random.uniform(0, 2.5)
    return np.real(np.fft.ifft2(spectrum))


def gradient(random: Random, cells: np.ndarray) -> np.ndarray:
    """Light that falls off to one side, or round a place."""
    row, column = np.mgrid[0:1:78j, 0:1:78j]
    direction = random.uniform(0, 2 * np.pi)
    light = np.cos(direction) * row + np.sin(direction) * column
    if random.random() < 0.5:
        light = np.hypot(row - random.random(), column - random.random()) ** random.uniform(0.5, 3)
    return light + random.uniform(0, 0.05) * random.normal(size=SHAPE)


def clutter(random: Random, cells: np.ndarray) -> np.ndarray:
    """Boxes and ovals that hide each other, the statistics of a photograph (dead leaves, Lee et al. 2001)."""
    row, column = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE]
    image = np.zeros(SHAPE)
    for _ in range(random.integers(5, 80)):
        top, left = random.uniform(-10, IMAGE_SIZE + 10, 2)
        tilt, flattening, size = random.uniform(0, np.pi), random.uniform(0.3, 1), min(60, 3 / random.uniform(0.04, 1))
        along = (column - left) * np.cos(tilt) + (row - top) * np.sin(tilt)
        across = ((row - top) * np.cos(tilt) - (column - left) * np.sin(tilt)) / flattening
        box = random.random() < 0.5
        inside = (np.maximum(abs(along), abs(across)) if box else np.hypot(along, across)) < size
        image[inside] = random.random() + random.uniform(0, 0.3) * along[inside] / IMAGE_SIZE
    image += random.uniform(0, 0.05) * random.normal(size=SHAPE)
    return gaussian_filter(image, random.uniform(0.3, 2))


def writing(random: Random, cells: np.ndarray) -> np.ndarray:
    """Lines of letters, or strokes of a pen; dark on light or light on dark."""
    paper = Image.new("L", SHAPE, int(random.integers(0, 60)))
    pen = ImageDraw.Draw(paper)
    if random.random() < 0.5:
        size = int(random.integers(7, 45))
        font = ImageFont.load_default(size)
        for row in range(-5, IMAGE_SIZE, int(size * random.uniform(1, 1.6)) + 1):
            text = "".join(map(chr, random.integers(33, 127, 24)))
            pen.text((int(random.integers(-20, 10)), row), text, fill=int(random.integers(120, 256)), font=font)
    else:
        for _ in range(random.integers(1, 14)):
            points = [tuple(point) for point in random.uniform(-10, IMAGE_SIZE + 10, (random.integers(2, 5), 2))]
            pen.line(points, fill=int(random.integers(80, 256)), width=int(random.integers(1, 8)))
    image = np.asarray(paper, dtype=float)
    image = 255 - image if random.random() < 0.5 else image
    return gaussian_filter(image, random.uniform(0.2, 1.5)) + random.uniform(0, 15) * random.normal(size=SHAPE)


def stripes(random: Random, cells: np.ndarray) -> np.ndarray:
    """Stripes or checks, soft or sharp."""
    row, column = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE]
    tilt, periods = random.uniform(0, np.pi), random.uniform(3, 40, 2)
    image = np.sin(2 * np.pi * (column * np.cos(tilt) + row * np.sin(tilt)) / periods[0])
    if random.random() < 0.5:
        image *= np.sin(2 * np.pi * (row * np.cos(tilt) - column * np.sin(tilt)) / periods[1])
    if random.random() < 0.4:
        image = np.sign(image)
    return image + random.uniform(0, 0.3) * random.normal(size=SHAPE)


def background(random: Random, cells: np.ndarray) -> np.ndarray:
    """A place on the slide with no cell: haze and photon noise."""
    haze = gaussian_filter(random.normal(size=SHAPE), random.uniform(8, 25)) * random.uniform(0, 60)
    return random.poisson(random.uniform(5, 50), SHAPE) + haze


def halves(random: Random, cells: np.ndarray) -> np.ndarray:
    """Two cells, each cut in half, side by side or one above the other."""
    one, other = cells[random.integers(len(cells), size=2)]
    cut = int(random.integers(28, 51))
    image = np.concatenate([one[:, cut:], other[:, :cut]], axis=1)
    return image if random.random() < 0.5 else image.T


def off_centre(random: Random, cells: np.ndarray) -> np.ndarray:
    """Less than half a cell, at the border of the image."""
    cell, shift = cells[random.integers(len(cells))], int(random.integers(34, 60))
    image = np.median(cell[[0, -1]]) + random.uniform(0, 0.03) * random.normal(size=SHAPE)
    image[: IMAGE_SIZE - shift] = cell[shift:]
    return np.rot90(image, random.integers(4))


def inverted(random: Random, cells: np.ndarray) -> np.ndarray:
    """A negative: dark cell on bright ground."""
    return 1 - cells[random.integers(len(cells))]


def out_of_focus(random: Random, cells: np.ndarray) -> np.ndarray:
    """A cell blurred until its pattern is gone."""
    blurred = gaussian_filter(cells[random.integers(len(cells))], random.uniform(3.5, 12))
    return blurred + random.uniform(0, 0.01) * random.normal(size=SHAPE)


def shuffled(random: Random, cells: np.ndarray) -> np.ndarray:
    """A cell cut into tiles and put together at random."""
    side = int(random.choice([3, 6, 13, 26, 39]))  # tiles a side
    tile = IMAGE_SIZE // side
    tiles = cells[random.integers(len(cells))].reshape(side, tile, side, tile).swapaxes(1, 2).reshape(-1, tile, tile)
    return random.permutation(tiles).reshape(side, side, tile, tile).swapaxes(1, 2).reshape(SHAPE)


def scrambled(random: Random, cells: np.ndarray) -> np.ndarray:
    """The spatial frequencies of a cell, without its form."""
    cell = cells[random.integers(len(cells))]
    phase = np.angle(np.fft.fft2(random.normal(size=SHAPE)))
    return np.real(np.fft.ifft2(abs(np.fft.fft2(cell - cell.mean())) * np.exp(1j * phase)))


def too_near(random: Random, cells: np.ndarray) -> np.ndarray:
    """A piece of a nucleus, enlarged to the whole image."""
    side = int(random.integers(12, 30))
    top, left = random.integers(0, IMAGE_SIZE - side, 2)
    piece = cells[random.integers(len(cells))][top : top + side, left : left + side]
    return np.asarray(Image.fromarray(piece).resize(SHAPE, Image.Resampling.BICUBIC))


def too_far(random: Random, cells: np.ndarray) -> np.ndarray:
    """Many cells in one image, each far too small."""
    side = int(random.integers(14, 28))
    count = -(-IMAGE_SIZE // side)
    small = [
        np.asarray(Image.fromarray(cell).resize((side, side), Image.Resampling.BICUBIC)) * random.uniform(0.4, 1)
        for cell in cells[random.integers(len(cells), size=count * count)]
    ]
    mosaic = np.stack(small).reshape(count, count, side, side).swapaxes(1, 2).reshape(count * side, count * side)
    return mosaic[:IMAGE_SIZE, :IMAGE_SIZE]


def other_pattern(stain: str) -> Callable[[Random, np.ndarray], np.ndarray]:
    """Return a draw function for a cell of another pattern than the six; see `hep2.synthetic.OTHER_PATTERNS`."""

    def draw(random: Random, cells: np.ndarray) -> np.ndarray:
        return photograph(OTHER_PATTERNS[stain](_nucleus(random), random), random)

    return draw


def _nucleus(random: Random) -> Nucleus:
    centre = tuple(IMAGE_SIZE / 2 + random.normal(0, 4, 2))
    return draw_nucleus(SHAPE, centre, random.uniform(14, 27), random)


# Draw functions take a generator and cells (cells, 78, 78) float32 in [0, 1], and return one image (78, 78).
NEGATIVES: dict[str, Callable[[Random, np.ndarray], np.ndarray]] = {
    "noise": noise,
    "gradients": gradient,
    "clutter": clutter,
    "writing": writing,
    "stripes": stripes,
    "background": background,
    "two halves of cells": halves,
    "less than half a cell": off_centre,
    "inverted cells": inverted,
    "out-of-focus cells": out_of_focus,
    "shuffled cells": shuffled,
    "scrambled cells": scrambled,
    "pieces of a nucleus": too_near,
    "many small cells": too_far,
    "mitochondria": other_pattern("mitochondria"),
    "few nuclear dots": other_pattern("few nuclear dots"),
    "fibres": other_pattern("fibres"),
    "diffuse cytoplasm": other_pattern("diffuse cytoplasm"),
}
