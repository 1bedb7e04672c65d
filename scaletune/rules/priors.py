"""Rules for batch size and duration: priors, taken from the literature where a study has measured nothing; a fit can replace each.

B is the batch, D the tokens of a run; a `Change` holds their ratios to where the base values were tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from scaletune.errors import UserError, nearest


@dataclass(frozen=True)
class Prior:
    """A rule taken from the literature where a study has measured nothing; a fit can replace it (`fitted`)."""

    factor: float  # on the learning rate
    sentence: str
    name: str = ""
    weight_decay: float = 1.0  # factor, in PyTorch's convention
    eps: float = 1.0  # factor
    betas: tuple[float, float] | None = None  # absolute; None: as they were
    caveats: tuple[str, ...] = ()
    measured: bool = False


@dataclass(frozen=True)
class Change:
    """Ratios to where the base values were tuned, and the betas there."""

    batch: float = 1.0
    tokens: float = 1.0
    lr: float = 1.0  # as it will be, all rules applied
    n_params: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95


How = Literal["linear", "power"]


def betas(beta1: float, beta2: float, kappa: float, how: How = "linear") -> tuple[float, float]:
    """Betas that forget over the same samples when each step sees kappa times as many: 1 - kappa * (1 - beta), or beta**kappa.

    The linear form (arXiv:2205.10287) is the first order of the power one; UserError where kappa * (1 - beta1) >= 1 ends its validity.
    """
    if how not in ("linear", "power"):
        raise UserError(
            f"betas must follow a form we know, but got {how!r}{nearest(how, ('linear', 'power'))}"
        )
    worst = min(beta1, beta2)
    if kappa * (1 - worst) > 1 - 1e-12:
        raise UserError(
            f"`kappa * (1 - beta) < 1` must hold for betas to follow the batch, but got kappa={kappa:g}, beta={worst:g}"
        )
    one, two = (
        1 - kappa * (1 - beta) if how == "linear" else beta**kappa for beta in (beta1, beta2)
    )
    return one, two


def _square_root(change: Change, how: How) -> Prior:
    """Adam's SDE: lr ~ B**(1/2), 1 - beta ~ B, eps ~ B**(-1/2) at a fixed number of samples (arXiv:2205.10287)."""
    root = change.batch**0.5
    said = f"batch times {change.batch:g}: lr times {root:.4g} by the square-root rule (arXiv:2205.10287)"
    return Prior(
        root, said, "square_root", eps=1 / root, betas=betas(change.beta1, change.beta2, change.batch, how),
        caveats=("holds where gradient noise dominates, at a fixed number of tokens",),
    )  # fmt: skip


def _linear(change: Change, how: How) -> Prior:
    """SGD's: lr ~ B, momentum as it was (arXiv:1706.02677)."""
    return Prior(
        change.batch,
        f"batch times {change.batch:g}: lr times as much by SGD's linear rule (arXiv:1706.02677)",
        "linear",
    )


def _complete_d_p(change: Change, how: How) -> Prior:
    """AdamW: lr, weight decay ~ R, eps ~ 1 / R, 1 - beta ~ R**2 with R = (B / D)**(1/2) (arXiv:2512.22382)."""
    root = (change.batch / change.tokens) ** 0.5
    said = f"batch times {change.batch:g}, tokens times {change.tokens:g}: lr times {root:.4g} by Complete(d)P (arXiv:2512.22382)"
    return Prior(
        root, said, "complete_d_p", weight_decay=root, eps=1 / root, betas=betas(change.beta1, change.beta2, root**2, how),
        caveats=(
            "as public re-implementations have it; the paper's tables were not opened",
            "the final norm's eps: they leave it without a width factor, here it follows its gradient",
            "measured horizons have given lr ~ D**-0.3 where this rule gives D**-0.5: fit it",
        ),
    )  # fmt: skip


def _token_horizon(change: Change, how: How) -> Prior:
    """lr ~ D**-0.3, as measured for language models (arXiv:2409.19913)."""
    factor = change.tokens**-0.3
    return Prior(
        factor, f"tokens times {change.tokens:g}: lr times {factor:.4g}, D**-0.3 (arXiv:2409.19913)", "token_horizon",
        caveats=("an empirical exponent, in disagreement with D**-0.5 of the SDE rule: fit it",),
    )  # fmt: skip


def _ema_timescale(change: Change, how: How) -> Prior:
    """weight_decay ~ B / (lr * D): AdamW averages over the same share of the run (arXiv:2405.13698)."""
    factor = change.batch / (change.lr * change.tokens)
    return Prior(
        1.0, f"weight decay times {factor:.4g}: the same averaging timescale (arXiv:2405.13698)", "ema_timescale", weight_decay=factor,
        caveats=("in conflict with `power_lines`, where the timescale falls with tokens per parameter",),
    )  # fmt: skip


def _power_lines(change: Change, how: How) -> Prior:
    """weight_decay ~ B / (lr * D * tau), tau ~ (D / N)**-0.527 (arXiv:2505.13738)."""
    factor = change.batch / (change.lr * change.tokens) * (change.tokens / change.n_params) ** 0.527
    return Prior(
        1.0, f"weight decay times {factor:.4g} by the Power Lines (arXiv:2505.13738)", "power_lines", weight_decay=factor,
        caveats=("in conflict with `ema_timescale`, which keeps the timescale",),
    )  # fmt: skip


def _lion(change: Change, how: How) -> Prior:
    """lr ~ (B / D)**(1/2), unconfirmed."""
    root = (change.batch / change.tokens) ** 0.5
    return Prior(
        root,
        f"lr times {root:.4g}, (B / D)**0.5 for Lion",
        "lion",
        caveats=("unconfirmed: quoted for Lion, source not read",),
    )


PRIORS: dict[str, Callable[[Change, How], Prior]] = {
    "square_root": _square_root,
    "linear": _linear,
    "complete_d_p": _complete_d_p,
    "token_horizon": _token_horizon,
    "ema_timescale": _ema_timescale,
    "power_lines": _power_lines,
    "lion": _lion,
}


def prior(name: str, change: Change, how: How = "linear") -> Prior:
    """The named rule at that change; `how` its betas follow. Nothing changed, nothing moves. UserError on a name we do not know."""
    if name not in PRIORS:
        raise UserError(
            f"a rule for batch and duration must be one we know, but got {name!r}{nearest(name, PRIORS)}"
        )
    return PRIORS[name](change, how)


def fitted(
    replaced: Prior,
    change: Change,
    source: str,
    *,
    batch: float = 0.0,
    tokens: float = 0.0,
    weight_decay: float = 1.0,
) -> Prior:
    """What a fit puts in a prior's place: lr ~ B**batch * D**tokens with measured exponents; eps and betas stay the prior's."""
    factor = change.batch**batch * change.tokens**tokens
    said = f"batch times {change.batch:g}, tokens times {change.tokens:g}: lr times {factor:.4g} as measured by {source}"
    return Prior(
        factor, said, replaced.name, weight_decay, replaced.eps, replaced.betas, measured=True
    )


def timescale(batch_tokens: float, tokens: float, lr: float, weight_decay: float) -> float:
    """tau = B / (lr * weight_decay * D): the share of a run over which AdamW averages its updates (arXiv:2405.13698)."""
    return batch_tokens / (lr * weight_decay * tokens)


def timescale_weight_decay(batch_tokens: float, tokens: float, lr: float, tau: float) -> float:
    """weight_decay = B / (lr * D * tau), in PyTorch's convention (arXiv:2505.13738)."""
    return batch_tokens / (lr * tokens * tau)


def power_lines_timescale(tokens_per_param: float) -> float:
    """tau = 1.084 * (D / N)**-0.527 (arXiv:2505.13738); the constant is unconfirmed, about 0.22 at 20 tokens a parameter is not."""
    return 1.084 * tokens_per_param**-0.527


def batch_rule(batch_tokens: float, fitted_at: float, beta1: float) -> Prior:
    """Square-root rule for Adam's lr alone: lr ~ batch**(1/2), for ratios r with r * (1 - beta1) < 1 (arXiv:2205.10287)."""
    ratio = batch_tokens / fitted_at
    if ratio == 1:
        return Prior(1.0, f"batch of {batch_tokens:g} tokens, as in the proxies")
    factor = ratio**0.5
    beyond = (
        ""
        if ratio * (1 - beta1) < 1
        else f"; beyond the rule's own validity: {ratio:g} * (1 - beta1) >= 1"
    )
    return Prior(
        factor,
        f"batch {fitted_at:g} -> {batch_tokens:g} tokens: lr times {factor:.4g} by the square-root rule (arXiv:2205.10287), "
        f"a prior that no proxy tested{beyond}",
    )
