import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import skimage.data
import tifffile
from conftest import FIELD_SHAPE as SHAPE
from conftest import field_of
from PIL import Image

from benchmarks.fields import overlap
from hep2.__main__ import main
from hep2.fields import NEGATIVE, NO_CELLS, NO_PATTERN, _pool, draw_overlay, in_mitosis, read_specimen
from hep2.imaging import read_intensity
from hep2.patterns import CLASS_NAMES
from hep2.phantoms import OTHER_STAINS, phantom_cell, phantom_field
from hep2.reader import Reader
from hep2.segmentation import find_cells
from hep2.weights import load_weights


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(load_weights())


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


def test_read_specimen_names_the_field_that_a_note_is_of(reader):
    image, _ = field_of("NuMem", density=0.3)
    answer = read_specimen(reader, [("a.tif", image, []), ("b.tif", image, ["the file has 2 frames"])])
    assert "b.tif: the file has 2 frames" in answer.warnings


def test_in_mitosis_is_who_stands_out_by_packed_chromatin_and_no_bright_nucleolus_or_golgi():
    told = {True: 0, False: 0}
    for pattern, seeds in {"Nucleolar": (1, 4, 7), "Golgi": (2, 4), "Speckled": (0, 1)}.items():
        for seed in seeds:
            image, cells = field_of(pattern, seed, shape=(700, 900), nucleus=65.0)
            found = find_cells(image)
            for cell, mitotic in zip(found.cells, in_mitosis(found), strict=True):
                if mitotic:
                    told[any(one.mitotic and overlap(cell.bbox, one.bbox) > 0.3 for one in cells)] += 1
    assert told[True] > 5
    assert told[False] == 0


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


@pytest.mark.parametrize("pattern", OTHER_STAINS)
def test_read_specimen_gives_no_verdict_of_the_six_for_another_pattern(reader, pattern):
    # As many cells as a laboratory's field has: of a handful, some are drawn as much like a nucleolus as a dot can be.
    image, _ = phantom_field(pattern, np.random.default_rng(1), nucleus=70.0, density=0.6)
    assert read_specimen(reader, [("other", image.astype(np.float32), [])]).verdict not in CLASS_NAMES


def test_a_stain_outside_the_nuclei_gets_no_nuclear_verdict(reader):
    specimen = read_specimen(reader, [("a", field_of("NuMem")[0], [])])
    assert _pool(specimen.cells, faint=False, stained=1.0, hollow=False)["verdict"] == "NuMem"
    pooled = _pool(specimen.cells, faint=False, stained=1.0, hollow=True)
    assert pooled["verdict"] == NO_PATTERN
    assert "resemble NuMem, but the stain lies outside the nuclei" in pooled["warnings"][0]


def test_a_second_pattern_is_named_where_it_is_really_there(reader):
    specimen = read_specimen(reader, [("a", field_of("NuMem", density=0.6)[0], [])])
    first, other = (0.02 + 0.88 * (np.arange(6) == label) for label in (3, 5))

    def pooled(shares: list[np.ndarray]) -> dict:
        cells = [
            replace(one, reading=replace(one.reading, probabilities={"ensemble": shares[number % len(shares)]}))
            for number, one in enumerate(4 * specimen.cells)  # of few cells, chance could have made it
        ]
        return _pool(cells, faint=False, stained=1.0, hollow=False)

    mixed = pooled([first, other, first, other, first])
    assert (mixed["verdict"], mixed["second"]) == ("NuMem", "Speckled")
    assert any("mixed: Speckled is there too" in warning for warning in mixed["warnings"])
    assert pooled([first])["second"] is None


def test_a_specimen_whose_cells_say_this_and_that_gets_no_verdict(reader):
    specimen = read_specimen(reader, [("a", field_of("NuMem")[0], [])])
    flat = np.full(6, 0.13) + 0.22 * (np.arange(6) == 3)
    cells = [
        replace(cell, reading=replace(cell.reading, probabilities={"ensemble": flat}, refused=False))
        for cell in specimen.cells
    ]
    pooled = _pool(cells, faint=False, stained=1.0, hollow=False)
    assert pooled["verdict"] == NO_PATTERN
    assert "no pattern stands out; the likeliest, NuMem, has 35%" in pooled["warnings"][0]


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
    table = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(table.out)))
    assert len(rows) == answer["cells"]
    assert table.err.startswith("hep2: Nucleolar\n")
    assert main(["specimen", "examples/Golgi/1.png", "--csv"]) == 0
    table = capsys.readouterr()
    assert table.out.splitlines() == [",".join(rows[0])]
    assert table.err.startswith("hep2: no cells found\nhep2: the image is no larger than one cell")
    assert main(["specimen", str(path), str(path), "--overlay", str(overlay)]) == 0
    assert capsys.readouterr().out.startswith("Nucleolar ")
    assert (tmp_path / "out" / "overlay-2.png").exists()


def test_specimen_command_takes_a_folder_and_writes_over_no_field(tmp_path, capsys):
    image, _ = field_of("NuMem", density=0.3)
    fields = [tmp_path / f"field-{number}.png" for number in (1, 2)]
    for path in fields:
        Image.fromarray(image.astype(np.uint8)).save(path)
    before = [path.read_bytes() for path in fields]
    for given, overlay in ((fields[0], fields[0]), (tmp_path, tmp_path / "field.png")):
        assert main(["specimen", str(given), "--overlay", str(overlay)]) == 1
        assert "would write over the field" in capsys.readouterr().err
    assert [path.read_bytes() for path in fields] == before
    assert main(["specimen", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == list(map(str, fields))


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
