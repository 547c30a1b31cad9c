import numpy as np
import pytest
import torch

from hep2.evaluation import (
    class_report,
    comparison_table,
    draw_confusion,
    draw_curves,
    draw_reliability,
    expected_calibration_error,
    fit_temperature,
    metrics,
    reliability,
    save_figure,
)
from hep2.patterns import CLASS_NAMES, MODEL_TITLES

LABELS = np.repeat(np.arange(6), 10)


def sure_of(verdicts: np.ndarray, probability: float = 0.9) -> np.ndarray:
    rest = (1 - probability) / 5
    return np.where(np.eye(6)[verdicts] == 1, probability, rest)


def test_metrics_of_known_verdicts():
    verdicts = LABELS.copy()
    verdicts[10:15] = 0  # half of the Golgi cells are taken for Centromere
    result = metrics(sure_of(verdicts), LABELS)
    assert result["accuracy"] == pytest.approx(55 / 60)
    assert result["mean_class_accuracy"] == result["macro_recall"] == pytest.approx(5.5 / 6)
    assert result["per_class"]["Golgi"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 10}
    assert result["per_class"]["Centromere"]["precision"] == pytest.approx(10 / 15)
    assert result["macro_precision"] == pytest.approx((5 + 10 / 15) / 6)
    assert result["confusion"][1] == [5, 5, 0, 0, 0, 0]
    assert list(result["per_class"]) == list(CLASS_NAMES)
    assert result["ece"] == pytest.approx(abs(55 / 60 - 0.9))


def test_metrics_leaves_absent_classes_out_of_the_mean_class_accuracy():
    result = metrics(sure_of(LABELS[:20]), LABELS[:20])
    assert result["mean_class_accuracy"] == 1
    assert result["macro_recall"] == pytest.approx(2 / 6)


def test_expected_calibration_error_weighs_bins_by_their_cells():
    probabilities = np.concatenate([sure_of(LABELS[:30], 0.95), sure_of(LABELS[30:], 0.55)])
    verdicts_right = np.ones(60, bool)
    verdicts_right[30:45] = False
    labels = np.where(verdicts_right, LABELS, (LABELS + 1) % 6)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_fit_temperature_finds_the_temperature_the_labels_were_drawn_with(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 6, generator=generator)
    labels = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_reliability_counts_every_cell_once():
    bins = reliability(np.concatenate([sure_of(LABELS, 0.95), sure_of(LABELS, 0.55)]), np.tile(LABELS, 2))
    assert [row["cells"] for row in bins] == [len(LABELS)] * 2
    assert [row["probability"] for row in bins] == pytest.approx([0.55, 0.95])
    assert [row["accuracy"] for row in bins] == [1, 1]


def test_fit_temperature_finds_the_temperature_of_probabilities_too():
    logits = 3 * torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    assert fit_temperature(logits, (logits / 2.5).softmax(1)) == pytest.approx(2.5, rel=1e-3)


def test_fit_temperature_takes_what_was_computed_in_inference_mode():
    with torch.inference_mode():
        logits = 3 * torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    assert fit_temperature(logits, logits.argmax(1)) < 1


def test_comparison_table_sets_the_references_figures_beside_ours_on_its_own_cells_alone():
    result = metrics(sure_of(LABELS), LABELS)
    table = comparison_table(dict.fromkeys(MODEL_TITLES, result))
    assert table.count("1.0000") == 4 * 7
    assert table.count("reference") == 4
    assert "0.95" in table
    alone = comparison_table({"vit": result}, "synthetic:40")
    assert len(alone.splitlines()) == 2
    assert "reference" not in alone


def test_class_report_has_a_line_a_class():
    header, *lines = class_report(metrics(sure_of(LABELS[:20]), LABELS[:20])).splitlines()
    assert header.split() == ["precision", "recall", "F1", "cells"]
    assert [line.split()[0] for line in lines] == list(CLASS_NAMES)
    assert lines[0].split()[1:] == ["1.0000", "1.0000", "1.0000", "10"]
    assert lines[5].split()[1:] == ["0.0000", "0.0000", "0.0000", "0"]


def test_figures_are_written_as_png(tmp_path):
    probabilities = sure_of(LABELS)
    record = {"train_loss": 1.0, "validation_loss": 1.0, "train_accuracy": 0.5, "validation_accuracy": 0.5}
    figures = [
        draw_confusion(metrics(probabilities, LABELS), "a"),
        draw_reliability(metrics(probabilities, LABELS), "b"),
        draw_curves([{"epoch": 1, **record}, {"epoch": 2, **record}], "c"),
    ]
    for number, figure in enumerate(figures):
        save_figure(figure, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
