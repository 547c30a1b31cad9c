"""The one loop that trains any models on tensors: it knows no model and no dataset."""

import hashlib
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Generator, Tensor, nn
from tqdm import tqdm

from hep2.augmentation import REFERENCE_ANGLES, augment, mix_up, rotate_as_reference
from hep2.checkpoints import write_atomically
from hep2.cuda_graph import RecordedStep
from hep2.losses import Batch, CrossEntropy, Examples, loss_and_accuracy
from hep2.recipes import Recipe


def fit(
    models: dict[str, nn.Module],
    train: Examples,
    validation: Examples,
    recipe: Recipe,
    *,
    directory: Path,
    seed: int,
    accelerator: Accelerator,
    losses: dict[str, nn.Module] | None = None,
    teacher: Callable[[], nn.Module] | None = None,
    taught_by: str | None = None,
    computed_from: str | None = None,
    progress: bool = True,
) -> dict[str, list[dict]]:
    """Train models in place, side by side on the same batches; returns for each one record an epoch.

    Every epoch ends with a checkpoint in `directory`, written whole or not at all. Called again with the same
    arguments after any interruption, it goes on behind the last whole epoch, on a CPU to the same weights: all
    randomness of an epoch comes from (seed, epoch, process), so nothing of it needs to be carried over.

    Parameters
    ----------
    models
        By name. They end in evaluation mode, on the CPU.
    losses
        For some of the models, what is minimized: a module that takes the model and a `Batch` and returns loss and
        logits. The others have `CrossEntropy`.
    teacher
        Makes what gives probabilities (batch, classes) for images, for models that are to match them. It is not called
        where nothing is left to train.
    taught_by
        Names the teacher.
    computed_from
        Names the examples; without it they are told from others by their content.

    Raises
    ------
    ValueError
        If `directory` holds a checkpoint of another recipe, seed, model or dataset, or if the recipe needs parts of
        the examples that are not given.
    FloatingPointError
        If the loss is no longer finite.
    """
    a = recipe.augmentation
    if a is not None and a.nuclear_stain and (train.diffuse is None or not len(train.diffuse)):
        raise ValueError("the recipe adds diffuse nuclear stain: give examples that show it, as `diffuse`")
    if (recipe.class_balance == "specimens" or recipe.auxiliary_specimen_loss) and train.specimens is None:
        raise ValueError("the recipe draws specimens evenly, or has a loss of them: give the examples' `specimens`")
    if recipe.patience is not None and len(models) > 1:
        raise ValueError("patience stops one model's training: train the models one by one")
    directory.mkdir(parents=True, exist_ok=True)
    losses = losses or {}
    identity = {
        "recipe": json.dumps(asdict(recipe), sort_keys=True),
        "seed": seed,
        "models": {name: _structure(model) for name, model in models.items()},
        "losses": {name: _structure(loss) for name, loss in losses.items()},
        "teacher": taught_by,
        "examples": computed_from or [_digest(train), _digest(validation)],
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
    run = _Run(models, losses, train, validation, recipe, directory, accelerator, identity)
    if not run.state["finished"]:
        run.train_all(teacher, progress)
    run.finish()
    return run.state["histories"]


class _Trainee(NamedTuple):
    """A model in training: with its loss one module, which accelerate wraps for mixed precision and many processes."""

    model: nn.Module
    objective: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    rate: float  # the highest learning rate
    averaged: ModelEmaV3 | None

    @property
    def kept(self) -> nn.Module:
        return self.model if self.averaged is None else self.averaged.module

    def tensors(self) -> dict:
        parts = {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        return parts | ({} if self.averaged is None else {"averaged": self.averaged.module.state_dict()})


class _Objective(nn.Module):
    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.loss(self.model, batch)


class _Run:
    """A run between two of its checkpoints. `state` is what a checkpoint carries besides the tensors in use."""

    def __init__(
        self,
        models: dict[str, nn.Module],
        losses: dict[str, nn.Module],
        train: Examples,
        validation: Examples,
        recipe: Recipe,
        directory: Path,
        accelerator: Accelerator,
        identity: dict,
    ) -> None:
        self.models, self.recipe, self.directory, self.accelerator = models, recipe, directory, accelerator
        self.identity, self.seed = identity, identity["seed"]
        self.train, self.validation = (
            Examples(*(None if part is None else part.to(accelerator.device) for part in examples))
            for examples in (train, validation)
        )
        self.count = len(train.labels) * (len(REFERENCE_ANGLES) if recipe.rotations else 1)
        self.batch_size = min(recipe.batch_size, self.count)
        self.steps = self.count // self.batch_size  # an epoch; the few cells that are left over change every epoch
        self.state = {
            "epoch": 0,
            "finished": False,
            "histories": {name: [] for name in models},
            "best_loss": math.inf,
            "best_epoch": 0,
            "best": None,
        }
        self.saved = self._read()
        if not self.state["finished"]:
            self.trainees = {name: self._prepared(name, model, losses.get(name)) for name, model in models.items()}
            self.generator = Generator(accelerator.device)
            self.graph = None

    def _read(self) -> dict | None:
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return None
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if saved["identity"] != self.identity:
            changed = [key for key in self.identity if saved["identity"].get(key) != self.identity[key]]
            raise ValueError(
                f"{path} belongs to another run (another {', '.join(changed)}); give another --output, or delete it"
            )
        self.state = {key: saved[key] for key in self.state}
        if self.accelerator.is_main_process:
            self._write_logs()  # killed between the two, the run has left them an epoch short of the checkpoint
        return saved

    def _prepared(self, name: str, model: nn.Module, loss: nn.Module | None) -> _Trainee:
        recipe, accelerator = self.recipe, self.accelerator
        objective = _Objective(model, loss or CrossEntropy(recipe.label_smoothing))
        # Convolutions run about a third faster with the channels last, on CPUs and GPUs alike.
        objective.to(accelerator.device, memory_format=torch.channels_last)
        averaged = None if recipe.ema_decay is None else ModelEmaV3(model, recipe.ema_decay, use_warmup=True)
        rate = recipe.learning_rate * recipe.learning_rate_scale.get(name, 1.0)
        if recipe.optimizer == "sgd":
            groups = [parameter for parameter in objective.parameters() if parameter.requires_grad]
            optimizer = torch.optim.SGD(groups, rate, recipe.momentum, weight_decay=recipe.weight_decay)
        else:
            # Norms, biases and tokens have no scale to be kept small: decay goes to matrices and filters alone.
            skipped = [key for key, parameter in objective.named_parameters() if parameter.squeeze().ndim <= 1]
            groups = param_groups_weight_decay(objective, recipe.weight_decay, skipped)
            groups = [group for group in groups if group["params"]]
            on_gpu = accelerator.device.type == "cuda"
            # A rate that lies on the GPU can be changed for a step that is recorded as a CUDA graph.
            rate_there = torch.tensor(rate, device=accelerator.device) if on_gpu else rate
            optimizer = torch.optim.AdamW(groups, rate_there, fused=on_gpu or None, capturable=on_gpu)
        if self.saved is not None:
            tensors = self.saved["trainees"][name]
            objective.load_state_dict(tensors["objective"])
            # Of this device, not of the one that saved them.
            own = [{key: group.get(key) for key in ("lr", "fused", "capturable")} for group in optimizer.param_groups]
            optimizer.load_state_dict(tensors["optimizer"])
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group.update(settings)
            if averaged is not None:
                averaged.module.load_state_dict(tensors["averaged"])
        wrapped, prepared = accelerator.prepare(objective, optimizer)
        return _Trainee(model, objective, wrapped, prepared, rate, averaged)

    def train_all(self, teacher: Callable[[], nn.Module] | None, progress: bool) -> None:
        if not self._goes_on():  # killed behind its last epoch
            return
        device = self.accelerator.device
        self.teacher = None if teacher is None else teacher().to(device, memory_format=torch.channels_last).eval()
        bar = tqdm(
            total=self.recipe.epochs * self.count,
            initial=self.state["epoch"] * self.count,
            unit="image",
            unit_scale=True,
            desc=self.directory.name,
            disable=not (progress and self.accelerator.is_main_process),
        )
        with bar:
            while self._goes_on():
                self._train_epoch(bar)
                self._save({name: trainee.tensors() for name, trainee in self.trainees.items()})

    def _train_epoch(self, bar: tqdm) -> None:
        started = time.perf_counter()
        epoch, accelerator = self.state["epoch"], self.accelerator
        order = self._order(Generator().manual_seed(_seed(self.seed, epoch)))  # the same in all processes
        self.generator.manual_seed(_seed(self.seed, epoch, 1 + accelerator.process_index))
        torch.manual_seed(_seed(self.seed, epoch, 1 + accelerator.process_index))  # for dropout and stochastic depth
        for trainee in self.trainees.values():
            trainee.wrapped.train()
        # Loss, right ones, examples of each model: left on the device, since to fetch them is to wait for it.
        totals = torch.zeros(len(self.trainees), 3, device=accelerator.device)
        for step, positions in enumerate(order.to(accelerator.device)):
            done = epoch * self.steps + step
            self._set_learning_rates(done / (self.recipe.epochs * self.steps))
            totals += self._step(positions[accelerator.process_index :: accelerator.num_processes])
            for trainee in self.trainees.values():
                if trainee.averaged is not None:
                    trainee.averaged.update(trainee.model, step=done + 1)
            bar.update(self.batch_size)
        totals = accelerator.reduce(totals).cpu()
        if not torch.isfinite(totals).all():
            raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}: lower the learning rate")
        self._record(totals, time.perf_counter() - started)

    def _step(self, positions: Tensor) -> Tensor:
        """Take one step; after the first few, on a GPU of one's own, a replayed one: launches cost more than work."""
        if self.accelerator.device.type != "cuda" or self.accelerator.num_processes > 1:
            return self._train_step(positions)
        if self.graph is None:
            self.graph = RecordedStep(self._train_step, positions, self.generator)
        return self.graph(positions)

    def _train_step(self, positions: Tensor) -> Tensor:
        """Train every model on the examples at some positions: summed loss, right ones and count, (models, 3)."""
        batch, totals = self._batch(positions), []
        truth = batch.labels if batch.targets is None else batch.targets.argmax(1)
        for trainee in self.trainees.values():
            loss, logits = trainee.wrapped(batch)
            trainee.optimizer.zero_grad()
            self.accelerator.backward(loss)
            if self.recipe.gradient_norm is not None:
                self.accelerator.clip_grad_norm_(trainee.wrapped.parameters(), self.recipe.gradient_norm)
            trainee.optimizer.step()
            right = (logits.argmax(1) == truth).sum()
            totals.append(torch.stack([loss.detach() * len(truth), right, torch.full_like(right, len(truth))]))
        return torch.stack(totals)

    def _batch(self, positions: Tensor) -> Batch:
        recipe, train, generator = self.recipe, self.train, self.generator
        # Under rotations example i is cell i % n at angle i // n, which makes the reference's 57,102 out of 9,517.
        cells = positions % len(train.labels)
        inputs, labels = train.inputs[cells], train.labels[cells]
        if recipe.rotations:
            inputs = rotate_as_reference(inputs, positions // len(train.labels), generator)
        elif recipe.augmentation is not None:
            nuclei = None
            if recipe.augmentation.nuclear_stain:
                draw = torch.randint(len(train.diffuse), (len(cells),), device=cells.device, generator=generator)
                nuclei = train.inputs[train.diffuse[draw]]
            inputs = augment(inputs, recipe.augmentation, generator, nuclei)
        targets = None
        if self.teacher is not None:
            inputs = mix_up(inputs, generator) if recipe.mix_up else inputs
            with torch.no_grad(), self.accelerator.autocast():
                targets = self.teacher(inputs)
        specimens = None if train.specimens is None else train.specimens[cells]
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return Batch(inputs, labels, specimens, targets)

    def _order(self, generator: Generator) -> Tensor:
        """Draw the positions of one epoch's examples: int64 of shape (steps, batch)."""
        size = self.steps * self.batch_size
        if self.recipe.class_balance == "specimens":
            weight = weights_of_specimens(self.train.labels.cpu(), self.train.specimens.cpu())
            return torch.multinomial(weight, size, replacement=True, generator=generator).view(self.steps, -1)
        return torch.randperm(self.count, generator=generator)[:size].view(self.steps, -1)

    def _set_learning_rates(self, progress: float) -> None:
        for trainee in self.trainees.values():
            rate = trainee.rate * _relative_rate(self.recipe, progress)
            for group in trainee.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def _record(self, totals: Tensor, seconds: float) -> None:
        """Measure the weights that would be kept, and note the epoch."""
        self.state["epoch"] += 1
        for (name, trainee), (loss, right, count) in zip(self.trainees.items(), totals.tolist(), strict=True):
            measured = broadcast(torch.stack(loss_and_accuracy(trainee.kept, self.validation))).tolist()
            record = {
                "epoch": self.state["epoch"],
                "train_loss": round(loss / count, 5),
                "train_accuracy": round(right / count, 5),
                "validation_loss": round(measured[0], 5),
                "validation_accuracy": round(measured[1], 5),
                "learning_rate": float(trainee.optimizer.param_groups[0]["lr"]),
                "images_per_second": round(count / seconds, 1),
                "seconds": round(seconds, 2),
            }
            self.state["histories"][name].append(record)
            if self.recipe.patience is not None and measured[0] < self.state["best_loss"] - self.recipe.min_delta:
                best = {key: tensor.detach().cpu().clone() for key, tensor in trainee.kept.state_dict().items()}
                self.state |= {"best_loss": measured[0], "best_epoch": self.state["epoch"], "best": best}

    def _goes_on(self) -> bool:
        epoch, patience = self.state["epoch"], self.recipe.patience
        return epoch < self.recipe.epochs and (patience is None or epoch - self.state["best_epoch"] < patience)

    def _save(self, trainees: dict) -> None:
        if self.accelerator.is_main_process:
            content = io.BytesIO()
            torch.save(self.state | {"trainees": trainees, "identity": self.identity}, content)
            write_atomically(self.directory / "checkpoint.pt", content.getvalue())
            self._write_logs()
        self.accelerator.wait_for_everyone()

    def _write_logs(self) -> None:
        for name, history in self.state["histories"].items():
            folder = self.directory.parent / name
            folder.mkdir(exist_ok=True)
            write_atomically(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in history).encode())

    def finish(self) -> None:
        """Leave the weights to keep in the models, and a checkpoint of them alone."""
        if self.state["finished"]:
            kept = self.saved["trainees"]
        else:
            kept = {name: trainee.kept.state_dict() for name, trainee in self.trainees.items()}
            if self.state["best"] is not None:
                kept = dict.fromkeys(kept, self.state["best"])
            kept = {name: {key: tensor.cpu() for key, tensor in tensors.items()} for name, tensors in kept.items()}
            self.state |= {"finished": True, "best": None}
            self._save(kept)
        for name, model in self.models.items():
            model.cpu().load_state_dict(kept[name])
            model.eval()


def weights_of_specimens(labels: Tensor, specimens: Tensor) -> Tensor:
    """Return a weight for each example under which all classes, and in a class all specimens, weigh the same."""
    weight = 1 / specimens.bincount()[specimens].double()  # every specimen weighs 1 in all
    return weight / torch.zeros(int(labels.max()) + 1, dtype=torch.float64).index_add(0, labels, weight)[labels]


def _relative_rate(recipe: Recipe, progress: float) -> float:
    """Return the learning rate after a share of all steps, beside the highest one."""
    if recipe.schedule == "constant":
        return 1.0
    if progress < recipe.warm_up:
        return 0.02 + 0.98 * progress / recipe.warm_up
    return 0.5 * (1 + math.cos(math.pi * (progress - recipe.warm_up) / (1 - recipe.warm_up)))


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _structure(model: nn.Module) -> str:
    """Identify a model's architecture by its class, what it says of itself, and the shapes of its tensors."""
    shapes = json.dumps({key: list(tensor.shape) for key, tensor in model.state_dict().items()})
    return f"{type(model).__name__}({model.extra_repr()}) {hashlib.sha256(shapes.encode()).hexdigest()[:16]}"


def _digest(examples: Examples) -> str:
    digest = hashlib.sha256()
    for part in examples:
        if part is not None:
            digest.update(part.contiguous().numpy())
    return digest.hexdigest()[:16]
