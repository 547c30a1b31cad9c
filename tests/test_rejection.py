import numpy as np
import pytest
import torch
from conftest import small_classifier

from hep2.augmentation import as_strangers
from hep2.losses import Examples
from hep2.models import Classifier
from hep2.patterns import CLASS_NAMES
from hep2.pipeline import examples_of
from hep2.predictor import Failure, Prediction
from hep2.rejection import REJECTED_VALIDATION, fit_rejection
from hep2.rejection.negatives import NEGATIVES, draw_negatives
from hep2.synthetic import reduce_field, synthetic_cell, synthetic_fields


@pytest.fixture(scope="module")
def parts(synthetic_cells) -> tuple[Examples, Examples]:
    """Train and validation cells."""
    order = torch.randperm(len(synthetic_cells), generator=torch.Generator().manual_seed(0))
    return tuple(examples_of(synthetic_cells, some.numpy()) for some in (order[:40], order[40:]))


@pytest.fixture(scope="module")
def fitted(parts) -> tuple[Classifier, dict]:
    classifier = small_classifier()
    return classifier, fit_rejection(classifier, *parts, seed=0)


def test_fit_rejection_tells_cells_from_negatives_it_has_not_seen(fitted, parts):
    classifier, how = fitted
    train, validation = parts
    negatives, _ = draw_negatives(150, train.inputs[:, 0].numpy(), np.random.default_rng(1))
    with torch.inference_mode():
        cells = classifier(as_strangers(validation.inputs, torch.Generator().manual_seed(5)))
        others = classifier(torch.from_numpy(negatives))
    assert cells.rejected.float().mean() < 0.2
    assert others.rejected.float().mean() > 2 * cells.rejected.float().mean() + 0.1
    # Chosen at random, a cell scores higher than a negative in most cases, though the models know nothing.
    assert (cells.rejection[:, None] > others.rejection).float().mean() > 0.75
    assert how["negatives"] == len(train.inputs)


def test_fit_rejection_rejects_the_share_of_validation_cells_that_it_says(fitted, parts):
    classifier, how = fitted
    validation = parts[1].inputs
    with torch.inference_mode():
        rejected = classifier(as_strangers(validation, torch.Generator().manual_seed(0))).rejected
    assert how["rejected_validation"] == REJECTED_VALIDATION
    # Another shift of the same cells than the one that the threshold was set on.
    assert rejected.float().mean() == pytest.approx(REJECTED_VALIDATION, abs=4 / len(validation))


def test_fit_rejection_depends_on_the_seed_and_changes_no_cell_and_no_model(fitted, parts):
    before = parts[0].inputs.clone()
    again, other = small_classifier(), small_classifier()
    fit_rejection(again, *parts, seed=0)
    fit_rejection(other, *parts, seed=1)
    assert torch.equal(parts[0].inputs, before)
    ours, same, another = (classifier.state_dict() for classifier in (fitted[0], again, other))
    assert all(torch.equal(ours[key], same[key]) for key in ours)
    assert not torch.equal(ours["rejection.linear.weight"], another["rejection.linear.weight"])
    assert all(torch.equal(ours[key], another[key]) for key in ours if not key.startswith("rejection."))


def test_a_classifier_without_a_fitted_rejection_rejects_nothing():
    with torch.inference_mode():
        assert not small_classifier()(torch.rand(5, 1, 78, 78)).rejected.any()


@pytest.mark.parametrize("pattern", CLASS_NAMES)
def test_bundled_weights_reject_few_synthetic_cells(bundled, pattern):
    random = np.random.default_rng(5)
    predictions = list(bundled.classify((str(n), synthetic_cell(pattern, random)) for n in range(25)))
    # Measured: none, but one of Nucleolar, whose faint nuclei are drawn fainter than the contest's.
    assert sum(prediction.rejected for prediction in predictions) <= 3


def test_bundled_weights_give_fields_no_verdict_as_cells(bundled):
    fields = [field for seed in range(1, 5) for _, field in synthetic_fields(seed)]
    assert all(prediction.verdict is None for prediction in bundled.classify(fields[:6]))  # they are too large
    reduced = [reduce_field(field, [], 0.5)[0] for field in fields]
    # Measured: 22 of 24.
    assert sum(prediction.rejected for prediction in bundled.classify(reduced)) >= 20


@pytest.mark.slow
def test_bundled_weights_reject_negatives(bundled):
    cells = np.stack([synthetic_cell(p, np.random.default_rng(n)) for p in CLASS_NAMES for n in range(4)]) / 255
    random = np.random.default_rng(3)
    rejected, examples = {}, []
    for kind, draw in NEGATIVES.items():
        answers = list(bundled.classify((kind, draw(random, cells.astype(np.float32))) for _ in range(20)))
        # A constant image is a failure, which is no verdict either.
        rejected[kind] = sum(isinstance(answer, Failure) or answer.rejected for answer in answers)
        examples += [answer.as_dict() for answer in answers if isinstance(answer, Prediction) and answer.rejected]
    # Measured: 72 %, from 6 of 20 (nuclear dots) to all. A stronger layer rejects more of what we draw, and turns away
    # other laboratories' cells: see docs/robustness.md.
    assert sum(rejected.values()) >= 0.68 * 20 * len(rejected), rejected
    assert sum(rejected[kind] for kind in ("noise", "stripes", "clutter", "writing", "background")) >= 90, rejected
    assert {(answer["verdict"], answer["probability"]) for answer in examples} == {(None, None)}
    assert all(answer["warnings"][0].startswith("rejected: ") for answer in examples)
