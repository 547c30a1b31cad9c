"""Augmentation of whole batches, on the device they are on.

Every function takes images (batch, 1, rows, columns), float32 in [0, 1], and, where there is chance, a CPU generator
that decides everything, and returns new images of the same shape; only `rescale` and `refocus` may leave the range.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

PAPER_ANGLES = (0, 18, 36, 54, 72, 90)  # degrees; the source prints "32" for 36 once, a slip
SHIFT = 6  # pixels a side
NUCLEAR_STAIN = 1.5  # times the light of the cell itself: our choice
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
    images: Tensor,
    generator: Generator,
    *,
    shift: int = SHIFT,
    gain: float = 0.2,
    offset: float = 0.05,
    zoom: float = 0.0,
    sharpness: float = 0.0,
    haze: float = 0.0,
    noise: float = 0.0,
    exposure: float = 0.0,
    share: float = 1.0,
) -> Tensor:
    """Turn, mirror, shift, change gain, gamma and offset; if asked, scale, focus, haze, noise and exposure as well.

    Fine texture tells Speckled from Homogeneous, and a rotation by a free angle blurs it: quarter turns, mirrors and
    shifts by whole pixels move pixels and leave their values alone. `zoom`, `sharpness`, `haze`, `noise` and `exposure`
    do what sets one specimen off from the next: magnification, focus, how much of the stain lies diffusely in and
    round the nucleus, how faint the light was, or how much of it was too bright. They are done to a `share` of the
    images, drawn anew for each batch, and these are then stretched as every image is.
    """
    images = translate(dihedral(images, generator), shift, generator)
    if share and (zoom or sharpness or haze or noise or exposure):
        chosen = draw_share(images, share, generator)
        if len(chosen):
            changed = _another_specimen(images[chosen], generator, zoom, sharpness, haze, noise, exposure)
            images[chosen] = stretch(changed)
    gamma = torch.exp(gain * (2 * _uniform(images, generator) - 1))
    scale = 1 + gain * (2 * _uniform(images, generator) - 1)
    images = images.clamp(0, 1).pow(gamma) * scale + offset * (2 * _uniform(images, generator) - 1)
    return images.clamp(0, 1)


def _another_specimen(
    images: Tensor,
    generator: Generator,
    zoom: float,
    sharpness: float,
    haze: float,
    noise: float,
    exposure: float,
) -> Tensor:
    if zoom:
        images = rescale(images, zoom, generator)
    if sharpness or haze:
        images = refocus(images, sharpness, haze, generator)
    if noise:
        grain = to_device(torch.randn(images.shape, generator=generator), images.device)
        images = images + noise * _uniform(images, generator).square() * grain
    if exposure:
        # What is brighter than the camera can tell is clipped.
        images = (images * (1 + exposure * _uniform(images, generator).square())).clamp(max=1)
    return images


def rescale(images: Tensor, zoom: float, generator: Generator) -> Tensor:
    """Scale each image about its centre by up to 1 + `zoom` or down to the inverse, mirroring at the border."""
    factor = torch.exp(math.log1p(zoom) * (2 * _uniform(images, generator).flatten() - 1))
    zero = torch.zeros_like(factor)
    affine = torch.stack([torch.stack([1 / factor, zero, zero], 1), torch.stack([zero, 1 / factor, zero], 1)], 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def refocus(images: Tensor, sharpness: float, haze: float, generator: Generator) -> Tensor:
    """Change the focus of each image, and the haze: the share of light that is spread over some pixels.

    The finest detail is divided by up to exp(2 x `sharpness`), or multiplied by up to exp(`sharpness`). Added to the
    image is a blurred copy of itself, 3 to 10 pixels wide, between -0.4 and 4.6 times `haze`, and mostly little.
    """
    rows, columns = images.shape[-2:]
    squared = torch.fft.fftfreq(rows)[:, None].square() + torch.fft.rfftfreq(columns).square()
    squared = to_device(squared, images.device)  # spatial frequency in cycles a pixel, (rows, columns / 2 + 1)
    strength = sharpness * (3 * _uniform(images, generator) - 2)
    width = 3 * (10 / 3) ** _uniform(images, generator)
    amount = haze * (5 * _uniform(images, generator) ** 3 - 0.4)
    focus = torch.exp(strength * (squared / 0.25).clamp(max=1))
    transfer = focus * (1 + amount * torch.exp(-2 * math.pi**2 * width**2 * squared))
    return torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=(rows, columns))


def add_nuclear_stain(images: Tensor, nuclei: Tensor, generator: Generator) -> Tensor:
    """Add to each image one of as many `nuclei`, at up to `NUCLEAR_STAIN` times its light and mostly little. Ours.

    Nuclei of the pattern Homogeneous are what diffuse stain in a nucleus looks like, with the nucleus' own sharp border
    that no blur of the image itself has. Many a serum has such stain besides its pattern: centromeres then lie on a
    bright nucleus, and the pattern is still theirs. The sum is stretched as every image is.
    """
    nuclei = translate(dihedral(nuclei, generator), SHIFT, generator)
    return stretch(images + NUCLEAR_STAIN * _uniform(images, generator).square() * nuclei)


def stretch(images: Tensor) -> Tensor:
    """Stretch each image as `hep2.imaging.prepare` does: the 1st percentile to 0, the 99th to 1."""
    pixels = images.flatten(1)
    last = pixels.shape[1] - 1
    # Of a sorted image only the ends are asked for: finding them takes an eighth of the time of sorting.
    low = pixels.topk(round(0.01 * last) + 1, largest=False, sorted=False).values.amax(1)
    high = pixels.topk(last - round(0.99 * last) + 1, sorted=False).values.amin(1)
    low, high = low.view(-1, 1, 1, 1), high.view(-1, 1, 1, 1)
    return ((images - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def dihedral(images: Tensor, generator: Generator) -> Tensor:
    """Give each image one of the eight symmetries of the square, all equally likely."""
    chance = to_device(torch.rand(3, len(images), 1, 1, 1, generator=generator), images.device) < 0.5
    images = torch.where(chance[0], images.flip(-1), images)
    images = torch.where(chance[1], images.flip(-2), images)
    return torch.where(chance[2], images.transpose(-1, -2), images)


def translate(images: Tensor, most: int, generator: Generator) -> Tensor:
    """Shift each image by up to `most` whole pixels a side, mirroring at the border."""
    batch, _, rows, columns = images.shape
    shifts = to_device(torch.randint(-most, most + 1, (2, batch, 1), generator=generator), images.device)
    row = _mirror(torch.arange(rows, device=images.device) + shifts[0], rows)  # (batch, rows)
    column = _mirror(torch.arange(columns, device=images.device) + shifts[1], columns)
    index = torch.arange(batch, device=images.device)
    return images[index[:, None, None], 0, row[:, :, None], column[:, None, :]].unsqueeze(1)


def _mirror(position: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - position.abs()).abs()


def _uniform(images: Tensor, generator: Generator) -> Tensor:
    return to_device(torch.rand(len(images), 1, 1, 1, generator=generator), images.device)


def draw_share(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Draw a `share` of the images, each by itself: their positions, int64 of shape (drawn,)."""
    return to_device((torch.rand(len(images), generator=generator) < share).nonzero()[:, 0], images.device)


def to_device(drawn: Tensor, device: torch.device) -> Tensor:
    """Send what a CPU generator drew to the device of the images, without waiting for what a card has to do yet."""
    # CUDA has copied the memory when this returns; elsewhere it may be gone before it is read.
    return drawn.to(device, non_blocking=device.type == "cuda")
