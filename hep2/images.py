"""Any image file or array to one cell of shape (1, 78, 78), and what is wrong with an image.

Training, evaluation, page, API and command line all come through `load_cell`: one decoder, one preprocessing.
"""

import io
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

from hep2.patterns import IMAGE_SIZE

ImageSource = str | Path | bytes | BinaryIO | Image.Image | np.ndarray

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
MAX_PIXELS = 50_000_000
LARGEST_CELL = 600  # pixels: an image that is larger on both sides may be a field of many cells
MOST_CLIPPED = 0.05  # share of the pixels at the brightest value; published cells have up to 0.04
# Decimal logarithm of how much of an image is fine detail. Less than one in two hundred published cells has less than
# this; blurred by a pixel, 98 of 100 have. tests/test_real_cells.py holds both.
LEAST_DETAIL = -2.8
CHANNEL_NAMES = ("red", "green", "blue")

TIFF_BEGINNINGS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ENOUGH_PIXELS = 1_000_000  # to tell by which channel holds the fluorescence: of a larger image, one in so many is asked
# What the orientation of a TIFF or EXIF asks for, of (rows, columns, …).
ORIENTATIONS = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image.swapaxes(0, 1)[::-1, ::-1],
    8: lambda image: image.swapaxes(0, 1)[::-1],
}

# Travels with the weights: weights made under other settings refuse to load.
PREPROCESSING = {
    "image_size": IMAGE_SIZE,
    "channel": "the one with the largest spread",
    "resize": "bicubic with antialiasing, aspect kept, black margins",
    "quantiles": [0.01, 0.99],
}


class ImageError(ValueError):
    """An image that cannot be read; the message says why and what to do, in words for its sender."""


@dataclass(frozen=True)
class Cell:
    """What the models are given.

    `pixels` is a float32 array of shape (1, 78, 78) in [0, 1]; `warnings` says in words what was odd about the image.
    """

    pixels: np.ndarray
    warnings: tuple[str, ...]


class _Decoded(NamedTuple):
    """Pixels (rows, columns) or (rows, columns, channels), and whether the last channel is alpha."""

    pixels: np.ndarray
    has_alpha: bool


def load_cell(source: ImageSource) -> Cell:
    """Read an image and prepare it for the models.

    Parameters
    ----------
    source
        A path, the bytes of a file, an open binary file, a Pillow image, or an array of shape (rows, columns) or
        (rows, columns, channels), of integers, booleans or floats of any range, of which float32 keeps 24 bits. Of two
        or four channels of an array the last is alpha.

    Raises
    ------
    FileNotFoundError
        If a path names no file.
    ImageError
        If it is no readable image, is truncated, empty, constant, holds NaN or infinity, or has more than 50 million
        pixels. It is a ValueError, and its message says which, and what to do.
    """
    return make_cell(*read_intensity(source))


def make_cell(intensity: np.ndarray, notes: list[str]) -> Cell:
    """Prepare what `read_intensity` gave, for a caller that needs the image as it came as well.

    Raises
    ------
    ImageError
        If the image is constant.
    """
    pixels = prepare(intensity)
    return Cell(pixels, tuple(notes + _doubts(intensity, pixels)))


def read_intensity(source: ImageSource) -> tuple[np.ndarray, list[str]]:
    """Decode an image into one channel of shape (rows, columns), float32 in its own units, and notes in words.

    Raises what `load_cell` raises, except for a constant image.
    """
    notes: list[str] = []
    if isinstance(source, np.ndarray):
        decoded = _Decoded(source, has_alpha=source.ndim == 3 and source.shape[2] in (2, 4))
    elif isinstance(source, Image.Image):
        decoded = _array(source, notes)
    else:
        decoded = _decode(source, notes)
    return _one_channel(decoded, notes), notes


def prepare(intensity: np.ndarray) -> np.ndarray:
    """Fit an image (rows, columns) into (1, 78, 78) and stretch it: its 1st percentile becomes 0, its 99th 1.

    The aspect ratio is kept; a margin is filled with 0. The stretch is the source's (its report, "Preprocessing");
    clipping what lies outside is ours, since the report does not say. Returns float32 in [0, 1].

    Raises
    ------
    ImageError
        If the two percentiles are equal: the image is constant, or nearly so.
    """
    rows, columns = intensity.shape
    if (rows, columns) != (IMAGE_SIZE, IMAGE_SIZE):
        scale = IMAGE_SIZE / max(rows, columns)
        rows, columns = max(1, round(rows * scale)), max(1, round(columns * scale))
        resized = Image.fromarray(intensity).resize((columns, rows), Image.Resampling.BICUBIC)
        intensity = np.asarray(resized, dtype=np.float32)
    low, high = np.quantile(intensity, PREPROCESSING["quantiles"])
    # Resizing a constant image leaves rounding errors, which a stretch would blow up into a pattern.
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        raise ImageError(
            f"the image is constant: its 1st and 99th percentiles are both {low:g}; give an image that shows a cell"
        )
    stretched = ((intensity - low) / (high - low)).clip(0, 1)
    cell = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    top, left = (IMAGE_SIZE - rows) // 2, (IMAGE_SIZE - columns) // 2
    cell[0, top : top + rows, left : left + columns] = stretched
    return cell


def _decode(source: str | Path | bytes | BinaryIO, notes: list[str]) -> _Decoded:
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            raise ImageError("there is no PNG, JPEG, TIFF, BMP or WebP image in this folder")
        if not path.is_file():
            raise FileNotFoundError("there is no such file; give the path of an image")
        data = path.read_bytes()
    else:
        data = source if isinstance(source, bytes) else source.read()
    if not data:
        raise ImageError("the file is empty (0 bytes); give an image file")
    try:
        return _decode_bytes(data, notes)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        start = "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in data[:8])
        raise ImageError(
            f"not an image of a known kind (it begins with “{start}”); give PNG, JPEG, TIFF, BMP or WebP"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"the image has more than {MAX_PIXELS:,} pixels: cut out a smaller part") from error
    except Exception as error:  # damaged files make decoders raise anything, TypeError and ZeroDivisionError included
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"the image is truncated or damaged ({reason}); save it again and give the whole file"
        ) from error


def _decode_bytes(data: bytes, notes: list[str]) -> _Decoded:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if data[:4] in TIFF_BEGINNINGS:
            return _decode_tiff(data, notes)
        raise
    # Pillow reads colours of more than 8 bits at 8, where a faint signal would vanish, and of deep grey TIFFs it reads
    # some wrongly.
    if image.format == "TIFF" and (max(image.tag_v2.get(258, (1,))) > 8 or image.tag_v2.get(339, (1,))[0] != 1):
        return _decode_tiff(data, notes)
    if image.format == "PNG" and data[24] > 8 and data[25] != 0:  # bit depth, and a colour type that is not grey
        _check_size(image.height, image.width)
        pixels = _turned(imagecodecs.png_decode(data), image.getexif().get(274, 1))
        return _Decoded(pixels, has_alpha=data[25] in (4, 6))
    return _array(image, notes)


def _decode_tiff(data: bytes, notes: list[str]) -> _Decoded:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages[0]
        _check_size(page.imagelength, page.imagewidth)
        if page.is_tiled:
            _check_size(page.tilelength, page.tilewidth)
        if page.size > 4 * MAX_PIXELS:
            raise ImageError(f"the TIFF's first page has {page.size:,} values; give one image of at most four channels")
        if page.photometric in (tifffile.PHOTOMETRIC.SEPARATED, tifffile.PHOTOMETRIC.PALETTE):
            kind = page.photometric.name.lower()
            raise ImageError(f"a TIFF of more than 8 bits in {kind} colours cannot be read; save it as grey or RGB")
        if len(tiff.pages) > 1:
            notes.append(f"the file has {len(tiff.pages)} frames: only the first was read")
        array = page.asarray()
        if array.ndim == 3 and page.axes.startswith("S"):  # planar files keep the channels first
            array = np.moveaxis(array, 0, -1)
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            array = _full(array.dtype) - array
        array = _turned(array, page.tags.valueof(274, 1))
        if page.photometric == tifffile.PHOTOMETRIC.RGB and page.extrasamples == (0,):  # nobody knows what for
            array = array[..., :3]
        return _Decoded(array, has_alpha=bool(set(page.extrasamples) & {1, 2}))


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    return ORIENTATIONS.get(orientation, lambda image: image)(array)


def _full(dtype: np.dtype) -> int | float:
    """Return the value of full light, or opacity, in pixels of a type."""
    return np.iinfo(dtype).max if dtype.kind in "iu" else 1.0


def _array(image: Image.Image, notes: list[str]) -> _Decoded:
    _check_size(image.height, image.width)
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"the file has {frames} frames: only the first was read")
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("CMYK", "YCbCr", "HSV", "LAB", "RGBX"):
        image = image.convert("RGB")
    elif image.mode in ("1", "PA", "La", "RGBa"):
        image = image.convert({"1": "L", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}[image.mode])
    return _Decoded(np.asarray(image), has_alpha=image.mode in ("LA", "RGBA"))


def _check_size(rows: int, columns: int) -> None:
    if rows * columns > MAX_PIXELS:
        raise ImageError(
            f"the image has {rows:,} x {columns:,} pixels, more than {MAX_PIXELS:,}: cut out a smaller part"
        )


def _one_channel(decoded: _Decoded, notes: list[str]) -> np.ndarray:
    """Reduce pixels to the channel that holds the fluorescence, float32 (rows, columns)."""
    array, has_alpha = decoded
    if array.dtype.kind not in "buif":
        raise ImageError(f"pixels of type {array.dtype} cannot be read; give integers or floats")
    if array.ndim not in (2, 3) or array.size == 0:
        raise ImageError(
            f"an array of shape {array.shape} is no image; give (rows, columns) or (rows, columns, channels)"
        )
    rows, columns = array.shape[:2]
    _check_size(rows, columns)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ImageError("the image holds NaN or infinite values; replace them and give it again")
    if array.ndim == 2:
        return np.ascontiguousarray(array, dtype=np.float32)
    channels = array.shape[2] - has_alpha
    if channels not in (1, 2, 3, 4):
        raise ImageError(f"the image has {channels} channels; give grey or up to four colours, with or without alpha")
    opacity = np.float32(1)
    if has_alpha:
        opacity = array[..., -1] / np.float32(_full(array.dtype))
        if (opacity < 1).any():
            notes.append("the image is partly transparent: it was laid on black")
    # A fluorophore lights one channel. Luminance weights would scale it down unevenly, so the channel with the
    # largest spread is read as it is.
    step = math.ceil(math.sqrt(rows * columns / ENOUGH_PIXELS))
    sample = np.moveaxis(array[::step, ::step, :channels], -1, 0).astype(np.float32)  # (channels, rows, columns)
    sample *= opacity[::step, ::step] if has_alpha else 1
    low, high = np.quantile(sample, PREPROCESSING["quantiles"], axis=(1, 2))
    spread = high - low
    best = int(spread.argmax())
    for other in range(channels):
        bright = other != best and spread[other] > 0.25 * spread[best]
        if bright and np.corrcoef(sample[best].ravel(), sample[other].ravel())[0, 1] < 0.9:
            name = CHANNEL_NAMES[best] if channels == 3 else f"channel {best + 1}"
            notes.append(f"the image has several colours: only {name} was read")
            break
    return np.ascontiguousarray(array[..., best] * opacity, dtype=np.float32)


def fine_detail(pixels: np.ndarray) -> float:
    """Measure how much of a prepared cell (1, 78, 78) is fine detail, in which blur shows first.

    Returns the decimal logarithm of the mean power above 0.35 cycles a pixel over that above 0.03.
    """
    window, fine, all_but_shading = _detail_filters()
    power = abs(np.fft.fft2((pixels[0] - pixels[0].mean()) * window)) ** 2
    tiny = np.finfo(np.float32).tiny
    return float(np.log10((power[fine].mean() + tiny) / (power[all_but_shading].mean() + tiny)))


@cache
def _detail_filters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    frequency = np.hypot(np.fft.fftfreq(IMAGE_SIZE)[:, None], np.fft.fftfreq(IMAGE_SIZE))
    window = np.hanning(IMAGE_SIZE)  # lest the borders' leap count as detail
    return np.outer(window, window), frequency > 0.35, frequency > 0.03


def _doubts(intensity: np.ndarray, pixels: np.ndarray) -> list[str]:
    rows, columns = intensity.shape
    doubts = []
    if min(rows, columns) < IMAGE_SIZE // 2:
        doubts.append(
            f"the image is small ({rows} x {columns} pixels): fine texture is missing, so the verdict is unsure"
        )
    elif fine_detail(pixels) < LEAST_DETAIL:
        doubts.append(
            "the image is out of focus or enlarged: it has less fine detail than the cells that the models know, and "
            "the verdict may be wrong for it"
        )
    if max(rows, columns) > 2 * min(rows, columns):
        doubts.append(f"the image is far from square ({rows} x {columns} pixels): is it one cell?")
    if min(rows, columns) > LARGEST_CELL:
        doubts.append(
            f"the image is large for one cell ({rows} x {columns} pixels): if it is a whole field, give it as a field"
        )
    brightest = float((intensity == intensity.max()).mean())
    if brightest > MOST_CLIPPED:
        doubts.append(
            f"{brightest:.0%} of the pixels are at the brightest value: light was clipped, and texture is lost with it"
        )
    return doubts
