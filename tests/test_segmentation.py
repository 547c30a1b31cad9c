from dataclasses import replace

import numpy as np
import pytest
from conftest import FIELD_SHAPE as SHAPE
from conftest import field_of

from benchmarks.fields import matches, overlap
from hep2.fields.segmentation import FoundCell, crop, find_cells
from hep2.patterns import CLASS_NAMES


def score(found: list, cells: list) -> float:
    """Return the F1 score of found cells."""
    right = matches([cell.bbox for cell in found], [cell.bbox for cell in cells])
    return 2 * right / (len(found) + len(cells))


@pytest.mark.parametrize("pattern", [name for name in CLASS_NAMES if name != "Golgi"])
@pytest.mark.parametrize("nucleus", [20.0, 70.0])
def test_find_cells_finds_nuclei_of_any_size(pattern, nucleus):
    # As many cells of any size: of a handful, two at a border or a scale bar are a third.
    image, cells = field_of(pattern, nucleus=nucleus, shape=(round(9 * nucleus), round(12 * nucleus)))
    found = find_cells(image)
    assert score(found.cells, cells) >= 0.9
    assert found.nucleus == pytest.approx(nucleus, rel=0.3)
    assert not found.dark
    assert not found.rings
    assert any("fine texture is missing" in note for note in found.notes) == (nucleus < 24)


def test_find_cells_finds_most_cells_whose_stain_lies_outside_the_nucleus():
    image, cells = field_of("Golgi", 1, nucleus=45.0)
    found = find_cells(image)
    assert found.rings
    assert score(found.cells, cells) > 0.75
    assert found.nucleus == pytest.approx(45, rel=0.3)
    assert "the stain lies outside the nuclei: whole cells are outlined" in found.notes


def test_find_cells_outlines_nuclei_in_a_stained_cytoplasm():
    image, cells = field_of("NuMem", 2, cytoplasm=0.2)
    found = find_cells(image)
    assert score(found.cells, cells) > 0.85
    assert found.nucleus == pytest.approx(60, rel=0.2)


@pytest.mark.parametrize("pattern", ["Homogeneous", "Golgi"])
def test_find_cells_does_not_depend_on_units_or_the_camera_s_offset(pattern):
    image, _ = field_of(pattern, shape=(451, 605))  # no side is a multiple of the blocks of the background
    boxes = [cell.bbox for cell in find_cells(image).cells]
    assert len(boxes) > 5
    for other in (image * np.float32(100), image * np.float32(2**-20), image + np.float32(300)):
        assert [cell.bbox for cell in find_cells(other).cells] == boxes


def test_find_cells_takes_a_pixel_size():
    image, cells = field_of("Homogeneous")
    for microns in (8, 11):
        known = find_cells(image, pixel_size=microns / 60)
        assert score(known.cells, cells) > 0.8
        assert known.nucleus == pytest.approx(60, rel=0.15)  # with the rim of its haze
        assert not any("micrometres" in note for note in known.notes)


def test_find_cells_leaves_out_scale_bar_debris_and_cells_at_the_border():
    image, cells = field_of("NuMem")
    image[20:32, 20:120] = 230  # a bar
    image[200:206, 300:306] = 250  # a speck of dust
    found = find_cells(image)
    assert "scale bar" in found.notes[0]
    assert len(found.cells) >= 0.7 * len(cells)
    for cell in found.cells:
        top, left, height, width = cell.bbox
        assert min(top, left) > 0
        assert top + height < SHAPE[0]
        assert left + width < SHAPE[1]
        assert height > 20
        assert overlap(cell.bbox, (20, 20, 12, 100)) == 0


def test_find_cells_numbers_its_labels_as_its_cells():
    found = find_cells(field_of("Nucleolar")[0])
    assert found.labels.max() == len(found.cells)
    for number, cell in enumerate(found.cells, 1):
        row, column = (round(position * found.scale) for position in cell.centre)
        assert found.labels[row, column] == number


def test_overlap_of_boxes():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert overlap((0, 0, 10, 10), (0, 5, 10, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (10, 0, 10, 10)) == 0
    assert matches([(0, 0, 10, 10)], [(0, 0, 10, 10), (1, 0, 10, 10)]) == 1


def test_crop_shows_the_nucleus_as_large_as_in_the_training_cells():
    row, column = np.indices(SHAPE)
    image = (np.hypot(row - 240, column - 320) < 50).astype(np.float32)
    cell = FoundCell(bbox=(0, 0, 0, 0), centre=(240.0, 320.0), outline=np.zeros((0, 2)), diameter=100.0)
    pixels = crop(image, cell, nucleus=100.0)
    assert pixels.shape == (1, 78, 78)
    assert (pixels[0, 39] > 0.5).sum() == pytest.approx(63, abs=2)
    assert (pixels[0, :, 39] > 0.5).sum() == pytest.approx(63, abs=2)
    # What lies beyond the field is mirrored in.
    corner = crop(image[240:, 320:], replace(cell, centre=(0.0, 0.0)), nucleus=100.0)
    np.testing.assert_allclose(corner[0, 45:, 45:], pixels[0, 45:, 45:], atol=0.1)


@pytest.mark.parametrize("shape", [(48, 400), (400, 48), (1, 500), (130, 130)])
def test_find_cells_bears_fields_of_any_shape_without_cells(shape):
    for nothing in (np.zeros(shape, np.float32), np.full(shape, 7.0, np.float32)):
        found = find_cells(nothing)
        assert (found.cells, found.nucleus) == ([], 0.0)
    find_cells(np.random.default_rng(0).random(shape, np.float32))


def test_find_cells_bears_a_frame():
    image, cells = field_of("Homogeneous")
    for side in (slice(0, 6), slice(-6, None)):
        image[side], image[:, side] = 255, 255
    assert len(find_cells(image).cells) >= 0.7 * len(cells)
