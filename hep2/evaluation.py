"""Metrics, calibration and figures: all from probabilities and labels, whatever model they come from."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from torch import Tensor

from hep2.patterns import CLASS_NAMES, DEFAULT_DATASET, MODEL_TITLES, REFERENCE_RESULTS

CALIBRATION_BINS = 15


def metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict:
    """Measure probabilities (cells, 6) against labels (cells,); returns plain numbers, in [0, 1] but for the counts.

    `mean_class_accuracy` is the mean of the classes' recalls. In `confusion`, rows are the true classes. A class
    without a cell or without a prediction has precision, recall and F1 of 0.
    """
    verdicts, every = probabilities.argmax(1), np.arange(len(CLASS_NAMES))
    per_class = precision_recall_fscore_support(labels, verdicts, labels=every, zero_division=0)
    macro = precision_recall_fscore_support(labels, verdicts, labels=every, average="macro", zero_division=0)
    present = np.isin(every, labels)
    return {
        "accuracy": float(accuracy_score(labels, verdicts)),
        # Over the classes that have cells: a class that is absent cannot be missed.
        "mean_class_accuracy": float(per_class[1][present].mean()),
        "macro_precision": float(macro[0]),
        "macro_recall": float(macro[1]),
        "macro_f1": float(macro[2]),
        "ece": expected_calibration_error(probabilities, labels),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for name, p, r, f, s in zip(CLASS_NAMES, *per_class, strict=True)
        },
        "confusion": confusion_matrix(labels, verdicts, labels=every).tolist(),
        "reliability": reliability(probabilities, labels),
    }


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> list[dict]:
    """Sort cells by the verdict's probability into 15 equal bins; returns a record of each bin that has cells."""
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    count = np.bincount(bins, minlength=CALIBRATION_BINS)
    divisor = np.maximum(count, 1)
    mean_confidence = np.bincount(bins, confidence, CALIBRATION_BINS) / divisor
    accuracy = np.bincount(bins, right, CALIBRATION_BINS) / divisor
    return [
        {"probability": float(mean_confidence[i]), "accuracy": float(accuracy[i]), "cells": int(count[i])}
        for i in np.flatnonzero(count)
    ]


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean gap between a verdict's probability and how often it is right (Naeini et al. 2015)."""
    bins = reliability(probabilities, labels)
    gaps = sum(row["cells"] * abs(row["probability"] - row["accuracy"]) for row in bins)
    return gaps / max(1, len(labels))


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature that gives logits (cells, 6) the smallest cross-entropy (Guo et al. 2017).

    `targets` are labels, int64 of shape (cells,), or probabilities (cells, 6) to match.
    """
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logits = logits.double().clone()  # what was computed in inference mode takes part in no gradient
    targets = targets.double().clone() if targets.is_floating_point() else targets
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits / log_temperature.exp(), targets)
        value.backward()
        return value

    optimizer.step(loss)
    return round(log_temperature.exp().item(), 6)


def comparison_table(models: dict[str, dict], dataset: str = DEFAULT_DATASET) -> str:
    """Set the figures of each model beside the reference's (its Table 3 and the weak spots of its Tables 4 to 7).

    Figures on another `dataset` than the published cells stand alone: the reference's are of those.
    """
    columns = ("accuracy", "mean_class_accuracy", "macro_precision", "macro_recall", "macro_f1")
    lines = ["model           accuracy  mean class  precision  recall     F1         Golgi recall  Speckled F1  ECE"]
    for name, result in models.items():
        cells = [f"{result[column]:.4f}" for column in columns]
        golgi, speckled = result["per_class"]["Golgi"]["recall"], result["per_class"]["Speckled"]["f1"]
        lines.append(
            f"{MODEL_TITLES[name]:16}{cells[0]:10}{cells[1]:12}{cells[2]:11}{cells[3]:11}{cells[4]:11}"
            f"{golgi:<14.4f}{speckled:<13.4f}{result['ece']:.4f}"
        )
        if dataset != DEFAULT_DATASET:
            continue
        source = REFERENCE_RESULTS[name]
        lines.append(
            f"  reference     {source['accuracy']:<10.2f}{'':12}{source['macro_precision']:<11.2f}"
            f"{source['macro_recall']:<11.2f}{source['macro_f1']:<11.2f}{source['golgi_recall']:<14.2f}"
            f"{source['speckled_f1']:.2f}"
        )
    return "\n".join(lines)


def class_report(result: dict) -> str:
    """Tell precision, recall and F1 of each class in lines of text."""
    lines = [f"{'':14}precision  recall  F1      cells"]
    for name, row in result["per_class"].items():
        lines.append(f"{name:14}{row['precision']:<11.4f}{row['recall']:<8.4f}{row['f1']:<8.4f}{row['support']}")
    return "\n".join(lines)


def draw_confusion(result: dict, title: str) -> Figure:
    """Draw the confusion matrix of one model: shares of the true class as colour, counts as text."""
    counts = np.array(result["confusion"])
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.add_subplot()
    # The errors are a few per cent: on a linear scale they would all look alike.
    picture = axes.imshow(share, cmap="Blues", norm=matplotlib.colors.PowerNorm(0.4, 0, 1))
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if share[row, column] > 0.3 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour)
    axes.set(title=title, xlabel="verdict", ylabel="label")
    axes.set_xticks(range(len(CLASS_NAMES)), CLASS_NAMES, rotation=35, ha="right")
    axes.set_yticks(range(len(CLASS_NAMES)), CLASS_NAMES)
    figure.colorbar(picture, label="share of the label's cells")
    return figure


def draw_reliability(result: dict, title: str) -> Figure:
    """Draw how often a verdict of one model is right against its probability."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="perfectly calibrated")
    bins = result["reliability"]
    points = [(row["probability"], row["accuracy"]) for row in bins]
    axes.plot(*zip(*points, strict=True), marker="o", color="#0072B2", label="measured")
    for point, row in zip(points, bins, strict=True):
        axes.annotate(str(row["cells"]), point, textcoords="offset points", xytext=(4, -10), fontsize=7)
    axes.set(title=f"{title}\ncalibration error {result['ece']:.4f}", xlabel="probability of the verdict")
    axes.set(ylabel="share right", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(loc="upper left")
    return figure


def draw_curves(history: list[dict], title: str) -> Figure:
    """Draw loss and accuracy over the epochs of one training run, from the records of its log."""
    epochs = [record["epoch"] for record in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part, colour in (("train", "#E69F00"), ("validation", "#0072B2")):
            values = [record[f"{part}_{quantity}"] for record in history]
            axes.plot(epochs, values, color=colour, label=part, marker="o" if len(epochs) < 3 else None)
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=120)
