"""Where a model looked: maps over the cell, from the forward pass that gives the verdict."""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hep2.models import CNN, ViT
from hep2.patterns import IMAGE_SIZE


@torch.inference_mode()
def look(model: CNN | ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return pooled features (batch, width) and maps (batch, 78, 78) in [0, 1].

    The maps tell what spoke for each image's verdict.

    For the convolutional models the map is the class activation of the verdict (Zhou et al. 2016): where it adds to
    its logit, as the head is linear in the average. What takes from it is left out. For the ViT it is the attention
    rolled out over the layers (Abnar and Zuidema 2020): how much of each patch the head reads, whatever the class.
    """
    if isinstance(model, ViT):
        pooled, coarse = _attention(model, images)
    else:
        features = model.forward_features(images)  # (batch, channels, 5, 5)
        pooled = model.pool(features)
        weight = model.head.weight[model.head(pooled).argmax(1)]  # (batch, channels)
        coarse = torch.einsum("bc,bchw->bhw", weight, features).clamp(min=0)
    # The 80 pixels that the first convolution makes of 78 are laid back on them by leaving out the rim.
    side = IMAGE_SIZE + 2 if not isinstance(model, ViT) else IMAGE_SIZE
    fine = F.interpolate(coarse[:, None], size=(side, side), mode="bicubic", align_corners=False)[:, 0]
    rim = (side - IMAGE_SIZE) // 2
    fine = fine[:, rim : rim + IMAGE_SIZE, rim : rim + IMAGE_SIZE].clamp(min=0)
    return pooled, fine / fine.amax((1, 2), keepdim=True).clamp(min=1e-9)


def _attention(model: ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    layers: list[Tensor] = []
    own = threading.get_ident()

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # The model is shared: other threads may be taking other cells through it meanwhile.
        if threading.get_ident() == own:
            layers.append(_weights(output, model.config.heads))

    # A fused kernel shows no weights, and another pass would give a cell other last digits: they are made once more of
    # the same queries and keys.
    handles = [block.attn.qkv.register_forward_hook(keep) for block in model.blocks]
    try:
        tokens = model.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    identity = torch.eye(tokens.shape[1], device=tokens.device)
    rolled = identity.expand(len(images), -1, -1)
    for weights in layers:
        # Half of each token comes from itself, past the attention, by the skip connection.
        rolled = (weights.mean(1) + identity) / 2 @ rolled
    read = rolled[:, 0]
    if model.config.pooling == "class token + mean":
        read = read + rolled[:, 1:].mean(1)
    side = IMAGE_SIZE // model.config.patch_size
    coarse = read[:, 1:].reshape(-1, side, side)
    # Every patch gets its even share by the skips: only what lies above the least says anything.
    return model.pool(tokens), coarse - coarse.amin((1, 2), keepdim=True)


def _weights(projected: Tensor, heads: int) -> Tensor:
    """Return how much each token attends to each, (batch, heads, tokens, tokens), from timm's `qkv`."""
    batch, tokens, _ = projected.shape
    queries, keys, _ = projected.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return (queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5).softmax(-1)
