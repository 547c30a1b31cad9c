import numpy as np
import pytest

from hep2.data import CellFile, cells_from_files
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET
from hep2.phantoms import OTHER_STAINS, phantom_cell, phantom_field, phantom_files
from hep2.reader import predict
from hep2.weights import load_weights


@pytest.mark.parametrize("pattern", [*CLASS_NAMES, *OTHER_STAINS])
def test_phantom_field_tells_where_its_whole_cells_lie(pattern):
    image, cells = phantom_field(pattern, np.random.default_rng(3), shape=(300, 400), nucleus=40.0)
    assert image.shape == (300, 400)
    assert len(cells) > 5
    for top, left, height, width in (cell.bbox for cell in cells):
        assert top > 0
        assert left > 0
        assert top + height < 300
        assert left + width < 400
        assert 15 < height < 80
    with pytest.raises(ValueError, match="choose one of"):
        phantom_field("striped", np.random.default_rng(0))


@pytest.mark.parametrize("pattern", CLASS_NAMES)
def test_phantom_cell_follows_its_seed(pattern):
    first, same, other = (phantom_cell(pattern, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (78, 78)
    assert first.dtype == np.uint8
    assert first.min() == 0
    assert first.max() == 255
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_phantom_cell_of_an_unknown_pattern_names_the_known():
    with pytest.raises(ValueError, match=r"choose one of .*'Speckled'"):
        phantom_cell("Cytoplasmic", np.random.default_rng(0))


def test_phantom_files_of_a_larger_count_begin_with_those_of_a_smaller():
    few = {name: image for name, image, _ in phantom_files(2, seed=5)}
    many = {name: image for name, image, _ in phantom_files(4, seed=5)}
    assert len(few) == 12
    assert len(many) == 24
    for name, image in few.items():
        np.testing.assert_array_equal(image, many[name])


def test_the_ensemble_trained_on_real_cells_reads_phantoms_as_what_they_are():
    weights = load_weights(names=("cnn", "vit", "ensemble"), with_refusal=False)
    assert weights.configs["ensemble"]["training"]["dataset"] == DEFAULT_DATASET
    cells = cells_from_files((CellFile(*file) for file in phantom_files(200, seed=2026)), source="fresh phantoms")
    verdicts = predict(weights, cells.images).probabilities["ensemble"].argmax(1)
    right = [np.mean(verdicts[cells.labels.numpy() == label] == label) for label in range(len(CLASS_NAMES))]
    assert min(right) >= 0.9, dict(zip(CLASS_NAMES, right, strict=True))
