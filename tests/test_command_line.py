import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, field_of
from PIL import Image

from hep2.__main__ import main
from hep2.models import MODELS
from hep2.patterns import CLASS_NAMES

COMMAND = [sys.executable, "-m", "hep2"]


@pytest.fixture
def images(tmp_path, capsys) -> list[str]:
    assert main(["synthesize", "--output", str(tmp_path / "cells"), "--count", "1", "--seed", "3"]) == 0
    capsys.readouterr()
    return [str(tmp_path / "cells" / name / "1.png") for name in CLASS_NAMES]


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Path:
    """The bytes of one small field, in a folder of its own; to be copied."""
    path = tmp_path_factory.mktemp("field") / "field.png"
    Image.fromarray(field_of("Nucleolar", seed=4)[0].astype(np.uint8)).save(path)
    return path


def rows_of(text: str) -> list[dict]:
    return list(csv.DictReader(text.removeprefix("\ufeff").splitlines()))


def test_help_and_wrong_arguments_wait_for_no_pytorch():
    code = "import sys; from hep2.__main__ import main; main({}); "
    for arguments in (["--help"], ["classify", "--plane", "first"]):
        run = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code.format(arguments)}"
        result = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True)
        assert result.stdout.endswith("False\n")


def test_classify_json_prints_one_object_a_line(images, untrained, capsys):
    assert main(["classify", *images, "--json", "--weights", str(untrained)]) == 0
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["file"] for answer in answers] == images
    assert all(list(answer["models"]) == list(MODELS) for answer in answers)
    assert err.endswith("hep2: 6 read\n")


@pytest.mark.parametrize("form", ["--json", "--csv", None])
def test_classify_answers_for_all_others_when_one_fails_and_exits_1(form, images, untrained, capsys, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("<svg/>")
    files = [images[0], str(bad), str(tmp_path / "missing.png"), images[1]]
    assert main(["classify", *files, "--weights", str(untrained), *([form] if form else [])]) == 1
    out, err = capsys.readouterr()
    assert f"hep2: {bad}: not an image" in err
    assert "missing.png: there is no such file" in err
    assert err.endswith("hep2: 2 read, 2 could not be read\n")
    if form == "--json":
        answers = [json.loads(line) for line in out.splitlines()]
        assert [answer["file"] for answer in answers] == files
        assert ["error" in answer for answer in answers] == [False, True, True, False]
    elif form == "--csv":
        rows = rows_of(out)
        assert [row["file"] for row in rows] == files
        assert [bool(row["error"]) for row in rows] == [False, True, True, False]
        assert sum(float(rows[0][f"vit_{name}"]) for name in CLASS_NAMES) == pytest.approx(1, abs=1e-5)
    else:
        assert images[0] in out
        assert images[1] in out


def test_classify_csv_is_for_spreadsheets(images, untrained, tmp_path, monkeypatch, capsys):
    shutil.copy(images[0], tmp_path / "=1+1.png")
    shutil.copy(images[1], tmp_path / "größe.png")
    monkeypatch.chdir(tmp_path)
    assert main(["classify", "=1+1.png", "größe.png", "--csv", "--weights", str(untrained)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("\ufefffile,verdict,")
    assert [row["file"] for row in rows_of(out)] == ["'=1+1.png", "größe.png"]


def test_classify_says_what_it_left_out_and_why(images, untrained, tmp_path, capsys):
    folder = tmp_path / "cells"
    (folder / ".hidden.png").write_text("")
    (folder / "notes.txt").write_text("")
    shutil.copy(images[0], folder / "copy.png")
    (folder / "empty").mkdir()
    assert main(["classify", str(folder / "empty"), str(folder), "--json", "--weights", str(untrained)]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 8
    assert f"hep2: {folder / 'empty'}: there is no image in this folder" in err
    summary = err.splitlines()[-1]
    for part in (
        "7 read",
        "1 could not be read",
        "1 left out (hidden)",
        "1 left out (.txt)",
        "1 with the content of another",
    ):
        assert part in summary
    assert f"answered all the same ({images[0]} has that of {folder / 'copy.png'})" in summary


def test_classify_reads_standard_input_and_pipes(images, untrained, tmp_path, monkeypatch, capsys):
    data, pipe = Path(images[0]).read_bytes(), tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_bytes(data), daemon=True).start()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["classify", "-", str(pipe), images[0], "--json", "--weights", str(untrained)]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["file"] for answer in answers] == ["-", str(pipe), images[0]]
    assert answers[0]["models"] == answers[1]["models"] == answers[2]["models"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["classify", "-", "--weights", str(untrained)]) == 1
    assert "hep2: -: the file is empty (0 bytes)" in capsys.readouterr().err


def test_classify_takes_the_channel_and_plane_that_are_named(untrained, tmp_path, capsys):
    red, green = (field_of(name, seed=1)[0][100:178, 100:178].astype(np.uint8) for name in ("Golgi", "Nucleolar"))
    file = tmp_path / "two.png"
    Image.fromarray(np.dstack([red, green, np.zeros_like(red)])).save(file)
    alone = tmp_path / "red.png"
    Image.fromarray(red).save(alone)
    command = ["classify", "--json", "--weights", str(untrained)]
    assert main([*command, str(file), "--channel", "red"]) == main([*command, str(alone)]) == 0
    named, expected = map(json.loads, capsys.readouterr().out.splitlines())
    assert named["models"] == expected["models"]
    assert main([*command, str(file), "--channel", "infrared"]) == 1
    assert "infrared" in capsys.readouterr().err
    assert main([*command, str(file), "--plane", "7"]) == 1
    assert "plane" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(tmp_path):
    command = [*COMMAND, "synthesize", "--count", "1", "--output", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_classify_without_usable_weights_says_so(images, tmp_path, capsys):
    assert main(["classify", images[0], "--weights", str(tmp_path / "none")]) == 1
    assert "no such folder of weights" in capsys.readouterr().err


def test_the_environment_names_the_weights(images, untrained, monkeypatch, capsys):
    monkeypatch.setenv("HEP2_WEIGHTS", str(untrained))
    assert main(["classify", images[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["source"] == f"folder {untrained.name}"
    monkeypatch.setenv("HEP2_WEIGHTS", "")
    assert main(["classify", images[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["source"] == "bundled"


def test_classify_reads_the_examples_with_the_bundled_weights(capsys):
    files = [f"examples/{name}/{number}.png" for name in CLASS_NAMES for number in range(1, 6)]
    assert main(["classify", *files, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["verdict"] for answer in answers] == [file.split("/")[1] for file in files]
    assert {answer["weights"]["source"] for answer in answers} == {"bundled"}


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_classify_reads_a_folder_into_a_table_that_goes_on(form, images, untrained, tmp_path, capsys):
    table = tmp_path / "out" / f"table.{form}"
    bad = tmp_path / "cells" / "bad.png"
    bad.write_text("no image")
    command = ["classify", str(tmp_path / "cells"), "--weights", str(untrained), "--output", str(table)]
    assert main(command) == 1
    assert f"hep2: 6 read, 1 could not be read, in {table}, whose column error says why" in capsys.readouterr().err
    shutil.copy(images[0], bad)  # what could not be read is tried again
    assert main(command) == 0
    assert "hep2: 7 read" in capsys.readouterr().err
    assert list(table.parent.iterdir()) == [table]
    assert main([*command, "--json"]) == 1
    assert "leave out --json" in capsys.readouterr().err


def test_classify_takes_a_dataset_in_place_of_images(untrained, capsys):
    assert main(["classify", "--dataset", "synthetic:1", "--weights", str(untrained), "--csv"]) == 0
    named = capsys.readouterr().out
    assert len(rows_of(named)) == 6
    assert main(["classify", "synthetic:1", "--weights", str(untrained), "--csv"]) == 0
    assert capsys.readouterr().out == named
    for arguments in ([], ["a.png", "--dataset", "synthetic:1"]):
        assert main(["classify", *arguments]) == 1
        assert "give images or folders of images, or --dataset NAME" in capsys.readouterr().err


def test_an_interruption_ends_in_one_line_that_says_how_to_go_on(untrained, tmp_path):
    table = tmp_path / "table.csv"
    command = [*COMMAND, "classify", "synthetic:400", "--weights", str(untrained), "--output", str(table)]
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    # A shell's background job ignores interruptions, and so would what it starts.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, preexec_fn=heed, **options) as process:
        while not (table.exists() and table.stat().st_size > 2000):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
    assert process.returncode == 130
    assert error.splitlines()[-1] == "hep2: stopped; the same command goes on from here"
    assert "Traceback" not in error
    assert len(rows_of(table.read_text())) >= 1


def test_specimen_answers_with_one_object_or_a_table(field, capsys):
    assert main(["specimen", str(field), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["verdict"], answer["files"], answer["failures"]) == ("Nucleolar", [str(field)], [])
    assert main(["specimen", str(field), "--csv"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("\ufeff")
    assert len(rows_of(out)) == answer["cells"]
    assert "hep2: Nucleolar" in err
    assert main(["specimen", str(field)]) == 0
    assert capsys.readouterr().out.startswith(f"Nucleolar {answer['probability']:.1%}")


def test_specimen_reads_a_folder_the_same_with_its_own_pictures_and_copies_in_it(field, tmp_path, capsys):
    shutil.copy(field, tmp_path / "field.png")
    command = ["specimen", str(tmp_path), "--json", "--overlay", str(tmp_path / "drawn.png")]
    assert main(command) == 0
    first, err = capsys.readouterr()
    assert err.endswith("hep2: 1 read\n")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    shutil.copy(field, tmp_path / ".ipynb_checkpoints" / "field-checkpoint.png")
    (tmp_path / "._field.png").write_bytes(b"\0\5\x16\7" + bytes(100))
    shutil.copy(field, tmp_path / "field copy.png")
    (tmp_path / "field copy.png").rename(tmp_path / "z.png")
    assert main(command) == 0
    again, err = capsys.readouterr()
    assert again == first
    for part in (
        "1 read",
        "2 left out (hidden)",
        "1 left out (drawn by hep2)",
        "1 with the content of another left out (",
    ):
        assert part in err.splitlines()[-1]


def test_specimen_reads_what_can_be_read_and_exits_1(field, tmp_path, capsys):
    shutil.copy(field, tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(field.read_bytes()[:2000])
    assert main(["specimen", str(tmp_path), str(tmp_path / "missing.png"), "--json"]) == 1
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (answer["verdict"], answer["files"]) == ("Nucleolar", [str(tmp_path / "a.png")])
    assert [Path(failure["file"]).name for failure in answer["failures"]] == ["b.png", "missing.png"]
    assert "2 of the fields could not be read: the verdict rests on the others" in answer["warnings"]
    assert "b.png: the image is truncated" in err
    assert "hep2: 1 read, 2 could not be read" in err
    assert main(["specimen", str(tmp_path / "b.png")]) == 1
    assert capsys.readouterr().out == ""


def test_specimen_knows_before_the_work_that_an_overlay_cannot_be_written(field, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hep2.predictor.Predictor.specimen", lambda *_, **__: pytest.fail("it was read"))
    (tmp_path / "file").write_text("")
    for overlay, reason in (
        (tmp_path / "file" / "drawn.png", "cannot be written"),
        (tmp_path / "drawn.jpg", r"give a name that ends in .png"),
        (field, "would write over the field"),
    ):
        assert main(["specimen", str(field), "--overlay", str(overlay)]) == 1
        assert reason in capsys.readouterr().err
    for size in ("0.1um", "0,1"):
        with pytest.raises(SystemExit):
            main(["specimen", str(field), "--pixel-size", size])
        assert f"argument --pixel-size: invalid float value: '{size}'" in capsys.readouterr().err
    assert main(["specimen", str(field), "--pixel-size", "5"]) == 1
    assert "the pixel size is 5.0" in capsys.readouterr().err


def test_specimen_numbers_the_overlays_of_several_fields(field, tmp_path, capsys):
    shutil.copy(field, tmp_path / "a.png")
    Image.fromarray(field_of("Nucleolar", seed=5)[0].astype(np.uint8)).save(tmp_path / "b.png")
    assert main(["specimen", str(tmp_path), "--overlay", str(tmp_path / "drawn.png")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "drawn-1.png", "drawn-2.png"]


def test_evaluate_measures_and_prints_what_it_wrote(untrained, tmp_path, capsys):
    command = ["evaluate", "--dataset", "synthetic:12", "--weights", str(untrained)]
    assert main([*command, "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "protocol deduplicated, seed 0, 11 test cells" in out
    assert "Stack ensemble" in out
    assert "the weights were trained on another dataset" in out
    assert "eference" not in out  # whose figures are of other cells
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(result["models"]) == list(MODELS)
    assert (tmp_path / "run" / "predictions.csv").exists()


def test_evaluate_knows_before_the_work_that_it_cannot_write(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hep2.data.load_cells", lambda *_: pytest.fail("cells were loaded"))
    (tmp_path / "file").write_text("")
    assert main(["evaluate", "--dataset", "synthetic:12", "--output", str(tmp_path / "file")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--dataset", "synthetic:12", "--output", str(tmp_path), "--seed", "-1"])
    assert "argument --seed: '-1' is given: give a whole number, 0 or more" in capsys.readouterr().err


def test_examples_are_what_the_generator_makes(tmp_path, capsys):
    assert main(["synthesize", "--output", str(tmp_path), "--seed", "1"]) == 0
    for name in CLASS_NAMES:
        for number in range(1, 6):
            made, kept = (np.asarray(Image.open(f"{root}/{name}/{number}.png")) for root in (tmp_path, "examples"))
            np.testing.assert_array_equal(made, kept)


def test_example_fields_are_what_the_generator_makes(tmp_path, capsys):
    assert main(["synthesize", "--fields", "--output", str(tmp_path), "--seed", "1"]) == 0
    for name in CLASS_NAMES:
        made, kept = (np.asarray(Image.open(f"{root}/{name}.png")) for root in (tmp_path, "examples/fields"))
        np.testing.assert_array_equal(made, kept)


@pytest.mark.parametrize("option", ["--count", "--seed"])
def test_synthesize_of_a_negative_number_is_an_error_that_names_it(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["synthesize", "--output", str(tmp_path), option, "-1"])
    assert ended.value.code == 2
    assert f"argument {option}: '-1' is given: give a whole number, 0 or more" in capsys.readouterr().err


def test_synthesize_says_where_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["synthesize", "--output", str(tmp_path / "file"), "--count", "1"]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert main(["synthesize", "--output", str(tmp_path), "--count", "0"]) == 1
    assert "--count is 0" in capsys.readouterr().err
