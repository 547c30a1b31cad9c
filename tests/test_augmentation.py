import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from hep2.augmentation import (
    Augmentation,
    add_nuclear_stain,
    as_strangers,
    augment,
    dihedral,
    enlarge,
    frame,
    jpeg,
    mix_up,
    reduce,
    refocus,
    rotate_as_reference,
    stretch,
    translate,
)
from hep2.images import prepare
from hep2.recipes import RECIPES, WIDE

# One at a time, strong enough to be seen.
CHANGES = {
    "framing": (0.7, 0.8),
    "aspect": 0.3,
    "resolution": 1.0,
    "sharpness": 1.0,
    "haze": 0.5,
    "noise": 0.2,
    "exposure": 0.6,
    "black_level": 0.1,
}
STILL = Augmentation(shift=0, gain=0.0, gamma=0.0, offset=0.0)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def fine_detail(images: Tensor) -> Tensor:
    """Return the power above a quarter of a cycle a pixel, of each image."""
    rows, columns = (torch.fft.fftfreq(side).abs() for side in images.shape[-2:])
    high = (rows[:, None] > 0.25) | (columns > 0.25)
    return torch.fft.fft2(images).abs().square()[..., high].mean(-1).flatten()


def changed(images: Tensor, result: Tensor) -> int:
    """Count the images that are in no turn and no mirror what they were: those leave the values as they are."""
    before = {tuple(image.flatten().sort().values.tolist()) for image in images}
    return sum(tuple(image.flatten().sort().values.tolist()) not in before for image in result)


def test_dihedral_gives_all_eight_symmetries_and_nothing_else():
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    symmetries = {tuple(torch.rot90(f, k, (2, 3)).flatten().tolist()) for k in range(4) for f in (image, image.flip(3))}
    seen = {tuple(one.flatten().tolist()) for one in dihedral(image.expand(200, -1, -1, -1), generator())}
    assert seen == symmetries


def test_translate_moves_whole_pixels_and_mirrors_at_the_border():
    image = torch.arange(100.0).reshape(1, 1, 10, 10)
    moved = translate(image.expand(50, -1, -1, -1), 2, generator())
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2), mode="reflect")[0, 0]
    windows = [padded[r : r + 10, c : c + 10] for r in range(5) for c in range(5)]
    seen = [next(k for k, window in enumerate(windows) if torch.equal(one, window)) for one in moved[:, 0]]
    assert len(set(seen)) > 15  # of the 25 places that fifty cells may be moved to


def test_stretch_is_what_prepare_does_to_an_image():
    dull = 0.5 + 0.1 * torch.randn(8, 1, 78, 78, generator=generator())  # with tails, which percentiles cut off
    prepared = np.stack([prepare(image.numpy()) for image in dull[:, 0]])
    np.testing.assert_allclose(stretch(dull).numpy(), prepared, atol=0.01)  # that one interpolates percentiles


AUGMENTATIONS = {
    "default": Augmentation(),
    "wide": WIDE,
    "domain-randomized": RECIPES["domain-randomized"].models["cnn"].augmentation,
} | {name: Augmentation(**{name: value}) for name, value in CHANGES.items()}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_augment_keeps_shape_and_range_and_follows_the_generator(augmentation, synthetic_cells):
    images, nuclei = synthetic_cells.images[:24], synthetic_cells.images[24:48]
    before = images.clone()
    result = augment(images, augmentation, generator(1), nuclei)
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    torch.testing.assert_close(result, augment(images, augmentation, generator(1), nuclei), rtol=0, atol=0)
    assert not torch.equal(result, augment(images, augmentation, generator(2), nuclei))
    assert torch.equal(images, before)


def test_augment_leaves_out_what_is_0(synthetic_cells):
    images = stretch(synthetic_cells.images)
    assert changed(images, augment(images, STILL, generator())) == 0


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_augment_changes_a_share_of_the_images(share, change, synthetic_cells):
    images = stretch(synthetic_cells.images)
    still = {"shift": 0, "gain": 0.0, "gamma": 0.0, "offset": 0.0}
    result = augment(images, Augmentation(**still, **{change: CHANGES[change]}, share=share), generator())
    assert 0.9 * share * len(images) <= changed(images, result) <= share * len(images)


def test_augment_stains_a_share_of_the_nuclei(synthetic_cells):
    images = stretch(synthetic_cells.images)
    stained = Augmentation(shift=0, gain=0.0, gamma=0.0, offset=0.0, nuclear_stain=0.5)
    result = augment(images, stained, generator(), images.flip(0))
    assert 0.9 * len(images) / 2 <= changed(images, result) <= len(images) / 2


def test_augment_lets_light_that_is_too_bright_run_together(synthetic_cells):
    images = stretch(synthetic_cells.images)
    bright = Augmentation(gain=0.0, gamma=0.0, offset=0.0, exposure=3.0)
    assert (augment(images, bright, generator()) == 1).float().mean() > 2 * (images == 1).float().mean()


def test_augment_at_another_resolution_takes_fine_detail_away(synthetic_cells):
    images = stretch(synthetic_cells.images)
    coarse = Augmentation(shift=0, gain=0.0, gamma=0.0, offset=0.0, resolution=1.0)
    assert fine_detail(augment(images, coarse, generator())).mean() < 0.5 * fine_detail(images).mean()


@pytest.mark.parametrize(
    "wrong",
    [{"share": 1.5}, {"nuclear_stain": -0.1}, {"resolution": 2.0}, {"framing": (1.2, 0.8)}, {"framing": (0.0, 1.0)}],
)
def test_an_augmentation_that_cannot_be_is_told(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*give"):
        Augmentation(**wrong)


def test_reduced_and_enlarged_images_have_no_detail_finer_than_their_pixels(synthetic_cells):
    images = synthetic_cells.images
    small = reduce(images, 22)
    assert small.shape == (len(images), 1, 22, 22)
    back = enlarge(small)
    assert back.shape == images.shape
    assert (fine_detail(back) < 0.5 * fine_detail(images)).all()
    assert fine_detail(back).mean() < 0.15 * fine_detail(images).mean()
    torch.testing.assert_close(back.mean((1, 2, 3)), images.mean((1, 2, 3)), rtol=0, atol=0.02)


@pytest.mark.parametrize("quality", [50, 80])
@pytest.mark.parametrize("side", [48, 37])
def test_jpeg_is_near_what_pillow_makes_at_the_same_quality(quality, side, synthetic_cells, monkeypatch):
    monkeypatch.setattr("hep2.augmentation.QUALITIES", (quality, quality))
    images = (255 * synthetic_cells.images[::6, :, :side, :side]).round()
    stored = 255 * jpeg(images / 255, generator())[:, 0]
    for image, ours in zip(images[:, 0], stored, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.numpy().astype(np.uint8)).save(file, "JPEG", quality=quality)
        theirs = torch.from_numpy(np.asarray(Image.open(file), dtype=np.float32))
        assert (ours - theirs).abs().mean() < 0.5 * (image - theirs).abs().mean() + 0.3
        assert (ours - theirs).abs().mean() < 1.5


@pytest.mark.parametrize("side", [0.6, 1.0, 1.5])
def test_frame_shows_less_or_more_about_the_centre(side):
    place = torch.arange(78) - 38.5
    disc = (place[:, None].square() + place.square() < 15**2).float().expand(3, 1, 78, 78)
    result = frame(disc, (side, side), 0.0, generator())
    assert result.sum((1, 2, 3)).tolist() == pytest.approx((disc.sum((1, 2, 3)) / side**2).tolist(), rel=0.02)
    torch.testing.assert_close(result, result.flip(-1, -2), rtol=0, atol=1e-3)


def test_frame_of_another_aspect_makes_one_side_longer():
    place = torch.arange(78) - 38.5
    disc = (place[:, None].square() + place.square() < 15**2).float().expand(16, 1, 78, 78)
    result = frame(disc, (1.0, 1.0), 0.5, generator())
    height, width = result.amax(3).sum((1, 2)), result.amax(2).sum((1, 2))
    ratio = height / width
    assert 1 / 1.6 < ratio.min() < 0.85
    assert 1.15 < ratio.max() < 1.6


def test_refocus_of_nothing_changes_nothing_and_haze_spreads_light(synthetic_cells):
    images = synthetic_cells.images
    torch.testing.assert_close(refocus(images, 0.0, 0.0, generator()), images, rtol=0, atol=1e-5)
    hazy, blurred = stretch(refocus(images, 0.0, 1.0, generator())), stretch(refocus(images, 2.0, 0.0, generator()))
    assert fine_detail(hazy).mean() < fine_detail(stretch(images)).mean()
    assert not torch.equal(hazy, blurred)


def test_rotate_as_reference_leaves_angle_0_and_turns_angle_90():
    images = torch.zeros(2, 1, 9, 9)
    images[:, :, 1:3, 2] = 0.5
    result = rotate_as_reference(images, torch.tensor([0, 5]), generator())
    torch.testing.assert_close(result[0], images[0])
    turned = result[1] / result[1].max() * 0.5
    assert any(torch.allclose(turned, torch.rot90(images[1], k, (1, 2)), atol=1e-4) for k in (1, 3))


def test_mix_up_mixes_half_of_the_images_with_others_and_leaves_the_rest():
    images = torch.eye(8).view(8, 1, 1, 8)
    mixed = mix_up(images, generator())
    assert torch.equal(mixed[4:], images[4:])
    torch.testing.assert_close(mixed.sum((1, 2, 3)), torch.ones(8))
    assert mixed.min() >= 0
    assert (mixed[:4] > 0).sum() > 4
    assert torch.equal(mixed, mix_up(images, generator()))


def test_nuclear_stain_fills_the_nucleus_and_leaves_the_pattern(synthetic_cells):
    images = stretch(synthetic_cells.images)
    torch.testing.assert_close(add_nuclear_stain(images, torch.zeros_like(images), generator()), images)
    disc = (torch.linspace(-1, 1, 78).square()[:, None] + torch.linspace(-1, 1, 78).square() < 0.6).float()
    stained = add_nuclear_stain(images, disc.expand_as(images), generator())
    assert stained.min() >= 0
    assert stained.max() <= 1
    nucleus, corners = disc > 0, torch.zeros(78, 78, dtype=torch.bool)
    corners[:4, :4] = True
    grown = (stained - images)[..., nucleus].mean(2) - (stained - images)[..., corners].mean(2)
    assert (grown > 0.01).float().mean() > 0.5
    grains = torch.zeros(64, 1, 78, 78)
    for row in (30, 39, 48):
        for column in (30, 39, 48):
            grains[..., row : row + 3, column : column + 3] = 1
    stained = add_nuclear_stain(grains, disc.expand_as(grains), generator())
    between = stained[..., 34:38, 34:38].amax((2, 3))
    assert (stained[grains > 0] > 0.99).all()
    assert (between < 0.99).all()
    assert between.max() > 0.4


def test_as_strangers_shifts_each_image_once_and_for_all(synthetic_cells):
    images = synthetic_cells.images
    before = images.clone()
    shifted = as_strangers(images, generator(3))
    assert torch.equal(images, before)
    assert shifted.shape == images.shape
    assert shifted.dtype == torch.float32
    assert shifted.min() >= 0
    assert shifted.max() <= 1
    assert torch.equal(shifted, as_strangers(images, generator(3)))
    assert not torch.equal(shifted, as_strangers(images, generator(4)))
    assert ((shifted - images).abs().mean((1, 2, 3)) > 0.01).all()
