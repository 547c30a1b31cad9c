import base64
import io

import numpy as np
import pytest
from PIL import Image

from hep2.imaging import Cell
from hep2.patterns import CLASS_NAMES
from hep2.reader import Explanation, Failure, Reading
from hep2.views import counts_html, doubts_of, failure_html, models_html, picture, preview, verdict_html
from hep2.weights import load_weights


def reading(name="cell.png", *verdicts, warnings=(), sure=0.9) -> Reading:
    values = {}
    for model, verdict in zip(("cnn", "rescnn", "vit", "ensemble"), verdicts or ["Golgi"] * 4, strict=True):
        values[model] = np.full(6, (1 - sure) / 5)
        values[model][CLASS_NAMES.index(verdict)] = sure
    return Reading(name, Cell(np.zeros((1, 78, 78), np.float32), warnings), values, {})


def page_of(one: Reading, models=("cnn", "vit"), label="") -> str:
    maps = dict.fromkeys(one.probabilities, np.ones((78, 78)))
    return verdict_html(Explanation(one, maps), np.eye(10, 20, dtype=np.float32), list(models), label)


def test_verdict_html_shows_verdict_label_meaning_and_the_chosen_models_alone():
    html = page_of(reading(), label="Golgi cell")
    for text in ("Golgi</p>", "90.0%", "4 of 4 models agree", "Golgi cell", "AC-22", "not a diagnosis", "10 by"):
        assert text in html
    assert html.count('class="bars"') == 2
    assert "<h3>ViT</h3>" in html
    assert "<h3>ResCNN</h3>" not in html


def test_names_and_doubts_are_escaped():
    name = "<script>alert(1)</script>.png"
    assert "<script>" not in page_of(reading(name, warnings=("<b>odd</b>",)))
    assert "<script>" not in failure_html(Failure(name, "<b>odd</b>"))
    assert "<b>" not in failure_html(Failure(name, "<b>odd</b>"))


def test_doubts_name_dissent_low_confidence_and_the_images_faults():
    assert doubts_of(reading()) == []
    doubts = doubts_of(reading("a", "Golgi", "NuMem", "Golgi", "Golgi", warnings=("small",), sure=0.5))
    assert doubts == ["small", "The models disagree: ResCNN says NuMem.", "Low confidence: the verdict has 50%."]


def test_counts_html_counts_verdicts_and_failures():
    html = counts_html([reading(), reading("b"), Failure("c", "why")])
    assert "2 cells" in html
    assert "1 could not be read" in html


@pytest.mark.parametrize("shape", [(78, 78), (1, 2000), (900, 1000)])
def test_preview_scales_any_image_into_view(shape):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 1000
    small = preview(image)
    assert max(small.shape) <= 320
    assert small.min() == 0
    assert small.max() == 1


def test_picture_is_a_png_in_a_data_uri():
    uri = picture(np.array([[0.0, 1.0], [2.0, -1.0]]))
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    np.testing.assert_array_equal(np.asarray(image), [[0, 255], [255, 0]])


def test_models_html_shows_the_sources_figures_and_the_revision(untrained):
    weights = load_weights(untrained)
    html = models_html(weights)
    assert weights.revision in html
    assert html.count("the source's") == 4
