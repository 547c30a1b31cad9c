"""Answers in one CSV or Parquet file that goes on where it was stopped, and their making on a Ray cluster."""

import csv
import logging
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import pyarrow
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from hep2.files import check_writable, locked
from hep2.images import Cell, ImageSource, load_cell
from hep2.patterns import CLASS_NAMES, MODEL_TITLES

if TYPE_CHECKING:
    from hep2.checkpoints import Weights
    from hep2.predictor import Failure, Prediction

NUMBERS = [f"{model}_{name}" for model in MODEL_TITLES for name in CLASS_NAMES]
COLUMNS = ["file", "verdict", "probability", "agreement", *NUMBERS, "warnings", "error", "revision"]
TYPES = {"agreement": pyarrow.int64()} | dict.fromkeys(["probability", *NUMBERS], pyarrow.float64())
SCHEMA = pyarrow.schema((column, TYPES.get(column, pyarrow.string())) for column in COLUMNS)
BYTE_ORDER_MARK = "\ufeff"  # without which Excel takes UTF-8 for something else
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of a formula
RAY_BLOCK = 256  # images that a task decodes, and an actor predicts, at a time
NO_PIXELS = np.empty((1, 0, 0), np.float32)  # of a cell that is predicted: its own need not travel
CORE_SHARE = 0.9  # of a core that a predicting actor has where there is no GPU; decoding has the rest


def table_row(answer: "Prediction | Failure", revision: str) -> list:
    """Lay out an answer of the weights of this revision in `COLUMNS`; what a failure lacks is left empty."""
    values = answer.as_dict()
    models = values.get("models", {})
    numbers = [models.get(model, {}).get(name) for model in MODEL_TITLES for name in CLASS_NAMES]
    first = [values.get(column) for column in COLUMNS[:4]]
    return [*first, *numbers, "; ".join(values.get("warnings", [])), values.get("error"), revision]


def harmless(row: Iterable) -> list:
    """Put a ``'`` before each text that a spreadsheet would run as a formula."""
    return [f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value for value in row]


@dataclass
class Table:
    """A growing table: the files that it has, and a place for more rows; see `open_table`."""

    done: set[str]
    file: TextIO
    is_csv: bool

    def has(self, name: str) -> bool:
        return self._clean([name])[0] in self.done

    def add(self, row: list) -> None:
        csv.writer(self.file, lineterminator="\n").writerow(self._clean(row))

    def _clean(self, row: list) -> list:
        """Make texts valid UTF-8 of one line, which a file's name need not be, and in a CSV file no formulas."""
        row = [_one_line(value) if isinstance(value, str) else value for value in row]
        return harmless(row) if self.is_csv else row


def _one_line(text: str) -> str:
    text = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return text.replace("\r", "\\r").replace("\n", "\\n")


def check_table(path: Path) -> Path:
    """Find out before the work whether a table can be written, and return where its rows lie while it grows.

    That is a CSV file, which can be added to and survives a kill: itself, or a hidden one beside a Parquet file.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path} is no name of a table: give one that ends in .csv or .parquet")
    growing = path if path.suffix == ".csv" else path.with_name(f".{path.name}.csv")
    check_writable(path)
    check_writable(growing)
    return growing


@contextmanager
def open_table(path: Path, revision: str) -> Iterator[Table]:
    """Open a table for answers of the weights of this revision; what failed earlier is taken out, to be tried again.

    Raises
    ------
    ValueError
        If another process is writing the table, it is none of ours, or it was begun with other weights.
    """
    growing = check_table(path)
    fresh, done = path.with_name(f".{path.name}.part"), set()
    with locked(path):
        try:
            if growing != path and path.exists() and not growing.exists():
                arrow_csv.write_csv(_parquet(path), growing)
            with open(fresh, "w", newline="", encoding="utf-8-sig") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                for row in _rows(growing, revision):
                    if not row["error"] and row["file"] not in done:
                        done.add(row["file"])
                        writer.writerow(row)
            fresh.replace(growing)
            with open(growing, "a", buffering=1, newline="", encoding="utf-8") as file:
                yield Table(done, file, is_csv=growing == path)
            if growing != path:
                _write_parquet(growing, fresh)
                fresh.replace(path)
                growing.unlink()
        finally:
            fresh.unlink(missing_ok=True)


def _parquet(path: Path) -> pyarrow.Table:
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise _not_ours(path) from error
    if table.column_names != COLUMNS:
        raise _not_ours(path)
    return table


def _write_parquet(rows: Path, path: Path) -> None:
    options = arrow_csv.ConvertOptions(column_types=SCHEMA, strings_can_be_null=True, null_values=[""])
    with arrow_csv.open_csv(rows, convert_options=options) as batches, parquet.ParquetWriter(path, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _not_ours(path: Path) -> ValueError:
    return ValueError(f"{path} is no table of this command's answers: give another --output")


def _rows(path: Path, revision: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a table, but for one that a kill has torn."""
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        if next(csv.reader([file.readline()])) != COLUMNS:
            raise _not_ours(path)
        for line in file:
            row = next(csv.reader([line]), [])
            if len(row) != len(COLUMNS) or not line.endswith("\n"):
                continue
            if row[-1] != revision:
                raise ValueError(
                    f"{path} was begun with weights of the revision {row[-1]}, these are {revision}: give another "
                    "--output, or delete it"
                )
            yield dict(zip(COLUMNS, row, strict=True))


def classify_on_ray(
    sources: Iterable[tuple[str, ImageSource]],
    weights: "Weights",
    *,
    name: str | None = None,
    address: str | None = None,
    actors: int | None = None,
    channel: str | int | None = None,
    plane: int | None = None,
) -> Iterator["Prediction | Failure"]:
    """Classify (name, image) pairs on a Ray cluster, in order.

    Tasks decode the images, and actors, which hold the models, predict. An actor that dies is started again, and gets
    its images again.

    Parameters
    ----------
    sources
        Paths that every machine of the cluster can read, or bytes or arrays, which travel.
    weights, name
        The weights, and the name by which each machine loads them.
    address
        Of the cluster; None joins the one that ``RAY_ADDRESS`` names, or starts one on this machine.
    actors
        How many; None is one a GPU, or where there is none, one a core.

    Raises
    ------
    ValueError
        If Ray is not installed, or the work failed on the cluster.
    ConnectionError
        If no cluster answers.
    """
    items = map(pickle.dumps, sources)  # a file's name need not be UTF-8, which a text in Arrow must be
    blocks = [pyarrow.table({"item": block}) for block in iter(lambda: list(islice(items, RAY_BLOCK)), [])]
    if not blocks:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray.data
    except ImportError as error:
        raise ValueError("--ray needs Ray: pip install -r requirements-ray.txt") from error
    for logger in ("ray", "ray.data"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    ray.init(address, configure_logging=False, log_to_driver=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars, context.execution_options.preserve_order = False, True
        gpus, cores = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        decoding, predicting = {"num_cpus": 1 - CORE_SHARE}, {"num_cpus": CORE_SHARE}
        if gpus:
            decoding, predicting = {"num_cpus": 1}, {"num_cpus": 0, "num_gpus": 1}
        pool = ray.data.ActorPoolStrategy(size=min(actors or gpus or cores, len(blocks)))
        whole = {"batch_format": "pyarrow", "batch_size": None}
        answers = (
            ray.data.from_arrow(blocks)
            .map_batches(_decode, fn_args=(channel, plane), **whole, **decoding)
            .map_batches(_Actor, fn_constructor_args=(name, weights.revision), compute=pool, **whole, **predicting)
        )
        for batch in answers.iter_batches(**whole):
            yield from map(pickle.loads, batch["item"].to_pylist())
    except ray.exceptions.RayError as error:
        raise ValueError(f"the work failed on the Ray cluster: {str(error).strip().splitlines()[-1]}") from error
    finally:
        ray.shutdown()


def _decode(items: pyarrow.Table, channel: str | int | None, plane: int | None) -> pyarrow.Table:
    """Turn (name, image) into (name, cell), or into (name, error) where it cannot be read."""
    decoded = []
    for name, source in map(pickle.loads, items["item"].to_pylist()):
        try:
            decoded.append((name, load_cell(source, channel=channel, plane=plane)))
        except (ValueError, OSError) as error:
            decoded.append((name, str(error)))
    return pyarrow.table({"item": list(map(pickle.dumps, decoded))})


class _Actor:
    """Turns what `_decode` gives into answers, whose pixels are left out: they need not travel."""

    def __init__(self, name: str | None, revision: str) -> None:
        from hep2.predictor import Failure, load

        self.failure, self.predictor = Failure, load(name)
        if (own := self.predictor.weights.revision) != revision:
            raise ValueError(f"a machine of the cluster has weights of the revision {own}, expected {revision}")

    def __call__(self, items: pyarrow.Table) -> pyarrow.Table:
        decoded = list(map(pickle.loads, items["item"].to_pylist()))
        predictions = iter(self.predictor.classify_cells([pair for pair in decoded if isinstance(pair[1], Cell)]))
        answers = [
            replace(next(predictions), cell=replace(cell, pixels=NO_PIXELS))
            if isinstance(cell, Cell)
            else self.failure(name, cell)
            for name, cell in decoded
        ]
        return pyarrow.table({"item": list(map(pickle.dumps, answers))})
