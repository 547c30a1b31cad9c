import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import field_of
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

import hep2
from hep2.images import Cell, Decoded
from hep2.patterns import CLASS_NAMES, PATTERNS
from hep2.predictor import Explanation, Failure, Prediction
from hep2.ui.fragments import (
    counts_html,
    examples_html,
    image_uri,
    message_html,
    model_details_html,
    models_html,
    report_html,
    specimen_html,
    stretched,
    table_html,
    verdict_html,
)

# Linear RGB as those see it who lack one kind of cones, after Machado, Oliveira and Fernandes (2009).
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def prediction(name="cell.png", *verdicts, warnings=(), sure=0.9, rejected=False) -> Prediction:
    values = {}
    for model, verdict in zip(("cnn", "rescnn", "vit", "ensemble"), verdicts or ["Golgi"] * 4, strict=True):
        values[model] = np.full(6, (1 - sure) / 5)
        values[model][CLASS_NAMES.index(verdict)] = sure
    return Prediction(name, Cell(np.zeros((1, 78, 78), np.float32), warnings), values, 0.0, rejected, {})


def shown(one: Prediction, truth="") -> str:
    maps = dict.fromkeys(one.probabilities, np.ones((78, 78)))
    return verdict_html(Explanation(one, maps), Decoded(np.eye(10, 20, dtype=np.float32), ()), truth)


@pytest.mark.parametrize("sight", SIGHT)
def test_the_patterns_colours_differ_for_everyone(sight):
    colours = np.array([[int(pattern.colour[at : at + 2], 16) / 255 for at in (1, 3, 5)] for pattern in PATTERNS])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.transpose(SIGHT[sight])).clip(0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)[None])[0]
    for number, one in enumerate(lab):
        assert all(deltaE_ciede2000(one, other) > 15 for other in np.delete(lab, number, 0))


def test_verdict_html_shows_verdict_truth_meaning_and_all_models():
    html = shown(prediction(), truth="Golgi cell")
    for text in ("Golgi</h2>", "90.0&nbsp;%", "3 of 3 base models agree", "Golgi cell", "AC-22", "not a diagnosis"):
        assert text in html
    assert html.count('class="bars"') == 4
    assert "10 by" in html
    for name in prediction().probabilities:
        assert html.count(f'data-model="{name}"') == 2


def test_the_ensemble_is_not_counted_as_agreeing_with_itself():
    assert "0 of 3 base models agree" in shown(prediction("a", "NuMem", "NuMem", "Speckled", "Golgi"))


def test_a_prediction_can_be_copied_as_json():
    html = shown(prediction("a&b.png"))
    copied = html.partition('data-copy="')[2].partition('"')[0].replace("&quot;", '"').replace("&amp;", "&")
    assert json.loads(copied) == prediction("a&b.png").as_dict()


def test_names_and_doubts_are_escaped():
    name = "<script>alert(1)</script>.png"
    odd = prediction(name, warnings=("<b>odd</b>",))
    for html in (shown(odd), table_html([odd, Failure(name, "<b>odd</b>")]), message_html("No", "<b>odd</b>", name)):
        assert "<script>" not in html
        assert "<b>odd" not in html


def test_doubts_are_shown_with_the_verdict():
    html = shown(prediction("a", "Golgi", "NuMem", "Golgi", "Golgi", warnings=("small",), sure=0.5))
    for text in ("Small.", "Disagreement: ResCNN says NuMem.", "Low confidence: the verdict has a probability of 50%."):
        assert f"<li>{text}</li>" in html


def test_a_rejected_image_is_shown_without_verdict_and_meaning():
    html = shown(prediction(rejected=True))
    assert 'class="reading rejected"' in html
    assert "No verdict" in html
    assert "ICAP" not in html


def test_many_predictions_get_counts_and_rows_the_doubtful_first_where_not_all_are_shown(monkeypatch):
    some = [prediction(), prediction("b", rejected=True), Failure("c", "why")]
    assert "2 cells, 1 not read" in counts_html(some)
    html = table_html(some)
    assert (html.count("<details"), html.count("doubtful"), "why" in html) == (2, 2, True)
    monkeypatch.setattr("hep2.ui.fragments.MAX_ROWS", 2)
    html = table_html(some)
    assert "2 of 3, doubtful ones first" in html
    assert ">cell.png<" not in html


def test_examples_are_rows_of_named_buttons():
    images = [("Golgi-1", "Golgi", "Golgi 1", np.eye(78)), ("Golgi-2", "Golgi", "Golgi 2", np.eye(78))]
    html = examples_html(images, "cells")
    assert html.count("<h2>Golgi</h2>") == 1
    assert 'data-click="Golgi-2" aria-pressed="false" aria-label="Classify example Golgi 2"' in html


@pytest.mark.parametrize("shape", [(78, 78), (1, 2000), (900, 1000)])
def test_any_image_is_scaled_into_view(shape):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 1000
    assert (stretched(image).min(), stretched(image).max()) == (0, 1)
    uri = image_uri(stretched(image), largest=320)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert max(picture.size) <= 320


def test_a_specimen_is_shown_with_its_cells_and_makes_a_report(bundled):
    image, _ = field_of("NuMem")
    specimen = bundled.specimen([("<field>.png", image)])
    html = specimen_html(specimen, [image])
    assert html.count("<polygon") == html.count('class="small-card"') == len(specimen.cells)
    assert "95 % bootstrap interval" in html
    assert "<field>" not in html
    report = report_html(specimen, html, "p { margin: 0 }", "2026-01-31")
    assert report.startswith("<!DOCTYPE html>")
    for text in ("2026-01-31", "Not for", specimen.weights["revision"], "<polygon"):
        assert text in report


def result_of(accuracy: float) -> dict:
    row = {"precision": 1.0, "recall": 0.5, "f1": 0.6667, "support": 1234}
    return {
        **dict.fromkeys(("accuracy", "mean_class_accuracy", "macro_f1"), accuracy),
        "ece": 0.0123,
        "per_class": dict.fromkeys(CLASS_NAMES, row),
        "confusion": np.eye(6, dtype=int).tolist(),
        "reliability": [{"probability": 0.9, "accuracy": 0.8, "cells": 10}],
    }


def test_models_html_begins_with_new_patients_and_copes_with_what_was_not_measured(untrained):
    weights = hep2.load(untrained, "cpu").weights
    assert "not measured" in models_html(weights)
    assert weights.revision in models_html(weights)
    models = dict.fromkeys(("cnn", "rescnn", "vit", "ensemble"), result_of(0.9876))
    held_out = dict.fromkeys(models, result_of(0.8765))
    specimen = {"models": held_out, "blocks": {"ensemble": {"right": 66, "total": 73, "accuracy": 0.9}}}
    specimen["shifted"] = {"models": dict.fromkeys(models, result_of(0.7654))}
    html = models_html(replace(weights, metrics={"models": models, "specimen": specimen}))
    assert '<h2 class="name">On a new patient: 66 of 73 specimens right' in html
    assert (html.count("0.988"), html.count("0.876"), html.count("0.765")) == (8, 4, 4)
    models_html(replace(weights, metrics={"models": models, "specimen": None}))


def test_model_details_draw_confusion_calibration_and_curves(untrained, tmp_path):
    weights = hep2.load(untrained, "cpu").weights
    record = {f"{part}_{quantity}": 0.5 for part in ("train", "validation") for quantity in ("loss", "accuracy")}
    for name in ("cnn", "rescnn", "vit", "ensemble"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps({"epoch": n} | record) + "\n" for n in (1, 2)))
    metrics = {"models": dict.fromkeys(("cnn", "rescnn", "vit", "ensemble"), result_of(0.9))}
    html = model_details_html(replace(weights, folder=tmp_path, metrics=metrics))
    assert html.count('class="plate"') == 12
    assert "2 epochs" in html
