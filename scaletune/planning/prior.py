"""What is believed before the study: draws of the joint surface's parameters, and the scales a fit would weigh by.

Without an earlier fit the parameters are those of fitting/joint/surface.py's priors; where the optimum lies is a guess within a
factor of about two, and a design must be good over all of it. An earlier joint fit narrows where to look, and nothing
else: what the planned runs will tell is counted from the priors, as their own fit starts from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from scaletune import laws
from scaletune.errors import UserError
from scaletune.fitting.joint.surface import (
    MISFIT,
    NOISE,
    SCATTER,
    Runs,
    Scales,
    law_basis,
    names,
    prior,
)
from scaletune.laws.surface import AXES
from scaletune.predicting import FAR
from scaletune.recipe import Recipe
from scaletune.records import Fit
from scaletune.rules import scale

Array = NDArray[np.float64]

GUESS_SD = 0.7  # of ln lr and ln batch guessed without a fit: published laws differ by about a factor of two at one scale
OWN_SD = 1.0  # of one that rests on less
DRAWS, JUDGES = 12, 24
AXES_PLANNED = AXES[:2]


@dataclass(frozen=True)
class Belief:
    """About the middle `centre` of the candidates, (ln n_params, ln tokens)."""

    centre: tuple[float, float]
    guess: Array  # (P,)
    root: Array  # (P, P): the law is guess + root @ a standard normal
    given: Array  # (P, 2): the prior that the study's own fit starts from
    scales: Scales
    said: list[str]
    seed: int = 0

    @cached_property
    def draws(self) -> Array:
        """(DRAWS, P): surfaces a design is made for."""
        return self.guess + _strata(DRAWS, len(self.guess), self.seed) @ self.root.T

    @cached_property
    def judges(self) -> Array:
        """(JUDGES, P): others, by which it is judged; by its own it would look better than it is."""
        return self.guess + _strata(JUDGES, len(self.guess), self.seed) @ self.root.T

    def optimum(self, n_params: float, tokens: float) -> tuple[float, float]:
        """The guessed (ln lr, ln batch_tokens)."""
        n, d = math.log(n_params) - self.centre[0], math.log(tokens) - self.centre[1]
        lr, batch = self.guess[:6].reshape(2, 3) @ law_basis(np.array([n]), np.array([d]))[0]
        return float(lr), float(batch)


def scales_of(noise: float | None, solution: Mapping[str, Any] | None = None) -> Scales:
    """Noise, misfit and scatter of an earlier fit, else the surface's guesses; `noise`, sd of ln loss of one run, goes before both."""
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise UserError(
            f"`noise` must be a number above 0, the sd of ln loss of one run, but got {noise!r}"
        )
    if solution is None:
        return Scales(
            noise or NOISE, MISFIT, np.array([SCATTER[axis] for axis in (*AXES_PLANNED, "loss")])
        )
    own = solution["scatter"]
    return Scales(noise or solution["noise"], solution["misfit"], np.array([*own[:2], own[-1]]))


def from_priors(
    centre: tuple[float, float], at: tuple[float, float], sds: tuple[float, float] = (GUESS_SD, GUESS_SD), said: str = "",
    noise: float | None = None, seed: int = 0,
) -> Belief:  # fmt: skip
    """Draws of the priors, with the optimum at the centre within `sds` of `at`: (ln lr, ln batch_tokens)."""
    one = np.zeros(1)
    given = prior(Runs(one, one, np.array([at]), one, np.zeros(1, int)))
    sd = given[:, 1].copy()
    sd[[0, 3]] = sds
    return Belief(centre, given[:, 0], np.diag(sd), given, scales_of(noise), [said], seed)


def from_joint(
    fit: Fit, centre: tuple[float, float], noise: float | None = None, seed: int = 0
) -> Belief:
    """Draws of the posterior of an earlier fit; UserError unless it is a joint one."""
    if fit.law != "joint":
        raise UserError(f"a plan rests on a fit of law 'joint', but got one of {fit.law!r}")
    missing = [
        key
        for key in ("names", "vector", "covariance", "centre", "scatter", "noise", "misfit")
        if key not in fit.solution
    ]
    if missing:
        raise UserError(
            f"a fit of 'joint' must hold `solution.{missing[0]}` to be planned from, but it has none"
        )
    rows = [fit.solution["names"].index(name) for name in names(len(AXES_PLANNED))]
    moved = _moved(centre[0] - fit.solution["centre"][0], centre[1] - fit.solution["centre"][1])
    guess = moved @ np.array(fit.solution["vector"])[rows]
    covariance = np.array(
        [[float(v) for v in line.split()] for line in fit.solution["covariance"]]
    )[np.ix_(rows, rows)]
    root = np.linalg.cholesky(covariance + 1e-12 * np.eye(len(rows)))
    one = np.zeros(1)
    given = prior(Runs(one, one, guess[None, [0, 3]], one, np.zeros(1, int)))
    said = f"where to look comes from fit {fit.digest}; its own runs are not counted as the study's"
    return Belief(centre, guess, moved @ root, given, scales_of(noise, fit.solution), [said], seed)


def _strata(n: int, n_columns: int, seed: int) -> Array:
    """(n, columns) standard normals, a Latin hypercube's: each column has every n-th of the distribution once."""
    middles = norm.ppf((np.arange(n) + 0.5) / n)
    return (
        np.random.default_rng(seed + n)
        .permuted(np.tile(middles / middles.std(), (n_columns, 1)), axis=1)
        .T
    )


def _moved(n: float, d: float) -> Array:
    """(P, P): the surface's parameters about a centre that lies (n, d) further, from those about the old one."""
    own = names(len(AXES_PLANNED))
    at = {name: i for i, name in enumerate(own)}
    out = np.eye(len(own))
    for axis in AXES_PLANNED:
        out[at[f"{axis}.c"], [at[f"{axis}.along"], at[f"{axis}.D"]]] = n, d - n
    out[at["loss.A"], at["loss.alpha"]], out[at["loss.B"], at["loss.beta"]] = -n, -d
    for name in own:
        if name.startswith("curvature"):
            out[at[name], [at["width.n"], at["width.d"]]] = n, d
    return out


def first_guess(
    target: Recipe, n_params: float, tokens: float, width: int
) -> tuple[tuple[float, float], tuple[float, float], str]:
    """(ln lr at base width, ln batch_tokens) in the middle of the proxies, their sds, and where they come from.

    Step Law's (arXiv:2503.04715) lr is one of the standard parametrization at that width: divided by what the form does to a
    hidden matrix it is at the base width. An lr written in the target goes before it, and the recipe's default where the law was
    never near such scales or such an optimizer; both are taken for the middle of the proxies.
    """
    law = laws.law("steplaw_lr_bs")
    said = laws.consult(law, n_params=n_params, tokens=tokens)[0]
    lr, batch = said["lr"], said["batch_tokens"]
    assert lr and batch
    own, p, m = target.optimizer, target.parametrization, width / target.parametrization.base_width
    asked = {"n_params": n_params, "tokens": tokens}
    far = any(
        asked[name] * FAR < low or asked[name] > FAR * high
        for name, (low, high) in law.fitted.items()
        if name in asked
    )
    if "lr" not in own.model_fields_set and own.family == "adamw" and not far:
        lr /= scale(p.form, "hid", m, m, family=own.rule).lr
        return (
            (math.log(lr), math.log(batch)),
            (GUESS_SD, GUESS_SD),
            "lr and batch are first guessed by Step Law (arXiv:2503.04715)",
        )
    written = f"`optimizer.lr` = {own.lr:g}, " + (
        "as the target has it"
        if "lr" in own.model_fields_set
        else "a recipe's default: --set lr=... knows better"
    )
    return (
        (math.log(own.lr), math.log(batch)),
        (OWN_SD, OWN_SD if far else GUESS_SD),
        f"lr is first guessed by {written}; batch by Step Law",
    )
