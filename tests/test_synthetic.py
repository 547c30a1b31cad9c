from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hep2.patterns import CLASS_NAMES
from hep2.synthetic import (
    OTHER_PATTERNS,
    SyntheticCell,
    expose,
    reduce_field,
    synthetic_cell,
    synthetic_field,
    synthetic_fields,
    synthetic_files,
)

EXAMPLES = Path(__file__).parent.parent / "examples"
STAINED = ("Centromere", "Homogeneous", "AC-2 dense fine speckled", "AC-28 mitotic chromosomal")


@pytest.mark.parametrize("pattern", [*CLASS_NAMES, *OTHER_PATTERNS])
def test_synthetic_field_tells_where_its_whole_cells_lie(pattern):
    image, cells = synthetic_field(pattern, np.random.default_rng(3), shape=(220, 300), nucleus=30.0)
    assert image.shape == (220, 300)
    assert image.dtype == np.uint8
    assert len(cells) > 5
    for top, left, height, width in (cell.bbox for cell in cells):
        assert top > 0
        assert left > 0
        assert top + height < 220
        assert left + width < 300
        assert 15 < height < 65
    again, same = synthetic_field(pattern, np.random.default_rng(3), shape=(220, 300), nucleus=30.0)
    np.testing.assert_array_equal(image, again)
    assert cells == same


@pytest.mark.parametrize("pattern", [*CLASS_NAMES, *OTHER_PATTERNS])
def test_synthetic_cell_follows_its_seed(pattern):
    first, same, other = (synthetic_cell(pattern, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (78, 78)
    assert first.dtype == np.uint8
    assert first.max() > first.min()
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_an_unknown_pattern_names_the_known():
    for draw in (synthetic_cell, synthetic_field):
        with pytest.raises(ValueError, match=r"'Cytoplasmic'.*choose one of .*'Speckled'.*'AC-0 negative'"):
            draw("Cytoplasmic", np.random.default_rng(0))


def test_synthetic_files_of_a_larger_count_begin_with_those_of_a_smaller():
    few = {name: image for name, image, _ in synthetic_files(2, seed=5)}
    many = {name: image for name, image, _ in synthetic_files(4, seed=5)}
    assert len(few) == 12
    assert len(many) == 24
    for name, image in few.items():
        np.testing.assert_array_equal(image, many[name])


def test_examples_are_what_the_generator_makes():
    for number, (_, image, pattern) in enumerate(synthetic_files(5, seed=1)):
        np.testing.assert_array_equal(image, np.asarray(Image.open(EXAMPLES / pattern / f"{number % 5 + 1}.png")))
    for pattern, image in synthetic_fields(seed=1):
        np.testing.assert_array_equal(image, np.asarray(Image.open(EXAMPLES / "fields" / f"{pattern}.png")))


@pytest.mark.parametrize("pattern", ["Golgi", "AC-0 negative"])
def test_synthetic_field_is_drawn_whatever_its_background(pattern):
    # In some of these the background falls below no light at a corner.
    for seed in range(8):
        image, _ = synthetic_field(pattern, np.random.default_rng((1, seed)), shape=(240, 320), nucleus=30.0)
        assert image.max() > image.min()


@pytest.mark.parametrize("pattern", [*CLASS_NAMES, "AC-2 dense fine speckled", "AC-28 mitotic chromosomal"])
def test_synthetic_field_tells_mitoses_and_whether_their_plate_is_stained(pattern):
    random = np.random.default_rng(0)
    image, cells = synthetic_field(pattern, random, shape=(500, 700), nucleus=50.0, mitoses=0.4)
    plates = [cell for cell in cells if cell.mitotic]
    assert 5 < len(plates) < 0.7 * len(cells)
    assert {cell.stained_plate for cell in plates} == {pattern in STAINED}
    assert not any(cell.stained_plate for cell in cells if not cell.mitotic)
    middle, rim = [], []
    for top, left, height, width in (cell.bbox for cell in plates):
        row, column = top + height // 2, left + width // 2
        middle.append(image[row - 2 : row + 3, column - 2 : column + 3].mean())
        rim.append(np.mean([image[top + height // 2, left + width // 8], image[top + height // 8, left + width // 2]]))
    if pattern != "Golgi":  # whose pieces lie anywhere
        brighter = np.mean(np.array(middle) > np.array(rim))  # of an anaphase the middle lies between two plates
        assert (brighter > 0.5) == (pattern in STAINED)
    _, none = synthetic_field(pattern, random, shape=(300, 400), nucleus=50.0, mitoses=0)
    assert not any(cell.mitotic for cell in none)


def test_a_negative_field_is_dim_and_a_cytoplasm_leaves_the_nuclei_brighter():
    shape = {"shape": (300, 400), "nucleus": 40.0, "mitoses": 0}
    dim = np.median([synthetic_field("AC-0 negative", np.random.default_rng(s), **shape)[0].max() for s in range(5)])
    assert dim < 255
    plain, cells = synthetic_field("Homogeneous", np.random.default_rng(4), **shape)
    stained, same = synthetic_field("Homogeneous", np.random.default_rng(4), cytoplasm=0.4, **shape)
    assert cells == same
    nuclei = np.zeros(plain.shape, bool)
    for top, left, height, width in (cell.bbox for cell in cells):
        nuclei[top : top + height, left : left + width] = True
    assert np.median(stained[~nuclei]) > np.median(plain[~nuclei])
    assert np.median(stained[nuclei]) > np.median(stained[~nuclei])


def test_expose_scales_light_and_noise_as_a_camera_does():
    image = np.repeat(np.array([[20], [80], [200]], np.uint8), 4000, axis=1)
    for bits, dtype, full in ((8, np.uint8, 255), (16, np.uint16, 65535), (32, np.float32, 1)):
        plain = expose(image, light=0.5, bits=bits, offset=0.1)
        assert plain.dtype == dtype
        np.testing.assert_allclose(plain / full, 0.5 * image / 255 + 0.1, atol=0.002)
    full_light, quarter = (
        expose(image, np.random.default_rng(0), light=light, bits=32).astype(float) for light in (1, 0.25)
    )
    np.testing.assert_allclose(full_light.mean(1), 4 * quarter.mean(1), rtol=0.05)
    # A quarter of the photons: twice the noise, relative to the light.
    ratio = (quarter.std(1) / quarter.mean(1)) / (full_light.std(1) / full_light.mean(1))
    np.testing.assert_allclose(ratio, 2, rtol=0.15)


@pytest.mark.parametrize("quality", [None, 60])
def test_reduce_field_shrinks_picture_and_boxes_alike(quality):
    image = np.zeros((200, 300), np.uint8)
    image[50:90, 100:160] = 200
    small, cells = reduce_field(image, [SyntheticCell((50, 100, 40, 60), mitotic=False)], 0.5, quality)
    assert small.shape == (100, 150)
    assert small.dtype == np.uint8
    assert cells[0].bbox == (25, 50, 20, 30)
    rows, columns = np.nonzero(small > 100)
    assert (rows.min(), columns.min()) == pytest.approx((25, 50), abs=1)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == pytest.approx((20, 30), abs=2)
