"""Files written whole or not at all, and JSON objects read with errors that name the file."""

import json
import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises
    ------
    FileNotFoundError
        If it is missing.
    ValueError
        If it is damaged, or no object.
    """
    if not path.is_file():
        raise missing(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def missing(path: Path) -> FileNotFoundError:
    """Make the error for a file that a folder of weights must have."""
    return FileNotFoundError(
        f"{path} is missing: the folder does not hold complete weights; get them again, or train them"
    )
