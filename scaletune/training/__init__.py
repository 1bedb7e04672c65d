"""Trains one trial: build the model, train it through Accelerate, evaluate on held-out data.

Only this package imports accelerate.
"""

from scaletune.training.evaluation import evaluate
from scaletune.training.gradient_noise import GradientNoise
from scaletune.training.loop import train
from scaletune.training.lr_range_test import lr_range_test
from scaletune.training.processes import accelerator
from scaletune.training.rank_group import RankDied, RankGroup
from scaletune.training.run import Outcome
from scaletune.training.stacked_loop import train_stack
from scaletune.training.trials import run_trial

__all__ = [
    "GradientNoise",
    "Outcome",
    "RankDied",
    "RankGroup",
    "accelerator",
    "evaluate",
    "lr_range_test",
    "run_trial",
    "train",
    "train_stack",
]
