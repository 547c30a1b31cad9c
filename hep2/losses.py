"""What training minimizes: modules that take a model and a batch, and return a loss and the model's logits."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Batch(NamedTuple):
    """What a loss is given: examples, augmented, and a teacher's probabilities (batch, 6) where there is one."""

    inputs: Tensor
    labels: Tensor
    specimens: Tensor | None
    targets: Tensor | None


class CrossEntropy(nn.Module):
    """The cross-entropy of a model's logits with the labels, or with a teacher's probabilities."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.inputs).float()
        if batch.targets is not None:
            return F.cross_entropy(logits, batch.targets), logits
        return F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing), logits


class AuxiliarySpecimenLoss(nn.Module):
    """The cross-entropy of the class and of the specimen within the class, from a head that is thrown away. Ours.

    Parameters
    ----------
    class_of_specimen
        The class of each specimen, int64 of shape (specimens,).
    width
        Of the model's pooled features.
    """

    def __init__(self, class_of_specimen: Tensor, width: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.specimens = nn.Linear(width, len(class_of_specimen))
        self.register_buffer("membership", F.one_hot(class_of_specimen).bool().T)  # (classes, specimens)

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        pooled = model.pool(model.forward_features(batch.inputs))
        logits, of_specimens = model.head(pooled).float(), self.specimens(pooled).float()
        of_class = of_specimens[:, None].masked_fill(~self.membership, -torch.inf).logsumexp(2)  # (batch, classes)
        share = F.log_softmax(logits, dim=1) - of_class
        joint = of_specimens + share @ self.membership.float()  # log-probability of each specimen
        return F.cross_entropy(joint, batch.specimens, label_smoothing=self.label_smoothing), logits
