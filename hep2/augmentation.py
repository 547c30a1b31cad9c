"""Augmentation of whole batches, on the device they are on.

Every function takes images (batch, 1, 78, 78), float32 in [0, 1], and a generator on their device that decides all
that chance decides, and returns new images of the same shape. `augment` neither waits for the device nor has a shape
that depends on chance, so a training step can be recorded as a CUDA graph.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hep2.images import PREPROCESSING
from hep2.patterns import IMAGE_SIZE

REFERENCE_ANGLES = (0, 18, 36, 54, 72, 90)  # degrees; the reference prints "32" for 36 once, a slip
REFERENCE_BRIGHTNESS = 0.2  # the reference names random brightness, not its range: our choice
NUCLEAR_STAIN = 1.5  # times the light of the cell itself: our choice
SIZES = (22, 26, 31, 37, 44, 52, 62, 70)  # pixels to which images are reduced before they are enlarged again
QUALITIES = (40, 95)  # of JPEG, between which chance decides
# Annex K of the JPEG standard (ITU-T T.81): how coarsely each frequency of an 8 x 8 block is stored, at quality 50.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What training images go through, in this order; 0 leaves a change out.

    Quarter turns, mirrors and shifts by whole pixels move pixels and leave their values alone: fine texture tells
    Speckled from Homogeneous, and interpolation blurs it. The changes from `framing` on are what sets one microscope,
    camera or web page off from the next; they are done to a `share` of the images, which are then stretched as every
    image is.
    """

    shift: int = 6  # pixels a side
    nuclear_stain: float = 0.0  # share of the images that get another nucleus' diffuse stain
    share: float = 1.0  # of the images that get the following changes
    framing: tuple[float, float] = (1.0, 1.0)  # side of what is seen, from tight to loose, in sides of the image
    aspect: float = 0.0  # one side longer than the other by up to this
    resolution: float = 0.0  # of these, the share that is reduced, half of them with JPEG, and enlarged again
    sharpness: float = 0.0  # focus
    haze: float = 0.0  # light that is spread over some pixels
    noise: float = 0.0
    exposure: float = 0.0  # light that is too bright for the camera
    black_level: float = 0.0  # how much of the range the darkest light lies above black, or below
    gain: float = 0.2  # gain and
    gamma: float = 0.2  # gamma (its logarithm), of all images
    offset: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "framing", tuple(self.framing))
        for name in ("nuclear_stain", "share", "resolution"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a share between 0 and 1")
        if len(self.framing) != 2 or not 0 < self.framing[0] <= self.framing[1]:
            raise ValueError(f"framing is {self.framing}: give the tightest and the loosest, above 0")


def augment(images: Tensor, augmentation: Augmentation, generator: Generator, nuclei: Tensor | None = None) -> Tensor:
    """Change images as an `Augmentation` says; `nuclei`, as many, are cells with a diffuse stain."""
    a = augmentation
    images = translate(dihedral(images, generator), a.shift, generator)
    if a.nuclear_stain:
        chosen = _chosen(images, a.nuclear_stain, generator)
        images = images.index_copy(0, chosen, add_nuclear_stain(images[chosen], nuclei[chosen], generator))
    chosen = _chosen(images, a.share, generator)
    if len(chosen):  # there is no transform of no images
        images = images.index_copy(0, chosen, _as_another_microscope(images[chosen], a, generator))
    gamma = torch.exp(a.gamma * _symmetric(images, generator))
    gain = 1 + a.gain * _symmetric(images, generator)
    images = images.clamp(0, 1).pow(gamma) * gain + a.offset * _symmetric(images, generator)
    return images.clamp(0, 1)


def _as_another_microscope(images: Tensor, a: Augmentation, generator: Generator) -> Tensor:
    if a.framing != (1.0, 1.0) or a.aspect:
        images = frame(images, a.framing, a.aspect, generator)
    if a.resolution:
        images = _at_another_resolution(images, a.resolution, generator)
    if a.sharpness or a.haze:
        images = refocus(images, a.sharpness, a.haze, generator)
    if a.noise:
        grain = torch.randn(images.shape, device=images.device, generator=generator)
        images = images + a.noise * _uniform(images, generator).square() * grain
    if a.exposure:
        # What is brighter than the camera can tell is clipped.
        images = (images * (1 + a.exposure * _uniform(images, generator).square())).clamp(max=1)
    images = stretch(images)
    if a.black_level:
        level = a.black_level * _symmetric(images, generator)
        images = ((images - level) / (1 - level)).clamp(0, 1)
    return images


def rotate_as_reference(images: Tensor, angle_index: Tensor, generator: Generator) -> Tensor:
    """Rotate each image by its own one of the reference's six angles and scale its brightness at random.

    `angle_index` is int64 of shape (batch,): 0 leaves the image as it is, so that each cell is seen six times.
    """
    angles = _constant(REFERENCE_ANGLES, images.device)[angle_index] * (math.pi / 180)
    cosine, sine = angles.cos(), angles.sin()
    rotated = _affine(images, torch.stack([cosine, -sine, sine, cosine], 1).view(-1, 2, 2), "bilinear")
    brightness = 1 + REFERENCE_BRIGHTNESS * _symmetric(images, generator)
    return torch.where(angle_index.view(-1, 1, 1, 1) == 0, images, rotated * brightness).clamp(0, 1)


def frame(images: Tensor, framing: tuple[float, float], aspect: float, generator: Generator) -> Tensor:
    """See less or more of each image, about its centre, and one side longer than the other; the border is mirrored.

    A stranger's box round a cell is not the contest's. What a tight box leaves out, the stretch that follows does not
    know of: it takes its black from what is seen.
    """
    tight, loose = map(math.log, framing)
    side = tight + (loose - tight) * _uniform(images, generator).flatten()
    half = math.log1p(aspect) / 2 * _symmetric(images, generator).flatten()
    return _affine(images, torch.diag_embed(torch.stack([side + half, side - half], 1).exp()), "bicubic")


def _affine(images: Tensor, matrix: Tensor, mode: str) -> Tensor:
    grid = F.affine_grid(F.pad(matrix, (0, 1)), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)


def _at_another_resolution(images: Tensor, share: float, generator: Generator) -> Tensor:
    # Each size has its own few of the images, as many in every batch: no shape depends on chance.
    parts = _chosen(images, share, generator).tensor_split(len(SIZES))
    for size, part in zip(SIZES, parts, strict=True):
        if len(part):
            small = reduce(images[part], size)
            with_jpeg = _uniform(small, generator) < 0.5
            small = torch.where(with_jpeg, jpeg(small.clamp(0, 1), generator), small)
            images = images.index_copy(0, part, enlarge(small))
    return images


def reduce(images: Tensor, size: int) -> Tensor:
    """Reduce images to `size` pixels a side, as a lower magnification or a web page does."""
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def enlarge(images: Tensor) -> Tensor:
    """Enlarge images to 78 pixels a side, as `hep2.images.prepare` does."""
    return F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)


def jpeg(images: Tensor, generator: Generator) -> Tensor:
    """Store each image as JPEG of a quality that chance decides: its 8 x 8 blocks' cosine transforms are rounded."""
    device, (rows, columns) = images.device, images.shape[-2:]
    frequency, place = torch.arange(8, device=device), torch.arange(8, device=device) + 0.5
    cosine = torch.cos(math.pi / 8 * frequency[:, None] * place) / 2
    cosine = torch.where(frequency[:, None] == 0, cosine / math.sqrt(2), cosine)  # (frequencies, places)
    low, high = QUALITIES
    quality = low + (high - low) * _uniform(images, generator)
    coarseness = torch.where(quality < 50, 50 / quality, 2 - quality / 50)[..., None, None]
    table = (_constant(LUMINANCE, device)[:, None, :] * coarseness).clamp(min=1)  # (batch, 1, 1, 8, 1, 8)
    padded = F.pad(images, (0, -columns % 8, 0, -rows % 8), mode="replicate")
    blocks = padded.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)) * 255 - 128  # (batch, 1, rows / 8, 8, columns / 8, 8)
    stored = torch.einsum("fp,bcrpsq,gq->bcrfsg", cosine, blocks, cosine)
    stored = (stored / table).round() * table
    blocks = torch.einsum("fp,bcrfsg,gq->bcrpsq", cosine, stored, cosine)
    return ((blocks + 128) / 255).flatten(4, 5).flatten(2, 3)[..., :rows, :columns].clamp(0, 1)


def refocus(images: Tensor, sharpness: float, haze: float, generator: Generator) -> Tensor:
    """Change the focus of each image, and the haze: the share of light that is spread over some pixels.

    The finest detail is divided by up to exp(2 x `sharpness`), or multiplied by up to exp(`sharpness`). Added to the
    image is a blurred copy of itself, 3 to 10 pixels wide, between -0.4 and 4.6 times `haze`, and mostly little.
    """
    squared = _squared_frequency(images)
    strength = sharpness * (3 * _uniform(images, generator) - 2)
    width = 3 * (10 / 3) ** _uniform(images, generator)
    amount = haze * (5 * _uniform(images, generator) ** 3 - 0.4)
    focus = torch.exp(strength * (squared / 0.25).clamp(max=1))
    transfer = focus * (1 + amount * torch.exp(-2 * math.pi**2 * width**2 * squared))
    return torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=images.shape[-2:])


def add_nuclear_stain(images: Tensor, nuclei: Tensor, generator: Generator) -> Tensor:
    """Add to each image one of as many `nuclei`, at up to `NUCLEAR_STAIN` times its light and mostly little. Ours.

    Nuclei of the pattern Homogeneous are what diffuse stain in a nucleus looks like, with the nucleus' own sharp border
    that no blur of the image itself has. Many a serum has such stain besides its pattern: centromeres then lie on a
    bright nucleus, and the pattern is still theirs. The sum is stretched as every image is.
    """
    nuclei = translate(dihedral(nuclei, generator), 6, generator)
    return stretch(images + NUCLEAR_STAIN * _uniform(images, generator).square() * nuclei)


def stretch(images: Tensor) -> Tensor:
    """Stretch each image as `hep2.images.prepare` does: the 1st percentile to 0, the 99th to 1."""
    pixels = images.flatten(1)
    last = pixels.shape[1] - 1
    low, high = PREPROCESSING["quantiles"]
    # Of a sorted image only the ends are asked for: finding them takes an eighth of the time of sorting.
    low = pixels.topk(round(low * last) + 1, largest=False, sorted=False).values.amax(1)
    high = pixels.topk(last - round(high * last) + 1, sorted=False).values.amin(1)
    low, high = low.view(-1, 1, 1, 1), high.view(-1, 1, 1, 1)
    return ((images - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def dihedral(images: Tensor, generator: Generator) -> Tensor:
    """Give each image one of the eight symmetries of the square, all equally likely."""
    chance = torch.rand(3, len(images), 1, 1, 1, device=images.device, generator=generator) < 0.5
    images = torch.where(chance[0], images.flip(-1), images)
    images = torch.where(chance[1], images.flip(-2), images)
    return torch.where(chance[2], images.transpose(-1, -2), images)


def translate(images: Tensor, most: int, generator: Generator) -> Tensor:
    """Shift each image by up to `most` whole pixels a side, mirroring at the border."""
    batch, _, rows, columns = images.shape
    shifts = torch.randint(-most, most + 1, (2, batch, 1), device=images.device, generator=generator)
    row = _mirror(torch.arange(rows, device=images.device) + shifts[0], rows)  # (batch, rows)
    column = _mirror(torch.arange(columns, device=images.device) + shifts[1], columns)
    index = torch.arange(batch, device=images.device)
    return images[index[:, None, None], 0, row[:, :, None], column[:, None, :]].unsqueeze(1)


def mix_up(images: Tensor, generator: Generator) -> Tensor:
    """Mix half of a batch, each image with another one at a weight that chance decides (Zhang et al. 2018)."""
    mixed = len(images) // 2
    other = images[torch.rand(len(images), device=images.device, generator=generator).argsort()[:mixed]]
    weight = _uniform(other, generator)
    return torch.cat([weight * images[:mixed] + (1 - weight) * other, images[mixed:]])


def as_strangers(images: Tensor, generator: Generator) -> Tensor:
    """Shift images as another laboratory would show the same cells: each once, at random, and all of it at once.

    Resolution 24 to 78 pixels, framing 0.8 to 1.4, blur of up to 1 pixel (standard deviation), gamma 0.6 to 1.6, noise
    of up to 5 % of the range, a black level of up to 10 % above or below. Not for training: to measure, to calibrate
    and to fit the rejection, on cells that no model was trained on.
    """
    images = frame(images, (0.8, 1.4), 0.0, generator)
    sizes = torch.randint(24, IMAGE_SIZE + 1, (len(images),), device=images.device, generator=generator)
    for size in sizes.unique().tolist():
        images[sizes == size] = enlarge(reduce(images[sizes == size], size))
    transfer = torch.exp(-2 * math.pi**2 * _uniform(images, generator).square() * _squared_frequency(images))
    images = stretch(torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=images.shape[-2:]))
    images = images ** torch.exp(math.log(0.6) + math.log(1.6 / 0.6) * _uniform(images, generator))
    grain = torch.randn(images.shape, device=images.device, generator=generator)
    images = images + 0.05 * _uniform(images, generator) * grain
    return stretch(images.clamp(min=0.1 * _symmetric(images, generator)))


def _squared_frequency(images: Tensor) -> Tensor:
    """Return the square of each spatial frequency, in cycles a pixel: (rows, columns / 2 + 1)."""
    rows, columns = images.shape[-2:]
    squared = torch.fft.fftfreq(rows, device=images.device)[:, None].square()
    return squared + torch.fft.rfftfreq(columns, device=images.device).square()


@cache
def _constant(values: tuple, device: torch.device) -> Tensor:
    # Sent once: a step that is recorded as a CUDA graph cannot copy from the CPU.
    return torch.tensor(values, device=device)


def _mirror(position: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - position.abs()).abs()


def _chosen(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Draw a `share` of the images, as many in every batch: their positions, int64."""
    order = torch.rand(len(images), device=images.device, generator=generator).argsort()
    return order[: round(share * len(images))]


def _uniform(images: Tensor, generator: Generator) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator)


def _symmetric(images: Tensor, generator: Generator) -> Tensor:
    return 2 * _uniform(images, generator) - 1
