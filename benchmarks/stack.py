"""Is the stack worth its place? Ways to make one verdict of the members' probabilities, on the same trained members.

    python train.py --dataset … --seed 1 --output runs/seed-1        # and others: a split seed each
    python -m benchmarks.stack --dataset … runs/tuned runs/seed-1 …

What is fitted is fitted on all validation cells of each run's own split (`train.py` keeps a fifth of them aside to
watch the fit); what is printed is measured on its test cells, mean ± standard deviation over the runs. Nothing is
chosen here: all ways are listed. The best single model is the one that is best on validation. "Eight views" are means
over a cell's quarter turns and their mirror images, for eight times the work. The last row takes each cell's answer
from a model that is right, if there is one: a bound, and no way to make a verdict.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.experiments import eight_views
from hep2.data import Cells, load_cells
from hep2.evaluation import fit_temperature, metrics
from hep2.models import FullPrecisionLinear, probabilities
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET, MODEL_TITLES
from hep2.pipeline import own_split
from hep2.reader import predict
from hep2.recipes import RECIPES
from hep2.training import Examples, fit, predict_logits
from hep2.weights import Weights, load_weights

SINGLE = ("cnn", "rescnn", "vit")
SOURCES = ("cnn", "vit")  # that the source's stack reads


def main(argv: list[str] | None = None) -> int:
    """Measure every run, and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=DEFAULT_DATASET)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of train.py, other split seeds each")
    arguments = parser.parse_args(argv)
    cells = load_cells(arguments.dataset)
    measured: dict[str, list[tuple[float, ...]]] = {}
    for folder in arguments.runs:
        for way, row in verdicts_of(load_weights(folder, SINGLE, with_refusal=False), cells).items():
            measured.setdefault(way, []).append(row)
    print("| verdict of | runs | accuracy | mean class accuracy | lowest F1 | cross-entropy |")
    print("|---|---|---|---|---|---|")
    for way, rows in measured.items():
        spread = " | ".join(f"{np.mean(v):.4f} ± {np.std(v):.4f}" for v in zip(*rows, strict=True))
        print(f"| {way} | {len(rows)} | {spread} |")
    return 0


def verdicts_of(weights: Weights, cells: Cells) -> dict[str, tuple[float, ...]]:
    """Measure all ways on the test cells of the split that the models were trained by."""
    parts, seed = own_split(weights, cells), weights.configs["cnn"]["training"]["seed"]
    labels, test_labels = cells.labels[parts.validation], cells.labels[parts.test].numpy()
    known = predict(weights, cells.images[parts.validation]).probabilities
    views = [predict(weights, view).probabilities for view in eight_views(cells.images[parts.test])]
    new = views[0]
    best = max(SINGLE, key=lambda name: (known[name].argmax(1) == labels.numpy()).mean())
    answers = {MODEL_TITLES[name]: new[name] for name in SINGLE}
    answers["the best of them on validation"] = new[best]
    for names in (SOURCES, SINGLE):
        titles = ", ".join(MODEL_TITLES[name] for name in names)
        answers[f"mean of {titles}"] = np.mean([new[name] for name in names], axis=0)
        stack = fit_stack(_beside(known, names), labels, seed)
        temperature = fit_temperature(predict_logits(stack, _beside(known, names)), labels)
        logits = predict_logits(stack, _beside(new, names))
        answers[f"linear layer, {6 * len(names)} to 6, on {titles}"] = probabilities(logits, temperature).numpy()
    turned = {name: np.mean([view[name] for view in views], axis=0) for name in SINGLE}
    answers |= {f"{MODEL_TITLES[name]}, eight views": turned[name] for name in SINGLE}
    for names in (SOURCES, SINGLE):
        titles = ", ".join(MODEL_TITLES[name] for name in names)
        answers[f"mean of {titles}, eight views"] = np.mean([turned[name] for name in names], axis=0)
    # No verdict can know which member is right: this is as far as any way of making one of these three could come.
    of_members = np.stack([new[name] for name in SINGLE])
    wrong = of_members.argmax(2) != test_labels
    answers["whichever of the three is right"] = of_members[wrong.argmin(0), np.arange(len(test_labels))]
    return {way: _figures(values, test_labels) for way, values in answers.items()}


def fit_stack(inputs: Tensor, labels: Tensor, seed: int) -> torch.nn.Module:
    """Fit a linear layer on members' probabilities (cells, 6 x members), from their mean on, as the stack is fitted."""
    members = inputs.shape[1] // len(CLASS_NAMES)
    layer = FullPrecisionLinear(inputs.shape[1], len(CLASS_NAMES))
    torch.nn.init.zeros_(layer.bias)
    layer.weight.data.copy_(8 / members * torch.eye(len(CLASS_NAMES)).repeat(1, members))
    examples, recipe = Examples(inputs, labels), RECIPES["tuned"]["ensemble"]
    with tempfile.TemporaryDirectory() as folder:
        fit(layer, examples, examples, recipe, directory=Path(folder), seed=seed, accelerator=Accelerator(cpu=True))
    return layer.cpu().eval()


def _beside(answers: dict[str, np.ndarray], names: tuple[str, ...]) -> Tensor:
    return torch.from_numpy(np.concatenate([answers[name] for name in names], axis=1)).float()


def _figures(answers: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    result = metrics(answers, labels)
    surprise = -np.log(np.clip(answers[np.arange(len(labels)), labels], 1e-12, None)).mean()
    lowest = min(row["f1"] for row in result["per_class"].values())
    return result["accuracy"], result["mean_class_accuracy"], lowest, float(surprise)


if __name__ == "__main__":
    sys.exit(main())
