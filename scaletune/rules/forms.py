"""Forms: how a tensor's multiplier and init std answer to width, as a pair of exponents (a, b) per role.

The tensor acts as `multiplier * W` with multiplier ~ m**-a and W ~ N(0, std**2), std ~ m**-b, where m is a ratio to the base model:
the abc-parametrizations of arXiv:2011.14522. Forms that agree in a + b per role are one algorithm in other words (arXiv:2407.05872).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from scaletune.errors import UserError, nearest

# what grows: emb the fan-out; hid both; out the fan-in; vec (gain, bias) its only dimension; fin (readout bias, temperature) nothing
Role = Literal["emb", "hid", "out", "vec", "fin"]

_DERIVED = "lr exponents are derived here; the printed tables of arXiv:2407.05872 were not compared"
_RECALLED = "exponents agree with the algebra of arXiv:2203.03466; the printed table was not opened"


@dataclass(frozen=True)
class Form:
    """Exponents (a, b) of the matrix roles; `per_tensor` False: one learning rate, weight decay and eps for all."""

    emb: tuple[float, float]
    hid: tuple[float, float]
    out: tuple[float, float]
    per_tensor: bool = True
    emb_lr: float = 0.0  # what the embedding's lr exponent departs by from the theory's, under Adam and its like
    caveats: tuple[str, ...] = ()

    @property
    def backward(self) -> float:
        """g: the gradient that reaches the hidden stream is ~ m**-g, g = a + b of the readout."""
        return sum(self.out)

    @property
    def acts(self) -> tuple[float | bool, ...]:
        """What makes two forms one algorithm: a + b of each matrix role, and the lr rule."""
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
    "sp_per_layer": Form(
        (0, 0), (0, 0.5), (0, 0.5), caveats=(_DERIVED, "stable, but no muP")
    ),  # arXiv:2407.05872
    "ntk": Form(
        (0, 0),
        (0.5, 0),
        (0.5, 0),
        caveats=(_DERIVED, "the classic kernel limit keeps SGD's lr constant instead"),
    ),
    "mup_t3": Form((0, 0), (0, 0.5), (0, 1), caveats=(_RECALLED,)),  # arXiv:2203.03466, Table 3
    "mup_t8": Form((0, 0), (0, 0.5), (1, 0)),  # Table 8: what the `mup` package implements
    "mup_t9": Form((-0.5, 0.5), (0, 0.5), (0.5, 0.5), caveats=(_RECALLED,)),  # Table 9
    "mean_field": Form((0, 0), (0.5, 0), (1, 0), caveats=(_DERIVED,)),
}
FORMS["mup"] = FORMS["mup_t8"]
FORMS["u_mup"] = FORMS["mean_field"]  # arXiv:2407.17465: its scaling skeleton
FORMS["unit_scaling"] = replace(  # the library of arXiv:2407.17465, 0.3.5: embedding's lr ~ width**-0.5
    FORMS["mean_field"], emb_lr=-0.5,
    caveats=(
        "the embedding's lr departs from muP on purpose, as in the unit-scaling library",
        "that library counts from fan-in 1 and depth 1 and scales no eps: its lr are no ratios to a base model",
    ),
)  # fmt: skip


def form_named(name: str) -> Form:
    """The form of that name; UserError with the nearest."""
    if name not in FORMS:
        raise UserError(f"`form` must be one we know, but got {name!r}{nearest(name, FORMS)}")
    return FORMS[name]
