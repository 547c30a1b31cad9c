import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image

from benchmarks.fields import matches, overlap
from hep2.__main__ import main
from hep2.fields import NEGATIVE, NO_CELLS, NO_PATTERN, FoundCell, crop, draw_overlay, find_cells, read_specimen
from hep2.imaging import read_intensity
from hep2.patterns import CLASS_NAMES
from hep2.phantoms import phantom_cell, phantom_field
from hep2.reader import Reader
from hep2.weights import load_weights

SHAPE = (480, 640)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(load_weights())


def field_of(pattern: str, seed: int = 0, **options) -> tuple[np.ndarray, list]:
    image, cells = phantom_field(pattern, np.random.default_rng(seed), **{"shape": SHAPE, "nucleus": 60.0} | options)
    return image.astype(np.float32), cells


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
    right, there = 0, 0
    for seed in (1, 2, 3, 4):
        image, cells = field_of("Golgi", seed, nucleus=45.0)
        found = find_cells(image)
        right += matches([cell.bbox for cell in found.cells], [cell.bbox for cell in cells])
        there += len(cells)
        assert found.nucleus == pytest.approx(45, rel=0.3)
        assert "the stain lies outside the nuclei: whole cells are outlined" in found.notes
    assert right / there > 0.6


def test_overlap_of_boxes():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert overlap((0, 0, 10, 10), (0, 5, 10, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (10, 0, 10, 10)) == 0
    assert matches([(0, 0, 10, 10)], [(0, 0, 10, 10), (1, 0, 10, 10)]) == 1


def test_find_cells_does_not_depend_on_units_and_takes_a_pixel_size():
    image, _ = field_of("Homogeneous")
    boxes = [cell.bbox for cell in find_cells(image).cells]
    assert [cell.bbox for cell in find_cells(image * 100).cells] == boxes
    known = find_cells(image, pixel_size=11 / 60)
    assert matches([cell.bbox for cell in known.cells], boxes) >= len(boxes) - 2
    assert known.nucleus == pytest.approx(60)


def test_find_cells_leaves_out_scale_bar_debris_and_cells_at_the_border():
    image, _ = field_of("NuMem")
    image[20:32, 20:120] = 230  # a bar
    image[200:206, 300:306] = 250  # a speck of dust
    found = find_cells(image)
    assert "scale bar" in found.notes[0]
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
    assert (pixels[0, 39] > 0.5).sum() == pytest.approx(57, abs=2)
    assert (pixels[0, :, 39] > 0.5).sum() == pytest.approx(57, abs=2)
    # What lies beyond the field is mirrored in.
    corner = crop(image[240:, 320:], replace(cell, centre=(0.0, 0.0)), nucleus=100.0)
    np.testing.assert_allclose(corner[0, 45:, 45:], pixels[0, 45:, 45:], atol=0.1)


@pytest.mark.parametrize("pattern", ["Homogeneous", "NuMem", "Nucleolar", "Centromere"])
def test_read_specimen_names_the_pattern(reader, pattern):
    image, cells = field_of(pattern, density=0.6)
    specimen = read_specimen(reader, [("a.tif", image, [])])
    answer = specimen.as_dict()
    assert answer["verdict"] == pattern
    low, high = answer["interval"]
    assert low <= answer["probability"] <= high
    assert len(answer["per_cell"]) == answer["cells"] >= 0.8 * len(cells)
    assert sum(answer["counts"].values()) + answer["refused"] + answer["mitotic"] == answer["cells"]
    assert answer["counts"][pattern] == max(answer["counts"].values())
    drawn = np.asarray(draw_overlay(image, specimen.cells))
    assert drawn.shape == (*SHAPE, 3)
    assert (drawn[..., 0] != drawn[..., 1]).any()


def test_read_specimen_pools_several_fields(reader):
    fields = [(f"{seed}.tif", field_of("NuMem", seed)[0], []) for seed in range(2)]
    together = read_specimen(reader, fields).as_dict()
    alone = [read_specimen(reader, [one]).as_dict() for one in fields]
    assert together["cells"] == sum(one["cells"] for one in alone)
    assert {cell["field"] for cell in together["per_cell"]} == {0, 1}
    assert together["files"] == ["0.tif", "1.tif"]


def test_read_specimen_takes_any_units_and_fields_of_unlike_exposure(reader):
    image, _ = field_of("Homogeneous")
    plain = read_specimen(reader, [("a", image, [])])
    for unlike in (image / 255, image * 257):
        answer = read_specimen(reader, [("a", unlike.astype(np.float32), [])])
        assert (answer.verdict, answer.counts) == (plain.verdict, plain.counts)
    both = read_specimen(reader, [("a", image, []), ("b", image * 257, [])]).as_dict()
    assert both["mitotic"] == 2 * plain.as_dict()["mitotic"]


def test_read_specimen_is_not_put_off_by_a_field_without_cells(reader):
    image, _ = field_of("NuMem")
    empty = [(f"{name}.tif", np.full(SHAPE, 5.0, np.float32), []) for name in "bc"]
    alone, among = (read_specimen(reader, [("a.tif", image, []), *others]) for others in ([], empty))
    assert (among.verdict, among.counts) == (alone.verdict, alone.counts) == ("NuMem", alone.counts)


@pytest.mark.parametrize("pixel_size", [0.0, float("inf"), float("nan"), 100.0])
def test_read_specimen_takes_no_absurd_pixel_size(reader, pixel_size):
    with pytest.raises(ValueError, match="give micrometres"):
        read_specimen(reader, [("a", field_of("NuMem")[0], [])], pixel_size=pixel_size)


def test_read_specimen_says_when_there_is_no_pattern(reader):
    def answer(image: np.ndarray) -> dict:
        return read_specimen(reader, [("field", image.astype(np.float32), [])]).as_dict()

    random = np.random.default_rng(0)
    homogeneous, _ = field_of("Homogeneous")
    faint = answer(homogeneous / 25 + random.normal(2, 0.3, SHAPE))
    assert faint["verdict"] == NEGATIVE
    assert faint["probability"] is None
    assert faint["interval"] is None
    for photograph in (skimage.data.astronaut()[..., 1], skimage.data.page(), skimage.data.gravel()):
        assert answer(photograph)["verdict"] in (NO_PATTERN, NO_CELLS, NEGATIVE)
    assert answer(np.zeros(SHAPE))["verdict"] == NO_CELLS
    assert answer(random.normal(100, 10, SHAPE))["verdict"] in (NO_PATTERN, NO_CELLS, NEGATIVE)
    one = answer(phantom_cell("NuMem", random))
    assert one["verdict"] == NO_CELLS
    assert "no larger than one cell" in one["warnings"][0]


def test_read_specimen_of_one_cell_says_that_it_rests_on_few(reader):
    image = np.full(SHAPE, 5.0, np.float32)
    field, cells = field_of("NuMem", density=0.1, nucleus=70.0)
    top, left, height, width = cells[0].bbox
    box = (slice(top - 20, top + height + 20), slice(left - 20, left + width + 20))
    image[box] = field[box]
    answer = read_specimen(reader, [("one", image, [])]).as_dict()
    assert answer["cells"] <= 2
    if answer["verdict"] != NO_PATTERN:
        assert "rests on few" in answer["warnings"][-1]


def test_specimen_command_prints_words_json_and_a_table(tmp_path, capsys):
    image, _ = field_of("Nucleolar")
    path = tmp_path / "field.tif"
    tifffile.imwrite(path, np.stack([image.astype(np.uint16) * 200] * 2))
    overlay = tmp_path / "out" / "overlay.png"
    assert main(["specimen", str(path), "--json", "--overlay", str(overlay)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "Nucleolar"
    assert "2 frames" in answer["warnings"][0]
    assert set(answer["per_cell"][0]) >= {"bbox", "verdict", "probability", "refused", "mitotic", "models"}
    with Image.open(overlay) as drawn:
        assert drawn.size == SHAPE[::-1]
    assert main(["specimen", str(path), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == answer["cells"]
    assert main(["specimen", str(path), str(path), "--overlay", str(overlay)]) == 0
    assert capsys.readouterr().out.startswith("Nucleolar ")
    assert (tmp_path / "out" / "overlay-2.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["missing.tif"], "missing.tif: there is no such file"), (["README.md"], "README.md: not an image")],
)
def test_specimen_command_names_what_cannot_be_read(arguments, message, capsys):
    assert main(["specimen", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert main(["specimen", "README.md", "--pixel-size", "0"]) == 1
    assert "the pixel size is 0" in capsys.readouterr().err


def test_a_field_of_too_many_pixels_is_refused():
    with pytest.raises(ValueError, match="cut out a smaller part"):
        read_intensity(np.zeros((10_000, 10_000), np.uint8))
