"""What a heavier engine would win over eager PyTorch: the passes of all four models, for one cell and in bulk.

    pip install onnxscript onnxruntime openvino
    python -m benchmarks.engines [--weights …]

All engines run in one process, one after the other in every round, so that a busy moment hits all of them; an engine
that is not installed is left out. Prints a table in Markdown: the time beside eager's, and how far the probabilities
are from eager's at most. An engine is worth a thought if it wins by 1.5 and stays within 1e-4.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hep2.bench import interleaved
from hep2.data import load_cells
from hep2.hub import open_weights
from hep2.models import probabilities
from hep2.reader import predict
from hep2.weights import Weights

BULK = 64
ROUNDS = {1: 50, BULK: 5}
Engine = Callable[[Tensor], np.ndarray]


class AllFour(nn.Module):
    """The three passes and the stack on top of them: images (batch, 1, 78, 78) to probabilities (batch, 4 * 6)."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.single = nn.ModuleDict({name: weights.models[name] for name in ("cnn", "rescnn", "vit")})
        self.linear = weights.models["ensemble"].linear
        self.temperatures = {name: weights.temperature(name) for name in weights.models}

    def forward(self, images: Tensor) -> Tensor:
        one = {name: probabilities(model(images), self.temperatures[name]) for name, model in self.single.items()}
        stacked = nn.functional.linear(torch.cat([one["cnn"], one["vit"]], 1), self.linear.weight, self.linear.bias)
        return torch.cat([*one.values(), probabilities(stacked, self.temperatures["ensemble"])], 1)


def main(argv: list[str] | None = None) -> int:
    """Compare the engines and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="OWNER/NAME[@revision] or a folder; the bundled weights, if left out")
    weights = open_weights(parser.parse_args(argv).weights)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    cells = load_cells(f"phantoms:{-(-BULK // 6)}").images[:BULK]
    print(
        "| engine | ready after, s | one cell, ms | beside eager | 64 cells, ms | beside eager | largest difference |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        engines, ready = {}, {}
        for name, make in ENGINES.items():
            started = time.perf_counter()
            try:
                engines[name] = make(weights, Path(folder))
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            engines[name](cells[:1]), engines[name](cells)
            ready[name] = time.perf_counter() - started
        median = {
            count: {
                name: np.median(seconds)
                for name, seconds in interleaved(
                    {n: partial(e, cells[:count]) for n, e in engines.items()}, rounds
                ).items()
            }
            for count, rounds in ROUNDS.items()
        }
        expected = engines["eager"](cells)
        for name, engine in engines.items():
            difference = float(abs(engine(cells) - expected).max())
            times = [
                f"{median[count][name] * 1e3:.1f} | {median[count][name] / median[count]['eager']:.2f}"
                for count in ROUNDS
            ]
            print(f"| {name} | {ready[name]:.1f} | {' | '.join(times)} | {difference:.0e} |", flush=True)
    return 0


def eager(weights: Weights, folder: Path) -> Engine:
    """What the package does: the passes of models and cells shared out among the cores."""
    return lambda images: np.concatenate(list(predict(weights, images).probabilities.values()), axis=1)


def compiled(weights: Weights, folder: Path) -> Engine:
    model = torch.compile(AllFour(weights).eval(), dynamic=False)

    @torch.inference_mode()
    def run(images: Tensor) -> np.ndarray:
        return model(images).numpy()

    return run


def onnx_file(weights: Weights, folder: Path, cells: int) -> Path:
    """Write the models as ONNX for batches of so many cells, unless that is done."""
    file = folder / f"{cells}.onnx"
    if not file.exists():
        images = torch.rand(cells, 1, 78, 78)
        torch.onnx.export(AllFour(weights).eval(), (images,), file, dynamo=True, verbose=False)
    return file


def onnx_runtime(weights: Weights, folder: Path) -> Engine:
    import onnxruntime
    import onnxscript  # noqa: F401  (the exporter needs it)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = {count: onnxruntime.InferenceSession(onnx_file(weights, folder, count), options) for count in (1, BULK)}
    name = sessions[1].get_inputs()[0].name
    return lambda images: sessions[len(images)].run(None, {name: images.numpy()})[0]


def open_vino(weights: Weights, folder: Path) -> Engine:
    import onnxscript  # noqa: F401
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    models = {
        count: core.compile_model(core.read_model(onnx_file(weights, folder, count)), "CPU", settings)
        for count in (1, BULK)
    }
    return lambda images: models[len(images)](images.numpy())[0].copy()


ENGINES = {"eager": eager, "torch.compile": compiled, "ONNX Runtime": onnx_runtime, "OpenVINO": open_vino}

if __name__ == "__main__":
    sys.exit(main())
