"""Augmentation of whole batches, on the device they are on.

Every function takes images (batch, 1, rows, columns), float32 in [0, 1], and a CPU generator that decides
everything, and returns new images of the same shape and range.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

PAPER_ANGLES = (0, 18, 36, 54, 72, 90)  # degrees; the source prints "32" for 36 once, a slip
PAPER_BRIGHTNESS = 0.2  # the source names random brightness, not its range: our choice


def augment_paper(images: Tensor, angle_index: Tensor, generator: Generator) -> Tensor:
    """Rotate each image by its own one of the source's six angles and scale its brightness at random.

    `angle_index` is int64 of shape (batch,): 0 leaves the image as it is, so that each cell is seen six times.
    """
    angles = torch.tensor(PAPER_ANGLES, device=images.device)[angle_index] * (math.pi / 180)
    cosine, sine, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    affine = torch.stack([torch.stack([cosine, -sine, zero], 1), torch.stack([sine, cosine, zero], 1)], 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    rotated = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    brightness = 1 + PAPER_BRIGHTNESS * (2 * _uniform(images, generator) - 1)
    return torch.where(angle_index.view(-1, 1, 1, 1) == 0, images, rotated * brightness).clamp(0, 1)


def augment_tuned(
    images: Tensor, generator: Generator, *, shift: int = 6, gain: float = 0.2, offset: float = 0.05
) -> Tensor:
    """Turn, mirror, shift, and change gain, gamma and offset, without ever interpolating.

    Fine texture tells Speckled from Homogeneous, and a rotation by a free angle blurs it: quarter turns, mirrors and
    shifts by whole pixels move pixels and leave their values alone.
    """
    images = dihedral(images, generator)
    images = translate(images, shift, generator)
    gamma = torch.exp(gain * (2 * _uniform(images, generator) - 1))
    scale = 1 + gain * (2 * _uniform(images, generator) - 1)
    images = images.pow(gamma) * scale + offset * (2 * _uniform(images, generator) - 1)
    return images.clamp(0, 1)


def dihedral(images: Tensor, generator: Generator) -> Tensor:
    """Give each image one of the eight symmetries of the square, all equally likely."""
    chance = torch.rand(3, len(images), 1, 1, 1, generator=generator).to(images.device) < 0.5
    images = torch.where(chance[0], images.flip(-1), images)
    images = torch.where(chance[1], images.flip(-2), images)
    return torch.where(chance[2], images.transpose(-1, -2), images)


def translate(images: Tensor, most: int, generator: Generator) -> Tensor:
    """Shift each image by up to `most` whole pixels a side, mirroring at the border."""
    batch, _, rows, columns = images.shape
    shifts = torch.randint(-most, most + 1, (2, batch, 1), generator=generator).to(images.device)
    row = _mirror(torch.arange(rows, device=images.device) + shifts[0], rows)  # (batch, rows)
    column = _mirror(torch.arange(columns, device=images.device) + shifts[1], columns)
    index = torch.arange(batch, device=images.device)
    return images[index[:, None, None], 0, row[:, :, None], column[:, None, :]].unsqueeze(1)


def _mirror(position: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - position.abs()).abs()


def _uniform(images: Tensor, generator: Generator) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
