"""What the benchmarks share: their arguments, the cells that weights have not seen, and tables in Markdown."""

import argparse
import os
from collections.abc import Iterable

import numpy as np
import torch
from accelerate import Accelerator
from torch import Generator, Tensor

from hep2.augmentation import as_strangers
from hep2.checkpoints import Weights
from hep2.data import Cells, Split, specimen_blocks
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET
from hep2.pipeline import check_unseen, split_of
from hep2.recipes import RECIPES

SHIFT_SEED = 100  # of the one shift of each cell: no training, calibration or rejection has it
SHIFT_BATCH = 512  # cells that are shifted together: a part of the seed


def make_parser(description: str | None, *, weights: bool = False, dataset: bool = False) -> argparse.ArgumentParser:
    """Make a parser whose help is a module's docstring, with `--weights` and `--dataset` where they are taken."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if weights:
        parser.add_argument("--weights", help="OWNER/NAME[@revision] or a folder (default: the bundled ones)")
    if dataset:
        default = os.environ.get("HEP2_DATASET") or DEFAULT_DATASET
        where = "Hub name, local folder or synthetic[:COUNT] (default: HEP2_DATASET, else the Hub's)"
        parser.add_argument("--dataset", default=default, help=where)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Let a command line choose a recipe as `train.py` does; see `hep2.recipes.choose_plan`."""
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="default")
    parser.add_argument("--epochs", type=int, help="in place of the recipe's, for all networks but the stack")
    teachers = "in place of the recipe's, with a local file of their weights; 'none' trains without"
    parser.add_argument("--teacher", nargs="+", metavar="NAME[=FILE]", help=teachers)


def make_accelerator() -> Accelerator:
    """Make the accelerator that `train.py` has: mixed precision on a GPU, full precision elsewhere."""
    return Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")


def own_split(weights: Weights, cells: Cells) -> Split:
    """Divide the cells as the weights' own training has; its test cells are new to them.

    Raises
    ------
    ValueError
        If they are not.
    """
    parts = split_of(weights, cells)
    check_unseen(weights, cells, parts.test)
    return parts


def shifted(images: Tensor, seed: int = SHIFT_SEED) -> Tensor:
    """Show each image once as a stranger's: see `hep2.augmentation.as_strangers`. The same seed, the same images."""
    generator = Generator().manual_seed(seed)
    return torch.cat([as_strangers(batch, generator) for batch in images.split(SHIFT_BATCH)])


def count_blocks(probabilities: np.ndarray, blocks: np.ndarray) -> dict:
    """Give each specimen one verdict, from the mean of its cells' probabilities, and count.

    Parameters
    ----------
    probabilities
        Of shape (cells, 6).
    blocks
        The position in `hep2.data.specimen_blocks()` of each cell's specimen, (cells,).
    """
    known, wrong, numbers = specimen_blocks(), [], np.unique(blocks)
    for number in numbers:
        verdict = CLASS_NAMES[int(probabilities[blocks == number].mean(0).argmax())]
        if verdict != known[number].class_name:
            wrong.append({"block": known[number].name, "verdict": verdict, "cells": int((blocks == number).sum())})
    right = len(numbers) - len(wrong)
    return {"accuracy": right / len(numbers), "right": right, "total": len(numbers), "wrong": wrong}


def table(columns: Iterable[str], rows: Iterable[Iterable] = ()) -> str:
    """Set out rows in Markdown; floats get four digits, and what is None is left empty."""
    columns = list(columns)
    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])


def line(values: Iterable) -> str:
    """Set out one row of a table in Markdown."""
    texts = ("" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in values)
    return f"| {' | '.join(texts)} |"
