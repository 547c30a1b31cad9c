import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
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
# Only on a CPU two trainings are the same bit for bit.
os.environ["ACCELERATE_USE_CPU"] = "true"
# The tests' processes share out the cores, before PyTorch takes all of them in each.
os.environ.setdefault(
    "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
)

import timm
import torch
from accelerate import Accelerator
from filelock import FileLock
from torch import Tensor

import hep2
import train
from hep2.checkpoints import save_classifier
from hep2.data import Cells, load_cells
from hep2.models import BASE_MODELS, MODELS, Classifier, build_model
from hep2.recipes import RECIPES, WIDE, Plan, Recipe
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
# What `python train.py` does, in seconds.
TEACHER = "test_efficientnet"
QUICK = Recipe(
    epochs=2,
    batch_size=32,
    optimizer="adamw",
    learning_rate=3e-3,
    schedule="one-cycle",
    gradient_norm=1.0,
    augmentation=WIDE,
    ema_decay=0.9,
)
SMALL_PLAN = Plan(
    models=dict.fromkeys(BASE_MODELS, replace(QUICK, epochs=3, mix_up=True))
    | {"ensemble": replace(RECIPES["default"].models["ensemble"], epochs=2)},
    teachers={TEACHER: QUICK},
    architectures=SMALL,
)


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


class Interrupted(Exception):
    pass


class InterruptingAccelerator(Accelerator):
    """Ends a training in the middle, as a power cut would: after some steps, counted over all models."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps_left = steps

    def backward(self, loss: Tensor, **kwargs) -> None:
        if not self.steps_left:
            raise Interrupted
        self.steps_left -= 1
        super().backward(loss, **kwargs)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory) -> Path:
    """The weights of a small network of timm, as if they had been trained on other images."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(timm.create_model(TEACHER).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def cells_to_train_on() -> Cells:
    return load_cells("synthetic:40")


def run_train(output: Path, teacher: Path, *options: str) -> int:
    """Run `train.py` in this process, on synthetic cells, with small models and short recipes."""
    given = ["--dataset", "synthetic:40", "--teacher", f"{TEACHER}={teacher}", "--mixed-precision", "no"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "default", SMALL_PLAN)
        return train.main([*given, "--output", str(output), *options])


@pytest.fixture(scope="session")
def trained(teacher_file, tmp_path_factory) -> Path:
    """The output of a whole training run, to be read only, which all of the tests' processes share."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    output = folder / "trained" / "run"
    with FileLock(folder / "trained.lock"):
        if not (output / "metrics.json").exists():
            assert run_train(output, teacher_file) == 0
    return output


class Served(NamedTuple):
    """A page that is being served."""

    address: str
    process: subprocess.Popen
    cache: Path  # where uploads and what is made for downloading lie


# Below the ports that the system gives away, of which another process may get the same one: a hundred for each process.
PORTS = count(21_000 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))


def free_port() -> int:
    """Return a port that nobody listens at."""
    for port in PORTS:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)):
                return port


@contextmanager
def serving_page(*arguments: str) -> Iterator[Served]:
    """Start the page as its users do, in a process of its own."""
    port = free_port()
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
        process.kill()  # told to end, it waits for seconds for who is connected
        process.wait(timeout=20)


FIELD_SHAPE = (480, 640)


def field_of(pattern: str, seed: int = 0, **options) -> tuple[np.ndarray, list[SyntheticCell]]:
    """Draw a field that is small enough for a test, float32, and the cells that lie whole in it."""
    settings = {"shape": FIELD_SHAPE, "nucleus": 60.0} | options
    image, cells = synthetic_field(pattern, np.random.default_rng(seed), **settings)
    return image.astype(np.float32), cells
