"""Any number of images into one CSV file: never all in memory, resumable, and shared out among several processes."""

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from hep2.imaging import SUFFIXES, ImageSource
from hep2.reader import BATCH, Failure, Reader, csv_header, csv_row
from hep2.training import write_atomically
from hep2.weights import Weights


def find_images(paths: Iterable[str]) -> Iterator[str]:
    """Yield files as they were named, and in place of a folder all images in it, however deep, in order of names."""
    for path in paths:
        if not Path(path).is_dir():
            yield path
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
    total: int,
    process: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> int:
    """Read (name, image) pairs into the table `output`, and return how many could not be read.

    What the table holds already is not read again, so that a run that was stopped goes on when it is started again.
    Of several `processes` each reads its share into a table of its own beside `output`; see `gather_parts`.

    Raises
    ------
    ValueError
        If the table is none of ours, or was written with other weights.
    """
    header = csv_header(reader.weights)
    own = output if processes == 1 else output.with_name(f"{output.name}.part-{process}")
    for table in (own, output):
        _drop_torn_line(table)
    done, failed = set(), 0
    for table in {output, own, *parts_of(output)}:
        for row in _rows(table, header):
            if row["revision"] != reader.weights.revision:
                raise ValueError(
                    f"{table} was begun with weights of the revision {row['revision']}, these are "
                    f"{reader.weights.revision}: give another --output, or delete it"
                )
            done.add(row["file"])
            failed += bool(row["error"]) and table == own
    own.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=-(-total // processes), unit="cell", unit_scale=True, disable=not progress or process > 0)
    with bar, open(own, "a", newline="", encoding="utf-8") as file:
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
    """Take these weights' failures out of a table and its parts, so that a run that goes on tries those images again.

    Tables of another kind stay as they are; `read_into` refuses them.
    """
    header = csv_header(weights)
    error, revision = header.index("error"), header.index("revision")
    for table in (output, *parts_of(output)):
        if not table.exists():
            continue
        with open(table, newline="", encoding="utf-8") as file:
            if next(csv.reader(file), None) != header:
                continue
        _drop_torn_line(table)
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        kept = [rows[0], *(row for row in rows[1:] if not (row[error] and row[revision] == weights.revision))]
        if len(kept) < len(rows):
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(kept)
            write_atomically(table, text.getvalue().encode())


def gather_parts(output: Path) -> None:
    """Put what several processes have written into one table, and delete their parts."""
    parts = parts_of(output)
    if not parts:
        return
    whole = output.with_name(f".{output.name}.whole")
    with open(whole, "w", newline="", encoding="utf-8") as file:
        header = None
        for part in [*([output] if output.exists() else []), *parts]:
            with open(part, newline="", encoding="utf-8") as lines:
                first = next(lines)
                if header is None:
                    header = first
                    file.write(header)
                file.writelines(lines)
    whole.replace(output)
    for part in parts:
        part.unlink()


def parts_of(output: Path) -> list[Path]:
    """Return the tables that other processes write, or have left, beside `output`."""
    return sorted(output.parent.glob(f"{output.name}.part-*"))


def _undone(sources: Iterable[tuple[str, ImageSource]], done: set[str], bar: tqdm) -> Iterator[tuple[str, ImageSource]]:
    for name, source in sources:
        if name in done:
            bar.update()
        else:
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


def _rows(table: Path, header: Sequence[str]) -> Iterator[dict[str, str]]:
    if not table.exists() or table.stat().st_size == 0:
        return
    with open(table, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != list(header):
            raise ValueError(f"{table} is no table of readings; give another --output")
        yield from rows
