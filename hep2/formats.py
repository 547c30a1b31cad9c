"""Any image file or array to its planes and channels, what they are called, and how large a pixel is.

tifffile reads TIFF, Pillow everything else, imagecodecs what Pillow would cut to 8 bits, bioio what microscopes write
where it is installed; all but Pillow are imported when a file needs them.
"""

import io
import logging
import math
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage, TiffPageSeries

ImageSource = str | Path | bytes | BinaryIO | Image.Image | np.ndarray

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".jp2", ".j2k", ".avif", ".heic", ".heif")
SUFFIXES = (*PICTURE_SUFFIXES, ".tif", ".tiff", ".lsm", ".czi", ".nd2", ".lif", ".dcm")  # some only where bioio is
KNOWN_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"\0\0\0\x0cjP")
EXPECTED = "PNG, JPEG, TIFF, BMP, WebP, JPEG 2000, AVIF or HEIC"
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "JPEG2000", "AVIF")
MAX_PIXELS = 50_000_000
MAX_BYTES = 320_000_000  # of a file, and of what it is decoded to: with what is made of them they stay below 1 GiB
MAX_PAGES, MAX_PARTS, MAX_CHANNELS = 5_000, 200_000, 64  # of a TIFF, lest a small file takes minutes
UNNAMED_CHANNELS = 4  # pages of which nothing is known are channels if there are no more of them, else a stack

COLOURS = ("red", "green", "blue")
STAIN = re.compile(r"fitc|fluorescein|gfp|488|green|\bcy2\b|\b5[0-4]\d ?nm", re.IGNORECASE)
NO_STAIN = re.compile(
    r"dapi|hoechst|blue|draq|propidium|sytox|bright|phase|\bdic\b|\bbf\b|\btrans|\b4[0-7]\d ?nm", re.IGNORECASE
)
MICROMETRES = dict.fromkeys(("micron", "microns", "um", "µm", "μm", r"\u00B5m", 5), 1.0)  # by name or TIFF's number
MICROMETRES |= {"nm": 1e-3, "mm": 1e3, 4: 1e3, "cm": 1e4, 3: 1e4, "inch": 25_400.0, 2: 25_400.0}

# TIFF's compressions whose output is bounded by the page's size, and those whose parts bring a size of their own.
BOUNDED = {1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 34926, 50000}  # none, CCITT, LZW, Deflate, PackBits, LZMA, Zstandard
JPEG = {7, 34892}
PICTURES = JPEG | {33003, 33005, 34712, 34927, 34933, 50001}  # and JPEG 2000, WebP, PNG
SILENCE = logging.NullHandler()

EXPORT = "export the plane as TIFF from the microscope's program or from Fiji (File > Save As > Tiff)"
OTHER_FORMATS = (  # where and how a file begins that no decoder here reads, what it is, what to do, bioio's suffix
    (0, b"ZISRAWFILE", "a CZI file (Zeiss)", EXPORT, ".czi"),
    (0, b"\xda\xce\xbe\x0a", "an ND2 file (Nikon)", EXPORT, ".nd2"),
    (0, b"\x70\0\0\0", "a LIF file (Leica)", EXPORT, ".lif"),
    (128, b"DICM", "a DICOM file", EXPORT, ""),
    (0, b"\xd0\xcf\x11\xe0", "an OLE file (OIB, ZVI or of an office program)", EXPORT, ""),
    (0, b"\x89HDF", "an HDF5 file (Imaris)", EXPORT, ""),
    (0, b"GIF8", "a GIF", "save the original as PNG or TIFF: a GIF has too few grey values", ""),
    (0, b"\0\x05\x16\x07", "what macOS keeps beside a file (“._” and its name)", "give the image itself", ""),
    (0, b"version https://git-lfs", "a pointer of Git LFS", "fetch the image by `git lfs pull`", ""),
)


class ImageError(ValueError):
    """An image that cannot be read; the message says why and what to do, in words for its sender."""


class Layers(NamedTuple):
    """What a file holds, before a plane and a channel of it are chosen."""

    stack: np.ndarray  # (planes, samples, rows, columns), as stored
    names: tuple[str, ...] = ()  # of the channels; none where the file tells none
    light: Callable[[np.ndarray], np.ndarray] = np.asarray  # of one plane, from samples to (channels, rows, columns)
    alpha: np.ndarray | None = None  # (planes, rows, columns)
    premultiplied: bool = False
    pixel_size: float | None = None
    plane: int | None = None  # of the stack, from 1, where one was asked for
    called: str = "channel"


def read_file(source: str | Path | bytes | BinaryIO) -> bytes:
    """Return the bytes of a path or an open binary file."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            raise ImageError("this is a folder; give the path of an image")
        if not path.exists():
            raise FileNotFoundError("there is no such file; give the path of an image")
        if not path.is_file():
            raise ImageError("this is a pipe or a device and no file; save the image to a file and give its path")
        with path.open("rb") as file:
            return read_file(file)
    data = bytes(source) if isinstance(source, (bytes, bytearray)) else source.read(MAX_BYTES + 1)
    if not data:
        raise ImageError("the file is empty (0 bytes); give an image file")
    if len(data) > MAX_BYTES:
        raise ImageError(f"the file has more than {MAX_BYTES:,} bytes; save the plane and channel of the stain alone")
    return data


def read_layers(data: bytes | np.ndarray | Image.Image, plane: int | None, warnings: list[str]) -> Layers:
    """Take apart the bytes of a file, an image of Pillow's or an array; what is odd is added to the warnings.

    Damaged files raise whatever their decoder does.
    """
    if isinstance(data, np.ndarray):
        if data.ndim not in (2, 3) or data.size == 0:
            raise ImageError(
                f"an array of shape {data.shape} is no image; give (rows, columns) or (rows, columns, channels)"
            )
        if data.ndim == 3 and data.shape[2] > 4:
            raise ImageError(f"the image has {data.shape[2]} channels; give grey or three colours, and alpha or not")
        check_size(*data.shape[:2], data.itemsize)
        return _of_pixels(data, has_alpha=data.ndim == 3 and data.shape[2] in (2, 4))._replace(plane=plane)
    if isinstance(data, Image.Image):
        return _of_pillow(data, b"", plane, warnings)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _of_tiff(data, plane, warnings)
    for offset, start, what, advice, suffix in OTHER_FORMATS:
        if data.startswith(start, offset):
            return _of_bioio(data, plane, what, advice, suffix)
    if data[4:8] == b"ftyp" and any(brand in data[8:40] for brand in (b"heic", b"heix", b"hevc")):
        try:
            from pillow_heif import open_heif
        except ImportError as error:
            raise ImageError("a HEIC image needs the package pillow-heif: install it, or save it as PNG") from error
        heif = open_heif(io.BytesIO(data))
        check_size(heif.size[1], heif.size[0], 4)
        return _of_pillow(heif.to_pillow(), b"", plane, warnings)
    return _of_pillow(Image.open(io.BytesIO(data), formats=PILLOW_FORMATS), data, plane, warnings)


def check_size(rows: int, columns: int, bytes_a_pixel: float) -> None:
    if rows * columns > MAX_PIXELS:
        raise ImageError(
            f"the image has {rows:,} x {columns:,} pixels, more than {MAX_PIXELS:,}: cut out a smaller part"
        )
    if rows * columns * bytes_a_pixel > MAX_BYTES:
        raise ImageError(
            f"the image fills {rows * columns * bytes_a_pixel / 1e6:,.0f} MB, more than {MAX_BYTES / 1e6:,.0f}: save "
            "the plane and channel of the stain alone, or cut out a smaller part"
        )


def _of_pixels(pixels: np.ndarray, has_alpha: bool, premultiplied: bool = False, orientation: int = 1) -> Layers:
    """Take (rows, columns) or (rows, columns, samples) for grey or colours, with or without alpha."""
    samples = _turned(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0), orientation)[None]
    colours, alpha = (samples[:, :-1], samples[:, -1]) if has_alpha else (samples, None)
    return Layers(colours, COLOURS if colours.shape[1] == 3 else (), alpha=alpha, premultiplied=premultiplied)


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (…, rows, columns) as the orientation of a TIFF or EXIF asks."""
    array = array.swapaxes(-1, -2) if orientation in (5, 6, 7, 8) else array
    array = array[..., ::-1, :] if orientation in (3, 4, 7, 8) else array
    return array[..., ::-1] if orientation in (2, 3, 6, 7) else array


def _of_pillow(image: Image.Image, data: bytes, plane: int | None, warnings: list[str]) -> Layers:
    deep_png = image.format == "PNG" and len(data) > 25 and data[24] > 8 and data[25] != 0  # bits, and not grey
    by_imagecodecs = bool(data) and (deep_png or image.format == "JPEG2000")
    check_size(image.height, image.width, len(image.getbands()) * (4 if by_imagecodecs else 1))
    frames = getattr(image, "n_frames", 1)
    check_plane(plane, frames)
    if frames > 1:
        image.seek((plane or 1) - 1)
        if plane is None:
            warnings.append(f"the file has {frames} frames: the first was read")
    orientation, dots = image.getexif().get(274, 1), image.info.get("dpi", (0,))[0]  # an inch
    if by_imagecodecs:
        import imagecodecs

        pixels = imagecodecs.png_decode(data) if deep_png else imagecodecs.jpeg2k_decode(data)
        layers = _of_pixels(pixels, pixels.ndim == 3 and pixels.shape[2] in (2, 4), orientation=orientation)
    else:
        mode = PILLOW_MODES.get(image.mode, image.mode)
        if mode == "P":
            display = _is_display(np.reshape(image.getpalette("RGB"), (-1, 3)).T)
            mode = "P" if display else "RGBA" if "transparency" in image.info else "RGB"
        image = image if mode == image.mode else image.convert(mode)
        premultiplied = mode in ("La", "RGBa")
        layers = _of_pixels(np.asarray(image), premultiplied or mode in ("LA", "RGBA"), premultiplied, orientation)
    return layers._replace(plane=plane and 1, pixel_size=_plausible(25_400, dots))


def _of_tiff(data: bytes, plane: int | None, warnings: list[str]) -> Layers:
    import tifffile

    logging.getLogger("tifffile").addHandler(SILENCE)  # what it says of damage is in the error, or harmless
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        images = _largest(tiff, warnings)
        page, pages = images[0].keyframe, [page for image in images for page in image if page is not None]
        _check_tiff(data, page, pages, sum(image.size for image in images))
        arrays, axes = [image.asarray(maxworkers=1)[None] for image in images], "I" + images[0].axes
        array = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        for axis in "CS":
            array, axes = (array, axes) if axis in axes else (array[..., None], axes + axis)
        at = [axes.index(axis) for axis in "CSYX"]
        stack = [place for place in range(len(axes)) if place not in at]
        array = array.transpose(*stack, *at)
        planes, channels, samples = math.prod(array.shape[: len(stack)]), *array.shape[-4:-2]
        unknown = planes > 1 == channels == samples and all(axes[place] in "IQ" for place in stack)
        names, pixel_size = (), None
        with suppress(ValueError, TypeError):  # what is badly written tells nothing
            names, pixel_size = _metadata(tiff, images[0], pages, planes if unknown else channels)
    names = names if samples == 1 else ()
    if unknown and (any(names) or (plane is None and planes <= UNNAMED_CHANNELS)):
        planes, channels = 1, planes
    elif plane is not None and planes == 1 < channels and not any(names):
        planes, channels = channels, 1
    array = _turned(array.reshape(planes, channels * samples, *array.shape[-2:]), page.tags.valueof(274, 1))
    meaning = page.photometric.name
    if meaning == "YCBCR" and page.compression in JPEG:  # the decoder has made it RGB
        meaning = "RGB"
    if channels > 1 and meaning != "MINISWHITE":
        meaning = "MINISBLACK"
    used, colours, light = MEANINGS[meaning]
    alpha = None
    if channels == 1 and set(page.extrasamples) & {1, 2}:  # associated and unassociated; 0 may be anything
        array, alpha = array[:, :-1], array[:, -1]
    if meaning == "PALETTE" and not _is_display(page.colormap):
        colours, light = COLOURS, lambda indices: page.colormap[:, indices[0]]
    layers = Layers(array[:, : used or None], colours or names, light, alpha, 1 in page.extrasamples, pixel_size, plane)
    return layers._replace(called="page" if unknown else "channel")


def _largest(tiff: "TiffFile", warnings: list[str]) -> list["TiffPageSeries"]:
    """Choose the largest image: thumbnails and the lower levels of a pyramid are smaller."""
    claimed = [
        math.prod(int(pixels.get(f"Size{axis}", 1)) for axis in "ZCT")
        for pixels in (_ome_pixels(tiff) if tiff.is_ome else ())
    ]
    if len(tiff.pages) > MAX_PAGES or sum(claimed) > MAX_PAGES:
        raise ImageError(f"the TIFF has more than {MAX_PAGES:,} pages; save the one that shows the stain")
    images = [level for series in tiff.series for level in series.levels if {"Y", "X"} <= set(level.axes)]
    areas = [image.sizes["height"] * image.sizes["width"] for image in images]
    if not any(areas):
        raise ImageError("the TIFF holds no image; save it again")
    number = areas.index(max(areas))
    chosen = images[number]
    alike = [chosen]
    if chosen.kind in ("shaped", "generic") and set(chosen.axes) <= set("YXS"):  # pages that were written one by one
        alike = [image for image in images if (image.axes, image.shape) == (chosen.axes, chosen.shape)]
    if areas.count(max(areas)) > len(alike):
        warnings.append(f"the file has {len(images)} images: number {number + 1} was read")
    return alike


def _check_tiff(data: bytes, page: "TiffPage", pages: list["TiffPage"], values: int) -> None:
    """Raise before the decoding if it is not supported, or would fill the memory."""
    kind, compression = getattr(page.photometric, "name", "unnamed"), page.compression
    if page.dtype is None or kind not in MEANINGS or (kind in ("SEPARATED", "YCBCR") and page.dtype != np.uint8):
        raise ImageError(f"a TIFF of {page.bitspersample}-bit {kind} values cannot be read; save it as grey or RGB")
    if compression not in BOUNDED | PICTURES:
        name = getattr(compression, "name", compression)
        raise ImageError(f"the compression {name} of this TIFF is not supported; save it with LZW or uncompressed")
    rows, columns, size = page.imagelength, page.imagewidth, page.dtype.itemsize
    check_size(rows, columns, max(values, page.size * len(pages)) * size / (rows * columns))
    part_rows, part_columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, columns)
    if page.is_tiled:
        check_size(part_rows, part_columns, 2 * page.tiledepth * page.samplesperpixel * size)
    if math.prod(page.chunked) * len(pages) > MAX_PARTS:
        raise ImageError(f"the TIFF is cut into more than {MAX_PARTS:,} parts; save it again")
    for part in pages if compression in PICTURES else ():
        for offset, length in zip(part.dataoffsets, part.databytecounts, strict=False):
            with Image.open(io.BytesIO(data[offset : offset + length]), formats=PILLOW_FORMATS) as picture:
                if picture.height > part_rows or picture.width > part_columns:
                    raise ImageError("the TIFF is damaged: a part is larger than its page; save it again")


def _metadata(
    tiff: "TiffFile", image: "TiffPageSeries", pages: list["TiffPage"], count: int
) -> tuple[tuple[str, ...], float | None]:
    """Name the channels by dye, wavelength or colour, and measure a pixel in micrometres, as far as a TIFF tells."""
    told: list[tuple] = []  # of each channel what may tell which it is, the best first
    page = image.keyframe
    unit, (dots, per) = MICROMETRES.get(int(page.resolutionunit), 0), page.tags.valueof(282, (0, 1))
    if image.kind == "ome":
        number = [id(series) for series in tiff.series].index(id(image))
        pixels = _ome_pixels(tiff)[number]
        for channel in pixels.findall("{*}Channel"):
            wavelength, colour = float(channel.get("EmissionWavelength", 0)), int(channel.get("Color", -1))
            shown = _colour_name(*(colour >> shift & 255 for shift in (24, 16, 8)))
            told.append((channel.get("Name"), channel.get("Fluor"), wavelength and f"{wavelength:.0f} nm", shown))
        unit = float(pixels.get("PhysicalSizeX", 0)) * MICROMETRES.get(pixels.get("PhysicalSizeXUnit", "um"), 0)
        dots, per = 1, 1
    elif image.kind == "imagej":
        metadata = tiff.imagej_metadata
        labels = [label.rpartition(" - ")[2] for label in metadata.get("Labels", ())]
        shown = [_colour_name(*table[:, -1]) for table in metadata.get("LUTs", ())]
        told = [(label, *shown[place : place + 1]) for place, label in enumerate(labels[:count])] or [*zip(shown)]
        unit = MICROMETRES.get(metadata.get("unit"), 0)
    elif count > 1:
        # A page's name or description names a dye, or it is a number or a remark, and no channel's name.
        told = [("", page.aspage().tags.valueof(285), page.aspage().description[:60]) for page in pages]
    names = [
        next((name for name in names if name and (STAIN.search(name) or NO_STAIN.search(name))), names[0] or "")
        for names in told[:count]
    ] + [""] * (count - len(told))
    return tuple(names) if count == 1 or len(set(names)) > 1 else (), _plausible(unit * per, dots)


def _ome_pixels(tiff: "TiffFile") -> list[ElementTree.Element]:
    with suppress(ElementTree.ParseError):
        return ElementTree.fromstring(tiff.ome_metadata).findall("{*}Image/{*}Pixels")
    return []


def _colour_name(*light: int) -> str:
    bright = [colour for colour, value in zip(COLOURS, light, strict=True) if value > 127]
    return bright[0] if len(bright) == 1 else ""


def _plausible(micrometres: float, pixels: float) -> float | None:
    """Divide, where it gives a microscope's pixel: most files count dots an inch for a printer."""
    size = float(micrometres) / float(pixels) if pixels else 0.0
    return size if 0.01 <= size <= 10 else None


def _of_bioio(data: bytes, plane: int | None, what: str, advice: str, suffix: str) -> Layers:
    extra = f", or install bioio and bioio-{suffix[1:]}" if suffix else ""
    unread = ImageError(f"this is {what}, which is not read here; {advice}{extra}")
    if not suffix:
        raise unread
    try:
        from bioio import BioImage
        from bioio_base.exceptions import UnsupportedFileFormatError
    except ImportError:
        raise unread from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"image{suffix}")
        path.write_bytes(data)
        try:
            image = BioImage(path)
        except UnsupportedFileFormatError:
            raise unread from None
        depth, channels, rows, columns = (getattr(image.dims, axis, 1) for axis in "ZCYX")
        check_size(rows, columns, depth * channels * image.dtype.itemsize)
        stack = image.get_image_data("ZCYX", T=0)
        pixel_size = _plausible(image.physical_pixel_sizes.X or 0, 1)
        return Layers(stack, tuple(image.channel_names), pixel_size=pixel_size, plane=plane)


def _is_display(palette: np.ndarray) -> bool:
    """Tell a palette (3, entries) that shows light in false colours, as HiLo and jet do, from the colours of a picture.

    It runs on from entry to entry through more than one hue; the shades of a single hue are light as they are.
    """
    palette = palette.astype(np.float64) / max(palette.max(), 1)
    strongest = palette[:, palette.sum(0).argmax()]
    shades = np.outer(strongest, strongest @ palette) / max(strongest @ strongest, 1e-9)
    return abs(palette - shades).max() > 0.1 and np.quantile(abs(np.diff(palette)).sum(0), 0.9) < 0.1


def _by_pillow(mode: str) -> Callable[[np.ndarray], np.ndarray]:
    def light(samples: np.ndarray) -> np.ndarray:
        bands = [Image.fromarray(np.ascontiguousarray(band)) for band in samples]
        return np.moveaxis(np.asarray(Image.merge(mode, bands).convert("RGB")), -1, 0)

    return light


# What the values of a pixel mean. By TIFF's photometric interpretation: how many samples it takes (None: all), the
# names of the channels, and how they become light. By Pillow's mode: the mode that says it in light, alpha kept.
MEANINGS = {
    "MINISBLACK": (None, (), np.asarray),
    "MINISWHITE": (None, (), lambda samples: -samples if samples.dtype.kind == "f" else ~samples),
    "RGB": (3, COLOURS, np.asarray),
    "PALETTE": (1, (), np.asarray),  # if it is for display; else the palette's colours
    "SEPARATED": (4, COLOURS, _by_pillow("CMYK")),
    "YCBCR": (3, COLOURS, _by_pillow("YCbCr")),
    "CIELAB": (1, (), np.asarray),
}
PILLOW_MODES = {"1": "L", "PA": "RGBA"} | dict.fromkeys(("CMYK", "YCbCr", "HSV", "LAB", "RGBX"), "RGB")


def check_plane(plane: int | None, count: int) -> None:
    if plane is not None and not 1 <= plane <= count:
        raise ImageError(f"there is no plane {plane}: the image has {count}; give a number from 1 to {count}")
