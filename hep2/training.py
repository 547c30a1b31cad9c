"""Recipes and the one loop that trains any model on tensors: it knows no model and no dataset."""

import ctypes
import hashlib
import io
import json
import math
import platform
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from hep2.augmentation import PAPER_ANGLES, add_nuclear_stain, augment_paper, augment_tuned, draw_share, to_device
from hep2.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a model is trained, apart from its architecture, the cells and the seed."""

    epochs: int
    batch_size: int  # over all processes together
    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.0
    schedule: Literal["constant", "one-cycle"] = "constant"
    warm_up: float = 0.15  # share of the steps, for one-cycle
    label_smoothing: float = 0.0
    gradient_norm: float | None = None  # clipped to this
    augmentation: Literal["none", "paper", "tuned"] = "none"
    gain: float = 0.2  # how far the tuned augmentation changes gain and gamma; see `hep2.augmentation`
    zoom: float = 0.0  # the same for scale,
    sharpness: float = 0.0  # for focus,
    haze: float = 0.0  # for diffuse stain,
    noise: float = 0.0  # for noise,
    exposure: float = 0.0  # and for light that is too bright,
    share: float = 1.0  # in this share of the images
    nuclear_stain: float = 0.0  # in this share of the images, for diffuse stain of another nucleus
    finish: float = 0.0  # share of the epochs, the last, with a cycle of their own at half the learning rate,
    finish_changes: dict[str, float | str | bool] | None = None  # and with these fields changed; see `in_epoch`
    cutmix: float = 0.0  # share of the batches in which a patch of each image comes from another
    style_mixing: float = 0.0  # share of the batches whose cells exchange the statistics of their early features
    focal: float = 0.0  # how much less a sure answer weighs: the exponent of the focal loss (Lin et al. 2017)
    class_balance: Literal["none", "weights", "sampling", "specimens"] = "none"
    specimen_supervision: bool = False  # to tell specimens apart as well; see `hep2.models.SpecimenSupervision`
    ema_decay: float | None = None  # weights are averaged over the steps with this decay, and the average is kept
    patience: int | None = None  # stop after this many epochs without a better validation loss; keep the best
    min_delta: float = 0.0  # the smallest difference that counts as better

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {allowed}")
        for name in ("share", "nuclear_stain", "finish", "cutmix", "style_mixing", "warm_up", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a share between 0 and 1")
        if self.augmentation == "paper" and self.class_balance in ("sampling", "specimens"):
            raise ValueError("augmentation='paper' shows each cell in six rotations: it draws no cells by their class")
        if self.specimen_supervision and self.class_balance != "none":
            raise ValueError("with specimen_supervision each specimen is a class: set class_balance='none'")
        tuned = (*_OF_THE_AUGMENTATION, "nuclear_stain")
        idle = [
            field.name for field in fields(self) if field.name in tuned and getattr(self, field.name) != field.default
        ]
        if idle and self.augmentation != "tuned":
            raise ValueError(f"{', '.join(idle)}: a part of augmentation='tuned'; choose that, or leave it out")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}: give one epoch or more, or None")
        if self.style_mixing and self.specimen_supervision:
            raise ValueError("style_mixing with specimen_supervision is not made: choose one")
        if self.finish_changes is not None:
            if unknown := set(self.finish_changes) - set(_OF_THE_FINISH):
                raise ValueError(f"finish_changes has {sorted(unknown)}: a finish can change {_OF_THE_FINISH}")
            if not self.finish or not self.finish_changes:
                raise ValueError("finish_changes needs a finish, a share of the epochs, and one change or more")
            replace(self, finish_changes=None, **self.finish_changes)  # which says what does not fit
        if self.focal and self.class_balance == "weights":
            raise ValueError("focal and class_balance='weights' both weigh the loss: choose one")
        if self.epochs < 1 or self.batch_size < 2 or self.learning_rate <= 0:
            raise ValueError(
                f"epochs, batch_size (2 or more, for batch norm) and learning_rate must be positive: {self}"
            )


STEPS_BETWEEN_LOOKS = 16  # at the loss, for which a card must be waited for

_OF_THE_AUGMENTATION = ("gain", "zoom", "sharpness", "haze", "noise", "exposure", "share")
# All that is read every epoch.
_OF_THE_FINISH = (*_OF_THE_AUGMENTATION, "nuclear_stain", "cutmix", "class_balance", "specimen_supervision")
_CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("constant", "one-cycle"),
    "augmentation": ("none", "paper", "tuned"),
    "class_balance": ("none", "weights", "sampling", "specimens"),
}


class Examples(NamedTuple):
    """Inputs float32 of shape (examples, …), for images (examples, 1, 78, 78), and labels int64 of (examples,).

    `specimens`, int64 of (examples,), is needed by recipes that draw specimens evenly or tell them apart, and
    `diffuse`, the positions of the examples that show a nucleus stained diffusely, int64, by recipes that add such
    stain.
    """

    inputs: Tensor
    labels: Tensor
    specimens: Tensor | None = None
    diffuse: Tensor | None = None


def fit(
    model: nn.Module,
    train: Examples,
    validation: Examples,
    recipe: Recipe,
    *,
    directory: Path,
    seed: int,
    accelerator: Accelerator,
    progress: bool = True,
    computed_from: str | None = None,
) -> list[dict]:
    """Train `model` in place and return one record an epoch, which `directory/log.jsonl` holds too.

    Every epoch ends with a checkpoint in `directory`, written whole or not at all. Called again with the same
    arguments after any interruption, it goes on behind the last whole epoch and ends with the same weights: all
    randomness of an epoch comes from (seed, epoch, process), so nothing of it needs to be carried over. Inputs that
    another machine would compute with other roundings are told apart by what they were `computed_from`.

    Raises
    ------
    ValueError
        If `directory` holds a checkpoint of another recipe, seed, model or dataset, or if the recipe needs parts of
        the examples, or of the model, that are not given.
    FloatingPointError
        If the loss is no longer finite.
    """
    needed = _parts_needed(recipe)
    if "diffuse" in needed and (train.diffuse is None or not len(train.diffuse)):
        raise ValueError("the recipe adds diffuse nuclear stain: give examples that show it, as `diffuse`")
    if "specimens" in needed and train.specimens is None:
        raise ValueError("the recipe draws specimens evenly, or tells them apart: give the examples' `specimens`")
    if tells_specimens_apart(recipe) and not hasattr(model, "telling_apart"):
        raise ValueError("the recipe tells specimens apart: give a model that can, as `SpecimenSupervision`")
    if recipe.style_mixing and not hasattr(model, "early_layers"):
        raise ValueError("the recipe mixes the styles of early features: give a model that has `early_layers`")
    directory.mkdir(parents=True, exist_ok=True)
    if accelerator.device.type == "cpu":
        _keep_memory()
    run = _Run(model, train, validation, recipe, directory, seed, accelerator, computed_from)
    size = _examples_per_epoch(train, recipe)
    bar = tqdm(
        total=recipe.epochs * size,
        initial=run.state["epoch"] * size,
        unit="image",
        unit_scale=True,
        desc=directory.name,
        disable=not (progress and accelerator.is_main_process),
    )
    with bar:
        while run.state["epoch"] < recipe.epochs and not run.is_stale():
            run.train_epoch(bar)
            run.save()
    run.finish()
    return run.state["history"]


def _keep_memory() -> None:
    """Let glibc keep the memory it frees: each step needs the same again, and new pages cost a fifth of its time."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


class _Run:
    """A run between two of its checkpoints. `state` is what a checkpoint carries besides the tensors in use."""

    def __init__(
        self,
        model: nn.Module,
        train: Examples,
        validation: Examples,
        recipe: Recipe,
        directory: Path,
        seed: int,
        accelerator: Accelerator,
        computed_from: str | None,
    ) -> None:
        self.identity = _identity(model, train, validation, recipe, seed, accelerator, computed_from)
        self.recipe, self.directory, self.seed, self.accelerator = recipe, directory, seed, accelerator
        # Accelerate changes a model's forward pass for good: this one measures in full precision.
        self.measured = deepcopy(model).to(accelerator.device)
        # Convolutions run about a third faster with the channels last, on CPUs and GPUs alike.
        self.model = model.to(accelerator.device, memory_format=torch.channels_last)
        self.train, self.validation = (
            Examples(*(None if part is None else part.to(accelerator.device) for part in examples))
            for examples in (train, validation)
        )
        if recipe.style_mixing:
            for layer in model.early_layers():
                layer.register_forward_hook(partial(mix_style, share=recipe.style_mixing))
        self.averaged = None
        if recipe.ema_decay is not None:
            self.averaged = _MovingAverage(model, recipe.ema_decay)
        # Accelerate wraps the forward pass for mixed precision and for several processes.
        self.wrapped, self.optimizer = accelerator.prepare(model, _optimizer(model, recipe))
        self.state = {"epoch": 0, "history": [], "best_loss": float("inf"), "best_epoch": 0, "best": None}
        self.restore()

    def train_epoch(self, bar: tqdm) -> None:
        started = time.perf_counter()
        epoch, accelerator = self.state["epoch"], self.accelerator
        order = _generator(self.seed, epoch)  # the same in all processes
        own = _generator(self.seed, epoch, 1 + accelerator.process_index)
        torch.manual_seed(int(torch.randint(2**31, (), generator=own)))  # for stochastic depth
        self.model.train()
        # Loss, right ones, examples: left on the device, since to fetch them is to wait for it.
        totals = torch.zeros(3, device=accelerator.device)
        recipe = in_epoch(self.recipe, epoch)
        if hasattr(self.model, "telling_apart"):
            self.model.telling_apart = recipe.specimen_supervision
        classes = int(_targets(self.train, recipe).max()) + 1
        class_weights = _class_weights(self.train.labels) if recipe.class_balance == "weights" else None
        batches = _batches(self.train, recipe, order)
        for step, batch in enumerate(batches):
            rate = _learning_rate(self.recipe, epoch + step / len(batches))
            share = to_device(batch[accelerator.process_index :: accelerator.num_processes], accelerator.device)
            totals += self.step(share, recipe, classes, class_weights, rate, own)
            if step % STEPS_BETWEEN_LOOKS == 0 or step == len(batches) - 1:
                loss, _, count = totals.tolist()
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}: lower the learning rate")
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss / count:.3f}", refresh=False)
            bar.update(len(batch))
        self.record(accelerator.reduce(totals), rate, time.perf_counter() - started)

    def step(
        self,
        share: Tensor,
        recipe: Recipe,
        classes: int,
        class_weights: Tensor | None,
        rate: float,
        generator: Generator,
    ) -> Tensor:
        """Take one step on the examples at the positions `share`; returns their summed loss, right ones and count."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, labels = _augmented(self.train, share, recipe, generator)
        targets = F.one_hot(labels, classes).float()
        if recipe.cutmix and torch.rand((), generator=generator) < recipe.cutmix:
            inputs, targets = cutmix(inputs, targets, generator)
        logits = self.wrapped(inputs).float()
        smoothing = recipe.label_smoothing
        loss = F.cross_entropy(logits, targets, weight=class_weights, label_smoothing=smoothing)
        if recipe.focal:
            loss = focal_loss(logits, targets, recipe.focal, smoothing)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if recipe.gradient_norm is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), recipe.gradient_norm)
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        right = (logits.argmax(1) == labels).sum()
        return torch.stack([loss.detach() * len(share), right, torch.full_like(right, len(share))])

    def record(self, totals: Tensor, rate: float, seconds: float) -> None:
        """Measure the weights that would be kept, and note the epoch."""
        kept = self.model if self.averaged is None else self.averaged.module
        self.measured.load_state_dict(kept.state_dict())
        loss, accuracy = broadcast(torch.stack(loss_and_accuracy(self.measured, self.validation))).tolist()
        self.state["epoch"] += 1
        self.state["history"].append(
            {
                "epoch": self.state["epoch"],
                "train_loss": round((totals[0] / totals[2]).item(), 5),
                "train_accuracy": round((totals[1] / totals[2]).item(), 5),
                "validation_loss": round(loss, 5),
                "validation_accuracy": round(accuracy, 5),
                "learning_rate": rate,
                "images_per_second": round(totals[2].item() / seconds, 1),
                "seconds": round(seconds, 2),
            }
        )
        if self.recipe.patience is not None and loss < self.state["best_loss"] - self.recipe.min_delta:
            best = {name: tensor.detach().clone() for name, tensor in kept.state_dict().items()}
            self.state |= {"best_loss": loss, "best_epoch": self.state["epoch"], "best": best}

    def is_stale(self) -> bool:
        patience = self.recipe.patience
        return patience is not None and self.state["epoch"] - self.state["best_epoch"] >= patience

    def save(self) -> None:
        if self.accelerator.is_main_process:
            content = io.BytesIO()
            tensors = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "averaged": None if self.averaged is None else self.averaged.state_dict(),
            }
            torch.save(self.state | tensors | {"identity": self.identity}, content)
            write_atomically(self.directory / "checkpoint.pt", content.getvalue())
            self.write_log()
        self.accelerator.wait_for_everyone()

    def write_log(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.state["history"])
        write_atomically(self.directory / "log.jsonl", lines.encode())

    def restore(self) -> None:
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if saved["identity"] != self.identity:
            changed = [key for key in self.identity if saved["identity"].get(key) != self.identity[key]]
            raise ValueError(
                f"{path} belongs to another run (another {', '.join(changed)}); give another --output, or delete it"
            )
        self.model.load_state_dict(saved["model"])
        for group, own in zip(saved["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            group["fused"] = own.get("fused")  # of this device, not of the one that saved it
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.averaged is not None:
            self.averaged.load_state_dict(saved["averaged"])
        self.state = {key: saved[key] for key in self.state}
        if self.accelerator.is_main_process:
            self.write_log()  # killed between the two, the run has left it an epoch short of the checkpoint

    def finish(self) -> None:
        """Leave the weights to keep in the model, unwrapped and in evaluation mode: it reads at full precision now."""
        model = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        if self.state["best"] is not None:
            model.load_state_dict(self.state["best"])
        elif self.averaged is not None:
            model.load_state_dict(self.averaged.module.state_dict())
        model.eval()


class _MovingAverage(AveragedModel):
    """The moving average of a model's weights and running statistics; counts and masks are the model's own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        # The count stays on the CPU: PyTorch's own update waits for the card several times a step to read it.
        count = int(self.n_averaged)
        # The first steps count for less, or the untrained start would linger in the average.
        decay = min(self.decay, (1 + count) / (10 + count)) if count else 0.0
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        averaged, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for kept, own in pairs:
            if not kept.is_floating_point():
                kept.copy_(own)
        self.n_averaged += 1


def _identity(
    model: nn.Module,
    train: Examples,
    validation: Examples,
    recipe: Recipe,
    seed: int,
    accelerator: Accelerator,
    computed_from: str | None,
) -> dict:
    """Return what must be the same for a run to go on: all that decides its steps."""
    # Under a constant rate the number of epochs changes no step: such a run can be made longer.
    same_path = {"epochs"} if recipe.schedule == "constant" and not recipe.finish else set()
    default = {field.name: field.default for field in fields(Recipe)}
    changed = {key: value for key, value in asdict(recipe).items() if value != default[key]}
    return {
        "recipe": {key: value for key, value in changed.items() if key not in same_path},
        "seed": seed,
        "model": repr(model),
        "examples": computed_from or [_content(train, recipe), _content(validation, recipe)],
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def _content(examples: Examples, recipe: Recipe) -> str:
    digest = hashlib.sha256(examples.inputs.contiguous().numpy())
    digest.update(examples.labels.contiguous().numpy())
    # What a recipe does not read decides none of its steps.
    for name in _parts_needed(recipe):
        if (part := getattr(examples, name)) is not None:  # validation may lack it
            digest.update(name.encode() + part.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def loss_and_accuracy(model: nn.Module, examples: Examples, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy and the accuracy, two scalars, of a model in evaluation mode."""
    logits = predict_logits(model, examples.inputs, batch_size)
    accuracy = (logits.argmax(1) == examples.labels).float().mean()
    return F.cross_entropy(logits, examples.labels), accuracy


@torch.inference_mode()
def predict_logits(model: nn.Module, inputs: Tensor, batch_size: int = 256) -> Tensor:
    """Return float32 logits (examples, classes), in evaluation mode and full precision."""
    training = model.training
    model.eval()
    logits = torch.cat([model(batch).float() for batch in inputs.split(batch_size)])
    model.train(training)
    return logits


def cutmix(images: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Replace one rectangle of each image by that of another, and mix the targets by area (Yun et al. 2019)."""
    rows, columns = images.shape[-2:]
    area = torch.rand((), generator=generator).item()
    height, width = round(rows * area**0.5), round(columns * area**0.5)
    top = int(torch.randint(rows - height + 1, (), generator=generator))
    left = int(torch.randint(columns - width + 1, (), generator=generator))
    other = to_device(torch.randperm(len(images), generator=generator), images.device)
    images = images.clone()
    images[..., top : top + height, left : left + width] = images[other, ..., top : top + height, left : left + width]
    share = height * width / (rows * columns)
    return images, (1 - share) * targets + share * targets[other]


def mix_style(layer: nn.Module, inputs: tuple, features: Tensor, *, share: float) -> Tensor:
    """Mix each image's mean and spread per channel with another's: MixStyle (Zhou et al. 2021), as a forward hook.

    Those statistics carry much of how a slide was stained and imaged. Acts in training alone, on `share` of the
    batches, with a weight from Beta(0.1, 0.1), as there.
    """
    if not layer.training or torch.rand(()) >= share:
        return features
    known = features.detach().float()
    mean, spread = known.mean((2, 3), keepdim=True), known.std((2, 3), keepdim=True) + 1e-6
    other = torch.randperm(len(features), device=features.device)
    weight = torch.distributions.Beta(0.1, 0.1).sample((len(features), 1, 1, 1)).to(features.device)
    new_mean, new_spread = weight * mean + (1 - weight) * mean[other], weight * spread + (1 - weight) * spread[other]
    return (features - mean.to(features)) * (new_spread / spread).to(features) + new_mean.to(features)


def focal_loss(logits: Tensor, targets: Tensor, exponent: float, smoothing: float) -> Tensor:
    """Return the mean cross-entropy, each example's times what is missing to certainty, to the power `exponent`."""
    certainty = torch.exp(-F.cross_entropy(logits, targets, reduction="none"))
    losses = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    return ((1 - certainty) ** exponent * losses).mean()


def _examples_per_epoch(train: Examples, recipe: Recipe) -> int:
    return len(train.labels) * (len(PAPER_ANGLES) if recipe.augmentation == "paper" else 1)


def _batches(train: Examples, recipe: Recipe, generator: Generator) -> tuple[Tensor, ...]:
    """Shuffle the examples of one epoch into batches of nearly the same size, none larger than the recipe's."""
    count = _examples_per_epoch(train, recipe)
    if recipe.class_balance in ("sampling", "specimens"):
        weight = _class_weights(train.labels.cpu())[train.labels.cpu()]
        if recipe.class_balance == "specimens":
            weight = _weights_of_specimens(train.labels.cpu(), train.specimens.cpu())
        order = torch.multinomial(weight, count, replacement=True, generator=generator)
    else:
        order = torch.randperm(count, generator=generator)
    return order.tensor_split(-(-count // recipe.batch_size))


def _beginning(recipe: Recipe) -> int:
    """Return the number of epochs before the finish, which has one at least: all of them where there is no finish."""
    return recipe.epochs - (max(1, round(recipe.finish * recipe.epochs)) if recipe.finish else 0)


def _parts_needed(recipe: Recipe) -> list[str]:
    """Return which parts of the train examples a recipe reads besides inputs and labels, in its finish or before."""
    phases = _phases(recipe)
    evenly = any(phase.class_balance == "specimens" for phase in phases)
    needed = {
        "specimens": evenly or tells_specimens_apart(recipe),
        "diffuse": any(phase.nuclear_stain for phase in phases),
    }
    return [name for name, read in needed.items() if read]


def tells_specimens_apart(recipe: Recipe) -> bool:
    """Say whether a recipe needs a model under specimen supervision, in its finish or before."""
    return any(phase.specimen_supervision for phase in _phases(recipe))


def _phases(recipe: Recipe) -> tuple[Recipe, Recipe]:
    """Return the recipe as it is in the first epoch and in the last."""
    return in_epoch(recipe, 0), in_epoch(recipe, recipe.epochs - 1)


def _targets(train: Examples, recipe: Recipe) -> Tensor:
    return train.specimens if recipe.specimen_supervision else train.labels


def in_epoch(recipe: Recipe, epoch: int) -> Recipe:
    """Return the recipe as it is in an epoch, counted from 0: in the finish, with its changes."""
    changes = recipe.finish_changes if epoch >= _beginning(recipe) else None
    return replace(recipe, finish_changes=None, **(changes or {}))


def _augmented(train: Examples, index: Tensor, recipe: Recipe, generator: Generator) -> tuple[Tensor, Tensor]:
    # In the paper's recipe example i is cell i % n under rotation i // n, which makes its 57,102 out of 9,517.
    cell, angle = index % len(train.labels), index // len(train.labels)
    inputs, labels = train.inputs[cell], _targets(train, recipe)[cell]
    if recipe.augmentation == "paper":
        inputs = augment_paper(inputs, angle, generator)
    elif recipe.augmentation == "tuned":
        if recipe.nuclear_stain:
            inputs = _with_nuclear_stain(inputs, train, recipe.nuclear_stain, generator)
        inputs = augment(inputs, recipe, generator)
    return inputs, labels


def _with_nuclear_stain(inputs: Tensor, train: Examples, share: float, generator: Generator) -> Tensor:
    chosen = draw_share(inputs, share, generator)
    if not len(chosen):
        return inputs
    drawn = torch.randint(len(train.diffuse), chosen.shape, generator=generator)
    nuclei = train.diffuse[to_device(drawn, inputs.device)]
    return inputs.index_copy(0, chosen, add_nuclear_stain(inputs[chosen], train.inputs[nuclei], generator))


def augment(images: Tensor, recipe: Recipe, generator: Generator) -> Tensor:
    """Change images (batch, 1, 78, 78) as a recipe with the tuned augmentation says, but for the nuclear stain."""
    return augment_tuned(images, generator, **{name: getattr(recipe, name) for name in _OF_THE_AUGMENTATION})


def _class_weights(labels: Tensor) -> Tensor:
    """Return a weight for each class, inverse to its count, 1 on average over the examples."""
    counts = labels.bincount().clamp(min=1)
    return len(labels) / (len(counts) * counts)


def _weights_of_specimens(labels: Tensor, specimens: Tensor) -> Tensor:
    """Return a weight for each example under which all classes, and in a class all specimens, weigh the same."""
    cells = specimens.bincount()[specimens]
    weight = 1 / cells.double()  # every specimen weighs 1 in all
    return weight / torch.zeros(int(labels.max()) + 1, dtype=torch.float64).index_add(0, labels, weight)[labels]


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
    # Norms, biases and tokens have no scale to be kept small: decay goes to matrices and filters alone.
    decayed = [parameter for parameter in parameters if parameter.squeeze().ndim > 1]
    others = [parameter for parameter in parameters if parameter.squeeze().ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, recipe.learning_rate, fused=parameters[0].is_cuda or None)


def _learning_rate(recipe: Recipe, epochs: float) -> float:
    """Return the learning rate after so many `epochs`, whole and broken ones."""
    if recipe.schedule == "constant":
        return recipe.learning_rate
    start, highest, length = 0, recipe.learning_rate, _beginning(recipe)
    if epochs >= length:
        # The second cycle bends what the first has learned; at the full rate it would learn it anew.
        start, highest, length = length, recipe.learning_rate / 2, recipe.epochs - length
    progress = (epochs - start) / length
    if progress < recipe.warm_up:
        return highest * (0.02 + 0.98 * progress / recipe.warm_up)
    descent = (progress - recipe.warm_up) / (1 - recipe.warm_up)
    return highest * 0.5 * (1 + math.cos(math.pi * descent))


def _generator(*key: int) -> Generator:
    return Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
