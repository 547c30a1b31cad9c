import json
import shutil

import pytest
import torch
from conftest import TRAINING, save_untrained
from safetensors.torch import load_file, save_file

from hep2.files import write_json
from hep2.models import MODELS, build_model
from hep2.patterns import CLASS_NAMES
from hep2.weights import BUNDLED, load_weights, save_model


@pytest.fixture
def folder(untrained, tmp_path):
    """A copy of the untrained weights, to be spoilt."""
    return shutil.copytree(untrained, tmp_path / "weights")


def edit_config(folder, name, **changes):
    path = folder / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_load_weights_gives_what_was_saved(tmp_path):
    torch.manual_seed(0)
    model = build_model("rescnn", {"widths": [8, 8, 16, 16]}).eval()
    model.stem[1].running_var.fill_(1e-9)  # too small for half precision
    save_model(tmp_path, "rescnn", model, training=TRAINING, temperature=1.25)
    weights = load_weights(tmp_path, ("rescnn",))
    assert weights.models["rescnn"].config == model.config
    assert weights.temperature("rescnn") == 1.25
    assert not weights.models["rescnn"].training
    written = load_file(tmp_path / "rescnn" / "model.safetensors")
    assert written.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(written[name].to(tensor.dtype), tensor, rtol=1e-3, atol=1e-6)
    assert written["stem.1.running_var"].max() == pytest.approx(1e-9)
    # In use, each norm lies folded into its convolution.
    images = torch.rand(4, 1, 78, 78)
    with torch.inference_mode():
        answer, expected = weights.models["rescnn"](images), model(images)
    torch.testing.assert_close(answer, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


def test_load_weights_loads_all_models_in_order_and_a_stable_revision(untrained, tmp_path):
    weights = load_weights(untrained)
    assert list(weights.models) == list(MODELS)
    assert weights.source == f"folder {untrained.name}"
    assert weights.revision == load_weights(untrained).revision
    assert weights.revision != load_weights(save_untrained(tmp_path, seed=1)).revision


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_load_weights_names_a_missing_file(folder, name, file):
    (folder / name / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}/{file} is missing"):
        load_weights(folder)


def test_load_weights_of_a_missing_folder_or_an_unknown_model_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder of weights"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown models \\['alexnet'\\]"):
        load_weights(tmp_path, ("alexnet",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2, but this version reads 1"),
        ({"extra": 1}, r"\['extra'\] are missing or unknown"),
        ({"model": "vit"}, "model is 'vit', expected 'cnn'"),
        ({"labels": ["Golgi", "Centromere", "Homogeneous", "NuMem", "Nucleolar", "Speckled"]}, "labels is"),
        ({"preprocessing": {"image_size": 224}}, "preprocessing is"),
        ({"training": {}}, "training is {}, expected an object with"),
        ({"training": TRAINING | {"settings": 1}}, "training.settings is 1, expected an object"),
        ({"training": TRAINING | {"seconds": None}}, "training.seconds is None, expected a number"),
        ({"training": TRAINING | {"settings": {"finish_changes": "all"}}}, "training.settings.finish_changes is 'all'"),
        ({"architecture": []}, r"architecture is \[\], expected an object"),
        ({"calibration": {"temperature": 0}}, "positive temperature"),
        ({"calibration": None}, "positive temperature"),
        ({"calibration": {"temperature": float("inf")}}, "positive temperature"),
        ({"architecture": {"widths": [400_000] * 4}}, "memory"),
        ({"architecture": {"widths": [1, 2]}}, "four positive whole numbers"),
        ({"architecture": {"depth": 2}}, "unknown fields"),
        ({"architecture": {"widths": [32, 64, 128, 255]}}, "does not fit its config"),
    ],
)
def test_load_weights_names_what_does_not_fit_in_a_config(folder, changes, message):
    edit_config(folder, "cnn", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(folder)
    assert str(folder / "cnn") in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000])
def test_load_weights_names_a_damaged_config(folder, content):
    (folder / "vit" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"vit/config.json (is damaged|holds list)"):
        load_weights(folder)


def test_load_weights_names_truncated_and_spoilt_tensors(folder):
    path = folder / "vit" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(ValueError, match=r"vit/model.safetensors is damaged"):
        load_weights(folder)
    path.write_bytes(whole)
    tensors = load_file(path)
    tensors["head.bias"][0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match="NaN"):
        load_weights(folder, ("vit",))
    del tensors["head.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"does not fit its config: .*head.bias"):
        load_weights(folder, ("vit",))


def test_load_weights_shows_no_figures_that_are_not_of_these_weights(folder):
    figures = {"accuracy": 1.0, "mean_class_accuracy": 1.0, "macro_f1": 1.0, "ece": 0.0}
    row = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2}
    figures |= {"per_class": dict.fromkeys(CLASS_NAMES, row), "confusion": [[2] * 6] * 6, "reliability": []}
    metrics = {"models": {"cnn": figures}}
    write_json(folder / "metrics.json", metrics | {"revision": load_weights(folder).revision})
    assert load_weights(folder).metrics["models"]
    write_json(folder / "metrics.json", metrics | {"revision": "0123456789ab"})
    weights = load_weights(folder)
    assert weights.metrics == {}
    assert any("are of other weights" in note for note in weights.notes)
    parts = (
        {"confusion": [[2]]},
        {"confusion": [["2"] * 6] * 6},
        {"reliability": [{"cells": 1}]},
        {"reliability": None},
    )
    for spoilt in ([], {"cnn": {}}, {"alexnet": figures}, *({"cnn": figures | part} for part in parts)):
        write_json(folder / "metrics.json", {"models": spoilt})
        with pytest.raises(ValueError, match=r"metrics.json: models"):
            load_weights(folder)
    for key in ("specimen", "specimen_own"):
        write_json(folder / "metrics.json", metrics | {key: {"folds": 4}})
        with pytest.raises(ValueError, match=rf"metrics.json: {key} holds"):
            load_weights(folder)
    (folder / "metrics.json").unlink()
    assert any("metrics.json is not there" in note for note in load_weights(folder).notes)


@pytest.mark.parametrize("content", ["{}\n", "[" * 100_000, "no JSON"])
def test_a_damaged_log_shows_no_curves_and_costs_no_verdict(folder, content):
    (folder / "cnn" / "log.jsonl").write_text(content)
    assert load_weights(folder).history("cnn") == []


def test_load_weights_refuses_an_ensemble_of_other_members(folder, tmp_path):
    other = save_untrained(tmp_path / "other", seed=1)
    shutil.copytree(other / "cnn", folder / "cnn", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="the ensemble was fitted on members"):
        load_weights(folder)


def test_load_weights_names_what_does_not_fit_in_the_refusal(folder, tmp_path):
    other = save_untrained(tmp_path / "other", seed=1)
    shutil.copytree(other / "rescnn", folder / "rescnn", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"refusal/config.json: it was fitted on members"):
        load_weights(folder)
    shutil.copytree(other, folder, dirs_exist_ok=True)
    for changes in ({"format": 2}, {"members": ["cnn"]}, {"members": {"alexnet": "0"}}, {"extra": 1}):
        edit_config(folder, "refusal", **changes)
        with pytest.raises(ValueError, match=r"refusal/config.json"):
            load_weights(folder)
        shutil.copytree(other / "refusal", folder / "refusal", dirs_exist_ok=True)
    (folder / "refusal" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"refusal/model.safetensors is missing"):
        load_weights(folder)


def test_bundled_weights_load_and_fit_into_12_megabytes():
    weights = load_weights()
    assert weights.source == "bundled"
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) <= 12_000_000
    origins = {
        tuple(c["training"][key] for key in ("protocol", "seed", "dataset_fingerprint"))
        for c in weights.configs.values()
    }
    assert len(origins) == 1
