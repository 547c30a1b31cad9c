import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import QUICK, SMALL_PLAN, TEACHER, Interrupted, InterruptingAccelerator
from filelock import FileLock

from hep2.checkpoints import load_classifier, read_json
from hep2.data import Cells, Split, load_cells, split
from hep2.models import BASE_MODELS, MODELS
from hep2.patterns import CLASS_NAMES
from hep2.pipeline import evaluate, held_out_examples, repeated_evenly, train, train_models
from hep2.predictor import Predictor
from hep2.recipes import Plan
from hep2.rejection import fit_rejection

WITHOUT_TEACHER = Plan(
    models=dict.fromkeys(BASE_MODELS, replace(QUICK, epochs=1, auxiliary_specimen_loss=True, augmentation=None))
    | {"ensemble": SMALL_PLAN.models["ensemble"]},
    architectures=SMALL_PLAN.architectures,
)


def run(cells: Cells, output: Path, **options) -> dict:
    """Train as `train.py` does, with what is to be otherwise."""
    settings = {"plan": SMALL_PLAN, "recipe": "default", "fit_rejection": fit_rejection, "progress": False}
    return train(cells, output, **({"accelerator": Accelerator()} | settings | options))


def assert_same_weights(folder: Path, other: Path) -> None:
    """Hold two runs against each other; Fourier transforms round by where in memory an image lies."""
    ours, theirs = (load_classifier(one).classifier.state_dict() for one in (folder, other))
    for name, tensor in ours.items():
        if not name.startswith("rejection."):  # fitted to a tolerance
            torch.testing.assert_close(tensor, theirs[name], atol=0.02, rtol=0.02, msg=lambda m, n=name: f"{n}: {m}")
    for name in MODELS:
        measured, expected = (read_json(one / "metrics.json")["models"][name]["accuracy"] for one in (folder, other))
        assert measured == pytest.approx(expected, abs=0.06)


@pytest.fixture
def without_figures(monkeypatch) -> None:
    monkeypatch.setattr("hep2.pipeline.save_figure", lambda *_: None)


def test_a_run_leaves_measured_weights_that_say_where_they_are_from(trained, cells_to_train_on):
    weights = load_classifier(trained)
    assert weights.notes == ()
    training = weights.training
    assert (training["recipe"], training["protocol"], training["seed"]) == ("default", "deduplicated", 0)
    assert training["dataset_fingerprint"] == cells_to_train_on.fingerprint
    assert list(training["teachers"]) == [TEACHER]
    assert [len(weights.history(name)) for name in MODELS] == [3, 3, 3, 2]
    assert (weights.classifier.temperatures >= 1).all()  # they soften, and never sharpen
    assert weights.config["rejection"]["negatives"] > 0
    metrics = read_json(trained / "metrics.json")
    assert metrics["revision"] == weights.revision
    assert list(metrics["models"]) == list(MODELS)
    assert metrics["test_size"] == len(split(cells_to_train_on, "deduplicated", 0).test)
    figures = {path.relative_to(trained).as_posix() for path in trained.rglob("*.png")}
    assert figures == {f for n in MODELS for f in (f"confusion_{n}.png", f"reliability_{n}.png", f"{n}/curves.png")}


def test_the_predictions_of_a_run_are_the_predictors_own(trained, cells_to_train_on):
    test = split(cells_to_train_on, "deduplicated", 0).test
    answers = Predictor(load_classifier(trained), "cpu")(cells_to_train_on.images[test]).probabilities
    with open(trained / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [cells_to_train_on.names[position] for position in test]
    assert [row["label"] for row in rows] == [CLASS_NAMES[label] for label in cells_to_train_on.labels[test]]
    for name in MODELS:
        written = np.array([[float(row[f"{name}_{pattern}"]) for pattern in CLASS_NAMES] for row in rows])
        np.testing.assert_allclose(written, answers[name], atol=1e-5)
        right = np.mean([row[f"{name}_verdict"] == row["label"] for row in rows])
        assert read_json(trained / "metrics.json")["models"][name]["accuracy"] == pytest.approx(right)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_weights(
    trained, teacher_file, cells_to_train_on, tmp_path, without_figures
):
    # An epoch has 5 steps of the teacher, or of each of three students, or one of the stack.
    kills = 0
    for steps in (3, 7, 16, 16, 16, 16, 1, 2):
        accelerator = InterruptingAccelerator(steps)
        try:
            run(cells_to_train_on, tmp_path, files={TEACHER: teacher_file}, accelerator=accelerator)
        except Interrupted:
            kills += 1
            assert not (tmp_path / "model.safetensors").exists()
        else:
            break
    assert kills >= 5
    assert_same_weights(tmp_path, trained)


@pytest.mark.slow
def test_a_run_made_in_parts_is_one_made_in_one_go(trained, cells_to_train_on, tmp_path, without_figures):
    # A teacher that was trained elsewhere is not fetched again.
    shutil.copytree(trained / f"teacher-{TEACHER}", tmp_path / f"teacher-{TEACHER}")

    def interrupt(*_) -> dict:
        raise Interrupted

    with pytest.raises(Interrupted):
        run(cells_to_train_on, tmp_path, fit_rejection=interrupt)
    assert not (tmp_path / "model.safetensors").exists()
    run(cells_to_train_on, tmp_path, accelerator=InterruptingAccelerator(0))  # nothing is left to train
    assert_same_weights(tmp_path, trained)


@pytest.mark.parametrize(
    "changed, what",
    [
        ({"seed": 1}, "seed"),
        ({"names": ("cnn",)}, "models"),
        ({"plan": replace(SMALL_PLAN, teachers={"test_vit": QUICK})}, "teacher"),
    ],
)
def test_another_run_in_the_folder_of_a_run_is_an_error(changed, what, trained, cells_to_train_on, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(ValueError, match=rf"belongs to another run \(another {what}"):
        run(cells_to_train_on, folder, **changed)
    assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_the_second_of_two_trainings_in_one_folder_is_told(cells_to_train_on, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match=r"another process trains into .*--output"):
        run(cells_to_train_on, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.slow
def test_some_models_are_trained_and_measured_and_found_done_by_the_whole_run(
    cells_to_train_on, tmp_path, without_figures
):
    settings = {"plan": WITHOUT_TEACHER}
    for name in ("vit", "cnn"):
        result = run(cells_to_train_on, tmp_path, names=(name,), **settings)
        assert list(result["models"]) == [name]
        assert f"{name}_verdict" in (tmp_path / "predictions.csv").read_text().splitlines()[0]
    assert not (tmp_path / "model.safetensors").exists()
    done = (tmp_path / "vit" / "checkpoint.pt").read_bytes()
    assert list(run(cells_to_train_on, tmp_path, **settings)["models"]) == list(MODELS)
    assert (tmp_path / "vit" / "checkpoint.pt").read_bytes() == done
    assert load_classifier(tmp_path).training["teachers"] == {}


def test_balanced_logits_are_those_of_patterns_that_are_all_as_frequent(cells_to_train_on, tmp_path):
    labels = cells_to_train_on.labels.numpy()
    uneven = np.concatenate([np.flatnonzero(labels == label)[: 30 - 4 * label] for label in range(len(CLASS_NAMES))])
    parts, biases = Split(uneven, uneven[::9], uneven[:0]), {}
    for balance in ("none", "logits"):
        plan = replace(WITHOUT_TEACHER, models={"cnn": replace(QUICK, epochs=1, class_balance=balance)})
        settings = {"plan": plan, "names": ("cnn",), "accelerator": Accelerator(), "progress": False}
        biases[balance] = train_models(cells_to_train_on, parts, tmp_path / balance, **settings)["cnn"].head.bias
    frequency = np.bincount(labels[uneven]) / len(uneven)
    np.testing.assert_allclose((biases["none"] - biases["logits"]).detach(), np.log(frequency), atol=1e-5)


def test_cells_are_repeated_until_every_pattern_has_as_many():
    labels = torch.tensor([5, 0, 0, 1, 2, 2, 2, 3, 4, 5])
    repeated = repeated_evenly(labels)
    assert labels[repeated].bincount().tolist() == [3] * 6
    assert set(repeated.tolist()) == set(range(10))


@pytest.mark.parametrize(
    "dataset, message",
    [("synthetic:2", "too few for the protocol"), ("synthetic:15", "5 validation cells of each class.*--models")],
)
def test_a_dataset_too_small_is_told_before_training(dataset, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(load_cells(dataset), tmp_path / "run", accelerator=InterruptingAccelerator(0))
    assert not (tmp_path / "run").exists()


def test_a_pattern_without_cells_is_told_before_training(synthetic_cells, tmp_path):
    kept = (synthetic_cells.labels != CLASS_NAMES.index("Golgi")).nonzero()[:, 0].tolist()
    without = Cells(
        images=synthetic_cells.images[kept],
        labels=synthetic_cells.labels[kept],
        names=tuple(synthetic_cells.names[position] for position in kept),
        digests=tuple(synthetic_cells.digests[position] for position in kept),
        source="five patterns",
    )
    with pytest.raises(ValueError, match="five patterns: no cell of Golgi to train on"):
        run(without, tmp_path / "run", names=("cnn",))


def test_evaluate_measures_what_the_run_did_and_no_cell_it_has_seen(
    trained, cells_to_train_on, tmp_path, without_figures
):
    weights = load_classifier(trained)
    assert evaluate(weights, cells_to_train_on, tmp_path) == read_json(trained / "metrics.json")
    assert (tmp_path / "predictions.csv").read_bytes() == (trained / "predictions.csv").read_bytes()
    for wrong in ({"protocol": "reference"}, {"seed": 1}):
        with pytest.raises(ValueError, match="test cells were used to train the weights"):
            evaluate(weights, cells_to_train_on, tmp_path, **wrong)
    # Of other cells it cannot be told.
    other = evaluate(weights, load_cells("synthetic:12"), tmp_path / "other", seed=1)
    assert other["dataset_fingerprint"] != other["trained_on_fingerprint"]


def test_held_out_examples_are_test_cells_as_they_were_published(trained, cells_to_train_on, synthetic_cells):
    weights = load_classifier(trained)
    examples = held_out_examples(weights, cells_to_train_on, "synthetic:40", count=2)
    test = {cells_to_train_on.names[position] for position in split(cells_to_train_on, "deduplicated", 0).test}
    assert set(examples) <= test
    assert sorted(pattern for pattern, _ in examples.values()) == sorted(2 * CLASS_NAMES)
    (answer,) = Predictor(weights, "cpu").classify([next(iter(examples.values()))[1]])
    position = cells_to_train_on.names.index(next(iter(examples)))
    torch.testing.assert_close(torch.from_numpy(answer.cell.pixels), cells_to_train_on.images[position])
    with pytest.raises(ValueError, match="not on synthetic:12: give that dataset"):
        held_out_examples(weights, synthetic_cells, "synthetic:12")
