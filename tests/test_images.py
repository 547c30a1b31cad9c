import io
import os
import sys
import tracemalloc
import types
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter
from uploads import encoded, png_of_size, tiff

from hep2.images import PREPROCESSING, SUFFIXES, ImageError, decode, load_cell, prepare
from hep2.patterns import CLASS_NAMES
from hep2.synthetic import synthetic_cell, synthetic_field

CELL = synthetic_cell("Speckled", np.random.default_rng(1))  # the stain
DEEP = CELL.astype(np.uint16) * 20 + 300
ROWS, COLUMNS = np.mgrid[-1:1:78j, -1:1:78j]
DAPI = (240 * (np.hypot(ROWS, 1.3 * COLUMNS) < 0.8) + np.random.default_rng(0).integers(0, 9, CELL.shape)).astype(
    np.uint8
)
DEEP_DAPI = DAPI.astype(np.uint16) * 100 + 300
BLANK = np.random.default_rng(0).integers(300, 310, CELL.shape).astype(np.uint16)  # a camera's noise alone
OPAQUE = np.full(CELL.shape, 255, np.uint8)
FADING = np.tile(np.linspace(20, 255, 78).round().astype(np.uint8), (78, 1))
DAPI_LEFT_OUT = "FITC was read, DAPI was left out"
SECOND_OF_TWO = "without names: {0} 2 was read, {0} 1 was left out"


def colours(red=0, green=0, blue=0, dtype=np.uint8) -> np.ndarray:
    return np.dstack([np.broadcast_to(channel, CELL.shape) for channel in (red, green, blue)]).astype(dtype)


def blurred(sigma: float) -> np.ndarray:
    return gaussian_filter(DEEP.astype(np.float32), sigma).astype(np.uint16)


STACK = np.stack([blurred(3), blurred(1), DEEP, blurred(2), blurred(4)])
GREEN_TABLE, BLUE_TABLE = (np.uint8([np.arange(256) * (place == channel) for place in range(3)]) for channel in (1, 2))


def named(*names: str, **other) -> dict:
    return {"ome": True, "metadata": {"axes": "CYX", "Channel": {"Name": list(names)}} | other}


def imagej(**metadata) -> dict:
    return {"imagej": True, "metadata": metadata}


def turned(orientation: int) -> bytes:
    """Write a PNG that is to be turned, and shows the cell when it is."""
    exif = Image.Exif()
    exif[274] = orientation
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # of Image.Transpose
    return encoded(Image.fromarray(CELL).transpose(inverse), "PNG", exif=exif)


def palette_tiff(indices: np.ndarray, palette: np.ndarray) -> bytes:
    return tiff(indices, photometric="palette", colormap=palette.astype(np.uint16))


def jet() -> np.ndarray:
    """Return a rainbow (3, 256): blue, cyan, yellow, red, with the light nowhere in one channel."""
    light = np.arange(256) / 255
    return np.uint16([257 * 255 * np.clip(1.5 - abs(4 * light - centre), 0, 1) for centre in (3, 2, 1)])


def hilo() -> np.ndarray:
    table = np.tile(np.arange(256) * 257, (3, 1))
    table[:, 0], table[:, -1] = (0, 0, 65535), (65535, 0, 0)
    return table


def indexed_png(palette: np.ndarray) -> bytes:
    image = Image.fromarray(CELL).convert("P")
    image = Image.frombytes("P", image.size, CELL.tobytes())
    image.putpalette((palette.T // 257).astype(np.uint8).tobytes())
    return encoded(image, "PNG")


def pyramid(subifds: bool) -> bytes:
    """Write a pyramid of three levels, in SubIFDs or in pages, the largest first."""
    large, file = np.kron(DEEP, np.ones((4, 4), np.uint16)), io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(large, subifds=2 if subifds else None, tile=(64, 64), metadata=None)
        for step in (2, 4):
            writer.write(large[::step, ::step], subfiletype=1, tile=(64, 64), metadata=None)
    return file.getvalue()


def named_pages(**pages: np.ndarray) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for name, page in pages.items():
            writer.write(page, metadata=None, extratags=[(285, "s", 0, name, True)])
    return file.getvalue()


def with_tags(data: bytes, **values: int) -> bytes:
    """Change tags of a TIFF's first page, which must hold one number each."""
    changed = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        for name, value in values.items():
            tag = opened.pages[0].tags[name]
            size = 2 if tag.dtype == 3 else 4
            changed[tag.valueoffset : tag.valueoffset + size] = value.to_bytes(size, "little")
    return bytes(changed)


class Kind(NamedTuple):
    data: bytes
    expected: np.ndarray  # the intensity, up to gain and offset
    warning: str = ""  # a part of the one warning; none where it is empty
    tolerance: float = 0.0  # of the prepared cell, mean absolute


CROSSED = np.stack([np.stack([DEEP_DAPI, plane]) for plane in STACK])  # (planes, channels, rows, columns)
FLUOROPHORES = np.dstack([0 * DEEP, BLANK, DEEP, 0 * DEEP])
PLANAR = np.moveaxis(colours(green=DEEP, dtype=np.uint16), -1, 0)
QUANTIZED = Image.fromarray(colours(green=CELL)).quantize(256, dither=Image.Dither.NONE)
BAR = np.where((ROWS > 0.8) & (COLUMNS < 0), 255, 0).astype(np.uint8)
WHITE_BAR_ON_RED = np.maximum(colours(red=CELL), BAR[..., None])
CMYK = Image.fromarray(colours(green=CELL)).convert("CMYK")

KINDS = {
    # Pillow's formats
    "png, 8 bits": Kind(encoded(CELL, "PNG"), CELL),
    "png, 16 bits": Kind(encoded(DEEP, "PNG"), DEEP),
    "png, 1 bit": Kind(encoded(Image.fromarray(DAPI > 99), "PNG"), 255.0 * (DAPI > 99)),
    "png, grey with alpha": Kind(encoded(Image.merge("LA", [*map(Image.fromarray, (CELL, OPAQUE))]), "PNG"), CELL),
    "png, green": Kind(encoded(colours(green=CELL), "PNG"), CELL),
    "png, red": Kind(encoded(colours(red=CELL), "PNG"), CELL),
    "png, blue": Kind(encoded(colours(blue=CELL), "PNG"), CELL),
    "png, grey in colours": Kind(encoded(colours(CELL, CELL, CELL), "PNG"), CELL),
    "png, opaque": Kind(encoded(np.dstack([colours(green=CELL), OPAQUE]), "PNG"), CELL),
    "png, fading": Kind(
        encoded(np.dstack([colours(green=CELL), FADING]), "PNG"), CELL * (FADING / 255), "partly transparent"
    ),
    "png, transparent": Kind(
        encoded(np.dstack([colours(green=CELL), 0 * OPAQUE]), "PNG"), CELL, "every pixel is transparent"
    ),
    "png, green of 16 bits": Kind(imagecodecs.png_encode(colours(green=CELL, dtype=np.uint16)), CELL),
    "png, grey of 16 bits with alpha": Kind(imagecodecs.png_encode(np.dstack([DEEP, 0 * DEEP + 65535])), DEEP),
    "png, colours of 16 bits with alpha": Kind(
        imagecodecs.png_encode(np.dstack([colours(green=DEEP, dtype=np.uint16), 0 * DEEP + 65535])), DEEP
    ),
    "png, faint green under bright blue": Kind(
        encoded(colours(green=CELL // 5, blue=DAPI), "PNG"), CELL // 5, "green was read, blue was left out"
    ),
    "png, green with red counterstain": Kind(
        encoded(colours(green=CELL, red=DAPI), "PNG"), CELL, "green was read, red was left out"
    ),
    "png, red with blue": Kind(encoded(colours(red=CELL, blue=DAPI), "PNG"), CELL, "red was read, blue was left out"),
    "png, red with a white scale bar": Kind(encoded(WHITE_BAR_ON_RED, "PNG"), WHITE_BAR_ON_RED[..., 0]),
    "png, palette of greens": Kind(encoded(QUANTIZED, "PNG"), CELL, tolerance=0.02),
    "png, palette of jet": Kind(indexed_png(jet()), CELL),
    "png, palette of reversed grey": Kind(indexed_png(hilo()[:, 1:2] * 0 + np.arange(255, -1, -1) * 257), 255 - CELL),
    "png, two frames": Kind(
        encoded(CELL, "PNG", save_all=True, append_images=[Image.fromarray(DAPI)]), CELL, "2 frames: the first was read"
    ),
    **{f"png, orientation {number}": Kind(turned(number), CELL) for number in range(2, 9)},
    "jpeg, grey": Kind(encoded(CELL, "JPEG", quality=95), CELL, tolerance=0.02),
    "jpeg, green": Kind(encoded(colours(green=CELL), "JPEG", quality=95), CELL, tolerance=0.03),
    "jpeg, red": Kind(encoded(colours(red=CELL), "JPEG", quality=85), CELL, tolerance=0.06),
    "jpeg, cmyk": Kind(encoded(CMYK, "JPEG", quality=95), CELL, tolerance=0.04),
    "jpeg, faint green under bright blue": Kind(
        encoded(colours(green=CELL // 3, blue=DAPI), "JPEG", quality=95, subsampling=0), CELL, "blue was left out", 0.05
    ),
    "bmp, grey": Kind(encoded(CELL, "BMP"), CELL),
    "bmp, green": Kind(encoded(colours(green=CELL), "BMP"), CELL),
    "webp": Kind(encoded(colours(green=CELL), "WEBP", lossless=True), CELL),
    "webp, two frames": Kind(
        encoded(CELL, "WEBP", save_all=True, append_images=[Image.fromarray(DAPI)], lossless=True),
        CELL,
        "2 frames: the first was read",
    ),
    "jpeg 2000, grey": Kind(encoded(CELL, "JPEG2000"), CELL),
    "jpeg 2000, 16 bits": Kind(imagecodecs.jpeg2k_encode(DEEP, level=0), DEEP),
    "jpeg 2000, green of 16 bits": Kind(
        imagecodecs.jpeg2k_encode(colours(green=CELL, dtype=np.uint16), level=0, reversible=True), CELL
    ),
    "avif": Kind(encoded(colours(green=CELL), "AVIF", quality=95), CELL, tolerance=0.04),
    # numbers of TIFF
    **{
        f"tiff, {dtype.__name__}": Kind(tiff(DEEP.astype(dtype)), DEEP)
        for dtype in (np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.float32, np.float64)
    },
    "tiff, uint8": Kind(tiff(CELL), CELL),
    "tiff, int8": Kind(tiff((CELL // 2).astype(np.int8) - 64), CELL // 2),
    "tiff, float16": Kind(tiff(CELL.astype(np.float16)), CELL),
    "tiff, 1 bit": Kind(tiff(DAPI > 99, photometric="minisblack"), DAPI > 99),
    "tiff, 12 bits": Kind(tiff(DEEP // 2, bitspersample=12), DEEP // 2),
    "tiff, negative": Kind(tiff(DEEP.astype(np.int16) - 5000), DEEP),
    "tiff, big-endian": Kind(tiff(DEEP, byteorder=">"), DEEP),
    "tiff, more than 4 GB allowed": Kind(tiff(DEEP, bigtiff=True), DEEP),
    "tiff, fax": Kind(encoded(Image.fromarray(DAPI > 99), "TIFF", compression="group4"), DAPI > 99),
    # compressions and layouts of TIFF
    **{
        f"tiff, {name}": Kind(tiff(DEEP, compression=name), DEEP)
        for name in ("lzw", "deflate", "packbits", "zstd", "lzma", "jpeg2000", "png")
    },
    "tiff, lzw with predictor": Kind(tiff(DEEP, compression="lzw", predictor=True), DEEP),
    "tiff, jpeg": Kind(tiff(CELL, compression="jpeg", compressionargs={"level": 95}), CELL, tolerance=0.02),
    "tiff, jpeg of colours": Kind(
        tiff(colours(green=CELL), photometric="rgb", compression="jpeg", compressionargs={"level": 97}), CELL, "", 0.05
    ),
    "tiff, webp": Kind(tiff(colours(green=CELL), photometric="rgb", compression="webp"), CELL, tolerance=0.05),
    "tiff, tiles": Kind(tiff(DEEP, tile=(32, 32), compression="zlib"), DEEP),
    "tiff, planes of colours": Kind(tiff(PLANAR, photometric="rgb", planarconfig="separate"), DEEP),
    "tiff, orientation": Kind(tiff(np.rot90(DEEP), extratags=[(274, "H", 1, 6, True)]), DEEP),
    "tiff, pyramid in sub-pages": Kind(pyramid(True), np.kron(DEEP, np.ones((4, 4)))),
    "tiff, pyramid in pages": Kind(pyramid(False), np.kron(DEEP, np.ones((4, 4)))),
    "tiff, thumbnail first": Kind(tiff(DEEP_DAPI[::3, ::3], DEEP), DEEP),
    "tiff, thumbnail last": Kind(tiff(DEEP, CELL[::3, ::3]), DEEP),
    # what the values of a TIFF mean
    "tiff, white is zero": Kind(tiff(255 - CELL, photometric="miniswhite"), CELL),
    "tiff, white is zero, 16 bits": Kind(tiff(65535 - DEEP, photometric="miniswhite"), DEEP),
    "tiff, white is zero, signed": Kind(
        tiff((20_000 - CELL.astype(np.int32) * 200).astype(np.int16), photometric="miniswhite"), CELL
    ),
    "tiff, white is zero, floats": Kind(tiff(-CELL.astype(np.float32), photometric="miniswhite"), CELL),
    "tiff, cmyk": Kind(encoded(CMYK, "TIFF"), CELL, tolerance=0.01),
    "tiff, ycbcr": Kind(
        tiff(
            np.asarray(Image.fromarray(colours(green=CELL)).convert("YCbCr")), photometric="ycbcr", subsampling=(1, 1)
        ),
        CELL,
        tolerance=0.03,
    ),
    "tiff, lab": Kind(tiff(np.dstack([CELL, OPAQUE // 2, OPAQUE // 2]), photometric="cielab"), CELL),
    "tiff, palette of hilo": Kind(palette_tiff(CELL, hilo()), CELL),
    "tiff, palette of jet": Kind(palette_tiff(CELL, jet()), CELL),
    "tiff, palette of 0 to 255": Kind(palette_tiff(CELL, hilo()[:, [1]] * 0 + np.arange(256)), CELL),
    "tiff, palette in any order": Kind(
        palette_tiff(np.random.default_rng(0).permutation(256)[CELL].astype(np.uint8),
                     np.uint16([0, 257, 0])[:, None] * np.argsort(np.random.default_rng(0).permutation(256))), CELL
    ),
    "tiff, alpha not multiplied yet": Kind(
        tiff(np.dstack([colours(green=CELL), FADING]), photometric="rgb", extrasamples=["unassalpha"]),
        CELL * (FADING / 255),
        "partly transparent",
    ),
    "tiff, alpha multiplied": Kind(
        tiff(np.dstack([colours(green=CELL), FADING]), photometric="rgb", extrasamples=["assocalpha"]),
        CELL,
        "partly transparent",
    ),
    "tiff, colours and who knows what": Kind(
        tiff(np.dstack([colours(green=CELL), DAPI]), photometric="rgb", extrasamples=["unspecified"]), CELL
    ),
    "tiff, grey with alpha": Kind(
        tiff(np.dstack([CELL, OPAQUE]), photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]),
        CELL,
    ),
    "tiff, four fluorophores": Kind(
        tiff(FLUOROPHORES, photometric="minisblack", planarconfig="contig", extrasamples=[0, 0, 0]), DEEP
    ),
    # planes and channels of TIFF
    "imagej, channels in one page": Kind(
        tiff(np.stack([DEEP_DAPI, DEEP]), **imagej(axes="CYX")), DEEP, SECOND_OF_TWO.format("channel")
    ),
    "imagej, three channels": Kind(
        tiff(np.stack([DEEP_DAPI, DEEP, DEEP_DAPI // 2]), **imagej(axes="CYX")),
        DEEP,
        "without names: channel 2 was read, channel 1 and channel 3 were left out",
    ),
    "imagej, labelled": Kind(
        tiff(np.stack([DEEP, DEEP_DAPI]), **imagej(axes="CYX", Labels=["c:1/2 - FITC", "c:2/2 - DAPI"])),
        DEEP,
        DAPI_LEFT_OUT,
    ),
    "imagej, shown in green and blue": Kind(
        tiff(np.stack([DEEP, DEEP_DAPI]), **imagej(axes="CYX", LUTs=[GREEN_TABLE, BLUE_TABLE])),
        DEEP,
        "green was read, blue was left out",
    ),
    "imagej, second channel empty": Kind(tiff(np.stack([DEEP, BLANK]), **imagej(axes="CYX")), DEEP),
    "imagej, stack": Kind(tiff(STACK, **imagej(axes="ZYX")), DEEP, "5 planes: plane 3, the sharpest, was read"),
    "imagej, time": Kind(tiff(STACK, **imagej(axes="TYX")), DEEP, "5 planes: plane 3, the sharpest, was read"),
    "ome, fitc first": Kind(tiff(np.stack([DEEP, DEEP_DAPI]), **named("FITC", "DAPI")), DEEP, DAPI_LEFT_OUT),
    "ome, fitc last": Kind(tiff(np.stack([DEEP_DAPI, DEEP]), **named("DAPI", "FITC")), DEEP, DAPI_LEFT_OUT),
    "ome, alexa 488": Kind(
        tiff(np.stack([DEEP, DEEP_DAPI]), **named("AF488-T1", "Hoechst 33342")), DEEP, "Hoechst 33342 was left out"
    ),
    "ome, no stain but dapi": Kind(
        tiff(np.stack([DEEP, DEEP_DAPI]), **named("Cy3", "DAPI")), DEEP, "Cy3 was read, DAPI was left out"
    ),
    "ome, faint fitc": Kind(tiff(np.stack([BLANK, DEEP_DAPI]), **named("FITC", "DAPI")), BLANK, DAPI_LEFT_OUT),
    "ome, wavelengths": Kind(
        tiff(
            np.stack([DEEP, DEEP_DAPI]),
            ome=True,
            metadata={"axes": "CYX", "Channel": {"Name": ["C1", "C2"], "EmissionWavelength": [519, 461]}},
        ),
        DEEP,
        "519 nm was read, 461 nm was left out",
    ),
    "ome, colours": Kind(tiff(colours(green=CELL), photometric="rgb", ome=True), CELL),
    "pages, two": Kind(tiff(DEEP_DAPI, DEEP, metadata=None), DEEP, SECOND_OF_TWO.format("page")),
    "pages, two written one by one": Kind(tiff(DEEP_DAPI, DEEP), DEEP, SECOND_OF_TWO.format("page")),
    "pages, two of an array": Kind(tiff(np.stack([DEEP_DAPI, DEEP])), DEEP, SECOND_OF_TWO.format("page")),
    "pages, two by Pillow": Kind(
        encoded(DAPI, "TIFF", save_all=True, append_images=[Image.fromarray(CELL)]), CELL, SECOND_OF_TWO.format("page")
    ),
    "pages, a mask second": Kind(tiff(CELL, OPAQUE * (DAPI > 99), metadata=None), CELL),
    "pages, five": Kind(tiff(*STACK, metadata=None), DEEP, "5 planes: plane 3, the sharpest, was read"),
    "pages, named by dyes": Kind(named_pages(FITC=DEEP, DAPI=DEEP_DAPI), DEEP, DAPI_LEFT_OUT),
    "pages, numbered": Kind(
        named_pages(**{f"z{place}": plane for place, plane in enumerate(STACK)}), DEEP, "5 planes: plane 3"
    ),
    "png, palette of two colours": Kind(
        encoded(Image.fromarray(255 * np.uint8(DAPI > 99)).quantize(2), "PNG"), DAPI > 99
    ),
    "pages, of colours": Kind(
        tiff(*(colours(green=plane // 30) for plane in STACK), photometric="rgb", metadata=None),
        DEEP // 30,
        "5 planes: plane 3, the sharpest, was read",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:tifffile")
@pytest.mark.parametrize("name", KINDS)
def test_decode_reads_the_stain_and_says_what_it_left_out(name):
    kind = KINDS[name]
    decoded = decode(kind.data)
    assert decoded.intensity.dtype == np.float32
    assert decoded.intensity.flags.c_contiguous
    expected = prepare(np.ascontiguousarray(kind.expected, np.float32))
    difference = np.abs(prepare(decoded.intensity) - expected)
    assert difference.mean() <= kind.tolerance if kind.tolerance else difference.max() < 1e-4
    if kind.warning:
        (warning,) = decoded.warnings
        assert kind.warning in warning
    else:
        assert decoded.warnings == ()


def test_the_kinds_are_many():
    assert len(KINDS) >= 60


@pytest.mark.parametrize("name", CLASS_NAMES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("shape", ["cell", "field"])
def test_decode_reads_green_of_every_pattern_though_dapi_outshines_it(name, kind, shape):
    random = np.random.default_rng(3)
    if shape == "cell":
        stain, dapi = synthetic_cell(name, random), DAPI
    else:
        stain, _ = synthetic_field(name, random, shape=(300, 400), nucleus=60.0)
        dapi = np.uint8(240 * (gaussian_filter(stain.astype(np.float32), 4) > 20))
    picture = np.dstack([0 * stain, stain // 3, dapi])
    options = {} if kind == "PNG" else {"quality": 90, "subsampling": 0}
    decoded = decode(encoded(picture, kind, **options))
    assert np.corrcoef(decoded.intensity.ravel(), stain.ravel())[0, 1] > 0.88
    assert decoded.warnings == ("the image has several colours: green was read, blue was left out",)


TWO_NAMED = tiff(np.stack([DEEP, DEEP_DAPI]), **named("FITC", "DAPI"))
TWO_PAGES = tiff(DEEP_DAPI, DEEP, metadata=None)
BOTH = tiff(CROSSED, ome=True, metadata={"axes": "ZCYX", "Channel": {"Name": ["DAPI", "FITC"]}})
PICTURE = encoded(colours(red=DAPI, green=CELL), "PNG")
ANIMATED = encoded(CELL, "PNG", save_all=True, append_images=[Image.fromarray(DAPI)])


def test_a_stack_of_channels_gives_the_sharpest_plane_of_the_stain():
    decoded = decode(BOTH)
    np.testing.assert_array_equal(decoded.intensity, DEEP)
    assert decoded.warnings == (
        "the file has 2 channels: FITC was read, DAPI was left out",
        "the file has 5 planes: plane 3, the sharpest, was read",
    )


def test_of_pages_that_are_pictures_the_one_with_green_light_is_read():
    for order in (1, -1):
        pages = [colours(green=CELL), colours(blue=DAPI)][::order]
        decoded = decode(tiff(*pages, photometric="rgb", metadata=None))
        np.testing.assert_array_equal(decoded.intensity, CELL)
        assert decoded.warnings == (
            "the image has several colours: green was read, blue was left out",
            f"the file has 2 planes: plane {1 if order == 1 else 2}, the sharpest, was read",
        )


@pytest.mark.parametrize(
    ("data", "choice", "expected"),
    [
        (TWO_NAMED, {"channel": "DAPI"}, DEEP_DAPI),
        (TWO_NAMED, {"channel": "dap"}, DEEP_DAPI),
        (TWO_NAMED, {"channel": 2}, DEEP_DAPI),
        (TWO_NAMED, {"channel": "1"}, DEEP),
        (TWO_NAMED, {"channel": "fitc", "plane": 1}, DEEP),
        (TWO_PAGES, {"channel": 1}, DEEP_DAPI),
        (TWO_PAGES, {"plane": 1}, DEEP_DAPI),
        (TWO_PAGES, {"plane": 2}, DEEP),
        (tiff(np.stack([DEEP_DAPI, DEEP]), **imagej(axes="CYX")), {"plane": 1}, DEEP_DAPI),
        (BOTH, {"plane": 1}, STACK[0]),
        (BOTH, {"plane": 1, "channel": "DAPI"}, DEEP_DAPI),
        (PICTURE, {"channel": "red"}, DAPI),
        (PICTURE, {"channel": 1}, DAPI),
        (PICTURE, {"channel": "Green"}, CELL),
        (ANIMATED, {"plane": 2}, DAPI),
        (encoded(CELL, "PNG"), {"channel": 1, "plane": 1}, CELL),
    ],
)
def test_decode_reads_the_channel_and_plane_that_were_asked_for(data, choice, expected):
    np.testing.assert_array_equal(decode(data, **choice).intensity, expected)


@pytest.mark.parametrize(
    ("data", "choice", "message"),
    [
        (
            TWO_NAMED,
            {"channel": "Cy5"},
            "no channel 'Cy5': the image has 2 .FITC, DAPI.; give one of its names or 1 to 2",
        ),
        (TWO_NAMED, {"channel": 3}, "no channel 3: the image has 2"),
        (TWO_NAMED, {"channel": 0}, "no channel 0"),
        (TWO_NAMED, {"plane": 2}, "no plane 2: the image has 1"),
        (TWO_PAGES, {"plane": 3}, "no plane 3: the image has 2; give a number from 1 to 2"),
        (BOTH, {"plane": 6}, "no plane 6: the image has 5"),
        (BOTH, {"plane": 0}, "no plane 0"),
        (PICTURE, {"channel": "violet"}, "no channel 'violet': the image has 3 .red, green, blue."),
        (ANIMATED, {"plane": 3}, "no plane 3: the image has 2"),
        (encoded(CELL, "PNG"), {"channel": "green"}, "no channel 'green': the image has 1 without names"),
        (CELL, {"plane": 2}, "no plane 2: the image has 1"),
    ],
)
def test_decode_says_which_channels_and_planes_there_are(data, choice, message):
    with pytest.raises(ImageError, match=message):
        decode(data, **choice)


@pytest.mark.parametrize(
    ("data", "micrometres"),
    [
        (tiff(DEEP, resolution=(50_000, 50_000), resolutionunit="centimeter"), 0.2),
        (tiff(DEEP, resolution=(127_000, 127_000), resolutionunit="inch"), 0.2),
        (tiff(DEEP, resolution=(72, 72), resolutionunit="inch"), None),  # dots of a printer
        (tiff(DEEP), None),
        (tiff(DEEP, resolution=(8, 8), **imagej(unit="micron")), 0.125),
        (tiff(DEEP, resolution=(8, 8), **imagej(unit="um")), 0.125),
        (tiff(DEEP, resolution=(8, 8), **imagej(unit="\\u00B5m")), 0.125),
        (tiff(DEEP, resolution=(0.005, 0.005), **imagej(unit="nm")), 0.2),
        (tiff(DEEP, resolution=(8, 8), **imagej(unit="pixel")), None),
        (tiff(DEEP, ome=True, metadata={"axes": "YX", "PhysicalSizeX": 0.32, "PhysicalSizeXUnit": "µm"}), 0.32),
        (tiff(DEEP, ome=True, metadata={"axes": "YX", "PhysicalSizeX": 320, "PhysicalSizeXUnit": "nm"}), 0.32),
        (tiff(DEEP, ome=True, metadata={"axes": "YX"}), None),
        (encoded(CELL, "PNG", dpi=(127_000, 127_000)), 0.2),
        (encoded(CELL, "PNG", dpi=(300, 300)), None),
        (CELL, None),
    ],
)
def test_decode_reads_the_size_of_a_pixel_where_the_file_says_it(data, micrometres):
    expected = None if micrometres is None else pytest.approx(micrometres, rel=1e-3)
    assert decode(data).pixel_size == expected


def test_bad_metadata_of_ome_costs_no_image():
    data = tiff(DEEP, ome=True, metadata={"axes": "YX", "PhysicalSizeX": 0.32})
    for broken in (data.replace(b"0.32", b"none"), data.replace(b"</OME>", b"</EMO>")):
        decoded = decode(broken)
        np.testing.assert_array_equal(decoded.intensity, DEEP)
        assert decoded.pixel_size is None


def test_load_cell_takes_arrays_pillow_images_paths_and_open_files(tmp_path):
    path = tmp_path / "cell.png"
    path.write_bytes(encoded(CELL, "PNG"))
    for source in (CELL, Image.fromarray(CELL), path, str(path), path.open("rb"), colours(green=CELL)):
        np.testing.assert_array_equal(load_cell(source).pixels, prepare(CELL.astype(np.float32)))
        if hasattr(source, "close"):
            source.close()
    for mode in ("RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "LA", "La", "RGBa", "I;16"):
        image = Image.fromarray(CELL).convert("RGBA" if mode == "RGBa" else "LA" if mode == "La" else "L").convert(mode)
        assert np.abs(load_cell(image).pixels - prepare(CELL.astype(np.float32))).mean() < 0.01, mode


TIFF = tiff(CELL)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty .0 bytes.; give an image file"),
        (b"<html>no image</html>", "not an image of a known kind .it begins with “<html>no”.; give PNG"),
        (b"%PDF-1.7", "not an image"),
        (encoded(CELL, "GIF"), "a GIF, which is not read here; save the original as PNG or TIFF"),
        (b"ZISRAWFILE" + bytes(99), "a CZI file .Zeiss.*export the plane as TIFF.*or install bioio and bioio-czi"),
        (b"\xda\xce\xbe\x0a" + bytes(99), "an ND2 file .Nikon.*export.*bioio-nd2"),
        (b"\x70\0\0\0" + bytes(99), "a LIF file .Leica.*export.*bioio-lif"),
        (bytes(128) + b"DICM" + bytes(99), "a DICOM file.*export the plane as TIFF"),
        (b"\0\x05\x16\x07\0\2\0\0Mac OS X        ", "what macOS keeps beside a file.*give the image itself"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS.*git lfs pull"),
        (encoded(CELL, "PNG")[:700], "truncated or damaged"),
        (encoded(CELL, "JPEG")[:700], "truncated or damaged"),
        (TIFF[:700], "truncated or damaged"),
        (with_tags(TIFF, Compression=34676), "the compression SGILOG of this TIFF is not supported; save it with LZW"),
        (with_tags(TIFF, Compression=4444), "the compression 4444 of this TIFF is not supported"),
        (with_tags(TIFF, PhotometricInterpretation=32803), "8-bit CFA values cannot be read; save it as grey or RGB"),
        (tiff(CELL.astype(np.complex64)), "pixels of type complex64 cannot be read; give integers or floats"),
        (tiff(np.zeros((78, 78, 4), np.uint16), photometric="separated"), "16-bit SEPARATED values cannot be read"),
        (np.full((78, 78), 7, np.uint8), "the image is constant: every pixel is 7"),
        (encoded(np.full((78, 78), 7, np.uint8), "PNG"), "the image is constant: every pixel is 7"),
        (np.full((200, 100), 0.1), "the image is constant"),
        (np.where(np.arange(6084).reshape(78, 78) == 99, 255, 7), "nearly empty: 98 % of it is 7"),
        (encoded(np.dstack([colours(), 0 * OPAQUE]), "PNG"), "constant.*every pixel is transparent"),
        (np.where(CELL > 100, np.nan, CELL), "NaN"),
        (np.where(CELL > 100, np.inf, CELL), "infinite"),
        (np.where(CELL > 100, 1e300, CELL), "huge"),
        (np.zeros((0, 5)), "no image"),
        (np.zeros((5, 5, 5, 5)), "no image"),
        (np.zeros((50, 50, 7)), "7 channels"),
        (np.array([["a", "b"]]), "pixels of type <U1"),
        (encoded(Image.new("1", (8000, 7000)), "PNG"), "more than 50,000,000"),
        (encoded(Image.new("1", (10_000, 10_000)), "PNG"), "more than 50,000,000"),
        (png_of_size(2_000_000_000, 2_000_000_000), "more than 50,000,000"),
        (with_tags(TIFF, ImageWidth=60_000, ImageLength=60_000), "60,000 x 60,000 pixels, more than 50,000,000"),
        (np.zeros((10_000, 10_000), np.uint8), "10,000 x 10,000 pixels"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_load_cell_says_what_is_wrong(source, message):
    with pytest.raises(ImageError, match=message):
        load_cell(source)


def test_load_cell_of_a_path_that_is_no_file_says_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_cell(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="a folder"):
        load_cell(tmp_path)
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(ImageError, match="a pipe or a device and no file"):
        load_cell(pipe)


def test_a_heic_image_names_the_package_it_needs(monkeypatch):
    heic = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(99)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="a HEIC image needs the package pillow-heif: install it, or save it as PNG"):
        decode(heic)
    heif = types.SimpleNamespace(size=(78, 78), to_pillow=lambda: Image.fromarray(colours(green=CELL)))
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(open_heif=lambda file: heif))
    np.testing.assert_array_equal(decode(heic).intensity, CELL)


def test_a_microscope_s_own_format_is_read_where_bioio_is_installed(monkeypatch):
    class BioImage:
        dims = types.SimpleNamespace(Z=5, C=2, Y=78, X=78)
        dtype = CROSSED.dtype
        channel_names = ("DAPI", "FITC")
        physical_pixel_sizes = types.SimpleNamespace(X=0.2)

        def __init__(self, path):
            assert path.suffix == ".czi"
            assert path.read_bytes().startswith(b"ZISRAW")

        def get_image_data(self, axes, T):
            return CROSSED

    exceptions = types.SimpleNamespace(UnsupportedFileFormatError=KeyError)
    monkeypatch.setitem(sys.modules, "bioio", types.SimpleNamespace(BioImage=BioImage))
    monkeypatch.setitem(sys.modules, "bioio_base", types.SimpleNamespace(exceptions=exceptions))
    monkeypatch.setitem(sys.modules, "bioio_base.exceptions", exceptions)
    decoded = decode(b"ZISRAWFILE" + bytes(99))
    np.testing.assert_array_equal(decoded.intensity, DEEP)
    assert decoded.pixel_size == 0.2
    assert len(decoded.warnings) == 2


def test_an_8_bit_png_needs_neither_tifffile_nor_imagecodecs(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    np.testing.assert_array_equal(decode(encoded(CELL, "PNG")).intensity, CELL)
    with pytest.raises(ImageError, match="needs the package imagecodecs: install it, or save as 8-bit PNG"):
        decode(KINDS["png, green of 16 bits"].data)


def test_suffixes_are_of_what_can_be_read():
    assert {".png", ".jpg", ".tif", ".tiff", ".webp", ".bmp", ".jp2", ".avif", ".heic", ".czi"} <= set(SUFFIXES)
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SUFFIXES)


def test_a_part_of_a_tiff_that_claims_more_than_its_page_is_not_decoded():
    page = tiff(colours(green=CELL), photometric="rgb", compression="jpeg")
    frame = page.index(b"\xff\xc0")  # where the JPEG tells its rows and columns
    for size in (65_000, 6_000, 100):
        claims = page[: frame + 5] + size.to_bytes(2, "big") * 2 + page[frame + 9 :]
        with pytest.raises(ImageError, match=r"more than 50,000,000|larger than its page"):
            decode(claims)


@pytest.mark.parametrize("compression", ["zlib", "lzw", "zstd", "lzma", "packbits"])
def test_a_tiff_takes_no_more_memory_than_its_size_says(compression):
    file = tiff(np.zeros((2000, 2000, 3), np.uint16), photometric="rgb", compression=compression, rowsperstrip=2000)
    claims = with_tags(file, ImageWidth=78, ImageLength=78, RowsPerStrip=78)
    tracemalloc.start()
    with pytest.raises(ImageError):
        load_cell(claims)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000  # inflated, the strip has 24 MB


def test_prepare_stretches_the_percentiles_and_keeps_shape_and_type():
    cell = prepare(CELL.astype(np.float32))
    assert cell.shape == (1, 78, 78)
    assert cell.dtype == np.float32
    assert (cell.min(), cell.max()) == (0, 1)
    low, high = np.quantile(CELL, [0.01, 0.99])
    middle = np.clip(CELL, low, high) == CELL
    np.testing.assert_allclose(cell[0][middle], (CELL[middle] - low) / (high - low), atol=1e-6)


@pytest.mark.parametrize("shape", [(300, 300), (41, 200), (200, 77), (1, 20_000), (64, 64)])
def test_prepare_keeps_the_aspect_ratio(shape):
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    cell = prepare(image)
    assert cell.shape == (1, 78, 78)
    rows, columns = (max(1, round(side * 78 / max(shape))) for side in shape)
    top, left = (78 - rows) // 2, (78 - columns) // 2
    assert cell[0, top : top + rows, left : left + columns].mean() > 0.2
    cell[0, top : top + rows, left : left + columns] = 0
    assert not cell.any()


def test_the_preprocessing_that_weights_carry_has_not_changed():
    assert PREPROCESSING == {
        "image_size": 78,
        "channel": "the one with the largest spread",
        "resize": "bicubic with antialiasing, aspect kept, black margins",
        "quantiles": [0.01, 0.99],
    }


def test_load_cell_doubts_small_long_and_clipped_images():
    random = np.random.default_rng(0)
    assert "small (20 x 20 pixels)" in load_cell(random.random((20, 20))).warnings[0]
    assert "far from square" in load_cell(random.random((100, 300))).warnings[0]
    assert load_cell(CELL).warnings == ()
    assert "10% of the pixels are at the brightest value" in load_cell(CELL.clip(0, np.quantile(CELL, 0.9))).warnings[0]


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_a_blurred_cell_is_called_out_of_focus_and_a_sharp_one_is_not(name):
    sharp = synthetic_cell(name, np.random.default_rng(0))
    assert load_cell(sharp).warnings == ()
    (warning,) = load_cell(gaussian_filter(sharp.astype(np.float32), 2)).warnings
    assert "out of focus" in warning


def test_an_image_large_enough_for_a_field_is_pointed_to_where_fields_are_read():
    cell, field = (load_cell(np.kron(CELL, np.ones((side, side), np.uint8))) for side in (7, 8))
    assert field.is_field
    assert any("give it as a field" in warning for warning in field.warnings)
    assert not cell.is_field
    assert not any("give it as a field" in warning for warning in cell.warnings)


@pytest.mark.parametrize("folder", ["HEP2_FIELDS", "HEP2_REFERENCE_PICTURES"])
def test_the_green_channel_of_real_pictures_is_read(folder):
    if folder not in os.environ:
        pytest.skip(f"{folder} names no folder of pictures")
    pictures = [path for path in Path(os.environ[folder]).rglob("*") if path.suffix in SUFFIXES]
    assert pictures
    for path in pictures:
        np.testing.assert_array_equal(decode(path).intensity, np.asarray(Image.open(path))[..., 1], err_msg=str(path))
