"""Literature rules for batch size and training duration, used where a study measured nothing.

B is the batch size and D the tokens of a run. A `Change` holds their ratios to where the base
values were tuned. A fit can replace each rule (`replace_with_fit`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from scaletune.errors import UserError, nearest


@dataclass(frozen=True)
class TransferPrior:
    """A rule of the literature for hyperparameters at another batch size or token budget."""

    factor: float
    """Factor on the learning rate."""
    sentence: str
    """What the rule does, with its source."""
    name: str = ""
    """Name of the rule in `PRIORS`."""
    weight_decay: float = 1.0
    """Factor on weight decay, in PyTorch's convention."""
    eps: float = 1.0
    """Factor on eps."""
    betas: tuple[float, float] | None = None
    """New values of the betas; None: unchanged."""
    caveats: tuple[str, ...] = ()
    """What is unconfirmed or contradicted by other studies."""
    measured: bool = False
    """Whether a fit replaced the factor on the learning rate."""


@dataclass(frozen=True)
class Change:
    """Ratios to where the base values were tuned, and the betas there."""

    batch: float = 1.0
    """Ratio of the batch sizes."""
    tokens: float = 1.0
    """Ratio of the token budgets."""
    lr: float = 1.0
    """Ratio of the learning rates, after all rules."""
    n_params: float = 1.0
    """Ratio of the model sizes."""
    beta1: float = 0.9
    beta2: float = 0.95


BetaRule = Literal["linear", "power"]


def betas(
    beta1: float, beta2: float, kappa: float, how: BetaRule = "linear"
) -> tuple[float, float]:
    """Betas that average over the same number of samples when a step has kappa times as many.

    "linear": 1 - kappa * (1 - beta) (arXiv:2205.10287), the first order of "power": beta**kappa.
    UserError where kappa * (1 - beta) reaches 1: the linear rule is not valid there.
    """
    if how not in ("linear", "power"):
        raise UserError(
            "the rule for betas must be 'linear' or 'power', but got"
            f" {how!r}{nearest(how, ('linear', 'power'))}"
        )
    worst = min(beta1, beta2)
    if kappa * (1 - worst) > 1 - 1e-12:
        raise UserError(
            "`kappa * (1 - beta) < 1` must hold for betas to follow the batch size, but got"
            f" kappa={kappa:g}, beta={worst:g}"
        )
    one, two = (
        1 - kappa * (1 - beta) if how == "linear" else beta**kappa for beta in (beta1, beta2)
    )
    return one, two


def _square_root(change: Change, how: BetaRule) -> TransferPrior:
    """Adam's SDE: lr ~ B**(1/2), 1 - beta ~ B, eps ~ B**(-1/2) at a fixed number of samples."""
    root = change.batch**0.5
    return TransferPrior(
        root,
        f"batch size times {change.batch:g}: lr times {root:.4g} by the square-root rule"
        " (arXiv:2205.10287)",
        "square_root",
        eps=1 / root,
        betas=betas(change.beta1, change.beta2, change.batch, how),
        caveats=("valid where gradient noise dominates, at a fixed number of tokens",),
    )


def _linear(change: Change, how: BetaRule) -> TransferPrior:
    """SGD: lr ~ B, momentum unchanged (arXiv:1706.02677)."""
    return TransferPrior(
        change.batch,
        f"batch size times {change.batch:g}: lr times {change.batch:g} by the linear rule of SGD"
        " (arXiv:1706.02677)",
        "linear",
    )


def _complete_d_p(change: Change, how: BetaRule) -> TransferPrior:
    """AdamW: lr, weight decay ~ R, eps ~ 1 / R, 1 - beta ~ R**2 with R = (B / D)**(1/2)."""
    root = (change.batch / change.tokens) ** 0.5
    return TransferPrior(
        root,
        f"batch size times {change.batch:g}, tokens times {change.tokens:g}: lr times {root:.4g}"
        " by Complete(d)P (arXiv:2512.22382)",
        "complete_d_p",
        weight_decay=root,
        eps=1 / root,
        betas=betas(change.beta1, change.beta2, root**2, how),
        caveats=(
            "taken from public re-implementations; not compared with the tables of the paper",
            "eps of the final norm: the re-implementations give it no width factor; here it"
            " follows its gradient",
            "measured horizons gave lr ~ D**-0.3 where this rule gives D**-0.5: fit it",
        ),
    )


def _token_horizon(change: Change, how: BetaRule) -> TransferPrior:
    """lr ~ D**-0.3, as measured for language models (arXiv:2409.19913)."""
    factor = change.tokens**-0.3
    return TransferPrior(
        factor,
        f"tokens times {change.tokens:g}: lr times {factor:.4g}, D**-0.3 (arXiv:2409.19913)",
        "token_horizon",
        caveats=("an empirical exponent; the SDE rule gives D**-0.5: fit it",),
    )


def _ema_timescale(change: Change, how: BetaRule) -> TransferPrior:
    """weight_decay ~ B / (lr * D): AdamW averages over the same share of the run."""
    factor = change.batch / (change.lr * change.tokens)
    return TransferPrior(
        1.0,
        f"weight decay times {factor:.4g}: the same averaging timescale (arXiv:2405.13698)",
        "ema_timescale",
        weight_decay=factor,
        caveats=(
            "conflicts with `power_lines`, where the timescale falls with tokens per parameter",
        ),
    )


def _power_lines(change: Change, how: BetaRule) -> TransferPrior:
    """weight_decay ~ B / (lr * D * tau), tau ~ (D / N)**-0.527 (arXiv:2505.13738)."""
    factor = change.batch / (change.lr * change.tokens) * (change.tokens / change.n_params) ** 0.527
    return TransferPrior(
        1.0,
        f"weight decay times {factor:.4g} by the Power Lines (arXiv:2505.13738)",
        "power_lines",
        weight_decay=factor,
        caveats=("conflicts with `ema_timescale`, which keeps the timescale",),
    )


def _lion(change: Change, how: BetaRule) -> TransferPrior:
    """lr ~ (B / D)**(1/2), unconfirmed."""
    root = (change.batch / change.tokens) ** 0.5
    return TransferPrior(
        root,
        f"lr times {root:.4g}, (B / D)**0.5 for Lion",
        "lion",
        caveats=("unconfirmed: quoted for Lion, source not read",),
    )


PRIORS: dict[str, Callable[[Change, BetaRule], TransferPrior]] = {
    "square_root": _square_root,
    "linear": _linear,
    "complete_d_p": _complete_d_p,
    "token_horizon": _token_horizon,
    "ema_timescale": _ema_timescale,
    "power_lines": _power_lines,
    "lion": _lion,
}


def prior(name: str, change: Change, how: BetaRule = "linear") -> TransferPrior:
    """The named rule of `PRIORS` at a change; `how` is the rule for betas. UserError if unknown."""
    if name not in PRIORS:
        raise UserError(
            f"a rule for batch size and duration must be one of {', '.join(PRIORS)}, but got"
            f" {name!r}{nearest(name, PRIORS)}"
        )
    return PRIORS[name](change, how)


def replace_with_fit(
    replaced: TransferPrior,
    change: Change,
    source: str,
    *,
    batch: float = 0.0,
    tokens: float = 0.0,
    weight_decay: float = 1.0,
) -> TransferPrior:
    """A prior with measured exponents: lr ~ B**batch * D**tokens; eps and betas are unchanged."""
    factor = change.batch**batch * change.tokens**tokens
    sentence = (
        f"batch size times {change.batch:g}, tokens times {change.tokens:g}: lr times {factor:.4g}"
        f" as measured by {source}"
    )
    return TransferPrior(
        factor, sentence, replaced.name, weight_decay, replaced.eps, replaced.betas, measured=True
    )


def timescale(batch_tokens: float, tokens: float, lr: float, weight_decay: float) -> float:
    """tau = B / (lr * weight_decay * D), as a share of the run (arXiv:2405.13698).

    AdamW averages its updates over this time.
    """
    return batch_tokens / (lr * weight_decay * tokens)


def timescale_weight_decay(batch_tokens: float, tokens: float, lr: float, tau: float) -> float:
    """weight_decay = B / (lr * D * tau), in PyTorch's convention (arXiv:2505.13738)."""
    return batch_tokens / (lr * tokens * tau)


def power_lines_timescale(tokens_per_param: float) -> float:
    """tau = 1.084 * (D / N)**-0.527 (arXiv:2505.13738).

    The value at 20 tokens per parameter, about 0.22, is confirmed; the constant is not.
    """
    return 1.084 * tokens_per_param**-0.527


def batch_rule(batch_tokens: float, fitted_at: float, beta1: float) -> TransferPrior:
    """Square-root rule for Adam's lr only: lr ~ B**(1/2) (arXiv:2205.10287).

    Valid for ratios r of batch sizes with r * (1 - beta1) < 1.
    """
    ratio = batch_tokens / fitted_at
    if ratio == 1:
        return TransferPrior(1.0, f"batch size {batch_tokens:g} tokens, as in the proxies")
    factor = ratio**0.5
    beyond = (
        ""
        if ratio * (1 - beta1) < 1
        else f"; the rule is not valid here: {ratio:g} * (1 - beta1) >= 1"
    )
    return TransferPrior(
        factor,
        f"batch size {fitted_at:g} -> {batch_tokens:g} tokens: lr times {factor:.4g} by the"
        f" square-root rule (arXiv:2205.10287), which your proxies did not test{beyond}",
    )
