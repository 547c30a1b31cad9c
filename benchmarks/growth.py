"""Time and memory against the number of cells: through the command line, and through the page's API.

    python -m benchmarks.growth [--counts 10 100 1000 10000] [--many 100000]

Draws synthetic cells into a temporary folder, and prints two tables in Markdown. The first has `--counts` cells through
both ways. The second has `--many` through the command line: by one process, and by two of `accelerate launch` that are
killed half-way and started again. Memory is the most that the reading processes have held together. Seconds include
their start, or, for the API, sending the files.
"""

import argparse
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import psutil
from PIL import Image

from hep2.patterns import CLASS_NAMES
from hep2.phantoms import phantom_files

SENT_TOGETHER = 200  # files in one request
DRAWN = 10_000  # cells; more are the same under other names
ROOT = Path(__file__).parents[1]
ALONE = ["-m"]
IN_TWO = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"]


def main(argv: list[str] | None = None) -> int:
    """Measure, and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="*", default=(10, 100, 1000, 10_000), help="at most 10,000 each")
    parser.add_argument("--many", type=int, default=100_000, help="0 leaves them out")
    arguments = parser.parse_args(argv)
    if max(arguments.counts, default=0) > DRAWN:
        parser.error(f"--counts takes at most {DRAWN:,}, which is what a request may bring: give more as --many")
    with tempfile.TemporaryDirectory() as name:
        cells = Path(name) / "cells"
        cells.mkdir()
        if arguments.counts:
            print("| cells | classify, s | cells a second | MB | /classify_batch, s | cells a second | MB |")
            print("|---|---|---|---|---|---|---|", flush=True)
            with serving() as (address, process):
                for count in sorted(arguments.counts):
                    measure_both(fill(cells, count), f"{address}gradio_api", process)
        if arguments.many:
            print("\n| command line | cells | s | cells a second | MB |\n|---|---|---|---|---|", flush=True)
            fill(cells, arguments.many)
            half = None
            for way, launcher in (("one process", ALONE), ("two, killed half-way", IN_TWO)):
                table = Path(name) / f"{way}.csv"
                seconds, memory = classify(cells, table, launcher, half)
                half = table.stat().st_size // 2
                check(table, arguments.many)
                row = f"{arguments.many:,} | {seconds:.0f} | {arguments.many / seconds:.0f} | {memory / 1e6:.0f}"
                print(f"| {way} | {row} |", flush=True)
    return 0


def measure_both(files: list[str], api: str, page: subprocess.Popen) -> None:
    """Read files by the command line and by the page's API, and print a row."""
    folder, count = Path(files[0]).parent, len(files)
    table = folder.parent / f"{count}.csv"
    seconds, memory = classify(folder, table)
    check(table, count)
    started = time.perf_counter()
    answers = classify_batch(api, files)
    served = time.perf_counter() - started
    if len(answers) != count:
        raise RuntimeError(f"{len(answers)} answers for {count} cells")
    print(
        f"| {count:,} | {seconds:.1f} | {count / seconds:.0f} | {memory / 1e6:.0f} | {served:.1f} | "
        f"{count / served:.0f} | {high_water(page.pid) / 1e6:.0f} |",
        flush=True,
    )


def fill(folder: Path, count: int) -> list[str]:
    """Fill `folder` up to `count` cells, and return their paths."""
    there = len(list(folder.iterdir()))
    for number, (_, image, _) in enumerate(phantom_files(-(-min(count, DRAWN) // len(CLASS_NAMES)))):
        if there <= number < min(count, DRAWN):
            Image.fromarray(image).save(folder / f"{number:06}.png")
    for number in range(max(there, DRAWN), count):
        os.link(folder / f"{number % DRAWN:06}.png", folder / f"{number:06}.png")
    return sorted(str(path) for path in folder.iterdir())


def check(table: Path, count: int) -> None:
    """Raise if a table lacks a cell, or has one twice, or one that could not be read."""
    with open(table, newline="") as file:
        rows = [(row["file"], row["error"]) for row in csv.DictReader(file)]
    if len(rows) != count or len({name for name, _ in rows}) != count or any(error for _, error in rows):
        raise RuntimeError(f"{table} has {len(rows)} rows, not each of {count} cells once and without an error")


def classify(
    folder: Path, table: Path, launcher: list[str] = ALONE, killed_after: int | None = None
) -> tuple[float, int]:
    """Read all cells of a folder by the command line; returns seconds and bytes.

    Once its tables have so many bytes together, all processes are killed, and the command is given again.
    """

    def killed() -> bool:
        with suppress(FileNotFoundError):  # a part that has just been gathered
            return sum(part.stat().st_size for part in table.parent.glob(f"{table.name}*")) > killed_after
        return False

    arguments = ["classify", str(folder), "--output", str(table)]
    return watched(arguments, launcher, None if killed_after is None else killed)


def watched(
    arguments: list[str], launcher: list[str] = ALONE, killed: Callable[[], bool] | None = None
) -> tuple[float, int]:
    """Run `python -m hep2` with these arguments; returns seconds from its start to its end, and the bytes it held.

    Once `killed` says so, it is killed with all that it has started, and run again.
    """
    command = [sys.executable, *launcher, "hep2", *arguments]
    started, memory = time.perf_counter(), 0
    process = _start(command)
    while process.poll() is None:
        memory = max(memory, sum(map(high_water, _family(process.pid))))
        time.sleep(0.05)
        if killed and killed():
            killed = None
            for one in _family(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            process.wait()
            process = _start(command)
    if process.returncode or killed:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}{', unkilled' * bool(killed)}")
    return time.perf_counter() - started, memory


def _start(command: list[str]) -> subprocess.Popen:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=quiet, stderr=quiet)


def _family(pid: int) -> list[int]:
    """Return a process and all that it has started."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def classify_batch(api: str, files: list[str]) -> list[dict]:
    """Send files to the page, some hundred at a time, and have them read in one request; returns the answers."""
    sent = []
    for start in range(0, len(files), SENT_TOGETHER):
        parts = [("files", (Path(file).name, Path(file).read_bytes())) for file in files[start : start + SENT_TOGETHER]]
        sent += httpx2.post(f"{api}/upload", files=parts, timeout=60).raise_for_status().json()
    data = [[{"path": path, "meta": {"_type": "gradio.FileData"}} for path in sent]]
    call = httpx2.post(f"{api}/call/classify_batch", json={"data": data}, timeout=60).raise_for_status().json()
    stream = httpx2.get(f"{api}/call/classify_batch/{call['event_id']}", timeout=3600).raise_for_status().text
    event, _, answer = stream.strip().rpartition("\n")
    if "event: complete" not in event:
        raise RuntimeError(f"/classify_batch answered {stream[-300:]!r}")
    return json.loads(answer.removeprefix("data: "))[0]


@contextmanager
def serving():
    """Start the page in a process of its own; gives its address and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise RuntimeError(f"the page does not listen on port {port} after two minutes")
        yield f"http://127.0.0.1:{port}/", process
    finally:
        process.terminate()
        process.wait(timeout=20)


def high_water(pid: int) -> int:
    """Return the most memory that a process has held so far, in bytes; 0 if it has just ended. Linux only."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    sys.exit(main())
