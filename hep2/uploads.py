"""A folder for what visitors of the page upload, and for what is made for them: emptied in time, and gone at the end.

Gradio deletes only what it keeps account of: not uploads that were broken off, nor the empty file that it leaves beside
each. What lies here may be a patient's.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VARIABLE = "GRADIO_TEMP_DIR"  # where Gradio looks up its folder


@contextmanager
def folder_of_uploads(every: float, age: float) -> Iterator[set[Path]]:
    """Give Gradio a new folder, and delete files from it that are older than `age` seconds, `every` so many seconds.

    Yields a set of paths to be kept, to be filled. At the end the folder goes with all that is in it.
    """
    before, ended, kept = os.environ.get(VARIABLE), threading.Event(), set()
    with tempfile.TemporaryDirectory(prefix="hep2-uploads-", dir=before, ignore_cleanup_errors=True) as folder:

        def keep_sweeping() -> None:
            while not ended.wait(every):
                sweep(Path(folder), age, kept)

        threading.Thread(target=keep_sweeping, daemon=True).start()
        os.environ[VARIABLE] = folder
        try:
            yield kept
        finally:
            ended.set()
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before


def sweep(folder: Path, age: float, kept: set[Path]) -> None:
    """Delete the files in a folder that are older than `age` seconds, but those in `kept`."""
    for path in folder.rglob("*"):
        with suppress(OSError):  # it may have gone meanwhile
            if path not in kept and path.is_file() and time.time() - path.stat().st_ctime > age:
                path.unlink()
