"""Does anything done against the imbalance of the classes help? Golgi has 724 of 13,402 cells.

    pip install imbalanced-learn
    python -m benchmarks.imbalance --dataset … --output runs/imbalance [--only NAME …] [--seeds 0 1 2]

The CNN by the recipe `sharp` without specimen supervision, ten epochs, on the clean protocol's split of each
seed, measured on its validation part: what is chosen here is not chosen by a test cell. SMOTE draws its cells between
neighbours of the train part alone. One run takes some eight minutes of one core; what is finished is not repeated.
Prints a table in Markdown, mean ± standard deviation over the seeds; the one in README.md beside this file is it.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from hep2.data import Cells, load_cells, split
from hep2.evaluation import metrics
from hep2.models import build_model, probabilities
from hep2.patterns import DEFAULT_DATASET, IMAGE_SIZE
from hep2.pipeline import examples_of
from hep2.recipes import RECIPES
from hep2.training import Examples, fit, predict_logits

PLAIN = replace(RECIPES["sharp"]["cnn"], epochs=10, specimen_supervision=False)
REMEDIES = {
    "none": PLAIN,
    "class weights": replace(PLAIN, class_balance="weights"),
    "balanced sampling": replace(PLAIN, class_balance="sampling"),
    "focal loss": replace(PLAIN, focal=2.0),
    "SMOTE": PLAIN,
}


def main(argv: list[str] | None = None) -> int:
    """Train, and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=DEFAULT_DATASET)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=tuple(REMEDIES), default=tuple(REMEDIES), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    arguments = parser.parse_args(argv)
    accelerator, cells = Accelerator(mixed_precision="bf16"), load_cells(arguments.dataset)
    results = {name: [] for name in arguments.only}
    for seed in arguments.seeds:  # a seed of all remedies before the next
        for name in arguments.only:
            results[name].append(run(cells, name, seed, arguments.output, accelerator))
    print("| against the imbalance | seeds | Golgi recall | macro F1 | accuracy |\n|---|---|---|---|---|")
    for name, runs in results.items():
        spread = [f"{np.mean(v):.4f} ± {np.std(v):.4f}" for v in zip(*(one.values() for one in runs), strict=True)]
        print(f"| {name} | {len(runs)} | {' | '.join(spread)} |")
    return 0


def run(cells: Cells, name: str, seed: int, output: Path, accelerator: Accelerator) -> dict[str, float]:
    """Train with one remedy and one seed, unless the run's folder holds that; returns the measurements."""
    folder = output / f"{name.replace(' ', '-')}-{seed}"
    parts, recipe = split(cells, "clean", seed), REMEDIES[name]
    train, validation = (examples_of(cells, part) for part in (parts.train, parts.validation))
    if name == "SMOTE":
        train = oversampled(train, seed)
    torch.manual_seed(seed)
    model = build_model("cnn")
    fit(model, train, validation, recipe, directory=folder, seed=seed, accelerator=accelerator)
    answers = probabilities(predict_logits(model.cpu(), validation.inputs)).numpy()
    measured = metrics(answers, validation.labels.numpy())
    result = {"golgi_recall": measured["per_class"]["Golgi"]["recall"], "macro_f1": measured["macro_f1"]}
    result["accuracy"] = measured["accuracy"]
    return result


def oversampled(train: Examples, seed: int) -> Examples:
    """Add cells between neighbours of one class until all classes have as many as the largest (Chawla et al. 2002)."""
    from imblearn.over_sampling import SMOTE

    inputs, labels = SMOTE(random_state=seed).fit_resample(train.inputs.flatten(1).numpy(), train.labels.numpy())
    inputs = torch.from_numpy(inputs.astype(np.float32)).view(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
    return Examples(inputs, torch.from_numpy(labels))


if __name__ == "__main__":
    sys.exit(main())
