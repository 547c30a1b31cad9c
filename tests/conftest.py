import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    HUB_ADDRESS = _free.getsockname()
# huggingface_hub reads these when it is imported: no test can reach the real Hub, or the tester's own cache.
os.environ["HF_ENDPOINT"] = f"http://{HUB_ADDRESS[0]}:{HUB_ADDRESS[1]}"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hep2-tests-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ.pop("HF_TOKEN", None)
# The tests' processes share out the cores, before PyTorch takes all of them in each.
os.environ.setdefault(
    "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
)

import torch

import hep2
from hep2.checkpoints import save_classifier
from hep2.data import Cells, load_cells
from hep2.models import BASE_MODELS, MODELS, Classifier, build_model
from hep2.synthetic import SyntheticCell, synthetic_field

ROOT = Path(__file__).parents[1]
TRAINING = {
    "recipe": "none",
    "protocol": "deduplicated",
    "seed": 0,
    "fold": None,
    "dataset": "none",
    "dataset_fingerprint": "0",
}
SMALL = {
    "cnn": {"widths": [8, 8, 16, 16]},
    "rescnn": {"widths": [8, 8, 16, 16]},
    "vit": {"stem_widths": [8, 16], "width": 32, "depth": 2, "heads": 2},
}


@pytest.fixture(scope="session")
def synthetic_cells() -> Cells:
    return load_cells("synthetic:12")


@pytest.fixture(scope="session")
def real_cells() -> Cells:
    dataset = os.environ.get("HEP2_DATASET")
    if not dataset:
        pytest.skip("HEP2_DATASET names no local copy of the dataset")
    return load_cells(dataset)


def small_classifier(seed: int = 0) -> Classifier:
    """Build a small classifier with random weights, whose norms have seen something."""
    torch.manual_seed(seed)
    classifier = Classifier(*(build_model(name, SMALL[name]) for name in BASE_MODELS))
    with torch.no_grad():
        classifier.features(torch.rand(8, 1, 78, 78))
    classifier.temperatures.copy_(torch.tensor([1.5, 0.8, 1.25, 2.0]))
    return classifier.eval()


def save_untrained(folder: Path, seed: int = 0) -> Path:
    """Save a small classifier with random weights: whole and loadable, but knowing nothing."""
    save_classifier(folder, small_classifier(seed), training=TRAINING, models={name: {} for name in MODELS})
    return folder


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    """A folder of untrained weights, to be read only."""
    return save_untrained(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="session")
def bundled() -> hep2.Predictor:
    """A predictor with the weights that ship."""
    return hep2.load(device="cpu")


class Served(NamedTuple):
    """A page that is being served."""

    address: str
    process: subprocess.Popen
    cache: Path  # where uploads and what is made for downloading lie


@contextmanager
def serving_page(*arguments: str) -> Iterator[Served]:
    """Start the page as its users do, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    cache = Path(tempfile.mkdtemp(prefix="hep2-page-"))
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(cache)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert process.poll() is None, "the page did not start"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield Served(f"http://127.0.0.1:{port}/", process, cache)
    finally:
        process.terminate()
        process.wait(timeout=20)


FIELD_SHAPE = (480, 640)


def field_of(pattern: str, seed: int = 0, **options) -> tuple[np.ndarray, list[SyntheticCell]]:
    """Draw a field that is small enough for a test, float32, and the cells that lie whole in it."""
    settings = {"shape": FIELD_SHAPE, "nucleus": 60.0} | options
    image, cells = synthetic_field(pattern, np.random.default_rng(seed), **settings)
    return image.astype(np.float32), cells
