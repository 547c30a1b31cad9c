import platform
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hep2.inference import PackedConvolution, PackedLinear, max_pool, ready_to_read
from hep2.models import build_model

NAMES = ("cnn", "rescnn", "vit")


def trained(name: str) -> nn.Module:
    """Build a model whose norms have seen something."""
    torch.manual_seed(0)
    model = build_model(name)
    model(torch.rand(8, 1, 78, 78))
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_ready_to_read_changes_no_answer(name):
    images = torch.rand(3, 1, 78, 78)
    with torch.inference_mode():
        expected = trained(name)(images)
    model = ready_to_read(trained(name))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with torch.inference_mode():
        for _ in range(2):  # the first pass packs the weights
            torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model(images[:1]), expected[:1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)  # with gradients, as an ordinary one


@pytest.mark.parametrize("name", NAMES)
def test_ready_to_read_packs_every_layer_and_bears_a_copy(name):
    model = ready_to_read(trained(name))
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert all(isinstance(layer, (PackedConvolution, PackedLinear)) for layer in layers)
    if name != "vit":
        assert all(block.first[0].activation == "relu" for block in model.blocks)
    image = torch.rand(1, 1, 78, 78)
    with torch.inference_mode():
        assert torch.equal(deepcopy(model)(image), model(image))
        if torch.backends.mkldnn.is_available() and platform.machine() == "x86_64":
            assert all(layer._weights is not None for layer in layers)
        assert torch.equal(deepcopy(model)(image), model(image))  # of a model that has packed its weights
    assert set(model.state_dict()) == set(deepcopy(model).state_dict())


def test_packed_layers_follow_their_weights():
    model, image = ready_to_read(trained("cnn")), torch.rand(1, 1, 78, 78)
    with torch.inference_mode():
        model(image)
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})
    with torch.inference_mode():
        assert (model(image) == 0).all()


@pytest.mark.parametrize("size", [(80, 80), (40, 40), (78, 78), (2, 6)])
def test_max_pool_gives_what_pytorch_gives(size):
    for features in (torch.randn(3, 8, *size), torch.zeros(1, 1, *size)):
        for layout in (torch.contiguous_format, torch.channels_last):
            laid_out = features.contiguous(memory_format=layout)
            with torch.inference_mode():
                pooled = max_pool(laid_out)
            assert torch.equal(pooled, F.max_pool2d(laid_out, 2))
            assert pooled.is_contiguous(memory_format=layout)


def test_max_pool_is_the_ordinary_one_where_gradients_are():
    features = torch.zeros(1, 1, 4, 4, requires_grad=True)
    max_pool(features).sum().backward()
    assert features.grad.sum() == 4  # one winner of each four, also of equals
    assert features.grad.max() == 1
