"""One trial: build, train through Accelerate, evaluate on held-out data. The only folder that imports accelerate."""

from scaletune.training.evaluation import evaluate
from scaletune.training.gradient_noise import Noise
from scaletune.training.loop import Outcome, train
from scaletune.training.lr_range_test import lr_range_test
from scaletune.training.processes import accelerator, launched
from scaletune.training.stacked_loop import stacked
from scaletune.training.trials import trial

__all__ = [
    "Noise",
    "Outcome",
    "accelerator",
    "evaluate",
    "launched",
    "lr_range_test",
    "stacked",
    "train",
    "trial",
]
