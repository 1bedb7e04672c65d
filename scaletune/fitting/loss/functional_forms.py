"""Forms of the loss in n_params and tokens, nats/token, as sums of power laws: what each is called, and whose it is.

A form's parameters are (ln c_1 .. ln c_m, exponents), with the coefficients at the centre of the runs, where they are nearly
uncorrelated with their exponents. A `Shape` says which are free; the same form tied or with a parameter fixed is another shape of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaletune.errors import UserError, nearest
from scaletune.fitting.loss.variable_projection import Problem, Term

BOX = (0.02, 2.0)  # of every exponent
OFF = -60.0  # ln of a term that is not there

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Form:
    """L = sum over `terms` of coefficient * product of column ** -exponent; a column may be any positive function of the runs."""

    formula: str
    source: str
    terms: Mapping[str, Mapping[str, str]]  # coefficient -> {exponent: column}

    @property
    def exponents(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for powers in self.terms.values() for name in powers))

    @property
    def names(self) -> tuple[str, ...]:
        """Coefficients, then exponents: the order of every vector."""
        return (*self.terms, *self.exponents)

    def centre(self, columns: Mapping[str, Array]) -> Array:
        """(m, q): coefficients at the centre are ln c - centre @ exponents."""
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
        return tuple(
            Term(
                (i, *(at[name] for name in powers)),
                np.column_stack(
                    [np.ones(len(next(iter(logs.values())))), *(-logs[c] for c in powers.values())]
                ),
            )
            for i, powers in enumerate(self.terms.values())
        )

    def natural(self, parameters: Array, centre: Array) -> Array:
        """Coefficients at one parameter and one token, then exponents (K, m + q); a term that is off is 0."""
        m = len(self.terms)
        logs = parameters[:, :m] + parameters[:, m:] @ centre.T
        return np.column_stack(
            [
                np.where(parameters[:, :m] <= OFF, 0.0, np.exp(np.minimum(logs, 700.0))),
                parameters[:, m:],
            ]
        )


CHINCHILLA = Form(
    "E + A / n_params**alpha + B / tokens**beta",
    "arXiv:2203.15556, eq. 2",
    {"E": {}, "A": {"alpha": "n_params"}, "B": {"beta": "tokens"}},
)
INTERACTION = Form(
    "E + A / n_params**alpha + B / tokens**beta + F / (n_params**alpha * tokens**beta)",
    "the chinchilla form with a product term",
    {
        "E": {},
        "A": {"alpha": "n_params"},
        "B": {"beta": "tokens"},
        "F": {"alpha": "n_params", "beta": "tokens"},
    },
)
BROKEN = Form(
    "E + A / n_params**alpha + B / tokens**beta * (1 + (tokens / d)**(1 / f))**(-c * f)",
    "arXiv:2210.14891, eq. 1 with one break, in the term of tokens",
    {"E": {}, "A": {"alpha": "n_params"}, "B": {"beta": "tokens", "c": "bend"}},
)


@dataclass(frozen=True)
class Shape:
    """Which parameters are free: parameters = base + free @ phi; `columns` are those that phi holds; `said` what is tied, fixed or left out."""

    columns: tuple[int, ...]
    base: Array
    free: Array
    said: tuple[str, ...] = ()


def shape(
    form: Form,
    centre: Array,
    fixed: Mapping[str, float | str] | None = None,
    said: tuple[str, ...] = (),
) -> Shape:
    """All parameters free but the `fixed`: name -> value at one parameter and one token, or the name of the exponent that it equals."""
    names, m = form.names, len(form.terms)
    fixed = dict(fixed or {})
    for name, value in fixed.items():
        _check(form, name, value)
    columns = tuple(i for i, name in enumerate(names) if name not in fixed)
    base, free = np.zeros(len(names)), np.eye(len(names))[:, columns]
    for name, value in fixed.items():
        i = names.index(name)
        if isinstance(value, str):
            free[i, columns.index(names.index(value))] = 1.0
        else:
            base[i] = value if i >= m else (np.log(value) if value > 0 else OFF)
    for i in (
        names.index(name) for name in fixed if name in form.terms
    ):  # a coefficient is fixed at the origin, solved for at the centre
        if base[i] > OFF:
            base[i] -= float(centre[i] @ base[m:])
            free[i] -= centre[i] @ free[m:]
    return Shape(columns, base, free, said)


def _check(form: Form, name: str, value: float | str) -> None:
    if name not in form.names:
        raise UserError(
            f"a fixed parameter must be one of {', '.join(form.names)}, but got {name!r}{nearest(name, form.names)}"
        )
    if isinstance(value, str):
        if name not in form.exponents or value not in form.exponents or name == value:
            raise UserError(
                f"an exponent can be tied to another of {', '.join(form.exponents)}, but got {name} = {value!r}"
            )
    elif not (np.isfinite(value) and value >= 0):
        raise UserError(
            f"a fixed parameter must be a number of 0 or more, but got {name} = {value!r}"
        )


def pose(
    form: Form, shape: Shape, columns: Mapping[str, Array], loss: Array, weight: Array | None = None
) -> Problem:
    """The problem of one fit: every term between a millionth of the lowest loss and ten times the highest, exponents in BOX."""
    ln_loss, m = np.log(loss)[None], len(form.terms)
    low = np.array([ln_loss.min() - 14.0 if i < m else BOX[0] for i in shape.columns])
    high = np.array([ln_loss.max() + 2.3 if i < m else BOX[1] for i in shape.columns])
    rows = np.ones((1, len(loss))) if weight is None else weight[None]
    return Problem(form.build(columns), ln_loss, rows, shape.base, shape.free, low, high)
