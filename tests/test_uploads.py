import os
import time
from pathlib import Path

from hep2.uploads import VARIABLE, folder_of_uploads, sweep


def test_sweep_deletes_what_is_old_whoever_left_it_but_what_is_kept(tmp_path):
    kept, old, beside = tmp_path / "example.png", tmp_path / "ab12" / "cell.png", tmp_path / "tmpempty"
    old.parent.mkdir()
    for path in (kept, old, beside):
        path.write_bytes(b"")
    sweep(tmp_path, 3600, {kept})
    assert old.exists()
    sweep(tmp_path, -1, {kept})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_folder_of_uploads_sweeps_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with folder_of_uploads(0.01, -1) as kept:
        folder = os.environ[VARIABLE]
        assert folder.startswith(str(tmp_path))
        uploaded = tmp_path / folder / "cell.png"
        kept.add(tmp_path / folder / "example.png")
        (tmp_path / folder / "example.png").write_bytes(b"an example")
        uploaded.write_bytes(b"a patient's cell")
        for _ in range(500):
            if not uploaded.exists():
                break
            time.sleep(0.01)
        assert [path.name for path in Path(folder).iterdir()] == ["example.png"]
    assert os.environ[VARIABLE] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
