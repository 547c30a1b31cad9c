from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import skimage.data
from conftest import field_of

from benchmarks.fields import overlap
from hep2.fields import (
    NEGATIVE,
    NO_CELLS,
    NO_PATTERN,
    UNCLEAR,
    SpecimenPrediction,
    draw_overlay,
    predict_specimen,
    specimen_rows,
)
from hep2.fields.segmentation import find_cells
from hep2.fields.stain import measure_stain
from hep2.images import Decoded
from hep2.patterns import CLASS_NAMES, MODEL_TITLES
from hep2.predictor import Prediction
from hep2.synthetic import expose, reduce_field, synthetic_cell

ORIGIN = {"source": "nowhere", "revision": "none"}


class Saying:
    """A predictor that finds the same in all cells, or in turn what it is given."""

    origin = ORIGIN

    def __init__(self, *shares: dict[str, float], rejected: bool = False) -> None:
        self.shares, self.rejected = shares, rejected

    def classify_cells(self, cells: list) -> list[Prediction]:
        return [
            Prediction(name, cell, dict.fromkeys(MODEL_TITLES, self.values(number)), 0.0, self.rejected, ORIGIN)
            for number, (name, cell) in enumerate(cells)
        ]

    def values(self, number: int) -> np.ndarray:
        share = self.shares[number % len(self.shares)]
        rest = (1 - sum(share.values())) / (6 - len(share))
        return np.array([share.get(name, rest) for name in CLASS_NAMES])


SURE = {name: Saying({name: 0.95}) for name in CLASS_NAMES}


@cache
def field(pattern: str, seed: int = 0, **options) -> np.ndarray:
    return field_of(pattern, seed, **options)[0]


def read(predictor, *images: np.ndarray, **options) -> SpecimenPrediction:
    return predict_specimen(predictor, [(f"{n}.tif", image) for n, image in enumerate(images)], **options)


@pytest.mark.parametrize("pattern", ["Homogeneous", "NuMem", "Nucleolar"])
def test_predict_specimen_names_the_pattern(bundled, pattern):
    image, cells = field_of(pattern, density=0.6)
    answer = read(bundled, image).as_dict()
    assert answer["verdict"] == pattern
    low, high = answer["interval"]
    assert low <= answer["probability"] <= high
    assert len(answer["per_cell"]) == answer["cells"] >= 0.8 * len(cells)
    assert sum(answer["counts"].values()) + answer["rejected"] + answer["mitotic"] == answer["cells"]
    assert answer["counts"][pattern] == max(answer["counts"].values())
    assert answer["nucleus"][0] == pytest.approx(60, rel=0.3)


@pytest.mark.parametrize("light", [1, 1 / 2, 1 / 4, 1 / 8])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_predict_specimen_does_not_depend_on_the_exposure(light, bits):
    image = field("Nucleolar", shape=(240, 320), nucleus=32.0).astype(np.uint8)
    again = read(SURE["Nucleolar"], expose(image, light=light, bits=bits, offset=0.02 if bits > 8 else 0.0))
    assert again.verdict == "Nucleolar"
    assert len(again.cells) == pytest.approx(len(read(SURE["Nucleolar"], image).cells), abs=1)
    noisy = read(SURE["Nucleolar"], expose(image, np.random.default_rng(0), light=light, bits=bits))
    assert noisy.verdict == "Nucleolar"
    assert noisy.signal < again.signal


def test_cells_that_hardly_stand_out_are_negative_at_any_gain():
    random = np.random.default_rng(0)
    faint = field("Homogeneous") / 25 + random.normal(2, 4, field("Homogeneous").shape)
    for gain in (0.1, 1, 100):
        specimen = read(Saying({"Homogeneous": 0.4}), (gain * faint).astype(np.float32))
        assert specimen.verdict in (NEGATIVE, NO_CELLS)
        assert specimen.probability is None


def test_a_weak_signal_with_a_pattern_is_named_and_warned_of():
    random = np.random.default_rng(0)
    weak = field("Homogeneous") + random.normal(0, 40, field("Homogeneous").shape)
    specimen = read(SURE["Homogeneous"], weak.astype(np.float32))
    assert specimen.verdict == "Homogeneous"
    assert any(warning.startswith("weak signal: ") for warning in specimen.warnings)


def test_predict_specimen_pools_several_fields_and_numbers_their_cells():
    images = [field("NuMem", seed) for seed in range(2)]
    together = read(SURE["NuMem"], *images).as_dict()
    alone = [read(SURE["NuMem"], one).as_dict() for one in images]
    assert together["cells"] == sum(one["cells"] for one in alone)
    assert {cell["field"] for cell in together["per_cell"]} == {0, 1}
    assert [cell["number"] for cell in together["per_cell"]] == list(range(1, together["cells"] + 1))
    assert together["files"] == ["0.tif", "1.tif"]


def test_predict_specimen_is_not_put_off_by_a_field_without_cells():
    empty = np.full((480, 640), 5.0, np.float32)
    assert read(SURE["NuMem"], field("NuMem"), empty, empty).verdict == "NuMem"
    assert read(SURE["NuMem"], empty).verdict == NO_CELLS


def test_predict_specimen_names_the_field_that_a_warning_is_of():
    fields = [("a.tif", Decoded(field("NuMem"), ())), ("b.tif", Decoded(field("NuMem"), ("the file has 2 planes",)))]
    assert "b.tif: the file has 2 planes" in predict_specimen(SURE["NuMem"], fields).warnings


def test_predict_specimen_takes_arrays_without_a_name_and_another_classifier(bundled):
    def elsewhere(cells: list) -> list[Prediction]:
        return SURE["Golgi"].classify_cells(cells)

    specimen = predict_specimen(bundled, [field("NuMem")], classify_cells=elsewhere)
    assert specimen.files == ["field 1"]
    assert specimen.counts["Golgi"] == len(specimen.cells) - specimen.as_dict()["mitotic"]


def test_the_pixel_size_of_a_file_is_used_and_can_be_overridden():
    decoded = Decoded(field("NuMem"), (), pixel_size=0.15)
    for given, used in ((None, 0.15), (0.18, 0.18)):
        specimen = predict_specimen(SURE["NuMem"], [("a", decoded)], pixel_size=given)
        assert specimen.as_dict()["pixel_size"] == [used]
        assert specimen.verdict == "NuMem"


def test_predict_specimen_names_the_field_that_cannot_be_read():
    with pytest.raises(FileNotFoundError, match=r"^nowhere\.png: there is no such file"):
        predict_specimen(SURE["NuMem"], ["nowhere.png"])
    with pytest.raises(ValueError, match=r"^b: .*not an image"):
        predict_specimen(SURE["NuMem"], [("a", field("NuMem")), ("b", b"nothing of the kind")])
    with pytest.raises(ValueError, match=r"of one field, give \[field\]"):
        predict_specimen(SURE["NuMem"], "field.png")


@pytest.mark.parametrize("pixel_size", [0.0, float("inf"), float("nan"), 100.0])
def test_predict_specimen_takes_no_absurd_pixel_size(pixel_size):
    with pytest.raises(ValueError, match="give micrometres"):
        read(SURE["NuMem"], field("NuMem"), pixel_size=pixel_size)


@pytest.mark.slow
def test_predict_specimen_says_when_there_is_no_pattern(bundled):
    random = np.random.default_rng(0)
    for nothing in (skimage.data.page(), random.normal(100, 10, (480, 640))):
        assert read(bundled, nothing.astype(np.float32)).verdict in (NO_PATTERN, NO_CELLS, NEGATIVE, UNCLEAR)
    one = read(bundled, synthetic_cell("NuMem", random))
    assert one.verdict == NO_CELLS
    assert "no larger than one cell" in one.warnings[0]


def verdict_of(image: np.ndarray, predictor: Saying) -> tuple[str, str]:
    """Return the verdict, and all warnings as one text."""
    specimen = read(predictor, image)
    return specimen.verdict, "; ".join(specimen.warnings)


@pytest.mark.parametrize(
    ("image", "predictor", "verdict", "why"),
    [
        (lambda: field("NuMem"), Saying({"NuMem": 0.95}, rejected=True), NO_PATTERN, "show none of the six patterns"),
        (lambda: field("NuMem"), Saying({"NuMem": 0.4, "Speckled": 0.35}), UNCLEAR, "NuMem has 40% and Speckled 35%"),
        (lambda: field("NuMem"), Saying({"NuMem": 0.6}), "NuMem", "low confidence"),
        # Their light is weak as well: what shows no pattern is called negative, and the reason is given.
        (lambda: field("Golgi", nucleus=45.0), SURE["NuMem"], NEGATIVE, "outside the nuclei"),
        (lambda: field("AC-13 PCNA-like", density=0.7), SURE["Speckled"], NEGATIVE, "by the cell cycle"),
        (lambda: field("NuMem", density=0.25), SURE["NuMem"], "NuMem", "rests on few"),
    ],
)
def test_a_verdict_says_what_speaks_against_it(image: Callable, predictor, verdict, why):
    found, warnings = verdict_of(image(), predictor)
    assert found == verdict
    assert why in warnings


def test_a_second_pattern_is_named_where_it_is_really_there():
    fields = [field("NuMem", seed, shape=(360, 480), nucleus=45.0) for seed in range(5)]
    three_of_five = [{"NuMem": 0.9}, {"Speckled": 0.9}, {"NuMem": 0.9}, {"Speckled": 0.9}, {"NuMem": 0.9}]
    mixed = read(Saying(*three_of_five), *fields)
    assert (mixed.verdict, mixed.second) == ("NuMem", "Speckled")
    assert any("mixed: Speckled is there too" in warning for warning in mixed.warnings)
    assert read(SURE["NuMem"], field("NuMem")).second is None


def test_mitoses_settle_what_they_can():
    stained = field("Homogeneous", mitoses=0.3)
    specimen = read(Saying({"NuMem": 0.5, "Homogeneous": 0.4}), stained)
    assert specimen.mitoses["stained"] >= 2
    assert specimen.verdict == "Homogeneous"
    assert any("stained, as of Homogeneous" in warning for warning in specimen.warnings)
    # Between Speckled and Homogeneous lies AC-2, whose chromatin is stained as well.
    for said in ({"Speckled": 0.6, "Homogeneous": 0.3}, {"Speckled": 0.95}):
        verdict, warnings = verdict_of(stained, Saying(said))
        assert verdict == UNCLEAR
        assert "Speckled" in warnings


def test_nuclei_of_few_pixels_tell_no_speckles_from_an_even_stain():
    tiny = reduce_field(field("Homogeneous", density=0.7).astype(np.uint8), [], 11 / 60)[0]
    assert verdict_of(np.pad(tiny, 30), SURE["Speckled"])[0] not in CLASS_NAMES


@pytest.mark.parametrize(("pattern", "kind"), [("Homogeneous", "stained"), ("Nucleolar", "unstained")])
def test_mitoses_are_told_by_their_shape_and_by_their_chromatin(pattern, kind):
    image, cells = field_of(pattern, 3, shape=(600, 800), density=0.6, mitoses=0.2)
    found = find_cells(image)
    told = measure_stain(image, found).mitoses
    right = 0
    for cell, mitosis in zip(found.cells, told, strict=True):
        there = any(one.mitotic and overlap(cell.bbox, one.bbox) > 0.3 for one in cells)
        assert mitosis in ((kind, None) if there else (None,))
        right += mitosis is not None
    assert right >= 0.6 * sum(cell.mitotic for cell in cells) > 0


def test_rows_and_overlay_number_the_cells_alike():
    image = field("NuMem", mitoses=0.2)
    specimen = read(SURE["NuMem"], image, pixel_size=0.15)
    header, *rows = specimen_rows(specimen)
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["cell"] for row in table] == [cell.number for cell in specimen.cells]
    assert {row["specimen"] for row in table} == {"NuMem"}
    assert {row["revision"] for row in table} == {"none"}
    drawn = np.asarray(draw_overlay(specimen, image))
    assert drawn.shape[1:] == (640, 3)
    assert drawn.shape[0] > 480  # verdict, legend and scale bar are below
    assert (drawn[:480, :, 0] != drawn[:480, :, 1]).any()
    assert (drawn[480:] == 255).all(-1).any()


def test_specimen_reads_paths(tmp_path, bundled):
    with pytest.raises(FileNotFoundError):
        predict_specimen(bundled, [tmp_path / "missing.tif"])
