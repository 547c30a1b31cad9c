import numpy as np
import pytest
from accelerate import Accelerator

from hep2.data import CellFile, Cells, blocks_of, cells_from_files, specimen_blocks, split
from hep2.evaluation import expected_calibration_error
from hep2.files import read_json
from hep2.patterns import CLASS_NAMES
from hep2.phantoms import phantom_cell
from hep2.pipeline import train_models
from hep2.specimens import (
    evaluate_specimens,
    nearest_neighbours,
    read_blocks,
    read_predictions,
    recalibrated,
    simple_features,
    specimens_table,
)


@pytest.fixture(scope="module")
def cells() -> Cells:
    """Four phantoms of each block's class under IDs of the block: a dataset with specimens."""
    random = np.random.default_rng(0)
    files = [
        CellFile(f"{block.first + number:05}.png", phantom_cell(block.class_name, random), block.class_name, "train")
        for block in specimen_blocks()
        for number in range(4)
    ]
    return cells_from_files(files, source="phantoms of specimens")


def test_read_blocks_takes_the_mean_of_a_blocks_cells(cells):
    block = blocks_of(cells)
    answers = np.eye(6)[cells.labels]
    assert read_blocks(answers, block) == {"accuracy": 1.0, "right": 73, "total": 73, "wrong": []}
    # One of four cells that is sure of another class turns no block; three do.
    golgi = CLASS_NAMES.index("Golgi")
    first = np.flatnonzero(block == 0)
    answers[first[:1]] = np.eye(6)[golgi]
    assert read_blocks(answers, block)["right"] == 73
    answers[first[:3]] = np.eye(6)[golgi]
    result = read_blocks(answers, block)
    assert result["right"] == 72
    assert result["wrong"] == [{"block": specimen_blocks()[0].name, "verdict": "Golgi", "cells": 4}]


def test_recalibrated_learns_from_the_other_folds_alone():
    random = np.random.default_rng(0)
    labels = [random.integers(0, 6, 400) for _ in range(4)]
    # Right in eight of ten, and sure of it: too sure by far.
    said = [np.where(random.random(400) < 0.8, own, (own + 1) % 6) for own in labels]
    answers = [np.eye(6)[verdicts] * 0.994 + 0.001 for verdicts in said]
    values, temperatures = recalibrated(answers, labels)
    every = np.concatenate(labels)
    assert expected_calibration_error(np.concatenate(answers), every) > 0.15
    assert expected_calibration_error(values, every) < 0.03
    assert (values.argmax(1) == np.concatenate(said)).all()
    # What a fold's own labels are changes nothing for it.
    changed = [labels[0][::-1], *labels[1:]]
    again, others = recalibrated(answers, changed)
    assert others[0] == temperatures[0]
    assert others[1:] != temperatures[1:]
    np.testing.assert_array_equal(again[:400], values[:400])


def test_simple_features_do_not_change_by_turning(cells):
    images = cells.images[:5, 0].numpy()
    features = simple_features(images)
    assert features.shape == (5, 52)
    np.testing.assert_allclose(simple_features(np.rot90(images, axes=(1, 2))), features, atol=0.02)


def test_nearest_neighbours_tell_the_patterns_apart(cells):
    features = simple_features(cells.images[:, 0].numpy())
    result = nearest_neighbours(features, cells.labels.numpy(), [split(cells, "specimen", 0, 1)])
    assert result["mean_class_accuracy"] > 0.5


def test_evaluate_specimens_trains_every_fold_once_and_goes_on(cells, few_refusals, tmp_path, monkeypatch):
    options = {"names": ("cnn",), "recipe": "robust", "changes": {"epochs": 1}, "progress": False}
    options["accelerator"] = Accelerator(cpu=True)
    result = evaluate_specimens(cells, tmp_path, **options)
    assert result == read_json(tmp_path / "metrics.json")
    assert len(result["per_fold"]) == 4
    tested = [len(read_predictions(tmp_path / f"fold-{fold}" / "predictions.csv")["cnn"]) for fold in range(4)]
    assert sum(tested) == len(cells)
    assert sum(row["support"] for row in result["models"]["cnn"]["per_class"].values()) == len(cells)
    assert result["blocks"]["cnn"]["total"] == 73
    assert "specimens right" in specimens_table(result)
    assert sum(row["cells"] for row in result["recalibrated"]["cnn"]["reliability"]) == len(cells)
    assert (tmp_path / "reliability_recalibrated_cnn.png").is_file()
    # Killed while it measures a fold, it measures that fold again.
    (tmp_path / "fold-1" / "metrics.json").unlink()
    (tmp_path / "fold-1" / "predictions.csv").write_text("file,label\n")
    assert evaluate_specimens(cells, tmp_path, **options) == result
    # A second call finds everything done.
    monkeypatch.setattr("hep2.specimens.evaluate_weights", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("hep2.training._Run.train_epoch", lambda *_: pytest.fail("trained again"))
    assert evaluate_specimens(cells, tmp_path, **options) == result


def test_training_without_a_cell_of_some_class_names_the_class(tmp_path):
    random = np.random.default_rng(1)
    files = [
        CellFile(f"{name}-{number}.png", phantom_cell(name, random), name, "train")
        for name in CLASS_NAMES
        if name != "Speckled"
        for number in range(10)
    ]
    lacking = cells_from_files(files, source="five patterns")
    with pytest.raises(ValueError, match="five patterns: no cell of Speckled to train on"):
        train_models(lacking, tmp_path, names=("cnn",), accelerator=Accelerator(cpu=True))
