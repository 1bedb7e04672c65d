"""A stack's whole step as one CUDA graph: forward, backward, clipping and update are one launch instead of some hundred kernels'."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from scaletune.recipe import Recipe
from scaletune.training.gradients import Part

WARM = 3  # steps before the recording, in which libraries choose their kernels and a compiled model compiles
DEVICES = ("cuda",)
Work = Callable[[Sequence[Part]], Tensor]


def applies(recipe: Recipe, device: torch.device) -> bool:
    """Whether a step of such trials may be recorded: experts read their counts back."""
    return device.type in DEVICES and recipe.model.family != "moe"


@cache
def _side() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def apart(work: Callable[[], Tensor]) -> Tensor:
    """Call it on another stream, as what precedes a recording has to be; the current stream waits for it."""
    now, side = torch.cuda.current_stream(), _side()
    side.wait_stream(now)
    with torch.cuda.stream(side):
        found = work()
    now.wait_stream(side)
    found.record_stream(now)
    return found


def recorded(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """(what does the work again, where it then leaves its result). Nothing is done yet. RuntimeError where CUDA refuses."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    return graph.replay, found


class Replayed:
    """`replayed(work, parts)` is `work(parts)`, the same work at every call, as one launch; it reads nothing back.

    The first `WARM` calls are as they would be; then the work is recorded and every call copies its parts to where the record reads them.
    Tensors other than the parts must stay where they are, and the parts keep their shapes. Where recording is refused, a note says so and
    calls stay as they were. A result is the caller's own.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.record: tuple[Callable[[], None], Tensor] | None = None
        self.parts: list[Part] = []

    def __call__(self, work: Work, parts: Sequence[Part]) -> Tensor:
        if self.seen == WARM:
            self._record(work, parts)
        self.seen += 1
        if self.record is None:
            return apart(lambda: work(parts))
        for mine, new in zip(self.parts, parts, strict=True):
            mine[0].copy_(new[0], non_blocking=True)
            mine[1].copy_(new[1], non_blocking=True)
        replay, found = self.record
        replay()
        return found.clone()

    def _record(self, work: Work, parts: Sequence[Part]) -> None:
        self.parts = [(x.clone(), y.clone()) for x, y in parts]
        try:
            self.record = recorded(lambda: work(self.parts))
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            print(
                f"stacked steps stay a kernel at a time, as CUDA refused to record them: {why}",
                file=sys.stderr,
            )
