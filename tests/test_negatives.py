import numpy as np
import pytest

from hep2.rejection.negatives import NEGATIVES, degrade, draw_negatives
from hep2.synthetic import synthetic_files


@pytest.fixture(scope="module")
def cells() -> np.ndarray:
    return np.stack([image for _, image, _ in synthetic_files(2)]).astype(np.float32) / 255


def test_draw_negatives_gives_every_kind_as_an_upload_would_be_prepared(cells):
    images, names = draw_negatives(2 * len(NEGATIVES), cells, np.random.default_rng(0))
    assert images.shape == (2 * len(NEGATIVES), 1, 78, 78)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == 1
    assert names == 2 * list(NEGATIVES)
    again, _ = draw_negatives(2 * len(NEGATIVES), cells, np.random.default_rng(0))
    np.testing.assert_array_equal(images, again)


def test_draw_negatives_leaves_out_patterns_that_only_a_field_tells(cells):
    assert {"AC-2 dense fine speckled", "AC-13 PCNA-like", "AC-26 NuMA-like"}.isdisjoint(NEGATIVES)
    assert {"AC-6 multiple nuclear dots", "AC-21 mitochondrial", "writing"} <= set(NEGATIVES)


def test_draw_negatives_leaves_the_cells_as_they_are(cells):
    before = cells.copy()
    draw_negatives(3 * len(NEGATIVES), cells, np.random.default_rng(1))
    np.testing.assert_array_equal(cells, before)


def test_degrade_keeps_to_its_least_factor(cells):
    random = np.random.default_rng(0)
    sides = [degrade(cells[0], random, least=0.4).shape[0] for _ in range(40)]
    assert 31 <= min(sides) < 45
    assert 65 < max(sides) <= 78
    whole = degrade(cells[0], random, least=1)
    assert whole.shape == (78, 78)
    assert whole.dtype == np.float32
    assert degrade(np.zeros((20, 30)), random).max() < 15  # a constant image stays one, but for JPEG and noise
