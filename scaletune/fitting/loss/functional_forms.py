"""Functional forms of the loss in n_params and tokens (nats/token), as sums of power laws.

The parameters of a form are (ln c_1 .. ln c_m, exponents). The coefficients are those at the
centre of the runs, where they are nearly uncorrelated with their exponents. A `Shape` says which
parameters are free; a form with tied or fixed parameters is another shape of the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaletune.errors import UserError, nearest
from scaletune.fitting.loss.variable_projection import Problem, Term

EXPONENT_BOUNDS = (0.02, 2.0)
LN_ABSENT = -60.0  # ln coefficient of a term that is absent

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FunctionalForm:
    """L = sum over `terms` of coefficient * product of column ** -exponent.

    A column may be any positive function of the runs.
    """

    formula: str
    source: str

    terms: Mapping[str, Mapping[str, str]]
    """Coefficient -> {exponent: column}."""

    @property
    def exponents(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for powers in self.terms.values() for name in powers))

    @property
    def names(self) -> tuple[str, ...]:
        """Coefficients, then exponents: the order of every parameter vector."""
        return (*self.terms, *self.exponents)

    def centre(self, columns: Mapping[str, Array]) -> Array:
        """(m, q): the ln coefficients at the centre are ln c - centre @ exponents."""
        means = {column: float(np.log(values).mean()) for column, values in columns.items()}
        return np.array(
            [
                [means[powers[name]] if name in powers else 0.0 for name in self.exponents]
                for powers in self.terms.values()
            ]
        )

    def build(self, columns: Mapping[str, Array]) -> tuple[Term, ...]:
        """The terms as functions of (ln c at the centre, exponents)."""
        at = {name: len(self.terms) + i for i, name in enumerate(self.exponents)}
        logs = {
            column: np.log(values) - np.log(values).mean() for column, values in columns.items()
        }
        rows = len(next(iter(logs.values())))
        return tuple(
            Term(
                (i, *(at[name] for name in powers)),
                np.column_stack([np.ones(rows), *(-logs[c] for c in powers.values())]),
            )
            for i, powers in enumerate(self.terms.values())
        )

    def natural(self, parameters: Array, centre: Array) -> Array:
        """(K, m + q) coefficients at one parameter and one token, then exponents.

        The coefficient of an absent term is 0.
        """
        m = len(self.terms)
        logs = parameters[:, :m] + parameters[:, m:] @ centre.T
        absent = parameters[:, :m] <= LN_ABSENT
        coefficients = np.where(absent, 0.0, np.exp(np.minimum(logs, 700.0)))
        return np.column_stack([coefficients, parameters[:, m:]])


CHINCHILLA = FunctionalForm(
    "E + A / n_params**alpha + B / tokens**beta",
    "arXiv:2203.15556, eq. 2",
    {"E": {}, "A": {"alpha": "n_params"}, "B": {"beta": "tokens"}},
)
INTERACTION = FunctionalForm(
    "E + A / n_params**alpha + B / tokens**beta + F / (n_params**alpha * tokens**beta)",
    "the chinchilla form with a product term",
    {
        "E": {},
        "A": {"alpha": "n_params"},
        "B": {"beta": "tokens"},
        "F": {"alpha": "n_params", "beta": "tokens"},
    },
)
BROKEN = FunctionalForm(
    "E + A / n_params**alpha + B / tokens**beta * (1 + (tokens / d)**(1 / f))**(-c * f)",
    "arXiv:2210.14891, eq. 1 with one break, in the term of tokens",
    {"E": {}, "A": {"alpha": "n_params"}, "B": {"beta": "tokens", "c": "bend"}},
)


@dataclass(frozen=True)
class Shape:
    """Which parameters are free: parameters = base + free @ phi."""

    columns: tuple[int, ...]
    """(P): the parameters that phi holds."""

    base: Array
    """(m + q)"""

    free: Array
    """(m + q, P)"""


def make_shape(
    form: FunctionalForm,
    centre: Array,
    fixed: Mapping[str, float | str] | None = None,
) -> Shape:
    """All parameters are free except the `fixed` ones.

    `fixed` maps a name to a value at one parameter and one token, or to the exponent it equals.
    """
    names, m = form.names, len(form.terms)
    fixed = dict(fixed or {})
    for name, value in fixed.items():
        _check(form, name, value)
    for name, value in fixed.items():
        if isinstance(value, str) and value in fixed:
            if isinstance(fixed[value], str):
                raise UserError(
                    "an exponent can be tied to one that is free or has a value, "
                    f"but got {name} = {value!r} and {value} = {fixed[value]!r}"
                )
            fixed[name] = fixed[value]
    columns = tuple(i for i, name in enumerate(names) if name not in fixed)
    base, free = np.zeros(len(names)), np.eye(len(names))[:, columns]
    for name, value in fixed.items():
        i = names.index(name)
        if isinstance(value, str):
            free[i, columns.index(names.index(value))] = 1.0
        else:
            base[i] = value if i >= m else (np.log(value) if value > 0 else LN_ABSENT)
    # A coefficient is fixed at one parameter and one token, but solved for at the centre.
    for i in (names.index(name) for name in fixed if name in form.terms):
        if base[i] > LN_ABSENT:
            base[i] -= float(centre[i] @ base[m:])
            free[i] -= centre[i] @ free[m:]
    return Shape(columns, base, free)


def _check(form: FunctionalForm, name: str, value: float | str) -> None:
    if name not in form.names:
        raise UserError(
            f"a fixed parameter must be one of {', '.join(form.names)}, "
            f"but got {name!r}{nearest(name, form.names)}"
        )
    if isinstance(value, str):
        if name not in form.exponents or value not in form.exponents or name == value:
            raise UserError(
                f"an exponent can be tied to another of {', '.join(form.exponents)}, "
                f"but got {name} = {value!r}"
            )
    elif not (np.isfinite(value) and value >= 0):
        raise UserError(
            f"a fixed parameter must be a number of 0 or more, but got {name} = {value!r}"
        )


def build_problem(
    form: FunctionalForm,
    shape: Shape,
    columns: Mapping[str, Array],
    loss: Array,
    weight: Array | None = None,
) -> Problem:
    """The problem of one fit.

    Bounds: each term is between a millionth of the lowest loss and ten times the highest, and
    exponents are in EXPONENT_BOUNDS.
    """
    ln_loss, m = np.log(loss)[None], len(form.terms)
    low = np.array([ln_loss.min() - 14.0 if i < m else EXPONENT_BOUNDS[0] for i in shape.columns])
    high = np.array([ln_loss.max() + 2.3 if i < m else EXPONENT_BOUNDS[1] for i in shape.columns])
    rows = np.ones((1, len(loss))) if weight is None else weight[None]
    return Problem(form.build(columns), ln_loss, rows, shape.base, shape.free, low, high)
