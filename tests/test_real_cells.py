"""On the published cells themselves, where HEP2_DATASET names a local copy; skipped elsewhere."""

import hashlib

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from benchmarks.common import own_split
from benchmarks.dataset import audit
from hep2.data import blocks_of, specimens_of, split, unique_cells
from hep2.evaluation import metrics
from hep2.images import LEAST_DETAIL, fine_detail
from hep2.patterns import CELLS_IN_DATASET, CLASS_NAMES, DEFAULT_DATASET

DUPLICATES = 194


def contents(cells, positions) -> set[str]:
    """Hash the cells' pixels here, rather than trust the digests that the splits are made from."""
    return {hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in cells.images[positions]}


def test_dataset_is_the_published_one_with_its_duplicates(real_cells):
    assert len(real_cells) == CELLS_IN_DATASET
    assert real_cells.source == DEFAULT_DATASET
    assert real_cells.labels.bincount().tolist() == [2741, 724, 2494, 2208, 2598, 2831]
    repeated = sorted(set(range(CELLS_IN_DATASET)) - set(unique_cells(real_cells)))
    assert [real_cells.names[position] for position in repeated] == [f"{number}.png" for number in range(11199, 11393)]


def test_audit_finds_the_duplicates_and_those_across_the_published_split(real_cells):
    result = audit(real_cells)
    assert (result["duplicates"], result["duplicates_across_parts"]) == (DUPLICATES, 104)
    assert result["parts"] == {"train": 8701, "validation": 2175, "test": 2720}
    assert result["duplicates_of_another_class"] == 0


@pytest.mark.parametrize(("protocol", "folds"), [("deduplicated", [0]), ("specimen", [0, 1, 2, 3])])
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_share_no_pixel_content(protocol, folds, seed, real_cells):
    for fold in folds:
        parts = split(real_cells, protocol, seed, fold)
        hashes = [contents(real_cells, part) for part in parts]
        assert not (hashes[0] & hashes[1] or hashes[0] & hashes[2] or hashes[1] & hashes[2])
        assert [len(h) for h in hashes] == [len(part) for part in parts]
        assert sum(map(len, parts)) == CELLS_IN_DATASET - DUPLICATES


def test_folds_share_no_specimen(real_cells):
    specimens = blocks_of(real_cells)
    tested = []
    for fold in range(4):
        train, validation, test = (set(specimens[part]) for part in split(real_cells, "specimen", 0, fold))
        assert validation == train
        assert not test & train
        tested += sorted(test)
    assert sorted(tested) == list(range(73))


def test_specimens_of_the_training_cells_are_their_blocks(real_cells):
    train = split(real_cells, "specimen", 0, 2).train
    specimens, class_of = specimens_of(real_cells, train)
    assert torch.equal(class_of[specimens], real_cells.labels[train])
    assert len(class_of) == len(set(blocks_of(real_cells)[train])) == int(specimens.max()) + 1 < 73


def test_blur_of_a_pixel_is_told_and_hardly_a_published_cell_is_called_blurred(real_cells):
    cells = real_cells.images[split(real_cells, "deduplicated", 0).validation].numpy()
    blurred = gaussian_filter(cells, (0, 0, 1, 1))
    assert 0 < np.mean([fine_detail(cell) < LEAST_DETAIL for cell in cells]) < 0.005
    assert np.mean([fine_detail(cell) < LEAST_DETAIL for cell in blurred]) > 0.97


@pytest.mark.slow
def test_bundled_weights_answer_test_cells_as_their_metrics_say(real_cells, bundled):
    weights = bundled.weights
    assert weights.training["dataset_fingerprint"] == real_cells.fingerprint
    test = own_split(weights, real_cells).test
    labels = real_cells.labels[test].numpy()
    for name, answers in bundled(real_cells.images[test]).probabilities.items():
        recorded, measured = weights.metrics["models"][name], metrics(answers, labels)
        # Another processor may turn a verdict on the edge, one in 2,000 cells.
        assert measured["accuracy"] == pytest.approx(recorded["accuracy"], abs=0.001)
        assert np.abs(np.array(measured["confusion"]) - recorded["confusion"]).sum() <= 4
        assert measured["ece"] == pytest.approx(recorded["ece"], abs=0.002)
        assert list(measured["per_class"]) == list(CLASS_NAMES)
