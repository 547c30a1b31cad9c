import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hep2.models import BASE_MODELS, MODELS, build_model
from hep2.recipes import RECIPES, Recipe, choose_plan, with_changes

RECIPE = Recipe(epochs=3, batch_size=8, optimizer="adamw", learning_rate=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_every_model_and_is_json(name):
    plan = RECIPES[name]
    assert list(plan.models) == list(MODELS)
    for recipe in (*plan.models.values(), *plan.teachers.values()):
        assert Recipe(**json.loads(json.dumps(asdict(recipe)))) == recipe
    for model, architecture in plan.architectures.items():
        build_model(model, architecture)


def test_models_that_are_distilled_together_have_one_recipe():
    plan = RECIPES["default"]
    assert plan.teachers
    assert len({json.dumps(asdict(plan.models[name])) for name in BASE_MODELS}) == 1
    assert not any(RECIPES[name].teachers for name in RECIPES if name != "default")


@pytest.mark.parametrize(
    "model, decay, patience, epochs",
    [("cnn", 1e-3, 2, 73), ("rescnn", 5e-3, 2, 73), ("vit", 1e-3, 2, 20), ("ensemble", 1e-3, 1, 20)],
)
def test_the_reference_recipe_has_the_references_figures(model, decay, patience, epochs):
    recipe = RECIPES["reference"].models[model]
    assert (recipe.optimizer, recipe.learning_rate, recipe.momentum) == ("sgd", 1e-4, 0.4)
    assert (recipe.weight_decay, recipe.patience, recipe.min_delta) == (decay, patience, 1e-3)
    assert (recipe.epochs, recipe.schedule, recipe.label_smoothing, recipe.ema_decay) == (epochs, "constant", 0, None)


def test_with_changes_changes_all_networks_but_not_the_stack():
    plan = RECIPES["default"]
    changed = with_changes(plan, {"epochs": 2, "batch_size": 16})
    for recipe in (*(changed.models[name] for name in BASE_MODELS), *changed.teachers.values()):
        assert (recipe.epochs, recipe.batch_size) == (2, 16)
    assert changed.models["ensemble"] == plan.models["ensemble"]
    assert with_changes(plan, {}) == plan


@pytest.mark.parametrize(
    "change, named",
    [
        ({"optimizer": "adam"}, "optimizer is 'adam': choose one of"),
        ({"schedule": "cosine"}, "schedule"),
        ({"class_balance": "classes"}, "class_balance"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 1}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"warm_up": 1.0}, "warm_up"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"patience": 0}, "patience"),
        ({"rotations": True, "class_balance": "specimens"}, "rotations"),
        ({"rotations": True, "augmentation": {"shift": 3}}, "rotations"),
        ({"augmentation": {"share": 1.5}}, "share"),
    ],
)
def test_a_recipe_takes_no_values_that_do_not_fit(change, named):
    with pytest.raises(ValueError, match=named):
        replace(RECIPE, **change)


@pytest.mark.parametrize(
    ("teachers", "expected"),
    [
        (None, {"tf_efficientnet_lite0": None, "tf_efficientnet_lite2": None}),
        (["none"], {}),
        (["tf_efficientnet_lite0=a/b.safetensors"], {"tf_efficientnet_lite0": Path("a/b.safetensors")}),
        (["resnet18"], {"resnet18": None}),
    ],
)
def test_choose_plan_takes_teachers_and_their_files(teachers, expected):
    plan, files = choose_plan("default", teachers, {"epochs": 3, "batch_size": None})
    assert {name: files.get(name) for name in plan.teachers} == expected
    assert {recipe.epochs for recipe in plan.teachers.values()} <= {3}
    assert plan.models["cnn"].epochs == 3


def test_choose_plan_says_that_a_recipe_has_no_teachers():
    with pytest.raises(ValueError, match="'baseline' has no teachers"):
        choose_plan("baseline", ["resnet18"], {})
