"""The prior for which a study is planned: from published laws, or from an earlier joint fit.

Without a fit the parameters have the prior of `surface/prior.py`, with the optimum known to a
factor of about two. An earlier fit narrows the surfaces for which the design is made. It does not
count as data: the information of the planned runs is computed from the prior that their own fit
will use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletune import laws
from scaletune.errors import UserError
from scaletune.predicting import FAR
from scaletune.recipe import Recipe
from scaletune.records import Fit
from scaletune.rules import scale
from scaletune.surface.evaluation import AXES
from scaletune.surface.model import Scales, parameter_names
from scaletune.surface.prior import SurfaceDistribution, guessed_scales, prior_about

Array = NDArray[np.float64]

GUESS_SD = 0.7
"""Sd of ln lr and ln batch from a published law: laws differ by about a factor of two."""
OTHER_SD = 1.0
"""Sd of a guess that has less support."""
PLANNED_AXES = AXES[:2]


def scales_of(noise: float | None, solution: Mapping[str, Any] | None = None) -> Scales:
    """Noise, misfit and scatter of an earlier fit, else their prior guess.

    Args:
        noise: Sd of ln loss of one run; None: that of the fit or the guess.
        solution: `Fit.solution` of a joint fit.
    """
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise UserError(
            f"`noise` must be a number above 0, the sd of ln loss of one run, but got {noise!r}"
        )
    if solution is None:
        return guessed_scales(len(PLANNED_AXES), noise)
    own = solution["scatter"]
    return Scales(noise or solution["noise"], solution["misfit"], np.array([*own[:2], own[-1]]))


def from_priors(
    centre: tuple[float, float],
    at: tuple[float, float],
    sds: tuple[float, float] = (GUESS_SD, GUESS_SD),
    noise: float | None = None,
    seed: int = 0,
) -> SurfaceDistribution:
    """The prior with a guess of the optimum.

    Args:
        centre: (ln n_params, ln tokens) of the middle of the proxies.
        at: (ln lr, ln batch_tokens) of the optimum there.
        sds: Their sds.
        noise: Sd of ln loss of one run.
        seed: Of the draws.
    """
    fit_prior = prior_about(at, 1.0)
    sd = fit_prior[:, 1].copy()
    sd[[0, 3]] = sds
    return SurfaceDistribution(
        centre, fit_prior[:, 0], np.diag(sd), fit_prior, scales_of(noise), seed
    )


def from_joint(
    fit: Fit, centre: tuple[float, float], noise: float | None = None, seed: int = 0
) -> SurfaceDistribution:
    """The posterior of an earlier joint fit, about another centre."""
    if fit.law != "joint":
        raise UserError(f"a plan needs a fit of law 'joint', but got one of {fit.law!r}")
    keys = ("names", "vector", "covariance", "centre", "scatter", "noise", "misfit")
    missing = [key for key in keys if key not in fit.solution]
    if missing:
        raise UserError(
            f"to plan from a fit of 'joint', it must have `solution.{missing[0]}`, but it has none"
        )
    rows = [fit.solution["names"].index(name) for name in parameter_names(len(PLANNED_AXES))]
    shift = _recentre(centre[0] - fit.solution["centre"][0], centre[1] - fit.solution["centre"][1])
    mean = shift @ np.array(fit.solution["vector"])[rows]
    lines = fit.solution["covariance"]
    covariance = np.array([[float(v) for v in line.split()] for line in lines])[np.ix_(rows, rows)]
    root = np.linalg.cholesky(covariance + 1e-12 * np.eye(len(rows)))
    fit_prior = prior_about(mean[[0, 3]], 1.0)
    scales = scales_of(noise, fit.solution)
    return SurfaceDistribution(centre, mean, shift @ root, fit_prior, scales, seed)


def _recentre(n: float, d: float) -> Array:
    """(P, P) maps the parameters to those about a centre that is (n, d) further."""
    own = parameter_names(len(PLANNED_AXES))
    at = {name: i for i, name in enumerate(own)}
    out = np.eye(len(own))
    for axis in PLANNED_AXES:
        out[at[f"{axis}.c"], [at[f"{axis}.along"], at[f"{axis}.D"]]] = n, d - n
    out[at["loss.A"], at["loss.alpha"]], out[at["loss.B"], at["loss.beta"]] = -n, -d
    for name in own:
        if name.startswith("curvature"):
            out[at[name], [at["width.n"], at["width.d"]]] = n, d
    return out


def first_guess(
    target: Recipe, n_params: float, tokens: float, width: int
) -> tuple[tuple[float, float], tuple[float, float], str]:
    """A guess of the optimum in the middle of the proxies.

    The lr of Step Law (arXiv:2503.04715) is for the standard parametrization at that width. Divided
    by the multiplier that the parametrization gives a hidden matrix, it is the lr at base width. An
    lr that the target sets takes precedence, and the recipe's default where the law was not fitted
    near such a scale or with such an optimizer; both are taken for the middle of the proxies.

    Returns:
        (ln lr at base width, ln batch_tokens), their sds, and a sentence that names the source.
    """
    law = laws.law("steplaw_lr_bs")
    values = laws.evaluate(law, n_params=n_params, tokens=tokens)[0]
    lr, batch = values["lr"], values["batch_tokens"]
    assert lr and batch
    own, p, m = target.optimizer, target.parametrization, width / target.parametrization.base_width
    inputs = {"n_params": n_params, "tokens": tokens}
    far = any(
        inputs[name] * FAR < low or inputs[name] > FAR * high
        for name, (low, high) in law.fitted.items()
        if name in inputs
    )
    if "lr" not in own.model_fields_set and own.family == "adamw" and not far:
        lr /= scale(p.form, "hid", m, m, family=own.rule).lr
        source = "first guess of lr and batch size: Step Law (arXiv:2503.04715)"
        return (math.log(lr), math.log(batch)), (GUESS_SD, GUESS_SD), source
    if target.foreign and "lr" not in own.model_fields_set:
        raise UserError(
            "a plan needs a first guess of your trainer's learning rate at these sizes, but the"
            " target states no `lr`: give one, as in --set lr=0.001"
        )
    origin = (
        "from the target"
        if "lr" in own.model_fields_set
        else "the default of a recipe; set a better one with --set lr=..."
    )
    return (
        (math.log(own.lr), math.log(batch)),
        (OTHER_SD, OTHER_SD if far else GUESS_SD),
        f"first guess: `optimizer.lr` = {own.lr:g} ({origin}), batch size of Step Law"
        " (arXiv:2503.04715)",
    )
