import shutil

import numpy as np
import pytest
import torch

from hep2.patterns import CLASS_NAMES
from hep2.phantoms import phantom_cell
from hep2.reader import Failure, Reader, Reading, predict
from hep2.refusal import NOT_CELLS, draw_not_cells, fit_refusal
from hep2.weights import load_weights


def simple_features(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(images, 13).flatten(1)  # 36 means


def test_draw_not_cells_gives_every_kind_as_an_upload_would_be_prepared(phantoms):
    cells = phantoms.images[:, 0].numpy()
    images, kinds = draw_not_cells(2 * len(NOT_CELLS), cells, np.random.default_rng(0))
    assert images.shape == (2 * len(NOT_CELLS), 1, 78, 78)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == 1
    assert kinds == 2 * list(NOT_CELLS)
    again, _ = draw_not_cells(2 * len(NOT_CELLS), cells, np.random.default_rng(0))
    np.testing.assert_array_equal(images, again)


def test_fit_refusal_refuses_what_is_no_cell_and_few_validation_cells(phantoms):
    order = torch.randperm(len(phantoms), generator=torch.Generator().manual_seed(0))
    train, validation = phantoms.images[order[:40]], phantoms.images[order[40:]]
    labels = phantoms.labels[order[:40]]
    refusal = fit_refusal(("cnn",), lambda images: [simple_features(images)], train, labels, validation, seed=0)
    with torch.no_grad():
        cells = refusal(simple_features(validation)) < refusal.threshold
        others, _ = draw_not_cells(140, train[:, 0].numpy(), np.random.default_rng(1))
        refused = refusal(simple_features(torch.from_numpy(others))) < refusal.threshold
    assert cells.sum() == 1  # of 32: the lowest lies below any low quantile
    assert refused.float().mean() > 0.6


@pytest.fixture(scope="module")
def bundled() -> Reader:
    return Reader(load_weights())


@pytest.mark.parametrize("pattern", CLASS_NAMES)
def test_bundled_weights_read_phantoms(bundled, pattern):
    random = np.random.default_rng(5)
    readings = list(bundled.read((str(n), phantom_cell(pattern, random)) for n in range(25)))
    assert sum(reading.refused for reading in readings) <= 3


def test_bundled_weights_refuse_what_is_no_cell(bundled):
    cells = np.stack([phantom_cell(p, np.random.default_rng(n)) for p in CLASS_NAMES for n in range(4)]) / 255
    random = np.random.default_rng(3)
    refused = {}
    for kind, draw in NOT_CELLS.items():
        answers = list(bundled.read((kind, draw(random, cells.astype(np.float32))) for _ in range(20)))
        # A constant image is a failure, which is no verdict either.
        refused[kind] = sum(isinstance(answer, Failure) or answer.refused for answer in answers)
        without = next(answer.as_dict() for answer in answers if isinstance(answer, Reading) and answer.refused)
        assert without["verdict"] is None
        assert without["probability"] is None
        assert without["warnings"][0].startswith("refused: ")
    assert sum(refused.values()) >= 0.95 * 20 * len(refused), refused
    assert min(refused.values()) >= 10, refused


def test_predict_refuses_nothing_without_a_refusal(untrained, tmp_path):
    folder = shutil.copytree(untrained, tmp_path / "weights")
    shutil.rmtree(folder / "refusal")
    weights = load_weights(folder)
    assert weights.refusal is None
    assert "every image a verdict" in weights.notes[0]
    assert not predict(weights, torch.rand(3, 1, 78, 78)).refused.any()
