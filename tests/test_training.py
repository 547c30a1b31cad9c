import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import Interrupted, InterruptingAccelerator
from torch import nn

from hep2.augmentation import Augmentation
from hep2.checkpoints import write_atomically
from hep2.data import Cells
from hep2.losses import AuxiliarySpecimenLoss, Batch, CrossEntropy, Examples, loss_and_accuracy
from hep2.patterns import CLASS_NAMES
from hep2.recipes import WIDE, Recipe
from hep2.teacher import Teachers
from hep2.training import fit, weights_of_specimens

RECIPE = Recipe(
    epochs=3, batch_size=8, optimizer="adamw", learning_rate=0.01, augmentation=Augmentation(), ema_decay=0.9
)
STAINED = replace(RECIPE, augmentation=Augmentation(nuclear_stain=0.5), class_balance="specimens")
DISTILLED = replace(RECIPE, augmentation=WIDE, mix_up=True, schedule="one-cycle", gradient_norm=1.0)
# No later epoch is better by 100, so the first stays the best and two more are waited for.
STOPPED_EARLY = replace(RECIPE, epochs=10, patience=2, min_delta=100.0, ema_decay=None)
PLAIN = replace(RECIPE, augmentation=None, ema_decay=None)


def small_model(seed: int = 0, dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(seed)
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(convolution, nn.Dropout(dropout), nn.Flatten(), nn.Linear(4 * 19 * 19, 6))


def half(cells: Cells, start: int) -> Examples:
    labels = cells.labels[start::2]
    specimens = 2 * labels + (torch.arange(len(labels)) % 3 == 0)  # two a class, one of them twice as large
    diffuse = (labels == CLASS_NAMES.index("Homogeneous")).nonzero()[:, 0]
    return Examples(cells.images[start::2], labels, specimens, diffuse)


def some_teacher() -> nn.Module:
    return Teachers([small_model(7).eval(), small_model(8).eval()])


def run(
    cells: Cells, folder: Path, recipe: Recipe = RECIPE, models: dict | None = None, **options
) -> tuple[dict[str, nn.Module], dict[str, list[dict]]]:
    """Train on one half of the cells, and measure on the other."""
    models = models or {"first": small_model(0), "second": small_model(1)}
    settings = {"directory": folder / "run", "seed": 0, "accelerator": Accelerator(), "progress": False} | options
    return models, fit(models, half(cells, 0), half(cells, 1), recipe, **settings)


def run_on_vectors(folder: Path, examples: Examples, recipe: Recipe = PLAIN, **options) -> list[dict]:
    """Train one linear layer, as the stack is."""
    settings = {"directory": folder / "run", "seed": 0, "accelerator": Accelerator(), "progress": False} | options
    model = nn.Sequential(nn.Linear(examples.inputs.shape[1], 6))
    return fit({"linear": model}, examples, examples, replace(recipe, epochs=1), **settings)["linear"]


def vectors() -> Examples:
    return Examples(torch.rand(24, 12, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 6)


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("balance", ["none", "specimens"])
def test_fit_learns_and_logs_every_epoch_of_each_model(balance, synthetic_cells, tmp_path):
    _, histories = run(synthetic_cells, tmp_path, replace(RECIPE, epochs=15, class_balance=balance, augmentation=None))
    assert list(histories) == ["first", "second"]
    for name, history in histories.items():
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in log] == history
        assert [record["epoch"] for record in history] == list(range(1, 16))
        assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
        assert history[-1]["validation_accuracy"] > 0.3  # by chance, a sixth
        assert all(record["images_per_second"] > 0 for record in history)


@pytest.mark.parametrize(
    "recipe, teacher",
    [(RECIPE, None), (STAINED, None), (DISTILLED, some_teacher), (STOPPED_EARLY, None)],
    ids=["plain", "stained", "distilled", "stopped early"],
)
def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(recipe, teacher, synthetic_cells, tmp_path):
    def train(folder: str, accelerator: Accelerator) -> tuple[dict[str, nn.Module], dict[str, list[dict]]]:
        models = {"only": small_model(0)} if recipe.patience else {"first": small_model(0), "second": small_model(1)}
        return run(synthetic_cells, tmp_path / folder, recipe, models, teacher=teacher, accelerator=accelerator)

    whole, histories = train("whole", Accelerator())
    an_epoch = 4 * len(whole)  # 36 cells in batches of 8
    for steps in (an_epoch - 1, an_epoch + 1, 1, an_epoch + 2):  # in the first epoch, the second, again, the third
        with pytest.raises(Interrupted):
            train("killed", InterruptingAccelerator(steps))
    killed, same = train("killed", Accelerator())
    for name in whole:
        assert_same_weights(whole[name], killed[name])
        losses = [[(r["train_loss"], r["validation_loss"]) for r in h[name]] for h in (histories, same)]
        assert losses[0] == losses[1]


def test_fit_of_a_finished_run_changes_nothing_and_asks_for_no_teacher(synthetic_cells, tmp_path):
    def no_teacher() -> nn.Module:
        raise AssertionError("the teacher was asked for")

    first, histories = run(synthetic_cells, tmp_path, DISTILLED, teacher=some_teacher)
    again, same = run(synthetic_cells, tmp_path, DISTILLED, teacher=no_teacher)
    assert same == histories
    for name in first:
        assert_same_weights(first[name], again[name])
        assert not again[name].training


def test_a_run_killed_behind_its_last_epoch_asks_for_no_teacher(synthetic_cells, tmp_path, monkeypatch):
    calls = []

    def kill_at_the_end(path: Path, data: bytes) -> None:
        calls.append(path.name)
        if calls.count("checkpoint.pt") > DISTILLED.epochs:
            raise Interrupted
        write_atomically(path, data)

    def teacher() -> nn.Module:
        calls.append("teacher")
        return some_teacher()

    monkeypatch.setattr("hep2.training.write_atomically", kill_at_the_end)
    with pytest.raises(Interrupted):
        run(synthetic_cells, tmp_path, DISTILLED, teacher=teacher)
    monkeypatch.undo()
    _, histories = run(synthetic_cells, tmp_path, DISTILLED, teacher=teacher)
    assert len(histories["first"]) == DISTILLED.epochs
    assert calls.count("teacher") == 1


def test_fit_writes_the_log_that_a_run_killed_at_its_end_has_left_out(synthetic_cells, tmp_path):
    _, histories = run(synthetic_cells, tmp_path)
    log = tmp_path / "second" / "log.jsonl"
    log.unlink()
    run(synthetic_cells, tmp_path)
    assert [json.loads(line) for line in log.read_text().splitlines()] == histories["second"]


def test_models_side_by_side_are_trained_as_each_would_be_alone(synthetic_cells, tmp_path):
    def models() -> dict[str, nn.Module]:
        return {"first": small_model(0, dropout=0), "second": small_model(1, dropout=0)}

    together, _ = run(synthetic_cells, tmp_path / "together", models=models())
    alone, _ = run(synthetic_cells, tmp_path / "alone", models={"second": models()["second"]})
    assert_same_weights(together["second"], alone["second"])


@pytest.mark.parametrize(
    "changed, what",
    [
        ({"seed": 1}, "seed"),
        ({"recipe": replace(RECIPE, learning_rate=0.1)}, "recipe"),
        ({"models": {"first": small_model(0)}}, "models"),
        ({"models": {"first": small_model(0), "second": nn.Sequential(nn.Flatten(), nn.Linear(78 * 78, 6))}}, "models"),
        ({"computed_from": "other cells"}, "examples"),
        ({"losses": {"first": CrossEntropy(0.1)}}, "losses"),
        ({"taught_by": "another"}, "teacher"),
    ],
)
def test_fit_takes_no_directory_of_another_run(changed, what, synthetic_cells, tmp_path):
    run(synthetic_cells, tmp_path, replace(RECIPE, epochs=1))
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    settings = {"recipe": RECIPE} | changed
    settings["recipe"] = replace(settings["recipe"], epochs=1)
    with pytest.raises(ValueError, match=rf"another run \(another {what}\); give another --output, or delete it"):
        run(synthetic_cells, tmp_path, **settings)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e._replace(inputs=e.inputs.roll(1, dims=1)),  # as many, of the same mean
        lambda e: e._replace(labels=e.labels.flip(0)),
        lambda e: e._replace(specimens=torch.arange(24) % 12),
    ],
)
def test_fit_tells_examples_by_their_content(change, tmp_path):
    examples = vectors()._replace(specimens=torch.arange(24) % 6)
    run_on_vectors(tmp_path, examples)
    with pytest.raises(ValueError, match=r"another run \(another examples\)"):
        run_on_vectors(tmp_path, change(examples))


def test_fit_goes_on_with_examples_of_one_name_that_another_machine_has_rounded_otherwise(tmp_path):
    examples = vectors()
    history = run_on_vectors(tmp_path, examples, computed_from="members")
    rounded = examples._replace(inputs=examples.inputs * (1 + 1e-6))
    assert run_on_vectors(tmp_path, rounded, computed_from="members") == history


def test_fit_stops_early_and_keeps_the_best_weights(synthetic_cells, tmp_path):
    stopped, histories = run(synthetic_cells, tmp_path / "stopped", STOPPED_EARLY, {"only": small_model()})
    assert len(histories["only"]) == 3
    first = replace(STOPPED_EARLY, epochs=1, patience=None)
    best, _ = run(synthetic_cells, tmp_path / "first", first, {"only": small_model()})
    assert_same_weights(stopped["only"], best["only"])
    with pytest.raises(ValueError, match="one by one"):
        run(synthetic_cells, tmp_path / "two", STOPPED_EARLY)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_fit_measures_the_weights_that_it_keeps(decay, synthetic_cells, tmp_path):
    models, histories = run(synthetic_cells, tmp_path, replace(RECIPE, ema_decay=decay))
    for name, model in models.items():
        loss, accuracy = loss_and_accuracy(model, half(synthetic_cells, 1))
        assert histories[name][-1]["validation_loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert histories[name][-1]["validation_accuracy"] == pytest.approx(accuracy.item(), abs=1e-4)


def test_averaged_weights_are_kept_and_trained_on_as_without(synthetic_cells, tmp_path):
    plain, without = run(synthetic_cells, tmp_path / "plain", replace(RECIPE, ema_decay=None))
    averaged, with_average = run(synthetic_cells, tmp_path / "averaged")
    for name in plain:
        assert [r["train_loss"] for r in without[name]] == [r["train_loss"] for r in with_average[name]]
        assert not torch.equal(plain[name][-1].weight, averaged[name][-1].weight)


def test_fit_stops_when_the_loss_is_not_finite(synthetic_cells, tmp_path):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        run(synthetic_cells, tmp_path, replace(RECIPE, optimizer="sgd", learning_rate=1e30, ema_decay=None))


def test_learning_rates_rise_and_fall_and_each_model_has_its_own(synthetic_cells, tmp_path):
    recipe = replace(RECIPE, epochs=4, schedule="one-cycle", warm_up=0.5, learning_rate_scale={"second": 0.1})
    _, histories = run(synthetic_cells, tmp_path, recipe)
    first, second = ([record["learning_rate"] for record in history] for history in histories.values())
    assert first[0] < first[1] < recipe.learning_rate
    assert first[1] > first[2] > first[3]
    assert second == pytest.approx([rate / 10 for rate in first])


def test_rotations_show_each_cell_six_times(synthetic_cells, tmp_path):
    seen = []

    class Watching(nn.Linear):
        def forward(self, inputs):
            if self.training:
                seen.append(len(inputs))
            return super().forward(inputs.flatten(1))

    run(synthetic_cells, tmp_path, replace(PLAIN, epochs=1, rotations=True), {"only": Watching(78 * 78, 6)})
    assert sum(seen) == 6 * len(synthetic_cells.labels[::2])
    assert set(seen) == {8}


@pytest.mark.parametrize(
    "recipe, missing",
    [
        (STAINED, "`diffuse`"),
        (replace(RECIPE, class_balance="specimens"), "`specimens`"),
        (replace(RECIPE, auxiliary_specimen_loss=True), "`specimens`"),
    ],
)
def test_fit_says_which_part_of_the_examples_is_missing(recipe, missing, synthetic_cells, tmp_path):
    part = half(synthetic_cells, 0)._replace(diffuse=None, specimens=None)
    settings = {"directory": tmp_path / "run", "seed": 0, "accelerator": Accelerator()}
    with pytest.raises(ValueError, match=missing):
        fit({"only": small_model()}, part, part, recipe, **settings)
    assert not (tmp_path / "run").exists()


def test_drawn_evenly_classes_weigh_the_same_and_so_do_the_specimens_of_a_class():
    weights = weights_of_specimens(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 2]))
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.25, 0.5, 1.0], dtype=torch.float64))


class Brightness(nn.Module):
    """Classify an image by how bright its nine parts are, beside those of others."""

    def __init__(self, others: torch.Tensor) -> None:
        super().__init__()
        parts = F.avg_pool2d(others, 26).flatten(1)
        self.register_buffer("mean", parts.mean(0))
        self.register_buffer("spread", parts.std(0))
        self.head = nn.Linear(9, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head((F.avg_pool2d(images, 26).flatten(1) - self.mean) / self.spread)


def test_a_student_learns_its_teachers_answers_and_not_the_labels(synthetic_cells, tmp_path):
    torch.manual_seed(0)
    network, student = Brightness(synthetic_cells.images), Brightness(synthetic_cells.images)
    nn.init.normal_(network.head.weight)
    teacher = Teachers([network])
    recipe = replace(PLAIN, epochs=60, batch_size=12, learning_rate=0.05, schedule="one-cycle", mix_up=True)
    train = half(synthetic_cells, 0)
    train = train._replace(labels=train.labels.flip(0))
    settings = {"directory": tmp_path / "run", "seed": 0, "accelerator": Accelerator(), "progress": False}
    fit({"student": student}, train, half(synthetic_cells, 1), recipe, teacher=lambda: teacher, **settings)
    with torch.no_grad():
        expected, learned = teacher(train.inputs), student(train.inputs).softmax(1)
    assert len(expected.argmax(1).unique()) > 3
    assert (expected.argmax(1) == learned.argmax(1)).float().mean() > 0.8
    assert (expected - learned).abs().mean() < 0.05


class Vectors(nn.Module):
    """What a loss asks of a model, for inputs that are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 6)

    def forward_features(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.forward_features(inputs)))


def test_the_auxiliary_loss_tells_specimens_apart_and_leaves_the_model_six_classes(tmp_path):
    specimens = torch.arange(96) % 12
    noise = 0.1 * torch.randn(96, 12, generator=torch.Generator().manual_seed(0))
    examples = Examples(F.one_hot(specimens, 12) + noise, specimens // 2, specimens)
    model, loss = Vectors(12), AuxiliarySpecimenLoss(torch.arange(12) // 2, 12)
    recipe = replace(PLAIN, epochs=30, learning_rate=0.05, auxiliary_specimen_loss=True)
    settings = {"directory": tmp_path / "run", "seed": 0, "accelerator": Accelerator(), "progress": False}
    fit({"model": model}, examples, examples, recipe, losses={"model": loss}, **settings)
    with torch.no_grad():
        logits, of_specimens = model(examples.inputs), loss.specimens(examples.inputs)
    assert logits.shape == (96, 6)
    assert torch.equal(logits.argmax(1), examples.labels)
    told = of_specimens.view(96, 6, 2)[torch.arange(96), examples.labels].argmax(1)
    assert torch.equal(told, specimens % 2)


def test_the_auxiliary_loss_of_a_head_that_knows_nothing_is_the_classes_and_an_even_guess():
    batch = Batch(torch.randn(8, 12), torch.arange(8) % 6, 2 * (torch.arange(8) % 6), None)
    model, loss = Vectors(12), AuxiliarySpecimenLoss(torch.arange(12) // 2, 12)
    nn.init.zeros_(loss.specimens.weight)
    nn.init.zeros_(loss.specimens.bias)
    value, logits = loss(model, batch)
    torch.testing.assert_close(logits, model(batch.inputs))
    torch.testing.assert_close(value, F.cross_entropy(logits, batch.labels) + math.log(2))


def test_cross_entropy_is_with_the_labels_or_with_a_teachers_probabilities():
    model, inputs, labels = Vectors(12), torch.randn(8, 12), torch.arange(8) % 6
    smoothed, logits = CrossEntropy(0.1)(model, Batch(inputs, labels, None, None))
    torch.testing.assert_close(smoothed, nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels))
    targets = torch.rand(8, 6).softmax(1)
    matched, logits = CrossEntropy(0.1)(model, Batch(inputs, labels, None, targets))
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    np.testing.assert_allclose(matched.item(), expected.item(), rtol=1e-5)
