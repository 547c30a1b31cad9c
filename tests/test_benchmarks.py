"""The other benchmarks, on a few synthetic cells and fields; nothing here depends on how fast the machine is."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import field_of, small_classifier
from PIL import Image
from torch import nn

import hep2
from benchmarks import corruptions, dataset, rejection, speed, strangers
from hep2.patterns import CLASS_NAMES, MODEL_TITLES
from hep2.rejection.negatives import NEGATIVES
from hep2.synthetic import synthetic_files


def test_audit_finds_duplicates_their_parts_and_their_labels(synthetic_cells):
    plain = dataset.audit(synthetic_cells)
    assert plain["classes"] == dict.fromkeys(CLASS_NAMES, 12)
    assert (plain["duplicates"], plain["pairs"]) == (0, [])
    digests, count = synthetic_cells.digests, len(synthetic_cells)
    repeated = replace(
        synthetic_cells,
        digests=(digests[0], digests[0], *digests[2:-1], digests[0]),
        parts=("train",) * (count - 1) + ("test",),
    )
    result = dataset.audit(repeated)
    first, second, last = (synthetic_cells.names[position] for position in (0, 1, -1))
    assert result["pairs"] == [[first, second], [first, last]]
    assert (result["duplicates_across_parts"], result["duplicates_of_another_class"]) == (1, 1)
    assert result["parts"] == {"train": count - 1, "test": 1}


def test_dataset_prints_what_is_in_it(capsys):
    assert dataset.main(["--dataset", "synthetic:2"]) == 0
    assert "synthetic:2: 12 cells" in capsys.readouterr().out


@pytest.fixture(scope="module")
def drawn() -> tuple[list[np.ndarray], np.ndarray]:
    """Two cells of each pattern as published, and their labels."""
    return [image for _, image, _ in synthetic_files(2, seed=4)], np.repeat(np.arange(6), 2)


def test_every_corruption_is_measured_and_deeper_files_change_nothing(bundled, drawn):
    result = corruptions.measure_corruptions(bundled, *drawn)
    assert list(result) == list(corruptions.CORRUPTIONS)
    assert all(set(row) == {*MODEL_TITLES, "rejected"} for row in result.values())
    assert result["16 bits"] == result["as published"]


@pytest.mark.slow
def test_every_kind_of_negative_is_measured(bundled, drawn):
    cells = np.stack(drawn[0]).astype(np.float32) / 255
    result = corruptions.measure_negatives(bundled, cells, each=2)
    assert set(result) == {*corruptions.PICTURES, *NEGATIVES}
    assert [kind for kind, row in result.items() if not row["learned"]] == list(corruptions.PICTURES)
    assert all(row["images"] == 2 for row in result.values())


@pytest.mark.parametrize("image", [np.full((100, 100), 9.0), np.full((78, 78), 4095.0), np.full((78, 78), -1.0)])
def test_cells_of_another_size_or_range_are_not_corrupted(bundled, image):
    with pytest.raises(ValueError, match="can be corrupted"):
        corruptions.measure_corruptions(bundled, [image], np.zeros(1))


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_corruptions_do_not_depend_on_earlier_ones(name):
    image = np.random.default_rng(0).integers(0, 256, (78, 78)).astype(float)
    one, other = (corruptions.CORRUPTIONS[name](image, np.random.default_rng(1)) for _ in range(2))
    assert one == other if isinstance(one, bytes) else (one == other).all()


def test_corruptions_are_set_out_in_markdown(untrained, capsys, monkeypatch):
    row = {"images": 4, "rejected": 0.5, "learned": True}
    monkeypatch.setattr(corruptions, "measure_negatives", lambda *_: {"noise": row})
    assert corruptions.main(["--dataset", "synthetic:10", "--weights", str(untrained)]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert len({row.count("|") for row in first.splitlines()}) == 1
    assert second.splitlines()[-1] == "| noise | 4 | 0.5000 | yes |"


def test_scores_of_rejection_are_compared_on_the_same_images(synthetic_cells):
    classifier, images = small_classifier(), synthetic_cells.images
    noise = torch.rand(24, 1, 78, 78, generator=torch.Generator().manual_seed(0))
    train = (images[::2], synthetic_cells.labels[::2])
    cells = {"test cells": images[1::2], "shifted": images[1::2]}
    result = rejection.compare(classifier, train, cells, {"noise": noise, "cells": images[1::2]})
    assert tuple(result) == rejection.SCORES
    for row in result.values():
        assert row["area, test cells / cells"] == pytest.approx(0.5)
        assert row["area, test cells / noise"] == row["area, shifted / noise"]
        assert row["cells rejected"] == pytest.approx(rejection.REJECTED_VALIDATION, abs=0.03)
    assert result["Mahalanobis"]["area, shifted / noise"] > 0.99


def test_rejection_prints_every_score(untrained, capsys):
    assert rejection.main(["--dataset", "synthetic:10", "--weights", str(untrained), "--count", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in lines[2:]] == list(rejection.SCORES)


def test_strangers_totals_and_areas():
    def row(answer: str, verdict: str, alone: str | None, score: float) -> dict:
        known = {"answer": answer, "verdict": verdict, "alone": alone, "cells": int(alone is not None)}
        return known | {"rejected": 1 - score, "top": score, "rejection": score if alone else None}

    rows = [
        row("Golgi", "Golgi", "Golgi", 0.9),
        row("Golgi", "no pattern of the six", "Golgi", 0.4),
        row(strangers.OTHER, "Speckled", "Speckled", 0.5),
        row(strangers.OTHER, "no cells found", None, 0.0),
    ]
    result = strangers.summarise(rows)
    assert (result["six patterns"], result["right"], result["right alone"]) == (2, 1, 2)
    assert (result["others"], result["others right"]) == (2, 1)
    assert set(result["area under the curve"].values()) == {0.75}


def test_strangers_reads_fields_and_reference_pictures(tmp_path, untrained, capsys):
    field = field_of("Nucleolar")[0].astype(np.uint8)
    for path in (tmp_path / "fields" / "NUC-1.png", tmp_path / "pictures" / "ac-8" / "1.png"):
        path.parent.mkdir(parents=True)
        Image.fromarray(field).save(path)
    nothing = np.random.default_rng(0).poisson(9, (60, 60)).astype(np.uint8)
    Image.fromarray(nothing).save(tmp_path / "fields" / "NEG-1.png")
    (tmp_path / "fields" / "README.md").write_text("what is in it")
    folders = ["--fields", str(tmp_path / "fields"), "--reference-pictures", str(tmp_path / "pictures")]
    assert strangers.main([*folders, "--weights", str(untrained), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    negative, nucleolar = result["fields"]["images"]
    assert (negative["image"], negative["answer"], negative["alone"]) == ("fields/NEG-1.png", strangers.OTHER, None)
    assert (nucleolar["answer"], result["reference pictures"]["images"][0]["answer"]) == ("Nucleolar", "Nucleolar")
    assert nucleolar["cells"] > 3
    assert nucleolar["alone"] in CLASS_NAMES
    assert result["reference pictures"]["area under the curve"] == dict.fromkeys(strangers.SCORES)  # of ours alone
    assert "| fields/NUC-1.png | Nucleolar |" in strangers.tables("fields", result["fields"])


def test_strangers_asks_for_a_folder(monkeypatch, capsys):
    for variable in ("HEP2_FIELDS", "HEP2_REFERENCE_PICTURES"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SystemExit):
        strangers.main([])
    assert "give --fields or --reference-pictures" in capsys.readouterr().err


def test_multiply_adds_are_counted():
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    assert speed.multiply_adds(layer, torch.rand(1, 3, 10, 10)) == 10 * 10 * 5 * 3 * 9


@pytest.mark.slow
def test_speed_measures_all_sides_and_sets_them_out(untrained, monkeypatch):
    for name in ("ROUNDS", "IN_A_ROW", "BULK_ROUNDS"):
        monkeypatch.setattr(speed, name, 1)
    monkeypatch.setattr(speed, "BULK", 8)
    monkeypatch.setattr(speed, "measure_processes", lambda: {speed.OURS: {"seconds": 4.0, "bytes": 10**9}})
    result = speed.measure_speed(hep2.load(untrained, device="cpu"))
    assert {speed.OURS, *speed.PEERS} < set(result["latency"])
    assert {speed.OURS, speed.SMALL_INPUT, *speed.PEERS} < set(result["images_per_second"])
    assert result["multiply_adds"][speed.SMALL_INPUT] < result["multiply_adds"]["resnet18"] / 5
    assert all(row["median"] <= row["percentile_95"] for row in result["latency"].values())
    half = {"images": 9, "images_per_second": {"half": 2.0}, "same_verdicts": 9, "largest_difference": 0.001}
    tables = speed.tables(result | {"half_precision": half})
    assert f"| {speed.OURS} | 4.0 | 1000 |" in tables
    assert "on 9 of 9 cells" in tables


def test_a_process_that_fails_is_no_measurement(monkeypatch):
    monkeypatch.setattr(speed, "STARTS", {"broken": "raise SystemExit('no such thing')"})
    with pytest.raises(RuntimeError, match="no such thing"):
        speed.measure_processes()
