"""Files that people send: each by its name, with what the answer must say, or None where it must be a prediction."""

import gzip
import io
import pickle
import struct
import zipfile
import zlib

import numpy as np
import tifffile
from PIL import Image

from hep2.synthetic import synthetic_cell


def cell() -> np.ndarray:
    """Draw one Golgi cell, (78, 78), uint8."""
    return synthetic_cell("Golgi", np.random.default_rng(0))


def encoded(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def tiff(*pages: np.ndarray, **options) -> bytes:
    """Write pages one by one, as programs do that know nothing of stacks."""
    file = io.BytesIO()
    of_file = {name: options.pop(name) for name in ("imagej", "ome", "bigtiff", "byteorder") if name in options}
    with tifffile.TiffWriter(file, **of_file) as writer:
        for page in pages:
            writer.write(page, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """Write the head of a PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("cell.png", encoded(cell(), "PNG"))
    return file.getvalue()


def _broken_checksum(png: bytes) -> bytes:
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    return bytes(damaged)


def _rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(cell(), "JPEG", quality=95, exif=exif)


def uploads() -> dict[str, tuple[bytes, str | None]]:
    """Return every kind of file by its name: its bytes, and a part of the error it must get, or None."""
    image = cell()
    colour = np.zeros((78, 78, 3), np.uint8)
    colour[..., 1] = image
    palette = Image.fromarray(image).convert("P")
    palette.info["transparency"] = 0
    frames = [Image.fromarray(np.roll(image, shift, 0)) for shift in (0, 20)]
    png, jpeg, floats = encoded(image, "PNG"), encoded(image, "JPEG", quality=95), image.astype(np.float32) / 255
    hidden = np.dstack([colour, np.zeros((78, 78), np.uint8)])
    no_number = floats.copy()
    no_number[10:20] = np.nan
    return {
        "empty.png": (b"", "empty"),
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.tif": (tiff(image)[:900], "damaged"),
        "truncated.bmp": (encoded(image, "BMP")[:2000], "truncated"),
        "truncated.webp": (encoded(Image.fromarray(colour), "WEBP", lossless=True)[:300], "damaged"),
        "checksum.png": (_broken_checksum(png), "damaged"),
        "head.png": (png[:20], "truncated"),
        "text.png": (b"Speckled, I should say.\n" * 40, "not an image"),
        "page.html": (b"<!DOCTYPE html><script>alert(1)</script>", "not an image"),
        "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', "not an image"),
        "report.pdf": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "not an image"),
        "cells.zip": (_zip(), "not an image"),
        "cell.png.gz": (gzip.compress(png), "not an image"),
        "table.json": (b'{"verdict": "Golgi"}', "not an image"),
        "model.pkl": (pickle.dumps({"a": 1}), "not an image"),
        "program": (b"\x7fELF" + bytes(200), "not an image"),
        "sound.wav": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), "not an image"),
        "film.mp4": (b"\0\0\0\x18ftypmp42" + bytes(200), "not an image"),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "GIF"),
        "slide.czi": (b"ZISRAWFILE" + bytes(200), "CZI"),
        "bomb.png": (png_of_size(30_000, 30_000), "50,000,000 pixels"),
        "endless.png": (png_of_size(2_000_000_000, 2_000_000_000), "50,000,000 pixels"),
        "dot.png": (encoded(image[:1, :1], "PNG"), "constant"),
        "line.png": (encoded(np.tile(image[:1], (1, 257))[:, :20_000], "PNG"), None),
        "column.png": (encoded(np.tile(image[:1].T, (257, 1))[:20_000], "PNG"), None),
        "black.png": (encoded(np.zeros_like(image), "PNG"), "constant"),
        "white.png": (encoded(np.full_like(image, 255), "PNG"), "constant"),
        "nan.tif": (tiff(no_number), "NaN"),
        "infinite.tif": (tiff(np.where(image > 200, np.inf, floats).astype(np.float32)), "infinite"),
        "inverted.png": (encoded(255 - image, "PNG"), None),
        "cmyk.jpg": (encoded(Image.fromarray(colour).convert("CMYK"), "JPEG", quality=95), None),
        "palette.png": (encoded(palette, "PNG", transparency=0), None),
        "transparent.png": (encoded(hidden, "PNG"), None),
        "animated.webp": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), None),
        "pages.tif": (tiff(np.stack([image, np.roll(image, 20, 0)])), None),
        "rotated.jpg": (_rotated_by_exif(), None),
        "narrow.png": (encoded(image.astype(np.uint16) // 4 + 30_000, "PNG"), None),
        "deep.tif": (tiff(image.astype(np.uint32) * 16_000_000), None),
        "negative.tif": (tiff(floats - 3), None),
        "huge.tif": (tiff(floats * 1e30), None),
        "bits.png": (encoded(Image.fromarray(image).convert("1"), "PNG"), None),
        "green.png": (encoded(colour, "PNG"), None),
        "deep-green.tif": (tiff(colour.astype(np.uint16) * 257), None),
        "a-png.jpg": (png, None),
        "a-jpeg.tif": (jpeg, None),
        "no-extension": (png, None),
        "trailing.png": (png + b"rubbish" * 100, None),
        "細胞 Zelle ñ 🔬.png": (png, None),
        "../../../etc/cell.png": (png, None),
        "..\\..\\cell.png": (png, None),
        '"><img src=x onerror=alert(1)>.png': (png, None),
        "a" * 1_000 + ".png": (png, None),
        ".png": (png, None),
        "%2e%2e%2fcell.png": (png, None),
        "-rf.png": (png, None),
    }
