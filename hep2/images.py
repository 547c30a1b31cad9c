"""Any image file or array to one cell of shape (1, 78, 78), and what was odd about it.

Training, evaluation, page, API and command line all come through `decode` and `make_cell`: one decoder, one
preprocessing. `hep2.formats` reads the file; here the stain's channel and a plane are chosen and prepared.
"""

import math
from dataclasses import dataclass
from functools import cache, reduce

import numpy as np
from PIL import Image, UnidentifiedImageError

from hep2.formats import (
    COLOURS,
    EXPECTED,
    KNOWN_BEGINNINGS,
    MAX_CHANNELS,
    MAX_PIXELS,
    NO_STAIN,
    STAIN,
    SUFFIXES,
    ImageError,
    ImageSource,
    Layers,
    check_plane,
    check_size,
    read_file,
    read_layers,
)
from hep2.patterns import IMAGE_SIZE

__all__ = ["SUFFIXES", "Cell", "Decoded", "ImageError", "ImageSource", "decode", "load_cell", "make_cell", "prepare"]

LARGEST_CELL = 600  # pixels: an image of so many on both sides may be a field of many cells
MOST_CLIPPED = 0.05  # share of the pixels at the brightest value; published cells have up to 0.04
# Decimal logarithm of how much of an image is fine detail. Less than one in two hundred published cells has less than
# this; blurred by a pixel, 98 of 100 have. tests/test_real_cells.py holds both.
LEAST_DETAIL = -2.8
# Share of the strongest colour's light that is signal in another: JPEG, always of 8 bits, leaks up to so much.
LEAST_SIGNAL, LEAST_SIGNAL_DEEP = 0.15, 0.01
LEAST_CONTRAST = 10  # times the noise, that is the median difference of neighbours; alone it reaches 6, stains 25
ENOUGH_PIXELS = 100_000  # to tell which channel holds the stain: of a larger image, one pixel in so many is asked

# Travels with the weights: weights made under other settings refuse to load.
PREPROCESSING = {
    "image_size": IMAGE_SIZE,
    "channel": "the one with the largest spread",
    "resize": "bicubic with antialiasing, aspect kept, black margins",
    "quantiles": [0.01, 0.99],
}


@dataclass(frozen=True)
class Decoded:
    """One plane and channel of an image, as it came."""

    intensity: np.ndarray  # (rows, columns), float32 in the file's own units
    warnings: tuple[str, ...]  # what was odd, and what was left out
    pixel_size: float | None = None  # micrometres, where the file says so


@dataclass(frozen=True)
class Cell:
    """What the models are given."""

    pixels: np.ndarray  # (1, 78, 78), float32 in [0, 1]
    warnings: tuple[str, ...]
    is_field: bool = False  # too large for one cell, or with several: it gets no verdict


def load_cell(source: ImageSource, *, channel: str | int | None = None, plane: int | None = None) -> Cell:
    """Decode an image and prepare it for the models; takes and raises what `decode` and `make_cell` do."""
    return make_cell(decode(source, channel=channel, plane=plane))


def decode(source: ImageSource, *, channel: str | int | None = None, plane: int | None = None) -> Decoded:
    """Read the stain's channel of one plane of an image.

    Parameters
    ----------
    source
        A path, the bytes of a file, an open binary file, a Pillow image, or an array of shape (rows, columns) or
        (rows, columns, channels), of integers, booleans or floats, of which float32 keeps 24 bits. Of two or four
        channels of an array the last is alpha.
    channel
        A name that the file gives, a colour (red, green, blue), or a number from 1. By default the stain's: by name
        (FITC, GFP, Alexa 488, …); of colours green before red before blue, where it holds signal; of channels without
        names the second, since by custom DAPI comes first.
    plane
        A number from 1: of a stack, of pages without names, or of frames. By default the sharpest of a stack.

    Raises
    ------
    FileNotFoundError, PermissionError
        If a path names no file, or one that may not be read.
    ImageError
        If it is no image that can be read, or has no such plane or channel. It is a ValueError, and its message says
        what came, what was expected, and what to do.
    """
    data = source if isinstance(source, (np.ndarray, Image.Image)) else read_file(source)
    warnings: list[str] = []
    try:
        layers = read_layers(data, plane, warnings)
        return Decoded(_choose(layers, channel, warnings), tuple(warnings), layers.pixel_size)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        if data.startswith(KNOWN_BEGINNINGS):
            raise ImageError("the image's head is damaged; save it again and give the whole file") from error
        start = "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in data[:8])
        raise ImageError(f"not an image of a known kind (it begins with “{start}”); give {EXPECTED}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"the image has more than {MAX_PIXELS:,} pixels: cut out a smaller part") from error
    except ImportError as error:
        raise ImageError(f"this image needs the package {error.name}: install it, or save as 8-bit PNG") from error
    except Exception as error:  # damaged files make decoders raise anything, TypeError and ZeroDivisionError included
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"the image is truncated or damaged ({reason}); save it again and give the whole file"
        ) from error


def _choose(layers: Layers, channel: str | int | None, warnings: list[str]) -> np.ndarray:
    """Reduce to one channel of one plane, float32 (rows, columns)."""
    stack, plane, count = layers.stack, layers.plane, len(layers.stack)
    if stack.dtype.kind not in "buif":
        raise ImageError(f"pixels of type {stack.dtype} cannot be read; give integers or floats")
    check_size(*stack.shape[2:], 0)
    check_plane(plane, count)
    index = plane - 1 if plane else 0
    # Any plane of a stack may be the one that shows the stain: its channel is chosen from the brightest of all planes.
    planes = [stack[index]] if plane else stack
    light = reduce(np.maximum, (layers.light(samples) for samples in planes))
    if len(light) > MAX_CHANNELS:
        raise ImageError(f"the image has {len(light)} channels, more than {MAX_CHANNELS}; save the stain's alone")
    if channel is None:
        best = _stain(light, _opacity(layers, index), layers, warnings)
    else:
        best = _asked(channel, layers.names, len(light))
    if plane is None and count > 1:
        index = max(range(count), key=lambda index: _sharpness(layers.light(stack[index])[best]))
        warnings.append(f"the file has {count} planes: plane {index + 1}, the sharpest, was read")
        light = layers.light(stack[index])
    with np.errstate(over="ignore"):
        intensity = np.array(light[best], np.float32, order="C")
    opacity = _opacity(layers, index)
    if opacity is not None and not opacity.any():
        warnings.append("every pixel is transparent (its alpha is 0): the colours were read as if they were opaque")
    elif opacity is not None and (opacity < 1).any():
        warnings.append("the image is partly transparent: it was laid on black")
        intensity *= 1 if layers.premultiplied else opacity
    if not -1e36 < intensity.min() <= intensity.max() < 1e36:  # false of NaN as well
        raise ImageError("the image holds NaN, infinite or huge values; replace them and give it again")
    return intensity


def _opacity(layers: Layers, index: int) -> np.ndarray | None:
    if layers.alpha is None:
        return None
    alpha = layers.alpha[index]
    return alpha / np.float32(np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1)


def _asked(channel: str | int, names: tuple[str, ...], count: int) -> int:
    if str(channel).isdigit():
        if 1 <= int(channel) <= count:
            return int(channel) - 1
    else:
        wanted, known = str(channel).casefold(), [name.casefold() for name in names]
        matching = [place for place, name in enumerate(known) if wanted == name] or [
            place for place, name in enumerate(known) if wanted in name
        ]
        if matching:
            return matching[0]
    there = f"{count} without names; give"
    if any(names):
        there = f"{count} ({', '.join(filter(None, names))}); give one of its names or"
    raise ImageError(f"there is no channel {channel!r}: the image has {there} 1 to {count}")


def _stain(light: np.ndarray, opacity: np.ndarray | None, layers: Layers, warnings: list[str]) -> int:
    """Choose the channel of the stain, and say which others hold signal."""
    count, coloured = len(light), layers.names == COLOURS
    if count == 1:
        return 0
    step = math.ceil(math.sqrt(light[0].size / ENOUGH_PIXELS))
    sample = np.nan_to_num(light[:, ::step, ::step].astype(np.float32), posinf=0, neginf=0)  # (channels, rows, columns)
    beside = light[:, ::step, 1::step].astype(np.float32)
    noise = np.median(abs(beside - sample[..., : beside.shape[2]]), axis=(1, 2)) if beside.size else 0
    if opacity is not None and opacity.any() and not layers.premultiplied:
        sample *= opacity[::step, ::step]
    signal = _signal(sample, noise, coloured)
    names = layers.names or ("",) * count
    wanted = [0 if NO_STAIN.search(name) else 2 if STAIN.search(name) else 1 for name in names]
    least = 0.0
    if coloured:
        least = (LEAST_SIGNAL if light.dtype == np.uint8 else LEAST_SIGNAL_DEEP) * signal.max()
    # A stain that has a name is read however faint. Of channels that tell nothing the second: DAPI comes before it.
    order = sorted(range(count), key=lambda place: (-wanted[place], abs(place - 1)))
    holds = [signal[place] > least or (wanted[place] == 2 and not coloured) for place in range(count)]
    best = next((place for place in order if holds[place]), int(signal.argmax()))
    left_out = [
        names[place] or f"{layers.called} {place + 1}"
        for place in range(count)
        if place != best and (signal[place] > 0 if not coloured else _is_another(sample, signal, best, place))
    ]
    if left_out:
        unnamed = "" if any(names) else " without names"
        what = "the image has several colours" if coloured else f"the file has {count} {layers.called}s{unnamed}"
        read = names[best] or f"{layers.called} {best + 1}"
        verb = "was" if len(left_out) == 1 else "were"
        warnings.append(f"{what}: {read} was read, {' and '.join(left_out)} {verb} left out")
    return best


def _signal(sample: np.ndarray, noise: np.ndarray | float, coloured: bool) -> np.ndarray:
    """Measure how far the light of each channel (channels, rows, columns) stands out, 0 if no further than noise."""
    kept = np.ones(sample.shape[1:], bool)
    if coloured:  # white is a scale bar or a label, and in every channel; with its seam in JPEG it is left out
        from scipy.ndimage import maximum_filter  # takes longer than all else here, and grey images don't need it

        white = maximum_filter(sample.min(0) > 0.8 * sample.max(), 17)
        kept = ~white if white.mean() < 0.9 else kept
    low, high = np.quantile(sample[:, kept], [0.01, 0.999], axis=1)
    stands_out = high - low > LEAST_CONTRAST * noise
    if not coloured:
        stands_out &= [len(np.unique(channel)) > 2 for channel in sample]  # a mask is no light
    return np.where(stands_out, high - low, 0)


def _is_another(sample: np.ndarray, signal: np.ndarray, best: int, other: int) -> bool:
    """Tell the light of another stain from the hue of the one that was read."""
    low, high = np.quantile(sample[[best, other]], [0.01, 0.99], axis=(1, 2))
    spread, spread_of_other = high - low
    if spread_of_other <= 0.25 * spread or signal[other] == 0:
        return False
    return spread_of_other > spread or np.corrcoef(sample[best].ravel(), sample[other].ravel())[0, 1] < 0.9


def _sharpness(plane: np.ndarray) -> float:
    """Return Brenner's measure of focus: it asks pixels two apart, which noise reaches less than edges do."""
    plane = plane.astype(np.float32)
    down, across = plane[2:] - plane[:-2], plane[:, 2:] - plane[:, :-2]
    return float(np.vdot(down, down) + np.vdot(across, across))


def make_cell(decoded: Decoded) -> Cell:
    """Prepare a decoded image for the models, and add what its quality makes doubtful.

    Raises
    ------
    ImageError
        If it is constant, or nearly so.
    """
    try:
        pixels = prepare(decoded.intensity)
    except ImageError as error:
        if not decoded.warnings:
            raise
        raise ImageError(f"{error} ({'; '.join(decoded.warnings)})") from error
    is_field = min(decoded.intensity.shape) >= LARGEST_CELL
    return Cell(pixels, (*decoded.warnings, *_doubts(decoded.intensity, pixels, is_field)), is_field)


def prepare(intensity: np.ndarray) -> np.ndarray:
    """Fit an image (rows, columns) into (1, 78, 78) and stretch it: its 1st percentile becomes 0, its 99th 1.

    The aspect ratio is kept; a margin is filled with 0. The stretch is the reference's ("Preprocessing"); clipping what
    lies outside is ours, since the report does not say. Returns float32 in [0, 1].

    Raises
    ------
    ImageError
        If the two percentiles are equal: the image is constant, or nearly so.
    """
    least, most = intensity.min(), intensity.max()
    rows, columns = intensity.shape
    if (rows, columns) != (IMAGE_SIZE, IMAGE_SIZE):
        scale = IMAGE_SIZE / max(rows, columns)
        rows, columns = max(1, round(rows * scale)), max(1, round(columns * scale))
        resized = Image.fromarray(intensity).resize((columns, rows), Image.Resampling.BICUBIC)
        intensity = np.asarray(resized, dtype=np.float32)
    low, high = np.quantile(intensity, PREPROCESSING["quantiles"])
    if least == most:
        raise ImageError(f"the image is constant: every pixel is {least:g}; give an image that shows a cell")
    # Resizing what is nearly constant leaves rounding errors, which a stretch would blow up into a pattern.
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        raise ImageError(f"the image is nearly empty: 98 % of it is {low:g}; give an image that shows a cell")
    stretched = ((intensity - low) / (high - low)).clip(0, 1)
    cell = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    top, left = (IMAGE_SIZE - rows) // 2, (IMAGE_SIZE - columns) // 2
    cell[0, top : top + rows, left : left + columns] = stretched
    return cell


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


def _doubts(intensity: np.ndarray, pixels: np.ndarray, is_field: bool) -> list[str]:
    rows, columns = intensity.shape
    size, doubts = f"({rows} x {columns} pixels)", []
    if min(rows, columns) < IMAGE_SIZE // 2:
        doubts.append(f"the image is small {size}: fine texture is missing, and the verdict may be wrong")
    elif fine_detail(pixels) < LEAST_DETAIL:
        doubts.append("the image is out of focus or enlarged: fine texture is missing, and the verdict may be wrong")
    if max(rows, columns) > 2 * min(rows, columns):
        doubts.append(f"the image is far from square {size}: is it one cell?")
    if is_field:
        doubts.append(f"the image is too large for one cell {size}: cut one out, or give it as a field")
    brightest = float((intensity == intensity.max()).mean())
    if brightest > MOST_CLIPPED:
        doubts.append(
            f"{brightest:.0%} of the pixels are at the brightest value: light was clipped, and texture is lost"
        )
    return doubts
