"""The dataset as tensors, its duplicates, and the three protocols that divide it."""

import csv
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from hep2.images import ImageSource, decode, prepare
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET, PROTOCOLS, is_synthetic

if TYPE_CHECKING:
    import datasets

FOLDS = 4
SYNTHETIC_A_CLASS = 100
PUBLISHED_FINGERPRINT = "bb1b8e10df659a5b"  # of all 13,596 cells of the default dataset, wherever a copy lies


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Cell images with their labels, in the order of their names.

    `images` is float32 of shape (cells, 1, 78, 78) in [0, 1], preprocessed; `labels` int64 of shape (cells,);
    `names` the images' own file names; `digests` a hash of each image's pixels as published: equal digests are
    duplicates. `fingerprint` identifies names, labels and pixels together.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    digests: tuple[str, ...]
    source: str
    parts: tuple[str, ...] = ()  # the dataset's own split, if it has one: the part that each cell is in
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        text = "\n".join(map(",".join, zip(self.names, map(str, self.labels.tolist()), self.digests, strict=True)))
        object.__setattr__(self, "fingerprint", hashlib.sha256(text.encode()).hexdigest()[:16])

    def __len__(self) -> int:
        return len(self.names)


class Split(NamedTuple):
    """Positions of the cells of each part, int64 arrays in ascending order."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def load_cells(dataset: str | Path = DEFAULT_DATASET) -> Cells:
    """Load all splits of a Hub dataset or of a local folder in the same layout, or draw ``synthetic[:COUNT]`` cells.

    The published split is not used: its parts share 104 pairs of duplicates.

    Raises
    ------
    FileNotFoundError
        If the dataset is neither on the Hub nor a local folder.
    ValueError
        If its columns or class names are not those of the HEp-2 dataset, or a cell has no label, or an image that
        cannot be read.
    """
    cells = cells_from_files(dataset_files(dataset), source=str(dataset))
    # Where a copy lies says nothing of what it is.
    if cells.fingerprint == PUBLISHED_FINGERPRINT:
        return replace(cells, source=DEFAULT_DATASET)
    # Weights tell what they were trained on, to strangers too: a folder's name, not where it lies.
    local = Path(dataset)
    if is_synthetic(dataset) or not local.exists():
        return cells
    return replace(cells, source=f"folder {local.resolve().name}")


class CellFile(NamedTuple):
    """An image of a dataset as it was published, and the part of the dataset's own split that it is in.

    `class_name` is empty where the dataset gives no label.
    """

    name: str
    image: ImageSource
    class_name: str
    part: str = ""


def dataset_files(dataset: str | Path) -> Iterator[CellFile]:
    """Yield all cells of a dataset as they were published. Takes and raises what `load_cells` does."""
    if is_synthetic(dataset):
        from hep2.synthetic import synthetic_files  # a feature, which stands on the core

        yield from (CellFile(*file) for file in synthetic_files(_synthetic_a_class(dataset)))
        return
    import datasets  # slow to import, and idle when synthetic cells are enough

    names = set()
    for part, rows in _parts(dataset).items():
        if not {"image", "label"} <= set(rows.column_names):
            raise ValueError(f"dataset {str(dataset)!r} has the columns {rows.column_names}; expected image and label")
        if not isinstance(rows.features["label"], datasets.ClassLabel):
            raise ValueError(f"dataset {str(dataset)!r} has labels without names; make the column a ClassLabel")
        classes = rows.features["label"].names
        if sorted(classes) != sorted(CLASS_NAMES):
            raise ValueError(f"dataset {str(dataset)!r} has the classes {classes}; expected {list(CLASS_NAMES)}")
        for number, row in enumerate(rows.cast_column("image", datasets.Image(decode=False))):
            # Parquet files hold the bytes, and may hold no name; a folder of images holds paths.
            image = row["image"] or {"bytes": None, "path": None}
            name = Path(image["path"] or "").name
            # A cell is known by its name: one that has none, or another's, is called by its place.
            if not name or name in names:
                name = f"{part}-{number:06}" + (f"-{name}" if name else "")
            names.add(name)
            # Without a label, which `datasets` writes as -1, a cell can still be read.
            label = -1 if row["label"] is None else row["label"]
            class_name = classes[label] if label >= 0 else ""
            yield CellFile(name, image["bytes"] or image["path"] or b"", class_name, str(part))


def count_cells(dataset: str | Path) -> int:
    """Count the cells of a dataset without looking at them. Takes and raises what `load_cells` does."""
    if is_synthetic(dataset):
        return _synthetic_a_class(dataset) * len(CLASS_NAMES)
    return sum(rows.num_rows for rows in _parts(dataset).values())


def _parts(dataset: str | Path) -> "datasets.DatasetDict":
    import datasets

    try:
        return datasets.load_dataset(str(dataset))
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"dataset {str(dataset)!r} was not found ({error}); give a Hub dataset's OWNER/NAME, a local folder in the "
            "same layout, or 'synthetic'"
        ) from error


def _synthetic_a_class(dataset: str | Path) -> int:
    count = str(dataset).partition(":")[2]
    if count and not count.isdecimal():
        raise ValueError(f"{dataset!r}: give 'synthetic' or 'synthetic:COUNT', a count of cells for each pattern")
    return int(count or SYNTHETIC_A_CLASS)


def cells_from_files(files: Iterable[CellFile], source: str) -> Cells:
    """Build `Cells` from image files in any order.

    Raises
    ------
    ValueError
        If there is none, or one has no label, or an image that cannot be read; the message names it.
    """
    files = sorted(files, key=lambda file: file.name)
    if not files:
        raise ValueError(f"{source}: there are no cells in it")
    images, digests = [], []
    for file in files:
        if file.class_name not in CLASS_NAMES:
            raise ValueError(f"{source}: {file.name} has no label: give it one of {CLASS_NAMES}, or take it out")
        try:
            intensity = decode(file.image).intensity
            images.append(prepare(intensity))
        except ValueError as error:
            raise ValueError(f"{source}: {file.name}: {error}") from error
        digests.append(hashlib.sha256(repr(intensity.shape).encode() + intensity.tobytes()).hexdigest()[:16])
    return Cells(
        images=torch.from_numpy(np.stack(images)),
        labels=torch.tensor([CLASS_NAMES.index(file.class_name) for file in files]),
        names=tuple(file.name for file in files),
        digests=tuple(digests),
        source=source,
        parts=tuple(file.part for file in files),
    )


def split(cells: Cells, protocol: str, seed: int = 0, fold: int = 0) -> Split:
    """Divide the cells into train, validation and test: a pure function of the dataset and the seed.

    - ``deduplicated``: the first of each set of duplicates only, 70:15:15, stratified by class.
    - ``reference``: all cells in one random 70:15:15 split, as in the reference (9,517 / 2,040 / 2,039); duplicates
      fall on both sides, as they did there.
    - ``specimen``: test is one fold of the block table, and no specimen in it is in any other part; a tenth of the
      others' cells, of each specimen, is validation. Only this protocol tells how the models do on a new patient.

    Raises
    ------
    ValueError
        If the protocol or fold is unknown, the dataset is too small to divide, or, for ``specimen``, if the names
        are not the ID numbers of the published dataset.
    """
    labels = cells.labels.numpy()
    if protocol == "specimen":
        return _specimen_split(cells, seed, fold)
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}: choose one of {PROTOCOLS}")
    deduplicated = protocol == "deduplicated"
    kept = unique_cells(cells) if deduplicated else np.arange(len(cells))
    test_size, train_size = round(0.15 * len(kept)), round(0.7 * len(kept))
    try:
        rest, test = train_test_split(
            kept, test_size=test_size, random_state=seed, stratify=labels[kept] if deduplicated else None
        )
        train, validation = train_test_split(
            rest, train_size=train_size, random_state=seed, stratify=labels[rest] if deduplicated else None
        )
    except ValueError as error:
        raise ValueError(f"{len(kept)} cells are too few for the protocol {protocol!r}: {error}") from error
    return Split(np.sort(train), np.sort(validation), np.sort(test))


def unique_cells(cells: Cells) -> np.ndarray:
    """Return the positions of the cells whose pixels no earlier cell has."""
    return np.sort(np.unique(np.array(cells.digests), return_index=True)[1])


class Block(NamedTuple):
    """A run of IDs taken from one specimen (or, where boundaries are weak, from a few), and its fold."""

    name: str
    class_name: str
    first: int
    last: int
    fold: int


@cache
def specimen_blocks() -> tuple[Block, ...]:
    """Read the block table. The contest did not publish which specimen a cell is from; IDs run specimen by specimen
    inside a class, so the blocks were recovered by change-point detection on appearance features."""
    with open(Path(__file__).with_name("specimen_blocks.csv"), newline="") as file:
        return tuple(
            Block(row["block"], row["class"], int(row["first_id"]), int(row["last_id"]), int(row["fold"]))
            for row in csv.DictReader(file)
        )


def blocks_of(cells: Cells) -> np.ndarray:
    """Return the position in `specimen_blocks()` of each cell's block.

    Raises
    ------
    ValueError
        If a name is not an ID of the published dataset, or a cell's class is not its block's.
    """
    blocks = specimen_blocks()
    if not all(Path(name).stem.isdecimal() for name in cells.names):
        raise ValueError(
            f"the protocol 'specimen' needs the IDs of the published dataset as file names (00001.png …), but "
            f"{cells.source!r} has names like {cells.names[0]!r}; use 'deduplicated' or 'reference'"
        )
    ids = np.array([int(Path(name).stem) for name in cells.names])
    position = np.searchsorted([block.last for block in blocks], ids)
    classes = np.array([CLASS_NAMES.index(block.class_name) for block in blocks] + [-1])
    wrong = classes[position] != cells.labels.numpy()
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} cells, {cells.names[wrong.argmax()]} first, have another class than the block table "
            "gives their ID: this is not the published dataset; use 'deduplicated' or 'reference'"
        )
    return position


def _specimen_split(cells: Cells, seed: int, fold: int) -> Split:
    if fold not in range(FOLDS):
        raise ValueError(f"fold {fold} does not exist: choose 0 to {FOLDS - 1}")
    kept, specimens = unique_cells(cells), blocks_of(cells)
    held_out = np.array([block.fold == fold for block in specimen_blocks()])[specimens[kept]]
    train, validation = train_test_split(
        kept[~held_out], test_size=0.1, random_state=seed, stratify=specimens[kept[~held_out]]
    )
    return Split(np.sort(train), np.sort(validation), kept[held_out])


def specimens_of(cells: Cells, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    """Number the specimens of some cells: each cell's number, int64, and each number's class, int64.

    Where the specimens are not known, as for synthetic cells, each class counts as one.
    """
    known = cells.source == DEFAULT_DATASET
    specimens = blocks_of(cells) if known else cells.labels.numpy()
    _, first, number = np.unique(specimens[positions], return_index=True, return_inverse=True)
    return torch.from_numpy(number), cells.labels[positions][torch.from_numpy(first)]
