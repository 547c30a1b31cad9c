"""`benchmarks.held_out_specimens`, and `benchmarks.experiments`, on cells with the IDs of the published ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL

from benchmarks import experiments, held_out_specimens
from benchmarks.common import count_blocks, make_accelerator, shifted
from benchmarks.held_out_specimens import main, nearest_neighbours, simple_features
from hep2.checkpoints import read_json
from hep2.data import Cells, blocks_of, load_cells, specimen_blocks, split
from hep2.models import MODELS
from hep2.patterns import CLASS_NAMES
from hep2.recipes import RECIPES, Plan, Recipe

SHORT = Recipe(epochs=1, batch_size=64, optimizer="adamw", learning_rate=1e-3)
PLAN = Plan(models=dict.fromkeys(MODELS, SHORT), architectures=SMALL)


@pytest.fixture(scope="module")
def cells() -> Cells:
    """Some cells of each block, under IDs of the block: a dataset with specimens, of few drawings with little noise."""
    drawn, generator = load_cells("synthetic:3"), torch.Generator().manual_seed(0)
    names, labels = [], []
    for block in specimen_blocks():
        # Enough of each for validation, where Golgi has but three specimens.
        count = 20 if block.class_name == "Golgi" else 10
        names += [f"{block.first + number:05}.png" for number in range(count)]
        labels += [CLASS_NAMES.index(block.class_name)] * count
    chosen = torch.tensor(labels) * 3 + torch.arange(len(labels)) % 3
    images = drawn.images[drawn.labels.argsort(stable=True)][chosen]
    images = (images + 0.02 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return Cells(
        images=images, labels=torch.tensor(labels), names=tuple(names), digests=tuple(names), source="drawn specimens"
    )


def test_count_blocks_takes_the_mean_of_a_blocks_cells(cells):
    blocks = blocks_of(cells)
    answers = np.eye(6)[cells.labels]
    assert count_blocks(answers, blocks) == {"accuracy": 1.0, "right": 73, "total": 73, "wrong": []}
    # A minority that is sure of another class turns no block; a majority does.
    first = np.flatnonzero(blocks == 0)
    other = "Golgi" if specimen_blocks()[0].class_name != "Golgi" else "Speckled"
    answers[first[: len(first) // 2 - 1]] = np.eye(6)[CLASS_NAMES.index(other)]
    assert count_blocks(answers, blocks)["right"] == 73
    answers[first[:-1]] = np.eye(6)[CLASS_NAMES.index(other)]
    result = count_blocks(answers, blocks)
    assert result["right"] == 72
    assert result["wrong"] == [{"block": specimen_blocks()[0].name, "verdict": other, "cells": len(first)}]


def test_simple_features_do_not_change_by_turning(cells):
    images = cells.images[:5, 0].numpy()
    features = simple_features(images)
    assert features.shape == (5, 52)
    np.testing.assert_allclose(simple_features(np.rot90(images, axes=(1, 2))), features, atol=0.02)


def test_nearest_neighbours_tell_the_patterns_apart(cells):
    features = simple_features(cells.images[:, 0].numpy())
    result = nearest_neighbours(features, cells.labels.numpy(), [split(cells, "specimen", 0, 1)])
    assert result["mean_class_accuracy"] > 0.9


def test_shifted_images_depend_on_the_seed_alone(cells):
    images = cells.images[:5].clone()
    once = shifted(images)
    torch.testing.assert_close(shifted(images), once, rtol=0, atol=0)
    torch.testing.assert_close(images, cells.images[:5], rtol=0, atol=0)  # the given ones stay what they are
    assert not torch.equal(shifted(images, seed=1), once)


@pytest.mark.slow
def test_main_trains_every_fold_once_and_measures_all_cells_twice(cells, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "default", PLAN)
    monkeypatch.setattr(held_out_specimens, "load_cells", lambda dataset: cells)
    monkeypatch.setattr(held_out_specimens, "fit_rejection", lambda *_: {})
    monkeypatch.setattr("hep2.pipeline.save_figure", lambda *_: None)
    command = ["--output", str(tmp_path)]
    assert main([*command, "--folds", "0", "2"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fold-0", "fold-2"]
    assert main(command) == 0
    assert "| specimens right, shifted |" in capsys.readouterr().out
    result = read_json(tmp_path / "metrics.json")
    assert (result["folds"], result["seed"], result["recipe"]) == (4, 0, "default")
    for part in (result, result["shifted"]):
        assert len(part["per_fold"]) == 4
        assert sum(row["support"] for row in part["models"]["cnn"]["per_class"].values()) == len(cells)
        assert part["blocks"]["ensemble"]["total"] == 73
        assert part["rejected"] == 0.0
    assert result["nearest_neighbours"]["specimen"]["mean_class_accuracy"] > 0.9
    for file in ("predictions.csv", "shifted/predictions.csv"):
        assert len((tmp_path / file).read_text().splitlines()) == 1 + len(cells)
    assert (tmp_path / "reliability_ensemble.png").is_file()
    # A second call finds everything done.
    monkeypatch.setattr(held_out_specimens, "train", lambda *_, **__: pytest.fail("trained again"))
    assert main([*command, "--folds", "0", "1", "2", "3"]) == 0
    # Weights of another recipe are not taken for those asked for.
    other = replace(PLAN, models=PLAN.models | {"vit": replace(SHORT, learning_rate=2e-3)})
    assert held_out_specimens.is_finished(tmp_path / "fold-0", cells, PLAN, "default", 0)
    assert not held_out_specimens.is_finished(tmp_path / "fold-0", cells, other, "default", 0)


def test_experiments_hold_out_a_fold_and_leave_another_alone(cells):
    folds = np.array([block.fold for block in specimen_blocks()])[blocks_of(cells)]
    for part, trained in (("1", {2, 3}), ("3", {0, 1})):
        known, held_out = experiments.divide(cells, part)
        assert set(folds[known]) == trained
        assert set(folds[held_out]) == {int(part)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [("no teacher", "1"), ("class weights", "random"), ("focal loss", "random")])
def test_experiments_run_once_and_measure_both_views(name, part, cells, tmp_path, monkeypatch):
    change = experiments.EXPERIMENTS[name]
    plan = replace(experiments.plan_of(change, epochs=1), architectures=SMALL)
    arguments = (cells, part, change, plan, tmp_path, {}, 0, make_accelerator())
    row = experiments.run(*arguments)
    assert set(row) == {"cnn", "rescnn", "vit", "mean"}
    assert len(row["mean"]["accuracy"]) == 2
    assert row["mean"]["specimens"] == (None if part == "random" else row["mean"]["specimens"])
    monkeypatch.setattr(experiments, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert experiments.run(*arguments) == row


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_experiment_has_a_plan_of_its_own(name):
    change = experiments.EXPERIMENTS[name]
    others = [other for other in experiments.EXPERIMENTS.values() if other != change]
    assert len(others) == len(experiments.EXPERIMENTS) - 1
    plan = experiments.plan_of(change)
    assert tuple(plan.teachers) == change.teachers
    assert not (change.loss and change.teachers)  # a teacher's answers leave the loss no choice


def test_losses_against_the_imbalance_weigh_rare_and_unsure_cells_more():
    labels = torch.tensor([0, 0, 0, 1])
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    batch = experiments.Batch(logits, labels, None, None)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    weighted, _ = experiments.WeightedLoss(labels)(torch.nn.Identity(), batch)
    assert weighted > plain
    focal, _ = experiments.FocalLoss()(torch.nn.Identity(), batch)
    sure, _ = experiments.FocalLoss()(torch.nn.Identity(), batch._replace(labels=torch.zeros(4, dtype=torch.int64)))
    assert sure < 0.1 * focal
