from dataclasses import replace

import numpy as np
import pytest
from conftest import FIELD_SHAPE as SHAPE
from conftest import field_of

from benchmarks.fields import matches, overlap
from hep2.patterns import CLASS_NAMES
from hep2.segmentation import FoundCell, crop, find_cells


@pytest.mark.parametrize("pattern", [name for name in CLASS_NAMES if name != "Golgi"])
@pytest.mark.parametrize("nucleus", [45.0, 80.0])
def test_find_cells_finds_nuclei_of_any_size(pattern, nucleus):
    # As many cells of any size: of a handful, two at a border or a scale bar are a third.
    image, cells = field_of(pattern, nucleus=nucleus, shape=(round(11 * nucleus), round(14 * nucleus)))
    found = find_cells(image)
    right = matches([cell.bbox for cell in found.cells], [cell.bbox for cell in cells])
    assert 2 * right / (len(found.cells) + len(cells)) >= 0.9
    assert found.nucleus == pytest.approx(nucleus, rel=0.3)
    assert not any("outside the nuclei" in note for note in found.notes)


def test_find_cells_finds_most_cells_whose_stain_lies_outside_the_nucleus():
    right, count = 0, 0
    for seed in (1, 2, 3, 4):
        image, cells = field_of("Golgi", seed, nucleus=45.0)
        found = find_cells(image)
        right += matches([cell.bbox for cell in found.cells], [cell.bbox for cell in cells])
        count += len(cells) + len(found.cells)
        assert found.nucleus == pytest.approx(45, rel=0.3)
        assert "the stain lies outside the nuclei: whole cells are outlined" in found.notes
    assert 2 * right / count > 0.8


def test_overlap_of_boxes():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert overlap((0, 0, 10, 10), (0, 5, 10, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (10, 0, 10, 10)) == 0
    assert matches([(0, 0, 10, 10)], [(0, 0, 10, 10), (1, 0, 10, 10)]) == 1


@pytest.mark.parametrize("pattern", ["Homogeneous", "Golgi"])
def test_find_cells_does_not_depend_on_units_and_takes_a_pixel_size(pattern):
    image, cells = field_of(pattern)
    boxes = [cell.bbox for cell in find_cells(image).cells]
    assert len(boxes) > 5
    for unit in (100, 1e-6):
        assert [cell.bbox for cell in find_cells(image * np.float32(unit)).cells] == boxes

    def score(found: list[tuple]) -> float:
        return 2 * matches(found, [cell.bbox for cell in cells]) / (len(found) + len(cells))

    # A pixel size narrows the search: a right one makes nothing worse, a wrong one is said or finds nothing.
    for microns in (8, 11):
        known = find_cells(image, pixel_size=microns / 60)
        assert score([cell.bbox for cell in known.cells]) >= score(boxes)
        if pattern == "Homogeneous":
            assert score([cell.bbox for cell in known.cells]) > 0.8
            assert known.nucleus == pytest.approx(60, rel=0.05)
        assert known.nucleus == pytest.approx(60, rel=0.21)  # as near as the sizes that rings are looked for in
        assert not any("micrometres" in note for note in known.notes)
    wrong = find_cells(image, pixel_size=0.5)
    assert not wrong.cells or any("across" in note for note in wrong.notes)


@pytest.mark.parametrize("pattern", ["Golgi", "Nucleolar", "Speckled"])
def test_find_cells_does_not_depend_on_the_camera_s_offset(pattern):
    image, _ = field_of(pattern, shape=(451, 605))  # no side is a multiple of the blocks that the ground is taken from
    boxes = [cell.bbox for cell in find_cells(image).cells]
    assert len(boxes) > 5
    for offset in (300, 3000):
        assert [cell.bbox for cell in find_cells(image + np.float32(offset)).cells] == boxes


def test_find_cells_leaves_out_scale_bar_debris_and_cells_at_the_border():
    image, cells = field_of("NuMem")
    image[20:32, 20:120] = 230  # a bar
    image[200:206, 300:306] = 250  # a speck of dust
    found = find_cells(image)
    assert "scale bar" in found.notes[0]
    assert len(found.cells) >= 0.7 * len(cells)
    for cell in found.cells:
        top, left, height, width = cell.bbox
        assert top > 0
        assert left > 0
        assert top + height < SHAPE[0]
        assert left + width < SHAPE[1]
        assert height > 20
        assert overlap(cell.bbox, (20, 20, 12, 100)) == 0


def test_crop_shows_the_nucleus_as_large_as_in_the_training_cells():
    row, column = np.indices(SHAPE)
    image = (np.hypot(row - 240, column - 320) < 50).astype(np.float32)
    place = {"bbox": (0, 0, 0, 0), "centre": (240.0, 320.0), "outline": np.zeros((0, 2))}
    cell = FoundCell(**place, diameter=100.0, brightness=1.0, peak=1.0)
    pixels = crop(image, cell, nucleus=100.0)
    assert pixels.shape == (1, 78, 78)
    assert (pixels[0, 39] > 0.5).sum() == pytest.approx(63, abs=2)
    assert (pixels[0, :, 39] > 0.5).sum() == pytest.approx(63, abs=2)
    # What lies beyond the field is mirrored in.
    corner = crop(image[240:, 320:], replace(cell, centre=(0.0, 0.0)), nucleus=100.0)
    np.testing.assert_allclose(corner[0, 45:, 45:], pixels[0, 45:, 45:], atol=0.1)


def test_find_cells_bears_a_frame_and_fields_of_any_shape():
    image, cells = field_of("Homogeneous")
    for side in (slice(0, 6), slice(-6, None)):
        image[side], image[:, side] = 255, 255
    assert len(find_cells(image).cells) >= 0.7 * len(cells)
    for shape in ((48, 400), (400, 48), (1, 500), (130, 130)):
        for nothing in (np.zeros(shape, np.float32), np.full(shape, 7.0, np.float32)):
            found = find_cells(nothing)
            assert (found.cells, found.nucleus) == ([], 0.0)
        find_cells(np.random.default_rng(0).random(shape, np.float32))
