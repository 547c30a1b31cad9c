"""Ordinary networks to compare the speed with: as their libraries give them, at their usual size of input.

Imports no more of this package, and of others, than a server of one such network would: its start is measured too.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

PEER_SIZE = 224  # rows and columns of the peers' inputs, in pixels


def _from_timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=6)


def _alexnet() -> nn.Module:
    import torchvision

    return torchvision.models.alexnet(num_classes=6)


PEERS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: _from_timm("resnet18"),
    "vit_tiny_patch16_224": lambda: _from_timm("vit_tiny_patch16_224"),
    "AlexNet": _alexnet,
}


def peer_request(model: nn.Module, file: bytes) -> Callable[[], Tensor]:
    """Return what answers one request: from the bytes of a file to probabilities (1, 6)."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def request() -> Tensor:
        return model(_input(file).to(device)).softmax(1).cpu()

    return request


def loading_request(path: Path, file: bytes, device: str) -> Callable[[], Tensor]:
    """Return what answers one request, having built an AlexNet and loaded its weights for it."""

    def request() -> Tensor:
        model = PEERS["AlexNet"]()
        model.load_state_dict(load_file(path))
        return peer_request(model.eval().to(device), file)()

    return request


def first_answer(name: str, image: str, weights: str) -> None:
    """Do what a server of one peer does until its first answer."""
    model = PEERS[name]()
    model.load_state_dict(load_file(weights))
    print(peer_request(model.eval(), Path(image).read_bytes())())


def _input(file: bytes) -> Tensor:
    image = Image.open(io.BytesIO(file)).convert("RGB").resize((PEER_SIZE, PEER_SIZE))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
