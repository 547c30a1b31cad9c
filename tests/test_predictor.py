import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from hep2.imaging import Cell, load_cell
from hep2.patterns import CLASS_NAMES
from hep2.phantoms import phantom_cell
from hep2.reader import BATCH, Failure, Gathering, Reader, Reading, predict
from hep2.weights import load_weights


@pytest.fixture(scope="module")
def reader(untrained) -> Reader:
    return Reader(load_weights(untrained))


def test_read_answers_in_order_and_a_failure_costs_no_other(reader):
    rng = np.random.default_rng(0)
    sources = [(str(n), phantom_cell("Golgi", rng)) for n in range(BATCH + 3)]
    sources[1] = ("1", b"no image")
    readings = list(reader.read(iter(sources)))
    assert [reading.file for reading in readings] == [name for name, _ in sources]
    assert isinstance(readings[1], Failure)
    assert "not an image" in readings[1].error
    assert sum(isinstance(reading, Reading) for reading in readings) == BATCH + 2


def test_reading_is_what_the_models_say(reader):
    reading = next(reader.read([("cell.png", phantom_cell("NuMem", np.random.default_rng(0)))]))
    answer = reading.as_dict()
    assert list(answer) == ["file", "verdict", "probability", "agreement", "models", "warnings", "weights"]
    assert answer["file"] == "cell.png"
    assert list(answer["models"]) == ["cnn", "rescnn", "vit", "ensemble"]
    for name, values in answer["models"].items():
        assert list(values) == list(CLASS_NAMES)
        assert sum(values.values()) == pytest.approx(1, abs=1e-5)
        with torch.inference_mode():
            logits = reader.weights.models[name](torch.from_numpy(reading.cell.pixels)[None])[0]
        expected = (logits / 1.5).softmax(0)
        np.testing.assert_allclose(list(values.values()), expected, atol=2e-5)
    best = max(answer["models"]["ensemble"], key=answer["models"]["ensemble"].get)
    assert answer["verdict"] == best
    assert answer["probability"] == answer["models"]["ensemble"][best]
    verdicts = [max(values, key=values.get) for values in answer["models"].values()]
    assert answer["agreement"] == verdicts.count(best)
    assert answer["weights"] == {"source": reader.weights.source, "revision": reader.weights.revision}


def test_reading_carries_the_doubts_about_the_image(reader):
    image = np.random.default_rng(0).random((20, 20))
    assert "small" in next(reader.read([("tiny", image)])).as_dict()["warnings"][0]


def test_predict_does_not_depend_on_the_batch(phantoms, monkeypatch):
    monkeypatch.setattr("hep2.reader.CORES", 1)  # so that cells share a pass
    weights, images = load_weights(), phantoms.images[::10][:10]
    together = predict(weights, images)
    alone = [predict(weights, image[None]) for image in images]
    for name, values in together.probabilities.items():
        assert np.array_equal(values, np.concatenate([one.probabilities[name] for one in alone]))
    assert np.array_equal(together.refused, np.concatenate([one.refused for one in alone]))


def test_predict_keeps_the_order_of_the_models_on_any_device(reader, phantoms):
    on_card = replace(reader.weights, device="cpu:0")  # another name than "cpu" is a card's
    names = list(predict(on_card, phantoms.images[:2]).probabilities)
    assert names == list(predict(reader.weights, phantoms.images[:2]).probabilities) == list(reader.weights.models)


def test_warnings_tell_refusal_disagreement_and_low_confidence_apart(reader):
    def reading(*verdicts, sure=0.9, refused=False) -> Reading:
        values = {}
        for model, verdict in zip(("cnn", "rescnn", "vit", "ensemble"), verdicts, strict=True):
            values[model] = np.full(6, (1 - sure) / 5)
            values[model][CLASS_NAMES.index(verdict)] = sure
        return Reading("", Cell(np.zeros((1, 78, 78), np.float32), ("odd",)), values, refused, {})

    assert reading(*["Golgi"] * 4).warnings == ["odd"]
    doubtful = reading("Golgi", "NuMem", "Golgi", "Golgi", sure=0.5)
    assert doubtful.warnings == [
        "odd",
        "disagreement: ResCNN says NuMem",
        "low confidence: the verdict has a probability of 50%",
    ]
    assert doubtful.agreement == 3
    refused = reading("Golgi", "NuMem", "Golgi", "Golgi", sure=0.5, refused=True)
    assert (refused.verdict, refused.probability, refused.agreement) == (None, None, None)
    assert [warning.partition(":")[0] for warning in refused.warnings] == ["refused", "odd"]


def test_reader_needs_the_ensemble(untrained):
    with pytest.raises(ValueError, match="needs the ensemble"):
        Reader(load_weights(untrained, ("cnn",)))


def test_explain_gives_the_reading_that_read_gives_and_a_map_of_each_model(reader):
    cell = phantom_cell("Speckled", np.random.default_rng(0))
    explanation = reader.explain("cell.png", load_cell(cell))
    assert explanation.reading.as_dict() == next(reader.read([("cell.png", cell)])).as_dict()
    assert list(explanation.maps) == ["cnn", "rescnn", "vit", "ensemble"]
    for values in explanation.maps.values():
        assert values.shape == (78, 78)
    np.testing.assert_allclose(explanation.maps["ensemble"], (explanation.maps["cnn"] + explanation.maps["vit"]) / 2)


def test_gathering_gives_each_item_a_try_of_its_own_where_a_list_fails():
    lists = []

    def double(items):
        lists.append(list(items))
        if 3 in items:
            raise ValueError("three")
        return [2 * item for item in items]

    gathering, first = Gathering(double), threading.Event()

    def slow(items):
        first.set()
        gathering.function = double
        while gathering.waiting.qsize() < 3:
            time.sleep(0.001)
        return double(items)

    gathering.function = slow
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(gathering, 1)]
        first.wait()
        waiting += [pool.submit(gathering, item) for item in (2, 3, 4)]
        assert [waiting[place].result() for place in (0, 1, 3)] == [2, 4, 8]
        with pytest.raises(ValueError, match="three"):
            waiting[2].result()
    assert sorted(map(len, lists)) == [1, 1, 1, 1, 3]
