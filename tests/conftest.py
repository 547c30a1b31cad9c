import os
from pathlib import Path

import pytest
import torch

from hep2.data import Cells, load_cells
from hep2.models import StackEnsemble, build_model
from hep2.weights import save_model

ROOT = Path(__file__).parents[1]
TRAINING = {
    "recipe": "none",
    "protocol": "clean",
    "seed": 0,
    "fold": None,
    "dataset": "none",
    "dataset_fingerprint": "0",
}


@pytest.fixture(scope="session")
def phantoms() -> Cells:
    return load_cells("phantoms:12")


@pytest.fixture(scope="session")
def real_cells() -> Cells:
    dataset = os.environ.get("HEP2_DATASET")
    if not dataset:
        pytest.skip("HEP2_DATASET names no local copy of the dataset")
    return load_cells(dataset)


def save_untrained(folder: Path, seed: int = 0) -> Path:
    """Save four models with random weights: whole and loadable, but knowing nothing."""
    torch.manual_seed(seed)
    models = {name: build_model(name) for name in ("cnn", "rescnn", "vit")}
    models["ensemble"] = StackEnsemble(models["cnn"], models["vit"])
    for name, model in models.items():
        save_model(folder, name, model, training=TRAINING, temperature=1.5)
    return folder


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    """A folder of untrained weights, to be read only."""
    return save_untrained(tmp_path_factory.mktemp("untrained"))
