import numpy as np
import pytest

from hep2.patterns import CLASS_NAMES
from hep2.phantoms import phantom_cell, phantom_files


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
