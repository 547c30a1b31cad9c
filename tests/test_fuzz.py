"""Two thousand damaged files: each is read or refused in words, in seconds, in little memory."""

import io
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from uploads import encoded, tiff

from hep2.images import ImageError, load_cell
from hep2.synthetic import synthetic_cell

FILES = 2_000
MOST_SECONDS = 5.0  # of one file
MOST_BYTES = 2**30  # of memory, beside what Python and its packages take
NUMBERS = (0, 1, 2, 255, 256, 32_767, 65_535, 2**31 - 1, 2**32 - 1)


def seeds() -> list[bytes]:
    """Return small sound files of every decoder and of what stands in metadata."""
    cell = synthetic_cell("Nucleolar", np.random.default_rng(0))[10:58, 10:58]
    deep, colour = cell.astype(np.uint16) * 200, np.dstack([cell // 2, cell, cell // 3])
    frame = Image.fromarray(cell.T.copy())
    channels = {"axes": "CYX", "Channel": {"Name": ["DAPI", "FITC"]}, "PhysicalSizeX": 0.2}
    return [
        encoded(cell, "PNG"),
        encoded(deep, "PNG"),
        encoded(Image.fromarray(colour).quantize(64), "PNG"),
        encoded(cell, "PNG", save_all=True, append_images=[frame]),
        encoded(colour, "JPEG", exif=_turned()),
        encoded(Image.fromarray(colour).convert("CMYK"), "JPEG"),
        encoded(colour, "JPEG", progressive=True),
        encoded(colour, "BMP"),
        encoded(Image.fromarray(cell).convert("P"), "BMP"),
        encoded(colour, "WEBP", lossless=True),
        encoded(colour, "WEBP", save_all=True, append_images=[frame]),
        encoded(cell, "JPEG2000"),
        encoded(colour, "AVIF"),
        tiff(cell),
        tiff(deep, byteorder=">", bigtiff=True),
        tiff(deep, compression="lzw", predictor=True),
        tiff(deep, compression="zlib", tile=(16, 16)),
        tiff(cell, compression="packbits"),
        tiff(cell, compression="zstd"),
        tiff(cell > 99, photometric="miniswhite"),
        tiff(cell, photometric="palette", colormap=np.arange(768, dtype=np.uint16).reshape(3, 256) * 80),
        tiff(colour, photometric="rgb", compression="jpeg"),
        tiff(colour, photometric="rgb", compression="jpeg2000"),
        tiff(colour, photometric="rgb", compression="webp"),
        tiff(np.dstack([colour, cell]), photometric="rgb", extrasamples=["assocalpha"]),
        tiff(np.moveaxis(colour, -1, 0), photometric="rgb", planarconfig="separate"),
        tiff(deep, deep.T, metadata=None),
        tiff(deep, cell[::2, ::2]),
        tiff(np.stack([deep, deep.T]), imagej=True, metadata={"axes": "CYX", "Labels": ["DAPI", "FITC"], "unit": "um"}),
        tiff(np.stack([deep, deep.T]), ome=True, metadata=channels),
        encoded(Image.fromarray(cell > 99), "TIFF", compression="group4"),
        encoded(Image.fromarray(cell > 99), "TIFF", compression="group3"),
    ]


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


def places_of_tags(data: bytes) -> list[int]:
    """Return where the tags of a sound TIFF lie."""
    if data[:2] not in (b"II", b"MM"):
        return []
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        return [tag.offset for page in opened.pages for tag in page.tags]


def mutated(data: bytes, tags: list[int], random: np.random.Generator) -> bytes:
    """Damage a file: change bytes, overwrite a number or a tag, copy a part elsewhere, cut off the end."""
    changed, size = bytearray(data), len(data)
    for _ in range(random.integers(1, 3)):
        kind = random.choice(["bytes", "head", "number", "copy", *["tag"] * 3 * bool(tags)])
        if kind in ("bytes", "head"):
            for place in random.integers(0, size if kind == "bytes" else min(size, 200), random.integers(1, 12)):
                changed[place] = random.integers(256)
        elif kind == "copy":
            first, second, length = (int(place) for place in random.integers(0, size, 3))
            part = data[second : second + length][: size - first]
            changed[first : first + len(part)] = part
        else:
            place = (
                int(random.choice(tags)) + int(random.choice([0, 2, 4, 8])) if kind == "tag" else random.integers(size)
            )
            code = str(random.choice(["<H", "<I", ">H", ">I"]))
            value = int(random.choice(NUMBERS) if random.random() < 0.5 else random.integers(60_000))
            struct.pack_into(code, changed, min(place, size - 4), value % 256 ** struct.calcsize(code))
    return bytes(changed[: random.integers(1, size)] if random.random() < 0.15 else changed)


def damaged_files() -> list[bytes]:
    random, sound = np.random.default_rng(0), seeds()
    tags = [places_of_tags(data) for data in sound]
    return [mutated(sound[place % len(sound)], tags[place % len(sound)], random) for place in range(FILES)]


def peak_memory() -> int:
    """Return the most bytes that this process has held; getrusage would count its parent's as well."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def main() -> None:
    """Read all files, raise where an error has no words, and print what it took."""
    files = damaged_files()
    for data in seeds():  # what the decoders hold themselves is no file's fault
        load_cell(data)
    before, slowest, sound = peak_memory(), 0.0, 0
    for data in files:
        start = time.process_time()  # other processes may keep this one waiting
        try:
            pixels = load_cell(data).pixels
            assert pixels.shape == (1, 78, 78)
            assert np.isfinite(pixels).all()
            sound += 1
        except ImageError as error:
            assert str(error)
        slowest = max(slowest, time.process_time() - start)
    print(json.dumps({"files": len(files), "read": sound, "seconds": slowest, "bytes": peak_memory() - before}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured by /proc")
def test_damaged_files_end_in_words_in_seconds_and_in_little_memory():
    # In a process of its own: a decoder that crashes must not take the other tests with it.
    command = [sys.executable, "-W", "ignore", __file__]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    took = json.loads(run.stdout)
    assert took["files"] == FILES
    assert 0.1 * FILES < took["read"] < 0.9 * FILES  # damage that no file survives, or none feels, tests nothing
    assert took["seconds"] < MOST_SECONDS
    assert took["bytes"] < MOST_BYTES


if __name__ == "__main__":
    main()
