import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from hep2.__main__ import main
from hep2.bulk import find_images, forget_failures, gather_parts, read_into
from hep2.patterns import CLASS_NAMES
from hep2.phantoms import phantom_cell
from hep2.reader import Reader
from hep2.weights import load_weights


@pytest.fixture(scope="module")
def reader(untrained) -> Reader:
    return Reader(load_weights(untrained))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Ten phantoms in folders, one file that is no image by its name and one that is none by its content."""
    root = tmp_path_factory.mktemp("cells")
    random = np.random.default_rng(0)
    for number in range(10):
        path = root / f"slide {number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(phantom_cell(CLASS_NAMES[number % 6], random)).save(path)
    (root / "notes.txt").write_text("no image")
    (root / "slide 1" / "bad.TIF").write_text("no image")
    return root


def sources(folder: Path) -> list[tuple[str, Path]]:
    return [(name, Path(name)) for name in find_images([str(folder)])]


def rows_of(table: Path) -> list[dict]:
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def test_find_images_goes_through_folders_in_order_and_leaves_named_files(folder):
    found = [str(Path(name).relative_to(folder)) for name in find_images([str(folder)])]
    assert found == [f"slide 0/{n}.png" for n in (0, 2, 4, 6, 8)] + [
        *(f"slide 1/{n}.png" for n in (1, 3, 5, 7, 9)),
        "slide 1/bad.TIF",
    ]
    assert list(find_images(["a.txt", "b"])) == ["a.txt", "b"]
    too_long = "a" * 300 + ".png"
    fitting = [str(folder / "slide 0" / f"{number}.png") for number in (0, 2)]
    assert list(find_images([too_long, str(folder / "slide 0" / "[02].png")])) == [too_long, *fitting]


def test_read_into_reads_a_cell_that_is_named_twice_once(reader, folder, tmp_path):
    table = tmp_path / "table.csv"
    first = sources(folder)[0]
    read_into(reader, [first, *sources(folder), first], table, progress=False)
    assert [row["file"] for row in rows_of(table)] == [name for name, _ in sources(folder)]


def test_read_into_goes_on_with_names_that_hold_line_breaks(reader, folder, tmp_path):
    table = tmp_path / "table.csv"
    odd = [(f"{number}\r\nb\n.png", image) for number, (_, image) in enumerate(sources(folder)[:3])]
    read_into(reader, odd[:2], table, progress=False)
    with open(table, "rb+") as file:  # killed within the second line
        file.truncate(table.stat().st_size - 10)
    read_into(reader, odd, table, progress=False)
    assert [row["file"] for row in rows_of(table)] == [f"{number}\\r\\nb\\n.png" for number in range(3)]


def test_read_into_goes_on_with_a_table_that_holds_a_blank_line(reader, folder, tmp_path):
    table = tmp_path / "table.csv"
    read_into(reader, sources(folder)[:3], table, progress=False)
    with open(table, "a") as file:
        file.write("\n")
    forget_failures(table, reader.weights)
    read_into(reader, sources(folder), table, progress=False)
    assert [row["file"] for row in rows_of(table)] == [name for name, _ in sources(folder)]


def test_classify_by_several_processes_wants_a_table(folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["classify", str(folder)]) == 1
    assert "give --output" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [0, 1, 30, 2000])
def test_read_into_goes_on_behind_the_last_whole_line(reader, folder, tmp_path, cut, monkeypatch):
    whole, table = tmp_path / "whole.csv", tmp_path / "table.csv"
    options = {"total": 11, "progress": False}
    assert read_into(reader, sources(folder), whole, **options) == 1
    content = whole.read_bytes()
    table.write_bytes(content[: len(content) - cut])
    read = []
    plain = reader.read
    monkeypatch.setattr(reader, "read", lambda pairs: plain(pair for pair in pairs if not read.append(pair)))
    assert read_into(reader, sources(folder), table, **options) == 1
    assert table.read_bytes() == content
    assert len(read) == {0: 0, 1: 1, 30: 1}.get(cut, len(read))
    assert len(read) < 11


def test_read_into_shares_out_and_gathers(reader, folder, tmp_path):
    table, alone = tmp_path / "table.csv", tmp_path / "alone.csv"
    read_into(reader, sources(folder), alone, total=11, progress=False)
    for process in range(3):
        read_into(reader, sources(folder), table, total=11, process=process, processes=3, progress=False)
    gather_parts(table, reader.weights)
    assert list(tmp_path.glob("table.csv*")) == [table]
    key = "file"
    assert sorted(rows_of(table), key=lambda row: row[key]) == sorted(rows_of(alone), key=lambda row: row[key])


def test_gather_parts_takes_each_row_once_whatever_a_kill_has_left(reader, folder, tmp_path):
    table, part = tmp_path / "table.csv", tmp_path / "table.csv.part-1"
    read_into(reader, sources(folder), table, total=11, progress=False)
    whole = table.read_bytes()
    part.write_bytes(whole[:-20])
    gather_parts(table, reader.weights)
    assert (table.read_bytes(), part.exists()) == (whole, False)
    part.write_text("name,price\nbread,2\n")
    with pytest.raises(ValueError, match="no table of readings"):
        gather_parts(table, reader.weights)
    assert table.read_bytes() == whole
    assert part.exists()


def test_read_into_takes_no_foreign_table(reader, folder, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("name,price\nbread,2\n")
    with pytest.raises(ValueError, match="no table of readings"):
        read_into(reader, sources(folder), table, total=11, progress=False)
    assert table.read_text() == "name,price\nbread,2\n"
    table.unlink()
    read_into(reader, sources(folder)[:2], table, total=2, progress=False)
    table.write_text(table.read_text().replace(reader.weights.revision, "another"))
    with pytest.raises(ValueError, match="revision another"):
        read_into(reader, sources(folder), table, total=11, progress=False)


def test_a_name_that_is_no_utf_8_goes_through_a_table_and_back(reader, folder, tmp_path):
    odd = shutil.copytree(folder, tmp_path / "cells") / os.fsdecode(b"Z\xfcrich.png")
    shutil.copy(folder / "slide 0" / "0.png", odd)
    table = tmp_path / "run[1].csv"
    for process in range(2):
        read_into(reader, sources(odd.parent), table, process=process, processes=2, progress=False)
    gather_parts(table, reader.weights)
    assert os.fsencode(odd) in table.read_bytes()
    before = table.read_bytes()
    read_into(reader, sources(odd.parent), table, progress=False)
    assert table.read_bytes() == before


def test_classify_reads_a_folder_or_a_dataset_into_a_table(folder, untrained, tmp_path, capsys):
    table, folder = tmp_path / "out" / "table.csv", shutil.copytree(folder, tmp_path / "cells")
    assert main(["classify", str(folder), "--weights", str(untrained), "--output", str(table)]) == 1
    rows = rows_of(table)
    assert len(rows) == 11
    assert [bool(row["error"]) for row in rows] == [False] * 10 + [True]
    assert "1 of them could not be read" in capsys.readouterr().err
    # What could not be read is tried again.
    broken = next(row["file"] for row in rows if row["error"])
    shutil.copy(rows[0]["file"], broken)
    assert main(["classify", str(folder), "--weights", str(untrained), "--output", str(table)]) == 0
    assert sorted(row["file"] for row in rows_of(table)) == sorted(row["file"] for row in rows)
    assert not any(row["error"] for row in rows_of(table))
    assert main(["classify", str(folder), "--output", str(table), "--json"]) == 1
    assert "leave out --json" in capsys.readouterr().err
    # A table of another kind loses nothing.
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("file,error\na,none\nb,broken")
    assert main(["classify", str(folder), "--weights", str(untrained), "--output", str(foreign)]) == 1
    assert foreign.read_text() == "file,error\na,none\nb,broken"
    (folder / "empty").mkdir()
    assert main(["classify", str(folder / "empty"), "--weights", str(untrained)]) == 1
    assert "there is no PNG, JPEG, TIFF, BMP or WebP image in this folder" in capsys.readouterr().err
    assert main(["classify", "--dataset", "phantoms:1", "--weights", str(untrained), "--csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert main(["classify", "--weights", str(untrained)]) == 1
    assert "give images or folders" in capsys.readouterr().err


def test_classify_over_two_processes(folder, untrained, tmp_path):
    table = tmp_path / "table.csv"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "hep2"]
    command = [*launch, "classify", str(folder), "--weights", str(untrained), "--output", str(table)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert f"11 images are in {table}, read by 2 processes" in result.stderr
    assert "1 of them could not be read" in result.stderr
    assert len(rows_of(table)) == 11
    assert list(tmp_path.iterdir()) == [table]
