"""What training minimizes, and how a model is measured meanwhile."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEASURING_BATCH = 512


class Examples(NamedTuple):
    """Inputs float32 of shape (examples, …), for images (examples, 1, 78, 78), and labels int64 of (examples,).

    `specimens`, int64 of (examples,), is needed by recipes that draw specimens evenly or have the auxiliary specimen
    loss, and `diffuse`, the positions of the examples that show a nucleus stained diffusely, int64, by recipes that
    add such stain.
    """

    inputs: Tensor
    labels: Tensor
    specimens: Tensor | None = None
    diffuse: Tensor | None = None


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


@torch.inference_mode()
def loss_and_accuracy(model: nn.Module, examples: Examples) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy and the accuracy, two scalars, of a model in evaluation mode."""
    logits = predict_logits(model, examples.inputs)
    return F.cross_entropy(logits, examples.labels), (logits.argmax(1) == examples.labels).float().mean()


@torch.inference_mode()
def predict_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return float32 logits (examples, classes), in evaluation mode and full precision."""
    training = model.training
    model.eval()
    logits = torch.cat([model(batch).float() for batch in inputs.split(MEASURING_BATCH)])
    model.train(training)
    return logits
