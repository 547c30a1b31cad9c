import os
import subprocess
import sys

import pytest
from conftest import ROOT, TEACHER, run_train

import train


@pytest.mark.parametrize(
    "options, message",
    [
        (["--models", "cnn", "ensemble"], "the ensemble needs cnn, rescnn and vit"),
        (["--models", "cnn", "--push", "lab/hep2"], "only whole runs travel"),
        (["--private"], "go with --push OWNER/NAME"),
        (["--models", "cnn", "gnn"], "invalid choice: 'gnn'"),
        (["--protocol", "clean"], "invalid choice: 'clean'"),
    ],
)
def test_options_that_do_not_go_together_are_told(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--dataset", "synthetic:2", "--output", str(tmp_path / "run"), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dataset", "synthetic:2"], "12 cells are too few"),
        (["--recipe", "baseline"], "the recipe 'baseline' has no teachers"),
        (["--teacher", "no_such_network"], "no pretrained weights of 'no_such_network'"),
        (["--teacher", f"{TEACHER}=no/such/file.pt"], "in no/such/file.pt"),
        (["--teacher", "none", "--batch-size", "1"], "batch_size"),
    ],
)
def test_what_cannot_be_trained_is_told_in_a_line(options, message, teacher_file, tmp_path, capsys):
    assert run_train(tmp_path / "run", teacher_file, *options) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(told) == 1
    assert message in told[0]


def test_one_model_is_trained_without_a_teacher_and_measured(teacher_file, tmp_path, capsys):
    options = ["--teacher", "none", "--models", "cnn", "--epochs", "1", "--batch-size", "64"]
    assert run_train(tmp_path, teacher_file, *options) == 0
    assert len((tmp_path / "cnn" / "log.jsonl").read_text().splitlines()) == 1
    header, row = capsys.readouterr().out.splitlines()
    assert header.startswith("model ")
    assert row.startswith("CNN ")


def test_an_interruption_ends_with_the_command_that_goes_on(teacher_file, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupt)
    assert run_train(tmp_path / "a folder", teacher_file) == 130
    assert f"python train.py --dataset synthetic:40 --teacher {TEACHER}=" in (told := capsys.readouterr().err)
    assert f"'{tmp_path / 'a folder'}'" in told


@pytest.mark.slow
def test_train_runs_on_two_processes(tmp_path):
    # Without a GPU, --multi_gpu means several processes on the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = ["train.py", "--dataset", "synthetic:10", "--models", "cnn", "--recipe", "baseline", "--epochs", "1"]
    command += ["--batch-size", "14", "--output", str(tmp_path)]
    subprocess.run(
        [*launch, "--main_process_port", "0", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=580,  # some ten seconds where nothing else runs
    )
    assert len((tmp_path / "cnn" / "log.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 9
