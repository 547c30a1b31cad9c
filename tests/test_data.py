import dataclasses
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hep2.data import (
    FOLDS,
    CellFile,
    Cells,
    blocks_of,
    cells_from_files,
    count_cells,
    dataset_files,
    load_cells,
    specimen_blocks,
    specimens_of,
    split,
    unique_cells,
)
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET
from hep2.synthetic import synthetic_files

PUBLISHED = 13_596  # cells


def published_like(duplicates: int = 0, source: str = "made up") -> Cells:
    """Cells with the published dataset's IDs and labels but without its images; the last ones repeat the first."""
    blocks = specimen_blocks()
    labels = [CLASS_NAMES.index(block.class_name) for block in blocks for _ in range(block.first, block.last + 1)]
    digests = [str(number) for number in range(len(labels))]
    if duplicates:
        digests[-duplicates:] = digests[-2 * duplicates : -duplicates]
    return Cells(
        images=torch.zeros(len(labels), 1, 1, 1),
        labels=torch.tensor(labels),
        names=tuple(f"{number:05d}.png" for number in range(1, len(labels) + 1)),
        digests=tuple(digests),
        source=source,
    )


@pytest.mark.parametrize("protocol", ["reference", "deduplicated", "specimen"])
def test_split_parts_are_disjoint_and_depend_on_the_seed_alone(protocol):
    cells = published_like(duplicates=100)
    first, again, other = (split(cells, protocol, seed) for seed in (1, 1, 2))
    for part, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(part, same)
    assert not np.array_equal(first.train, other.train)
    together = np.concatenate(first)
    assert len(np.unique(together)) == len(together) == PUBLISHED - (0 if protocol == "reference" else 100)


def test_split_reference_has_the_sizes_of_the_reference():
    assert [len(part) for part in split(published_like(), "reference")] == [9517, 2040, 2039]


def test_split_deduplicated_is_stratified_and_without_duplicates():
    cells = published_like(duplicates=100)
    parts = split(cells, "deduplicated", 3)
    share = cells.labels[unique_cells(cells)].bincount() / (PUBLISHED - 100)
    for part, size in zip(parts, (0.7, 0.15, 0.15), strict=True):
        assert len(part) == pytest.approx(size * (PUBLISHED - 100), abs=1)
        assert (cells.labels[part].bincount() / len(part) - share).abs().max() < 0.001
    assert len({cells.digests[i] for i in np.concatenate(parts)}) == PUBLISHED - 100


def test_split_specimen_shows_no_specimen_of_a_fold_elsewhere_and_tests_each_cell_once():
    cells = published_like(duplicates=50)
    block_of = blocks_of(cells)
    tested = []
    for fold in range(FOLDS):
        parts = split(cells, "specimen", 0, fold)
        train, validation, test = (set(block_of[part]) for part in parts)
        assert not (train | validation) & test
        assert validation == train  # a tenth of each
        assert len(parts.validation) == pytest.approx(len(parts.train) / 9, abs=1)
        for part in parts:
            assert set(cells.labels[part].tolist()) == set(range(6))
        tested.append(parts.test)
    np.testing.assert_array_equal(np.sort(np.concatenate(tested)), unique_cells(cells))


def test_split_specimen_needs_the_published_ids(synthetic_cells):
    with pytest.raises(ValueError, match="IDs of the published dataset"):
        split(synthetic_cells, "specimen")
    cells = published_like()
    with pytest.raises(ValueError, match="another class than the block table"):
        split(dataclasses.replace(cells, labels=cells.labels.flip(0)), "specimen")
    with pytest.raises(ValueError, match="fold 4"):
        split(cells, "specimen", fold=4)


def test_split_of_an_unknown_protocol_or_too_few_cells_says_so(synthetic_cells):
    with pytest.raises(ValueError, match="unknown protocol 'random'"):
        split(synthetic_cells, "random")
    with pytest.raises(ValueError, match="12 cells are too few for the protocol 'deduplicated'"):
        split(load_cells("synthetic:2"), "deduplicated")


def test_specimen_blocks_cover_the_dataset_without_gap():
    blocks = specimen_blocks()
    assert len(blocks) == 73
    assert [block.first for block in blocks] == [1, *(block.last + 1 for block in blocks[:-1])]
    assert blocks[-1].last == PUBLISHED
    for fold in range(FOLDS):
        assert sum(block.class_name == "Golgi" and block.fold == fold for block in blocks) == 1


def test_specimens_of_numbers_the_specimens_of_some_cells_or_else_the_classes(synthetic_cells):
    cells = published_like(source=DEFAULT_DATASET)
    train = split(cells, "specimen", 0, 2).train
    specimens, class_of_specimen = specimens_of(cells, train)
    assert torch.equal(class_of_specimen[specimens], cells.labels[train])
    assert len(class_of_specimen) == len(set(blocks_of(cells)[train])) == int(specimens.max()) + 1 < 73
    positions = np.array([5, 30, 70])
    specimens, class_of_specimen = specimens_of(synthetic_cells, positions)
    assert specimens.tolist() == [0, 1, 2]
    assert class_of_specimen.tolist() == synthetic_cells.labels[positions].tolist()


def test_load_cells_draws_synthetic_cells_in_order_of_name(synthetic_cells):
    assert synthetic_cells.images.shape == (72, 1, 78, 78)
    assert synthetic_cells.images.dtype == torch.float32
    assert list(synthetic_cells.names) == sorted(synthetic_cells.names)
    assert synthetic_cells.labels.bincount().tolist() == [12] * 6
    assert synthetic_cells.fingerprint == load_cells("synthetic:12").fingerprint
    assert synthetic_cells.fingerprint != load_cells("synthetic:11").fingerprint
    with pytest.raises(ValueError, match="synthetic:COUNT"):
        load_cells("synthetic:many")


def test_cells_from_files_names_the_image_that_cannot_be_read():
    name, image, pattern = next(synthetic_files(1))
    good = CellFile(name, image, pattern)
    with pytest.raises(ValueError, match=r"folder: zz\.png: "):
        cells_from_files([CellFile("zz.png", b"not an image", pattern), good], "folder")
    with pytest.raises(ValueError, match="there are no cells in it"):
        cells_from_files([], "folder")


def test_a_duplicate_is_known_by_its_pixels():
    files = [CellFile(name, image, pattern) for name, image, pattern in synthetic_files(1)]
    cells = cells_from_files([*files, CellFile("zz.png", files[2].image.copy(), files[2].class_name)], "folder")
    assert unique_cells(cells).tolist() == list(range(6))


def local_dataset(folder, names=CLASS_NAMES, column="image"):
    """Write synthetic cells in the layout of the published dataset."""
    rows = {column: [], "label": []}
    for number, (_, image, pattern) in enumerate(synthetic_files(2)):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        path = folder / "images" / f"{number + 1:05d}.png"
        Image.fromarray(image).save(path)
        rows[column].append(str(path))
        rows["label"].append(list(CLASS_NAMES).index(pattern))
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    table = datasets.Dataset.from_dict(rows, features=features)
    (folder / "data").mkdir()
    for part, positions in (("train", range(4, 12)), ("validation", range(2, 4)), ("test", range(2))):
        table.select(positions).to_parquet(folder / "data" / f"{part}-00000-of-00001.parquet")
    return folder


def test_load_cells_reads_a_local_folder_in_the_layout_of_the_hub(tmp_path):
    cells = load_cells(local_dataset(tmp_path / "local"))
    expected = load_cells("synthetic:2")
    torch.testing.assert_close(cells.images, expected.images)
    assert cells.labels.tolist() == expected.labels.tolist()
    assert cells.names == tuple(f"{number:05d}.png" for number in range(1, 13))


def test_load_cells_rejects_other_classes_and_columns(tmp_path):
    with pytest.raises(ValueError, match="has the classes"):
        load_cells(local_dataset(tmp_path / "a", names=("a", "b", "c", "d", "e", "f")))
    with pytest.raises(ValueError, match="has the columns"):
        load_cells(local_dataset(tmp_path / "b", column="picture"))


def test_dataset_files_names_every_cell_once_and_counts_them(tmp_path):
    folder = local_dataset(tmp_path / "whole")
    assert count_cells(folder) == count_cells("synthetic:2") == 12
    # One image came without a name, and two parts share one.
    for part in ("train", "test"):
        path = next((folder / "data").glob(f"{part}-*"))
        rows = datasets.Dataset.from_parquet(str(path)).cast_column("image", datasets.Image(decode=False)).to_list()
        for number, row in enumerate(rows):
            name = None if part == "train" and number == 0 else f"{number}.png"
            row["image"] = {"bytes": Path(row["image"]["path"]).read_bytes(), "path": name}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))})
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    names = [file.name for file in dataset_files(folder)]
    assert len(set(names)) == len(names) == 12
    assert {"train-000000", "1.png", "test-000001-1.png"} <= set(names)


def test_a_cell_without_a_label_can_be_read_but_not_learned_from(tmp_path):
    folder = local_dataset(tmp_path / "whole")
    path = next((folder / "data").glob("test-*"))
    rows = datasets.Dataset.from_parquet(str(path)).cast_column("image", datasets.Image(decode=False)).to_list()
    rows[0]["label"], rows[1]["label"] = -1, None
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    assert [file.class_name for file in dataset_files(folder)].count("") == 2
    with pytest.raises(ValueError, match="has no label: give it one of"):
        load_cells(folder)


def test_load_cells_wants_labels_with_names(tmp_path):
    rows = {"image": [np.zeros((8, 8), np.uint8)], "label": [0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="labels without names; make the column a ClassLabel"):
        load_cells(tmp_path)


def test_load_cells_of_a_missing_folder_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a Hub dataset's OWNER/NAME"):
        load_cells(tmp_path / "missing")
