"""How fast the four models are on the machine at hand, beside ordinary networks measured in the same run."""

import io
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hep2.data import load_cells
from hep2.imaging import load_cell
from hep2.models import build_model
from hep2.patterns import CLASS_NAMES, IMAGE_SIZE
from hep2.peers import PEER_SIZE, PEERS, loading_request, peer_request
from hep2.phantoms import phantom_cell
from hep2.pipeline import examples_of
from hep2.reader import Reader, predict
from hep2.recipes import RECIPES
from hep2.training import augment, fit, in_epoch
from hep2.weights import Weights

AT_OURS = f"resnet18 at {IMAGE_SIZE} x {IMAGE_SIZE}"
ROUNDS = 6  # interleaved, so that a busy moment hits all sides
IN_A_ROW = 10  # requests of one side in a round: what the other side has left in caches is gone after the first
REST = 0.05  # seconds before a request that finds the process at rest
BULK = 256  # cells in one bulk measurement
BULK_ROUNDS = 5
PROCESSES = 3  # of each kind
MATRIX = 2048  # rows and columns of the matrices that measure what the machine can do at best

# What a process does from its start to its first verdict. Peers get their weights from a file, as they would.
STARTS = {
    "all four models": "import sys; from hep2.__main__ import main; main(['classify', '--json', sys.argv[1]])",
    "all four models, imports alone": "import sys, hep2.hub, hep2.reader",
    "resnet18": "import sys; from hep2.peers import first_answer; first_answer('resnet18', *sys.argv[1:])",
    "AlexNet": "import sys; from hep2.peers import first_answer; first_answer('AlexNet', *sys.argv[1:])",
}

# A process's own account: what its parent is told counts the parent's memory at the start too.
PEAK = "; print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')), file=sys.stderr)"


def measure_speed(weights: Weights) -> dict:
    """Measure latency, bulk, memory and start of all four models and of their peers, and how near the limit bulk is.

    All of it is measured on the device that the weights are on, but what a process does from its start on.
    Returns plain numbers: seconds, images a second, bytes, multiply-adds.
    """
    files = list(_files(BULK))
    reader, device = Reader(weights), weights.device
    peers = {name: make().eval() for name, make in PEERS.items()}
    with tempfile.TemporaryDirectory() as folder:
        alexnet = Path(folder) / "AlexNet.safetensors"
        save_file(peers["AlexNet"].state_dict(), alexnet)
        peers = {name: model.to(device) for name, model in peers.items()}
        one = {"all four models": lambda: next(reader.read([("cell.png", files[0])]))}
        one |= {name: peer_request(model, files[0]) for name, model in peers.items()}
        one["AlexNet, loaded at every request"] = loading_request(alexnet, files[0], device)
        latency = {name: _percentiles(seconds) for name, seconds in interleaved(one, ROUNDS, in_a_row=IN_A_ROW).items()}
        rested = {name: one[name] for name in ("all four models", "resnet18")}
        rested = {name: _percentiles(values) for name, values in interleaved(rested, 2 * IN_A_ROW, rest=REST).items()}
    cells = torch.from_numpy(np.stack([load_cell(file).pixels for file in files]))
    inputs = {name: torch.rand(32, 3, PEER_SIZE, PEER_SIZE, device=device) for name in peers}
    # What its usual size costs a peer that could read cells at theirs.
    peers[AT_OURS], inputs[AT_OURS] = peers["resnet18"], torch.rand(128, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    bulk = {"all four models": lambda: predict(weights, cells)}
    bulk["all four models, from file bytes"] = lambda: list(reader.read((str(n), f) for n, f in enumerate(files)))
    bulk |= {name: _peer_batch(model, inputs[name]) for name, model in peers.items()}
    counts = dict.fromkeys(bulk, len(files)) | {name: len(images) for name, images in inputs.items()}
    seconds = interleaved(bulk | {"matrix multiplication": _matrix_multiplication(device)}, BULK_ROUNDS)
    best = {name: min(values) for name, values in seconds.items()}
    rate = MATRIX**3 / best["matrix multiplication"]
    own = sum(
        multiply_adds(model, cells[:1].to(device)) for name, model in weights.models.items() if name != "ensemble"
    )
    work = {"all four models": own} | {name: multiply_adds(model, inputs[name][:1]) for name, model in peers.items()}
    per_second = {name: counts[name] / best[name] for name in bulk}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "latency": latency,
        "latency_after_rest": rested,
        "images_per_second": per_second,
        "multiply_adds": work,
        "matrix_multiply_adds_per_second": rate,
        "share_of_matrix_rate": {name: work[name] * per_second[name] / rate for name in work},
        "processes": measure_processes(),
    }


def _files(count: int) -> Iterator[bytes]:
    """Yield PNG files of phantoms, pattern after pattern."""
    random = np.random.default_rng(0)
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(phantom_cell(CLASS_NAMES[number % len(CLASS_NAMES)], random)).save(file, "PNG")
        yield file.getvalue()


def _peer_batch(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    model, images = (part.to(memory_format=torch.channels_last) for part in (model, images))

    @torch.inference_mode()
    def batch() -> Tensor:
        return model(images)

    return batch


def _matrix_multiplication(device: str) -> Callable[[], Tensor]:
    one, other = torch.rand(2, MATRIX, MATRIX, device=device)
    return lambda: one @ other


def interleaved(
    tasks: dict[str, Callable], rounds: int, *, in_a_row: int = 1, rest: float = 0.0
) -> dict[str, list[float]]:
    """Time every task `in_a_row` times a round, after one round that does not count; returns seconds.

    Each round has an order of its own, as what loads much leaves cold caches to the next. Before each time goes a
    `rest`, in seconds.
    """
    seconds = {name: [] for name in tasks}
    random = np.random.default_rng(0)
    for count in range(rounds + 1):
        for name in random.permutation(list(tasks)).tolist():
            for _ in range(in_a_row):
                time.sleep(rest)
                started = time.perf_counter()
                tasks[name]()
                _finish()
                if count:
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def _finish() -> None:
    """Wait for what a card has been given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "percentile_95": float(np.quantile(seconds, 0.95))}


def multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Count the multiply-adds of one forward pass, from the shapes that go through it."""
    # It knows neither packed layers, which need gradients off, nor fused attention.
    with FlopCounterMode(display=False) as counter, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        model(image)
    return counter.get_total_flops() // 2


def measure_processes() -> dict[str, dict[str, float]]:
    """Measure processes from their start to the first verdict: median seconds, and the most memory held, in bytes.

    On other systems than Linux the memory is 0, for unknown.
    """
    with tempfile.TemporaryDirectory() as folder:
        cell = Path(folder) / "cell.png"
        cell.write_bytes(next(_files(1)))
        for name in ("resnet18", "AlexNet"):
            save_file(PEERS[name]().state_dict(), Path(folder) / f"{name}.safetensors")
        memory: dict[str, int] = {}

        def start(name: str) -> None:
            arguments = [str(cell), *([str(Path(folder) / f"{name}.safetensors")] if name in PEERS else [])]
            code = STARTS[name] + (PEAK if sys.platform == "linux" else "")
            process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
            if process.returncode:
                raise RuntimeError(f"the process that measures {name!r} failed: {process.stderr}")
            peak = re.search(r"VmHWM:\s+(\d+) kB", process.stderr)
            memory[name] = int(peak[1]) * 1024 if peak else 0

        seconds = interleaved({name: partial(start, name) for name in STARTS}, PROCESSES)
    return {name: {"seconds": statistics.median(values), "bytes": memory[name]} for name, values in seconds.items()}


def measure_training(names: tuple[str, ...] = ("cnn", "rescnn", "vit"), batches: int = 12) -> dict[str, dict]:
    """Measure the tuned recipe's training on phantoms, as in its finish but with no specimens told apart.

    It takes the mixed precision of `train.py`.
    Returns for each model images a second, the share of the time that augmentation takes, and the share of the bound:
    three forward passes' multiply-adds an image at the machine's rate of matrix multiplication at that precision.
    """
    accelerator = Accelerator(mixed_precision="bf16")
    measured = {}
    for name in names:
        recipe = RECIPES["tuned"][name]
        recipe = replace(in_epoch(recipe, recipe.epochs - 1), epochs=1, finish=0.0, specimen_supervision=False)
        cells = load_cells(f"phantoms:{batches * recipe.batch_size // len(CLASS_NAMES)}")
        examples, model = examples_of(cells, np.arange(len(cells))), build_model(name)
        work = 3 * multiply_adds(model.eval(), cells.images[:1])
        with tempfile.TemporaryDirectory() as folder:
            few = examples_of(cells, np.arange(len(cells))[: recipe.batch_size])
            history = fit(
                model, examples, few, recipe, directory=Path(folder), seed=0, accelerator=accelerator, progress=False
            )
        generator = torch.Generator().manual_seed(0)
        started = time.perf_counter()
        for part in cells.images.to(accelerator.device).split(recipe.batch_size):
            augment(part, recipe, generator)
        _finish()
        augmenting = time.perf_counter() - started
        one, other = torch.rand(2, MATRIX, MATRIX, device=accelerator.device, dtype=torch.bfloat16)
        rate = MATRIX**3 / min(
            interleaved({"": lambda one=one, other=other: (one @ other).sum().item()}, BULK_ROUNDS)[""]
        )
        measured[name] = {
            "images_per_second": history[0]["images_per_second"],
            "augmentation_share": augmenting / (len(cells) / history[0]["images_per_second"]),
            "share_of_matrix_rate": work * history[0]["images_per_second"] / rate,
        }
    return measured


def speed_tables(result: dict) -> str:
    """Set out what `python -m hep2 bench` measured, in Markdown."""
    lines = [
        f"{result['device']}, {result['threads']} threads, PyTorch {result['torch']}, matrix multiplication at "
        f"{result['matrix_multiply_adds_per_second'] / 1e9:.1f} G multiply-adds a second",
        "",
        "| one request, from file bytes to verdict | median, ms | 95th percentile, ms | beside resnet18 |",
        "|---|---|---|---|",
    ]
    for field, remark in (("latency", ""), ("latency_after_rest", ", after a rest")):
        for name, row in result[field].items():
            ratio = row["median"] / result[field]["resnet18"]["median"]
            times = f"{row['median'] * 1e3:.1f} | {row['percentile_95'] * 1e3:.1f}"
            lines.append(f"| {name}{remark} | {times} | {ratio:.2f} |")
    lines += [
        "",
        "| in bulk | images a second | beside resnet18 | M multiply-adds | share of matrix rate |",
        "|---|---|---|---|---|",
    ]
    for name, rate in result["images_per_second"].items():
        work, share = result["multiply_adds"].get(name), result["share_of_matrix_rate"].get(name)
        counted = "" if work is None else f"{work / 1e6:.0f} | {share:.0%}"
        ratio = rate / result["images_per_second"]["resnet18"]
        lines.append(f"| {name} | {rate:.0f} | {ratio:.1f} | {counted or '|'} |")
    lines += ["", "| process, to the first verdict | seconds | MB |", "|---|---|---|"]
    lines += [
        f"| {name} | {row['seconds']:.1f} | {row['bytes'] / 1e6:.0f} |" for name, row in result["processes"].items()
    ]
    if "training" in result:
        lines += [
            "",
            "| training | images a second | share of augmentation | share of matrix rate |",
            "|---|---|---|---|",
        ]
        for name, row in result["training"].items():
            shares = f"{row['augmentation_share']:.0%} | {row['share_of_matrix_rate']:.0%}"
            lines.append(f"| {name} | {row['images_per_second']:.0f} | {shares} |")
    return "\n".join(lines)
