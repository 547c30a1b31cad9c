import pytest
import torch
from conftest import small_classifier
from torch import nn

from hep2.models import BASE_MODELS, MODELS, Rejection, StackEnsemble, ViTConfig, build_model
from hep2.patterns import CLASS_NAMES


@pytest.fixture(params=BASE_MODELS)
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return build_model(request.param).eval()


def test_forward_gives_six_finite_logits_that_do_not_depend_on_the_batch(model):
    images = torch.rand(5, 1, 78, 78)
    with torch.inference_mode():
        logits = model(images)
        assert logits.shape == (5, len(CLASS_NAMES))
        assert logits.isfinite().all()
        torch.testing.assert_close(model(images[2:3]), logits[2:3], rtol=1e-4, atol=1e-5)
    assert (logits.sum(1) - 1).abs().min() > 1e-3  # logits, not probabilities


@pytest.mark.parametrize(("name", "architecture"), [("cnn", {}), ("rescnn", {}), ("vit", {"stochastic_depth": 0.0})])
def test_every_parameter_gets_a_gradient(name, architecture):
    model = build_model(name, architecture).train()
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


def test_vit_pools_its_class_token_alone_where_asked():
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
def test_vit_config_rejects_a_patch_size_that_does_not_divide_78(patch_size):
    with pytest.raises(ValueError, match=r"does not divide 78: choose one of \[1, 2, 3, 6, 13, 26, 39, 78\]"):
        build_model("vit", {"patch_size": patch_size})


@pytest.mark.parametrize(
    ("name", "architecture", "message"),
    [
        ("alexnet", {}, "choose one of"),
        ("ensemble", {"members": ["cnn"]}, "unknown fields"),
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


def test_stack_starts_as_the_mean_of_its_members_and_is_one_linear_layer():
    stack = StackEnsemble()
    assert [(name, tuple(p.shape)) for name, p in stack.named_parameters()] == [
        ("linear.weight", (6, 12)),
        ("linear.bias", (6,)),
    ]
    members = torch.rand(3, 2, 6).softmax(2)
    ranks = [values.argsort(1) for values in (stack(members.flatten(1)), members.mean(1))]
    assert torch.equal(*ranks)


def test_stack_keeps_single_precision_under_autocast():
    stack, shares = StackEnsemble(), torch.rand(3, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = stack(shares)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, stack(shares))


def test_rejection_scores_standardised_features_and_no_feature_decides_alone():
    rejection = Rejection(4)
    with torch.no_grad():
        rejection.linear.weight.fill_(1)
        rejection.linear.bias.zero_()
    rejection.mean.fill_(2)
    rejection.spread.fill_(0.5)
    scores = rejection(torch.tensor([[2.0, 2, 2, 2], [2.5, 2, 2, 2], [1e9, 2, 2, 2]]))
    torch.testing.assert_close(scores, torch.tensor([0.0, 1.0, 8.0]))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(5, 1, 78, 78, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_one_pass_of_the_classifier_is_the_four_models_called_one_by_one(images):
    classifier = small_classifier()
    classifier.rejection.threshold.fill_(0)
    answers = classifier(images)
    temperatures = dict(zip(MODELS, classifier.temperatures, strict=True))
    single = {name: (getattr(classifier, name)(images) / temperatures[name]).softmax(1) for name in BASE_MODELS}
    stacked = classifier.ensemble(torch.cat([single["cnn"], single["vit"]], dim=1))
    expected = [*single.values(), (stacked / temperatures["ensemble"]).softmax(1)]
    assert answers.probabilities.shape == (5, len(MODELS), len(CLASS_NAMES))
    torch.testing.assert_close(answers.probabilities, torch.stack(expected, dim=1), rtol=0, atol=1e-6)
    models = [getattr(classifier, name) for name in BASE_MODELS]
    pooled = torch.cat([model.pool(model.forward_features(images)) for model in models], dim=1)
    torch.testing.assert_close(answers.rejection, classifier.rejection(pooled), rtol=0, atol=1e-5)
    assert torch.equal(answers.rejected, answers.rejection < 0)


@torch.no_grad()
def test_classifier_runs_each_model_once(images):
    classifier, runs = small_classifier(), []
    for name in BASE_MODELS:
        stem = getattr(classifier, name).stem
        stem.register_forward_hook(lambda *_, name=name: runs.append(name))
    classifier(images)
    assert runs == list(BASE_MODELS)


@torch.no_grad()
def test_classifier_rejects_nothing_before_its_rejection_is_fitted(images):
    assert not small_classifier()(images).rejected.any()


@torch.no_grad()
def test_a_temperature_softens_one_models_answers_and_no_verdict(images):
    classifier = small_classifier()
    before = classifier(images).probabilities
    classifier.temperatures[1] *= 10
    after = classifier(images).probabilities
    changed = (before - after).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False, True, False, False]  # the stack does not take the ResCNN
    assert (after[:, 1].amax(1) < before[:, 1].amax(1)).all()
    assert torch.equal(after.argmax(2), before.argmax(2))
