"""Answers in one CSV or Parquet file that goes on where it was stopped, and their making on a Ray cluster."""

import csv
import logging
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pyarrow
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from hep2.files import check_writable, locked
from hep2.images import Cell, ImageSource, load_cell
from hep2.patterns import CLASS_NAMES, MODEL_TITLES

if TYPE_CHECKING:
    from hep2.predictor import Failure, Prediction

NUMBERS = [f"{model}_{name}" for model in MODEL_TITLES for name in CLASS_NAMES]
COLUMNS = ["file", "verdict", "probability", "agreement", *NUMBERS, "warnings", "error", "revision"]
TYPES = {"agreement": pyarrow.int64()} | dict.fromkeys(["probability", *NUMBERS], pyarrow.float64())
SCHEMA = pyarrow.schema((column, TYPES.get(column, pyarrow.string())) for column in COLUMNS)
BYTE_ORDER_MARK = "\ufeff"  # without which Excel takes UTF-8 for something else
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of a formula
RAY_BLOCK = 256  # images that a task decodes, and an actor predicts, at a time
CORE_SHARE = 0.9  # of a core that a predicting actor has where there is no GPU; decoding has the rest


def table_row(answer: "Prediction | Failure", revision: str) -> list:
    """Lay out an answer in `COLUMNS`; what a failure lacks is left empty, and `revision` is that of its weights."""
    values = answer.as_dict()
    models = values.get("models", {})
    numbers = [models.get(model, {}).get(name) for model in MODEL_TITLES for name in CLASS_NAMES]
    first = [values.get(column) for column in COLUMNS[:4]]
    last = [
        "; ".join(values.get("warnings", [])),
        values.get("error"),
        values.get("weights", {}).get("revision", revision),
    ]
    return [*first, *numbers, *last]


def harmless(row: Iterable) -> list:
    """Put a ``'`` before each text that a spreadsheet would run as a formula."""
    return [f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value for value in row]


@dataclass
class Table:
    """A growing table: the files that it has, and a place for more rows; see `open_table`."""

    done: set[str]
    file: TextIO
    is_csv: bool = True

    def has(self, name: str) -> bool:
        """Tell whether a file has its row already."""
        return self._clean([name])[0] in self.done

    def add(self, row: list) -> None:
        """Write one row, a line."""
        csv.writer(self.file, lineterminator="\n").writerow(self._clean(row))

    def _clean(self, row: list) -> list:
        row = [_one_line(value) if isinstance(value, str) else value for value in row]
        return harmless(row) if self.is_csv else row


def _one_line(text: str) -> str:
    """Return a text as valid UTF-8 in one line, which a file's name need not be."""
    text = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return text.replace("\r", "\\r").replace("\n", "\\n")


def check_table(path: Path) -> Path:
    """Find out before the work whether a table can be written, and return where its rows lie while it grows.

    That is a CSV file, which can be added to and survives a kill: itself, or a hidden one beside a Parquet file.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path} is no name of a table: give one that ends in .csv or .parquet")
    check_writable(path)
    return path if path.suffix == ".csv" else path.with_name(f".{path.name}.csv")


@contextmanager
def open_table(path: Path, revision: str) -> Iterator[Table]:
    """Open a table for answers of the weights of this revision; what failed earlier is taken out, to be tried again.

    Raises
    ------
    ValueError
        If another process is writing the table, it is none of ours, or it was begun with other weights.
    """
    growing, fresh, done = check_table(path), path.with_name(f".{path.name}.part"), set()
    with locked(path):
        try:
            with open(fresh, "w", newline="", encoding="utf-8-sig") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                for row in _rows(growing if growing.exists() else path):
                    name, error, weights = (row[COLUMNS.index(column)] for column in ("file", "error", "revision"))
                    if weights != revision:
                        raise ValueError(
                            f"{path} was begun with weights of the revision {weights}, these are {revision}: give "
                            "another --output, or delete it"
                        )
                    if not error and name not in done:
                        done.add(name)
                        writer.writerow(row)
            fresh.replace(growing)
            with open(growing, "a", buffering=1, newline="", encoding="utf-8") as file:
                yield Table(done, file, is_csv=growing == path)
            if growing != path:
                options = arrow_csv.ConvertOptions(column_types=SCHEMA, strings_can_be_null=True, null_values=[""])
                parquet.write_table(arrow_csv.read_csv(growing, convert_options=options), fresh)
                fresh.replace(path)
                growing.unlink()
        finally:
            fresh.unlink(missing_ok=True)


def _rows(path: Path) -> Iterator[list]:
    """Yield the rows of a table, but for one that a kill has torn."""
    foreign = ValueError(f"{path} is no table of this command's answers: give another --output")
    if not path.exists() or not path.stat().st_size:
        return
    if path.suffix == ".parquet":
        try:
            table = parquet.read_table(path)
        except pyarrow.ArrowInvalid as error:
            raise foreign from error
        if table.column_names != COLUMNS:
            raise foreign
        yield from (list(row.values()) for batch in table.to_batches() for row in batch.to_pylist())
        return
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        if next(csv.reader([file.readline()])) != COLUMNS:
            raise foreign
        for line in file:
            row = next(csv.reader([line]), [])
            if len(row) == len(COLUMNS) and line.endswith("\n"):
                yield row


def classify_on_ray(
    sources: Iterable[tuple[str, ImageSource]],
    *,
    weights: str | None = None,
    address: str | None = None,
    actors: int | None = None,
    channel: str | int | None = None,
    plane: int | None = None,
) -> Iterator["Prediction | Failure"]:
    """Classify (name, image) pairs on a Ray cluster, in order; an actor that dies is started again with its images.

    Parameters
    ----------
    sources
        Paths that every machine of the cluster can read, or bytes or arrays, which travel.
    weights
        As `hep2.load` takes them: each machine loads them itself.
    address
        Of the cluster; None joins the one that ``RAY_ADDRESS`` names, or starts one on this machine.
    actors
        How many hold the models and predict; None is one a GPU, or where there is none, one a core.

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
        count = min(actors or gpus or cores, len(blocks))
        pool = ray.data.ActorPoolStrategy(size=count)
        decoding, predicting = {"num_cpus": 1 - CORE_SHARE, "concurrency": count}, {"num_cpus": CORE_SHARE}
        if gpus:
            decoding, predicting = {"num_cpus": 1}, {"num_cpus": 0, "num_gpus": 1}
        whole = {"batch_format": "pyarrow", "batch_size": None}
        decoded = ray.data.from_arrow(blocks).map_batches(_decode, fn_args=(channel, plane), **whole, **decoding)
        answers = decoded.map_batches(_Actor, fn_constructor_args=(weights,), compute=pool, **whole, **predicting)
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
    """Turns what `_decode` gives into answers."""

    def __init__(self, weights: str | None) -> None:
        from hep2.predictor import Failure, load

        self.failure, self.predictor = Failure, load(weights)

    def __call__(self, items: pyarrow.Table) -> pyarrow.Table:
        decoded = list(map(pickle.loads, items["item"].to_pylist()))
        predictions = iter(self.predictor.classify_cells([pair for pair in decoded if isinstance(pair[1], Cell)]))
        answers = (next(predictions) if isinstance(cell, Cell) else self.failure(name, cell) for name, cell in decoded)
        return pyarrow.table({"item": list(map(pickle.dumps, answers))})
