"""Time and memory against the number of cells: through the command line, and through the page's API.

    python -m benchmarks.growth [--counts 1000 10000] [--many 100000]

Draws synthetic cells into a temporary folder. `--counts` go both ways, `--many` through the command line alone: once as
it is, and once killed half-way and started again. Memory is the most that the processes have held together. Seconds
include their start, or, for the API, sending the images. Some 12 minutes of two idle cores.
"""

import base64
import csv
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from gradio_client import Client
from PIL import Image

from benchmarks.common import line, make_parser, table
from hep2.patterns import CLASS_NAMES
from hep2.synthetic import synthetic_files

DRAWN = 10_000  # cells; more are the same under other names
WAITING = 120  # seconds for the page to start
ROOT = Path(__file__).parents[1]


def main(argv: list[str] | None = None) -> int:
    """Measure, and print two tables in Markdown; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--counts", type=int, nargs="*", default=(1000, 10_000), help="at most 10,000 each")
    parser.add_argument("--many", type=int, default=100_000, help="0 leaves them out")
    arguments = parser.parse_args(argv)
    if max(arguments.counts, default=0) > DRAWN:
        parser.error(f"--counts takes at most {DRAWN:,}, which is what a request may bring: give more as --many")
    with tempfile.TemporaryDirectory() as name:
        cells = Path(name) / "cells"
        cells.mkdir()
        if arguments.counts:
            ways = ("classify", "/classify_batch")
            print(table(["cells", *(f"{way}, {what}" for way in ways for what in ("s", "cells a second", "MB"))]))
            with serving() as (client, page):
                for count in sorted(arguments.counts):
                    files = fill(cells, count)
                    seconds, memory = classify(cells, Path(name) / f"{count}.csv", count)
                    started = time.perf_counter()
                    images = [base64.b64encode(file.read_bytes()).decode() for file in files]
                    answers = client.predict(images, None, None, api_name="/classify_batch")
                    served = time.perf_counter() - started
                    if len(answers) != count or any("error" in answer for answer in answers):
                        raise RuntimeError(f"{len(answers)} answers, or an error among them, for {count} cells")
                    row = [*figures(count, seconds, memory), *figures(count, served, high_water(page.pid))]
                    print(line([f"{count:,}", *row]), flush=True)
        if arguments.many:
            print("\n" + table(["command line", "cells", "s", "cells a second", "MB"]), flush=True)
            fill(cells, arguments.many)
            half = None
            for way in ("at once", "killed half-way"):
                output = Path(name) / f"{way}.csv"
                seconds, memory = classify(cells, output, arguments.many, half)
                half = output.stat().st_size // 2
                print(line([way, f"{arguments.many:,}", *figures(arguments.many, seconds, memory)]), flush=True)
    return 0


def figures(count: int, seconds: float, memory: int) -> list[str]:
    """Set out seconds, cells a second and megabytes."""
    return [f"{seconds:.1f}", f"{count / seconds:.0f}", f"{memory / 1e6:.0f}"]


def fill(folder: Path, count: int) -> list[Path]:
    """Fill `folder` up to `count` cells, and return their paths."""
    there, drawn = len(list(folder.iterdir())), min(count, DRAWN)
    for number, (_, image, _) in enumerate(synthetic_files(-(-drawn // len(CLASS_NAMES)))):
        if there <= number < drawn:
            Image.fromarray(image).save(folder / f"{number:06}.png")
    for number in range(max(there, DRAWN), count):
        os.link(folder / f"{number % DRAWN:06}.png", folder / f"{number:06}.png")
    return sorted(folder.iterdir())


def classify(folder: Path, output: Path, count: int, killed_after: int | None = None) -> tuple[float, int]:
    """Classify all cells of a folder by the command line; returns seconds and bytes.

    Once its table has so many bytes, the process is killed, and the command is given again.
    """

    def killed() -> bool:
        return output.exists() and output.stat().st_size > killed_after

    arguments = ["classify", str(folder), "--output", str(output)]
    measured = watched(arguments, None if killed_after is None else killed)
    with open(output, newline="", encoding="utf-8-sig") as file:
        rows = [(row["file"], row["error"]) for row in csv.DictReader(file)]
    if len(rows) != count or len({name for name, _ in rows}) != count or any(error for _, error in rows):
        raise RuntimeError(f"{output} has {len(rows)} rows, not each of {count} cells once and without an error")
    return measured


def watched(arguments: list[str], killed: Callable[[], bool] | None = None) -> tuple[float, int]:
    """Run `python -m hep2` with these arguments; returns seconds from its start to its end, and the bytes it held.

    Once `killed` says so, it is killed with all that it has started, and run again.
    """
    command = [sys.executable, "-m", "hep2", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started, memory = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, **quiet)
    while process.poll() is None:
        memory = max(memory, sum(map(high_water, family(process.pid))))
        time.sleep(0.05)
        if killed and killed():
            killed = None
            for one in family(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            process.wait()
            process = subprocess.Popen(command, cwd=ROOT, **quiet)
    if process.returncode or killed:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}{', unkilled' * bool(killed)}")
    return time.perf_counter() - started, memory


def family(pid: int) -> list[int]:
    """Return a process and all that it has started."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def high_water(pid: int) -> int:
    """Return the most memory that a process has held so far, in bytes; 0 if it has just ended. Linux only."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(text.split()[1]) * 1024 for text in lines if text.startswith("VmHWM")), 0)


@contextmanager
def serving() -> Iterator[tuple[Client, subprocess.Popen]]:
    """Start the page in a process of its own; gives a client of it and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + WAITING
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the page does not listen on port {port}") from None
                time.sleep(0.2)
        yield Client(f"http://127.0.0.1:{port}/", verbose=False), process
    finally:
        process.terminate()
        process.wait(timeout=20)


if __name__ == "__main__":
    sys.exit(main())
