"""Ordinary networks to compare the speed with: as their libraries give them, at their usual size of input.

Imports no more of this package, and of others, than a server of one such network would: its start is measured too.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

PEER_SIZE = 224  # rows and columns of the peers' inputs, in pixels
PEERS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: timm.create_model("resnet18", num_classes=6),
    "vit_tiny_patch16_224": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=6),
    "AlexNet": lambda: torchvision.models.alexnet(num_classes=6),
}


@torch.inference_mode()
def answer(model: nn.Module, file: bytes) -> Tensor:
    """Answer one request: from the bytes of a file to probabilities (1, 6)."""
    image = Image.open(io.BytesIO(file)).convert("RGB").resize((PEER_SIZE, PEER_SIZE))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    return model(pixels.to(next(model.parameters()).device)).softmax(1).cpu()


def load_peer(name: str, weights: Path) -> nn.Module:
    """Build a peer and load its weights, as some servers do at every request."""
    model = PEERS[name]()
    model.load_state_dict(load_file(weights))
    return model.eval()


def first_answer(name: str, image: str, weights: str) -> None:
    """Do what a server of one peer does until its first answer."""
    print(answer(load_peer(name, Path(weights)), Path(image).read_bytes()))
