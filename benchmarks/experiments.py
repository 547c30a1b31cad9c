"""What helps on new specimens: one change of the recipe `sharp` at a time, measured on specimens that were kept away.

    python -m benchmarks.experiments --dataset … --output runs/experiments [--only NAME …] [--model cnn]

Each change is trained twice, on two folds of the block table, and measured on a third. The fourth is not looked at:
folds 0 and 2 take no part in any choice. With `--folds random` it is trained and measured on the train and validation
part of the clean protocol: what it costs where specimens are known. Ten epochs of the CNN take four minutes on one
core; an experiment that is named with its epochs takes as many more. What is finished is not repeated. Prints a table
in Markdown; those in README.md beside this file are what it printed.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from hep2.data import Cells, blocks_of, load_cells, spare_specimens, specimen_blocks, split, unique_cells
from hep2.evaluation import metrics
from hep2.models import MODELS, build_model, probabilities
from hep2.patterns import DEFAULT_DATASET
from hep2.pipeline import examples_of, to_train
from hep2.recipes import RECIPES
from hep2.specimens import read_blocks
from hep2.training import Examples, Recipe, fit, predict_logits

FOLDS = ("1", "3")  # that are measured on; 0 and 2 are left alone
EPOCHS = 10
PLAIN = {"specimen_supervision": False, "epochs": EPOCHS}  # what is on trial here is added to these changes
SHARP = asdict(RECIPES["sharp"]["cnn"])
ROBUST = {name: value for name, value in asdict(RECIPES["robust"]["cnn"]).items() if value != SHARP[name]}
SPOILT = {name: ROBUST[name] for name in ("haze", "noise", "zoom", "sharpness")}
FEWER = {
    "class_balance": "none",
    "nuclear_stain": 0.15,
    "share": 0.4,
    "zoom": 0.25,
    "sharpness": 1.0,
    "haze": 0.4,
    "exposure": 0.6,
}
TUNED = {name: value for name, value in asdict(RECIPES["tuned"]["cnn"]).items() if value != SHARP[name]}
TUNED |= {"specimen_supervision": True}  # as in `sharp`, but not in PLAIN
# What else its finish could change: more, and in more images.
HARDER = TUNED["finish_changes"] | {"haze": 0.25, "nuclear_stain": 0.1}
HARDEST = HARDER | {"share": 0.4, "haze": 0.4, "nuclear_stain": 0.2, "class_balance": "specimens"}
EXPERIMENTS = {
    "plain": {},
    "classes and specimens drawn evenly": {"class_balance": "specimens"},
    "scale and focus": {"zoom": 0.15, "sharpness": 1.0},
    "haze and noise": {"haze": 1.0, "noise": 0.2},
    "gain and gamma": {"gain": 0.6},
    "haze, noise, gain and gamma": {"haze": 1.0, "noise": 0.2, "gain": 0.6},
    "haze and noise in half of the images": {"haze": 1.0, "noise": 0.2, "share": 0.5},
    "all of these": {"class_balance": "specimens", "zoom": 0.15, "sharpness": 1.0, "haze": 1.0, "noise": 0.2},
    "nuclear stain": {"nuclear_stain": ROBUST["nuclear_stain"]},
    "haze, noise, scale and focus": SPOILT,
    "haze, noise, scale, focus and nuclear stain": {"nuclear_stain": ROBUST["nuclear_stain"], **SPOILT},
    "the same, drawn evenly (the recipe robust)": ROBUST | PLAIN,
    "the recipe robust, thirty epochs": ROBUST | PLAIN | {"epochs": 30},
    "robust, sixty epochs": ROBUST | PLAIN | {"epochs": 60},
    "robust and CutMix, thirty epochs": ROBUST | PLAIN | {"epochs": 30, "cutmix": 0.5},
    "robust in seven images of ten, thirty epochs": ROBUST | PLAIN | {"epochs": 30, "share": 0.7},
    "robust with more scale and focus, thirty epochs": ROBUST | PLAIN | {"epochs": 30, "zoom": 0.3, "sharpness": 1.25},
    "robust with a slower average, thirty epochs": ROBUST | PLAIN | {"epochs": 30, "ema_decay": 0.999},
    "robust, then fewer cells changed, sixty epochs": ROBUST
    | PLAIN
    | {"epochs": 60, "finish": 0.4, "finish_changes": FEWER},
    "tuned with a harder finish, all its epochs": TUNED | {"finish_changes": HARDER},
    "tuned with the hardest finish, all its epochs": TUNED | {"finish_changes": HARDEST},
    "tuned, all its epochs": TUNED,
    "tuned but for telling specimens apart, all its epochs": TUNED | {"specimen_supervision": False},
    "tuned, twenty epochs": TUNED | {"epochs": 20},
    "tuned with the hardest finish, twenty epochs": TUNED | {"epochs": 20, "finish_changes": HARDEST},
    "tuned but for telling specimens apart, twenty epochs": TUNED | {"epochs": 20, "specimen_supervision": False},
    "MixStyle": {"style_mixing": 0.5},
    "CutMix": {"cutmix": 0.5},
    "specimens told apart in training": {"specimen_supervision": True},
    "no average of the weights": {"ema_decay": None},
    "no label smoothing": {"label_smoothing": 0.0},
    "plain, eight views averaged at test": {},
    "plain, a specimen of each class left out": {},
    "the same, the epoch chosen on these specimens": {"patience": EPOCHS},
    "plain and synthetic cells": {},
    "the recipe robust and synthetic cells": ROBUST | PLAIN,
}
# What else than the recipe is another: see `run`. Eight views need no training of their own: plain's model is asked.
WAYS = {
    "plain, eight views averaged at test": {"views": 8},
    "plain, a specimen of each class left out": {"sparing": True},
    "the same, the epoch chosen on these specimens": {"sparing": True},
    "plain and synthetic cells": {"synthetic": True},
    "the recipe robust and synthetic cells": {"synthetic": True},
}


def main(argv: list[str] | None = None) -> int:
    """Run the experiments and print their table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=DEFAULT_DATASET)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", choices=("cnn", "rescnn", "vit"), default="cnn")
    parser.add_argument("--only", nargs="+", choices=tuple(EXPERIMENTS), metavar="NAME", help="default: what fits")
    parser.add_argument("--folds", nargs="+", choices=(*FOLDS, "random"), default=FOLDS)
    arguments = parser.parse_args(argv)
    # `fit` refuses to mix the styles of a model that has no early layers.
    mixes = hasattr(MODELS[arguments.model], "early_layers")
    fitting = [name for name, changes in EXPERIMENTS.items() if mixes or "style_mixing" not in changes]
    if unfit := set(arguments.only or ()) - set(fitting):
        parser.error(f"argument --only: {', '.join(sorted(unfit))} is not for the model {arguments.model}")
    accelerator = Accelerator(mixed_precision="bf16")
    cells = load_cells(arguments.dataset)
    print("| change | fold | accuracy | mean class accuracy | cross-entropy | specimens right |")
    print("|---|---|---|---|---|---|")
    for name in arguments.only or fitting:
        recipe = replace(RECIPES["sharp"][arguments.model], **PLAIN | EXPERIMENTS[name])
        ways = WAYS.get(name, {})
        trained = "plain" if "views" in ways else name
        for fold in arguments.folds:
            folder = arguments.output / f"{arguments.model}-{trained.replace(' ', '-')}-{fold}"
            row = run(cells, arguments.model, recipe, fold, folder, accelerator, **ways)
            figures = " | ".join(f"{row[field]:.4f}" for field in ("accuracy", "mean_class_accuracy", "loss"))
            print(f"| {name} | {fold} | {figures} | {row['right']} of {row['total']} |", flush=True)
    return 0


def run(
    cells: Cells,
    name: str,
    recipe: Recipe,
    fold: str,
    folder: Path,
    accelerator: Accelerator,
    views: int = 1,
    sparing: bool = False,
    synthetic: bool = False,
) -> dict:
    """Train on two folds and measure on `fold`, unless `folder` holds that run; returns the measurements.

    With 8 `views`, probabilities are averaged over a cell's quarter turns and their mirror images. With `sparing`, a
    specimen of each class is kept out of the training, and is what a recipe with patience chooses its epoch on. With
    `synthetic`, phantoms join the training, those of a class as one more specimen of it.
    """
    train, kept_away = development_split(cells, fold)
    watched = measured = examples_of(cells, kept_away)
    if sparing:
        train, spared = spare_specimens(cells, train, seed=0)
        watched = examples_of(cells, spared)
    torch.manual_seed(0)
    model = build_model(name)
    fitted, known = to_train(model, cells, train, recipe)
    if synthetic:
        known = with_phantoms(known)
    fit(fitted, known, watched, recipe, directory=folder, seed=0, accelerator=accelerator)
    model, seen = model.cpu(), eight_views(measured.inputs)[:views]
    answers = torch.stack([probabilities(predict_logits(model, view)) for view in seen]).mean(0).numpy()
    blocks = read_blocks(answers, blocks_of(cells)[kept_away])
    loss = F.nll_loss(torch.from_numpy(answers).log(), measured.labels).item()
    result = metrics(answers, measured.labels.numpy()) | {"loss": loss, **blocks}
    result["accuracy"] = float((answers.argmax(1) == measured.labels.numpy()).mean())  # of cells, not of blocks
    return result


def with_phantoms(known: Examples) -> Examples:
    """Add 300 synthetic cells of each class to the examples; diffuse stain is still that of real nuclei alone."""
    phantoms = load_cells("phantoms:300")
    number = int(known.specimens.max()) + 1 + phantoms.labels
    return known._replace(
        inputs=torch.cat([known.inputs, phantoms.images]),
        labels=torch.cat([known.labels, phantoms.labels]),
        specimens=torch.cat([known.specimens, number]),
    )


def eight_views(images: torch.Tensor) -> list[torch.Tensor]:
    """Return images (cells, 1, rows, columns) as they are, their other quarter turns, and the mirror images of all."""
    turned = [torch.rot90(images, turn, (2, 3)).contiguous() for turn in range(4)]
    return [*turned, *(view.flip(3) for view in turned)]


def development_split(cells: Cells, fold: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the cells of two folds, and those of `fold`; duplicates are left out.

    For "random" they are the train and the validation cells of the clean protocol, seed 0.
    """
    if fold == "random":
        parts = split(cells, "clean", 0)
        return parts.train, parts.validation
    fold = int(fold)
    kept = unique_cells(cells)
    of_cell = np.array([block.fold for block in specimen_blocks()])[blocks_of(cells)[kept]]
    return kept[np.isin(of_cell, (fold ^ 2, fold ^ 3))], kept[of_cell == fold]


if __name__ == "__main__":
    sys.exit(main())
