import numpy as np
import pytest
import torch
from conftest import small_classifier
from torch import nn

from hep2.models import BASE_MODELS, CNN, ViT, build_model
from hep2.saliency import saliency_map
from hep2.synthetic import synthetic_cell


def brightness_cnn(name: str) -> CNN:
    """Build a convolutional model that passes brightness on, of which its class Centromere is sure."""
    model = build_model(name, {"widths": [1, 1, 1, 1]}).eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.zero_()
                part.weight[..., 1, 1] = 1
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.weight[0] = 5
    return model


def brightness_vit(name: str) -> ViT:
    """Build a transformer whose first feature is a patch's brightness, of which its class Centromere is sure."""
    torch.manual_seed(0)
    model = build_model(name, {"stem_widths": [], "width": 16, "heads": 1, "depth": 2}).eval()
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):  # a block without these changes nothing
                layer.weight.zero_()
                layer.bias.zero_()
        model.patches.proj.weight.zero_()
        model.patches.proj.bias.zero_()
        model.patches.proj.weight[0] = 3 / 36
        model.positions.normal_()
        model.positions[..., 0] = 0
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.weight[0, 0] = 5
    return model


BUILD = {"cnn": brightness_cnn, "rescnn": brightness_cnn, "vit": brightness_vit}


@pytest.mark.parametrize("corner", [(0, 0), (0, 39), (39, 0), (39, 39)])
@pytest.mark.parametrize("name", BASE_MODELS)
def test_saliency_map_shows_where_a_pattern_lies(name, corner):
    row, column = corner
    cell = synthetic_cell("Homogeneous", np.random.default_rng(0)) / 255
    image = torch.zeros(1, 1, 78, 78)
    image[0, 0, row : row + 39, column : column + 39] = torch.from_numpy(cell[::2, ::2])
    values = saliency_map(BUILD[name](name), image)[0][0]
    there = torch.zeros(78, 78, dtype=torch.bool)
    there[row : row + 39, column : column + 39] = True
    assert values[there].mean() > 5 * values[~there].mean()
    assert there.flatten()[values.argmax()]


@pytest.mark.parametrize("name", BASE_MODELS)
def test_saliency_maps_lie_in_range_and_change_no_model(name):
    model = BUILD[name](name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.rand(3, 1, 78, 78, generator=torch.Generator().manual_seed(0))
    maps, pooled = saliency_map(model, images)
    torch.testing.assert_close(pooled, model.pool(model.forward_features(images)).detach())
    assert maps.shape == (3, 78, 78)
    assert maps.dtype == torch.float32
    assert maps.min() >= 0
    assert maps.amax((1, 2)).allclose(torch.ones(3))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", BASE_MODELS)
def test_a_saliency_map_is_of_its_own_image(name):
    model, images = getattr(small_classifier(), name), torch.rand(3, 1, 78, 78)
    alone = torch.cat([saliency_map(model, image[None])[0] for image in images])
    torch.testing.assert_close(saliency_map(model, images)[0], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BASE_MODELS)
def test_where_nothing_speaks_for_the_class_the_map_is_empty(name):
    model = getattr(small_classifier(), name)
    with torch.no_grad():
        model.head.weight.zero_()
    assert saliency_map(model, torch.rand(1, 1, 78, 78))[0].abs().max() == 0
