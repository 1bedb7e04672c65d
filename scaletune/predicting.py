"""The optimum at a target scale, from a published law or from a fit of ours: the point, its interval, the near-optimal band."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

from scaletune import laws
from scaletune.errors import UserError, nearest
from scaletune.laws import surface
from scaletune.laws.surface import exp
from scaletune.records import Fit

FAR = 10  # times outside the fitted range from which a prediction says so
POINTS = {
    "lr": "peak",
    "batch_tokens": "tokens a step",
    "loss": "nats per token",
}  # what every prediction may hold, and its unit
QUANTITIES = tuple(POINTS)
FITTED = (
    "lr_nd",
    "lr_ndb",
    "joint",
    "loss_nd",
    "chinchilla",
)  # laws of `fitting.LAWS`: asked by n_params and tokens
LOSS_LAWS = (
    "loss_nd",
    "chinchilla",
)  # fits of the loss alone: one form, two estimators (scaletune/fitting/loss/law.py)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a law says at one scale. A quantity the law does not give is None."""

    law: str
    lr: float | None = None  # peak; for a fit on muP proxies: at base width
    batch_tokens: float | None = None  # tokens per optimizer step
    loss: float | None = None  # nats per token
    weight_decay: float | None = None  # of a joint law whose runs varied it
    interval: dict[str, list[float] | None] = field(
        default_factory=dict
    )  # quantity -> [lo, hi]; how sure the law is of its optimum
    band: dict[str, list[float] | None] = field(
        default_factory=dict
    )  # quantity -> [lo, hi]; loss within 0.25 % of the optimum's
    warnings: list[str] = field(default_factory=list)
    values: dict[str, float | None] = field(default_factory=dict)  # whatever else the law gives
    units: dict[str, str] = field(default_factory=dict)  # of `values`

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `weight_decay`, `values` and `units` only where a law gives them."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value or name not in ("weight_decay", "values", "units")
        }


def from_fit(
    fit: Fit, *, n_params: float, tokens: float, batch_tokens: float | None = None
) -> Prediction:
    """The fitted law at (n_params, tokens), with interval and near-optimal band, and in `warnings` what the fit and the distance make doubtful.

    n_params: non-embedding. `interval` is at `fit.level` for the optimum of a new cell: the law's own error and the scatter of cells about it.
    """
    if fit.law not in FITTED:
        raise UserError(
            f"a fit of {fit.law!r} is a relation between columns of its own: ask it alone, with `scaletune predict --fit` or `fitting.predict_relation`"
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
            warnings=[*warnings, *distance(fit, scale)],
        )
    lr, lr_interval, band, batch, said = None, None, None, None, list[str]()
    if fit.law not in LOSS_LAWS:
        batch, said = _batch(fit, batch_tokens)
        scale["batch_tokens"] = batch
        lr, lr_interval, band = _power_law(fit.solution, scale)
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
        warnings=[*dict.fromkeys(warnings), *said, *distance(fit, scale)],
    )


NEEDED: dict[
    str, tuple[str, ...]
] = {  # of `Fit.solution`; of other laws what a law of the lr needs
    **dict.fromkeys(LOSS_LAWS, ("vector", "draws", "scatter")),
    "joint": ("axes", "names", "vector", "covariance", "centre", "scatter", "quantile", "band"),
}
NEEDED_OF_LR = (
    "columns",
    "centre",
    "vector",
    "covariance",
    "quantile",
    "scatter",
    "half_width",
    "batch_tokens",
)


def _require_whole(fit: Fit) -> None:
    """UserError when a fit file was cut or edited so that nothing can be predicted from it."""
    for one in (fit, fit.loss_law) if fit.loss_law else (fit,):
        missing = [key for key in NEEDED.get(one.law, NEEDED_OF_LR) if key not in one.solution]
        if missing:
            raise UserError(
                f"a fit of {one.law!r} must hold `solution.{missing[0]}` to be predicted from, but it has none"
            )


def _batch(fit: Fit, asked: float | None) -> tuple[float | None, list[str]]:
    """The batch size, in tokens, that a predicted lr belongs to, and what there is to say of it."""
    runs = fit.solution["batch_tokens"]
    if fit.law == "lr_ndb":
        if asked:
            return asked, []
        middle = math.exp(sum(map(math.log, runs)) / len(runs))
        return middle, [
            f"lr depends on batch_tokens and none was given: it is for {middle:.4g}, the middle of the runs"
        ]
    if not runs:
        return None, [
            f"the fitted runs do not say their batch_tokens, so lr may not be that of {asked:g}"
        ] if asked else []
    if len(runs) > 1:
        return None, [
            f"lr is for each scale's best batch size, not for {asked:g} tokens"
        ] if asked else []
    if asked and not math.isclose(asked, runs[0], rel_tol=1e-6):
        rule = math.sqrt(asked / runs[0])
        return runs[0], [
            f"lr was fitted at batch_tokens {runs[0]:g}, not {asked:g}; the square-root rule (arXiv:2205.10287) would multiply it by {rule:.3g}, which is not done here"
        ]
    return runs[0], []


def _power_law(
    solution: Mapping[str, Any], scale: Mapping[str, float | None]
) -> tuple[float, list[float], list[float]]:
    """lr with its prediction interval and near-optimal band; all in ln lr until the end."""
    at = [1.0] + [
        math.log(scale[c] or 1.0) - centre
        for c, centre in zip(solution["columns"], solution["centre"], strict=True)
    ]
    x = math.fsum(a * v for a, v in zip(at, solution["vector"], strict=True))
    variance = math.fsum(
        a * b * v
        for a, row in zip(at, solution["covariance"], strict=True)
        for b, v in zip(at, row, strict=True)
    )
    half = solution["quantile"] * math.sqrt(max(variance, 0.0) + solution["scatter"] ** 2)
    below, above = solution["half_width"]
    return exp(x), [exp(x - half), exp(x + half)], [exp(x - below), exp(x + above)]


def loss_at(
    solution: Mapping[str, Any], level: float, n_params: float, tokens: float
) -> tuple[float, list[float]]:
    """E + A / n_params**alpha + B / tokens**beta, and of `loss_nd` what near runs show it to miss, in nats/token, with its interval.

    The interval: quantiles of resampled laws, the scatter about the law, and how far errors that runs share may have moved it.
    """

    def terms(draw: Iterable[float]) -> tuple[float, float, float]:
        e, a, b, alpha, beta = draw
        return e, a * exp(-alpha * math.log(n_params)), b * exp(-beta * math.log(tokens))

    parts = terms(solution["vector"])
    law, missed = math.fsum(parts), exp(_missed(solution, math.log(n_params), math.log(tokens)))
    draws = sorted(math.fsum(terms(map(float, line.split()))) for line in solution["draws"])
    slope = [
        *(part / law for part in parts),
        -math.log(n_params) * parts[1] / law,
        -math.log(tokens) * parts[2] / law,
    ]
    rows = [[float(v) for v in line.split()] for line in solution.get("discrepancy", [])]
    strays = math.fsum(
        a * b * v
        for a, row in zip(slope, rows, strict=False)
        for b, v in zip(slope, row, strict=True)
    )
    tail = (1 - level) / 2
    half = (
        solution.get("quantile", NormalDist().inv_cdf(1 - tail))
        * math.sqrt(solution["scatter"] ** 2 + max(strays, 0.0))
        * law
    )
    low, high = (draws[round(q * (len(draws) - 1))] for q in (tail, 1 - tail))
    ends = law - math.hypot(max(law - low, 0.0), half), law + math.hypot(max(high - law, 0.0), half)
    return law * missed, [end * missed for end in ends]


def _missed(solution: Mapping[str, Any], n: float, d: float) -> float:
    """What near runs show the law to miss, in ln L, at ln n_params and ln tokens: their weights, by how alike they are (fitting/loss/discrepancy.py)."""
    of_ratio, of_scale = solution.get("lengths", (1.0, 1.0))
    runs = ([float(v) for v in line.split()] for line in solution.get("near", []))
    return math.fsum(
        w * math.exp(-abs(d - b - n + a) / of_ratio - abs(d - b + n - a) / 2 / of_scale)
        for a, b, w in runs
    )


def allocation(fit: Fit, flops: float) -> dict[str, list[float]]:
    """Compute-optimal {n_params, tokens, n_exponent, tokens_per_param, loss}, [value, lo, hi] each, of a loss law at 6 * n_params * tokens = flops.

    N* = G (C/6)**a, D* = (C/6)**(1-a) / G, G = (alpha A / (beta B))**(1 / (alpha + beta)), a = beta / (alpha + beta) (arXiv:2203.15556, eq. 4).
    """
    if not fit.solution or fit.law not in LOSS_LAWS:
        raise UserError(
            f"an allocation needs a loss law, {' or '.join(LOSS_LAWS)}, but got a fit of {fit.law!r}"
        )

    def at(draw: Iterable[float]) -> tuple[float, ...]:
        e, A, B, alpha, beta = draw
        a = beta / (alpha + beta)
        n = exp(math.log(alpha * A / (beta * B)) / (alpha + beta) + a * math.log(flops / 6))
        return (
            n,
            flops / 6 / n,
            a,
            flops / 6 / n**2,
            e + A * n**-alpha + B * (flops / 6 / n) ** -beta,
        )

    if min(fit.solution["vector"][1:]) <= 0:
        raise UserError(
            "an allocation needs a law with both terms and both exponents, but these runs left one out: see the fit's status"
        )
    columns = [
        sorted(column)
        for column in zip(
            *(at(map(float, line.split())) for line in fit.solution["draws"]), strict=True
        )
    ]
    names = ("n_params", "tokens", "n_exponent", "tokens_per_param", "loss")
    low, high = ((1 - fit.level) / 2, (1 + fit.level) / 2)
    found = zip(names, at(fit.solution["vector"]), columns, strict=True)
    return {
        name: [value, *(drawn[round(q * (len(drawn) - 1))] for q in (low, high))]
        for name, value, drawn in found
    }


def distance(fit: Fit, scale: Mapping[str, Any]) -> list[str]:
    """A sentence for each column in which the target lies more than FAR times outside the fitted range."""
    said = []
    for column, (low, high) in fit.ranges.items():
        value = scale.get(column)
        factor = max(value / high, low / value) if value else 1.0
        if value and factor > FAR * (1 + 1e-9):
            side, end = ("above", high) if value > high else ("below", low)
            said.append(
                f"{column} {value:.4g} is {factor:.4g} times {side} the fitted range (to {end:.4g}): extrapolated more than {FAR}x"
            )
    return said


def from_law(law_id: str, **given: Any) -> Prediction:
    """A published law at what is given by the names of `laws.COLUMNS`, and in `warnings` whatever the question has that the law's runs had not.

    n_params: non-embedding. flops: of the training, as the law counts them; 6 * n_params * tokens when not given.
    `interval` holds None: the catalogue's intervals of coefficients lack their covariance. `band` is there where one was measured.
    """
    published = laws.law(law_id)
    values, warnings = laws.consult(published, **given)
    points = {name: values.get(name) for name in QUANTITIES}
    bands: dict[str, list[float] | None] = dict.fromkeys(QUANTITIES)
    for name, width in published.band.items():
        point = points[name]
        bands[name] = (
            None if point is None else [point / math.sqrt(width), point * math.sqrt(width)]
        )
    others = {name: value for name, value in values.items() if name not in QUANTITIES}
    units = {name: laws.UNITS[name] for name in others}
    return Prediction(
        law=law_id,
        **points,
        interval=dict.fromkeys(QUANTITIES),
        band=bands,
        warnings=warnings,
        values=others,
        units=units,
    )


def from_laws(law_ids: Iterable[str] | None = None, **given: Any) -> list[Prediction]:
    """`from_law` for each of these laws, side by side; for every law that gives a learning rate at what is given, when none is named."""
    known = {name: value for name, value in given.items() if value is not None}
    if law_ids is None:
        asked = [
            entry
            for entry in laws.CATALOGUE.values()
            if "lr" in entry.gives and laws.answers(entry, **known)
        ]
    else:
        asked = [laws.law(law_id) for law_id in law_ids]
    takes = {name for entry in asked for name in entry.unknown}
    made = []
    for entry in asked:
        found = from_law(
            entry.id,
            **{
                name: value
                for name, value in known.items()
                if name in entry.unknown or name not in takes
            },
        )
        made.append(replace(found, warnings=[*laws.pairing(entry, asked), *found.warnings]))
    return made


def predict(
    *, law: str | Iterable[str] | None = None, fit: Fit | str | Path | None = None, **given: Any
) -> list[Prediction]:
    """The optimum at a scale: by a fit, by the named published laws, or side by side by every published law that gives an lr.

    `given`: n_params (non-embedding), tokens, batch_tokens and the other names of `laws.COLUMNS`. `fit`: a Fit or its file; laws named with
    it come after it.
    """
    made = []
    if fit is not None:
        fitted = fit if isinstance(fit, Fit) else Fit.read(fit)
        made.append(from_fit(fitted, **_scale(given, alone=law is None)))
    if law is None and made:
        return made
    named = [law] if isinstance(law, str) else law
    return made + from_laws(named, **given)


def batch_of(made: Prediction) -> str:
    """Which batch a published law's lr belongs to, in words; empty for a fit, which says so in its warnings."""
    if made.law not in laws.CATALOGUE:
        return ""
    return laws.batch_of(laws.law(made.law), {"batch_tokens": made.batch_tokens})


FIT_COLUMNS = ("n_params", "tokens", "batch_tokens")  # what `from_fit` is asked by


def _scale(given: Mapping[str, Any], *, alone: bool) -> dict[str, Any]:
    """What a fit is asked by, of what was given; with no law beside it nothing else may be given."""
    known = {name: value for name, value in given.items() if value is not None}
    missing = [name for name in ("n_params", "tokens") if name not in known]
    if missing:
        raise UserError(
            f"a fit is asked by n_params and tokens, but {' and '.join(missing)} was not given"
        )
    other = next((name for name in known if name not in FIT_COLUMNS), None)
    if alone and other:
        raise UserError(
            f"a fit is asked by {', '.join(FIT_COLUMNS)} alone, but got {other}{nearest(other, FIT_COLUMNS)}"
        )
    return {name: given.get(name) for name in FIT_COLUMNS}
