import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAINING, save_untrained, small_classifier
from safetensors.torch import load_file, save_file

from hep2.checkpoints import BUNDLED, Weights, load_classifier, save_classifier, write_json
from hep2.models import BASE_MODELS, MODELS
from hep2.predictor import Predictor
from hep2.synthetic import synthetic_files


@pytest.fixture
def folder(untrained, tmp_path) -> Path:
    """A copy of the untrained weights, to be damaged."""
    return shutil.copytree(untrained, tmp_path / "weights")


def change_config(folder: Path, changes: dict, model: str | None = None) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config["models"][model] if model else config).update(changes)
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def save_again(weights: Weights, folder: Path) -> Weights:
    config = weights.config
    models = {name: config["models"][name]["training"] for name in MODELS}
    save_classifier(
        folder, weights.classifier, training=config["training"], models=models, rejection=config["rejection"]
    )
    return load_classifier(folder)


def answers(weights: Weights, images: torch.Tensor) -> np.ndarray:
    output = Predictor(weights, "cpu")(images)
    return np.concatenate([*output.probabilities.values(), output.rejection[:, None], output.rejected[:, None]], axis=1)


@pytest.mark.parametrize("which", ["bundled", "untrained"])
def test_what_was_loaded_can_be_saved_and_answers_bit_for_bit_the_same(which, untrained, tmp_path):
    images = torch.stack([torch.from_numpy(image / 255).float() for _, image, _ in synthetic_files(2)])[:, None]
    weights = load_classifier({"bundled": BUNDLED, "untrained": untrained}[which])
    before = answers(weights, images)
    again = save_again(weights, tmp_path / "again")  # after the predictor, which must have changed nothing
    np.testing.assert_array_equal(answers(again, images), before)
    assert again.revision == weights.revision
    assert again.config == weights.config


def test_load_classifier_gives_what_was_saved(tmp_path):
    saved = small_classifier()
    saved.cnn.stem[1].running_var.fill_(1e-9)  # too small for half precision
    save_classifier(
        tmp_path, saved, training=TRAINING, models={key: {"epochs": 2} for key in MODELS}, rejection={"negatives": 3}
    )
    weights = load_classifier(tmp_path)
    assert weights.training == TRAINING
    assert weights.config["models"]["rescnn"]["training"] == {"epochs": 2}
    assert weights.config["rejection"] == {"negatives": 3}
    assert [getattr(weights.classifier, name).config for name in BASE_MODELS] == [
        getattr(saved, name).config for name in BASE_MODELS
    ]
    assert not weights.classifier.training
    assert {tensor.device.type for tensor in weights.classifier.state_dict().values()} == {"cpu"}
    loaded = weights.classifier.state_dict()
    assert loaded.keys() == saved.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-3, atol=1e-6)
    for name in ("temperatures", "rejection.threshold", "cnn.stem.1.running_var", "ensemble.linear.weight"):
        assert torch.equal(loaded[name], saved.state_dict()[name])


def test_source_and_revision_name_the_folder_and_its_content(untrained, tmp_path):
    weights = load_classifier(untrained)
    assert weights.source == f"folder {untrained.name}"
    assert weights.revision == load_classifier(untrained).revision
    assert weights.revision != load_classifier(save_untrained(tmp_path, seed=1)).revision
    given = load_classifier(untrained, source="lab/hep2", revision="abc")
    assert (given.source, given.revision) == ("lab/hep2", "abc")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_load_classifier_names_a_missing_file(folder, file):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
        load_classifier(folder)


def test_load_classifier_of_no_folder_says_so(tmp_path, untrained):
    with pytest.raises(FileNotFoundError, match="no such folder of weights"):
        load_classifier(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is a file: give the folder"):
        load_classifier(untrained / "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format 1, but this version reads 2"),
        ({"extra": 1}, r"\['extra'\] are missing or unknown"),
        ({"labels": ["Golgi", "Centromere", "Homogeneous", "NuMem", "Nucleolar", "Speckled"]}, "labels is"),
        ({"preprocessing": {"image_size": 224}}, "preprocessing is"),
        ({"training": {}}, "training is {}, expected an object with"),
        ({"models": []}, r"models is \[\], expected an object"),
        ({"models": {"cnn": {}}}, "models is .*, expected an object"),
    ],
)
def test_load_classifier_names_what_does_not_fit_in_a_config(folder, changes, message):
    change_config(folder, changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": []}, r"architecture"),
        ({"training": 1}, r"training"),
        ({"temperature": 0}, "the temperature of cnn is 0, expected a positive number"),
        ({"temperature": None}, "the temperature of cnn is None, expected a positive number"),
        ({"temperature": math.inf}, "the temperature of cnn is inf, expected a positive number"),
        ({"temperature": 3.0}, r"temperature of cnn is 3.0, 1.5 in model.safetensors"),
        ({"architecture": {"widths": [400_000] * 4}}, "memory"),
        ({"architecture": {"widths": [1, 2]}}, "four positive whole numbers"),
        ({"architecture": {"depth": 2}}, "unknown fields"),
        ({"architecture": {"widths": [8, 8, 16, 15]}}, r"cnn.head.weight"),
    ],
)
def test_load_classifier_names_what_does_not_fit_in_a_models_config(folder, changes, message):
    change_config(folder, changes, model="cnn")
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, b"\xff"])
def test_load_classifier_names_a_damaged_config(folder, content):
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"config.json (is damaged|holds list)"):
        load_classifier(folder)


@pytest.mark.parametrize("kept", [0, 4, 5000])
def test_load_classifier_names_truncated_tensors(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_classifier(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors["vit.head.bias"].fill_(math.nan), "some weights are NaN or infinite"),
        (lambda tensors: tensors["rejection.mean"].fill_(-math.inf), "some weights are NaN or infinite"),
        (lambda tensors: tensors.pop("vit.head.bias"), r"does not fit .*Missing key.*vit.head.bias"),
        (lambda tensors: tensors.update(other=torch.zeros(1)), r"does not fit .*Unexpected key.*other"),
        (lambda tensors: tensors.update({"vit.head.bias": torch.zeros(7)}), r"does not fit .*vit.head.bias"),
        (lambda tensors: tensors["temperatures"].fill_(0), r"temperature of cnn is 1.5, 0.0 in model.safetensors"),
    ],
    ids=["nan", "infinite", "missing", "superfluous", "shape", "temperature"],
)
def test_load_classifier_names_tensors_that_do_not_fit(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        load_classifier(folder)


def test_load_classifier_shows_no_figures_that_are_not_of_these_weights(folder):
    assert "metrics.json is not there" in load_classifier(folder).notes[0]
    write_json(folder / "metrics.json", {"models": {}, "revision": load_classifier(folder).revision})
    assert load_classifier(folder).metrics["models"] == {}
    assert load_classifier(folder).notes == ()
    write_json(folder / "metrics.json", {"models": {}, "revision": "0123456789ab"})
    weights = load_classifier(folder)
    assert weights.metrics == {}
    assert "are of other weights" in weights.notes[0]


def test_history_gives_the_records_of_training(folder):
    assert load_classifier(folder).history("cnn") == []
    (folder / "cnn").mkdir()
    (folder / "cnn" / "log.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    assert load_classifier(folder).history("cnn") == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"no JSON", b"\xff\xfe"])
def test_a_damaged_log_shows_no_curves_and_costs_no_verdict(folder, content):
    (folder / "cnn").mkdir()
    (folder / "cnn" / "log.jsonl").write_bytes(content)
    assert load_classifier(folder).history("cnn") == []


def test_examples_come_in_the_order_of_classes(folder):
    for file in ("Speckled/1.png", "Golgi/2.png", "Golgi/1.png", "Other/1.png", "Golgi/1.txt"):
        path = folder / "examples" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    found = [(path.name, label) for path, label in load_classifier(folder).examples()]
    assert found == [("1.png", "Golgi"), ("2.png", "Golgi"), ("1.png", "Speckled")]


def test_bundled_weights_load_with_their_figures_and_fit_into_12_megabytes():
    weights = load_classifier()
    assert weights.source == "bundled"
    assert set(weights.metrics["models"]) == set(MODELS)
    assert weights.notes == ()
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) <= 12_000_000
