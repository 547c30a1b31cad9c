"""Synthetic HEp-2 cells, made from nothing but a seed: for the examples, the tests and runs without the dataset.

A cell is drawn as a microscope would see it: a nucleus of an uneven oval shape, the antigen's place in it or round it,
neighbours at the border, the blur of the optics, the haze of what is out of focus, the noise of photons and of the
camera, and the stretch to 8 bits that the published cells have too.
"""

from collections.abc import Iterator

import numpy as np

from hep2.patterns import CLASS_NAMES, IMAGE_SIZE
from hep2.synthetic.drawing import Random, draw_nucleus, photograph
from hep2.synthetic.stains import OTHER_PATTERNS, STAINS, Stain, draw_mitosis


def stain_of(pattern: str) -> Stain:
    """Return how a pattern is drawn; raise ValueError if it is unknown."""
    stain = (STAINS | OTHER_PATTERNS).get(pattern)
    if stain is None:
        raise ValueError(f"unknown pattern {pattern!r}: choose one of {(*CLASS_NAMES, *OTHER_PATTERNS)}")
    return stain


def synthetic_cell(pattern: str, random: Random) -> np.ndarray:
    """Draw one cell of one of the six patterns or of `OTHER_PATTERNS`.

    Returns uint8 of shape (78, 78), stretched to 0–255 but for hardly stained cells. Of the other patterns nuclei are
    smaller, since whole cells are cut out where the cytoplasm is stained. Of the mitotic ones every second cell is in
    mitosis.

    Raises
    ------
    ValueError
        If the pattern is unknown.
    """
    stain, shape, middle = stain_of(pattern), (IMAGE_SIZE, IMAGE_SIZE), IMAGE_SIZE / 2
    radius = random.uniform(25, 30) if pattern in STAINS else random.uniform(16, 28)
    centre = (middle + random.normal(0, 1.5), middle + random.normal(0, 1.5))
    nucleus = draw_nucleus(shape, centre, radius, random)
    if stain.mitoses > 0.05 and random.random() < 0.5:
        light = draw_mitosis(nucleus, random.uniform(0, np.pi), stain, random)
    else:
        light = stain.draw(nucleus, random, random)
    for _ in range(random.choice(3, p=[0.45, 0.4, 0.15])):
        direction, distance = random.uniform(0, 2 * np.pi), radius * random.uniform(2.15, 2.5)
        place = (centre[0] + distance * np.sin(direction), centre[1] + distance * np.cos(direction))
        neighbour = draw_nucleus(shape, place, radius * random.uniform(0.85, 1.05), random)
        light = np.maximum(light, random.uniform(0.6, 1.1) * stain.draw(neighbour, random, random))
    return photograph(light, random, stain.full)


def synthetic_files(count: int, seed: int = 0) -> Iterator[tuple[str, np.ndarray, str]]:
    """Yield (file name, image, class name) for `count` cells of each of the six patterns, fixed by the seed."""
    for position, pattern in enumerate(CLASS_NAMES):
        for number in range(count):
            # A generator for each cell: asking for more cells leaves the first ones as they were.
            random = np.random.default_rng((seed, position, number))
            yield f"{pattern}-{number + 1:05d}.png", synthetic_cell(pattern, random), pattern
