import numpy as np
import pytest
import torch

from hep2.augmentation import add_nuclear_stain, augment_paper, augment_tuned, dihedral, stretch, translate
from hep2.imaging import prepare


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


CHANGES = {"zoom": 0.25, "sharpness": 1.0, "haze": 0.3, "noise": 0.2, "exposure": 0.6}


@pytest.mark.parametrize(
    "augment",
    [
        augment_tuned,
        lambda x, g: augment_tuned(x, g, **CHANGES, share=0.5),
        lambda x, g: augment_paper(x, torch.arange(len(x)) % 6, g),
    ],
)
def test_augmentation_keeps_shape_and_range_and_follows_the_generator(augment, phantoms):
    images = phantoms.images[:24]
    result = augment(images, generator(1))
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    torch.testing.assert_close(result, augment(images, generator(1)), rtol=0, atol=0)
    assert not torch.equal(result, augment(images, generator(2)))


def test_augment_paper_leaves_angle_0_and_turns_angle_90():
    images = torch.zeros(2, 1, 9, 9)
    images[:, :, 1:3, 2] = 0.5
    result = augment_paper(images, torch.tensor([0, 5]), generator())
    torch.testing.assert_close(result[0], images[0])
    turned = result[1] / result[1].max() * 0.5
    assert any(torch.allclose(turned, torch.rot90(images[1], k, (1, 2)), atol=1e-4) for k in (1, 3))


@pytest.mark.parametrize("change", CHANGES)
def test_augment_tuned_changes_a_share_of_the_images(change, phantoms):
    images = stretch(phantoms.images)
    still = {"shift": 0, "gain": 0.0, "offset": 0.0}
    moved = {tuple(image.flatten().sort().values.tolist()) for image in images}  # a turn leaves the values as they are
    for share, low, high in ((0.0, 0.0, 0.0), (0.5, 0.3, 0.7), (1.0, 0.9, 1.0)):
        result = augment_tuned(images, generator(), **still, **{change: CHANGES[change]}, share=share)
        changed = sum(tuple(image.flatten().sort().values.tolist()) not in moved for image in result)
        assert low <= changed / len(images) <= high


def test_augment_tuned_lets_light_that_is_too_bright_run_together(phantoms):
    images = stretch(phantoms.images)
    result = augment_tuned(images, generator(), gain=0.0, offset=0.0, exposure=3.0)
    assert (result == 1).float().mean() > 2 * (images == 1).float().mean()


def test_nuclear_stain_fills_the_nucleus_and_leaves_the_pattern(phantoms):
    images = stretch(phantoms.images)
    torch.testing.assert_close(add_nuclear_stain(images, torch.zeros_like(images), generator()), images)
    disc = (torch.linspace(-1, 1, 78).square()[:, None] + torch.linspace(-1, 1, 78).square() < 0.6).float()
    stained = add_nuclear_stain(images, disc.expand_as(images), generator())
    assert stained.min() >= 0 and stained.max() <= 1
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
    assert (stained[grains > 0] > 0.99).all() and (between < 0.99).all()
    assert between.max() > 0.4
