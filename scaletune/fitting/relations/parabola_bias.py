"""The bias of isoFLOP parabolas, from the additive loss law fitted to the same runs.

A parabola in ln n_params is biased where the loss rises faster on one side, by an amount that grows
with the width and the offset of the sampled sizes, even without noise (arXiv:2603.22339). The
additive law E + A / n_params**alpha + B / tokens**beta has the asymmetry of its exponents. A
parabola through its losses at the sampled sizes has the bias of the parabola through the runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.loss.record import fit_loss_law
from scaletune.fitting.relations.relation import Array, GroupFit
from scaletune.fitting.relations.slices import FEWEST_SIZES, robust_parabola
from scaletune.records import Fit

SOURCE = "arXiv:2603.22339"
MAX_ROWS = 4000  # runs that the additive law is fitted to
NARROW = 3.0  # factor around the minimum of a second, narrower parabola
MAX_BIAS = math.log(10.0)  # of ln n_params: beyond this the draw has no use


@dataclass(frozen=True)
class Comparison:
    """Minima of the additive law and of parabolas through it, for the law and its draws."""

    bias: Array
    """(K, S): ln of the parabola's minimum over the law's, per draw and budget."""

    minima: Array
    """(K, S): ln n_params of the law's minimum."""

    narrow: Array
    """(S): ln of the minimum of the parabola through the runs within NARROW of the minimum."""

    ln_flops: Array
    """(S): the budgets."""

    weights: Array
    """(S): their weights in the power law."""

    def powers(self, values: Array) -> Array:
        """(K, 2): intercept and slope over ln flops of values (K, S)."""
        terms = np.stack([np.ones_like(self.ln_flops), self.ln_flops], 1)
        root = np.sqrt(self.weights)
        return (np.linalg.pinv(terms * root[:, None]) @ (values * root).T).T


def compare_with_additive_law(fit: Fit, parts: Sequence[GroupFit], weights: Sequence[float]) -> Fit:
    """Adds the bias of the parabolas and the exponent of the additive law on the same runs.

    The interval of `p` and the predictions are widened to contain the corrected exponent
    `p_corrected`; `p_additive` is the exponent of the additive law. `cells` have the bias of each
    minimum as a share (`parabola_bias`).
    """
    rows, assumption = _with_tokens(pd.concat([part.rows for part in parts]))
    if rows is None:
        return replace(fit, assumptions=[*fit.assumptions, assumption])
    step = -(-len(rows) // MAX_ROWS)
    law, reason = _additive_law(rows.iloc[::step], fit.level)
    if law is None:
        unknown = f"the bias of the parabolas ({SOURCE}) is unknown: {reason}"
        return replace(fit, assumptions=[*fit.assumptions, unknown])
    compared = _compare(law, [rows[rows["id"].isin(part.rows["id"])] for part in parts], parts)
    compared = replace(compared, weights=np.array(weights))
    biases = iter(np.expm1(compared.bias[0]).tolist())
    keys = [part.key for part in parts]
    cells = [
        cell | {"parabola_bias": next(biases)} if _key_of(cell, keys) else cell
        for cell in fit.cells
    ]
    fit = replace(fit, cells=cells)
    extra = [assumption] if assumption else []
    if len(parts) < 2:
        sentence = f"parabola's minimum is {_range(compared)} from that of the additive law"
        return replace(fit, assumptions=[*fit.assumptions, *extra, f"the {sentence} ({SOURCE})"])
    return _add_exponents(fit, compared, len(rows.iloc[::step]), extra)


def _key_of(cell: dict[str, Any], keys: Sequence[dict[str, Any]]) -> bool:
    return "n_optimal" in cell and any(
        all(cell.get(name) == value for name, value in key.items()) for key in keys
    )


def _with_tokens(rows: pd.DataFrame) -> tuple[pd.DataFrame | None, str]:
    """The rows with `tokens`, computed from `flops` if they are missing, and how."""
    if "tokens" not in rows:
        tokens = rows["flops"] / (6 * rows["n_params"])
        return rows.assign(tokens=tokens), "`tokens` is computed as flops / (6 * n_params)"
    tokens = pd.to_numeric(rows["tokens"], errors="coerce").astype(float)
    if not (np.isfinite(tokens) & (tokens > 0)).all():
        return None, (
            f"the bias of the parabolas ({SOURCE}) is unknown: `tokens` is not a number above 0 in "
            "every run"
        )
    return rows.assign(tokens=tokens), ""


def _additive_law(rows: pd.DataFrame, level: float) -> tuple[Array | None, str]:
    """(K, 5): E, A, B, alpha, beta of the fit and of its draws; or why there are none."""
    data = (rows[name].to_numpy(float) for name in ("n_params", "tokens", "loss"))
    try:
        solution = fit_loss_law(*data, level=level)["solution"]
    except (UserError, FloatingPointError, np.linalg.LinAlgError) as error:
        return None, f"the additive law cannot be fitted to these runs ({error})"
    drawn = [solution["vector"], *([float(v) for v in row.split()] for row in solution["draws"])]
    law = np.array(drawn, float)
    law = law[(law[:, 1:] > 0).all(axis=1) & np.isfinite(law).all(axis=1)]
    if min(solution["vector"][1:]) <= 0 or len(law) < 20:
        return None, "these runs do not identify both terms of the additive law"
    return law, ""


def _compare(law: Array, groups: Sequence[pd.DataFrame], parts: Sequence[GroupFit]) -> Comparison:
    both = [_minima(law, group) for group in groups]
    return Comparison(
        bias=np.stack([bias for bias, _ in both], 1),
        minima=np.stack([minimum for _, minimum in both], 1),
        narrow=np.array([_narrow_minimum(part) for part in parts]),
        ln_flops=np.log([part.key["flops"] for part in parts]),
        weights=np.ones(len(parts)),
    )


def _minima(law: Array, rows: pd.DataFrame) -> tuple[Array, Array]:
    """(K,) each: the bias of a parabola through the law, and ln n_params of the law's minimum.

    Tokens along a budget are a power of n_params, fitted to its runs; the power is -1 for
    flops = 6 * n_params * tokens.
    """
    E, A, B, alpha, beta = law.T[:, :, None]
    n, d = (rows[name].to_numpy(float)[None] for name in ("n_params", "tokens"))
    middle = float(np.log(n).mean())
    x = np.log(n[0]) - middle
    ln_loss = np.log(E + A * n**-alpha + B * d**-beta)
    _, slope, half = np.linalg.pinv(np.stack([np.ones_like(x), x, x**2], 1)) @ ln_loss.T
    power, at_one = np.polyfit(x, np.log(d[0]), 1)
    power = min(power, -0.1)
    A, B, alpha, beta = A[:, 0], B[:, 0], alpha[:, 0], beta[:, 0]
    # d/dx of A n**-alpha + B d**-beta is 0, with ln d = at_one + power * x
    ratio = np.log(alpha * A / (-power * beta * B)) - alpha * middle + beta * at_one
    minimum = ratio / (alpha - power * beta)
    half = np.where(half > 0, half, np.nan)  # no minimum: the bias is unknown
    bias = np.nan_to_num(-slope / (2 * half) - minimum)
    return np.clip(bias, -MAX_BIAS, MAX_BIAS), minimum + middle


def _narrow_minimum(part: GroupFit) -> float:
    """ln of the minimum through the runs within NARROW of it; the wide one's if they are few."""
    assert part.fit is not None
    minimum = math.log(part.fit.params["n_optimal"]["value"])
    x, y = (np.log(part.rows[name].to_numpy(float)) for name in ("n_params", "loss"))
    near = np.abs(x - minimum) <= math.log(NARROW)
    if len(set(x[near])) < FEWEST_SIZES:
        return minimum
    _, slope, half = robust_parabola(x[near] - minimum, y[near])
    shift = -slope / (2 * half) if half > 0 else 0.0
    return minimum + float(np.clip(shift, -math.log(NARROW), math.log(NARROW)))


def _range(compared: Comparison) -> str:
    low, high = (100 * np.expm1(f(compared.bias[0])) for f in (np.min, np.max))
    return f"{low:+.0f} %" if len(compared.bias[0]) == 1 else f"{low:+.0f} % to {high:+.0f} %"


def _interval(values: Array, level: float) -> list[float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return [float(min(low, values[0])), float(max(high, values[0]))]


def _add_exponents(fit: Fit, compared: Comparison, n_rows: int, extra: list[str]) -> Fit:
    """The corrected exponent and that of the additive law, with sentences that compare them."""
    bias, law = compared.powers(compared.bias), compared.powers(compared.minima)[:, 1]
    additive = {"value": float(law[0]), "interval": _interval(law, fit.level), "derived": True}
    params = fit.params | {"p_additive": additive}
    beside = (
        f"the additive law on the same {n_rows} runs gives p = {_format(additive)}; the parabolas' "
        f"minima are {_range(compared)} from its own because of the width of the slices ({SOURCE})"
    )
    if "p" not in fit.params:
        return replace(fit, params=params, assumptions=[*fit.assumptions, *extra, beside])
    own = fit.params["p"]
    corrected = _corrected(own, bias[:, 1], fit.level)
    narrow = float(compared.powers(compared.narrow[None])[0, 1])
    wide = _widened(own, corrected, narrow)
    params |= {"p": own | {"interval": wide}, "p_corrected": corrected, "p_additive": additive}
    beside += (
        f", which moves p by {bias[0, 1]:+.3f}: corrected, p = {_format(corrected)}; with the runs "
        f"within {NARROW:g}x of each minimum p = {narrow:.3f}; the interval of `p` contains both"
    )
    status = _disagreement(own, corrected, additive, wide, fit.status)
    return replace(
        fit,
        params=params,
        status=status,
        solution=fit.solution | {"corrected_draws": _corrected_draws(fit, bias[0])},
        assumptions=[*fit.assumptions, *extra, beside],
    )


def _corrected(own: dict[str, Any], bias: Array, level: float) -> dict[str, Any]:
    """p less the bias; the interval adds the uncertainty of the bias."""
    value = own["value"] - float(bias[0])
    spread = [end - float(bias[0]) for end in _interval(bias, level)]
    below = math.hypot(own["value"] - own["interval"][0], spread[1])
    above = math.hypot(own["interval"][1] - own["value"], spread[0])
    return {"value": value, "interval": [value - below, value + above], "derived": True}


def _widened(own: dict[str, Any], corrected: dict[str, Any], narrow: float) -> list[float]:
    """The interval of p, moved to the corrected value at one end, and with the narrow one."""
    shift = corrected["value"] - own["value"]
    low, high = own["interval"]
    return [min(low + min(shift, 0.0), narrow), max(high + max(shift, 0.0), narrow)]


def _corrected_draws(fit: Fit, bias: Array) -> list[list[float]]:
    """Draws of c and p, less the bias."""
    names = list(fit.solution["values"])
    moved = []
    for row in [*fit.solution["draws"], *fit.solution["t_draws"]]:
        values = dict(zip(names, row, strict=True))
        values |= {"c": values["c"] * math.exp(-float(bias[0])), "p": values["p"] - float(bias[1])}
        moved.append([values[name] for name in names])
    return moved


def _disagreement(
    own: dict[str, Any],
    corrected: dict[str, Any],
    additive: dict[str, Any],
    wide: Sequence[float],
    status: Sequence[str],
) -> list[str]:
    """The status, first whether the exponents differ by more than their intervals."""
    others = [sentence for sentence in status if sentence != "ok"]
    low, high = additive["interval"]
    if low > wide[1] or high < wide[0]:
        return [
            f"the isoFLOP parabolas give p = {_format(own | {'interval': list(wide)})}, but the "
            f"additive law on the same runs gives p = {_format(additive)}: they differ by more "
            "than their intervals, so neither extrapolates surely; add sizes close to each minimum",
            *others,
        ]
    if not own["interval"][0] <= corrected["value"] <= own["interval"][1]:
        return [
            f"the parabolas bias p by more than its interval: p = {own['value']:.3f}, but "
            f"corrected p = {_format(corrected)}; use `p_corrected`, or add sizes close to each "
            "minimum",
            *others,
        ]
    return others or ["ok"]


def _format(parameter: dict[str, Any]) -> str:
    low, high = parameter["interval"]
    return f"{parameter['value']:.3f} [{low:.3f}, {high:.3f}]"
