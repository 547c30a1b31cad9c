"""How models are trained: the settings of each, and the recipes by name."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from hep2.augmentation import Augmentation


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a model is trained, apart from its architecture, the cells and the seed."""

    epochs: int
    batch_size: int  # over all processes together
    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    learning_rate_scale: dict[str, float] = field(default_factory=dict)  # of models whose rate is another, by name
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.0
    schedule: Literal["constant", "one-cycle"] = "constant"
    warm_up: float = 0.15  # share of the steps, for one-cycle
    label_smoothing: float = 0.0
    gradient_norm: float | None = None  # clipped to this
    rotations: bool = False  # each cell in the reference's six rotations
    augmentation: Augmentation | None = None
    mix_up: bool = False  # half of each batch, for what is distilled
    # "specimens" draws classes, and specimens in them, evenly; "logits" takes from the logits of a trained model the
    # logarithm of how frequent each class was (Menon et al. 2021), since no laboratory's patients are mixed as these.
    class_balance: Literal["none", "specimens", "logits"] = "none"
    auxiliary_specimen_loss: bool = False
    ema_decay: float | None = None  # weights are averaged over the steps with this decay, and the average is kept
    patience: int | None = None  # stop after this many epochs without a better validation loss; keep the best
    min_delta: float = 0.0  # the smallest difference that counts as better

    def __post_init__(self) -> None:
        if isinstance(self.augmentation, dict):
            object.__setattr__(self, "augmentation", Augmentation(**self.augmentation))
        choices = {
            "optimizer": ("sgd", "adamw"),
            "schedule": ("constant", "one-cycle"),
            "class_balance": ("none", "specimens", "logits"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {allowed}")
        for name in ("warm_up", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a share between 0 and 1")
        if self.rotations and (self.augmentation or self.class_balance != "none"):
            raise ValueError("rotations show each cell six times, and go with no augmentation and no class balance")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}: give one epoch or more, or None")
        if self.epochs < 1 or self.batch_size < 2 or self.learning_rate <= 0:
            raise ValueError(
                f"epochs, batch_size (2 or more, for batch norm) and learning_rate must be positive: {self}"
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe for all models: how each is trained, and from which teachers.

    `teachers` maps names of pretrained timm networks to how they are fine-tuned. Models of a plan with teachers are
    distilled together, by the settings that they have in common. `architectures` holds what is not a model's default.
    """

    models: dict[str, Recipe]
    teachers: dict[str, Recipe] = field(default_factory=dict)
    architectures: dict[str, dict] = field(default_factory=dict)


# The reference's figures, to the letter: cross-entropy, SGD with learning rate 1e-4, momentum 0.4 and weight decay 1e-3
# (ResCNN 5e-3), early stopping on the validation loss with patience 2 (ensemble 1) and a smallest difference of 1e-3,
# six rotations of each cell. It ran 73 epochs for the CNN and 20 for ViT and ensemble: those are the limits here,
# and the ResCNN, for which it gives none, has the CNN's. It gives no batch size; 16 is ours.
_REFERENCE = Recipe(
    epochs=73,
    batch_size=16,
    optimizer="sgd",
    learning_rate=1e-4,
    momentum=0.4,
    weight_decay=1e-3,
    rotations=True,
    patience=2,
    min_delta=1e-3,
)
# Its ViT has no convolutional stem, and patches of 13 let two cores run that recipe to its end: 57,102 examples an
# epoch cost a quarter of those of 6.
_PLAIN_VIT = {"patch_size": 13, "stem_widths": [], "pooling": "class token", "stochastic_depth": 0.0}

# What all recipes of ours have in common: the best on a random split, with cells as sharp as they were published.
_OURS = Recipe(
    epochs=60,
    batch_size=64,
    optimizer="adamw",
    learning_rate=3e-3,
    weight_decay=0.05,
    schedule="one-cycle",
    label_smoothing=0.05,
    gradient_norm=1.0,
    augmentation=Augmentation(),
    ema_decay=0.995,
)
_SLOWER_VIT = {"vit": 1 / 3}
_BASELINE = replace(_OURS, learning_rate_scale=_SLOWER_VIT, auxiliary_specimen_loss=True)
# Without teachers the best on new specimens.
_DOMAIN_RANDOMIZED = replace(
    _OURS,
    learning_rate_scale=_SLOWER_VIT,
    class_balance="specimens",
    augmentation=Augmentation(nuclear_stain=0.5, framing=(1 / 1.15, 1.15), sharpness=0.5, haze=1.0, noise=0.2),
)
# What another microscope, camera or web page may do to a cell.
WIDE = Augmentation(
    nuclear_stain=0.4,
    share=0.75,
    framing=(0.75, 1.4),
    aspect=0.2,
    resolution=0.4,
    sharpness=0.8,
    haze=0.5,
    noise=0.15,
    exposure=0.6,
    black_level=0.1,
    gamma=0.5,
)
_TEACHER = replace(_OURS, epochs=10, learning_rate=1e-3, augmentation=WIDE)
_STUDENTS = replace(
    _OURS,
    epochs=38,
    batch_size=128,
    learning_rate_scale=_SLOWER_VIT,
    label_smoothing=0.0,
    augmentation=WIDE,
    mix_up=True,
    class_balance="logits",
)
# The stack's examples are twelve probabilities each, so there is nothing to augment. Small steps from the members'
# mean, which is a good start: with larger ones it grows surer than its members, and on new patients too sure.
_STACK = Recipe(epochs=40, batch_size=64, optimizer="adamw", learning_rate=1e-4, schedule="one-cycle")

RECIPES = {
    "reference": Plan(
        models={
            "cnn": _REFERENCE,
            "rescnn": replace(_REFERENCE, weight_decay=5e-3),
            "vit": replace(_REFERENCE, epochs=20),
            "ensemble": replace(_REFERENCE, epochs=20, patience=1, rotations=False),
        },
        architectures={"vit": _PLAIN_VIT},
    ),
    "baseline": Plan(
        models={
            "cnn": _BASELINE,
            "rescnn": replace(_BASELINE, auxiliary_specimen_loss=False),
            "vit": _BASELINE,
            "ensemble": _STACK,
        }
    ),
    "domain-randomized": Plan(
        models=dict.fromkeys(("cnn", "rescnn", "vit"), _DOMAIN_RANDOMIZED) | {"ensemble": _STACK}
    ),
    "default": Plan(
        models=dict.fromkeys(("cnn", "rescnn", "vit"), _STUDENTS) | {"ensemble": _STACK},
        teachers={"tf_efficientnet_lite0": _TEACHER, "tf_efficientnet_lite2": replace(_TEACHER, epochs=8)},
        architectures={"vit": {"depth": 6}},
    ),
}


def with_changes(plan: Plan, changes: dict) -> Plan:
    """Return a plan in which fields of all networks' recipes, but not of the stack's, are replaced."""
    models = {
        name: recipe if name == "ensemble" else replace(recipe, **changes) for name, recipe in plan.models.items()
    }
    return replace(
        plan, models=models, teachers={name: replace(recipe, **changes) for name, recipe in plan.teachers.items()}
    )


def choose_plan(recipe: str, teachers: list[str] | None, changes: dict) -> tuple[Plan, dict[str, Path]]:
    """Return a recipe's plan with what a command line changes, and the teachers' local files.

    Parameters
    ----------
    teachers
        ``NAME`` or ``NAME=FILE`` of pretrained networks in place of the recipe's; ``none`` trains without.
    changes
        Fields of all networks' recipes but the stack's; a value of None changes nothing.

    Raises
    ------
    ValueError
        If there are teachers for a recipe that has none.
    """
    plan = with_changes(RECIPES[recipe], {name: value for name, value in changes.items() if value is not None})
    given = dict(teacher.partition("=")[::2] for teacher in teachers or ())
    if "none" in given:
        return replace(plan, teachers={}), {}
    if given and not plan.teachers:
        raise ValueError(f"--teacher: the recipe {recipe!r} has no teachers; use --recipe default")
    if given:
        settings = next(iter(plan.teachers.values()))
        plan = replace(plan, teachers={name: plan.teachers.get(name, settings) for name in given})
    return plan, {name: Path(file) for name, file in given.items() if file}
