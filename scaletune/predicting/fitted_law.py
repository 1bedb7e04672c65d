"""Predicts from a fit: learning rate, batch size and loss at a target scale.

The functions read a fit by its attributes (`FittedLaw`), so this module imports no record and no
numpy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, Protocol

from scaletune.errors import UserError
from scaletune.predicting.prediction import Prediction
from scaletune.surface import evaluation as surface
from scaletune.surface.evaluation import exp
from scaletune.units import human

FAR = 10
"""A prediction warns when its scale is more than this factor outside the fitted range."""
FITTED = ("lr_nd", "lr_ndb", "joint", "loss_nd", "chinchilla")
"""The laws of `fitting.LAWS` that predict from n_params and tokens."""
LOSS_LAWS = ("loss_nd", "chinchilla")
"""Laws of the loss only: one functional form, two estimators (scaletune/fitting/loss/law.py)."""


class FittedLaw(Protocol):
    """The attributes of a fit that a prediction reads: see `scaletune.records.Fit`."""

    @property
    def law(self) -> str: ...

    @property
    def solution(self) -> dict[str, Any]: ...

    @property
    def status(self) -> list[str]: ...

    @property
    def ranges(self) -> dict[str, list[float]]: ...

    @property
    def level(self) -> float: ...

    @property
    def loss_law(self) -> FittedLaw | None: ...


def from_fit(
    fit: FittedLaw, *, n_params: float, tokens: float, batch_tokens: float | None = None
) -> Prediction:
    """The fitted law at one scale, with interval and near-optimal band.

    Args:
        fit: A fit of a law in `FITTED`.
        n_params: Non-embedding parameters of the target.
        tokens: Training tokens of the target.
        batch_tokens: Batch size in tokens per step; None: the one that the fit gives.

    Returns:
        The prediction. `interval` is at `fit.level` for the optimum of a new setting: it contains
        the error of the law and the between-setting scatter. `warnings` holds the status of the
        fit and the distance from the fitted range.

    Raises:
        UserError: The fit is of another law, a number is not above 0, or the fit file is cut.
    """
    if fit.law not in FITTED:
        raise UserError(
            f"`from_fit` takes a fit of {', '.join(FITTED)}, but got {fit.law!r}, a relation"
            " between columns of its own: use `scaletune predict --fit` or"
            " `fitting.predict_relation`"
        )
    scale: dict[str, float | None] = {
        "n_params": n_params,
        "tokens": tokens,
        "batch_tokens": batch_tokens,
    }
    for column, value in scale.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"`{column}` must be a number above 0, but got {value!r}")
    _require_whole(fit)
    warnings = [sentence for sentence in fit.status if sentence != "ok"]
    if fit.law == "joint":
        return Prediction(
            law="joint",
            **surface.predict(fit.solution, scale),
            warnings=[*warnings, *extrapolation_warnings(fit, scale)],
        )
    lr, lr_interval, band, batch, notes = None, None, None, None, list[str]()
    if fit.law not in LOSS_LAWS:
        batch, notes = _batch(fit, batch_tokens)
        scale["batch_tokens"] = batch
        lr, lr_interval, band = _power_law(fit.solution, scale, fit.level)
    lower = fit if fit.law in LOSS_LAWS else fit.loss_law
    loss, loss_interval = (
        loss_at(lower.solution, lower.level, n_params, tokens) if lower else (None, None)
    )
    if lower is not fit and lower:
        warnings += [sentence for sentence in lower.status if sentence != "ok"]
    return Prediction(
        law=fit.law,
        lr=lr,
        batch_tokens=batch,
        loss=loss,
        interval={"lr": lr_interval, "batch_tokens": None, "loss": loss_interval},
        band={"lr": band, "batch_tokens": None, "loss": None},
        warnings=[*dict.fromkeys(warnings), *notes, *extrapolation_warnings(fit, scale)],
    )


NEEDED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LOSS_LAWS, ("vector", "draws", "scatter")),
    "joint": ("axes", "names", "vector", "covariance", "centre", "scatter", "quantile", "band"),
}
"""Law -> the keys of `Fit.solution` that a prediction reads; a law of the lr: NEEDED_OF_LR."""
NEEDED_OF_LR = (
    *("columns", "centre", "vector", "covariance", "quantile"),
    *("scatter", "half_width", "batch_tokens"),
)


def _require_whole(fit: FittedLaw) -> None:
    """UserError when the fit file was cut or edited and nothing can be predicted from it."""
    for part in (fit, fit.loss_law) if fit.loss_law else (fit,):
        missing = [key for key in NEEDED.get(part.law, NEEDED_OF_LR) if key not in part.solution]
        if missing:
            raise UserError(
                f"a fit of {part.law!r} must hold `solution.{missing[0]}` to be predicted from,"
                " but it has none: fit again"
            )


def _batch(fit: FittedLaw, requested: float | None) -> tuple[float | None, list[str]]:
    """The batch size, in tokens, that the predicted lr is valid at, and notes on it."""
    runs = fit.solution["batch_tokens"]
    if fit.law == "lr_ndb":
        if requested:
            return requested, []
        middle = math.exp(sum(map(math.log, runs)) / len(runs))
        return middle, [
            "lr depends on batch_tokens and none was given: lr is for the geometric mean of the"
            f" runs, {human(middle)} tokens"
        ]
    if len(runs) != 1 and not requested:
        return None, []
    if not runs:
        return None, [
            f"batch_tokens of the fitted runs is unknown: lr may not be valid at {requested:g}"
        ]
    if len(runs) > 1:
        return None, [f"lr is for the best batch size at each scale, not for {requested:g} tokens"]
    if requested and not math.isclose(requested, runs[0], rel_tol=1e-6):
        return runs[0], [
            f"lr was fitted at batch_tokens {runs[0]:g}, not {requested:g}. The square-root rule"
            f" (arXiv:2205.10287) would multiply lr by {math.sqrt(requested / runs[0]):.3g}; it is"
            " not applied here"
        ]
    return runs[0], []


def _power_law(
    solution: Mapping[str, Any], scale: Mapping[str, float | None], level: float
) -> tuple[float, list[float], list[float]]:
    """lr with its prediction interval and near-optimal band, computed in ln lr."""
    at = [1.0] + [
        math.log(scale[c] or 1.0) - centre
        for c, centre in zip(solution["columns"], solution["centre"], strict=True)
    ]
    x = math.fsum(a * v for a, v in zip(at, solution["vector"], strict=True))
    variance = _quadratic_form(at, solution["covariance"])
    half = math.hypot(
        solution["quantile"] * math.sqrt(max(variance, 0.0) + solution["scatter"] ** 2),
        NormalDist().inv_cdf((1 + level) / 2) * _unmeasured_sd(solution, at[1:], scale),
    )
    below, above = solution["half_width"]
    return exp(x), [exp(x - half), exp(x + half)], [exp(x - below), exp(x + above)]


def _unmeasured_sd(
    solution: Mapping[str, Any], at: Sequence[float], scale: Mapping[str, float | None]
) -> float:
    """Sd of ln lr from exponents that the runs do not measure: their spread in published laws.

    It grows with the distance from the value of each column that the runs imply.
    """
    unmeasured = solution.get("unmeasured")
    if not unmeasured:
        return 0.0
    parts = (unmeasured["columns"], unmeasured["centre"], unmeasured["slopes"])
    distance = [
        math.log(value) - centre - math.fsum(a * s for a, s in zip(at, slopes, strict=False))
        if (value := scale.get(column))
        else 0.0
        for column, centre, slopes in zip(*parts, strict=True)
    ]
    return math.sqrt(max(_quadratic_form(distance, unmeasured["covariance"]), 0.0))


def _quadratic_form(x: Sequence[float], matrix: Iterable[Iterable[float]]) -> float:
    return math.fsum(
        a * b * v for a, row in zip(x, matrix, strict=True) for b, v in zip(x, row, strict=True)
    )


def _numbers(lines: Iterable[str]) -> list[list[float]]:
    """Rows of numbers, each stored as one string."""
    return [[float(v) for v in line.split()] for line in lines]


def loss_at(
    solution: Mapping[str, Any], level: float, n_params: float, tokens: float
) -> tuple[float, list[float]]:
    """E + A / n_params**alpha + B / tokens**beta in nats per token, with its interval.

    A `loss_nd` fit is corrected by the discrepancy between the law and nearby runs. The interval
    combines the quantiles of resampled laws, the scatter about the law, and the discrepancy that
    is correlated between runs.
    """

    def terms(draw: Iterable[float]) -> tuple[float, float, float]:
        e, a, b, alpha, beta = draw
        return e, a * exp(-alpha * math.log(n_params)), b * exp(-beta * math.log(tokens))

    parts = terms(solution["vector"])
    law = math.fsum(parts)
    correction = exp(_discrepancy(solution, math.log(n_params), math.log(tokens)))
    draws = sorted(math.fsum(terms(draw)) for draw in _numbers(solution["draws"]))
    slope = [
        *(part / law for part in parts),
        -math.log(n_params) * parts[1] / law,
        -math.log(tokens) * parts[2] / law,
    ]
    rows = _numbers(solution.get("discrepancy", []))
    correlated = _quadratic_form(slope, rows) if rows else 0.0
    tail = (1 - level) / 2
    half = (
        solution.get("quantile", NormalDist().inv_cdf(1 - tail))
        * math.sqrt(solution["scatter"] ** 2 + max(correlated, 0.0))
        * law
    )
    low, high = (draws[round(q * (len(draws) - 1))] for q in (tail, 1 - tail))
    ends = law - math.hypot(max(law - low, 0.0), half), law + math.hypot(max(high - law, 0.0), half)
    return law * correction, [end * correction for end in ends]


def _discrepancy(solution: Mapping[str, Any], n: float, d: float) -> float:
    """Discrepancy of the law in ln loss at ln n_params and ln tokens (fitting/loss/discrepancy.py).

    The weights of nearby runs, times a kernel of their distance in tokens per parameter and in
    compute.
    """
    of_ratio, of_scale = solution.get("lengths", (1.0, 1.0))
    return math.fsum(
        w * math.exp(-abs(d - b - n + a) / of_ratio - abs(d - b + n - a) / 2 / of_scale)
        for a, b, w in _numbers(solution.get("near", []))
    )


def allocation(fit: FittedLaw, flops: float) -> dict[str, list[float]]:
    """The compute-optimal model size and token budget of a loss law at a FLOP budget.

    With C = flops = 6 * n_params * tokens: N* = G (C/6)**a, D* = (C/6)**(1-a) / G,
    G = (alpha A / (beta B))**(1 / (alpha + beta)), a = beta / (alpha + beta) (arXiv:2203.15556,
    eq. 4).

    Args:
        fit: A fit of a loss law.
        flops: Training FLOPs, 6 * n_params * tokens.

    Returns:
        n_params, tokens, n_exponent (a), tokens_per_param and loss, each as [value, low, high].

    Raises:
        UserError: The fit is of another law, or one of its terms was left out.
    """
    if not fit.solution or fit.law not in LOSS_LAWS:
        raise UserError(
            f"an allocation needs a loss law, {' or '.join(LOSS_LAWS)}, but got a fit of"
            f" {fit.law!r}"
        )

    def at(draw: Iterable[float]) -> tuple[float, ...]:
        e, A, B, alpha, beta = draw
        a = beta / (alpha + beta)
        n = exp(math.log(alpha * A / (beta * B)) / (alpha + beta) + a * math.log(flops / 6))
        d = flops / 6 / n
        return n, d, a, flops / 6 / n**2, e + A * n**-alpha + B * d**-beta

    if min(fit.solution["vector"][1:]) <= 0:
        raise UserError(
            "an allocation needs a law with both terms and both exponents, but the fit to these"
            " runs left one out: see the status of the fit"
        )
    draws = map(at, _numbers(fit.solution["draws"]))
    columns = [sorted(column) for column in zip(*draws, strict=True)]
    names = ("n_params", "tokens", "n_exponent", "tokens_per_param", "loss")
    low, high = ((1 - fit.level) / 2, (1 + fit.level) / 2)
    best = zip(names, at(fit.solution["vector"]), columns, strict=True)
    return {
        name: [value, *(drawn[round(q * (len(drawn) - 1))] for q in (low, high))]
        for name, value, drawn in best
    }


def extrapolation_warnings(fit: FittedLaw, scale: Mapping[str, Any]) -> list[str]:
    """A warning for each column that is more than FAR times outside the fitted range."""
    warnings = []
    for column, (low, high) in fit.ranges.items():
        value = scale.get(column)
        factor = max(value / high, low / value) if value else 1.0
        if value and factor > FAR * (1 + 1e-9):
            side, end = ("above", high) if value > high else ("below", low)
            warnings.append(
                f"{column} {human(value)} is {factor:.4g}x {side} the fitted range"
                f" ({'up to' if side == 'above' else 'from'} {human(end)}):"
                f" extrapolated more than {FAR}x"
            )
    return warnings
