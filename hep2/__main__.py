"""The command line: `python -m hep2 classify | specimen | evaluate | stress | bench | audit | phantoms`."""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from tqdm import tqdm

from hep2 import __version__
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET, MODEL_TITLES

if TYPE_CHECKING:
    from hep2.weights import Weights


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 1 if anything failed, having done all the rest."""
    parser = argparse.ArgumentParser(prog="python -m hep2", description="Read HEp-2 cells. Not for clinical use.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    classify = commands.add_parser("classify", help="give a verdict for each image")
    classify.add_argument(
        "images", nargs="*", metavar="IMAGE", help="PNG, JPEG, TIFF, BMP or WebP of one cell, or a folder of such"
    )
    classify.add_argument("--dataset", metavar="NAME", help="read the cells of a dataset: Hub name, folder or phantoms")
    classify.add_argument(
        "--output", type=Path, metavar="CSV", help="write a table, with a progress bar; started again, it goes on"
    )
    form = classify.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line, one line an image")
    form.add_argument("--csv", action="store_true", help="a table with a line for each image")
    add_weights_option(classify)
    classify.set_defaults(run=_classify)

    specimen = commands.add_parser("specimen", help="find and read the cells of whole slide fields of one specimen")
    specimen.add_argument("fields", nargs="+", metavar="FIELD", help="image of many cells, or a folder of such")
    specimen.add_argument("--pixel-size", type=float, metavar="MICROMETRES", help="default: from the nuclei themselves")
    form = specimen.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object, with every cell")
    form.add_argument("--csv", action="store_true", help="a table with a line for each cell")
    specimen.add_argument(
        "--overlay", type=Path, metavar="PNG", help="draw the cells into the field, or, numbered, the fields"
    )
    add_weights_option(specimen)
    specimen.set_defaults(run=_specimen)

    evaluate = commands.add_parser("evaluate", help="measure weights on test cells that they have not seen")
    _add_dataset(evaluate)
    evaluate.add_argument(
        "--protocol",
        choices=("paper", "clean", "specimen"),
        help="how the cells are divided (default: as the weights were trained with); specimen without --fold "
        "trains and measures models on each of the four folds, and goes on where it was stopped",
    )
    evaluate.add_argument("--seed", type=int, help="of the split (default: the weights' own)")
    evaluate.add_argument("--fold", type=int, help="0 to 3: measure weights that were trained on that fold")
    evaluate.add_argument("--output", type=Path, required=True, metavar="DIR", help="for metrics.json and the rest")
    evaluate.add_argument("--recipe", help="for the four folds: see train.py (default: tuned)")
    evaluate.add_argument("--epochs", type=int, help="for the four folds, in place of the recipe's")
    add_weights_option(evaluate)
    evaluate.set_defaults(run=_evaluate)

    stress = commands.add_parser("stress", help="spoil test cells, and give images that are no cells")
    _add_dataset(stress)
    stress.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    add_weights_option(stress)
    stress.set_defaults(run=_stress)

    bench = commands.add_parser("bench", help="measure speed on this machine, beside ordinary networks")
    bench.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    bench.add_argument("--training", action="store_true", help="measure training as well")
    add_weights_option(bench)
    bench.set_defaults(run=_bench)

    audit = commands.add_parser("audit", help="count a dataset's classes and find its duplicates")
    _add_dataset(audit)
    audit.add_argument("--json", action="store_true", help="one JSON object, with the name of every duplicate")
    audit.set_defaults(run=_audit)

    phantoms = commands.add_parser("phantoms", help="make synthetic cells, or fields")
    phantoms.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets a folder for each pattern")
    phantoms.add_argument("--count", type=int, default=5, help="cells of each pattern (default: 5)")
    phantoms.add_argument("--fields", action="store_true", help="a whole field of each pattern in place of cells")
    phantoms.add_argument("--seed", type=int, default=0, help="the same seed makes the same cells (default: 0)")
    phantoms.set_defaults(run=_phantoms)

    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are no UTF-8 come out as they went in
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads the output has seen enough, as `head` has; what is left would fail at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"hep2: {error}", file=sys.stderr)
        return 1


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", default=DEFAULT_DATASET, help="Hub name, local folder, or phantoms[:COUNT]")


def _default_weights() -> str | None:
    return os.environ.get("HEP2_WEIGHTS") or None  # a Space's variable may be left empty


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    """Let a command line name the weights to read with."""
    parser.add_argument(
        "--weights",
        default=_default_weights(),
        metavar="NAME",
        help="OWNER/NAME[@revision] on the Hub or a folder (default: HEP2_WEIGHTS, else the bundled ones)",
    )


def _open_weights(name: str | None) -> "Weights":
    # PyTorch takes seconds to import: help and wrong arguments need not wait for it.
    from hep2.hub import open_weights
    from hep2.weights import best_device

    weights = open_weights(name).to(best_device())
    for note in weights.notes:
        print(f"hep2: {note}", file=sys.stderr)
    return weights


def _classify(arguments: argparse.Namespace) -> int:
    from hep2.reader import Failure, Reader, csv_header, csv_row

    if bool(arguments.images) == bool(arguments.dataset):
        raise ValueError("give images or folders of images, or --dataset NAME, and not both")
    if arguments.output and (arguments.json or arguments.csv):
        raise ValueError("--output writes a table of its own: leave out --json and --csv")
    if arguments.output:
        return _classify_into(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several processes read into one table: give --output, or start one process")
    reader = Reader(_open_weights(arguments.weights))
    table = csv.writer(sys.stdout, lineterminator="\n")
    if arguments.csv:
        table.writerow(csv_header(reader.weights))
    failed = False
    for reading in reader.read(_sources(arguments)):
        if isinstance(reading, Failure):
            failed = True
            print(f"hep2: {reading.file}: {reading.error}", file=sys.stderr)
        if arguments.json:
            print(json.dumps(reading.as_dict(), ensure_ascii=False), flush=True)
        elif arguments.csv:
            table.writerow(csv_row(reading, reader.weights))
        elif not isinstance(reading, Failure):
            verdict = "no verdict"
            if not reading.refused:
                verdict = f"{reading.verdict} {reading.probability:.1%}, {reading.agreement} of 4 models agree"
            print(f"{reading.file}: {verdict}")
            for name, values in () if reading.refused else reading.probabilities.items():  # which would mean nothing
                bars = "  ".join(f"{label} {p:.1%}" for label, p in zip(CLASS_NAMES, values, strict=True))
                print(f"  {MODEL_TITLES[name]:15} {bars}")
            for warning in reading.warnings:
                print(f"  note: {warning}")
    return int(failed)


def _sources(arguments: argparse.Namespace) -> Iterator[tuple[str, Path | bytes]]:
    """Yield what is to be classified, one after the other: of 100,000 cells few are in memory at a time."""
    from hep2.bulk import find_images

    if not arguments.dataset:
        yield from ((path, Path(path)) for path in find_images(arguments.images))
        return
    from hep2.data import dataset_files

    yield from ((file.name, file.image) for file in dataset_files(arguments.dataset))


def _classify_into(arguments: argparse.Namespace) -> int:
    from accelerate import PartialState
    from accelerate.utils import gather_object, parse_flag_from_env

    from hep2.bulk import find_images, forget_failures, gather_parts, read_into
    from hep2.data import count_cells
    from hep2.reader import Reader

    # One process, or those of `accelerate launch`, each of which is given its card before the models go there.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    reader = Reader(_open_weights(arguments.weights))
    if arguments.output.is_dir():
        raise ValueError(f"--output {arguments.output} is a folder: give the name of a CSV file")
    if state.is_main_process:
        gather_parts(arguments.output, reader.weights)  # of a run that was killed
        forget_failures(arguments.output, reader.weights)
    state.wait_for_everyone()
    total = count_cells(arguments.dataset) if arguments.dataset else sum(1 for _ in find_images(arguments.images))
    failed = read_into(
        reader,
        _sources(arguments),
        arguments.output,
        total=total,
        process=state.process_index,
        processes=state.num_processes,
    )
    failed = sum(gather_object([failed]))  # which waits for all
    if state.is_main_process:
        gather_parts(arguments.output, reader.weights)
        noun = "process" if state.num_processes == 1 else "processes"
        print(f"{total:,} images are in {arguments.output}, read by {state.num_processes} {noun}", file=sys.stderr)
        if failed:
            print(f"hep2: {failed:,} of them could not be read: see the column error", file=sys.stderr)
    # A process that ended with an error would take those along that are not done.
    state.wait_for_everyone()
    status = int(failed > 0 and state.is_main_process)
    state.destroy_process_group()
    return status


def _specimen(arguments: argparse.Namespace) -> int:
    from hep2.bulk import find_images
    from hep2.fields import check_pixel_size, draw_overlays, read_specimen, specimen_rows
    from hep2.imaging import read_intensity
    from hep2.reader import Reader

    check_pixel_size(arguments.pixel_size)
    paths, overlays = list(find_images(arguments.fields)), []
    if overlay := arguments.overlay:
        overlays = [overlay]
        if len(paths) > 1:
            overlays = [overlay.with_stem(f"{overlay.stem}-{number + 1}") for number in range(len(paths))]
        given = {Path(path).resolve() for path in paths}
        for drawn in overlays:
            if drawn.is_dir():
                raise ValueError(f"--overlay {drawn} is a folder: give the name of a PNG file")
            if drawn.resolve() in given:
                raise ValueError(f"--overlay would write over the field {drawn}: give another name")
    fields = []
    for path in paths:
        try:
            fields.append((path, *read_intensity(Path(path))))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: {error}") from error
    reader = Reader(_open_weights(arguments.weights))
    specimen = read_specimen(
        reader,
        fields,
        pixel_size=arguments.pixel_size,
        progress=lambda items, total, step: tqdm(items, step, total, disable=not sys.stderr.isatty()),
    )
    if overlays:
        pictures = draw_overlays(specimen, (intensity for _, intensity, _ in fields))
        for path, picture in zip(overlays, pictures, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, "PNG")
    if arguments.json:
        print(json.dumps(specimen.as_dict(), ensure_ascii=False))
    elif arguments.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(specimen_rows(specimen))
        # The table has the cells: what they say together goes beside it.
        for remark in (specimen.verdict, *specimen.warnings):
            print(f"hep2: {remark}", file=sys.stderr)
    else:
        print(specimen.verdict + (f" {specimen.probability:.1%}" if specimen.probability is not None else ""))
        if specimen.interval:
            print("  the mean over its cells; {:.1%} to {:.1%} in 95 of 100 draws of them".format(*specimen.interval))
        answer = specimen.as_dict()
        counts = [f"{name} {count}" for name, count in specimen.counts.items() if count]
        counts += [f"{answer[what]} {what}" for what in ("refused", "mitotic") if answer[what]]
        print(f"  {answer['cells']} cells" + (f": {', '.join(counts)}" if counts else ""))
        for warning in specimen.warnings:
            print(f"  note: {warning}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from hep2.data import load_cells
    from hep2.evaluation import class_report, comparison_table
    from hep2.pipeline import evaluate_weights

    if arguments.protocol == "specimen" and arguments.fold is None:
        if arguments.weights != _default_weights():
            raise ValueError(
                "the protocol 'specimen' trains models of its own on each fold: leave out --weights, or name the "
                "--fold that they were trained on"
            )
        return _evaluate_specimens(arguments)
    if arguments.recipe or arguments.epochs:
        raise ValueError("--recipe and --epochs are for --protocol specimen, which trains: weights are measured as is")
    weights = _open_weights(arguments.weights)
    result = evaluate_weights(
        weights,
        load_cells(arguments.dataset),
        arguments.output,
        protocol=arguments.protocol,
        seed=arguments.seed,
        fold=arguments.fold,
    )
    if result["trained_on_fingerprint"] != result["dataset_fingerprint"]:
        print(
            "note: the weights were trained on another dataset (fingerprint "
            f"{result['trained_on_fingerprint']}): whether they have seen some of these cells cannot be told\n"
        )
    print(f"protocol {result['protocol']}, seed {result['seed']}, {result['test_size']:,} test cells\n")
    print(comparison_table(result["models"], result["dataset"]))
    print(f"\n{result['refused']:.1%} of the cells would get no verdict; the figures count them all the same.")
    print(f"\nStack ensemble, class by class\n{class_report(result['models']['ensemble'])}")
    print(f"\nmetrics.json, predictions.csv and figures are in {arguments.output}")
    return 0


def _evaluate_specimens(arguments: argparse.Namespace) -> int:
    from accelerate import Accelerator

    from hep2.data import load_cells
    from hep2.specimens import evaluate_specimens, specimens_table

    accelerator = Accelerator(mixed_precision="bf16")
    changes = {} if arguments.epochs is None else {"epochs": arguments.epochs}
    cells, seed = load_cells(arguments.dataset), arguments.seed or 0
    settings = {"recipe": arguments.recipe or "tuned", "seed": seed, "changes": changes}
    result = evaluate_specimens(cells, arguments.output, **settings, accelerator=accelerator)
    if accelerator.is_main_process:
        print(f"{specimens_table(result)}\n\nmetrics.json and a folder for each fold are in {arguments.output}")
    return 0


def _stress(arguments: argparse.Namespace) -> int:
    from hep2.data import load_cells
    from hep2.pipeline import stress_weights
    from hep2.stress import stress_tables

    weights = _open_weights(arguments.weights)
    result = stress_weights(weights, load_cells(arguments.dataset), arguments.dataset)
    print(json.dumps(result) if arguments.json else stress_tables(result))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from hep2.bench import measure_speed, measure_training, speed_tables

    result = measure_speed(_open_weights(arguments.weights))
    if arguments.training:
        result["training"] = measure_training()
    print(json.dumps(result) if arguments.json else speed_tables(result))
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from hep2.data import audit, load_cells

    result = audit(load_cells(arguments.dataset))
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(f"{result['dataset']}: {result['cells']:,} cells, fingerprint {result['fingerprint']}")
    for field in ("classes", "parts"):
        print(f"{field}: " + ", ".join(f"{name} {count:,}" for name, count in result[field].items()))
    print(f"{result['duplicates']} cells repeat an earlier one pixel for pixel")
    print(f"{result['duplicates_across_parts']} of these pairs lie across parts of the dataset's own split")
    print(f"{result['duplicates_of_another_class']} of these pairs are labelled differently")
    return 0


def _phantoms(arguments: argparse.Namespace) -> int:
    from hep2.phantoms import phantom_fields, phantom_files

    if arguments.fields:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for pattern, image in phantom_fields(arguments.seed):
            Image.fromarray(image).save(arguments.output / f"{pattern}.png")
        print(f"a synthetic field of each of the {len(CLASS_NAMES)} patterns is in {arguments.output}")
        return 0
    if arguments.count < 1:
        raise ValueError(f"--count is {arguments.count}: give 1 or more")
    for number, (_, image, pattern) in enumerate(phantom_files(arguments.count, arguments.seed)):
        path = arguments.output / pattern / f"{number % arguments.count + 1}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    print(f"{arguments.count} synthetic cells of each of the {len(CLASS_NAMES)} patterns are in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
