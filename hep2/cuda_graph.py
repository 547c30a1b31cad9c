"""A training step recorded once on a GPU and replayed: small models wait for kernel launches, not for the GPU."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

WARM_UP_STEPS = 3  # that run as they are before a step is recorded


class RecordedStep:
    """A training step as a CUDA graph, which replays all of its launches at once.

    `step` maps positions of examples, int64 on the GPU, to a tensor of totals. It draws from `generator` and from the
    default generator alone, and must not wait for the GPU.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], positions: Tensor, generator: Generator) -> None:
        self.step, self.generator = step, generator
        self.positions, self.taken, self.graph, self.totals = positions.clone(), 0, None, None
        self.stream = torch.cuda.Stream()

    def __call__(self, positions: Tensor) -> Tensor:
        self.positions.copy_(positions)
        if self.taken < WARM_UP_STEPS:
            self.taken += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                totals = self.step(self.positions)
            torch.cuda.current_stream().wait_stream(self.stream)
            return totals
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph):
                self.totals = self.step(self.positions)
        self.graph.replay()
        return self.totals
