import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from conftest import ROOT
from PIL import Image

import train
from hep2.__main__ import main
from hep2.models import MODELS
from hep2.patterns import CLASS_NAMES


@pytest.fixture
def images(tmp_path, capsys):
    assert main(["phantoms", "--output", str(tmp_path / "cells"), "--count", "1", "--seed", "3"]) == 0
    capsys.readouterr()
    return [str(tmp_path / "cells" / name / "1.png") for name in CLASS_NAMES]


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    AcceleratorState._reset_state(True)


def test_classify_json_prints_one_object_a_line(images, untrained, capsys):
    assert main(["classify", *images, "--json", "--weights", str(untrained)]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["file"] for answer in answers] == images
    assert all(list(answer["models"]) == list(MODELS) for answer in answers)


@pytest.mark.parametrize("form", ["--json", "--csv", None])
def test_classify_answers_for_all_others_when_one_fails_and_exits_1(form, images, untrained, capsys, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("<svg/>")
    files = [images[0], str(bad), str(tmp_path / "missing.png"), images[1]]
    assert main(["classify", *files, "--weights", str(untrained), *([form] if form else [])]) == 1
    out, err = capsys.readouterr()
    assert f"hep2: {bad}: not an image" in err
    assert "missing.png: there is no such file" in err
    if form == "--json":
        answers = [json.loads(line) for line in out.splitlines()]
        assert [answer["file"] for answer in answers] == files
        assert ["error" in answer for answer in answers] == [False, True, True, False]
    elif form == "--csv":
        rows = list(csv.DictReader(out.splitlines()))
        assert [row["file"] for row in rows] == files
        assert [bool(row["error"]) for row in rows] == [False, True, True, False]
        assert sum(float(rows[0][f"vit_{name}"]) for name in CLASS_NAMES) == pytest.approx(1, abs=1e-5)
    else:
        assert images[0] in out
        assert images[1] in out


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(tmp_path):
    command = [sys.executable, "-m", "hep2", "audit", "--json", "--dataset", "phantoms:12"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_classify_without_usable_weights_says_so(images, tmp_path, capsys):
    assert main(["classify", images[0], "--weights", str(tmp_path / "none")]) == 1
    assert "no such folder of weights" in capsys.readouterr().err


def test_the_environment_names_the_weights(images, untrained, monkeypatch, capsys):
    monkeypatch.setenv("HEP2_WEIGHTS", str(untrained))
    assert main(["classify", images[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["source"] == f"folder {untrained.name}"
    monkeypatch.setenv("HEP2_WEIGHTS", "")
    assert main(["classify", images[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["source"] == "bundled"


def test_classify_reads_the_examples_with_the_bundled_weights(capsys):
    files = [f"examples/{name}/{number}.png" for name in CLASS_NAMES for number in range(1, 6)]
    assert main(["classify", *files, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["verdict"] for answer in answers] == [file.split("/")[1] for file in files]
    assert {answer["weights"]["source"] for answer in answers} == {"bundled"}


def test_examples_are_what_the_generator_makes(tmp_path, capsys):
    assert main(["phantoms", "--output", str(tmp_path), "--seed", "1"]) == 0
    for name in CLASS_NAMES:
        for number in range(1, 6):
            made, kept = (np.asarray(Image.open(f"{root}/{name}/{number}.png")) for root in (tmp_path, "examples"))
            np.testing.assert_array_equal(made, kept)


def test_example_fields_are_what_the_generator_makes(tmp_path, capsys):
    assert main(["phantoms", "--fields", "--output", str(tmp_path), "--seed", "1"]) == 0
    for name in CLASS_NAMES:
        made, kept = (np.asarray(Image.open(f"{root}/{name}.png")) for root in (tmp_path, "examples/fields"))
        np.testing.assert_array_equal(made, kept)


def test_phantoms_of_no_cells_is_an_error(tmp_path, capsys):
    assert main(["phantoms", "--output", str(tmp_path), "--count", "0"]) == 1
    assert "--count is 0" in capsys.readouterr().err


def test_train_and_evaluate_from_phantoms_to_a_verdict(images, few_refusals, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["--dataset", "phantoms:40", "--epochs", "1", "--batch-size", "32", "--output", str(run)]
    assert train.main(arguments) == 0
    for name in MODELS:
        assert {path.name for path in (run / name).iterdir()} == {
            "checkpoint.pt",
            "config.json",
            "curves.png",
            "log.jsonl",
            "model.safetensors",
        }
    assert main(["evaluate", "--dataset", "phantoms:40", "--weights", str(run), "--output", str(tmp_path / "e")]) == 0
    table = capsys.readouterr().out
    assert "Stack ensemble" in table
    assert "the source's" not in table  # whose figures are of other cells
    for file in ("metrics.json", "predictions.csv", "confusion_vit.png", "reliability_ensemble.png"):
        assert (tmp_path / "e" / file).read_bytes() == (run / file).read_bytes()
    result = json.loads((run / "metrics.json").read_text())
    assert (result["protocol"], result["seed"], result["test_size"]) == ("clean", 0, 36)
    assert list(result["models"]) == list(MODELS)
    # One model alone, measured again, takes no figure from the others.
    AcceleratorState._reset_state(True)
    assert train.main([*arguments, "--models", "cnn"]) == 0
    assert json.loads((run / "metrics.json").read_text()) == result
    # A member that is trained anew is another run to the stack, until that is deleted too.
    for name in ("checkpoint.pt", "log.jsonl"):
        (run / "cnn" / name).unlink()
    AcceleratorState._reset_state(True)
    again = [*arguments[:2], "--epochs", "2", *arguments[4:]]
    assert train.main([*again, "--models", "cnn"]) == 1
    assert "train the ensemble again on these members" in capsys.readouterr().err
    shutil.rmtree(run / "ensemble")
    AcceleratorState._reset_state(True)
    assert train.main([*again, "--models", "cnn", "ensemble"]) == 0
    result = json.loads((run / "metrics.json").read_text())
    rows = list(csv.DictReader((run / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 36
    right = sum(row["label"] == row["ensemble_verdict"] for row in rows)
    assert right / 36 == pytest.approx(result["models"]["ensemble"]["accuracy"])
    assert list(rows[0])[:4] == ["file", "label", "cnn_verdict", "cnn_Centromere"]
    assert main(["classify", *images, "--weights", str(run)]) == 0


def test_evaluate_refuses_cells_that_the_weights_have_seen(tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main(["--dataset", "phantoms:20", "--models", "cnn", "--epochs", "1", "--output", str(run)]) == 0
    (tmp_path / "only").mkdir()
    shutil.copytree(run / "cnn", tmp_path / "only" / "cnn")
    capsys.readouterr()
    from hep2.data import load_cells
    from hep2.pipeline import evaluate_weights
    from hep2.weights import load_weights

    weights, cells = load_weights(tmp_path / "only", ("cnn",)), load_cells("phantoms:20")
    for other in ({"seed": 1}, {"protocol": "paper"}):
        with pytest.raises(ValueError, match="test cells were used to train cnn"):
            evaluate_weights(weights, cells, tmp_path / "out", **other)
    assert not (tmp_path / "out").exists()
    assert evaluate_weights(weights, cells, tmp_path / "out")["test_size"] == 18


def test_evaluate_takes_no_options_that_do_not_apply(untrained, tmp_path, capsys):
    output = ["--dataset", "phantoms:20", "--output", str(tmp_path / "out")]
    assert main(["evaluate", *output, "--protocol", "specimen", "--weights", str(untrained)]) == 1
    assert "leave out --weights, or name the --fold" in capsys.readouterr().err
    assert main(["evaluate", *output, "--epochs", "3"]) == 1
    assert "--recipe and --epochs are for --protocol specimen" in capsys.readouterr().err


def test_train_of_a_bad_dataset_or_directory_says_so_and_exits_1(tmp_path, capsys):
    assert train.main(["--dataset", str(tmp_path / "none"), "--output", str(tmp_path)]) == 1
    assert "was not found" in capsys.readouterr().err
    AcceleratorState._reset_state(True)
    arguments = ["--dataset", "phantoms:20", "--models", "ensemble", "--output", str(tmp_path)]
    assert train.main(arguments) == 1
    assert "cnn/config.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_audit_of_phantoms_finds_no_duplicate(form, capsys):
    assert main(["audit", "--dataset", "phantoms:2", *form]) == 0
    out = capsys.readouterr().out
    if form:
        assert json.loads(out)["duplicates"] == 0
    else:
        assert "12 cells" in out
        assert "0 cells repeat" in out
