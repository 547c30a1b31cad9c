import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

import hep2.bench
from hep2.bench import AT_OURS, PEERS, measure_speed, measure_training, multiply_adds, speed_tables
from hep2.inference import ready_to_read
from hep2.models import build_model
from hep2.weights import load_weights


def test_multiply_adds_are_counted():
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    assert multiply_adds(layer, torch.rand(1, 3, 10, 10)) == 10 * 10 * 5 * 3 * 9


@pytest.mark.parametrize("name", ["cnn", "rescnn", "vit"])
def test_multiply_adds_of_packed_layers_are_counted(name):
    image = torch.rand(1, 1, 78, 78)
    expected = multiply_adds(build_model(name).eval(), image)
    assert multiply_adds(ready_to_read(build_model(name)), image) == expected > 10**7


def test_measure_speed_measures_all_sides_and_sets_them_out(untrained, monkeypatch):
    for name in ("ROUNDS", "IN_A_ROW", "BULK_ROUNDS", "PROCESSES"):
        monkeypatch.setattr(hep2.bench, name, 1)
    monkeypatch.setattr(hep2.bench, "BULK", 8)
    monkeypatch.setattr(hep2.bench, "MATRIX", 256)
    monkeypatch.setattr(hep2.bench, "STARTS", {"resnet18": hep2.bench.STARTS["resnet18"]})
    result = measure_speed(load_weights(untrained))
    assert set(PEERS) < set(result["latency"])
    assert {*PEERS, AT_OURS} < set(result["images_per_second"])
    assert result["multiply_adds"][AT_OURS] < result["multiply_adds"]["resnet18"] / 5
    assert result["multiply_adds"]["all four models"] < result["multiply_adds"]["resnet18"] / 2
    assert result["processes"]["resnet18"]["bytes"] > 10**8
    assert all(row["median"] <= row["percentile_95"] for row in result["latency"].values())
    assert set(result["latency_after_rest"]) == {"all four models", "resnet18"}
    tables = speed_tables(result)
    assert "| resnet18 |" in tables
    assert "| all four models, after a rest |" in tables


def test_measure_training_tells_the_share_of_augmentation(monkeypatch):
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(hep2.bench, "MATRIX", 256)
    measured = measure_training(("cnn",), batches=1)
    assert 0 < measured["cnn"]["augmentation_share"] < 1
    with pytest.raises(KeyError):
        measure_training(("alexnet",), batches=1)
