"""The optimum at a target scale, from a published law or from a fit of ours: the point, its interval, the near-optimal band."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from scaletune import laws
from scaletune.errors import UserError
from scaletune.laws import surface
from scaletune.laws.surface import exp
from scaletune.records import Fit

FAR = 10  # times outside the fitted range from which a prediction says so
QUANTITIES = ("lr", "batch_tokens", "loss")  # what a prediction may hold


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a law says at one scale. A quantity the law does not give is None."""

    law: str
    lr: float | None = None  # peak; for a fit on muP proxies: at base width
    batch_tokens: float | None = None  # tokens per optimizer step
    loss: float | None = None  # nats per token
    weight_decay: float | None = None  # of a joint law whose runs varied it
    interval: dict[str, list[float] | None] = field(default_factory=dict)  # quantity -> [lo, hi]; how sure the law is of its optimum
    band: dict[str, list[float] | None] = field(default_factory=dict)  # quantity -> [lo, hi]; loss within 0.25 % of the optimum's
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `weight_decay` is among them only where a law gives one."""
        return {key: value for key, value in asdict(self).items() if key != "weight_decay" or value is not None}


def from_fit(fit: Fit, *, n_params: float, tokens: float, batch_tokens: float | None = None) -> Prediction:
    """The fitted law at (n_params, tokens), with interval and near-optimal band, and in `warnings` what the fit and the distance make doubtful.

    n_params: non-embedding. `interval` is at `fit.level` for the optimum of a new cell: the law's own error and the scatter of cells about it.
    """
    scale: dict[str, float | None] = {"n_params": n_params, "tokens": tokens, "batch_tokens": batch_tokens}
    for column, value in scale.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"`{column}` must be a number above 0, but got {value!r}")
    _require_whole(fit)
    warnings = [sentence for sentence in fit.status if sentence != "ok"]
    if fit.law == "joint":
        return Prediction(law="joint", **surface.predict(fit.solution, scale), warnings=[*warnings, *_distance(fit, scale)])
    lr, lr_interval, band, batch, said = None, None, None, None, list[str]()
    if fit.law != "loss_nd":
        batch, said = _batch(fit, batch_tokens)
        scale["batch_tokens"] = batch
        lr, lr_interval, band = _power_law(fit.solution, scale)
    lower = fit if fit.law == "loss_nd" else fit.loss_law
    loss, loss_interval = _loss_law(lower, n_params, tokens) if lower else (None, None)
    if lower is not fit and lower:
        warnings += [sentence for sentence in lower.status if sentence != "ok"]
    return Prediction(
        law=fit.law,
        lr=lr,
        batch_tokens=batch,
        loss=loss,
        interval={"lr": lr_interval, "batch_tokens": None, "loss": loss_interval},
        band={"lr": band, "batch_tokens": None, "loss": None},
        warnings=[*dict.fromkeys(warnings), *said, *_distance(fit, scale)],
    )


NEEDED = {  # of `Fit.solution`; of other laws what a law of the lr needs
    "loss_nd": ("vector", "draws", "scatter"),
    "joint": ("axes", "names", "vector", "covariance", "centre", "scatter", "quantile", "band"),
}
NEEDED_OF_LR = ("columns", "centre", "vector", "covariance", "quantile", "scatter", "half_width", "batch_tokens")


def _require_whole(fit: Fit) -> None:
    """UserError when a fit file was cut or edited so that nothing can be predicted from it."""
    for one in (fit, fit.loss_law) if fit.loss_law else (fit,):
        missing = [key for key in NEEDED.get(one.law, NEEDED_OF_LR) if key not in one.solution]
        if missing:
            raise UserError(f"a fit of {one.law!r} must hold `solution.{missing[0]}` to be predicted from, but it has none")


def _batch(fit: Fit, asked: float | None) -> tuple[float | None, list[str]]:
    """The batch size, in tokens, that a predicted lr belongs to, and what there is to say of it."""
    runs = fit.solution["batch_tokens"]
    if fit.law == "lr_ndb":
        if asked:
            return asked, []
        middle = math.exp(sum(map(math.log, runs)) / len(runs))
        return middle, [f"lr depends on batch_tokens and none was given: it is for {middle:.4g}, the middle of the runs"]
    if not runs:
        return None, [f"the fitted runs do not say their batch_tokens, so lr may not be that of {asked:g}"] if asked else []
    if len(runs) > 1:
        return None, [f"lr is for each scale's best batch size, not for {asked:g} tokens"] if asked else []
    if asked and not math.isclose(asked, runs[0], rel_tol=1e-6):
        rule = math.sqrt(asked / runs[0])
        return runs[0], [
            f"lr was fitted at batch_tokens {runs[0]:g}, not {asked:g}; the square-root rule (arXiv:2205.10287) would multiply it by {rule:.3g}, which is not done here"
        ]
    return runs[0], []


def _power_law(solution: Mapping[str, Any], scale: Mapping[str, float | None]) -> tuple[float, list[float], list[float]]:
    """lr with its prediction interval and near-optimal band; all in ln lr until the end."""
    at = [1.0] + [math.log(scale[c] or 1.0) - centre for c, centre in zip(solution["columns"], solution["centre"], strict=True)]
    x = math.fsum(a * v for a, v in zip(at, solution["vector"], strict=True))
    variance = math.fsum(a * b * v for a, row in zip(at, solution["covariance"], strict=True) for b, v in zip(at, row, strict=True))
    half = solution["quantile"] * math.sqrt(max(variance, 0.0) + solution["scatter"] ** 2)
    below, above = solution["half_width"]
    return exp(x), [exp(x - half), exp(x + half)], [exp(x - below), exp(x + above)]


def _loss_law(fit: Fit, n_params: float, tokens: float) -> tuple[float, list[float]]:
    """E + A / n_params**alpha + B / tokens**beta in nats/token; interval: quantiles of resampled laws, and the scatter about the law."""

    def at(draw: Iterable[float]) -> float:
        e, a, b, alpha, beta = draw
        return e + a * exp(-alpha * math.log(n_params)) + b * exp(-beta * math.log(tokens))

    loss = at(fit.solution["vector"])
    draws = sorted(at(map(float, line.split())) for line in fit.solution["draws"])
    tail, scatter = (1 - fit.level) / 2, NormalDist().inv_cdf(0.5 + fit.level / 2) * fit.solution["scatter"] * loss
    low, high = (draws[round(q * (len(draws) - 1))] for q in (tail, 1 - tail))
    return loss, [loss - math.hypot(max(loss - low, 0.0), scatter), loss + math.hypot(max(high - loss, 0.0), scatter)]


def _distance(fit: Fit, scale: Mapping[str, float | None]) -> list[str]:
    """A sentence for each column in which the target lies more than FAR times outside the fitted range."""
    said = []
    for column, (low, high) in fit.ranges.items():
        value = scale.get(column)
        factor = max(value / high, low / value) if value else 1.0
        if value and factor > FAR * (1 + 1e-9):
            side, end = ("above", high) if value > high else ("below", low)
            said.append(f"{column} {value:.4g} is {factor:.4g} times {side} the fitted range (to {end:.4g}): extrapolated more than {FAR}x")
    return said


def from_law(law_id: str, *, n_params: float, tokens: float, batch_tokens: float | None = None, flops: float | None = None) -> Prediction:
    """A published law at one scale, and in `warnings` whatever the question has that the law's runs had not.

    n_params: non-embedding. flops: of the training, as the law counts them; 6 * n_params * tokens when not given.
    `interval` holds None: the catalogue's intervals of coefficients lack their covariance. `band` is there where one was measured.
    """
    published = laws.law(law_id)
    values, warnings = laws.consult(published, n_params=n_params, tokens=tokens, batch_tokens=batch_tokens, flops=flops)
    points = {name: values.get(name) for name in QUANTITIES}
    bands: dict[str, list[float] | None] = dict.fromkeys(QUANTITIES)
    for name, width in published.band.items():
        point = points[name]
        bands[name] = None if point is None else [point / math.sqrt(width), point * math.sqrt(width)]
    return Prediction(law=law_id, **points, interval=dict.fromkeys(QUANTITIES), band=bands, warnings=warnings)


def from_laws(
    law_ids: Iterable[str] | None = None, *, n_params: float, tokens: float, batch_tokens: float | None = None, flops: float | None = None
) -> list[Prediction]:
    """`from_law` for each of these laws, side by side; for every law that gives a learning rate when none is named."""
    ids = [known.id for known in laws.CATALOGUE.values() if "lr" in known.gives] if law_ids is None else law_ids
    return [from_law(law_id, n_params=n_params, tokens=tokens, batch_tokens=batch_tokens, flops=flops) for law_id in ids]


def predict(
    *, n_params: float, tokens: float, batch_tokens: float | None = None, flops: float | None = None,
    law: str | Iterable[str] | None = None, fit: Fit | str | Path | None = None,
) -> list[Prediction]:  # fmt: skip
    """The optimum at a scale: by a fit, by the named published laws, or side by side by every published law that gives an lr.

    n_params: non-embedding. `fit`: a Fit or its file; laws named with it come after it.
    """
    made = []
    if fit is not None:
        fitted = fit if isinstance(fit, Fit) else Fit.read(fit)
        made.append(from_fit(fitted, n_params=n_params, tokens=tokens, batch_tokens=batch_tokens))
    if law is None and made:
        return made
    named = [law] if isinstance(law, str) else law
    return made + from_laws(named, n_params=n_params, tokens=tokens, batch_tokens=batch_tokens, flops=flops)
