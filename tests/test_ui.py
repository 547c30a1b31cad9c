import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hep2.imaging import Cell
from hep2.patterns import CLASS_NAMES
from hep2.reader import Explanation, Failure, Reading
from hep2.views import (
    counts_html,
    failure_html,
    model_details_html,
    models_html,
    picture,
    preview,
    verdict_html,
)
from hep2.weights import load_weights


def reading(name="cell.png", *verdicts, warnings=(), sure=0.9, refused=False) -> Reading:
    values = {}
    for model, verdict in zip(("cnn", "rescnn", "vit", "ensemble"), verdicts or ["Golgi"] * 4, strict=True):
        values[model] = np.full(6, (1 - sure) / 5)
        values[model][CLASS_NAMES.index(verdict)] = sure
    return Reading(name, Cell(np.zeros((1, 78, 78), np.float32), warnings), values, refused, {})


def page_of(one: Reading, truth="") -> str:
    maps = dict.fromkeys(one.probabilities, np.ones((78, 78)))
    return verdict_html(Explanation(one, maps), np.eye(10, 20, dtype=np.float32), truth)


def test_verdict_html_shows_verdict_truth_meaning_and_all_models():
    html = page_of(reading(), truth="Golgi cell")
    for text in ("Golgi</p>", "90.0%", "4 of 4 models agree", "Golgi cell", "AC-22", "not a diagnosis", "10 by"):
        assert text in html
    assert html.count('class="bars"') == 4
    for name in reading().probabilities:
        assert html.count(f'data-model="{name}"') == 2


def test_names_and_doubts_are_escaped():
    name = "<script>alert(1)</script>.png"
    assert "<script>" not in page_of(reading(name, warnings=("<b>odd</b>",)))
    assert "<script>" not in failure_html(Failure(name, "<b>odd</b>"))
    assert "<b>" not in failure_html(Failure(name, "<b>odd</b>"))


def test_doubts_are_shown_with_the_verdict():
    html = page_of(reading("a", "Golgi", "NuMem", "Golgi", "Golgi", warnings=("small",), sure=0.5))
    for text in ("Small.", "Disagreement: ResCNN says NuMem.", "Low confidence: the verdict has a probability of 50%."):
        assert f"<li>{text}</li>" in html


def test_a_refused_image_is_shown_without_verdict_and_meaning():
    html = page_of(reading(refused=True))
    assert "No verdict" in html
    assert "Refused: this does not look like a HEp-2 cell" in html
    assert "ICAP" not in html
    assert "90.0% by" not in html


def test_counts_html_counts_verdicts_and_failures():
    html = counts_html([reading(), reading("b", refused=True), Failure("c", "why")])
    assert "2 cells" in html
    assert "1 got no verdict" in html
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


def result_of(accuracy: float) -> dict:
    row = {"precision": 1.0, "recall": 0.5, "f1": 0.6667, "support": 1234}
    return {
        **dict.fromkeys(("accuracy", "mean_class_accuracy", "macro_f1"), accuracy),
        "ece": 0.0123,
        "per_class": dict.fromkeys(CLASS_NAMES, row),
        "confusion": np.eye(6, dtype=int).tolist(),
        "reliability": [{"probability": 0.9, "accuracy": 0.8, "cells": 10}],
    }


def test_models_html_sets_random_split_held_out_specimens_and_source_side_by_side(untrained):
    weights = load_weights(untrained)
    assert weights.revision in models_html(weights)
    assert "Held-out specimens were not measured" in models_html(weights)
    names = list(weights.models)
    specimen = {
        "refused": 0.02,
        "folds": 4,
        "recipe": "tuned",
        "changes": {"epochs": 12},
        "models": dict.fromkeys(names, result_of(0.8765)),
        "blocks": {key: {"accuracy": 0.9, "right": 66, "total": 73, "wrong": []} for key in names},
    }
    measured = replace(
        weights, metrics={"test_size": 60, "models": dict.fromkeys(names, result_of(0.9876)), "specimen": specimen}
    )
    html = models_html(measured)
    assert (html.count("0.9876"), html.count("0.8765"), html.count("0.95<")) == (12, 12, 3)
    assert "66 of 73" in html
    assert "models of the recipe tuned, 12 epochs each" in html
    assert "not measured" not in html
    assert "own recipe" not in html
    own = {"recipe": "robust", "models": dict.fromkeys(names, result_of(0.7654))}
    html = models_html(replace(measured, metrics=measured.metrics | {"specimen_own": specimen | own}))
    assert (
        "own recipe does otherwise: models of the recipe robust, 12 epochs each, have a mean class accuracy of" in html
    )
    assert html.count("0.7654") == 1


def test_model_details_show_classes_confusion_calibration_and_curves(untrained, tmp_path):
    weights = load_weights(untrained)
    record = {f"{part}_{quantity}": 0.5 for part in ("train", "validation") for quantity in ("loss", "accuracy")}
    for name in weights.models:
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps({"epoch": n} | record) + "\n" for n in (1, 2)))
    measured = replace(weights, folder=tmp_path, metrics={"models": dict.fromkeys(weights.models, result_of(0.9))})
    html = model_details_html(measured)
    assert html.count('class="confusion"') == html.count("1,234</td>") / 6 == 4
    assert html.count('class="plate"') == 8
    assert "2 epochs" in html
