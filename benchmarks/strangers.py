"""What strangers' images are read as: slide fields of another laboratory, and reference pictures of the consensus.

    python -m benchmarks.strangers --fields DIR --reference-pictures DIR [--weights …] [--json]

The folders may come from HEP2_FIELDS and HEP2_REFERENCE_PICTURES instead; what is not given is left out. `--fields`
holds files named after their pattern (`ACA-1.tif`, see `FIELDS`), `--reference-pictures` a folder for each pattern of
the consensus (`ac-3/…`). Each image is one specimen. "Alone" is the pattern that is likeliest by the plain mean of the
ensemble's probabilities over the cells found, without rejection or any rule of a field. The areas under the curve say
how well our six patterns are told from others. Some two seconds an image on one core.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

import hep2
from benchmarks.common import make_parser, table
from hep2.patterns import CLASS_NAMES, PATTERNS

# Of the sample data of "Antinuclear Antibodies classification" (J. Golda and M. Szpyrka, AGH University 2019).
FIELDS = {"ACA": "Centromere", "HOM": "Homogeneous", "NUC": "Nucleolar", "ZIA": "Speckled"}
# Of the International Consensus on ANA Patterns, anapatterns.org.
FAMILIES = {family: pattern.name for pattern in PATTERNS for family in pattern.families}
OTHER = "none of the six"
SCORES = {
    "share of rejected cells": lambda row: -row["rejected"],
    "mean top probability": lambda row: row["top"],
    "mean rejection score": lambda row: row["rejection"],
}


def main(argv: list[str] | None = None) -> int:
    """Read every image, and print tables in Markdown or a JSON object; returns the exit status."""
    parser = make_parser(__doc__, weights=True)
    for option, variable in (("--fields", "HEP2_FIELDS"), ("--reference-pictures", "HEP2_REFERENCE_PICTURES")):
        parser.add_argument(option, type=Path, metavar="DIR", default=os.environ.get(variable), help=f"or {variable}")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    arguments = parser.parse_args(argv)
    sets = find_sets(arguments)
    if not sets:
        parser.error("give --fields or --reference-pictures, or set HEP2_FIELDS or HEP2_REFERENCE_PICTURES")
    predictor = hep2.load(arguments.weights)
    result = {}
    for name, images in sets.items():
        rows = [measure_image(predictor, path, answer) for path, answer in images]
        result[name] = {"images": rows, **summarise(rows)}
    print(json.dumps(result) if arguments.json else "\n\n".join(tables(name, one) for name, one in result.items()))
    return 0


def find_sets(arguments: argparse.Namespace) -> dict[str, list[tuple[Path, str]]]:
    """List the images of each folder that is given, and the right answer of each, in the order of their names."""
    sets = {}
    if arguments.fields:
        paths = sorted(path for path in Path(arguments.fields).iterdir() if path.suffix != ".md")
        sets["fields"] = [(path, FIELDS.get(path.stem.partition("-")[0], OTHER)) for path in paths]
    if arguments.reference_pictures:
        folders = sorted(Path(arguments.reference_pictures).glob("ac-*"), key=lambda path: int(path.name[3:]))
        sets["reference pictures"] = [
            (path, FAMILIES.get(folder.name.upper(), OTHER)) for folder in folders for path in sorted(folder.iterdir())
        ]
    return sets


def measure_image(predictor: hep2.Predictor, path: Path, answer: str) -> dict:
    """Read one image as a specimen, and say what its cells alone would make of it."""
    name = f"{path.parent.name}/{path.name}"
    specimen = predictor.specimen([(name, path)])
    row = {"image": name, "answer": answer, "verdict": specimen.verdict, "probability": specimen.probability}
    cells = [cell.prediction for cell in specimen.cells]
    if not cells:  # nothing is less like a cell of the six patterns
        return row | {"alone": None, "cells": 0, "rejected": 1.0, "top": 0.0, "rejection": None}
    probabilities = np.stack([cell.probabilities["ensemble"] for cell in cells])  # (cells, 6)
    return row | {
        "alone": CLASS_NAMES[int(probabilities.mean(0).argmax())],
        "cells": len(cells),
        "rejected": float(np.mean([cell.rejected for cell in cells])),
        "top": float(probabilities.max(1).mean()),
        "rejection": float(np.mean([cell.rejection for cell in cells])),
    }


def summarise(rows: list[dict]) -> dict:
    """Count right answers, and measure how well scores tell images of the six patterns from others."""
    ours = [row for row in rows if row["answer"] != OTHER]
    others = [row for row in rows if row["answer"] == OTHER]
    lowest = min((row["rejection"] for row in rows if row["cells"]), default=0.0)
    rows = [row if row["cells"] else row | {"rejection": lowest - 1} for row in rows]
    truth = [row["answer"] != OTHER for row in rows]
    return {
        "six patterns": len(ours),
        "right": sum(row["verdict"] == row["answer"] for row in ours),
        "right alone": sum(row["alone"] == row["answer"] for row in ours),
        "others": len(others),
        "others right": sum(row["verdict"] not in CLASS_NAMES for row in others),
        "area under the curve": {
            name: float(roc_auc_score(truth, [score(row) for row in rows])) if ours and others else None
            for name, score in SCORES.items()
        },
    }


def tables(name: str, result: dict) -> str:
    """Set out what was measured on one set of images in Markdown."""
    rows = [
        [row["image"], row["answer"], row["verdict"], row["probability"], row["alone"], row["cells"], row["rejected"]]
        for row in result["images"]
    ]
    totals = [
        ["verdict, of the six patterns", f"{result['right']} of {result['six patterns']}"],
        ["alone, of the six patterns", f"{result['right alone']} of {result['six patterns']}"],
        ["others given none of the six", f"{result['others right']} of {result['others']}"],
        *([f"area under the curve, {score}", area] for score, area in result["area under the curve"].items()),
    ]
    columns = ["image", "right answer", "verdict", "probability", "alone", "cells", "rejected"]
    return table(columns, rows) + "\n\n" + table([name, "right"], totals)


if __name__ == "__main__":
    sys.exit(main())
