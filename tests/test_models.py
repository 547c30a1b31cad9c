import pytest
import torch
from torch import nn

from hep2.models import MODELS, SpecimenSupervision, StackEnsemble, ViTConfig, build_model, probabilities
from hep2.patterns import CLASS_NAMES

SINGLE = [name for name in MODELS if name != "ensemble"]


@pytest.fixture(params=list(MODELS))
def model(request) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "ensemble":
        return StackEnsemble(build_model("cnn"), build_model("vit")).eval()
    return build_model(request.param).eval()


def test_forward_gives_six_finite_logits_that_do_not_depend_on_the_batch(model):
    images = torch.rand(5, 1, 78, 78)
    with torch.inference_mode():
        logits = model(images)
        assert logits.shape == (5, len(CLASS_NAMES))
        assert logits.isfinite().all()
        torch.testing.assert_close(model(images[2:3]), logits[2:3], rtol=1e-4, atol=1e-5)
    assert (logits.sum(1) - 1).abs().min() > 1e-3  # logits, not probabilities


def test_every_parameter_of_a_single_model_gets_a_gradient():
    for name in SINGLE:
        model = build_model(name, {"stochastic_depth": 0.0} if name == "vit" else {}).train()
        nn.functional.cross_entropy(model(torch.rand(4, 1, 78, 78)), torch.arange(4)).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["cnn", "rescnn"])
def test_convolutional_models_have_nine_convolutions_each_with_a_norm(name):
    model = build_model(name)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) == 9
    assert convolutions[0].padding == (2, 2)
    assert all(c.kernel_size == (3, 3) and c.stride == (1, 1) for c in convolutions)


def test_cnn_and_rescnn_differ_by_the_skips_alone():
    cnn, rescnn = build_model("cnn").eval(), build_model("rescnn").eval()
    rescnn.load_state_dict(cnn.state_dict())
    images = torch.rand(2, 1, 78, 78)
    assert not torch.allclose(cnn(images), rescnn(images))
    for block in rescnn.blocks:
        block.skip = False
    torch.testing.assert_close(cnn(images), rescnn(images))


def test_vit_reads_its_class_token_alone_where_asked():
    model = build_model("vit", {"stem_widths": [], "pooling": "class token"}).eval()
    tokens = torch.rand(2, 170, 128)
    torch.testing.assert_close(model.pool(tokens), tokens[:, 0])
    assert model(torch.rand(1, 1, 78, 78)).shape == (1, 6)


@pytest.mark.parametrize("patch_size", [1, 2, 3, 6, 13, 26, 39, 78])
def test_vit_config_takes_every_divisor_of_78(patch_size):
    assert ViTConfig(patch_size=patch_size, stem_widths=()).patch_size == patch_size


@pytest.mark.parametrize(
    "change",
    [
        {"patch_size": 26},
        {"stem_widths": (16, 48)},
        {"width": 64},
        {"depth": 2},
        {"heads": 8},
        {"mlp_ratio": 4.0},
        {"stochastic_depth": 0.2},
        {"pooling": "class token"},
    ],
)
def test_a_vit_of_another_shape_shows_it(change):
    # A run that goes on compares what its model prints.
    assert repr(build_model("vit", change)) != repr(build_model("vit"))


@pytest.mark.parametrize("patch_size", [0, -6, 4, 7, 16, 79])
def test_vit_config_refuses_a_patch_size_that_does_not_divide_78(patch_size):
    with pytest.raises(ValueError, match=r"does not divide 78: choose one of \[1, 2, 3, 6, 13, 26, 39, 78\]"):
        build_model("vit", {"patch_size": patch_size})


@pytest.mark.parametrize(
    ("name", "architecture", "message"),
    [
        ("alexnet", {}, "choose one of"),
        ("ensemble", {}, "choose one of"),
        ("cnn", {"depth": 3}, "unknown fields"),
        ("cnn", {"widths": [32, 64]}, "four positive whole numbers"),
        ("cnn", {"widths": [32, 64, 128, -1]}, "four positive whole numbers"),
        ("vit", {"width": 100, "heads": 3}, "heads"),
        ("vit", {"heads": 0}, "positive whole numbers"),
        ("vit", {"patch_size": 13}, "stem"),
        ("vit", {"stem_widths": [8]}, "stem_widths"),
        ("vit", {"pooling": "max"}, "pooling"),
    ],
)
def test_build_model_says_what_does_not_fit(name, architecture, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, architecture)


def test_ensemble_reads_its_members_probabilities_and_trains_one_linear_layer():
    torch.manual_seed(0)
    cnn, vit = build_model("cnn"), build_model("vit")
    ensemble = StackEnsemble(cnn, vit, (2.0, 0.5)).train()
    assert not cnn.training
    assert not vit.training
    assert [n for n, p in ensemble.named_parameters() if p.requires_grad] == ["linear.weight", "linear.bias"]
    assert ensemble.linear.weight.shape == (6, 12)
    images = torch.rand(3, 1, 78, 78)
    expected = torch.cat([(cnn(images) / 2).softmax(1), (vit(images) / 0.5).softmax(1)], 1)
    torch.testing.assert_close(ensemble.member_probabilities(images), expected)
    torch.testing.assert_close(ensemble(images), ensemble.linear(expected))


def test_specimen_supervision_trains_the_class_and_the_specimen_and_evaluates_the_class():
    torch.manual_seed(0)
    model = build_model("cnn", {"widths": [4, 4, 8, 8]})
    class_of = torch.tensor([0, 0, 1, 2, 3, 4, 5, 5])
    supervised = SpecimenSupervision(model, class_of)
    images, specimens = torch.rand(5, 1, 78, 78), torch.tensor([0, 1, 2, 6, 7])
    log_probabilities = supervised.train()(images)
    torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(5))
    pooled = model.pool(model.forward_features(images))
    within = supervised.specimens(pooled)
    expected = nn.functional.cross_entropy(model.head(pooled), class_of[specimens], reduction="sum")
    for row, specimen in enumerate(specimens):
        same = class_of == class_of[specimen]
        expected -= within[row, same].log_softmax(0)[int(same[:specimen].sum())]
    loss = nn.functional.cross_entropy(log_probabilities, specimens, reduction="sum")
    torch.testing.assert_close(loss, expected)
    supervised.eval()
    torch.testing.assert_close(supervised(images), model(images))


def test_specimen_supervision_that_tells_none_apart_trains_the_class_alone():
    torch.manual_seed(0)
    model = build_model("cnn", {"widths": [4, 4, 8, 8]}).train()
    supervised = SpecimenSupervision(model, torch.tensor([0, 0, 1, 2, 3, 4, 5, 5])).train()
    supervised.telling_apart = False
    images = torch.rand(5, 1, 78, 78)
    logits = supervised(images)
    torch.testing.assert_close(logits, model(images))
    logits.square().sum().backward()
    assert not supervised.specimens.weight.grad.any()  # and not None, which several processes would wait for


def test_probabilities_sum_to_one_and_soften_with_temperature():
    logits = torch.tensor([[5.0, 0, 0, 0, 0, 0]])
    assert probabilities(logits).sum().item() == pytest.approx(1)
    assert probabilities(logits, 2.0).max() < probabilities(logits).max()
