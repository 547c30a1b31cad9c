"""How well cells are found in synthetic fields, and specimens read from them; where every cell lies is known.

    python -m benchmarks.fields [--fields 50] [--specimens 20]

Detection: a found cell is right where its box and that of a nucleus overlap with an intersection over union of 0.5.
Specimens: one field each of every pattern. Takes some minutes on two cores. Prints tables in Markdown.
"""

import argparse
import sys
import time

import numpy as np

from hep2.fields import read_specimen
from hep2.hub import open_weights
from hep2.patterns import CLASS_NAMES
from hep2.phantoms import phantom_field
from hep2.reader import Reader
from hep2.segmentation import find_cells


def main(argv: list[str] | None = None) -> int:
    """Measure, and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, default=50, help="for detection, of patterns in turn")
    parser.add_argument("--specimens", type=int, default=20, help="of each pattern, for the verdict")
    parser.add_argument("--weights", help="OWNER/NAME[@revision] or a folder (default: the bundled ones)")
    arguments = parser.parse_args(argv)
    print("| pattern | fields | cells | precision | recall | F1 at IoU 0.5 |\n|---|---|---|---|---|---|")
    every = dict.fromkeys(CLASS_NAMES, np.zeros(3, int))  # right, found, there
    fields = dict.fromkeys(CLASS_NAMES, 0)
    for number in range(arguments.fields):
        pattern = CLASS_NAMES[number % len(CLASS_NAMES)]
        random = np.random.default_rng((9, number))
        nucleus, density = random.uniform(40, 140), random.uniform(0.2, 0.8)
        image, cells = phantom_field(pattern, random, nucleus=nucleus, density=density)
        found = [cell.bbox for cell in find_cells(image.astype(np.float32)).cells]
        there = [cell.bbox for cell in cells]
        every[pattern] = every[pattern] + (matches(found, there), len(found), len(there))
        fields[pattern] += 1
    every["all"], fields["all"] = sum(every.values()), arguments.fields
    for pattern, (right, found, there) in every.items():
        precision, recall = right / max(found, 1), right / max(there, 1)
        f1 = 2 * precision * recall / max(precision + recall, 1e-9)
        print(f"| {pattern} | {fields[pattern]} | {there} | {precision:.3f} | {recall:.3f} | {f1:.3f} |")
    print("\n| pattern | specimens | right | others' verdicts | seconds each |\n|---|---|---|---|---|")
    reader = Reader(open_weights(arguments.weights))
    for pattern in CLASS_NAMES:
        verdicts, started = [], time.perf_counter()
        for number in range(arguments.specimens):
            random = np.random.default_rng((10, number))
            image, _ = phantom_field(pattern, random, nucleus=random.uniform(50, 120), density=random.uniform(0.3, 0.7))
            verdicts.append(read_specimen(reader, [("phantom", image.astype(np.float32), [])]).verdict)
        seconds = (time.perf_counter() - started) / max(1, arguments.specimens)
        others = {verdict: verdicts.count(verdict) for verdict in verdicts if verdict != pattern}
        listed = ", ".join(f"{verdict} {count}" for verdict, count in others.items())
        print(f"| {pattern} | {len(verdicts)} | {verdicts.count(pattern)} | {listed} | {seconds:.1f} |")
    return 0


def matches(found: list[tuple[int, int, int, int]], there: list[tuple[int, int, int, int]]) -> int:
    """Count the boxes (top, left, height, width) of `there` that one of `found` hits; each counts once."""
    free, right = list(found), 0
    for box in there:
        best = max(free, key=lambda other: overlap(box, other), default=None)
        if best is not None and overlap(box, best) >= 0.5:
            free.remove(best)
            right += 1
    return right


def overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Return the intersection of two boxes over their union."""
    height = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    width = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    if height <= 0 or width <= 0:
        return 0.0
    both = height * width
    return both / (one[2] * one[3] + other[2] * other[3] - both)


if __name__ == "__main__":
    sys.exit(main())
