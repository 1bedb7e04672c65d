"""The whole step of a stack as one CUDA graph.

Forward pass, backward pass, clipping and update are then one launch instead of some hundred
kernel launches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from scaletune.recipe import Recipe
from scaletune.training.gradients import MicroBatch

WARMUP_CALLS = 3
"""Ordinary steps before the recording: libraries choose kernels, and a model may be compiled."""

DEVICES = ("cuda",)

Step = Callable[[Sequence[MicroBatch]], Tensor]


def applies(recipe: Recipe, device: torch.device) -> bool:
    """Whether a step of these trials can be recorded. Experts cannot: they read counts back."""
    return device.type in DEVICES and recipe.model.family != "moe"


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def run_on_side_stream(work: Callable[[], Tensor]) -> Tensor:
    """Runs `work` on another stream, as CUDA requires before a recording.

    The current stream waits for it.
    """
    current, side = torch.cuda.current_stream(), _side_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = work()
    current.wait_stream(side)
    result.record_stream(current)
    return result


def record_graph(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Records `work` without running it; RuntimeError if CUDA cannot record it.

    Returns:
        A function that replays the graph, and the tensor that then holds the result.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


class GraphedStep:
    """`graphed_step(step, batch)` is `step(batch)`, replayed as one launch.

    The first `WARMUP_CALLS` calls run normally. Then the step is recorded, and every call copies
    its micro-batches to the inputs of the graph. The step must be the same function at every call,
    its other tensors must keep their storage, and the micro-batches their shapes. If CUDA cannot
    record the step, a message goes to stderr and all calls run normally. The result is a copy.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.graph: tuple[Callable[[], None], Tensor] | None = None
        self.inputs: list[MicroBatch] = []

    def __call__(self, step: Step, batch: Sequence[MicroBatch]) -> Tensor:
        if self.calls == WARMUP_CALLS:
            self._record(step, batch)
        self.calls += 1
        if self.graph is None:
            return run_on_side_stream(lambda: step(batch))
        for own, new in zip(self.inputs, batch, strict=True):
            own[0].copy_(new[0], non_blocking=True)
            own[1].copy_(new[1], non_blocking=True)
        replay, result = self.graph
        replay()
        return result.clone()

    def _record(self, step: Step, batch: Sequence[MicroBatch]) -> None:
        self.inputs = [(x.clone(), y.clone()) for x, y in batch]
        try:
            self.graph = record_graph(lambda: step(self.inputs))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            print(
                f"stacked training without a CUDA graph: CUDA could not record the step ({reason})",
                file=sys.stderr,
            )
