"""Negatives: images that show no cell of the six patterns, drawn from a seed or made from cells."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

from hep2.images import ImageError, prepare
from hep2.patterns import CLASS_NAMES, IMAGE_SIZE
from hep2.synthetic import OTHER_PATTERNS, expose, reduce_field, synthetic_cell, synthetic_field

Random = np.random.Generator

SHAPE = (IMAGE_SIZE, IMAGE_SIZE)
# Other patterns whose single cells look like ours: few nuclear dots (AC-7) like nucleoli, the others like Speckled or
# Homogeneous. Only a field tells them.
FIELD_ONLY = ("AC-2 ", "AC-7 ", "AC-13 ", "AC-14 ", "AC-26 ")


def draw_negatives(count: int, cells: np.ndarray, random: Random) -> tuple[np.ndarray, list[str]]:
    """Draw `count` images that show no cell of the six patterns, kind after kind of `NEGATIVES`.

    Every second one is shown as a stranger's picture would show it: see `degrade`.

    Parameters
    ----------
    cells
        Cells to make some of them from, (cells, 78, 78), float32 in [0, 1].

    Returns
    -------
    Images (count, 1, 78, 78), float32 in [0, 1], preprocessed as an upload is; and the name of each one's kind.
    """
    images, names, kinds = [], [], list(NEGATIVES.items())
    while len(images) < count:
        name, draw = kinds[len(images) % len(kinds)]
        image = np.asarray(draw(random, cells), dtype=np.float32)
        if random.random() < 0.5:
            # Fewer pixels make dots out of anything: nuclear dots are left what they are.
            image = degrade(image, random, least=0.7 if "nuclear dots" in name else 0.25)
        try:
            images.append(prepare(image))
        except ImageError:  # drawn constant: draw another
            continue
        names.append(name)
    return np.stack(images), names


def degrade(image: np.ndarray, random: Random, least: float = 0.25) -> np.ndarray:
    """Show an image (rows, columns) as a stranger's picture would: blurred, with fewer pixels, every second as JPEG.

    Rows and columns are reduced by a factor between `least` and 1. Every second picture is in weak light: down to a
    twentieth, of few photons and fewer grey values. Returns float32, 0 to 255.
    """
    image = gaussian_filter(image, random.uniform(0, 2 * (1 - least)))
    grey = (255 * (image - image.min()) / max(np.ptp(image), 1e-9)).astype(np.uint8)
    quality = int(random.integers(40, 96)) if random.random() < 0.5 else None
    picture, _ = reduce_field(grey, [], least ** random.random(), quality)
    if random.random() < 0.5:
        picture = expose(picture, random, light=20 ** -random.random(), photons=200 * 20 ** random.random())
    return picture.astype(np.float32)


def noise(random: Random, cells: np.ndarray) -> np.ndarray:
    """From white noise to clouds: a power law in spatial frequency."""
    frequency = np.hypot(np.fft.fftfreq(IMAGE_SIZE)[:, None], np.fft.fftfreq(IMAGE_SIZE))
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(random.normal(size=SHAPE)) * frequency ** -random.uniform(0, 2.5)
    return np.real(np.fft.ifft2(spectrum))


def stripes(random: Random, cells: np.ndarray) -> np.ndarray:
    """Stripes or checks, soft or sharp, up to a light that falls off to one side."""
    row, column = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE]
    tilt, periods = random.uniform(0, np.pi), 3 * 100 ** random.uniform(0, 1, 2)
    image = np.sin(2 * np.pi * (column * np.cos(tilt) + row * np.sin(tilt)) / periods[0] + random.uniform(0, 6))
    if random.random() < 0.5:
        image *= np.sin(2 * np.pi * (row * np.cos(tilt) - column * np.sin(tilt)) / periods[1])
    image = np.sign(image) if random.random() < 0.3 else image
    return image + random.uniform(0, 0.3) * random.normal(size=SHAPE)


def clutter(random: Random, cells: np.ndarray) -> np.ndarray:
    """Shapes that hide each other, the statistics of a photograph (dead leaves, Lee et al. 2001)."""
    paper = Image.new("L", SHAPE)
    pen = ImageDraw.Draw(paper)
    for _ in range(random.integers(5, 80)):
        corners = random.uniform(-10, IMAGE_SIZE + 10, 2) + random.normal(0, 1, (5, 2)) * 3 / random.uniform(0.06, 1)
        if random.random() < 0.5:
            pen.ellipse([*corners.min(axis=0), *corners.max(axis=0)], fill=int(random.integers(256)))
        else:
            pen.polygon([tuple(corner) for corner in corners], fill=int(random.integers(256)))
    return gaussian_filter(np.asarray(paper, float), random.uniform(0.3, 2)) + random.normal(0, 5, SHAPE)


def writing(random: Random, cells: np.ndarray) -> np.ndarray:
    """Lines of letters, or strokes of a pen; dark on light or light on dark."""
    paper = Image.new("L", SHAPE, int(random.integers(0, 60)))
    pen = ImageDraw.Draw(paper)
    if random.random() < 0.5:
        font = ImageFont.load_default(int(random.integers(7, 45)))
        text = "\n".join("".join(map(chr, random.integers(33, 127, 24))) for _ in range(12))
        pen.multiline_text(tuple(random.uniform(-20, 10, 2)), text, fill=int(random.integers(120, 256)), font=font)
    else:
        for _ in range(random.integers(1, 14)):
            points = [tuple(point) for point in random.uniform(-10, IMAGE_SIZE + 10, (random.integers(2, 5), 2))]
            pen.line(points, fill=int(random.integers(80, 256)), width=int(random.integers(1, 8)))
    image = np.asarray(paper, dtype=float) * random.choice([1, -1])
    return gaussian_filter(image, random.uniform(0.2, 1.5)) + random.uniform(0, 15) * random.normal(size=SHAPE)


def background(random: Random, cells: np.ndarray) -> np.ndarray:
    """A place on the slide with no cell: haze and photon noise."""
    haze = gaussian_filter(random.normal(size=SHAPE), random.uniform(8, 25)) * random.uniform(0, 60)
    return random.poisson(random.uniform(5, 50), SHAPE) + haze


def halves(random: Random, cells: np.ndarray) -> np.ndarray:
    """Two cells, each cut in half, side by side or one above the other."""
    one, other = random.choice(cells, 2)
    cut = int(random.integers(28, 51))
    image = np.concatenate([one[:, cut:], other[:, :cut]], axis=1)
    return image if random.random() < 0.5 else image.T


def off_centre(random: Random, cells: np.ndarray) -> np.ndarray:
    """Less than half a cell, at the border of the image."""
    cell, shift = random.choice(cells), int(random.integers(34, 60))
    image = np.median(cell[[0, -1]]) + random.uniform(0, 0.03) * random.normal(size=SHAPE)
    image[: IMAGE_SIZE - shift] = cell[shift:]
    return np.rot90(image, random.integers(4))


def out_of_focus(random: Random, cells: np.ndarray) -> np.ndarray:
    """A cell blurred until its pattern is gone."""
    blurred = gaussian_filter(random.choice(cells), random.uniform(3.5, 12))
    return blurred + random.uniform(0, 0.01) * random.normal(size=SHAPE)


def shuffled(random: Random, cells: np.ndarray) -> np.ndarray:
    """A cell cut into tiles and put together at random."""
    side = int(random.choice([3, 6, 13, 26, 39]))  # tiles a side
    tile = IMAGE_SIZE // side
    tiles = random.choice(cells).reshape(side, tile, side, tile).swapaxes(1, 2).reshape(-1, tile, tile)
    return random.permutation(tiles).reshape(side, side, tile, tile).swapaxes(1, 2).reshape(SHAPE)


def too_near(random: Random, cells: np.ndarray) -> np.ndarray:
    """A piece of a nucleus, enlarged to the whole image when it is prepared."""
    side = int(random.integers(12, 30))
    top, left = random.integers(0, IMAGE_SIZE - side, 2)
    return random.choice(cells)[top : top + side, left : left + side]


def too_far(random: Random, cells: np.ndarray) -> np.ndarray:
    """Many cells in one image, each far too small once it is prepared: 3 to 17 a row, with gaps, the rows shifted."""
    count, crowded = int(3 * 6 ** random.random()), random.uniform(0.4, 1)
    kinds = random.choice(cells, random.integers(2, 30))
    rows = []
    for _ in range(count):
        row = random.uniform(0.4, 1, (count, 1, 1)) * random.choice(kinds, count)
        row[random.random(count) > crowded] = 0
        rows.append(np.roll(np.hstack(row), random.integers(IMAGE_SIZE), axis=1))
    return np.vstack(rows)


def slide_field(pattern: str, random: Random) -> np.ndarray:
    """A drawn slide field, whose nuclei have 3 to 9 pixels once it is prepared."""
    shape, nucleus, density = (300, random.choice([300, 400])), random.uniform(18, 45), random.uniform(0.15, 0.9)
    return synthetic_field(pattern, random, shape=shape, nucleus=nucleus, density=density)[0]


# Draw functions take a generator and cells (cells, 78, 78) float32 in [0, 1], and return one image.
NEGATIVES: dict[str, Callable[[Random, np.ndarray], np.ndarray]] = (
    {
        "noise": noise,
        "stripes": stripes,
        "clutter": clutter,
        "writing": writing,
        "background": background,
        "two halves of cells": halves,
        "less than half a cell": off_centre,
        "inverted cells": lambda random, cells: -random.choice(cells),
        "out-of-focus cells": out_of_focus,
        "shuffled cells": shuffled,
        "pieces of a nucleus": too_near,
        "many small cells": too_far,
    }
    | {f"field of {name}": lambda random, cells, pattern=name: slide_field(pattern, random) for name in CLASS_NAMES}
    | {
        name: lambda random, cells, pattern=name: synthetic_cell(pattern, random)
        for name in OTHER_PATTERNS
        if not name.startswith(FIELD_ONLY)
    }
)
