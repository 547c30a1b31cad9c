import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT
from torch import nn

import train
from hep2.models import SpecimenSupervision, build_model
from hep2.patterns import CLASS_NAMES
from hep2.recipes import ARCHITECTURES, RECIPES
from hep2.training import (
    Examples,
    Recipe,
    _learning_rate,
    _weights_of_specimens,
    cutmix,
    fit,
    focal_loss,
    in_epoch,
    write_atomically,
)

RECIPE = Recipe(epochs=3, batch_size=8, optimizer="adamw", learning_rate=0.01, augmentation="tuned", ema_decay=0.9)
STAINED = replace(RECIPE, nuclear_stain=0.5, class_balance="specimens")
HOMOGENEOUS = CLASS_NAMES.index("Homogeneous")


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.LazyLinear(6)
    )


def examples(cells, start: int, step: int) -> Examples:
    labels = cells.labels[start::step]
    specimens = 2 * labels + (torch.arange(len(labels)) % 3 == 0)  # two a class, one of them twice as large
    return Examples(cells.images[start::step], labels, specimens, (labels == HOMOGENEOUS).nonzero()[:, 0])


def run(cells, directory, recipe=RECIPE, seed=0, model=None) -> tuple[nn.Module, list[dict]]:
    model = model or small_model()
    model(cells.images[:2])
    history = fit(
        model,
        examples(cells, 0, 2),
        examples(cells, 1, 2),
        recipe,
        directory=directory,
        seed=seed,
        accelerator=Accelerator(),
        progress=False,
    )
    return model, history


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("balance", ["none", "weights", "sampling", "specimens"])
def test_fit_learns_and_logs_every_epoch(balance, phantoms, tmp_path):
    recipe = replace(RECIPE, epochs=15, class_balance=balance, augmentation="none")
    _, history = run(phantoms, tmp_path, recipe)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == history
    assert [record["epoch"] for record in history] == list(range(1, 16))
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert history[-1]["validation_accuracy"] > 0.5
    assert set(history[0]) == {
        "epoch",
        "train_loss",
        "train_accuracy",
        "validation_loss",
        "validation_accuracy",
        "learning_rate",
        "images_per_second",
        "seconds",
    }


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("recipe", [RECIPE, STAINED])
def test_fit_goes_on_where_it_was_stopped_with_the_same_weights_bit_for_bit(
    recipe, kept, phantoms, tmp_path, monkeypatch
):
    whole, history = run(phantoms, tmp_path / "whole", recipe)

    class Stopped(Exception):
        pass

    def stop_later(path, data):
        write_atomically(path, data)
        if path.name == "log.jsonl" and len(data.splitlines()) > kept:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("hep2.training.write_atomically", stop_later)
        run(phantoms, tmp_path / "parts", recipe)
    resumed, resumed_history = run(phantoms, tmp_path / "parts", recipe)
    assert_same_weights(whole, resumed)
    assert [r["train_loss"] for r in resumed_history] == [r["train_loss"] for r in history]


def test_fit_of_a_finished_run_changes_nothing(phantoms, tmp_path):
    first, history = run(phantoms, tmp_path)
    again, same_history = run(phantoms, tmp_path)
    assert_same_weights(first, again)
    assert same_history == history


def test_fit_writes_the_log_that_a_run_killed_at_its_end_has_left_out(phantoms, tmp_path):
    _, history = run(phantoms, tmp_path)
    (tmp_path / "log.jsonl").unlink()
    run(phantoms, tmp_path)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == history


def test_fit_under_a_constant_rate_can_be_made_longer(phantoms, tmp_path):
    whole, _ = run(phantoms, tmp_path / "whole")
    run(phantoms, tmp_path / "parts", replace(RECIPE, epochs=1))
    longer, history = run(phantoms, tmp_path / "parts")
    assert_same_weights(whole, longer)
    assert len(history) == 3
    run(phantoms, tmp_path / "cycle", replace(RECIPE, epochs=1, schedule="one-cycle"))
    with pytest.raises(ValueError, match=r"another run \(another recipe\)"):
        run(phantoms, tmp_path / "cycle", replace(RECIPE, schedule="one-cycle"))


def test_fit_takes_no_other_examples_for_those_it_has_seen(phantoms, tmp_path):
    # As two members' probabilities for the stack are: other rows, of the same number and mean.
    recipe = replace(RECIPE, augmentation="none", epochs=1)
    inputs, labels = torch.rand(24, 12), torch.arange(24) % 6
    model = nn.Sequential(nn.Linear(12, 6))
    options = {"directory": tmp_path, "seed": 0, "accelerator": Accelerator(), "progress": False}
    fit(model, Examples(inputs, labels), Examples(inputs, labels), recipe, **options)
    other = inputs.roll(1, dims=1)
    with pytest.raises(ValueError, match="another run \\(another examples\\)"):
        fit(model, Examples(other, labels), Examples(other, labels), recipe, **options)


def test_fit_takes_no_other_specimens_for_those_it_has_seen(tmp_path):
    recipe = replace(RECIPE, augmentation="none", epochs=1, class_balance="specimens")
    inputs, labels = torch.rand(24, 12), torch.arange(24) % 6
    model = nn.Sequential(nn.Linear(12, 6))
    options = {"directory": tmp_path, "seed": 0, "accelerator": Accelerator(), "progress": False}
    examples = Examples(inputs, labels, specimens=labels)
    fit(model, examples, examples, recipe, **options)
    other = examples._replace(specimens=torch.arange(24) % 12)
    with pytest.raises(ValueError, match="another run \\(another examples\\)"):
        fit(model, other, other, recipe, **options)


def test_fit_refuses_style_mixing_where_there_are_no_convolutions(tmp_path):
    examples = Examples(torch.rand(24, 12), torch.arange(24) % 6)
    options = {"directory": tmp_path, "seed": 0, "accelerator": Accelerator(), "progress": False}
    recipe = replace(RECIPE, augmentation="none", style_mixing=0.5)
    with pytest.raises(ValueError, match="`early_layers`"):
        fit(nn.Sequential(nn.Linear(12, 6)), examples, examples, recipe, **options)


def test_fit_goes_on_with_inputs_that_another_machine_has_rounded_otherwise(tmp_path):
    recipe = replace(RECIPE, augmentation="none", epochs=1)
    inputs, labels = torch.rand(24, 12), torch.arange(24) % 6
    model = nn.Sequential(nn.Linear(12, 6))
    options = {"directory": tmp_path, "seed": 0, "accelerator": Accelerator(), "progress": False}
    history = fit(model, *[Examples(inputs, labels)] * 2, recipe, computed_from="members", **options)
    rounded = Examples(inputs * (1 + 1e-6), labels)
    assert fit(model, rounded, rounded, recipe, computed_from="members", **options) == history
    with pytest.raises(ValueError, match="another run \\(another examples\\)"):
        fit(model, rounded, rounded, recipe, computed_from="others", **options)


def test_fit_measures_in_full_precision_whatever_it_trains_in(phantoms, tmp_path):
    model = small_model()
    model(phantoms.images[:2])
    train, validation = examples(phantoms, 0, 2), examples(phantoms, 1, 2)
    recipe = replace(RECIPE, epochs=1, ema_decay=None)
    AcceleratorState._reset_state(True)
    options = {"directory": tmp_path, "seed": 0, "progress": False}
    history = fit(
        model, train, validation, recipe, accelerator=Accelerator(cpu=True, mixed_precision="bf16"), **options
    )
    AcceleratorState._reset_state(True)
    loss = nn.functional.cross_entropy(model.eval()(validation.inputs), validation.labels).item()
    assert history[0]["validation_loss"] == pytest.approx(loss, abs=1e-5)


def test_fit_refuses_a_directory_of_another_run(phantoms, tmp_path):
    run(phantoms, tmp_path)
    with pytest.raises(ValueError, match="another run \\(another seed\\)"):
        run(phantoms, tmp_path, seed=1)
    with pytest.raises(ValueError, match="another run \\(another recipe\\)"):
        run(phantoms, tmp_path, replace(RECIPE, learning_rate=0.1))


def test_fit_stops_early_and_keeps_the_best_weights(phantoms, tmp_path):
    # No later epoch is better by 100, so the first stays the best and two more are waited for.
    recipe = replace(RECIPE, epochs=10, patience=2, min_delta=100.0, ema_decay=None)
    model, history = run(phantoms, tmp_path, recipe)
    assert len(history) == 3
    best = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert best["best_epoch"] == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, best["best"][name])


def test_fit_stops_when_the_loss_is_not_finite(phantoms, tmp_path):
    recipe = replace(RECIPE, optimizer="sgd", learning_rate=1e30, ema_decay=None)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        run(phantoms, tmp_path, recipe)


def test_paper_augmentation_shows_each_cell_six_times(phantoms, tmp_path):
    seen = []

    class Watching(nn.Linear):
        def forward(self, inputs):
            if self.training:
                seen.append(len(inputs))
            return super().forward(inputs.flatten(1))

    recipe = replace(RECIPE, epochs=1, augmentation="paper", ema_decay=None)
    run(phantoms, tmp_path, recipe, model=Watching(78 * 78, 6).eval())
    assert sum(seen) == 6 * len(phantoms.labels[::2])
    assert max(seen) - min(seen) <= 1
    assert max(seen) <= 8


def test_a_finish_changes_images_in_the_last_epochs_alone_at_a_second_rise_of_the_learning_rate(phantoms, tmp_path):
    plain = replace(RECIPE, epochs=4, schedule="one-cycle")
    _, first = run(phantoms, tmp_path / "plain", plain)
    longer = replace(plain, epochs=6, finish=1 / 3)
    _, both = run(phantoms, tmp_path / "both", replace(longer, finish_changes={"noise": 0.5}))
    # What came before the finish is a run without one, to the last digit.
    assert [record["train_loss"] for record in both[:4]] == [record["train_loss"] for record in first]
    rates = [record["learning_rate"] for record in both]
    assert rates[3] < rates[4] < rates[0]
    _, other = run(phantoms, tmp_path / "other", longer)
    assert other[3]["train_loss"] == both[3]["train_loss"]
    assert other[4]["train_loss"] != both[4]["train_loss"]


def test_recipes_name_every_model_and_the_paper_recipe_is_the_sources():
    for recipe in RECIPES.values():
        assert list(recipe) == ["cnn", "rescnn", "vit", "ensemble"]
    assert set(ARCHITECTURES) == set(RECIPES)
    for name, decay, patience, epochs in (
        ("cnn", 1e-3, 2, 73),
        ("rescnn", 5e-3, 2, 73),
        ("vit", 1e-3, 2, 20),
        ("ensemble", 1e-3, 1, 20),
    ):
        recipe = RECIPES["paper"][name]
        assert (recipe.optimizer, recipe.learning_rate, recipe.momentum) == ("sgd", 1e-4, 0.4)
        assert (recipe.weight_decay, recipe.patience, recipe.min_delta) == (decay, patience, 1e-3)
        assert (recipe.epochs, recipe.schedule, recipe.label_smoothing, recipe.ema_decay) == (
            epochs,
            "constant",
            0,
            None,
        )


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adam"},
        {"epochs": 0},
        {"batch_size": 1},
        {"learning_rate": 0.0},
        {"share": 1.5},
        {"finish": -0.1},
        {"finish_changes": {"share": 0.5}},
        {"finish_changes": {"epochs": 3}, "finish": 0.5},
        {"focal": 2.0, "class_balance": "weights"},
        {"augmentation": "paper", "class_balance": "sampling"},
        {"specimen_supervision": True, "class_balance": "specimens"},
        {"style_mixing": 0.5, "specimen_supervision": True},
        {"finish_changes": {}, "finish": 0.5},
        {"nuclear_stain": 0.5, "augmentation": "none"},
        {"zoom": 0.3, "augmentation": "paper"},
        {"patience": 0},
    ],
)
def test_recipe_refuses_values_that_do_not_fit(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(RECIPE, **change)


@pytest.mark.parametrize(
    "recipe, missing",
    [
        (replace(RECIPE, nuclear_stain=0.5), "`diffuse`"),
        (replace(RECIPE, finish=0.5, finish_changes={"nuclear_stain": 0.5}), "`diffuse`"),
        (replace(RECIPE, class_balance="specimens"), "`specimens`"),
        (replace(RECIPE, specimen_supervision=True), "`specimens`"),
    ],
)
def test_fit_says_which_part_of_the_examples_is_missing(recipe, missing, phantoms, tmp_path):
    part = examples(phantoms, 0, 2)._replace(diffuse=None, specimens=None)
    with pytest.raises(ValueError, match=missing):
        fit(small_model(), part, part, recipe, directory=tmp_path, seed=0, accelerator=Accelerator(), progress=False)


def test_fit_refuses_a_model_that_cannot_tell_specimens_apart(phantoms, tmp_path):
    with pytest.raises(ValueError, match="SpecimenSupervision"):
        run(phantoms, tmp_path, replace(RECIPE, specimen_supervision=True))


def test_a_finish_without_specimen_supervision_trains_as_if_there_were_none(phantoms, tmp_path):
    class_of_specimen = torch.arange(12) // 2
    recipe = replace(RECIPE, epochs=2, finish=1.0)
    without = replace(recipe, specimen_supervision=True, finish_changes={"specimen_supervision": False})
    trained = []
    for number, changed in enumerate((recipe, without, replace(without, finish=0.5))):
        torch.manual_seed(0)
        model = build_model("cnn", {"widths": [4, 4, 8, 8]})
        fitted = SpecimenSupervision(model, class_of_specimen) if changed.specimen_supervision else model
        run(phantoms, tmp_path / str(number), changed, model=fitted)
        trained.append(model)
    assert_same_weights(trained[0], trained[1])
    assert not torch.equal(trained[0].head.weight, trained[2].head.weight)


def test_drawn_evenly_classes_weigh_the_same_and_so_do_the_specimens_of_a_class():
    weights = _weights_of_specimens(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 2]))
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.25, 0.5, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("changes", [{"nuclear_stain": 1.0}, {"class_balance": "specimens"}])
def test_stain_and_balance_can_come_with_the_finish(changes, phantoms, tmp_path):
    plain = replace(RECIPE, epochs=3, finish=1 / 3)
    _, without = run(phantoms, tmp_path / "without", plain)
    _, changed = run(phantoms, tmp_path / "with", replace(plain, finish_changes=changes))
    same = [one["train_loss"] == other["train_loss"] for one, other in zip(without, changed, strict=True)]
    assert same == [True, True, False]


def test_the_finish_changes_its_fields_and_leaves_the_others():
    recipe = replace(RECIPE, epochs=5, noise=0.2, share=0.5, finish=0.4, finish_changes={"share": 1.0})
    assert [in_epoch(recipe, epoch).share for epoch in range(5)] == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert {in_epoch(recipe, epoch).noise for epoch in range(5)} == {0.2}
    # However few the epochs, the last belongs to the finish.
    assert in_epoch(replace(recipe, epochs=1), 0).share == 1.0


@pytest.mark.parametrize("changes", [{"epochs": 1}, {"finish": 1.0}])
def test_a_finish_that_is_all_of_the_run_has_half_the_learning_rate(changes):
    recipe = replace(RECIPE, epochs=4, schedule="one-cycle", finish=0.5)
    recipe = replace(recipe, **changes)
    rates = [_learning_rate(recipe, recipe.epochs * step / 100) for step in range(100)]
    assert max(rates) == pytest.approx(recipe.learning_rate / 2, rel=0.01)


@pytest.mark.parametrize("model", ["cnn", "rescnn", "vit"])
def test_the_recipe_of_the_weights_that_ship_is_sharp_and_then_a_finish(model):
    sharp, tuned = RECIPES["sharp"][model], RECIPES["tuned"][model]
    for epoch in range(60):
        assert replace(in_epoch(tuned, epoch), epochs=60, finish=0.0) == sharp
        assert _learning_rate(tuned, epoch + 0.3) == _learning_rate(sharp, epoch + 0.3)
    finish = [in_epoch(tuned, epoch) for epoch in range(60, 105)]
    assert {recipe.share for recipe in finish} == {0.3}
    assert {recipe.specimen_supervision for recipe in finish} == {model == "vit"}


def test_cutmix_mixes_targets_by_area():
    images = torch.stack([torch.full((1, 20, 20), float(i)) for i in range(4)])
    mixed, targets = cutmix(images, torch.eye(4), torch.Generator().manual_seed(3))
    for image, target in zip(mixed, targets, strict=True):
        share = image.flatten().long().bincount(minlength=4) / 400
        torch.testing.assert_close(share, target)


def test_focal_loss_lets_sure_answers_weigh_little():
    logits, targets = torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.eye(2)[[0, 0]]
    sure, unsure = torch.softmax(logits, 1)[:, 0]
    expected = (-((1 - sure) ** 2) * sure.log() - (1 - unsure) ** 2 * unsure.log()) / 2
    torch.testing.assert_close(focal_loss(logits, targets, 2.0, 0.0), expected)
    torch.testing.assert_close(
        focal_loss(logits, targets, 0.0, 0.1), nn.CrossEntropyLoss(label_smoothing=0.1)(logits, targets)
    )


def train_command(output, *options: str) -> list[str]:
    return ["train.py", "--dataset", "phantoms:20", "--models", "cnn", "--output", str(output), *options]


def test_train_killed_at_any_moment_ends_with_the_same_weights(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, *train_command(tmp_path / "killed", "--epochs", "4")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "cnn" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(log.read_text().splitlines()) < 4
    assert not (tmp_path / "killed" / "cnn" / "model.safetensors").exists()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    AcceleratorState._reset_state(True)
    assert train.main(train_command(tmp_path / "whole", "--epochs", "4")[1:]) == 0
    killed, never = (tmp_path / d / "cnn" / "model.safetensors" for d in ("killed", "whole"))
    assert killed.read_bytes() == never.read_bytes()


def test_train_runs_on_two_processes(tmp_path):
    # Without a GPU, --multi_gpu means several processes on the CPU.
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", "0", *train_command(tmp_path, "--epochs", "2")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=240)
    config = json.loads((tmp_path / "cnn" / "config.json").read_text())
    assert config["training"]["processes"] == 2
    assert len((tmp_path / "cnn" / "log.jsonl").read_text().splitlines()) == 2
