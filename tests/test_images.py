import contextlib
import io
import tracemalloc

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter
from uploads import encoded, tiff

from hep2.imaging import load_cell, prepare, read_intensity
from hep2.patterns import CLASS_NAMES
from hep2.phantoms import phantom_cell

CELL = phantom_cell("Speckled", np.random.default_rng(1))


def in_channel(channel: int) -> np.ndarray:
    colour = np.zeros((*CELL.shape, 3), np.uint8)
    colour[..., channel] = CELL
    return colour


def reference() -> np.ndarray:
    return prepare(CELL.astype(np.float32))


def test_prepare_stretches_the_percentiles_and_keeps_shape_and_type():
    cell = reference()
    assert cell.shape == (1, 78, 78)
    assert cell.dtype == np.float32
    assert cell.min() == 0
    assert cell.max() == 1
    low, high = np.quantile(CELL, [0.01, 0.99])
    middle = np.clip(CELL, low, high) == CELL
    np.testing.assert_allclose(cell[0][middle], (CELL[middle] - low) / (high - low), atol=1e-6)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "WEBP"])
def test_load_cell_reads_lossless_formats_alike(form):
    options = {"lossless": True} if form == "WEBP" else {}
    cell = load_cell(encoded(CELL, form, **options))
    np.testing.assert_allclose(cell.pixels, reference(), atol=1e-6)
    assert cell.warnings == ()


def test_load_cell_reads_jpeg_closely():
    assert np.abs(load_cell(encoded(CELL, "JPEG", quality=95)).pixels - reference()).mean() < 0.02


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_load_cell_reads_the_fluorescent_channel_of_any_colour_in_full(channel):
    np.testing.assert_array_equal(load_cell(encoded(in_channel(channel), "PNG")).pixels, reference())


def test_load_cell_reads_the_signal_and_not_a_counterstain_and_says_so():
    image = in_channel(1)
    image[..., 2] = np.random.default_rng(0).integers(0, 120, CELL.shape)
    cell = load_cell(encoded(image, "PNG"))
    np.testing.assert_array_equal(cell.pixels, reference())
    assert cell.warnings == ("the image has several colours: only green was read",)


@pytest.mark.parametrize("values", [np.uint16(CELL) * 257, np.uint16(CELL) + 300, np.uint16(CELL) * 7 + 20_000])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_load_cell_reads_16_bits_of_any_range(values, form):
    np.testing.assert_allclose(load_cell(encoded(values, form)).pixels, reference(), atol=1e-5)


def test_load_cell_reads_32_bit_float_tiff():
    image = CELL.astype(np.float32) / 1000 - 3
    np.testing.assert_allclose(load_cell(encoded(Image.fromarray(image), "TIFF")).pixels, reference(), atol=1e-4)


@pytest.mark.parametrize("layout", ["contig", "separate"])
def test_load_cell_reads_16_bit_colour_tiff_without_losing_faint_signal(layout):
    image = in_channel(1).astype(np.uint16)  # at 8 bits nothing of it would be left
    planes = image if layout == "contig" else np.moveaxis(image, -1, 0)
    file = tiff(planes, photometric="rgb", planarconfig=layout)
    np.testing.assert_allclose(load_cell(file).pixels, reference(), atol=1e-6)


@pytest.mark.parametrize("compression", ["lzw", "zlib", "packbits", "zstd"])
def test_load_cell_reads_compressed_16_bit_colour_tiff(compression):
    image = in_channel(1).astype(np.uint16)
    file = tiff(image, photometric="rgb", compression=compression)
    np.testing.assert_allclose(load_cell(file).pixels, reference(), atol=1e-6)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_load_cell_reads_16_bit_colour_png_without_losing_faint_signal(channels):
    # Grey with alpha, RGB, RGBA: at 8 bits nothing of the signal would be left.
    image = np.zeros((*CELL.shape, channels), np.uint16)
    image[..., 0] = CELL
    if channels != 3:
        image[..., -1] = 65535
    cell = load_cell(imagecodecs.png_encode(image))
    np.testing.assert_allclose(cell.pixels, reference(), atol=1e-6)
    assert cell.warnings == ()


@pytest.mark.parametrize(
    "image",
    [CELL.astype(np.uint32) * 16_000_000, CELL.astype(np.int8), CELL.astype(np.int16) - 300, CELL.astype(np.float64)],
    ids=lambda image: str(image.dtype),
)
def test_load_cell_reads_tiffs_of_any_number(image):
    np.testing.assert_allclose(load_cell(tiff(image)).pixels, prepare(image.astype(np.float32)), atol=1e-6)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_load_cell_reads_tiffs_whose_zero_is_white(kind):
    image = kind(np.iinfo(kind).max) - CELL.astype(kind)
    np.testing.assert_allclose(load_cell(tiff(image, photometric="miniswhite")).pixels, reference(), atol=1e-5)


def test_load_cell_takes_no_fourth_fluorophore_for_alpha():
    image = np.zeros((*CELL.shape, 4), np.uint16)
    image[..., 2] = CELL
    file = tiff(image, photometric="minisblack", planarconfig="contig", extrasamples=[0, 0, 0])
    cell = load_cell(file)
    np.testing.assert_allclose(cell.pixels, reference(), atol=1e-6)
    assert cell.warnings == ()


def test_load_cell_follows_the_orientation_of_a_deep_tiff():
    turned = np.rot90(in_channel(1).astype(np.uint16) * 200)
    file = tiff(turned, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    np.testing.assert_allclose(load_cell(file).pixels, reference(), atol=1e-6)


def test_load_cell_refuses_deep_cmyk_in_words():
    file = tiff(np.zeros((78, 78, 4), np.uint16), photometric="separated", planarconfig="contig")
    with pytest.raises(ValueError, match="save it as grey or RGB"):
        load_cell(file)


def test_load_cell_takes_no_more_memory_than_the_size_of_a_tiff_says():
    file = tiff(np.zeros((4000, 4000, 3), np.uint16), photometric="rgb", compression="zlib", rowsperstrip=4000)
    claims = bytearray(file)
    with tifffile.TiffFile(io.BytesIO(file)) as opened:
        for code in (256, 257, 278):  # columns, rows, rows a strip
            tag = opened.pages[0].tags[code]
            claims[tag.valueoffset : tag.valueoffset + tag.count * (2 if tag.dtype == 3 else 4)] = (78).to_bytes(
                2 if tag.dtype == 3 else 4, "little"
            )
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        load_cell(bytes(claims))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000  # inflated, the strip has 96 MB


def test_load_cell_reads_palette_cmyk_and_transparent_images():
    palette = Image.fromarray(in_channel(1)).quantize(256, dither=Image.Dither.NONE)
    assert np.abs(load_cell(encoded(palette, "PNG")).pixels - reference()).mean() < 0.02
    cmyk = Image.fromarray(in_channel(1)).convert("CMYK")
    np.testing.assert_allclose(load_cell(encoded(cmyk, "TIFF")).pixels, reference(), atol=0.02)
    alpha = np.dstack([in_channel(1), np.full(CELL.shape, 255, np.uint8)])
    np.testing.assert_array_equal(load_cell(encoded(alpha, "PNG")).pixels, reference())
    alpha[:10, :, 3] = 0
    assert load_cell(encoded(alpha, "PNG")).warnings == ("the image is partly transparent: it was laid on black",)


def test_load_cell_follows_the_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown by turning it a quarter clockwise
    turned = Image.fromarray(CELL).transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(load_cell(encoded(turned, "PNG", exif=exif)).pixels, reference())


@pytest.mark.parametrize("form", ["TIFF", "PNG", "WEBP"])
def test_load_cell_reads_the_first_frame_and_says_so(form):
    second = Image.fromarray(CELL.T.copy())
    options = {"lossless": True} if form == "WEBP" else {}
    cell = load_cell(encoded(CELL, form, save_all=True, append_images=[second], **options))
    np.testing.assert_allclose(cell.pixels, reference(), atol=1e-6)
    assert cell.warnings == ("the file has 2 frames: only the first was read",)


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


def test_load_cell_doubts_small_and_long_images():
    rng = np.random.default_rng(0)
    assert "small (20 x 20 pixels)" in load_cell(rng.random((20, 20))).warnings[0]
    assert "far from square" in load_cell(rng.random((100, 300))).warnings[0]
    assert load_cell(CELL).warnings == ()
    assert "10% of the pixels are at the brightest value" in load_cell(CELL.clip(0, np.quantile(CELL, 0.9))).warnings[0]


def test_load_cell_takes_arrays_pillow_images_paths_and_open_files(tmp_path):
    path = tmp_path / "cell.png"
    path.write_bytes(encoded(CELL, "PNG"))
    for source in (CELL, Image.fromarray(CELL), path, str(path), path.open("rb")):
        np.testing.assert_array_equal(load_cell(source).pixels, reference())
        if hasattr(source, "close"):
            source.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty"),
        (b"<html>no image</html>", "not an image"),
        (b"%PDF-1.7", "not an image"),
        (encoded(CELL, "GIF"), "give PNG, JPEG, TIFF, BMP or WebP"),
        (encoded(CELL, "PNG")[:700], "truncated"),
        (encoded(CELL, "JPEG")[:700], "truncated"),
        (encoded(CELL, "TIFF")[:700], "truncated|cannot be read"),
        (encoded(np.full((78, 78), 7, np.uint8), "PNG"), "constant"),
        (np.full((200, 100), 0.1), "constant"),
        (np.zeros((78, 78)), "constant"),
        (np.where(CELL > 100, np.nan, CELL), "NaN"),
        (np.where(CELL > 100, np.inf, CELL), "infinite"),
        (encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "NaN"),
        (np.zeros((0, 5)), "no image"),
        (np.zeros((5, 5, 5, 5)), "no image"),
        (np.zeros((50, 50, 7)), "7 channels"),
        (np.array([["a", "b"]]), "type"),
        (encoded(Image.new("1", (8000, 7000)), "PNG"), "more than 50,000,000"),
        (encoded(Image.new("1", (20_000, 10_000)), "PNG"), "more than 50,000,000"),
        (encoded(Image.new("1", (10_000, 10_000)), "PNG"), "more than 50,000,000"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_load_cell_says_what_is_wrong(source, message):
    with pytest.raises(ValueError, match=message):
        load_cell(source)


def test_load_cell_of_a_missing_file_raises_file_not_found():
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_cell("nowhere.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns before it raises
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_load_cell_of_damaged_files_answers_or_raises_value_error(form):
    data = encoded(CELL, form)
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 12)):
            damaged[position] = rng.integers(256)
        with contextlib.suppress(ValueError):
            assert load_cell(bytes(damaged[: rng.integers(1, len(data) + 1)])).pixels.shape == (1, 78, 78)


def test_read_intensity_keeps_the_units_of_the_file():
    intensity, _ = read_intensity(encoded(np.uint16(CELL) + 300, "PNG"))
    np.testing.assert_array_equal(intensity, CELL + 300.0)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_a_blurred_cell_is_called_out_of_focus_and_a_sharp_one_is_not(name):
    sharp = phantom_cell(name, np.random.default_rng(0))
    assert load_cell(sharp).warnings == ()
    (warning,) = load_cell(gaussian_filter(sharp.astype(np.float32), 2)).warnings
    assert "out of focus" in warning


def test_an_image_large_enough_for_a_field_is_pointed_to_where_fields_are_read():
    field = np.kron(CELL, np.ones((10, 10), np.uint8))
    assert any("give it as a field" in warning for warning in load_cell(field).warnings)
    assert not any("give it as a field" in warning for warning in load_cell(CELL).warnings)
