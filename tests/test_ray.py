"""A table made on a Ray cluster of this machine; skipped where Ray is not installed (requirements-ray.txt)."""

import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from hep2.__main__ import main

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-ray.txt")

CLUSTER = (
    "import ray, sys; print(ray.init(num_cpus=2, include_dashboard=False).address_info['gcs_address'], flush=True)"
)
# Ray gives its workers the niceness 15, with which they hardly run beside the other tests.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
ENVIRONMENT |= os.environ | {"PYTHONPATH": str(ROOT)}
CELLS = 150  # of each pattern: four blocks for two actors


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cells")
    assert main(["synthesize", "--output", str(root), "--count", str(CELLS)]) == 0
    (root / "Golgi" / "bad.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, psutil.Process]]:
    """The address of a local cluster, and the process that it ends with."""
    command = [sys.executable, "-c", f"{CLUSTER}; sys.stdin.read()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes) as process:
        yield process.stdout.readline().strip(), psutil.Process(process.pid)
        process.stdin.close()


@pytest.fixture(scope="module")
def expected(folder, untrained, tmp_path_factory) -> list[dict]:
    table = tmp_path_factory.mktemp("plain") / "table.csv"
    assert main(["classify", str(folder), "--weights", str(untrained), "--output", str(table)]) == 1
    return rows_of(table)


def rows_of(table: Path) -> list[dict]:
    with open(table, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def start(folder: Path, table: Path, address: str, *options: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "hep2",
        "classify",
        str(folder),
        "--output",
        str(table),
        "--ray",
        address,
        *options,
    ]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def test_ray_gives_the_rows_that_one_process_gives(folder, untrained, tmp_path, cluster, expected):
    table = tmp_path / "table.csv"
    with start(folder, table, cluster[0], "--weights", str(untrained)) as process:
        error = process.stderr.read()
    assert process.returncode == 1, error
    assert f"hep2: {6 * CELLS} read, 1 could not be read, in {table}" in error
    rows = rows_of(table)
    assert [row["file"] for row in rows] == [row["file"] for row in expected]
    numbers = [column for column in rows[0] if "_" in column or column == "probability"]
    for row, other in zip(rows, expected, strict=True):
        # In a batch of another size the last digit may be another.
        found, plain = ([float(values.pop(column) or 0) for column in numbers] for values in (row, other.copy()))
        assert found == pytest.approx(plain, abs=2e-5)
        row.pop("warnings")
        assert row.items() <= other.items()


def test_an_actor_killed_in_the_middle_costs_no_row_and_doubles_none(folder, tmp_path, cluster, expected):
    table = tmp_path / "table.csv"
    with start(folder, table, cluster[0]) as process:  # the bundled weights, which take longer
        while not (table.exists() and len(rows_of(table)) > 0):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        actors = [child for child in cluster[1].children(recursive=True) if "ray::MapWorker" in child.name()]
        assert len(rows_of(table)) < len(expected)
        actors[0].kill()
        error = process.stderr.read()
    assert process.returncode == 1, error
    rows = rows_of(table)
    assert [row["file"] for row in rows] == [row["file"] for row in expected]
    assert [bool(row["error"]) for row in rows] == [bool(row["error"]) for row in expected]
