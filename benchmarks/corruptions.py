"""Corruption robustness: accuracy and rejection under changes of the image, and rejection of what shows no cell.

    python -m benchmarks.corruptions --dataset … [--weights …] [--json]

Changes the published 8-bit cells of the weights' own test part as a microscope, a camera or a file format would, and
has each classified as an upload is. Negatives are pictures that come with scikit-image, of which nothing was learned,
and those of `hep2.rejection.negatives`, drawn anew from test cells. Some eight minutes of two cores for 2,010 cells.
"""

import io
import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import skimage.data
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, rotate, shift, zoom

import hep2
from benchmarks.common import make_parser, own_split, table
from hep2.data import dataset_files, load_cells
from hep2.images import ImageError, ImageSource, decode, load_cell, prepare
from hep2.patterns import IMAGE_SIZE, MODEL_TITLES
from hep2.rejection.negatives import NEGATIVES, draw_negatives

Random = np.random.Generator

PICTURES = {
    "photographs": ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket"),
    "surfaces": ("brick", "grass", "gravel", "moon"),
    "printed text": ("page", "text"),
    "other microscopy and sky": ("cell", "immunohistochemistry", "microaneurysms", "retina", "hubble_deep_field"),
}
PER_KIND = 200


def _scaled(image: np.ndarray, factor: float) -> np.ndarray:
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
CORRUPTIONS: dict[str, Callable[[np.ndarray, Random], ImageSource]] = {
    "as published": lambda image, random: image,
    "turned by any angle": lambda image, random: rotate(image, random.uniform(0, 360), reshape=False, mode="mirror"),
    "shifted by up to 8 pixels": lambda image, random: shift(image, random.integers(-8, 9, 2), order=0, mode="mirror"),
    "scale 0.8": lambda image, random: _scaled(image, 0.8),
    "scale 0.9": lambda image, random: _scaled(image, 0.9),
    "scale 1.1": lambda image, random: _scaled(image, 1.1),
    "scale 1.25": lambda image, random: _scaled(image, 1.25),
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


def main(argv: list[str] | None = None) -> int:
    """Measure, and print tables in Markdown or a JSON object; returns the exit status."""
    parser = make_parser(__doc__, weights=True, dataset=True)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    arguments = parser.parse_args(argv)
    predictor, cells = hep2.load(arguments.weights), load_cells(arguments.dataset)
    test = own_split(predictor.weights, cells).test
    labels = {cells.names[position]: int(cells.labels[position]) for position in test}
    files = [file for file in dataset_files(arguments.dataset) if file.name in labels]
    images = [decode(file.image).intensity for file in files]
    result = {
        "corruptions": measure_corruptions(predictor, images, np.array([labels[file.name] for file in files])),
        "negatives": measure_negatives(predictor, cells.images[test, 0].numpy()),
    }
    print(json.dumps(result) if arguments.json else tables(result))
    return 0


def measure_corruptions(predictor: hep2.Predictor, images: list[np.ndarray], labels: np.ndarray, seed: int = 0) -> dict:
    """Measure accuracy of each model, and the share of rejected cells, under each of `CORRUPTIONS`.

    Parameters
    ----------
    images
        The cells as published, (78, 78), 0 to 255.
    labels
        Of shape (cells,).

    Raises
    ------
    ValueError
        If a cell is of another size or range.
    """
    for image in images:
        if image.shape != (IMAGE_SIZE, IMAGE_SIZE) or image.min() < 0 or image.max() > 255:
            raise ValueError(
                f"a cell has {image.shape[0]} x {image.shape[1]} pixels from {image.min():g} to {image.max():g}: only "
                f"cells of {IMAGE_SIZE} x {IMAGE_SIZE} pixels and 8 bits can be corrupted as a microscope would"
            )
    result = {}
    for name, corrupt in CORRUPTIONS.items():
        random = np.random.default_rng(seed)
        pixels = np.stack([load_cell(corrupt(image.astype(np.float64), random)).pixels for image in images])
        answers = predictor(torch.from_numpy(pixels))
        right = {model: float((values.argmax(1) == labels).mean()) for model, values in answers.probabilities.items()}
        result[name] = right | {"rejected": float(answers.rejected.mean())}
    return result


def measure_negatives(predictor: hep2.Predictor, cells: np.ndarray, seed: int = 0, each: int = PER_KIND) -> dict:
    """Measure the share rejected of `each` images of every kind that shows no cell.

    `cells` are test cells (cells, 78, 78) in [0, 1], to draw some of them from. `learned` says whether the rejection
    was fitted on images of that kind, drawn from other cells with another seed.
    """
    drawn, kinds = draw_negatives(each * len(NEGATIVES), cells, np.random.default_rng((seed, 1)))
    images = {kind: drawn[np.array(kinds) == kind] for kind in NEGATIVES}
    images = {kind: draw_pictures(kind, each, seed) for kind in PICTURES} | images
    shares = {kind: float(predictor(torch.from_numpy(several)).rejected.mean()) for kind, several in images.items()}
    return {
        kind: {"images": len(images[kind]), "rejected": share, "learned": kind in NEGATIVES}
        for kind, share in shares.items()
    }


def draw_pictures(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Cut squares of any size out of the pictures of a kind: (count, 1, 78, 78), prepared as an upload is."""
    pictures = [np.asarray(getattr(skimage.data, name)(), dtype=np.float32) for name in PICTURES[kind]]
    return np.stack(list(islice(_crops(pictures, np.random.default_rng(seed)), count)))


def _crops(pictures: list[np.ndarray], random: Random) -> Iterator[np.ndarray]:
    while True:
        picture = pictures[random.integers(len(pictures))]
        picture = picture if picture.ndim == 2 else picture[..., random.integers(3)]
        side = int(random.integers(40, min(picture.shape) + 1))
        top, left = (int(random.integers(length - side + 1)) for length in picture.shape)
        try:
            yield prepare(picture[top : top + side, left : left + side])
        except ImageError:  # constant
            continue


def tables(result: dict) -> str:
    """Set out corruptions and negatives in Markdown."""
    base = result["corruptions"]["as published"]["ensemble"]
    corruptions = table(
        ["change", *MODEL_TITLES.values(), "points lost, ensemble", "rejected"],
        [
            [name, *(row[model] for model in MODEL_TITLES), f"{100 * (base - row['ensemble']):.1f}", row["rejected"]]
            for name, row in result["corruptions"].items()
        ],
    )
    negatives = table(
        ["negatives", "images", "rejected", "learned from such"],
        [
            [kind, row["images"], row["rejected"], "yes" if row["learned"] else "no"]
            for kind, row in result["negatives"].items()
        ],
    )
    return f"{corruptions}\n\n{negatives}"


if __name__ == "__main__":
    sys.exit(main())
