"""How well cells are found in synthetic fields, and specimens read from them; where every cell lies is known.

    python -m benchmarks.fields [--fields 50] [--specimens 20] [--others 10] [--cost]

Detection: a found cell is right where its box and that of a nucleus overlap with an intersection over union of 0.5;
"in mitosis" are such cells among the found, at 0.3, since only their plate may shine.
Specimens: of one field each. Others: fields whose cells show none of the six patterns. Cost: seconds and
memory of larger and larger fields, with loaded models and from the start of a process. Takes some minutes on two cores.
Prints tables in Markdown.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.growth import watched
from hep2.fields import in_mitosis, read_specimen
from hep2.hub import open_weights
from hep2.patterns import CLASS_NAMES
from hep2.phantoms import OTHER_STAINS, phantom_field
from hep2.reader import Reader
from hep2.segmentation import find_cells

# Pattern, shape, nuclei across in pixels, and density: cells grow at one size of field, then the field.
COSTS = (
    ("NuMem", (966, 1296), 60.0, 0.15),
    ("NuMem", (966, 1296), 60.0, 0.3),
    ("NuMem", (966, 1296), 60.0, 0.7),
    ("Golgi", (966, 1296), 60.0, 0.7),
    ("NuMem", (2160, 2560), 60.0, 0.5),
    ("NuMem", (4472, 4472), 90.0, 0.5),
    ("Golgi", (4472, 4472), 90.0, 0.5),
)


def main(argv: list[str] | None = None) -> int:
    """Measure, and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, default=50, help="for detection, of patterns in turn; 0: none")
    parser.add_argument("--specimens", type=int, default=20, help="of each pattern, for the verdict")
    parser.add_argument("--others", type=int, default=10, help="of each other pattern, which should get no verdict")
    parser.add_argument("--cost", action="store_true", help="measure seconds and memory too")
    parser.add_argument("--weights", help="OWNER/NAME[@revision] or a folder (default: the bundled ones)")
    arguments = parser.parse_args(argv)
    if arguments.fields:
        measure_detection(arguments.fields)
    reader = Reader(open_weights(arguments.weights))
    for patterns, count in ((CLASS_NAMES, arguments.specimens), (OTHER_STAINS, arguments.others)):
        if count:
            measure_verdicts(reader, dict.fromkeys(patterns, count))
    if arguments.cost:
        measure_cost(reader, arguments.weights)
    return 0


def measure_detection(count: int) -> None:
    """Find the cells of `count` fields, of patterns, sizes and densities in turn."""
    print(
        "| pattern | fields | cells | precision | recall | F1, boxes at IoU 0.5 | in mitosis | told | wrongly told |"
        "\n|---|---|---|---|---|---|---|---|---|"
    )
    every = dict.fromkeys(CLASS_NAMES, np.zeros(6, int))  # right, found, there; in mitosis: found, told, wrongly told
    fields = dict.fromkeys(CLASS_NAMES, 0)
    for number in range(count):
        pattern = CLASS_NAMES[number % len(CLASS_NAMES)]
        random = np.random.default_rng((9, number))
        nucleus, density = random.uniform(40, 140), random.uniform(0.2, 0.8)
        image, cells = phantom_field(pattern, random, nucleus=nucleus, density=density)
        field = find_cells(image.astype(np.float32))
        found, told = [cell.bbox for cell in field.cells], in_mitosis(field)
        there = [cell.bbox for cell in cells]
        mitoses = [any(cell.mitotic and overlap(box, cell.bbox) >= 0.3 for cell in cells) for box in found]
        wrongly = sum(called and not mitotic for called, mitotic in zip(told, mitoses, strict=True))
        counts = (matches(found, there), len(found), len(there), sum(mitoses), sum(told) - wrongly, wrongly)
        every[pattern] = every[pattern] + counts
        fields[pattern] += 1
    every["all"], fields["all"] = sum(every.values()), count
    for pattern, (right, found, there, *mitotic) in every.items():
        precision, recall = right / max(found, 1), right / max(there, 1)
        f1 = 2 * precision * recall / max(precision + recall, 1e-9)
        of_mitosis = " | ".join(map(str, mitotic))
        scores = f"{precision:.3f} | {recall:.3f} | {f1:.3f}"
        print(f"| {pattern} | {fields[pattern]} | {there} | {scores} | {of_mitosis} |", flush=True)


def measure_verdicts(reader: Reader, specimens: dict[str, int]) -> None:
    """Read so many specimens of each pattern, one field each; of another pattern than the six, no verdict is right."""
    print("\n| pattern | specimens | right | verdicts | seconds each |\n|---|---|---|---|---|")
    for pattern, count in specimens.items():
        verdicts, started = [], time.perf_counter()
        for number in range(count):
            random = np.random.default_rng((10, number))
            image, _ = phantom_field(pattern, random, nucleus=random.uniform(50, 120), density=random.uniform(0.3, 0.7))
            verdicts.append(read_specimen(reader, [("phantom", image.astype(np.float32), [])]).verdict)
        seconds = (time.perf_counter() - started) / max(1, count)
        right = sum(v == pattern or (pattern in OTHER_STAINS and v not in CLASS_NAMES) for v in verdicts)
        listed = ", ".join(f"{verdict} {number}" for verdict, number in Counter(verdicts).most_common())
        print(f"| {pattern} | {count} | {right} | {listed} | {seconds:.1f} |", flush=True)


def measure_cost(reader: Reader, weights: str | None) -> None:
    """Read fields of more and more cells, and of more and more pixels."""
    print(
        "\n| pattern | megapixels | nuclei across | cells | seconds | from the start of a process | MB |"
        "\n|---|---|---|---|---|---|---|"
    )
    for pattern, shape, nucleus, density in COSTS:
        image, _ = phantom_field(pattern, np.random.default_rng(0), shape=shape, nucleus=nucleus, density=density)
        started = time.perf_counter()
        specimen = read_specimen(reader, [("phantom", image.astype(np.float32), [])])
        seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "field.png"
            Image.fromarray(image).save(path)
            whole, memory = watched(["specimen", str(path), *(["--weights", weights] if weights else [])])
        times = f"{seconds:.1f} | {whole:.1f} | {memory / 1e6:.0f}"
        print(f"| {pattern} | {image.size / 1e6:.1f} | {nucleus:.0f} | {len(specimen.cells)} | {times} |", flush=True)


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
