"""The figure of the six patterns in docs/usage.md, made of synthetic cells.

    python -m benchmarks.figure [--seed 0] [--output docs/classes.png]

A column for each pattern, with its family by the International Consensus on ANA Patterns.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hep2.patterns import PATTERNS
from hep2.synthetic import synthetic_cell

ROWS = 3  # cells of each pattern


def main(argv: list[str] | None = None) -> int:
    """Draw the figure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/classes.png"), metavar="PNG")
    arguments = parser.parse_args(argv)
    random = np.random.default_rng(arguments.seed)
    figure = Figure(figsize=(9, 4.9), layout="constrained")
    for pattern, column in zip(PATTERNS, figure.subplots(ROWS, len(PATTERNS)).T, strict=True):
        for axes in column:
            axes.imshow(synthetic_cell(pattern.name, random), cmap="gray")
            axes.set_axis_off()
        column[0].set_title(f"{pattern.name}\n{', '.join(pattern.families)}", fontsize=11)
    figure.savefig(arguments.output, dpi=100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
