"""One trial: build, train through Accelerate, evaluate on held-out data. The only folder that imports accelerate."""

from scaletune.training.evaluating import evaluate
from scaletune.training.launching import accelerator, launched
from scaletune.training.loop import Outcome, train
from scaletune.training.noise import Noise
from scaletune.training.ranging import lr_range_test
from scaletune.training.stacking import stacked
from scaletune.training.trials import trial

__all__ = ["Noise", "Outcome", "accelerator", "evaluate", "launched", "lr_range_test", "stacked", "train", "trial"]
