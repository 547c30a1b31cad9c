"""What helps on new specimens and on strangers' images: one change of a short `default` at a time.

    python -m benchmarks.experiments --dataset … --output DIR [--only NAME …] [--teacher NAME=FILE …]
    python -m benchmarks.experiments --dataset … --output DIR --parts random --only "no teacher" "class weights" …

The recipe is `default` with one teacher of six epochs and students of twelve ("base"); each row changes one thing.
Models are trained on two folds of the block table and measured on a third: fold 1 by models of folds 2 and 3, fold 3 by
models of folds 0 and 1. Folds 0 and 2 are not looked at, so they are a fair test of what is chosen. Each cell is
measured as it is and shifted as a stranger's. The part `random` takes the train and the validation cells of the
deduplicated protocol: what a change costs where specimens are known, and what helps against the imbalance of classes.

What is finished is not repeated, and rows that change the students alone share a teacher. On an H100 a row takes some
two minutes a fold, on two cores some two hours, half of it for the teacher. Prints a table in Markdown: mean class
accuracy of cells as they are / shifted. SMOTE needs `pip install imbalanced-learn`.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.common import count_blocks, line, make_accelerator, make_parser, shifted, table
from hep2.augmentation import Augmentation
from hep2.checkpoints import read_json, write_json
from hep2.data import Cells, blocks_of, load_cells, specimen_blocks, specimens_of, split, unique_cells
from hep2.evaluation import metrics
from hep2.losses import AuxiliarySpecimenLoss, Batch, Examples, predict_logits
from hep2.models import BASE_MODELS, StackEnsemble, build_model
from hep2.patterns import IMAGE_SIZE, MODEL_TITLES
from hep2.pipeline import examples_of, train_teachers
from hep2.recipes import RECIPES, Plan
from hep2.teacher import Teachers
from hep2.training import fit

PARTS = ("1", "3", "random")
EPOCHS, TEACHER_EPOCHS = 12, 6
LITE0, LITE2 = RECIPES["default"].teachers


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a row changes: of the students' recipe, of everyone's augmentation, of the models, and of the loss."""

    students: dict = field(default_factory=dict)
    augmentation: dict = field(default_factory=dict)
    architectures: dict = field(default_factory=dict)
    teachers: tuple[str, ...] = (LITE0,)
    loss: str | None = None  # of `make_loss`; none of them learns from a teacher
    smote: bool = False


EXPERIMENTS = {
    "base": Change(),
    "two teachers": Change(teachers=(LITE0, LITE2)),
    "no teacher": Change(teachers=()),
    "no mix-up": Change(students={"mix_up": False}),
    "three times as long": Change(students={"epochs": 3 * EPOCHS}),
    "specimens drawn evenly": Change(students={"class_balance": "specimens"}),
    "no nuclear stain": Change(augmentation={"nuclear_stain": 0.0}),
    "no framing": Change(augmentation={"framing": (1.0, 1.0), "aspect": 0.0}),
    "no resolution": Change(augmentation={"resolution": 0.0}),
    "no focus and haze": Change(augmentation={"sharpness": 0.0, "haze": 0.0}),
    "no noise": Change(augmentation={"noise": 0.0}),
    "no exposure and black level": Change(augmentation={"exposure": 0.0, "black_level": 0.0}),
    "flips, shifts, gain and gamma alone": Change(augmentation=asdict(Augmentation())),
    "all images changed": Change(augmentation={"share": 1.0}),
    "ViT, 4 blocks": Change(architectures={"vit": {"depth": 4}}),
    "ViT, 9 blocks": Change(architectures={"vit": {"depth": 9}}),
    "ViT, 192 wide": Change(architectures={"vit": {"depth": 6, "width": 192}}),
    "auxiliary specimen loss": Change(teachers=(), loss="specimens"),
    "class weights": Change(teachers=(), loss="class weights"),
    "focal loss": Change(teachers=(), loss="focal"),
    "SMOTE": Change(teachers=(), smote=True),
}


class FocalLoss(nn.Module):
    """The cross-entropy, of which answers that are sure already have little (Lin et al. 2017)."""

    def __init__(self, focus: float = 2.0) -> None:
        super().__init__()
        self.focus = focus

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.inputs).float()
        surprise = F.cross_entropy(logits, batch.labels, reduction="none")
        return ((1 - torch.exp(-surprise)) ** self.focus * surprise).mean(), logits


class WeightedLoss(nn.Module):
    """The cross-entropy under which all classes weigh the same, whatever their number of cells."""

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        counts = labels.bincount()
        self.register_buffer("weight", len(labels) / (len(counts) * counts))

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.inputs).float()
        return F.cross_entropy(logits, batch.labels, self.weight), logits


def main(argv: list[str] | None = None) -> int:
    """Run the experiments and print their table; returns the exit status."""
    parser = make_parser(__doc__, dataset=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=tuple(EXPERIMENTS), default=tuple(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="of teacher and students alike, for a quick look")
    parser.add_argument("--teacher", nargs="+", default=(), metavar="NAME=FILE", help="local files of their weights")
    arguments = parser.parse_args(argv)
    files = {name: Path(file) for name, _, file in (teacher.partition("=") for teacher in arguments.teacher)}
    cells, accelerator = load_cells(arguments.dataset), make_accelerator()
    titles = [MODEL_TITLES[name] for name in BASE_MODELS]
    print(table(["change", "part", "teacher", *titles, "CNN + ViT", "its specimens right", "its Golgi recall"]))
    for name in arguments.only:
        for part in arguments.parts:
            plan = plan_of(EXPERIMENTS[name], arguments.epochs)
            row = run(cells, part, EXPERIMENTS[name], plan, arguments.output, files, arguments.seed, accelerator)
            columns = ("teacher", *BASE_MODELS, "mean")
            pairs = [row.get(column) and "{:.4f} / {:.4f}".format(*row[column]["accuracy"]) for column in columns]
            print(line([name, part, *pairs, row["mean"]["specimens"], row["mean"]["golgi_recall"]]), flush=True)
    return 0


def plan_of(change: Change, epochs: int | None = None) -> Plan:
    """Return the short `default` with one change."""
    plan = RECIPES["default"]
    augmentation = replace(plan.models["cnn"].augmentation, **change.augmentation)
    students = {"epochs": EPOCHS, "augmentation": augmentation} | change.students
    teachers = {"epochs": TEACHER_EPOCHS, "augmentation": augmentation}
    if epochs is not None:
        students["epochs"] = teachers["epochs"] = epochs
    return Plan(
        models={name: replace(plan.models[name], **students) for name in BASE_MODELS},
        teachers={name: replace(plan.teachers[name], **teachers) for name in change.teachers},
        architectures=plan.architectures | change.architectures,
    )


def run(
    cells: Cells,
    part: str,
    change: Change,
    plan: Plan,
    output: Path,
    files: dict[str, Path],
    seed: int,
    accelerator: Accelerator,
) -> dict[str, dict]:
    """Train teacher and students and measure them, unless `output` holds that.

    Returns for each network, and for the mean of the ensemble's members, mean class accuracy of the cells as they are
    and shifted, how many specimens are right, and the recall of Golgi.
    """
    folder = output / part / digest_of([asdict(plan), asdict(change), seed])
    if (folder / "measured.json").exists():
        return read_json(folder / "measured.json")
    known, held_out = divide(cells, part)
    train, watched = examples_of(cells, np.delete(known, np.s_[::10])), examples_of(cells, known[::10])
    identity = f"{cells.fingerprint}-{part}"
    settings = {"seed": seed, "accelerator": accelerator, "computed_from": identity, "progress": True}
    # Teachers of one row have the same recipe, so rows that share it share the teachers.
    of_teachers = output / part / f"teachers-{digest_of([list(map(asdict, plan.teachers.values()))[:1], seed])}"
    teachers = train_teachers(train, watched, of_teachers, plan, files, settings)
    specimens, class_of_specimen = specimens_of(cells, np.delete(known, np.s_[::10]))
    train = oversampled(train, seed) if change.smote else train._replace(specimens=specimens)
    torch.manual_seed(seed)
    students = {name: build_model(name, plan.architectures.get(name)) for name in BASE_MODELS}
    losses = {name: make_loss(change.loss, model, train, class_of_specimen) for name, model in students.items()}
    fit(
        students,
        train,
        watched,
        plan.models[BASE_MODELS[0]],
        directory=folder / "students",
        losses=losses if change.loss else None,
        teacher=(lambda: Teachers(teachers)) if teachers else None,
        **settings,
    )
    networks, device = {name: [model] for name, model in students.items()}, accelerator.device
    networks |= {"teacher": teachers} if teachers else {}
    networks["mean"] = [students[name] for name in StackEnsemble.members]
    views = [cells.images[held_out], shifted(cells.images[held_out])]
    answers = {
        name: [np.mean([answers_of(one, images.to(device)) for one in several], axis=0) for images in views]
        for name, several in networks.items()
    }
    blocks = None if part == "random" else blocks_of(cells)[held_out]
    result = {name: measure(values, cells.labels[held_out].numpy(), blocks) for name, values in answers.items()}
    write_json(folder / "measured.json", result)
    return result


def digest_of(settings: object) -> str:
    """Name settings by a short hash."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def divide(cells: Cells, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions to train on and to measure on: two folds and a third, or parts of a random split."""
    if part == "random":
        parts = split(cells, "deduplicated", 0)
        return parts.train, parts.validation
    fold, kept = int(part), unique_cells(cells)
    of_cell = np.array([block.fold for block in specimen_blocks()])[blocks_of(cells)[kept]]
    return kept[np.isin(of_cell, (fold ^ 2, fold ^ 3))], kept[of_cell == fold]


def make_loss(name: str | None, model: nn.Module, train: Examples, class_of_specimen: Tensor) -> nn.Module | None:
    """Make the loss of one model by its name; none for the usual one."""
    if name == "specimens":
        return AuxiliarySpecimenLoss(class_of_specimen, model.head.in_features)
    return {"focal": FocalLoss, "class weights": lambda: WeightedLoss(train.labels)}[name]() if name else None


def oversampled(train: Examples, seed: int) -> Examples:
    """Add cells between neighbours of one class until all classes have as many as the largest (Chawla et al. 2002)."""
    from imblearn.over_sampling import SMOTE  # of a package that nothing else needs

    inputs, labels = SMOTE(random_state=seed).fit_resample(train.inputs.flatten(1).numpy(), train.labels.numpy())
    inputs = torch.from_numpy(inputs.astype(np.float32)).view(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
    return train._replace(inputs=inputs, labels=torch.from_numpy(labels))


def answers_of(network: nn.Module, images: Tensor) -> np.ndarray:
    """Return a network's probabilities (images, 6), uncalibrated."""
    return predict_logits(network.to(images.device), images).softmax(1).cpu().numpy()


def measure(answers: list[np.ndarray], labels: np.ndarray, blocks: np.ndarray | None) -> dict:
    """Measure the answers (cells, 6) to held-out cells, as they are and shifted."""
    plain = metrics(answers[0], labels)
    counted = None if blocks is None else count_blocks(answers[0], blocks)
    return {
        "accuracy": [plain["mean_class_accuracy"], metrics(answers[1], labels)["mean_class_accuracy"]],
        "specimens": None if counted is None else f"{counted['right']} of {counted['total']}",
        "golgi_recall": plain["per_class"]["Golgi"]["recall"],
    }


if __name__ == "__main__":
    sys.exit(main())
