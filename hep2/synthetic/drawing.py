"""What synthetic cells are drawn with: nuclei and cell bodies, textures and spots, and the microscope's picture."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

Random = np.random.Generator


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


def draw_body(nucleus: Nucleus, random: Random) -> np.ndarray:
    """Draw the flat, angular body of a cell, nucleus included: 0 to 1, brightest round the nucleus."""
    corners, tilt, side = random.choice([1, 1.5, 2]), *random.uniform(0, 2 * np.pi, 2)
    reach = 0.6 * abs(np.cos(corners * (nucleus.angle - tilt))) ** random.uniform(1.5, 5)
    reach = random.uniform(0.2, 0.4) + reach * (1 + 0.5 * np.cos(nucleus.angle - side))
    edge = 1 / (1 + np.exp(-0.8 * (nucleus.depth + nucleus.radius * reach)))
    return edge * (0.4 + 0.6 * np.exp(np.minimum(nucleus.depth, 0) / (0.6 * nucleus.radius)))


def turned(nucleus: Nucleus, tilt: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how far each pixel lies from a nucleus's centre along an axis, and across it."""
    row, column = np.indices(nucleus.depth.shape) - np.array(nucleus.centre)[:, None, None]
    return row * np.cos(tilt) + column * np.sin(tilt), column * np.cos(tilt) - row * np.sin(tilt)


def dome(nucleus: Nucleus, height: float, softness: float) -> np.ndarray:
    """Light a nucleus that is thicker in the middle: 1 - `height` at a rim of `softness` pixels, 1 at the centre."""
    thickness = 1 - height + height * np.clip(nucleus.depth / nucleus.radius, 0, 1)
    return gaussian_filter(nucleus.inside, softness) * thickness


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


def places_round(nucleus: Nucleus, angle: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return places (places, 2), row and column, at angles and distances (places,) from the centre of a nucleus."""
    return np.stack([nucleus.centre[0] + distance * np.sin(angle), nucleus.centre[1] + distance * np.cos(angle)], -1)


def scatter(nucleus: Nucleus, count: int, share: float, random: Random, *, apart: float) -> np.ndarray:
    """Draw up to `count` places (places, 2) within `share` of the nucleus's radius, at least `apart` pixels apart."""
    places = np.empty((0, 2))
    for _ in range(20 * count):
        angle, distance = random.uniform(0, 2 * np.pi), nucleus.radius * share * random.uniform(0, 1) ** 0.5
        place = places_round(nucleus, angle, distance)
        if (np.hypot(*(place - places).T) >= apart).all():
            places = np.concatenate([places, place[None]])
        if len(places) == count:
            break
    return places


def photograph(light: np.ndarray, random: Random, full: float | None = None) -> np.ndarray:
    """Take a picture of light (rows, columns), 0 to about 1: blur, haze, background, noise, then 8 bits.

    The 8 bits reach from the darkest to the brightest pixel; where light of `full` is given, from 0 to that.
    """
    haze = gaussian_filter(light, random.uniform(5, 9))
    image = gaussian_filter(light, random.uniform(0.7, 1.1)) + random.uniform(0.05, 0.2) * haze
    image += random.uniform(0.01, 0.05) * image.max()
    photons = random.uniform(150, 900)  # at the brightest spot
    image = (image / (full or image.max())).clip(0)
    image = random.poisson(image * photons) / photons + random.normal(0, 0.01, light.shape)
    if full is None:
        image = (image - image.min()) / (image.max() - image.min())
    return (255 * image.clip(0, 1)).round().astype(np.uint8)
