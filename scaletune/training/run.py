"""The state of one trial while it trains (`TrainingRun`) and its result (`Outcome`)."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from scaletune import data
from scaletune.recipe import Recipe, Schedule
from scaletune.rules import TensorPlan
from scaletune.training.gradient_noise import GradientNoise
from scaletune.training.gradients import GradientAccumulator
from scaletune.training.run_control import UNCONTROLLED, RunControl


@dataclass
class Outcome:
    """The result of training one trial."""

    status: str = "done"
    """"done", "diverged" or "stopped"."""

    message: str = ""
    """Where and how the trial diverged or was stopped; empty if it was not."""

    curve: list[float] = field(default_factory=list)
    """Training loss of each step, in nats per token."""

    loss: float | None = None
    """Held-out loss after the last step; None if the trial diverged or was stopped."""

    held_out: list[list[float]] = field(default_factory=list)
    """[tokens, held-out loss] of each evaluation."""

    noise: GradientNoise = field(default_factory=GradientNoise)
    """Gradient noise, if `engine.noise_every` is set."""

    steps_spent: float = 0.0
    """Optimizer steps, each divided by the number of trials that shared it."""

    trunk: dict[str, Any] = field(default_factory=dict)
    """The trial that was the trunk of this branch, and the number of tokens they shared."""

    seconds: dict[str, float] = field(
        default_factory=lambda: {"train": 0.0, "evaluate": 0.0, "compile": 0.0}
    )
    """Wall-clock seconds by activity."""

    def mark_diverged(self, message: str) -> None:
        self.status, self.message = "diverged", message

    def mark_stopped(self, tokens: int) -> None:
        self.status, self.message = "stopped", f"stopped at {tokens:.6g} tokens by the search"


@dataclass(eq=False)
class TrainingRun:
    """A trial that is training: its model, optimizer and progress.

    A branch (a shorter horizon of the same trial) uses the model, optimizer and weight average of
    its trunk until its branch point, because both are identical until then (`training.branches`).
    """

    recipe: Recipe
    """The point that is trained."""

    corpus: data.Corpus
    """The training and held-out data."""

    acc: Accelerator
    """The Accelerator of this process."""

    plan: list[TensorPlan]
    """Learning rate, weight decay and so on of each tensor."""

    net: nn.Module
    """The plain model, neither wrapped nor compiled."""

    accumulator: GradientAccumulator
    """Computes the gradient of a batch."""

    opt: Optimizer
    """The optimizer of `net`."""

    schedule: Schedule
    """The learning-rate schedule, in shares of the budget."""

    ema: AveragedModel | None
    """The moving average of the weights, if the schedule has one."""

    id: str
    """The trial id."""

    outcome: Outcome = field(default_factory=Outcome)
    """The result so far."""

    unread_losses: list[Tensor] = field(default_factory=list)
    """Losses of the latest steps that are still on the device."""

    branches: list[TrainingRun] = field(default_factory=list)
    """Shorter horizons that share the steps of this run, the longest first."""

    control: RunControl = UNCONTROLLED
    """Where the run reports held-out losses, and who may stop it."""

    def __post_init__(self) -> None:
        self.parameters = list(self.net.parameters())
        self.steps = self.recipe.budget.steps
        self.evaluations = {
            math.ceil(share * self.steps) for share in self.recipe.engine.evaluate_at
        } - {self.steps}

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return len(self.outcome.curve) + len(self.unread_losses)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.recipe.budget.batch_tokens

    @property
    def healthy(self) -> bool:
        """Whether no loss that was read so far shows a divergence, and nobody stopped the run."""
        return self.outcome.status == "done"

    @property
    def active(self) -> bool:
        """Whether the run has steps left, and has neither diverged nor been stopped."""
        return self.healthy and self.step < self.steps

    @property
    def max_loss(self) -> float:
        """The run has diverged if its loss is higher than this or not finite: 2 ln(vocabulary).

        A regression has no vocabulary. There, any finite loss is accepted.
        """
        return (
            2 * math.log(self.corpus.vocab_size)
            if self.corpus.vocab_size > 1
            else sys.float_info.max
        )
