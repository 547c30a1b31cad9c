"""Teachers: pretrained timm networks, fine-tuned on cells, from which the four models are distilled.

They are used in training alone and do not ship. Distillation is function matching (Beyer et al. 2022): teacher and
student see the same augmented batch, half of it mixed up, and the student learns the teacher's probabilities.
"""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from hep2.models import CLASSES

TEACHER_SIZE = 156  # pixels a side, twice a cell's: pretrained networks expect larger images


class Teacher(nn.Module):
    """A timm network with its pretrained weights, on enlarged cells: images (batch, 1, 78, 78) to logits (batch, 6).

    Parameters
    ----------
    name
        Of a pretrained network in timm, such as ``tf_efficientnet_lite0``.
    file
        A local file with its weights; without one they come from the Hugging Face Hub.
    pretrained
        False leaves the weights random, for a network that is restored from a checkpoint.

    Raises
    ------
    ValueError
        If timm has no such network, or neither the file nor the Hub has its weights.
    """

    def __init__(
        self, name: str, file: Path | None = None, *, pretrained: bool = True, size: int = TEACHER_SIZE
    ) -> None:
        super().__init__()
        self.name, self.size = name, size
        overlay = {"file": str(file)} if file else None
        try:
            saved = load_state_dict(str(file)) if file and pretrained else None
            self.network = timm.create_model(
                name,
                pretrained=pretrained,
                pretrained_cfg_overlay=overlay,
                num_classes=CLASSES,
                drop_rate=0.2,
                drop_path_rate=0.1,
            )
            # timm leaves random what a file lacks, and our head is new in any case.
            head = set(self.network.get_classifier().parameters())
            needed = {key for key, parameter in self.network.named_parameters() if parameter not in head}
            if saved is not None and not needed <= saved.keys():
                raise RuntimeError("weights of another network")
        except (OSError, EOFError, RuntimeError, SafetensorError, UnpicklingError) as error:
            where = f"in {file}" if file else "on the Hugging Face Hub"
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"no pretrained weights of {name!r} {where} ({reason}): name a network of `timm.list_models("
                "pretrained=True)`, give NAME=FILE for weights on disk, or train without: --teacher none"
            ) from error
        config = resolve_model_data_config(self.network)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(config["std"]).view(1, -1, 1, 1), persistent=False)

    def extra_repr(self) -> str:
        return f"name={self.name!r}, size={self.size}"

    def forward(self, images: Tensor) -> Tensor:
        enlarged = F.interpolate(images, size=(self.size, self.size), mode="bicubic", align_corners=False)
        return self.network((enlarged - self.mean) / self.spread)  # one channel becomes three: (batch, 3, 156, 156)


class Teachers(nn.Module):
    """Several networks as one teacher: the mean of their probabilities, (batch, 6)."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([network(images).float().softmax(1) for network in self.networks]).mean(0)
