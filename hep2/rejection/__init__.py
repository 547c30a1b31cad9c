"""Out-of-distribution detection: whether an image shows a cell of the six patterns at all."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor

from hep2.augmentation import as_strangers, augment
from hep2.images import prepare
from hep2.losses import Examples
from hep2.models import Classifier
from hep2.patterns import CLASS_NAMES
from hep2.recipes import WIDE
from hep2.rejection.negatives import degrade, draw_negatives
from hep2.synthetic import synthetic_cell

REJECTED_VALIDATION = 0.02  # share of the validation cells, shifted as a stranger's, that the threshold rejects
MOST = 2000  # examples of each kind to learn from: more cost time and change little
SYNTHETIC = 3 / 20  # of the cells, drawn of each pattern, lest what is drawn be rejected for being drawn
STRENGTH = 0.003  # of the layer: a stronger one tells our drawings better, and turns away other laboratories' cells


def fit_rejection(classifier: Classifier, train: Examples, validation: Examples, seed: int) -> dict:
    """Fit a classifier's rejection, in place: a linear layer on the models' features that tells cells from negatives.

    Cells are train cells, as they are, shifted as a stranger's, and so shifted after the augmentation `WIDE`, and
    synthetic ones; negatives are drawn, or made from train cells, at all resolutions too. Learning from negatives is
    outlier exposure (Hendrycks et al. 2019). The threshold is set on validation cells shifted as a stranger's.

    Returns
    -------
    How it was fitted, JSON-able.
    """
    random = np.random.default_rng(seed)
    generator = Generator().manual_seed(seed)
    cells = train.inputs[np.sort(random.permutation(len(train.inputs))[:MOST])]
    nuclei = train.inputs[train.diffuse[torch.from_numpy(random.integers(len(train.diffuse), size=len(cells)))]]
    drawn = []
    for name in CLASS_NAMES:
        for number in range(round(SYNTHETIC * len(cells))):
            image = synthetic_cell(name, random).astype(np.float32)
            drawn.append(prepare(degrade(image, random) if number % 2 else image))
    negatives, _ = draw_negatives(len(cells), cells[:, 0].numpy(), random)
    widely = as_strangers(augment(cells, WIDE, generator, nuclei), generator)
    positives = [cells, as_strangers(cells, generator), widely, torch.from_numpy(np.stack(drawn))]
    features = [_features(classifier, images) for images in (*positives, torch.from_numpy(negatives))]
    rejection = classifier.rejection
    rejection.mean, rejection.spread = features[1].mean(0), features[1].std(0) + 1e-3
    known = rejection.standardised(torch.cat(features)).numpy()
    is_cell = np.repeat([1, 1, 1, 1, 0], [len(part) for part in features])
    layer = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=1000).fit(known, is_cell)
    with torch.no_grad():
        rejection.linear.weight.copy_(torch.from_numpy(layer.coef_))
        rejection.linear.bias.copy_(torch.from_numpy(layer.intercept_))
        kept = as_strangers(validation.inputs, generator)
        rejection.threshold = rejection(_features(classifier, kept)).quantile(REJECTED_VALIDATION)
    return {"negatives": len(negatives), "rejected_validation": REJECTED_VALIDATION, "strength": STRENGTH, "seed": seed}


@torch.no_grad()
def _features(classifier: Classifier, images: Tensor) -> Tensor:
    """Return what all models have seen in images, side by side: (images, features)."""
    return torch.cat([torch.cat(list(classifier.features(batch).values()), dim=1) for batch in images.split(64)])
