"""How fast a cohort goes: the plain command, and Ray with one actor and with more, on the same cells in one run.

    pip install -r requirements-ray.txt
    python -m benchmarks.cohort [--cells 5000] [--actors 2] [--fields 12] [--weights …] [--json]

The cells are synthetic PNG files, the fields synthetic images of some 1.3 megapixels. An actor has one core (or a GPU),
so Ray with one actor stands beside the plain command on one core. "Running" leaves out the start: the imports, the
loading of the models, and with Ray the start of its processes. Some three minutes on two cores.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hep2.hub import find_weights
from hep2.patterns import CLASS_NAMES
from hep2.predictor import Predictor
from hep2.synthetic import synthetic_cell, synthetic_field
from hep2.tables import RAY_BLOCK, classify_on_ray, open_table, table_row

DRAWN = 200  # cells, which are then written again and again under other names: drawing takes longer than reading


def main(argv: list[str] | None = None) -> int:
    """Measure, and print a table in Markdown or a JSON object; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=5000)
    parser.add_argument("--actors", type=int, default=2, help="of the largest run; each has a core, or a GPU")
    parser.add_argument("--fields", type=int, default=12, help="for the core-seconds of one; 0: none")
    parser.add_argument("--weights", help="OWNER/NAME[@revision] or a folder (default: the bundled ones)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    arguments = parser.parse_args(argv)
    weights, result = find_weights(arguments.weights), {}
    with tempfile.TemporaryDirectory(prefix="hep2-cohort-") as folder:
        files = write_cells(Path(folder), arguments.cells)
        for threads in dict.fromkeys((1, torch.get_num_threads())):
            torch.set_num_threads(threads)
            start = time.perf_counter()
            answers = Predictor(weights).classify(files)
            result[f"plain, threads: {threads}"] = measure(answers, weights.revision, Path(folder), start)
        for actors in dict.fromkeys((1, arguments.actors)):
            start = time.perf_counter()
            answers = classify_on_ray(files, weights=arguments.weights, actors=actors)
            result[f"Ray, actors: {actors}"] = measure(answers, weights.revision, Path(folder), start)
    if arguments.fields:
        torch.set_num_threads(1)
        result["core-seconds a field"] = measure_fields(Predictor(weights), arguments.fields)
    if arguments.json:
        print(json.dumps(result))
        return 0
    print("| run | seconds in all | cells a second | running |\n|---|---|---|---|")
    for name, run in result.items():
        if name != "core-seconds a field":
            print(f"| {name} | {run['seconds']:.1f} | {run['rate']:.0f} | {run['running']:.0f} |")
    one, more = (result[f"Ray, actors: {actors}"]["running"] for actors in (1, arguments.actors))
    print(f"\nRay with one actor: {one / result['plain, threads: 1']['running']:.2f} of the plain command's rate")
    print(f"Ray with {arguments.actors} actors: {more / one:.2f} of the rate with one")
    if arguments.fields:
        print(f"A field takes {result['core-seconds a field']:.2f} core-seconds")
    return 0


def write_cells(folder: Path, count: int) -> list[tuple[str, Path]]:
    """Write `count` files of `DRAWN` synthetic cells; returns their names and paths."""
    random, files = np.random.default_rng(0), []
    for number in range(min(count, DRAWN)):
        image = synthetic_cell(CLASS_NAMES[number % len(CLASS_NAMES)], random)
        for path in (folder / f"{copy:06}.png" for copy in range(number, count, DRAWN)):
            Image.fromarray(image).save(path)
            files.append((path.name, path))
    return sorted(files)


def measure(answers: Iterable, revision: str, folder: Path, start: float) -> dict[str, float]:
    """Write answers into a table and return the seconds, and the cells a second in all and behind the first ones."""
    path, begun, count = folder / "table.csv", start, 0
    with open_table(path, revision) as table:
        for count, answer in enumerate(answers, start=1):
            table.add(table_row(answer, revision))
            if count == RAY_BLOCK:
                begun = time.perf_counter()
    end = time.perf_counter()
    path.unlink()
    return {"seconds": end - start, "rate": count / (end - start), "running": (count - RAY_BLOCK) / (end - begun)}


def measure_fields(predictor: Predictor, count: int) -> float:
    """Return the core-seconds of one field, as decoded; a first one, which warms up, is left out."""
    random = np.random.default_rng(1)
    patterns = islice(cycle(CLASS_NAMES), count + 1)
    fields = [synthetic_field(pattern, random)[0] for pattern in patterns]
    predictor.specimen(fields[:1])
    start = time.process_time()
    for field in islice(fields, 1, None):
        predictor.specimen([field])
    return (time.process_time() - start) / count


if __name__ == "__main__":
    sys.exit(main())
