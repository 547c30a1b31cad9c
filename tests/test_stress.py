import numpy as np
import pytest

import hep2.stress
from hep2.phantoms import phantom_files
from hep2.stress import CHANGES, PICTURES, measure_refusals, measure_robustness, stress_tables
from hep2.weights import load_weights


@pytest.fixture(scope="module")
def result() -> dict:
    weights = load_weights()
    cells = [(image, label) for _, image, label in phantom_files(2, seed=4)]
    images, labels = [image for image, _ in cells], np.repeat(np.arange(6), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hep2.stress, "PER_KIND", 4)
        return {
            "robustness": measure_robustness(weights, images, labels),
            "refusals": measure_refusals(weights, np.stack(images).astype(np.float32) / 255),
        }


def test_every_change_is_measured_and_deeper_files_change_nothing(result):
    table = result["robustness"]
    assert list(table) == list(CHANGES)
    assert table["as published"]["ensemble"] >= 0.9
    assert table["16 bits"] == table["as published"]
    assert table["gain 0.5"]["ensemble"] >= 0.9


def test_every_kind_is_measured_and_most_are_refused(result):
    table = result["refusals"]
    assert set(PICTURES) < set(table)
    assert not any(table[kind]["drawn"] for kind in PICTURES)
    assert all(row["images"] == 4 for row in table.values())
    assert np.mean([row["refused"] for row in table.values()]) > 0.9


@pytest.mark.parametrize("image", [np.full((100, 100), 9.0), np.full((78, 78), 4095.0), np.full((78, 78), -1.0)])
def test_measure_robustness_refuses_cells_that_it_cannot_spoil(image):
    with pytest.raises(ValueError, match="can be spoilt"):
        measure_robustness(load_weights(), [image], np.zeros(1))


@pytest.mark.parametrize("change", CHANGES)
def test_changes_do_not_depend_on_earlier_ones(change):
    image = np.random.default_rng(0).integers(0, 256, (78, 78)).astype(float)
    one, other = (CHANGES[change](image, np.random.default_rng(1)) for _ in range(2))
    assert one == other if isinstance(one, bytes) else (one == other).all()


def test_tables_are_set_out_in_markdown(result):
    lines = stress_tables(result).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert any(line.startswith("| photographs | 4 |") for line in lines)
