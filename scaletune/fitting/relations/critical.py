"""Relations for the critical batch size.

It follows from the steps to a target loss at several batch sizes, or from gradient norms at two
batch sizes, and changes with model size, token budget and loss.
"""

from __future__ import annotations

from collections.abc import Mapping

from scaletune.errors import UserError
from scaletune.fitting.relations.relation import (
    Array,
    Box,
    Columns,
    Relation,
    RelationColumn,
    Values,
)

N_PARAMS = RelationColumn("n_params", "non-embedding parameters")
BATCH = RelationColumn("batch_tokens", "tokens per optimizer step")
TOKENS = RelationColumn("tokens", "tokens trained on")
LOSS = RelationColumn("loss", "nats/token")
OVERHEAD = 0.2  # accepted increase over linear scaling of the steps (arXiv:2410.21676)


def _steps(x: Columns, p: Values) -> Array:
    return p["steps_min"] * (1 + p["batch_critical"] / x["batch_tokens"])


def _tradeoff(p: Values) -> dict[str, float]:
    return {"tokens_min": p["steps_min"] * p["batch_critical"]}


def overhead_batch(
    batch_critical: float, batch_reference: float, overhead: float = OVERHEAD
) -> float:
    """The batch size at which the steps exceed linear scaling by `overhead` (arXiv:2410.21676).

    It is (1 + x) B_ref + x B_crit, with linear scaling from `batch_reference`.
    """
    return (1 + overhead) * batch_reference + overhead * batch_critical


def noise_scale(
    square_small: float, square_big: float, batch_small: float, batch_big: float
) -> dict[str, float]:
    """Gradient-noise scale from gradient norms at two batch sizes (arXiv:1812.06162, App. A.1).

    Args:
        square_small: Mean squared gradient norm at `batch_small`.
        square_big: Mean squared gradient norm at `batch_big`.
        batch_small: Batch size, in any unit.
        batch_big: Batch size, in the same unit.

    Returns:
        `signal`: |G|**2. `noise`: tr(Sigma). `batch_simple`: tr(Sigma) / |G|**2, in the unit of the
        batch sizes.

    Raises:
        UserError: The batch sizes are equal, or the norms show no signal above the noise.
    """
    if batch_small == batch_big:
        raise UserError(
            f"the gradient-noise scale needs two batch sizes, but both are {batch_small:g}"
        )
    signal = (batch_big * square_big - batch_small * square_small) / (batch_big - batch_small)
    noise = (square_small - square_big) / (1 / batch_small - 1 / batch_big)
    if signal <= 0 or noise < 0:
        raise UserError(
            "gradient norms must fall with the batch size towards a positive limit, but |G|^2 "
            f"would be {signal:.3g} and tr(Sigma) {noise:.3g}: average over more steps"
        )
    return {"signal": signal, "noise": noise, "batch_simple": noise / signal}


def power_relation(x_name: str, output: str, unit: str, source: str, law: str) -> Relation:
    """output = c * x**p."""
    return Relation(
        id=law,
        formula=f"{output} = c * {x_name}**p",
        source=source,
        inputs=(RelationColumn(x_name, "as in the runs"),),
        output=RelationColumn(output, unit),
        parameters={"c": Box(1e-40, 1e40, at_origin=True), "p": Box(-4.0, 4.0, log=False)},
        function=lambda x, p: p["c"] * x[x_name] ** p["p"],
        along=x_name,
        robust=False,
    )


CRITICAL = Relation(
    id="critical_batch",
    formula="steps = steps_min * (1 + batch_critical / batch_tokens)",
    source="arXiv:1812.06162, eq. 2.7",
    inputs=(BATCH,),
    output=RelationColumn("steps_to_target", "optimizer steps until the target loss"),
    parameters={"steps_min": Box(1.0, 1e8), "batch_critical": Box(1e2, 1e10)},
    function=_steps,
    derived=_tradeoff,
    along="batch_tokens",
    groups=("n_params", "target_loss"),
    robust=False,
    across=power_relation(
        "n_params", "batch_critical", "tokens", "arXiv:2410.21676", "critical_batch_n"
    ),
)


def _of_loss(x: Columns, p: Values) -> Array:
    return p["batch_star"] / x["loss"] ** (1 / p["alpha_b"])


OF_LOSS = Relation(
    id="critical_batch_loss",
    formula="batch_critical = batch_star / loss**(1 / alpha_b)",
    source="arXiv:2001.08361, eq. 1.4",
    inputs=(LOSS,),
    output=RelationColumn("batch_critical", "tokens"),
    parameters={"batch_star": Box(1e4, 1e12), "alpha_b": Box(0.05, 2.0)},
    function=_of_loss,
    along="loss",
)
OF_TOKENS = power_relation(
    "tokens",
    "batch_critical",
    "tokens",
    "arXiv:2410.05838: p near 1 for a run's critical batch",
    "critical_batch_tokens",
)


def regime(batch_tokens: float, batch_critical: float) -> tuple[float, str]:
    """Exponent of the optimal lr in the token budget, and its regime (arXiv:2410.05838).

    The exponents -1/2, 0, +1/2 are for batch sizes below, near and above the critical one. The last
    was read in a secondary source and is not confirmed.
    """
    ratio = batch_tokens / batch_critical
    if ratio < 1 / 3:
        return -0.5, "below the critical batch: lr ~ tokens**-1/2"
    return (
        (0.0, "near the critical batch: lr does not depend on tokens")
        if ratio <= 3
        else (0.5, "above the critical batch: lr ~ tokens**1/2, unconfirmed")
    )


RELATIONS: Mapping[str, Relation] = {
    relation.id: relation for relation in (CRITICAL, OF_LOSS, OF_TOKENS)
}
