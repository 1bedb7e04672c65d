"""Empirical curves: loss against compute or tokens, and seconds per step."""

from __future__ import annotations

from collections.abc import Mapping

from scaletune.fitting.relations.critical import LOSS
from scaletune.fitting.relations.relation import (
    Array,
    Box,
    Columns,
    Relation,
    RelationColumn,
    Values,
)

FLOPS = RelationColumn("flops", "training FLOPs")


def broken(x: Array, p: Values) -> Array:
    """A power law whose exponent changes from c0 to c0 + c1 at d (arXiv:2210.14891, eq. 1, n = 1).

    E + A x**-c0 (1 + (x / d)**(1 / f))**(-c1 f)
    """
    bend = (1 + (x / p["d"]) ** (1 / p["f"])) ** (-p["c1"] * p["f"])
    return p["E"] + p["A"] * x ** -p["c0"] * bend


def saturating(x: Columns, p: Values) -> Array:
    return p["E"] + p["A"] * x["tokens"] ** -p["alpha"]


def _seconds(x: Columns, p: Values) -> Array:
    return (
        p["overhead"]
        + x["bytes_moved"] / p["bytes_per_second"]
        + x["flops_per_step"] / p["flops_per_second"]
    )


BROKEN = Relation(
    id="broken_flops",
    formula="loss = E + A * flops**-c0 * (1 + (flops / d)**(1 / f))**(-c1 * f)",
    source="arXiv:2210.14891, eq. 1, one break",
    inputs=(FLOPS,),
    output=LOSS,
    parameters={
        "E": Box(1e-3, 6.0),
        "A": Box(1e-2, 1e6),
        "c0": Box(0.005, 1.0),
        "c1": Box(-1.0, 1.0, log=False),
        "d": Box(1e12, 1e26),
        "f": Box(0.05, 2.0),
    },
    function=lambda x, p: broken(x["flops"], p),
    along="flops",
)
LEARNING_CURVE = Relation(
    id="learning_curve",
    formula="loss = E + A * tokens**-alpha, of one run at a constant learning rate",
    source="arXiv:1712.00409",
    inputs=(RelationColumn("tokens", "tokens seen so far"),),
    output=LOSS,
    parameters={"E": Box(0.05, 8.0), "A": Box(1e-2, 1e9), "alpha": Box(0.03, 1.5)},
    function=saturating,
    along="tokens",
    groups=("run_id",),
    curves=True,
)
SECONDS = Relation(
    id="seconds_per_step",
    formula="seconds_per_step = overhead + bytes_moved / bytes_per_second "
    "+ flops_per_step / flops_per_second",
    source="after arXiv:2406.18922, which regresses on memory copies; calibrated on your records",
    inputs=(
        RelationColumn("bytes_moved", "bytes that a step reads and writes"),
        RelationColumn("flops_per_step", "FLOPs of a step"),
    ),
    output=RelationColumn("seconds_per_step", "seconds"),
    parameters={
        "overhead": Box(1e-7, 10.0),
        "bytes_per_second": Box(1e8, 1e14),
        "flops_per_second": Box(1e8, 1e18),
    },
    function=_seconds,
    along="flops_per_step",
)
RELATIONS: Mapping[str, Relation] = {
    relation.id: relation for relation in (BROKEN, LEARNING_CURVE, SECONDS)
}
