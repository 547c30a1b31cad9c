import threading

import pytest
import torch
from torch import nn

from hep2.explain import look
from hep2.inference import ready_to_read
from hep2.models import build_model


@pytest.mark.parametrize("name", ["cnn", "rescnn", "vit"])
@pytest.mark.parametrize("prepare", [nn.Module.eval, ready_to_read])
def test_look_gives_the_forward_pass_and_a_map_of_the_cell(name, prepare, phantoms):
    torch.manual_seed(0)
    model = prepare(build_model(name))
    with torch.no_grad():
        model.head.bias.copy_(torch.arange(6.0))  # all speak for one class,
        model.head.weight[5] = model.head.weight[5].abs()  # for which each feature speaks
    features, maps = look(model, phantoms.images[:3])
    with torch.inference_mode():
        torch.testing.assert_close(model.head(features), model(phantoms.images[:3]))
    assert maps.shape == (3, 78, 78)
    assert maps.min() >= 0
    assert maps.amax((1, 2)).allclose(torch.ones(3))
    assert (maps.flatten(1).std(1) > 0.01).all()
    assert not model.training


def test_class_activation_points_at_what_speaks_for_the_class():
    # A model that sees brightness alone must point at the bright quarter.
    model = build_model("cnn", {"widths": [1, 1, 1, 1]}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("0.weight"):
                parameter.zero_()
                parameter[..., 1, 1] = 1
        model.head.weight.copy_(torch.tensor([[5.0], [0], [0], [0], [0], [0]]))
        model.head.bias.zero_()
    image = torch.zeros(1, 1, 78, 78)
    image[..., :30, 45:] = 1
    _, maps = look(model, image)
    assert maps[0, :30, 48:].mean() > 5 * maps[0, 45:, :30].mean()


def test_attention_points_at_the_patch_that_the_class_token_attends_to():
    torch.manual_seed(0)
    model = build_model("vit", {"stem_widths": [], "pooling": "class token", "depth": 1, "heads": 1}).eval()
    block = model.blocks[0]
    with torch.no_grad():
        # Queries are constant; keys follow one direction of the token, in which only one patch stands out.
        block.attn.qkv.weight.zero_()
        block.attn.qkv.bias.zero_()
        block.attn.qkv.bias[0] = 50
        block.attn.qkv.weight[128, 0] = 1
        model.positions.normal_()
        model.positions[..., 0] = 0
        model.positions[0, 1 + 5 * 13 + 7, 0] = 30
    _, maps = look(model, torch.zeros(1, 1, 78, 78))
    row, column = divmod(int(maps[0].argmax()), 78)
    assert (row // 6, column // 6) == (5, 7)


def test_look_keeps_to_its_own_cell_while_another_thread_reads_another(phantoms):
    torch.manual_seed(0)
    model = build_model("vit").eval()
    one, other = phantoms.images[:1], phantoms.images[30:31]
    alone = look(model, one)
    passes = []

    def read_other(module: torch.nn.Module, inputs: tuple) -> None:
        if not passes:  # in the midst of the first pass, once
            passes.append(threading.Thread(target=lambda: model(other)))
            passes[0].start()
            passes[0].join()

    handle = model.blocks[2].register_forward_pre_hook(read_other)
    together = look(model, one)
    handle.remove()
    assert passes
    for values, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(values, expected, rtol=0, atol=0)
