"""Each optimizer family of a recipe over a plan's groups, from a library wherever one exists. Packages are imported when asked for.

Where every entry is stepped by itself (adamw, sgd, lion, adam_atan2, schedulefree_adamw) the library's own optimizer steps the whole
stack. Where a tensor's entries or all tensors are looked at together, each trial has its own (`Trials`).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from scaletune.errors import UserError
from scaletune.optim.stacked import Groups, Muon, Together, Trials
from scaletune.recipe import Optimizer as Settings


def _library(name: str, package: str, settings: Settings) -> Any:
    """The module, or a UserError that says what to install."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(
            f"optimizer family {settings.family!r} needs the package `{package}`, but it is not installed: pip install 'scaletune[optimizers]'"
        ) from None


def _betas(settings: Settings) -> tuple[float, float]:
    return settings.beta1, settings.beta2


def _adamw(groups: Groups, s: Settings) -> Optimizer:
    return AdamW(groups, betas=_betas(s), fused=True)


def _sgd(groups: Groups, s: Settings) -> Optimizer:
    return SGD(groups, momentum=s.momentum, nesterov=s.nesterov, fused=True)


def _adafactor(groups: Groups, s: Settings) -> Optimizer:
    """torch's (arXiv:1804.04235): rows, columns and the RMS of W are a trial's own.

    eps[0], which torch puts beside the gradient and beside its square, is as small as float32 allows it to be squared: torch's own,
    1.2e-7, stops a tensor whose gradient is below 3e-4, and wide models have those.
    """
    return Trials(groups, lambda own: Adafactor([group | {"eps": (1e-18, 1e-3)} for group in own]))


def _lion(groups: Groups, s: Settings) -> Optimizer:
    return _library("pytorch_optimizer", "pytorch_optimizer", s).Lion(groups, betas=_betas(s))


def _lamb(groups: Groups, s: Settings) -> Optimizer:
    """Version 3 of arXiv:1904.00962, without bias correction; decay inside the trust ratio, whose norm of W is not capped at 10."""
    library = _library("pytorch_optimizer", "pytorch_optimizer", s)

    def make(own: Groups) -> Optimizer:
        made = library.Lamb(own, betas=_betas(s), weight_decouple=False)
        made.clamp = float(
            "inf"
        )  # a cap would break the ratio, and with it the rule, for large tensors alone
        return made

    return Trials(groups, make)


def _soap(groups: Groups, s: Settings) -> Optimizer:
    """arXiv:2409.11321; its first step only gathers statistics."""
    library = _library("pytorch_optimizer", "pytorch_optimizer", s)
    return Trials(
        groups,
        lambda own: library.SOAP(own, betas=_betas(s), precondition_frequency=s.precondition_every),
    )


def _with_adamw(family: Callable[[Groups], Optimizer], groups: Groups, s: Settings) -> Optimizer:
    """`family` for the groups planned for it, AdamW for the rest."""
    return Together(
        groups,
        [
            (lambda group: group["family"] != "adamw", family),
            (lambda group: True, lambda rest: _adamw(rest, s)),
        ],
    )


def _muon(groups: Groups, s: Settings) -> Optimizer:
    return _with_adamw(lambda own: Muon(own, s.momentum, s.nesterov, s.shape_factor), groups, s)


def _shampoo(groups: Groups, s: Settings) -> Optimizer:
    """arXiv:1802.09568: powers -1/4 of both sides' sums, no momentum, no grafting; a group's eps is the damping of the sums."""
    library = _library("pytorch_optimizer", "pytorch_optimizer", s)

    def make(own: Groups) -> Optimizer:
        damped = [group | {"matrix_eps": group["eps"]} for group in own]
        return library.Shampoo(
            damped, weight_decouple=True, preconditioning_compute_steps=s.precondition_every
        )

    return _with_adamw(lambda own: Trials(own, make), groups, s)


def _adam_atan2(groups: Groups, s: Settings) -> Optimizer:
    """lr * 1.27 * atan2(m, sqrt(v)), bias corrected (arXiv:2407.05872; the constant is the library's)."""
    return _library("adam_atan2_pytorch", "adam-atan2-pytorch", s).AdamAtan2(
        groups, betas=_betas(s)
    )


def _dadapt_adam(groups: Groups, s: Settings) -> Optimizer:
    """arXiv:2301.07733."""
    library = _library("pytorch_optimizer", "pytorch_optimizer", s)
    return Trials(
        groups,
        lambda own: library.DAdaptAdam(own, betas=_betas(s), weight_decouple=True),
        unit=s.lr,
    )


def _prodigy(groups: Groups, s: Settings) -> Optimizer:
    """arXiv:2306.06101, its authors' own; a warmup is kept out of its estimate."""
    library = _library("prodigyopt", "prodigyopt", s)
    return Trials(
        groups, lambda own: library.Prodigy(own, betas=_betas(s), safeguard_warmup=True), unit=s.lr
    )


def _schedulefree_adamw(groups: Groups, s: Settings) -> Optimizer:
    """arXiv:2405.15682, its authors' own; in training mode. `judged` puts its averaged weights in."""
    made = _library("schedulefree", "schedulefree", s).AdamWScheduleFree(groups, betas=_betas(s))
    made.train()
    return made


class Momo(Trials):
    """MoMo-Adam, which reads the loss: `step(lambda: losses)`, losses [K]. It keeps what it knows of them outside its state."""

    KNOWN = ("_number_steps", "loss_avg", "lb")

    def _step(self, trial: Any, k: int, losses: Tensor | None) -> None:
        if losses is None:
            raise UserError(
                "optimizer family 'momo_adam' reads the loss: call `step(lambda: losses)` with the loss of each trial"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "More than one param group"
            )  # which matters where their lr differ
            trial.step(loss=losses.reshape(-1)[k])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "known": [{name: getattr(trial, name) for name in self.KNOWN} for trial in self.trials]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for trial, known in zip(self.trials, state_dict["known"], strict=True):
            vars(trial).update(known)


def _momo_adam(groups: Groups, s: Settings) -> Optimizer:
    """arXiv:2305.07583, its authors' own: `lr` is the cap of its step size, and a loss of 0 its lower bound."""
    library = _library("momo", "momo-opt", s)
    return Momo(groups, lambda own: library.MomoAdam(own, betas=_betas(s)), unit=s.lr)


FAMILIES: dict[str, Callable[[Groups, Settings], Optimizer]] = {
    "adamw": _adamw, "sgd": _sgd, "adafactor": _adafactor, "lion": _lion, "lamb": _lamb, "muon": _muon, "shampoo": _shampoo,
    "soap": _soap, "adam_atan2": _adam_atan2, "dadapt_adam": _dadapt_adam, "prodigy": _prodigy,
    "schedulefree_adamw": _schedulefree_adamw, "momo_adam": _momo_adam,
}  # fmt: skip
