import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from answers import ANSWERS, EXAMPLES, example_answers
from conftest import save_untrained
from torch import nn

import hep2
from hep2.checkpoints import load_classifier
from hep2.images import Cell, load_cell
from hep2.models import BASE_MODELS, MODELS
from hep2.patterns import CLASS_NAMES
from hep2.predictor import BATCH, CPU_BATCH, Failure, Prediction, Predictor, optimized_for_serving
from hep2.saliency import saliency_map
from hep2.synthetic import synthetic_cell, synthetic_files


@pytest.fixture(scope="module")
def predictor(untrained) -> Predictor:
    return hep2.load(untrained, device="cpu")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """More cells than go through the models at once."""
    files = list(synthetic_files(CPU_BATCH // 6 + 2))
    return torch.from_numpy(np.stack([load_cell(image).pixels for _, image, _ in files]))


def flat(output) -> np.ndarray:
    return np.concatenate([*output.probabilities.values(), output.rejected[:, None]], axis=1)


def test_load_takes_the_bundled_weights_or_a_folder(untrained, bundled):
    assert bundled.origin["source"] == "bundled"
    weights = load_classifier(untrained)
    assert hep2.load(str(untrained), "cpu").origin == {"source": weights.source, "revision": weights.revision}
    with pytest.raises(FileNotFoundError, match="no such folder"):
        hep2.load("./nowhere")


def test_the_thirty_examples_have_the_digits_that_are_written_down(bundled):
    written = json.loads(ANSWERS.read_text())
    answers = example_answers(bundled)
    assert len(answers) == 30
    assert list(answers) == list(written)
    for file, answer in answers.items():
        expected = written[file]
        assert (answer["verdict"], answer["agreement"]) == (expected["verdict"], expected["agreement"]), file
        for model, values in answer["models"].items():
            assert values == pytest.approx(expected["models"][model], abs=2e-5), file  # processors round differently


@pytest.mark.parametrize("size", [1, 7, CPU_BATCH, CPU_BATCH + 1])
def test_answers_do_not_depend_on_the_batch(bundled, images, size):
    together = bundled(images)
    apart = [bundled(batch) for batch in images.split(size)]
    np.testing.assert_allclose(flat(together), np.concatenate([flat(part) for part in apart]), rtol=0, atol=1e-5)
    scores = np.concatenate([part.rejection for part in apart])
    np.testing.assert_allclose(together.rejection, scores, rtol=1e-5, atol=1e-4)


def test_answers_are_those_of_the_module_that_was_saved(bundled, images):
    output = bundled(images)
    with torch.inference_mode():
        answers = bundled.weights.classifier(images)
    assert list(output.probabilities) == list(MODELS)
    for number, values in enumerate(output.probabilities.values()):
        assert values.shape == (len(images), len(CLASS_NAMES))
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, answers.probabilities[:, number], rtol=0, atol=1e-5)
        np.testing.assert_allclose(values.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(output.rejection, answers.rejection, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(output.rejected, answers.rejected)


def test_a_predictor_changes_nothing_of_the_weights_it_serves(untrained, images):
    weights = load_classifier(untrained)
    before = {key: tensor.clone() for key, tensor in weights.classifier.state_dict().items()}
    Predictor(weights, "cpu")(images[:2])
    after = weights.classifier.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert all(parameter.requires_grad for parameter in weights.classifier.parameters())


def test_what_serves_is_a_copy_without_norms_that_were_folded(untrained):
    classifier = load_classifier(untrained).classifier
    served = optimized_for_serving(classifier, torch.device("cpu"))
    kinds = [{type(module) for module in each.modules()} for each in (classifier, served)]
    assert [nn.BatchNorm2d in kind for kind in kinds] == [True, False]
    assert not served.training
    assert not any(parameter.requires_grad for parameter in served.parameters())


def test_no_images_get_no_answers(predictor, images):
    output = predictor(images[:0])
    assert [values.shape for values in output.probabilities.values()] == [(0, 6)] * len(MODELS)
    assert (output.rejection.shape, output.rejected.shape) == ((0,), (0,))
    assert list(predictor.classify([])) == predictor.classify_cells([]) == []


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 1, 78, 78, dtype=torch.uint8),
        torch.zeros(1, 1, 80, 80),
        torch.zeros(1, 3, 78, 78),
        torch.zeros(78, 78),
    ],
    ids=["integers", "size", "channels", "dimensions"],
)
def test_images_of_another_form_get_no_answers(predictor, images):
    with pytest.raises(ValueError, match=r"give floats in \[0, 1\] of shape \(images, 1, 78, 78\)"):
        predictor(images)


@pytest.mark.parametrize("image", ["cell.png", b"\x89PNG", np.zeros((78, 78))])
def test_classify_of_one_image_asks_for_a_list(predictor, image):
    with pytest.raises(ValueError, match=r"give \[image\]"):
        next(predictor.classify(image))


def test_classify_answers_in_order_and_a_failure_costs_no_other(predictor, tmp_path):
    random = np.random.default_rng(0)
    sources = [(str(number), synthetic_cell("Golgi", random)) for number in range(BATCH + 3)]
    sources[1] = ("1", b"no image")
    sources[BATCH] = (str(BATCH), tmp_path / "nowhere.png")
    answers = list(predictor.classify(iter(sources)))
    assert [answer.file for answer in answers] == [name for name, _ in sources]
    failed = {number: answer for number, answer in enumerate(answers) if isinstance(answer, Failure)}
    assert list(failed) == [1, BATCH]
    assert failed[1].verdict is None
    assert failed[1].as_dict() == {"file": "1", "error": failed[1].error}
    assert "not an image" in failed[1].error
    assert "no such file" in failed[BATCH].error


def test_classify_takes_no_more_sources_than_a_batch_ahead(predictor):
    taken = []

    def sources():
        for number in range(3 * BATCH):
            taken.append(number)
            yield synthetic_cell("Golgi", np.random.default_rng(number))

    assert next(predictor.classify(sources())).file == "image 1"
    assert len(taken) == BATCH


def test_classify_takes_paths_bytes_and_arrays_alike(bundled):
    path = EXAMPLES / "Golgi" / "1.png"
    sources = [path, str(path), path.read_bytes(), ("named", path.read_bytes())]
    predictions = list(bundled.classify(sources))
    assert [prediction.file for prediction in predictions] == [str(path), str(path), "image 3", "named"]
    assert len({json.dumps(prediction.as_dict() | {"file": ""}) for prediction in predictions}) == 1


def test_classify_gives_channel_and_plane_to_the_decoder(predictor):
    random = np.random.default_rng(0)
    green, blue = synthetic_cell("Centromere", random), synthetic_cell("Homogeneous", random)
    colours = np.stack([np.zeros_like(green), green, blue], axis=2)
    for channel, expected in (("green", green), ("blue", blue)):
        (prediction,) = predictor.classify([colours], channel=channel)
        np.testing.assert_array_equal(prediction.cell.pixels, load_cell(expected).pixels)


def test_classify_takes_another_function_for_the_models(predictor):
    asked = []

    def classify_cells(cells):
        asked.append([name for name, _ in cells])
        return predictor.classify_cells(cells)

    sources = [("a", synthetic_cell("Golgi", np.random.default_rng(0))), ("b", b"no image")]
    first, second = predictor.classify(sources, classify_cells=classify_cells)
    assert asked == [["a"]]
    assert isinstance(first, Prediction)
    assert isinstance(second, Failure)


def test_an_answer_says_what_each_model_says(predictor):
    (prediction,) = predictor.classify([("cell.png", synthetic_cell("NuMem", np.random.default_rng(0)))])
    answer = prediction.as_dict()
    assert list(answer) == ["file", "verdict", "probability", "agreement", "models", "warnings", "weights"]
    assert answer["file"] == "cell.png"
    assert list(answer["models"]) == list(MODELS)
    for values in answer["models"].values():
        assert list(values) == list(CLASS_NAMES)
        assert sum(values.values()) == pytest.approx(1, abs=1e-5)
    verdicts = [max(values, key=values.get) for values in answer["models"].values()]
    assert answer["verdict"] == verdicts[-1]
    assert answer["probability"] == answer["models"]["ensemble"][verdicts[-1]]
    assert answer["agreement"] == verdicts.count(verdicts[-1])
    assert answer["weights"] == predictor.origin
    assert json.loads(json.dumps(answer)) == answer


def prediction_of(*verdicts: str, probability: float = 0.9, rejected: bool = False) -> Prediction:
    values = {}
    for model, verdict in zip(MODELS, verdicts, strict=True):
        values[model] = np.full(6, (1 - probability) / 5)
        values[model][CLASS_NAMES.index(verdict)] = probability
    return Prediction("", Cell(np.zeros((1, 78, 78), np.float32), ("odd",)), values, 0.0, rejected, {})


@pytest.mark.parametrize(
    ("prediction", "agreement", "kinds"),
    [
        (prediction_of(*["Golgi"] * 4), 4, ["odd"]),
        (prediction_of("Golgi", "NuMem", "Golgi", "Golgi"), 3, ["odd", "disagreement: ResCNN says NuMem"]),
        (
            prediction_of(*["Golgi"] * 4, probability=0.5),
            4,
            ["odd", "low confidence: the verdict has a probability of 50%"],
        ),
    ],
    ids=["sure", "disagreement", "low confidence"],
)
def test_warnings_tell_disagreement_and_low_confidence_apart(prediction, agreement, kinds):
    assert prediction.warnings == kinds
    assert prediction.verdict == "Golgi"
    assert prediction.agreement == agreement


def test_a_rejected_image_has_no_verdict_and_its_probabilities():
    prediction = prediction_of("Golgi", "NuMem", "Golgi", "Golgi", probability=0.5, rejected=True)
    assert (prediction.verdict, prediction.probability, prediction.agreement) == (None, None, None)
    assert [warning.partition(":")[0] for warning in prediction.warnings] == ["rejected", "odd"]
    assert prediction.as_dict()["models"]["rescnn"]["NuMem"] == 0.5


def test_the_rejections_threshold_decides(untrained, images):
    weights = load_classifier(untrained)
    scores = Predictor(weights, "cpu")(images).rejection
    weights.classifier.rejection.threshold.fill_(float(np.median(scores)))
    output = Predictor(weights, "cpu")(images)
    np.testing.assert_array_equal(output.rejected, scores < np.median(scores))
    assert 0 < output.rejected.sum() < len(images)


def test_explain_gives_the_prediction_and_a_map_of_each_model(bundled):
    cell = load_cell(synthetic_cell("Speckled", np.random.default_rng(0)))
    explanation = bundled.explain(("cell.png", cell))
    (prediction,) = bundled.classify_cells([("cell.png", cell)])
    assert explanation.prediction.as_dict() == prediction.as_dict()
    assert list(explanation.maps) == list(MODELS)
    image = torch.from_numpy(cell.pixels)[None]
    for name in BASE_MODELS:
        values = explanation.maps[name]
        assert values.shape == (78, 78)
        assert 0 <= values.min() <= values.max() <= 1
        expected = saliency_map(getattr(bundled.weights.classifier, name), image)[0][0]
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-3)
    np.testing.assert_allclose(explanation.maps["ensemble"], (explanation.maps["cnn"] + explanation.maps["vit"]) / 2)


def test_weights_of_another_folder_give_other_answers(untrained, tmp_path, images):
    other = Predictor(load_classifier(save_untrained(tmp_path, seed=1)), "cpu")
    assert other.origin["revision"] != load_classifier(untrained).revision
    assert not np.allclose(flat(other(images[:4])), flat(hep2.load(untrained, "cpu")(images[:4])))


def test_a_source_is_named_as_its_loader_says(untrained):
    weights = replace(load_classifier(untrained), source="lab/hep2", revision="abc")
    (prediction,) = Predictor(weights, "cpu").classify([Path(EXAMPLES / "Golgi" / "1.png")])
    assert prediction.as_dict()["weights"] == {"source": "lab/hep2", "revision": "abc"}
