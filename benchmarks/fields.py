"""How well cells are found in slide fields, and specimens read from them.

    python -m benchmarks.fields [detection] [mitoses] [verdicts] [exposure] [cost]      synthetic, every place known
    HEP2_FIELDS=FOLDER python -m benchmarks.fields real                                 ACA-*.tif, HOM-*.tif, …
    HEP2_REFERENCE_PICTURES=FOLDER python -m benchmarks.fields pictures                 ac-0/*, ac-1/*, …

Detection: a found cell is right where its box and that of a nucleus overlap with an intersection over union of 0.5.
Mitoses: those told among all cells, right at 0.3, since only their plate may be outlined; and by kind.
Verdicts: specimens of one field, as drawn and reduced to nuclei of 35, 25 and 18 pixels as JPEG. Exposure: the same
fields at 1 to 1/8 of the light, of 8 to 32 bits, without and with a camera's noise. Real fields are also read at a half
and at four times the light. Prints tables in Markdown; all of it takes half an hour on two cores.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

import hep2
from benchmarks.growth import watched
from benchmarks.strangers import FAMILIES, FIELDS
from hep2.fields import SpecimenPrediction, predict_specimen
from hep2.fields.segmentation import find_cells
from hep2.fields.stain import measure_stain
from hep2.images import SUFFIXES, Decoded, decode
from hep2.patterns import CLASS_NAMES
from hep2.synthetic import OTHER_PATTERNS, expose, reduce_field, synthetic_field

Box = tuple[int, int, int, int]
DIAMETERS = (None, 35, 25, 18)  # pixels of a nucleus in the reduced fields; None: as drawn
LIGHTS = (1, 1 / 2, 1 / 4, 1 / 8)
# Pattern, shape, diameter of a nucleus in pixels, and density: cells grow at one size of field, then the field.
COSTS = (
    ("NuMem", (966, 1296), 60.0, 0.15),
    ("NuMem", (966, 1296), 60.0, 0.7),
    ("Golgi", (966, 1296), 60.0, 0.7),
    ("NuMem", (4472, 4472), 90.0, 0.5),
    ("Golgi", (4472, 4472), 90.0, 0.5),
)


def main(argv: list[str] | None = None) -> int:
    """Measure, and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("detection", "mitoses", "verdicts", "exposure", "cost", "real", "pictures")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)}; none: the first four")
    parser.add_argument("--count", type=int, default=3, help="fields of each pattern")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", help="OWNER/NAME[@revision] or a folder (default: the bundled ones)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"unknown parts {sorted(unknown)}: choose some of {', '.join(parts)}")
    chosen = arguments.parts or parts[:4]
    predictor = hep2.load(arguments.weights) if set(chosen) - {"detection", "mitoses"} else None
    for part in chosen:
        print(f"\n### {part}\n", flush=True)
        match part:
            case "detection":
                measure_detection(arguments.count, arguments.seed)
            case "mitoses":
                measure_mitoses(arguments.count, arguments.seed)
            case "verdicts":
                measure_verdicts(predictor, arguments.count, arguments.seed)
            case "exposure":
                measure_exposure(predictor, arguments.count, arguments.seed)
            case "cost":
                measure_cost(predictor, arguments.weights)
            case "real":
                measure_real(predictor, _folder("HEP2_FIELDS"))
            case "pictures":
                measure_pictures(predictor, _folder("HEP2_REFERENCE_PICTURES"))
    return 0


def drawn(patterns: Iterable[str], count: int, seed: int, **options):
    """Yield (pattern, diameter of its nuclei, field float32, cells) for `count` fields of each pattern."""
    for pattern in patterns:
        for number in range(count):
            random = np.random.default_rng((seed, number))
            nucleus, density = random.uniform(40, 110), random.uniform(0.3, 0.7)
            settings = {"shape": (800, 1000), "nucleus": nucleus, "density": density} | options
            image, cells = synthetic_field(pattern, random, **settings)
            yield pattern, nucleus, image, cells


def measure_detection(count: int, seed: int) -> None:
    """Find the cells of fields of the six patterns."""
    print("| pattern | fields | cells | precision | recall | F1, boxes at IoU 0.5 |\n|---|---|---|---|---|---|")
    every = {name: np.zeros(4, int) for name in CLASS_NAMES}  # fields, right, found, there
    for pattern, _, image, cells in drawn(CLASS_NAMES, count, seed):
        found, there = ([cell.bbox for cell in some] for some in (find_cells(image.astype(np.float32)).cells, cells))
        every[pattern] += (1, matches(found, there), len(found), len(there))
    every["all"] = sum(every.values())
    for pattern, (fields, right, found, there) in every.items():
        precision, recall = right / max(found, 1), right / max(there, 1)
        f1 = 2 * precision * recall / max(precision + recall, 1e-9)
        print(f"| {pattern} | {fields} | {there} | {precision:.3f} | {recall:.3f} | {f1:.3f} |", flush=True)


def measure_mitoses(count: int, seed: int) -> None:
    """Tell mitoses in fields that have many."""
    print("| pattern | mitoses | precision | recall | of the wrong kind |\n|---|---|---|---|---|")
    for name in CLASS_NAMES:
        told, right, there, wrong = 0, 0, 0, 0
        for _, _, image, cells in drawn([name], count, seed, mitoses=0.12):
            image = image.astype(np.float32)
            found = find_cells(image)
            there += sum(cell.mitotic for cell in cells)
            for cell, kind in zip(found.cells, measure_stain(image, found).mitoses if found.cells else (), strict=True):
                if kind:
                    best = max(cells, key=lambda other, cell=cell: overlap(other.bbox, cell.bbox))
                    hit = best.mitotic and overlap(best.bbox, cell.bbox) >= 0.3
                    told, right = told + 1, right + hit
                    wrong += hit and best.stained_plate != (kind == "stained")
        scores = f"{right / max(told, 1):.2f} | {right / max(there, 1):.2f}"
        print(f"| {name} | {there} | {scores} | {wrong} |", flush=True)


def measure_verdicts(predictor: hep2.Predictor, count: int, seed: int) -> None:
    """Read specimens of the six and of other patterns at several resolutions."""
    heads = [f"nuclei of {size} pixels" if size else "as drawn" for size in DIAMETERS]
    print(f"| pattern | {' | '.join(heads)} | other verdicts |\n|---|{'---|' * len(heads)}---|")
    shares: dict[bool, list[float]] = {True: [], False: []}
    for pattern in (*CLASS_NAMES, *OTHER_PATTERNS):
        right, wrong = Counter(), Counter()
        for _, nucleus, image, cells in drawn([pattern], count, seed):
            for size in DIAMETERS:
                reduced = image if size is None or size > nucleus else reduce_field(image, cells, size / nucleus, 85)[0]
                specimen = _read(predictor, reduced)
                shares[pattern in CLASS_NAMES].append(_sureness(specimen))
                if _is_right(specimen.verdict, pattern):
                    right[size] += 1
                else:
                    wrong[specimen.verdict] += 1
        listed = ", ".join(f"{verdict} {number}" for verdict, number in wrong.most_common())
        print(f"| {pattern} | {' | '.join(f'{right[size]} of {count}' for size in DIAMETERS)} | {listed} |", flush=True)
    _print_area(shares[True], shares[False])


def measure_exposure(predictor: hep2.Predictor, count: int, seed: int) -> None:
    """Read the same fields at other exposures, and count those whose verdict stays."""
    print("| pattern | camera | light | verdict stays | weak signal |\n|---|---|---|---|---|")
    for pattern in (*CLASS_NAMES, "AC-0 negative"):
        fields = [image for *_, image, _ in drawn([pattern], count, seed)]
        plain = [_read(predictor, image).verdict for image in fields]
        for bits, offset, noisy in ((8, 0, False), (16, 0.02, False), (32, 0, False), (16, 0, True)):
            for light in LIGHTS:
                again = [
                    _read(predictor, expose(image, random, light=light, bits=bits, offset=offset))
                    for number, image in enumerate(fields)
                    for random in [np.random.default_rng((seed, number)) if noisy else None]
                ]
                stays = sum(one.verdict == before for one, before in zip(again, plain, strict=True))
                weak = sum(any(warning.startswith("weak signal") for warning in one.warnings) for one in again)
                camera = f"{bits} bit{', noise' if noisy else ''}"
                print(f"| {pattern} | {camera} | {light:g} | {stays} of {count} | {weak} |", flush=True)


def measure_real(predictor: hep2.Predictor, folder: Path) -> None:
    """Read real fields, whose names begin with their pattern, at several gains."""
    print("| field | verdict | at ½ | at 4 times | cells | mitoses | seconds |\n|---|---|---|---|---|---|---|")
    for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
        started = time.perf_counter()
        decoded = decode(path)
        specimen = predict_specimen(predictor, [(path.name, decoded)])
        seconds = time.perf_counter() - started
        others = [_read(predictor, (gain * decoded.intensity).round()).verdict for gain in (0.5, 4)]
        right = _is_right(specimen.verdict, FIELDS.get(path.name[:3]))
        print(
            f"| {path.name}{'' if right else ' (wrong)'} | {specimen.verdict} | {' | '.join(others)} | "
            f"{len(specimen.cells)} | {specimen.mitoses} | {seconds:.1f} |",
            flush=True,
        )


def measure_pictures(predictor: hep2.Predictor, folder: Path) -> None:
    """Read the consensus' reference pictures, in folders that are named ac-0 to ac-31."""
    print("| picture | pattern | verdict | probability | cells | why not |\n|---|---|---|---|---|---|")
    right, count, shares = Counter(), Counter(), {True: [], False: []}
    for group in sorted(folder.iterdir(), key=lambda path: int(path.name.partition("-")[2] or -1)):
        pattern = FAMILIES.get(group.name.upper())
        for path in sorted(group.iterdir()):
            specimen = predict_specimen(predictor, [path])
            shares[pattern is not None].append(_sureness(specimen))
            count[pattern is not None] += 1
            right[pattern is not None] += (good := _is_right(specimen.verdict, pattern))
            why = next((warning for warning in specimen.warnings if warning.startswith("rejected")), "")
            row = f"{pattern} | {specimen.verdict} | {specimen.probability} | {len(specimen.cells)} | {why}"
            print(f"| {group.name}/{path.stem[:8]}{'' if good else ' (wrong)'} | {row} |", flush=True)
    print(
        f"\n{right[True]} of {count[True]} of the six right, {right[False]} of {count[False]} others given none of them"
    )
    _print_area(shares[True], shares[False])


def measure_cost(predictor: hep2.Predictor, weights: str | None) -> None:
    """Read fields of more and more cells, and of more and more pixels."""
    print("| pattern | megapixels | cells | seconds | from the start of a process | MB |\n|---|---|---|---|---|---|")
    for pattern, shape, nucleus, density in COSTS:
        image, _ = synthetic_field(pattern, np.random.default_rng(0), shape=shape, nucleus=nucleus, density=density)
        started = time.perf_counter()
        specimen = _read(predictor, image)
        seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "field.png"
            Image.fromarray(image).save(path)
            whole, memory = watched(["specimen", str(path), *(["--weights", weights] if weights else [])])
        times = f"{seconds:.1f} | {whole:.1f} | {memory / 1e6:.0f}"
        print(f"| {pattern} | {image.size / 1e6:.1f} | {len(specimen.cells)} | {times} |", flush=True)


def _read(predictor: hep2.Predictor, image: np.ndarray) -> SpecimenPrediction:
    return predict_specimen(predictor, [("field", Decoded(image.astype(np.float32), ()))])


def _is_right(verdict: str, pattern: str | None) -> bool:
    return verdict == pattern if pattern in CLASS_NAMES else verdict not in CLASS_NAMES


def _sureness(specimen: SpecimenPrediction) -> float:
    """Return the mean of the cells' top probability."""
    tops = [cell.prediction.probabilities["ensemble"].max() for cell in specimen.cells]
    return float(np.mean(tops)) if tops else 0.0


def _print_area(ours: list[float], others: list[float]) -> None:
    area = roc_auc_score([1] * len(ours) + [0] * len(others), ours + others)
    print(f"\nThe cells' mean top probability tells the six from others with an area under the curve of {area:.2f}")


def _folder(variable: str) -> Path:
    if variable not in os.environ:
        raise SystemExit(f"{variable} must name the folder of pictures")
    return Path(os.environ[variable])


def matches(found: list[Box], there: list[Box]) -> int:
    """Count the boxes (top, left, height, width) of `there` that one of `found` hits; each counts once."""
    free, right = list(found), 0
    for box in there:
        best = max(free, key=lambda other: overlap(box, other), default=None)
        if best is not None and overlap(box, best) >= 0.5:
            free.remove(best)
            right += 1
    return right


def overlap(one: Box, other: Box) -> float:
    """Return the intersection of two boxes over their union."""
    height = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    width = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    if height <= 0 or width <= 0:
        return 0.0
    both = height * width
    return both / (one[2] * one[3] + other[2] * other[3] - both)


if __name__ == "__main__":
    sys.exit(main())
