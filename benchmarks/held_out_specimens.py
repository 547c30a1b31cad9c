"""How the models do on specimens they have never seen: the four folds, whole specimens, and a floor to compare with."""

import csv
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from skimage.feature import local_binary_pattern
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hep2.data import FOLDS, Cells, blocks_of, specimen_blocks, split
from hep2.evaluation import (
    draw_reliability,
    expected_calibration_error,
    fit_temperature,
    metrics,
    reliability,
    save_figure,
)
from hep2.files import read_json, write_json
from hep2.models import MODELS, probabilities
from hep2.patterns import CLASS_NAMES, IMAGE_SIZE, MODEL_TITLES
from hep2.pipeline import evaluate_weights, train_models
from hep2.weights import load_weights

NEIGHBOURS = 5
SMALLEST = 1e-7  # probability: `predictions.csv` keeps six digits, and the logarithm wants more than zero


def evaluate_specimens(
    cells: Cells,
    output: Path,
    *,
    names: tuple[str, ...] = tuple(MODELS),
    recipe: str = "tuned",
    seed: int = 0,
    changes: dict | None = None,
    accelerator: Accelerator,
    progress: bool = True,
) -> dict:
    """Train the models on each fold of the protocol `specimen`, and measure them on the specimens kept away.

    Everything lies in `output`, a folder a fold, and what is finished there is not repeated. Returns what
    `output/metrics.json` holds: pooled over all cells (`models`), the same with temperatures that are fitted on new
    specimens (`recalibrated`), per fold (`per_fold`), over whole specimens (`blocks`), and the floor of nearest
    neighbours under both kinds of split (`floor`).
    """
    parts, answers, refused = [], [], []
    for fold in range(FOLDS):
        folder = output / f"fold-{fold}"
        train_models(
            cells,
            folder,
            names=names,
            recipe=recipe,
            protocol="specimen",
            seed=seed,
            fold=fold,
            changes=changes,
            accelerator=accelerator,
            progress=progress,
        )
        if accelerator.is_main_process:
            weights = load_weights(folder, names)
            measured = folder / "metrics.json"
            if not measured.exists() or read_json(measured)["revision"] != weights.revision:
                evaluate_weights(weights, cells, folder)
            parts.append(split(cells, "specimen", seed, fold).test)
            answers.append(read_predictions(folder / "predictions.csv"))
            refused.append(read_json(measured)["refused"] * len(parts[-1]))
        accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}
    result = {"folds": FOLDS, "seed": seed, "recipe": recipe, "changes": changes or {}}
    result |= summarise(cells, parts, answers)
    result["refused"] = sum(refused) / sum(map(len, parts))
    features, labels = simple_features(cells.images[:, 0].numpy()), cells.labels.numpy()
    folds = [split(cells, "specimen", seed, fold) for fold in range(FOLDS)]
    result["floor"] = {
        "clean": nearest_neighbours(features, labels, [split(cells, "clean", seed)]),
        "specimen": nearest_neighbours(features, labels, folds),
    }
    write_json(output / "metrics.json", result)
    for name, measured in result["models"].items():
        title = f"{MODEL_TITLES[name]}, held-out specimens"
        save_figure(draw_reliability(measured, title), output / f"reliability_{name}.png")
        other = draw_reliability(result["recalibrated"][name], f"{title}, recalibrated")
        save_figure(other, output / f"reliability_recalibrated_{name}.png")
    return result


def summarise(cells: Cells, parts: list[np.ndarray], answers: list[dict[str, np.ndarray]]) -> dict:
    """Measure answers, for each fold those of each model, (cells, 6), over cells, folds and whole specimens."""
    labels = cells.labels.numpy()
    test = np.concatenate(parts)
    pooled = {model: np.concatenate([fold[model] for fold in answers]) for model in answers[0]}
    other = {
        model: recalibrated([fold[model] for fold in answers], [labels[part] for part in parts]) for model in pooled
    }
    return {
        "models": {model: metrics(values, labels[test]) for model, values in pooled.items()},
        "recalibrated": {
            model: {
                "ece": expected_calibration_error(values, labels[test]),
                "temperatures": temperatures,
                "reliability": reliability(values, labels[test]),
            }
            for model, (values, temperatures) in other.items()
        },
        "per_fold": [
            {model: metrics(values, labels[part]) for model, values in fold.items()}
            for part, fold in zip(parts, answers, strict=True)
        ],
        "blocks": {model: read_blocks(values, blocks_of(cells)[test]) for model, values in pooled.items()},
    }


def recalibrated(answers: list[np.ndarray], labels: list[np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """Give each fold's probabilities (cells, 6) the temperature that suits the answers of the other folds.

    A model's own temperature is fitted on validation cells of one specimen a class, which are few. Those of the other
    folds' models on specimens new to them are many, and none of them is of this fold. Returns all folds' probabilities
    in a row, and the temperatures, which come on top of the models' own.
    """
    logits = [torch.from_numpy(values).clamp(min=SMALLEST).log() for values in answers]
    result, temperatures = [], []
    for fold, own in enumerate(logits):
        others = [number for number in range(len(logits)) if number != fold]
        known = torch.from_numpy(np.concatenate([labels[number] for number in others]))
        temperatures.append(fit_temperature(torch.cat([logits[number] for number in others]), known))
        result.append(probabilities(own, temperatures[-1]).numpy())
    return np.concatenate(result), temperatures


def read_blocks(answers: np.ndarray, block: np.ndarray) -> dict:
    """Give each specimen block one verdict, from the mean of its cells' probabilities (cells, 6), and count."""
    blocks, wrong = specimen_blocks(), []
    numbers = np.unique(block)
    for number in numbers:
        verdict = CLASS_NAMES[int(answers[block == number].mean(0).argmax())]
        if verdict != blocks[number].class_name:
            wrong.append({"block": blocks[number].name, "verdict": verdict, "cells": int((block == number).sum())})
    right = len(numbers) - len(wrong)
    return {"accuracy": right / len(numbers), "right": right, "total": len(numbers), "wrong": wrong}


def nearest_neighbours(features: np.ndarray, labels: np.ndarray, splits: list) -> dict:
    """Measure five nearest neighbours on `simple_features`, trained and tested by each split, over all test cells."""
    answers = []
    for parts in splits:
        known = np.concatenate([parts.train, parts.validation])
        classifier = make_pipeline(StandardScaler(), KNeighborsClassifier(NEIGHBOURS))
        answers.append(classifier.fit(features[known], labels[known]).predict_proba(features[parts.test]))
    return metrics(np.concatenate(answers), labels[np.concatenate([parts.test for parts in splits])])


def simple_features(images: np.ndarray) -> np.ndarray:
    """Describe images (cells, 78, 78) in [0, 1] by brightness, rings and texture, blind to position and turning.

    Sixteen quantiles, the mean of each of six rings round the centre, and the histograms of local binary patterns
    (Ojala et al. 2002, uniform, eight neighbours) at radii 1, 2 and 4: (cells, 52).
    """
    quantiles = np.quantile(images, np.linspace(0, 1, 16), axis=(1, 2)).T
    rows, columns = np.indices((IMAGE_SIZE, IMAGE_SIZE)) - (IMAGE_SIZE - 1) / 2
    ring = np.minimum(np.hypot(rows, columns) // (IMAGE_SIZE / 12), 5)
    rings = np.stack([images[:, ring == number].mean(1) for number in range(6)], axis=1)
    bytes_ = (images * 255).round().astype(np.uint8)  # the patterns compare neighbours: rounding keeps ties as ties
    textures = [
        [
            np.bincount(local_binary_pattern(image, 8, radius, "uniform").astype(int).ravel(), minlength=10)
            for image in bytes_
        ]
        for radius in (1, 2, 4)
    ]
    return np.concatenate([quantiles, rings, *(np.array(one) / IMAGE_SIZE**2 for one in textures)], axis=1)


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """Read the probabilities of each model, (cells, 6), from a `predictions.csv`."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    models = [column.removesuffix("_verdict") for column in rows[0] if column.endswith("_verdict")]
    return {
        model: np.array([[float(row[f"{model}_{name}"]) for name in CLASS_NAMES] for row in rows]) for model in models
    }


def specimens_table(result: dict) -> str:
    """Set held-out specimens out in lines of text: each fold, all cells, whole specimens, and the floor."""
    lines = [f"{'mean class accuracy':21}" + "".join(f"{name:>11}" for name in result["models"])]
    for fold, models in enumerate(result["per_fold"]):
        lines.append(f"fold {fold:<16}" + "".join(f"{m['mean_class_accuracy']:11.4f}" for m in models.values()))
    for title, kind, field in (
        ("all cells", "models", "mean_class_accuracy"),
        ("accuracy, all cells", "models", "accuracy"),
        ("ECE", "models", "ece"),
        ("ECE, recalibrated", "recalibrated", "ece"),
    ):
        lines.append(f"{title:21}" + "".join(f"{model[field]:11.4f}" for model in result[kind].values()))
    counts = (f"{blocks['right']}/{blocks['total']}" for blocks in result["blocks"].values())
    lines.append(f"{'specimens right':21}" + "".join(f"{count:>11}" for count in counts))
    lines.append(f"{result['refused']:.1%} of the cells on held-out specimens would get no verdict.")
    floor = {kind: values["mean_class_accuracy"] for kind, values in result["floor"].items()}
    lines.append(
        f"Five nearest neighbours on simple features: {floor['clean']:.4f} on a random split, "
        f"{floor['specimen']:.4f} on held-out specimens (mean class accuracy)."
    )
    return "\n".join(lines)
