"""The image files that a command names, but none that people don't mean; and the places that it will write to."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from filelock import FileLock, Timeout
from PIL.PngImagePlugin import PngInfo

from hep2.images import SUFFIXES

OWN_PICTURE = "hep2 overlay"  # the text "Software" in each PNG that this package draws of a field
HEAD = 1024  # bytes of a PNG in which that text lies: Pillow writes it before the pixels
READERS = 16  # threads: on network storage a file takes milliseconds of waiting


@dataclass
class Found:
    """Images, in order; which of them have the content of an earlier one; folders that could not be read, and why; and
    how many other files were left out, by reason."""

    names: list[str] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def summary(self, read: int, failed: int, fate: str) -> str:
        """Say how many images were read, how many were not, and why; `fate` tells what became of the copies."""
        parts = [f"{read:,} read"] + [f"{failed:,} could not be read"] * (failed > 0)
        parts += [f"{count:,} left out ({reason})" for reason, count in self.left_out.items() if count]
        for copy, original in list(self.copies.items())[:1]:
            parts.append(f"{len(self.copies):,} with the content of another {fate} ({copy} has that of {original})")
        return ", ".join(parts)


def find_images(paths: Iterable[str]) -> Found:
    """Find the images that paths name: files, folders however deep, and patterns that no shell has replaced.

    Left out are hidden files and folders, files of other kinds, pictures that this package has drawn, and what is named
    twice. Linked folders are followed, and each folder is searched once.
    """
    found, searched, first = Found(), set(), {}
    listed = [name for path in paths for name in _list(path, found, searched)]
    names = list(dict.fromkeys(listed))
    found.left_out["named twice"] = len(listed) - len(names)
    with ThreadPoolExecutor(READERS) as threads:
        for name, content in zip(names, threads.map(_content, names), strict=True):
            if content == OWN_PICTURE:
                found.left_out["drawn by hep2"] += 1
                continue
            found.names.append(name)
            if content and first.setdefault(content, name) != name:
                found.copies[name] = first[content]
    return found


def _list(path: str, found: Found, searched: set[tuple[int, int]]) -> list[str]:
    if not os.path.isdir(path):  # noqa: PTH112 (Path.is_dir fails for a name that is too long)
        return [path] if os.path.lexists(path) else sorted(glob(path)) or [path]  # noqa: PTH207 (it takes whole paths)

    def unreadable(error: OSError) -> None:
        found.errors[error.filename] = f"this folder cannot be read: {error.strerror}"

    names, empty = [], True
    for folder, folders, files in os.walk(path, followlinks=True, onerror=unreadable):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in searched:
            found.left_out["folders met again"] += 1
            empty = False
            folders.clear()
            continue
        searched.add((status.st_dev, status.st_ino))
        found.left_out["hidden"] += sum(name.startswith(".") for name in (*folders, *files))
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # which os.walk follows
        for place in (Path(folder, file) for file in sorted(files) if not file.startswith(".")):
            if place.exists() and not (place.is_file() and place.suffix.lower() in SUFFIXES):
                found.left_out[place.suffix.lower() or "without suffix"] += 1
            else:  # or a link that leads nowhere, which may have led to a folder of images
                names.append(str(place))
    if empty and not names and path not in found.errors:
        found.errors[path] = f"there is no image in this folder: none ends in {', '.join(SUFFIXES)}"
    return names


def _content(name: str) -> str | None:
    """Return `OWN_PICTURE`, or a digest of a file's content, or None where there is none, as decoding will tell."""
    with suppress(OSError):
        if Path(name).is_file():
            with open(name, "rb") as file:
                if f"Software\0{OWN_PICTURE}".encode() in file.read(HEAD):
                    return OWN_PICTURE
                file.seek(0)
                return hashlib.file_digest(file, "sha256").hexdigest()
    return None


def own_picture() -> PngInfo:
    """Return the text that marks a PNG as drawn by this package."""
    info = PngInfo()
    info.add_text("Software", OWN_PICTURE)
    return info


def check_writable(path: Path) -> None:
    """Make a file's folder, and raise OSError before the work if the file could not be written after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): give another place") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes that lock the same path away from it; ValueError if one of them has it."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another process is writing {path}: wait for it, or give another place") from error
    try:
        yield
    finally:
        with suppress(OSError):  # on Windows, where a file that is open stays
            Path(lock.lock_file).unlink()
        lock.release()
