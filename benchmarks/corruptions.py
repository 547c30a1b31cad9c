"""What becomes of the verdict when the image is spoilt, and of images that are no cells: two tables."""

import io
from collections.abc import Callable, Iterator

import numpy as np
import skimage.data
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, rotate, shift, zoom

from hep2.imaging import ImageError, ImageSource, load_cell, prepare
from hep2.patterns import IMAGE_SIZE
from hep2.reader import predict
from hep2.refusal import NOT_CELLS
from hep2.weights import Weights

Random = np.random.Generator

# Pictures that come with scikit-image: nothing like them is drawn for training the refusal.
PICTURES = {
    "photographs": ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket"),
    "surfaces": ("brick", "grass", "gravel", "moon"),
    "printed text": ("page", "text"),
    "other microscopy and sky": ("cell", "immunohistochemistry", "microaneurysms", "retina", "hubble_deep_field"),
}
PER_KIND = 200


def _resized(image: np.ndarray, factor: float) -> np.ndarray:
    """Scale about the centre, cutting off or mirroring at the border."""
    scaled = zoom(image, factor, order=3, mode="mirror")
    if factor > 1:
        start = (len(scaled) - IMAGE_SIZE) // 2
        return scaled[start : start + IMAGE_SIZE, start : start + IMAGE_SIZE]
    before = (IMAGE_SIZE - len(scaled)) // 2
    return np.pad(scaled, (before, IMAGE_SIZE - len(scaled) - before), mode="symmetric")


def _jpeg(image: np.ndarray, random: Random) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=50)
    return file.getvalue()


# Each takes an 8-bit image (78, 78), as floats from 0 to 255, and gives what is uploaded in its place.
CHANGES: dict[str, Callable[[np.ndarray, Random], ImageSource]] = {
    "as published": lambda image, random: image,
    "turned by any angle": lambda image, random: rotate(image, random.uniform(0, 360), reshape=False, mode="mirror"),
    "shifted by up to 8 pixels": lambda image, random: shift(image, random.integers(-8, 9, 2), order=0, mode="mirror"),
    "scale 0.8": lambda image, random: _resized(image, 0.8),
    "scale 0.9": lambda image, random: _resized(image, 0.9),
    "scale 1.1": lambda image, random: _resized(image, 1.1),
    "scale 1.25": lambda image, random: _resized(image, 1.25),
    "blur, 0.7 pixels": lambda image, random: gaussian_filter(image, 0.7),
    "blur, 1 pixel": lambda image, random: gaussian_filter(image, 1.0),
    "blur, 1.5 pixels": lambda image, random: gaussian_filter(image, 1.5),
    "noise, 2 % of the range": lambda image, random: image + random.normal(0, 5, image.shape),
    "noise, 5 % of the range": lambda image, random: image + random.normal(0, 13, image.shape),
    "gain 0.5": lambda image, random: (image * 0.5).round(),
    "gain 1.5, clipped": lambda image, random: (image * 1.5).clip(0, 255),
    "gamma 0.7": lambda image, random: 255 * (image / 255) ** 0.7,
    "gamma 1.4": lambda image, random: 255 * (image / 255) ** 1.4,
    "JPEG of quality 50": _jpeg,
    "16 bits": lambda image, random: (image * 257).round().astype(np.uint16),
}


def measure_robustness(weights: Weights, images: list[np.ndarray], labels: np.ndarray, seed: int = 0) -> dict:
    """Measure accuracy and refusals on test cells under each of `CHANGES`.

    `images` are the cells as published, (78, 78), 0 to 255; `labels` int (cells,). Returns for each change the
    accuracy of each model and the share of cells refused.

    Raises
    ------
    ValueError
        If the cells are of another size or range.
    """
    for image in images:
        if image.shape != (IMAGE_SIZE, IMAGE_SIZE) or image.min() < 0 or image.max() > 255:
            raise ValueError(
                f"a cell has {image.shape[0]} x {image.shape[1]} pixels from {image.min():g} to {image.max():g}: only "
                f"cells of {IMAGE_SIZE} x {IMAGE_SIZE} pixels and 8 bits can be spoilt as a microscope would"
            )
    table = {}
    for change, apply in CHANGES.items():
        random = np.random.default_rng(seed)
        pixels = np.stack([load_cell(apply(image.astype(np.float64), random)).pixels for image in images])
        answers, refused = predict(weights, torch.from_numpy(pixels))
        right = {name: float((values.argmax(1) == labels).mean()) for name, values in answers.items()}
        table[change] = right | {"refused": float(refused.mean())}
    return table


def measure_refusals(weights: Weights, cells: np.ndarray, seed: int = 0) -> dict:
    """Measure the share refused of each kind of image that is no cell, `PER_KIND` of each.

    `cells` are test cells (cells, 78, 78) in [0, 1], to be spoilt. `drawn` says whether the refusal learned from images
    of that kind, drawn from other cells with other numbers.
    """
    table = {}
    for kind, images in _not_cells(cells, np.random.default_rng((seed, 1))):
        refused = predict(weights, torch.from_numpy(np.stack(images))).refused
        table[kind] = {"images": len(images), "refused": float(refused.mean()), "drawn": kind in NOT_CELLS}
    return table


def _not_cells(cells: np.ndarray, random: Random) -> Iterator[tuple[str, list[np.ndarray]]]:
    for kind, names in PICTURES.items():
        pictures = [getattr(skimage.data, name)() for name in names]
        yield kind, list(_several(lambda pictures=pictures: _crop(pictures, random)))
    for kind, draw in NOT_CELLS.items():
        yield kind, list(_several(lambda draw=draw: draw(random, cells)))


def _several(draw: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
    count = 0
    while count < PER_KIND:
        try:
            yield prepare(np.asarray(draw(), dtype=np.float32))
        except ImageError:  # constant: draw another
            continue
        count += 1


def _crop(pictures: list[np.ndarray], random: Random) -> np.ndarray:
    """Cut a square of any size out of one of the pictures, in one of its channels."""
    picture = pictures[random.integers(len(pictures))].astype(np.float32)
    if picture.ndim == 3:
        picture = picture[..., random.integers(3)]
    side = int(random.integers(40, min(picture.shape) + 1))
    top, left = (int(random.integers(length - side + 1)) for length in picture.shape)
    return picture[top : top + side, left : left + side]


def stress_tables(result: dict) -> str:
    """Set out what `python -m hep2 stress` measured, in Markdown."""
    models = [name for name in next(iter(result["robustness"].values())) if name != "refused"]
    lines = [
        "| change | " + " | ".join(models) + " | points lost, ensemble | refused |",
        "|---" * (len(models) + 3) + "|",
    ]
    base = result["robustness"]["as published"]["ensemble"]
    for change, row in result["robustness"].items():
        figures = " | ".join(f"{row[name]:.4f}" for name in models)
        lines.append(f"| {change} | {figures} | {100 * (base - row['ensemble']):.1f} | {row['refused']:.1%} |")
    lines += ["", "| no cell | images | refused | learned from |", "|---|---|---|---|"]
    for kind, row in result["refusals"].items():
        lines.append(
            f"| {kind} | {row['images']} | {row['refused']:.1%} | {'such drawings' if row['drawn'] else 'none'} |"
        )
    return "\n".join(lines)
