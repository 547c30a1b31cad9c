"""Saliency maps: what in a cell spoke for a model's answer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hep2.models import CNN, ViT
from hep2.patterns import IMAGE_SIZE


def saliency_map(model: CNN | ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return where images (batch, 1, 78, 78) speak for the class that a model finds likeliest.

    For the convolutional models this is the class activation map (Zhou et al. 2016), which is exact, as the head is
    linear in the average of the features. For the ViT it is Grad-CAM (Selvaraju et al. 2017) on the tokens that enter
    its last block. What speaks against the class is left out.

    Returns
    -------
    Maps (batch, 78, 78), float32 in [0, 1], and what the model has seen before its head, (batch, width).
    """
    if isinstance(model, ViT):
        with torch.no_grad():
            tokens = model.blocks[:-1](model.embed(images))  # (batch, 1 + 169, width)
        with torch.enable_grad():
            tokens.requires_grad_()
            pooled = model.pool(model.norm(model.blocks[-1](tokens)))
            (gradient,) = torch.autograd.grad(model.head(pooled).amax(1).sum(), tokens)
        side, margin = IMAGE_SIZE // model.config.patch_size, 0
        coarse = (gradient * tokens.detach()).sum(2)[:, 1:].reshape(-1, side, side)
    else:
        # The first convolution makes 80 pixels of 78: one on each side is none of the image's.
        margin = 1
        with torch.no_grad():
            features = model.forward_features(images)  # (batch, channels, 5, 5)
            pooled = model.pool(features)
            weight = model.head.weight[model.head(pooled).argmax(1)]  # (batch, channels)
            coarse = torch.einsum("bc,bchw->bhw", weight, features)
    size = IMAGE_SIZE + 2 * margin
    fine = F.interpolate(coarse.clamp(min=0)[:, None], size=(size, size), mode="bicubic", align_corners=False)[:, 0]
    fine = fine[:, margin : size - margin, margin : size - margin].clamp(min=0).float()
    return fine / fine.amax((1, 2), keepdim=True).clamp(min=1e-9), pooled.detach()
