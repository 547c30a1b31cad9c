"""Which score tells cells of the six patterns from what shows none: the learned layer against three simpler ones.

    python -m benchmarks.rejection --dataset … [--weights …]

All scores are computed from the same weights. The cells are the weights' own test part as they are, and shifted as a
stranger's; with weights of `benchmarks.held_out_specimens` (`--weights DIR/fold-0`) they are of new specimens. The
negatives are drawn as the learned layer's were, with another seed, and cut from pictures of which nothing was learned.
Prints the area under the curve of each pair, and the share of negatives rejected where as many of the shifted cells are
as the package's own threshold rejects. Three minutes of two cores.
"""

import sys

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.common import line, make_parser, own_split, shifted, table
from benchmarks.corruptions import PICTURES, draw_pictures
from hep2.data import load_cells
from hep2.hub import find_weights
from hep2.models import BASE_MODELS, MODELS, Classifier
from hep2.rejection import REJECTED_VALIDATION
from hep2.rejection.negatives import draw_negatives

COUNT = 2000  # cells to fit on, test cells, and negatives of each sort, at most
BATCH = 256
SCORES = ("learned layer", "top probability", "energy", "Mahalanobis")


def main(argv: list[str] | None = None) -> int:
    """Measure every score, and print a table in Markdown; returns the exit status."""
    parser = make_parser(__doc__, weights=True, dataset=True)
    parser.add_argument("--count", type=int, default=COUNT, help="images of each sort, at most")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args(argv)
    weights, cells = find_weights(arguments.weights), load_cells(arguments.dataset)
    parts, random = own_split(weights, cells), np.random.default_rng(arguments.seed)
    train, test = (random.permutation(part)[: arguments.count] for part in (parts.train, parts.test))
    known, images = cells.images[train], cells.images[test]
    known = torch.cat([known, shifted(known, arguments.seed + 1)])
    pictures = [draw_pictures(kind, arguments.count // len(PICTURES), arguments.seed) for kind in PICTURES]
    result = compare(
        weights.classifier,
        (known, cells.labels[train].repeat(2)),
        {"test cells": images, "shifted": shifted(images, arguments.seed)},
        {
            "drawn": torch.from_numpy(draw_negatives(arguments.count, images[:, 0].numpy(), random)[0]),
            "pictures": torch.from_numpy(np.concatenate(pictures)),
        },
    )
    print(table(["score", *next(iter(result.values()))]))
    for name, row in result.items():
        print(line([name, *row.values()]))
    return 0


def compare(
    classifier: Classifier, train: tuple[Tensor, Tensor], cells: dict[str, Tensor], negatives: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Measure how well each of `SCORES` tells each sort of cells from each sort of negatives.

    Parameters
    ----------
    train
        Images and labels that Mahalanobis distances are fitted on.
    cells, negatives
        Images (images, 1, 78, 78) by sort; of the cells, `shifted` gives the threshold.
    """
    fitted = Mahalanobis(seen_in(classifier, train[0])[0], train[1].numpy())

    def scores(images: Tensor) -> dict[str, np.ndarray]:
        features, values = seen_in(classifier, images)
        return values | {"Mahalanobis": fitted(features)}

    cells = {sort: scores(images) for sort, images in cells.items()}
    negatives = {sort: scores(images) for sort, images in negatives.items()}
    result = {}
    for name in SCORES:
        areas = {
            f"area, {one} / {other}": area_under_curve(kept[name], rejected[name])
            for one, kept in cells.items()
            for other, rejected in negatives.items()
        }
        threshold = np.quantile(cells["shifted"][name], REJECTED_VALIDATION)
        shares = {f"{sort} rejected": float((values[name] < threshold).mean()) for sort, values in negatives.items()}
        result[name] = areas | shares
    return result


@torch.inference_mode()
def seen_in(classifier: Classifier, images: Tensor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the three models' features of images, (images, features), and what scores them: (images,) each.

    Every score is higher for what is more like a cell. The energy (Liu et al. 2020) is the mean over the models of the
    log-sum-exp of their logits, without its sign; the top probability (Hendrycks and Gimpel 2017) is the ensemble's.
    """
    features, learned, top, energy = [], [], [], []
    for batch in images.split(BATCH):
        seen = classifier.features(batch)
        answers = classifier.answers(seen)
        features.append(torch.cat(list(seen.values()), dim=1))
        learned.append(answers.rejection)
        top.append(answers.probabilities[:, list(MODELS).index("ensemble")].amax(1))
        logits = torch.stack([getattr(classifier, name).head(seen[name]) for name in BASE_MODELS])
        energy.append(logits.logsumexp(2).mean(0))
    values = {"learned layer": learned, "top probability": top, "energy": energy}
    return torch.cat(features).numpy(), {name: torch.cat(parts).numpy() for name, parts in values.items()}


class Mahalanobis:
    """Minus the squared distance from features to the nearest class mean, under one covariance (Lee et al. 2018)."""

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        self.means = np.stack([features[labels == label].mean(0) for label in np.unique(labels)])
        centred = features - self.means[np.searchsorted(np.unique(labels), labels)]
        self.precision = LedoitWolf(assume_centered=True).fit(centred).get_precision()

    def __call__(self, features: np.ndarray) -> np.ndarray:
        distance = features[:, None] - self.means  # (images, classes, features)
        return -np.einsum("icf,fg,icg->ic", distance, self.precision, distance, optimize=True).min(1)


def area_under_curve(cells: np.ndarray, negatives: np.ndarray) -> float:
    """Return how often a cell scores higher than a negative."""
    truth = np.repeat([1, 0], [len(cells), len(negatives)])
    return float(roc_auc_score(truth, np.concatenate([cells, negatives])))


if __name__ == "__main__":
    sys.exit(main())
