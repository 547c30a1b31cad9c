import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hep2.files import check_writable, find_images, locked, own_picture


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four images of different content in two folders, and a text."""
    for number in range(4):
        path = tmp_path / "cells" / f"slide {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(path)
    (tmp_path / "cells" / "notes.txt").write_text("no image")
    return tmp_path / "cells"


def names(found, folder: Path) -> list[str]:
    return [str(Path(name).relative_to(folder)) for name in found.names]


def left_out(found) -> dict[str, int]:
    return {reason: count for reason, count in found.left_out.items() if count}


ALL = ["slide 0/0.png", "slide 0/2.png", "slide 1/1.png", "slide 1/3.png"]


def test_find_images_goes_through_folders_in_order(folder):
    (folder / "slide 1" / "bad.TIF").write_text("no image by its content, which decoding tells")
    found = find_images([str(folder)])
    assert names(found, folder) == [*ALL, "slide 1/bad.TIF"]
    assert left_out(found) == {".txt": 1}
    assert (found.errors, found.copies) == ({}, {})


def test_find_images_leaves_out_what_is_hidden(folder):
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes((folder / "slide 0" / "0.png").read_bytes())
    (folder / "slide 0" / "._0.png").write_bytes(b"\0\5\x16\7" + bytes(60))
    found = find_images([str(folder)])
    assert names(found, folder) == ALL
    assert left_out(found) == {".txt": 1, "hidden": 2}
    named = str(folder / ".ipynb_checkpoints")
    assert len(find_images([named]).names) == 1  # who names it means it


def test_find_images_leaves_out_own_pictures_wherever_they_are_named(folder):
    drawn = folder / "slide 0" / "drawn.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(drawn, pnginfo=own_picture())
    assert names(find_images([str(folder)]), folder) == ALL
    found = find_images([str(drawn), str(folder / ALL[0])])
    assert names(found, folder) == ALL[:1]
    assert left_out(found) == {"drawn by hep2": 1}


def test_find_images_tells_which_have_the_same_content(folder):
    original = folder / ALL[0]
    copies = [folder / "slide 1" / "copy.png", folder / "slide 1" / "z.png"]
    copies[0].write_bytes(original.read_bytes())
    copies[1].symlink_to(original)
    found = find_images([str(folder)])
    assert len(found.names) == 6
    assert found.copies == dict.fromkeys(map(str, copies), str(original))
    found = find_images([str(original), str(original), str(folder)])
    assert (found.names[0], len(found.names), found.left_out["named twice"]) == (str(original), 6, 2)


def test_find_images_follows_links_without_loops(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (folder / "slide 1").rename(elsewhere)
    (folder / "slide 1").symlink_to(elsewhere)
    (folder / "slide 0" / "up").symlink_to(folder)
    found = find_images([str(folder), str(elsewhere)])
    assert names(found, folder) == ALL
    assert left_out(found) == {".txt": 1, "folders met again": 2}


def test_find_images_names_links_that_lead_nowhere(folder):
    (folder / "archive").symlink_to(folder / "gone")
    assert names(find_images([str(folder)]), folder) == ["archive", *ALL]  # which decoding answers


def test_find_images_names_folders_that_cannot_be_read(folder, monkeypatch):
    closed, scandir = str(folder / "slide 0"), os.scandir

    def refuse(path):
        if path == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    found = find_images([str(folder)])
    assert names(found, folder) == ALL[2:]
    assert found.errors == {closed: "this folder cannot be read: Permission denied"}


def test_find_images_names_folders_without_images(folder):
    (folder / "empty").mkdir()
    found = find_images([str(folder / "empty"), str(folder)])
    assert list(found.errors) == [str(folder / "empty")]
    assert "there is no image in this folder: none ends in .png" in found.errors[str(folder / "empty")]
    assert names(found, folder) == ALL


def test_find_images_does_not_wait_for_pipes(folder):
    os.mkfifo(folder / "pipe.png")
    assert left_out(find_images([str(folder)])) == {".png": 1, ".txt": 1}
    assert find_images([str(folder / "pipe.png")]).names == [str(folder / "pipe.png")]


def test_find_images_keeps_what_is_named_and_expands_patterns(folder):
    too_long = "a" * 300 + ".png"
    fitting = [str(folder / name) for name in ALL[:2]]
    assert find_images([too_long, "missing.png", "-", str(folder / "slide 0" / "[02].png")]).names == [
        *(too_long, "missing.png", "-"),
        *fitting,
    ]


def test_check_writable_leaves_everything_as_it_was(tmp_path):
    check_writable(tmp_path / "new" / "table.csv")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "kept.csv").write_text("kept")
    check_writable(tmp_path / "kept.csv")
    assert (tmp_path / "kept.csv").read_text() == "kept"
    for place in (tmp_path, tmp_path / "kept.csv" / "table.csv"):
        with pytest.raises(OSError, match=r"cannot be written .*: give another place"):
            check_writable(place)


def test_locked_keeps_a_second_one_out(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(ValueError, match="another process is writing"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
