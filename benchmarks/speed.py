"""How fast the four models are on the machine at hand, beside ordinary networks measured in the same run.

    python -m benchmarks.speed [--weights …] [--json] [--training]

Measures a request from a file's bytes to the verdict, many cells in bulk, the start of a process and its memory, with
the peers in `benchmarks/peers.py` in turn, so that a busy moment hits all of them. On a GPU also half precision, which
is what it serves in, beside single precision: rate and verdicts, on `--dataset` if one is given. `--training` adds a
few steps of training by the recipe `default`. Two minutes of two idle cores, four with training.
"""

import io
import json
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
from PIL import Image
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import make_accelerator, make_parser, own_split, table
from benchmarks.peers import PEER_SIZE, PEERS, answer, load_peer
from hep2.augmentation import augment
from hep2.checkpoints import Weights
from hep2.data import load_cells
from hep2.hub import find_weights
from hep2.images import load_cell
from hep2.models import BASE_MODELS, build_model
from hep2.patterns import CLASS_NAMES, IMAGE_SIZE
from hep2.pipeline import examples_of
from hep2.predictor import GPU_BATCH, Predictor, optimized_for_serving
from hep2.recipes import RECIPES
from hep2.synthetic import synthetic_cell
from hep2.teacher import Teacher, Teachers
from hep2.training import fit

OURS = "all four models"
SMALL_INPUT = f"resnet18 at {IMAGE_SIZE} x {IMAGE_SIZE}"
ROUNDS = 6  # interleaved, so that a busy moment hits all sides
IN_A_ROW = 10  # requests of one side in a round: what the other side has left in caches is gone after the first
BULK = 256  # cells in one bulk measurement, on a GPU times 64
BULK_ROUNDS = 5
PROCESSES = 3  # of each kind
# What a process does from its start to its first verdict. Peers get their weights from a file, as they would.
STARTS = {
    OURS: "import sys; from hep2.__main__ import main; main(['classify', '--json', sys.argv[1]])",
    f"{OURS}, imports alone": "import sys, hep2.hub, hep2.predictor",
    "resnet18": "import sys; from benchmarks.peers import first_answer; first_answer('resnet18', *sys.argv[1:])",
    "AlexNet": "import sys; from benchmarks.peers import first_answer; first_answer('AlexNet', *sys.argv[1:])",
}
# A process's own account: what its parent is told counts the parent's memory at the start too.
PEAK = "; print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')), file=sys.stderr)"


def main(argv: list[str] | None = None) -> int:
    """Measure, and print tables in Markdown or a JSON object; returns the exit status."""
    parser = make_parser(__doc__, weights=True)
    parser.add_argument("--dataset", help="whose test cells half precision is compared on (default: synthetic cells)")
    parser.add_argument("--training", action="store_true", help="measure training as well")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    arguments = parser.parse_args(argv)
    weights = find_weights(arguments.weights)
    result = measure_speed(Predictor(weights))
    if torch.cuda.is_available():
        cells = load_cells(arguments.dataset or "synthetic:50")
        images = cells.images[own_split(weights, cells).test] if arguments.dataset else cells.images
        result["half_precision"] = measure_half_precision(weights, images)
    if arguments.training:
        result["training"] = measure_training()
    print(json.dumps(result) if arguments.json else tables(result))
    return 0


def measure_speed(predictor: Predictor) -> dict:
    """Measure latency, bulk, memory and start of all four models and of their peers, on the predictor's device.

    Returns plain numbers: seconds, images a second, bytes, multiply-adds.
    """
    device, files = predictor.device, list(draw_files(BULK))
    on_gpu = device.type == "cuda"
    peers = {name: make().eval() for name, make in PEERS.items()}
    with tempfile.TemporaryDirectory() as folder:
        alexnet = Path(folder) / "AlexNet.safetensors"
        save_file(peers["AlexNet"].state_dict(), alexnet)
        peers = {name: model.to(device, memory_format=torch.channels_last) for name, model in peers.items()}
        one = {OURS: lambda: next(predictor.classify([files[0]]))}
        one |= {name: partial(answer, model, files[0]) for name, model in peers.items()}
        one["AlexNet, loaded at every request"] = lambda: answer(load_peer("AlexNet", alexnet).to(device), files[0])
        latency = {name: percentiles(seconds) for name, seconds in interleaved(one, ROUNDS, IN_A_ROW).items()}
    cells = torch.from_numpy(np.stack([load_cell(file).pixels for file in files]))
    inputs = {name: torch.rand(32, 3, PEER_SIZE, PEER_SIZE, device=device) for name in peers}
    # What its usual size costs a peer that could read cells at theirs.
    peers[SMALL_INPUT], inputs[SMALL_INPUT] = peers["resnet18"], torch.rand(128, 3, *cells.shape[2:], device=device)
    inputs = {name: images.contiguous(memory_format=torch.channels_last) for name, images in inputs.items()}
    many = cells.repeat(64 if on_gpu else 1, 1, 1, 1)
    bulk = {OURS: lambda: predictor(many), f"{OURS}, from file bytes": lambda: list(predictor.classify(files))}
    counts = {OURS: len(many), f"{OURS}, from file bytes": len(files)}
    if on_gpu:
        there = many.to(device)
        bulk[f"{OURS}, cells on the GPU"], counts[f"{OURS}, cells on the GPU"] = lambda: predictor(there), len(there)
    bulk |= {name: partial(_forward, model, inputs[name]) for name, model in peers.items()}
    counts |= {name: len(images) for name, images in inputs.items()}
    seconds = interleaved(bulk, BULK_ROUNDS)
    work = {OURS: multiply_adds(predictor.weights.classifier, cells[:1])}
    work |= {name: multiply_adds(model, inputs[name][:1]) for name, model in peers.items()}
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "latency": latency,
        "images_per_second": {name: counts[name] / min(values) for name, values in seconds.items()},
        "multiply_adds": work,
        "processes": measure_processes(),
    }


def measure_half_precision(weights: Weights, images: Tensor) -> dict:
    """Compare half precision on a GPU, which it serves in, with single precision there: rates and answers."""
    half = Predictor(weights, "cuda")
    single = optimized_for_serving(weights.classifier, torch.device("cpu")).to("cuda")
    many = images.repeat(-(-64 * BULK // len(images)), 1, 1, 1).to("cuda")

    @torch.inference_mode()
    def singly(cells: Tensor) -> np.ndarray:
        return torch.cat([single(part).probabilities for part in cells.split(GPU_BATCH)]).cpu().numpy()

    seconds = interleaved({"half": lambda: half(many), "single": lambda: singly(many)}, BULK_ROUNDS)
    one, other = np.stack(list(half(images).probabilities.values()), axis=1), singly(images.to("cuda"))
    return {
        "images": len(images),
        "images_per_second": {name: len(many) / min(values) for name, values in seconds.items()},
        "same_verdicts": int((one[:, -1].argmax(1) == other[:, -1].argmax(1)).sum()),
        "largest_difference": float(abs(one - other).max()),
    }


def draw_files(count: int) -> Iterator[bytes]:
    """Yield PNG files of synthetic cells, pattern after pattern."""
    random = np.random.default_rng(0)
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(synthetic_cell(CLASS_NAMES[number % len(CLASS_NAMES)], random)).save(file, "PNG")
        yield file.getvalue()


@torch.inference_mode()
def _forward(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def interleaved(tasks: dict[str, Callable], rounds: int, in_a_row: int = 1) -> dict[str, list[float]]:
    """Time every task `in_a_row` times a round, after one round that does not count; returns seconds.

    Each round has an order of its own, as what loads much leaves cold caches to the next.
    """
    seconds = {name: [] for name in tasks}
    random = np.random.default_rng(0)
    for count in range(rounds + 1):
        for name in random.permutation(list(tasks)).tolist():
            for _ in range(in_a_row):
                started = time.perf_counter()
                tasks[name]()
                _wait_for_gpu()
                if count:
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 95th percentile."""
    return {"median": statistics.median(seconds), "percentile_95": float(np.quantile(seconds, 0.95))}


def multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Count the multiply-adds of one forward pass, from the shapes that go through it."""
    # The counter does not know fused attention.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(image)
    return counter.get_total_flops() // 2


def measure_processes() -> dict[str, dict[str, float]]:
    """Measure processes from their start to the first verdict: median seconds, and the most memory held, in bytes.

    On other systems than Linux the memory is 0, for unknown.
    """
    with tempfile.TemporaryDirectory() as folder:
        cell = Path(folder) / "cell.png"
        cell.write_bytes(next(draw_files(1)))
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


def measure_training(names: tuple[str, ...] = BASE_MODELS, batches: int = 12) -> dict[str, dict[str, float]]:
    """Measure training on synthetic cells by the recipe `default`: each model alone, then all of them from a teacher.

    Returns for each images a second, and the share of the time that augmentation takes.
    """
    plan, accelerator = RECIPES["default"], make_accelerator()
    recipe = replace(plan.models["cnn"], epochs=1)
    cells = load_cells(f"synthetic:{batches * recipe.batch_size // len(CLASS_NAMES)}")
    examples, few = (examples_of(cells, np.arange(count)) for count in (len(cells), recipe.batch_size))
    generator = Generator(accelerator.device).manual_seed(0)
    started = time.perf_counter()
    for part in cells.images.to(accelerator.device).split(recipe.batch_size):
        augment(part, recipe.augmentation, generator, part)
    _wait_for_gpu()
    augmenting = time.perf_counter() - started
    teacher = next(iter(plan.teachers))
    runs = {name: ((name,), None) for name in names}
    runs[f"{', '.join(names)} from {teacher}"] = (names, lambda: Teachers([Teacher(teacher, pretrained=False)]))
    result = {}
    for title, (several, make_teacher) in runs.items():
        models = {name: build_model(name, plan.architectures.get(name)) for name in several}
        with tempfile.TemporaryDirectory() as folder:
            settings = {"directory": Path(folder) / "run", "seed": 0, "accelerator": accelerator, "progress": False}
            history = fit(models, examples, few, recipe, teacher=make_teacher, **settings)
        rate = history[several[0]][0]["images_per_second"]
        result[title] = {"images_per_second": rate, "augmentation_share": augmenting * rate / len(cells)}
    return result


def tables(result: dict) -> str:
    """Set out what was measured in Markdown."""
    one, many = result["latency"]["resnet18"]["median"], result["images_per_second"]["resnet18"]
    latency = [
        [name, *(f"{row[field] * 1e3:.1f}" for field in ("median", "percentile_95")), f"{row['median'] / one:.2f}"]
        for name, row in result["latency"].items()
    ]
    work = {name: f"{count / 1e6:.0f}" for name, count in result["multiply_adds"].items()}
    bulk = [[n, f"{rate:.0f}", f"{rate / many:.1f}", work.get(n)] for n, rate in result["images_per_second"].items()]
    processes = [[n, f"{row['seconds']:.1f}", f"{row['bytes'] / 1e6:.0f}"] for n, row in result["processes"].items()]
    parts = [
        f"{result['device']}, {result['threads']} threads, PyTorch {result['torch']}",
        table(["from file bytes to verdict", "median, ms", "95th percentile, ms", "beside resnet18"], latency),
        table(["in bulk", "images a second", "beside resnet18", "M multiply-adds"], bulk),
        table(["process, to the first verdict", "seconds", "MB"], processes),
    ]
    if half := result.get("half_precision"):
        rates = [[name, f"{rate:.0f}"] for name, rate in half["images_per_second"].items()]
        parts.append(table(["precision, cells on the GPU", "images a second"], rates))
        parts.append(
            f"Half precision has the verdict of single precision on {half['same_verdicts']} of {half['images']} cells, "
            f"and probabilities that differ by {half['largest_difference']:.4f} at most."
        )
    if training := result.get("training"):
        rows = [[n, f"{r['images_per_second']:.0f}", f"{r['augmentation_share']:.0%}"] for n, r in training.items()]
        parts.append(table(["training", "images a second", "share of augmentation"], rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
