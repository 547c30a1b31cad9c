"""How long the CNN takes to a validation accuracy of 95 % on the clean protocol.

    python -m benchmarks.time_to_accuracy --dataset … [--epochs 16] [--goal 0.95]

The recipe `sharp` in a short cycle, without specimen supervision. Seconds are those of the epochs,
augmentation and validation included; loading the cells and starting PyTorch come before. Prints a line an epoch.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from hep2.data import load_cells, split
from hep2.models import build_model
from hep2.patterns import DEFAULT_DATASET
from hep2.pipeline import examples_of
from hep2.recipes import RECIPES
from hep2.training import fit


def main(argv: list[str] | None = None) -> int:
    """Train, and print; returns 0 if the goal was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=DEFAULT_DATASET)
    parser.add_argument("--epochs", type=int, default=16, help="of the cycle; the goal may be reached before its end")
    parser.add_argument("--goal", type=float, default=0.95, help="validation accuracy")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    cells = load_cells(arguments.dataset)
    parts = split(cells, "clean", arguments.seed)
    train, validation = (examples_of(cells, part) for part in (parts.train, parts.validation))
    recipe = replace(RECIPES["sharp"]["cnn"], epochs=arguments.epochs, specimen_supervision=False)
    torch.manual_seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        accelerator = Accelerator(mixed_precision="bf16")
        options = {"directory": Path(folder), "seed": arguments.seed, "accelerator": accelerator}
        history = fit(build_model("cnn"), train, validation, recipe, **options)
        whole = time.perf_counter() - started
    reached, seconds = None, 0.0
    for record in history:
        # An epoch's own seconds are those of its steps: what lies between is validation and the checkpoint.
        seconds += record["seconds"] * whole / sum(one["seconds"] for one in history)
        print(f"epoch {record['epoch']}: {seconds:.0f} s, validation accuracy {record['validation_accuracy']:.4f}")
        if reached is None and record["validation_accuracy"] >= arguments.goal:
            reached = seconds
    outcome = "was not reached" if reached is None else f"after {reached / 60:.1f} minutes"
    print(f"{arguments.goal:.0%} {outcome}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    return int(reached is None)


if __name__ == "__main__":
    sys.exit(main())
