"""Creates the optimizer of each family of a recipe over a plan's groups.

The optimizers come from libraries wherever one exists. A library is imported when its family is
used. Families that treat every entry independently (adamw, sgd, lion, adam_atan2,
schedulefree_adamw) use the library's optimizer for the whole stack. The others combine the entries
of a tensor, or all tensors, so each trial has its own instance (`PerTrialOptimizer`).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from scaletune.errors import UserError
from scaletune.optim.stacked import CombinedOptimizer, Groups, Muon, PerTrialOptimizer
from scaletune.recipe import Optimizer as Settings


def _library(name: str, package: str, settings: Settings) -> Any:
    """The module of a library; UserError with the install command if it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(
            f"optimizer family {settings.family!r} needs the package `{package}`,"
            " but it is not installed: pip install 'scaletune[optimizers]'"
        ) from None


def _betas(settings: Settings) -> tuple[float, float]:
    return settings.beta1, settings.beta2


def _adamw(groups: Groups, s: Settings) -> Optimizer:
    return AdamW(groups, betas=_betas(s), fused=True)


def _sgd(groups: Groups, s: Settings) -> Optimizer:
    # torch has no fused SGD for tensors that are sharded over processes.
    sharded = any(hasattr(p, "placements") for group in groups for p in group["params"])
    return SGD(groups, momentum=s.momentum, nesterov=s.nesterov, fused=not sharded)


def _adafactor(groups: Groups, s: Settings) -> Optimizer:
    """torch's Adafactor (arXiv:1804.04235). Rows, columns and the RMS of W are those of one trial.

    eps[0], which torch adds to the squared gradient, is as small as float32 can square. torch's
    default of 1.2e-7 stops a tensor whose gradient is below 3e-4, and wide models have such
    gradients.
    """

    def make(trial_groups: Groups) -> Optimizer:
        return Adafactor([group | {"eps": (1e-18, 1e-3)} for group in trial_groups])

    return PerTrialOptimizer(groups, make)


def _lion(groups: Groups, s: Settings) -> Optimizer:
    return _library("pytorch_optimizer", "pytorch_optimizer", s).Lion(groups, betas=_betas(s))


def _lamb(groups: Groups, s: Settings) -> Optimizer:
    """Version 3 of arXiv:1904.00962: no bias correction, weight decay inside the trust ratio.

    The library caps the norm of W at 10, which would break the trust ratio, and with it the
    scaling rule, of large tensors. The cap is removed.
    """
    library = _library("pytorch_optimizer", "pytorch_optimizer", s)

    def make(trial_groups: Groups) -> Optimizer:
        opt = library.Lamb(trial_groups, betas=_betas(s), weight_decouple=False)
        opt.clamp = float("inf")
        return opt

    return PerTrialOptimizer(groups, make)


def _soap(groups: Groups, s: Settings) -> Optimizer:
    """SOAP (arXiv:2409.11321). Its first step only collects statistics."""
    library = _library("pytorch_optimizer", "pytorch_optimizer", s)

    def make(trial_groups: Groups) -> Optimizer:
        every = s.precondition_every
        return library.SOAP(trial_groups, betas=_betas(s), precondition_frequency=every)

    return PerTrialOptimizer(groups, make)


def _with_adamw(make: Callable[[Groups], Optimizer], groups: Groups, s: Settings) -> Optimizer:
    """The optimizer of `make` for the groups that the plan assigns to it, AdamW for the others."""
    return CombinedOptimizer(
        groups,
        [
            (lambda group: group["family"] != "adamw", make),
            (lambda group: True, lambda other_groups: _adamw(other_groups, s)),
        ],
    )


def _muon(groups: Groups, s: Settings) -> Optimizer:
    def make(own_groups: Groups) -> Optimizer:
        return Muon(own_groups, s.momentum, s.nesterov, s.shape_factor)

    return _with_adamw(make, groups, s)


def _shampoo(groups: Groups, s: Settings) -> Optimizer:
    """Shampoo (arXiv:1802.09568): powers -1/4 of both sides, no momentum, no grafting.

    The eps of a group is the damping of the statistics.
    """
    library = _library("pytorch_optimizer", "pytorch_optimizer", s)

    def make(trial_groups: Groups) -> Optimizer:
        damped = [group | {"matrix_eps": group["eps"]} for group in trial_groups]
        return library.Shampoo(
            damped, weight_decouple=True, preconditioning_compute_steps=s.precondition_every
        )

    return _with_adamw(lambda own_groups: PerTrialOptimizer(own_groups, make), groups, s)


def _adam_atan2(groups: Groups, s: Settings) -> Optimizer:
    """lr * 1.27 * atan2(m, sqrt(v)), with bias correction (arXiv:2407.05872).

    The constant is the library's.
    """
    library = _library("adam_atan2_pytorch", "adam-atan2-pytorch", s)
    return library.AdamAtan2(groups, betas=_betas(s))


def _dadapt_adam(groups: Groups, s: Settings) -> Optimizer:
    """D-Adaptation (arXiv:2301.07733)."""
    library = _library("pytorch_optimizer", "pytorch_optimizer", s)

    def make(trial_groups: Groups) -> Optimizer:
        return library.DAdaptAdam(trial_groups, betas=_betas(s), weight_decouple=True)

    return PerTrialOptimizer(groups, make, unit=s.lr)


def _prodigy(groups: Groups, s: Settings) -> Optimizer:
    """Prodigy (arXiv:2306.06101), by its authors. Its estimate excludes warmup."""
    library = _library("prodigyopt", "prodigyopt", s)

    def make(trial_groups: Groups) -> Optimizer:
        return library.Prodigy(trial_groups, betas=_betas(s), safeguard_warmup=True)

    return PerTrialOptimizer(groups, make, unit=s.lr)


def _schedulefree_adamw(groups: Groups, s: Settings) -> Optimizer:
    """Schedule-free AdamW (arXiv:2405.15682), by its authors, in training mode.

    `evaluation_weights` selects its averaged weights.
    """
    opt = _library("schedulefree", "schedulefree", s).AdamWScheduleFree(groups, betas=_betas(s))
    opt.train()
    return opt


class MomoAdam(PerTrialOptimizer):
    """MoMo-Adam, which needs the losses: `step(lambda: losses)`, losses [K].

    The library keeps its knowledge of past losses as attributes, outside its state.
    """

    LOSS_ATTRIBUTES = ("_number_steps", "loss_avg", "lb")

    def _step(self, trial: Any, k: int, losses: Tensor | None) -> None:
        if losses is None:
            raise UserError(
                "optimizer family 'momo_adam' needs the losses:"
                " call `step(lambda: losses)` with the loss of each trial"
            )
        with warnings.catch_warnings():
            # The library warns because groups with different lr would matter. Here they are equal.
            warnings.filterwarnings("ignore", "More than one param group")
            trial.step(loss=losses.reshape(-1)[k])

    def state_dict(self) -> dict[str, Any]:
        known = [
            {name: getattr(trial, name) for name in self.LOSS_ATTRIBUTES} for trial in self.trials
        ]
        return super().state_dict() | {"known": known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for trial, known in zip(self.trials, state_dict["known"], strict=True):
            vars(trial).update(known)


def _momo_adam(groups: Groups, s: Settings) -> Optimizer:
    """MoMo-Adam (arXiv:2305.07583), by its authors.

    `lr` is the upper limit of its step size, and its lower bound of the loss is 0.
    """
    library = _library("momo", "momo-opt", s)

    def make(trial_groups: Groups) -> Optimizer:
        return library.MomoAdam(trial_groups, betas=_betas(s))

    return MomoAdam(groups, make, unit=s.lr)


FAMILIES: dict[str, Callable[[Groups, Settings], Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "lion": _lion,
    "lamb": _lamb,
    "muon": _muon,
    "shampoo": _shampoo,
    "soap": _soap,
    "adam_atan2": _adam_atan2,
    "dadapt_adam": _dadapt_adam,
    "prodigy": _prodigy,
    "schedulefree_adamw": _schedulefree_adamw,
    "momo_adam": _momo_adam,
}
