"""Parametrization forms: exponents (a, b) of multiplier and init std in width, per tensor role.

A tensor acts as `multiplier * W` with multiplier ~ m**-a and W ~ N(0, std**2), std ~ m**-b, where m
is the ratio to the base model: the abc-parametrizations of arXiv:2011.14522. Forms with the same
a + b in every role are the same algorithm (arXiv:2407.05872).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from scaletune.errors import UserError, nearest

Role = Literal["emb", "hid", "out", "vec", "fin"]
"""Which dimensions grow with width. emb: the fan-out; hid: both; out: the fan-in; vec (gain, bias):
its only dimension; fin (readout bias, temperature): none."""

_DERIVED = "lr exponents are derived here; not compared with the printed tables of arXiv:2407.05872"
_RECALLED = (
    "exponents agree with the algebra of arXiv:2203.03466; not compared with the printed table"
)


@dataclass(frozen=True)
class Form:
    """Exponents (a, b) of the matrix roles."""

    emb: tuple[float, float]
    hid: tuple[float, float]
    out: tuple[float, float]
    per_tensor: bool = True
    """False: one learning rate, weight decay and eps for all tensors."""
    emb_lr: float = 0.0
    """Difference of the embedding's lr exponent from the theory, under Adam and its variants."""
    caveats: tuple[str, ...] = ()

    @property
    def backward(self) -> float:
        """g: the gradient at the hidden layers is ~ m**-g, with g = a + b of the readout."""
        return sum(self.out)

    @property
    def algorithm(self) -> tuple[float | bool, ...]:
        """Equal for two forms that train identically: a + b of each matrix role, the lr rule."""
        return (sum(self.emb), sum(self.hid), sum(self.out), self.per_tensor, self.emb_lr)

    def exponents(self, role: Role) -> tuple[float, float]:
        """(a, b); vectors and finite tensors have neither multiplier nor random init."""
        return (0.0, 0.0) if role in ("vec", "fin") else getattr(self, role)


FORMS: dict[str, Form] = {
    "sp": Form(  # standard practice
        (0, 0),
        (0, 0.5),
        (0, 0.5),
        per_tensor=False,
        caveats=("one learning rate for all tensors: its optimum moves with width",),
    ),
    "sp_per_layer": Form(  # arXiv:2407.05872
        (0, 0), (0, 0.5), (0, 0.5), caveats=(_DERIVED, "stable, but not muP")
    ),
    "ntk": Form(
        (0, 0),
        (0.5, 0),
        (0.5, 0),
        caveats=(_DERIVED, "the classic kernel limit keeps the lr of SGD constant instead"),
    ),
    "mup_t3": Form((0, 0), (0, 0.5), (0, 1), caveats=(_RECALLED,)),  # arXiv:2203.03466, Table 3
    "mup_t8": Form((0, 0), (0, 0.5), (1, 0)),  # Table 8, which the `mup` package implements
    "mup_t9": Form((-0.5, 0.5), (0, 0.5), (0.5, 0.5), caveats=(_RECALLED,)),  # Table 9
    "mean_field": Form((0, 0), (0.5, 0), (1, 0), caveats=(_DERIVED,)),
}
FORMS["mup"] = FORMS["mup_t8"]
FORMS["u_mup"] = FORMS["mean_field"]  # arXiv:2407.17465: its width exponents
FORMS["unit_scaling"] = replace(  # the library of arXiv:2407.17465, version 0.3.5
    FORMS["mean_field"],
    emb_lr=-0.5,
    caveats=(
        "the lr of the embedding is ~ width**-0.5 instead of muP's, as in the unit-scaling library",
        "that library counts from fan-in 1 and depth 1 and does not scale eps: its lr is not a"
        " ratio to a base model",
    ),
)


def form_named(name: str) -> Form:
    """The form of that name; UserError with the nearest."""
    if name not in FORMS:
        raise UserError(f"`form` must be a known form, but got {name!r}{nearest(name, FORMS)}")
    return FORMS[name]
