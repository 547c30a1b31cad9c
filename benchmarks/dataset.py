"""Audit a dataset: its classes, its parts, and cells that repeat an earlier one pixel for pixel.

    python -m benchmarks.dataset [--dataset …] [--json]

A minute on one core for the published 13,596 cells.
"""

import json
import sys

from benchmarks.common import make_parser
from hep2.data import Cells, load_cells
from hep2.patterns import CLASS_NAMES


def main(argv: list[str] | None = None) -> int:
    """Count, and print lines of text or a JSON object; returns the exit status."""
    parser = make_parser(__doc__, dataset=True)
    parser.add_argument("--json", action="store_true", help="one JSON object, with the name of every duplicate")
    arguments = parser.parse_args(argv)
    result = audit(load_cells(arguments.dataset))
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(f"{result['dataset']}: {result['cells']:,} cells, fingerprint {result['fingerprint']}")
    for field in ("classes", "parts"):
        print(f"{field}: " + ", ".join(f"{name} {count:,}" for name, count in result[field].items()))
    print(f"{result['duplicates']} cells repeat an earlier one")
    print(f"{result['duplicates_across_parts']} of them lie in another part of the dataset's own split than the first")
    print(f"{result['duplicates_of_another_class']} of them have another label than the first")
    return 0


def audit(cells: Cells) -> dict:
    """Count classes and duplicates, and the duplicates that lie across the parts of the dataset's own split."""
    first = {digest: position for position, digest in reversed(list(enumerate(cells.digests)))}
    pairs = [(first[digest], position) for position, digest in enumerate(cells.digests) if first[digest] != position]
    return {
        "dataset": cells.source,
        "fingerprint": cells.fingerprint,
        "cells": len(cells),
        "classes": dict(zip(CLASS_NAMES, cells.labels.bincount(minlength=len(CLASS_NAMES)).tolist(), strict=True)),
        "parts": {part: cells.parts.count(part) for part in dict.fromkeys(cells.parts)},
        "duplicates": len(pairs),
        "duplicates_across_parts": sum(cells.parts[one] != cells.parts[other] for one, other in pairs),
        "duplicates_of_another_class": sum(bool(cells.labels[one] != cells.labels[other]) for one, other in pairs),
        "pairs": [[cells.names[one], cells.names[other]] for one, other in pairs],
    }


if __name__ == "__main__":
    sys.exit(main())
