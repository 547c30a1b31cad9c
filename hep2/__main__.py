"""The command line: `python -m hep2 classify | specimen | evaluate | synthesize`."""

import argparse
import csv
import io
import json
import os
import sys
from collections import Counter
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from hep2 import __version__
from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET, MODEL_TITLES, PROTOCOLS, is_synthetic

if TYPE_CHECKING:
    from hep2.checkpoints import Weights
    from hep2.fields import SpecimenPrediction
    from hep2.images import ImageSource
    from hep2.predictor import Prediction

STOPPED = 130  # exit status of a command that Ctrl-C has ended


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 1 if anything failed, having done all the rest."""
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files that are no UTF-8 come out as they went in
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        kept = arguments.command == "classify" and arguments.output
        _say("stopped; the same command goes on from here" if kept else "stopped; nothing was kept")
        return STOPPED
    except BrokenPipeError:  # who reads the output has seen enough, as `head` has; what is left would fail at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, FloatingPointError) as error:
        _say(error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hep2", description="Read HEp-2 cells. Not for clinical use.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    classify = commands.add_parser("classify", help="give a verdict for each image of a cell")
    classify.add_argument("images", nargs="*", metavar="IMAGE", help="image of one cell, folder of such, or - (stdin)")
    classify.add_argument("--dataset", metavar="NAME", help="in place of images: Hub name, folder or synthetic[:COUNT]")
    classify.add_argument("--output", type=Path, metavar="TABLE", help="CSV or Parquet; started again, it goes on")
    classify.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help="work on a Ray cluster, here or there")
    _add_common(classify, json="one JSON object a line, one line an image", csv="a table with a line for each image")
    classify.set_defaults(run=_classify)

    specimen = commands.add_parser("specimen", help="find and classify the cells in the slide fields of one specimen")
    specimen.add_argument("images", nargs="+", metavar="FIELD", help="image of many cells, folder, or - (stdin)")
    specimen.add_argument("--pixel-size", type=float, metavar="MICROMETRES", help="default: from file or nuclei")
    specimen.add_argument("--overlay", type=Path, metavar="PNG", help="draw the cells into the field, or the fields")
    _add_common(specimen, json="one JSON object, with every cell", csv="a table with a line for each cell")
    specimen.set_defaults(run=_specimen)

    evaluate = commands.add_parser("evaluate", help="measure weights on test cells that they have not seen")
    evaluate.add_argument("--dataset", default=DEFAULT_DATASET, help="Hub name, local folder, or synthetic[:COUNT]")
    evaluate.add_argument("--protocol", choices=PROTOCOLS, help="how to divide the cells (default: the weights' own)")
    evaluate.add_argument("--seed", type=_natural, help="of the split (default: the weights' own)")
    evaluate.add_argument("--fold", type=_natural, help="of the protocol specimen, 0 to 3 (default: the weights' own)")
    evaluate.add_argument("--output", type=Path, required=True, metavar="DIR", help="for metrics.json and the rest")
    add_weights_option(evaluate)
    evaluate.set_defaults(run=_evaluate)

    synthesize = commands.add_parser("synthesize", help="draw synthetic cells, or fields")
    synthesize.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets a folder for each pattern")
    synthesize.add_argument("--count", type=_natural, default=5, help="cells of each pattern (default: 5)")
    synthesize.add_argument("--fields", action="store_true", help="a slide field of each pattern in place of cells")
    synthesize.add_argument("--seed", type=_natural, default=0, help="the same seed makes the same images (default: 0)")
    synthesize.set_defaults(run=_synthesize)
    return parser


def _add_common(parser: argparse.ArgumentParser, **forms: str) -> None:
    group = parser.add_mutually_exclusive_group()
    for form, description in forms.items():
        group.add_argument(f"--{form}", action="store_true", help=description)
    parser.add_argument("--channel", metavar="NAME", help="the channel to read: a name, a colour, or a number from 1")
    parser.add_argument("--plane", type=int, metavar="NUMBER", help="the page or focal plane to read, from 1")
    add_weights_option(parser)


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    """Let a command line name the weights."""
    parser.add_argument(
        "--weights",
        default=os.environ.get("HEP2_WEIGHTS") or None,  # a Space's variable may be left empty
        metavar="NAME",
        help="OWNER/NAME[@revision] on the Hub or a folder (default: HEP2_WEIGHTS, else the bundled ones)",
    )


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is given: give a whole number, 0 or more")
    return int(text)


def _say(message: object) -> None:
    print(f"hep2: {message}", file=sys.stderr)


def _source(name: str) -> "ImageSource":
    """Return a path, or the bytes that come through standard input or a pipe."""
    with suppress(OSError):
        if name == "-" or Path(name).is_fifo():
            return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    return Path(name)


def _options(arguments: argparse.Namespace) -> dict[str, str | int | None]:
    channel = arguments.channel
    return {"channel": int(channel) if channel and channel.isdecimal() else channel, "plane": arguments.plane}


def _find_weights(name: str | None) -> "Weights":
    from hep2.hub import find_weights  # PyTorch takes seconds to import: help and wrong arguments need not wait for it

    weights = find_weights(name)
    for note in weights.notes:
        _say(note)
    return weights


def _classify(arguments: argparse.Namespace) -> int:
    from hep2.files import find_images
    from hep2.tables import BYTE_ORDER_MARK, COLUMNS, Table, check_table, classify_on_ray, open_table, table_row

    images, output = arguments.images, arguments.output
    dataset = images.pop() if len(images) == 1 and is_synthetic(images[0]) else arguments.dataset
    if bool(images) == bool(dataset):
        raise ValueError("give images or folders of images, or --dataset NAME, and not both")
    if output and (arguments.json or arguments.csv):
        raise ValueError("--output writes a table of its own: leave out --json and --csv")
    if arguments.ray is not None and (not output or "-" in images):
        raise ValueError("--ray takes files, folders or a dataset, and needs --output TABLE")
    if output:
        check_table(output)
    found = find_images(images)
    sources, total = ((name, _source(name)) for name in found.names), len(found.names)
    if dataset:
        from hep2.data import count_cells, dataset_files

        sources, total = ((file.name, file.image) for file in dataset_files(dataset)), count_cells(dataset)
    from hep2.predictor import Failure, Predictor

    weights, counts, table = _find_weights(arguments.weights), Counter(), Table(set(), sys.stdout)
    with ExitStack() as stack:
        if output:
            table = stack.enter_context(open_table(output, weights.revision))
        elif arguments.csv:
            print(end=BYTE_ORDER_MARK)
            table.add(COLUMNS)
        missing = (pair for pair in sources if not table.has(pair[0]))
        if arguments.ray is None:
            answers = Predictor(weights).classify(missing, **_options(arguments))
        else:
            where = {"weights": arguments.weights, "address": arguments.ray or None}
            answers = classify_on_ray(missing, **where, **_options(arguments))
        bar = stack.enter_context(tqdm(unit=" cells", total=total, initial=len(table.done), disable=not output))
        for answer in chain((Failure(*error) for error in found.errors.items()), answers):
            failed = isinstance(answer, Failure)
            counts[failed] += 1
            bar.update()
            if failed and not output:
                _say(f"{answer.file}: {answer.error}")
            if output or arguments.csv:
                table.add(table_row(answer, weights.revision))
            elif arguments.json:
                print(json.dumps(answer.as_dict(), ensure_ascii=False), flush=True)
            elif not failed:
                _print_prediction(answer)
    summary = found.summary(len(table.done) + counts[False], counts[True], "answered all the same")
    _say(summary + (f", in {output}, whose column error says why" if output else ""))
    return int(counts[True] > 0)


def _print_prediction(prediction: "Prediction") -> None:
    verdict = "no verdict"
    if prediction.verdict:
        verdict = f"{prediction.verdict} {prediction.probability:.1%}, {prediction.agreement} of 4 models agree"
    print(f"{prediction.file}: {verdict}")
    for name, values in prediction.probabilities.items() if prediction.verdict else ():  # else they mean nothing
        bars = "  ".join(f"{label} {p:.1%}" for label, p in zip(CLASS_NAMES, values, strict=True))
        print(f"  {MODEL_TITLES[name]:15} {bars}")
    for warning in prediction.warnings:
        print(f"  note: {warning}")


def _specimen(arguments: argparse.Namespace) -> int:
    from hep2.fields import check_pixel_size, draw_overlay, specimen_rows
    from hep2.files import check_writable, find_images, own_picture
    from hep2.images import decode
    from hep2.predictor import Failure, Predictor
    from hep2.tables import BYTE_ORDER_MARK, harmless

    check_pixel_size(arguments.pixel_size)
    found, fields = find_images(arguments.images), []
    failures = [Failure(*error) for error in found.errors.items()]
    for name in (name for name in found.names if name not in found.copies):
        try:
            fields.append((name, decode(_source(name), **_options(arguments))))
        except (ValueError, OSError) as error:
            failures.append(Failure(name, str(error)))
    for failure in failures:
        _say(f"{failure.file}: {failure.error}")
    _say(found.summary(len(fields), len(failures), "left out"))
    if not fields:
        return 1
    overlays = _overlays(arguments.overlay, [name for name, _ in fields])
    for path in overlays:
        check_writable(path)
    specimen = Predictor(_find_weights(arguments.weights)).specimen(
        fields,
        pixel_size=arguments.pixel_size,
        progress=lambda items, total, step: tqdm(items, step, total, disable=not sys.stderr.isatty()),
    )
    if failures:
        specimen.warnings.append(f"{len(failures)} of the fields could not be read: the verdict rests on the others")
    if arguments.json:
        answer = specimen.as_dict() | {"failures": [failure.as_dict() for failure in failures]}
        print(json.dumps(answer, ensure_ascii=False))
    elif arguments.csv:
        print(end=BYTE_ORDER_MARK)
        csv.writer(sys.stdout, lineterminator="\n").writerows(map(harmless, specimen_rows(specimen)))
        for remark in (specimen.verdict, *specimen.warnings):  # what the cells say together goes beside their table
            _say(remark)
    else:
        _print_specimen(specimen)
    for number, path in enumerate(overlays):
        draw_overlay(specimen, fields[number][1].intensity, number).save(path, "PNG", pnginfo=own_picture())
    return int(bool(failures))


def _overlays(overlay: Path | None, fields: list[str]) -> list[Path]:
    """Name the picture of each field: `overlay` itself, or, of several, numbered."""
    if overlay is None:
        return []
    if overlay.suffix.lower() != ".png":
        raise ValueError(f"--overlay {overlay}: give a name that ends in .png")
    numbered = [overlay.with_stem(f"{overlay.stem}-{number + 1}") for number in range(len(fields))]
    overlays = [overlay] if len(fields) == 1 else numbered
    if both := {path.resolve() for path in overlays} & {Path(field).resolve() for field in fields}:
        raise ValueError(f"--overlay would write over the field {both.pop()}: give another name")
    return overlays


def _print_specimen(specimen: "SpecimenPrediction") -> None:
    print(specimen.verdict + (f" {specimen.probability:.1%}" if specimen.probability is not None else ""))
    if specimen.interval:
        print("  the mean over its cells; 95 % bootstrap interval {:.1%} to {:.1%}".format(*specimen.interval))
    answer = specimen.as_dict()
    counts = [f"{name} {count}" for name, count in specimen.counts.items() if count]
    counts += [f"{answer[what]} {what}" for what in ("rejected", "mitotic") if answer[what]]
    print(f"  {answer['cells']} cells" + (f": {', '.join(counts)}" if counts else ""))
    for warning in specimen.warnings:
        print(f"  note: {warning}")


def _evaluate(arguments: argparse.Namespace) -> int:
    from hep2.files import check_writable

    check_writable(arguments.output / "metrics.json")
    from hep2.data import load_cells
    from hep2.evaluation import class_report, comparison_table
    from hep2.pipeline import evaluate

    weights, cells = _find_weights(arguments.weights), load_cells(arguments.dataset)
    which = {"protocol": arguments.protocol, "seed": arguments.seed, "fold": arguments.fold}
    result = evaluate(weights, cells, arguments.output, **which)
    if result["trained_on_fingerprint"] != result["dataset_fingerprint"]:
        print("note: the weights were trained on another dataset: whether they know these cells cannot be told\n")
    print(f"protocol {result['protocol']}, seed {result['seed']}, {result['test_size']:,} test cells\n")
    print(comparison_table(result["models"], result["dataset"]))
    print(f"\nStack ensemble, class by class\n{class_report(result['models']['ensemble'])}")
    print(f"\nmetrics.json, predictions.csv and figures are in {arguments.output}")
    return 0


def _synthesize(arguments: argparse.Namespace) -> int:
    from PIL import Image

    from hep2.files import check_writable
    from hep2.synthetic import synthetic_fields, synthetic_files

    count, output = arguments.count, arguments.output
    if count < 1:
        raise ValueError(f"--count is {count}: give 1 or more")
    if arguments.fields:
        pictures = ((f"{pattern}.png", image) for pattern, image in synthetic_fields(arguments.seed))
    else:
        cells = enumerate(synthetic_files(count, arguments.seed))
        pictures = ((f"{pattern}/{n % count + 1}.png", image) for n, (_, image, pattern) in cells)
    for name, image in pictures:
        check_writable(output / name)
        Image.fromarray(image).save(output / name)
    what = "a synthetic field" if arguments.fields else f"{count} synthetic cells"
    print(f"{what} of each of the {len(CLASS_NAMES)} patterns: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
