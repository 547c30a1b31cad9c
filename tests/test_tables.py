import csv
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from hep2.files import locked
from hep2.images import Cell
from hep2.patterns import CLASS_NAMES, MODEL_TITLES
from hep2.predictor import Failure, Prediction
from hep2.tables import COLUMNS, check_table, open_table, table_row

REVISION = "0123456789ab"
FORMS = ["csv", "parquet"]


def predicted(name: str, number: int = 0) -> Prediction:
    values = np.roll(np.array([0.9, 0.05, 0.02, 0.01, 0.01, 0.01]), number)
    cell = Cell(np.zeros((1, 78, 78), np.float32), ("weak signal: it is faint",))
    probabilities = dict.fromkeys(MODEL_TITLES, values)
    return Prediction(name, cell, probabilities, 0.0, False, {"source": "none", "revision": REVISION})


ANSWERS = [Failure(f"{n}.png", "not an image") if n == 3 else predicted(f"{n}.png", n % 6) for n in range(8)]


def write(path: Path, answers=ANSWERS, revision=REVISION, stop_after=None) -> list[str]:
    """Add the answers that a table has not, and return their names; an interruption may come."""
    with open_table(path, revision) as table:
        missing = [answer for answer in answers if not table.has(answer.file)]
        for number, answer in enumerate(missing):
            if number == stop_after:
                raise KeyboardInterrupt
            table.add(table_row(answer, revision))
    return [answer.file for answer in missing]


def read(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("form", FORMS)
def test_open_table_writes_a_row_for_each_answer(form, tmp_path):
    path = tmp_path / f"table.{form}"
    write(path)
    rows = read(path)
    assert [row["file"] for row in rows] == [answer.file for answer in ANSWERS]
    assert list(rows[0]) == COLUMNS
    assert [row["verdict"] or None for row in rows] == [answer.verdict for answer in ANSWERS]
    assert [row["error"] or None for row in rows] == [None] * 3 + ["not an image"] + [None] * 4
    assert float(rows[1][f"vit_{CLASS_NAMES[1]}"]) == 0.9
    assert rows[0]["warnings"] == "weak signal: it is faint"
    assert list(tmp_path.iterdir()) == [path]


def test_open_table_gives_parquet_columns_their_types(tmp_path):
    write(tmp_path / "table.parquet", ANSWERS[3:4])
    schema = pyarrow.parquet.read_schema(tmp_path / "table.parquet")
    types = [str(schema.field(name).type) for name in ("file", "verdict", "probability", "agreement", "error")]
    assert types == ["string", "string", "double", "int64", "string"]


@pytest.mark.parametrize("form", FORMS)
def test_open_table_goes_on_where_it_was_stopped(form, tmp_path):
    path, whole = tmp_path / f"table.{form}", tmp_path / f"whole.{form}"
    write(whole)
    with pytest.raises(KeyboardInterrupt):
        write(path, stop_after=2)
    assert write(path) == [f"{number}.png" for number in range(2, 8)]
    assert path.read_bytes() == whole.read_bytes()
    assert write(path) == ["3.png"]  # what could not be read is tried again
    mended = [predicted(answer.file) for answer in ANSWERS]
    assert write(path, mended) == ["3.png"]
    assert sorted(row["file"] for row in read(path)) == [f"{number}.png" for number in range(8)]
    assert not any(row["error"] for row in read(path))
    assert sorted(tmp_path.iterdir()) == [path, whole]


@pytest.mark.parametrize("cut", [1, 30, 300, 900])
def test_open_table_goes_on_behind_the_last_whole_line(cut, tmp_path):
    path, whole = tmp_path / "table.csv", tmp_path / "whole.csv"
    answers = [answer for answer in ANSWERS if answer.verdict]
    write(whole, answers)
    path.write_bytes(whole.read_bytes()[:-cut])
    assert 0 < len(write(path, answers)) < 7
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["=1+1.png", "+a", "-a", "@a", "\ta", "a\r\nb\n.png", "caf\udce9.png", 'a,"b".png', "größe.png"]
)
def test_open_table_keeps_odd_names_in_one_line_and_knows_them_again(form, name, tmp_path):
    path = tmp_path / f"table.{form}"
    write(path, [predicted("first"), predicted(name), predicted("last")])
    assert write(path, [predicted(name)]) == []
    held = read(path)[1]["file"]
    assert held.isprintable() or name.startswith("\t")
    if form == "csv":
        assert not held.startswith(("=", "+", "-", "@", "\t"))
        assert len(path.read_text().splitlines()) == 4
    elif name.isprintable():
        assert held == name


def test_open_table_begins_csv_with_a_byte_order_mark(tmp_path):
    write(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_bytes().startswith(b"\xef\xbb\xbffile,verdict,")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"name,price\nbread,2\n"),
        ("a.csv", b"\x89PNG\r\n\x1a\n\0\0\0\0"),
        ("a.parquet", b"name,price\nbread,2\n"),
    ],
)
def test_open_table_takes_no_foreign_table(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is no table of this command's answers: give another --output"):
        write(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("form", FORMS)
def test_open_table_takes_no_table_of_other_weights(form, tmp_path):
    path = tmp_path / f"table.{form}"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="begun with weights of the revision 0123456789ab, these are ba9876543210"):
        write(path, revision="ba9876543210")
    assert path.read_bytes() == before


def test_open_table_takes_no_table_that_another_process_writes(tmp_path):
    with locked(tmp_path / "table.csv"), pytest.raises(ValueError, match="another process is writing"):
        write(tmp_path / "table.csv")


def test_check_table_wants_a_known_suffix_and_a_place_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"table.xlsx is no name of a table: give one that ends in .csv or .parquet"):
        check_table(tmp_path / "table.xlsx")
    with pytest.raises(OSError, match="cannot be written"):
        check_table(Path(os.devnull) / "table.csv")
    assert check_table(tmp_path / "table.csv") == tmp_path / "table.csv"
