"""Time and memory against the number of cells: through the command line, and through the page's API.

    python -m benchmarks.growth [--counts 10 100 1000 10000]

Draws as many synthetic cells into a temporary folder, and prints a table in Markdown. Memory is the most that the
reading process has held. Seconds include its start, or, for the API, sending the files.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
from PIL import Image

from hep2.patterns import CLASS_NAMES
from hep2.phantoms import phantom_files

SENT_TOGETHER = 200  # files in one request
ROOT = Path(__file__).parents[1]


def main(argv: list[str] | None = None) -> int:
    """Measure, and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=(10, 100, 1000, 10_000))
    arguments = parser.parse_args(argv)
    print("| cells | classify, s | cells a second | MB | /classify_batch, s | cells a second | MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        cells = Path(name) / "cells"
        cells.mkdir()
        with serving() as (address, process):
            for count in sorted(arguments.counts):
                files = draw(cells, count)
                seconds, memory = classify(cells, Path(name) / f"{count}.csv")
                started = time.perf_counter()
                answers = classify_batch(f"{address}gradio_api", files)
                served = time.perf_counter() - started
                assert len(answers) == count, f"{len(answers)} answers for {count} cells"
                print(
                    f"| {count:,} | {seconds:.1f} | {count / seconds:.0f} | {memory / 1e6:.0f} | {served:.1f} | "
                    f"{count / served:.0f} | {high_water(process.pid) / 1e6:.0f} |",
                    flush=True,
                )
    return 0


def draw(folder: Path, count: int) -> list[str]:
    """Fill `folder` up to `count` cells, and return their paths."""
    drawn = len(list(folder.iterdir()))
    for number, (_, image, _) in enumerate(phantom_files(-(-count // len(CLASS_NAMES)))):
        if drawn <= number < count:
            Image.fromarray(image).save(folder / f"{number:06}.png")
    return sorted(str(path) for path in folder.iterdir())


def classify(folder: Path, table: Path) -> tuple[float, int]:
    """Read all cells of a folder by the command line; returns seconds and bytes."""
    return watched(["classify", str(folder), "--output", str(table)])


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


def watched(arguments: list[str]) -> tuple[float, int]:
    """Run `python -m hep2` with these arguments; returns seconds from its start to its end, and the bytes it held."""
    started, memory = time.perf_counter(), 0
    command = [sys.executable, "-m", "hep2", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        memory = high_water(process.pid) or memory
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return time.perf_counter() - started, memory


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
        yield f"http://127.0.0.1:{port}/", process
    finally:
        process.terminate()
        process.wait(timeout=20)


def high_water(pid: int) -> int:
    """Return the most memory that a process has held so far, in bytes; 0 if it has just ended. Linux only."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    sys.exit(main())
