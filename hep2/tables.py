"""Any number of images into one CSV file: never all in memory, resumable, and shared out among several processes."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from glob import escape, glob
from pathlib import Path

from tqdm import tqdm

from hep2.imaging import SUFFIXES, ImageSource
from hep2.reader import BATCH, Failure, Reader, csv_header, csv_row
from hep2.weights import Weights

# A file's name need not be UTF-8: its bytes go through a table and back as they are.
_open = partial(open, newline="", encoding="utf-8", errors="surrogateescape")


def find_images(paths: Iterable[str]) -> Iterator[str]:
    """Yield files as they were named, and in place of a folder all images in it, however deep, in order of names.

    A pattern such as ``cells/*.png`` that no shell has replaced stands for the files that it fits.
    """
    for path in paths:
        if not os.path.isdir(path):  # noqa: PTH112 (Path.is_dir fails for a name that is too long)
            fitting = [] if os.path.lexists(path) else sorted(glob(path))  # noqa: PTH207 (it takes whole paths)
            yield from fitting or [path]
            continue
        found = False
        for folder, folders, files in os.walk(path):
            folders.sort()  # which os.walk follows
            images = [str(Path(folder, file)) for file in sorted(files) if file.lower().endswith(SUFFIXES)]
            found = found or bool(images)
            yield from images
        if not found:
            yield path  # which is then answered as a file that cannot be read


def read_into(
    reader: Reader,
    sources: Iterable[tuple[str, ImageSource]],
    output: Path,
    *,
    total: int | None = None,
    process: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> int:
    """Read (name, image) pairs into the table `output`, and return how many could not be read.

    `total` counts the pairs, for the progress bar. What the table holds already is not read again, so that a run that
    was stopped goes on when it is started again. Of several `processes` each reads its share into a table of its own
    beside `output`; see `gather_parts`, which one of them must have called before.

    Raises
    ------
    ValueError
        If the table is none of ours, or was written with other weights.
    """
    header = csv_header(reader.weights)
    own = output if processes == 1 else output.with_name(f"{output.name}.part-{process}")
    done, failed = set(), 0
    for table in {output, own}:
        _check_ours(table, header)
        _drop_torn_line(table)
        for row in _rows(table):
            if row["revision"] != reader.weights.revision:
                raise ValueError(
                    f"{table} was begun with weights of the revision {row['revision']}, these are "
                    f"{reader.weights.revision}: give another --output, or delete it"
                )
            done.add(row["file"])
            failed += bool(row["error"]) and table == own
    own.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        total=total and -(-total // processes), unit="cell", unit_scale=True, disable=not progress or process > 0
    )
    with bar, _open(own, "a") as file:
        table = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            table.writerow(header)
        share = (source for number, source in enumerate(sources) if number % processes == process)
        for number, answer in enumerate(reader.read(_undone(share, done, bar)), start=1):
            failed += isinstance(answer, Failure)
            table.writerow(csv_row(answer, reader.weights))
            bar.update()
            if number % BATCH == 0:
                file.flush()
    return failed


def forget_failures(output: Path, weights: Weights) -> None:
    """Take these weights' failures out of a table, so that a run that goes on tries those images again.

    A table of another kind stays as it is; `read_into` refuses it.
    """
    header = csv_header(weights)
    error, revision = header.index("error"), header.index("revision")
    if not (output.exists() and _is_ours(output, header)):
        return
    _drop_torn_line(output)
    kept = output.with_name(f".{output.name}.kept")
    with _open(output) as old, _open(kept, "w") as new:
        rows = (row for row in csv.reader(old) if row and not (row[error] and row[revision] == weights.revision))
        csv.writer(new, lineterminator="\n").writerows(rows)
    kept.replace(output)


def gather_parts(output: Path, weights: Weights) -> None:
    """Put what several processes have written, or have left when they were killed, into one table, and delete it.

    Raises
    ------
    ValueError
        If one of the tables is none of ours: then all stay as they are.
    """
    parts = parts_of(output)
    if not parts:
        return
    header = csv_header(weights)
    tables = [table for table in (output, *parts) if table.exists()]
    for table in tables:
        _check_ours(table, header)
        _drop_torn_line(table)
    whole = output.with_name(f".{output.name}.whole")
    with _open(whole, "w") as file:
        writer, seen = csv.DictWriter(file, header, lineterminator="\n"), set()
        writer.writeheader()
        for table in tables:
            # Killed before it had deleted all parts, an earlier gathering has left rows that are in the table already.
            writer.writerows(row for row in _rows(table) if not (row["file"] in seen or seen.add(row["file"])))
    whole.replace(output)
    for part in parts:
        part.unlink()


def parts_of(output: Path) -> list[Path]:
    """Return the tables that other processes write, or have left, beside `output`."""
    return sorted(output.parent.glob(f"{escape(output.name)}.part-*"))


def _undone(sources: Iterable[tuple[str, ImageSource]], done: set[str], bar: tqdm) -> Iterator[tuple[str, ImageSource]]:
    for name, source in sources:
        name = name.replace("\r", "\\r").replace("\n", "\\n")  # a line of the table is a line of the file
        if name in done:
            bar.update()
        else:
            done.add(name)
            yield name, source


def _drop_torn_line(table: Path) -> None:
    """Cut off what a process that was killed has left of a line."""
    if not table.exists():
        return
    with open(table, "rb+") as file:
        position = file.seek(0, os.SEEK_END)
        tail = b""
        while position > 0 and b"\n" not in tail:
            step = min(65536, position)
            position = file.seek(position - step)
            tail = file.read(step) + tail
        file.truncate(position + tail.rfind(b"\n") + 1)


def _is_ours(table: Path, header: Sequence[str]) -> bool:
    """Tell whether a file is a table of readings with this header, or the beginning of one."""
    expected = ",".join(header) + "\n"
    with _open(table) as file:
        first = file.readline(len(expected))
    return first == expected or (not first.endswith("\n") and expected.startswith(first))


def _check_ours(table: Path, header: Sequence[str]) -> None:
    if table.exists() and not _is_ours(table, header):
        raise ValueError(f"{table} is no table of readings; give another --output")


def _rows(table: Path) -> Iterator[dict[str, str]]:
    if table.exists():
        with _open(table) as file:
            yield from csv.DictReader(file)
