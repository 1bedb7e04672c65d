"""The plan without forward multipliers: each is written into the tensor that it acts on, by the same exact shift as `one_std`.

What multiplies a linear map's output multiplies its weights (arXiv:2011.14522, abc-symmetry): the embedding's into the embedding, the
logits' into the head, a residual branch's into its last matrix, the softmax's into the queries. For stacks whose model has none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from scaletune.errors import UserError
from scaletune.rules import Planned, shift
from scaletune.transferring import Transfer, routes
from scaletune.zoo import Decoder, Model

EXACT = "written into the weights (exact under AdamW, but for gradient clipping, whose global norm is not that of the plan's form)"


def _factors(multipliers: Mapping[str, float], head_dim: int) -> dict[str, float]:
    """The part of a tensor's name -> the forward multiplier that acts on its output."""
    return {
        "embed_": multipliers["embedding"], "lm_head.": multipliers["logits"], "q_proj.": multipliers["attention"] * head_dim**0.5,
        "o_proj.": multipliers["residual"], "down_proj.": multipliers["residual"],
    }  # fmt: skip


def folded(
    rows: Sequence[Planned], multipliers: Mapping[str, float], model: Model
) -> tuple[list[Planned], float]:
    """(rows that all act as they are, what still multiplies the logits): 1, but of a tied head the ratio of its two multipliers."""
    if not isinstance(model, Decoder) or model.qk_norm:
        what = (
            f"`model.family` {model.family!r}"
            if not isinstance(model, Decoder)
            else "`model.qk_norm` True"
        )
        raise UserError(
            f"multipliers can be written into the weights of a decoder without norms of queries and keys, but got {what}"
        )
    found = []
    for row in rows:
        own = next(
            (f for part, f in _factors(multipliers, model.head_dim).items() if part in row.name),
            1.0,
        )
        own *= (
            row.multiplier if row.role == "hid" or routes(row) else 1.0
        )  # of emb and out it is in `multipliers` already
        own = (
            1.0 if math.isclose(own, 1, rel_tol=1e-12) else own
        )  # roundings would tell tensors apart that a stack keeps in one
        found.append(shift(replace(row, multiplier=own), 1 / own, row.family))
    return found, multipliers["logits"] / multipliers["embedding"] if model.tied else 1.0


def without_multipliers(transfer: Transfer, stack: str) -> list[Planned]:
    """The rows for a stack that has no multiplier at all; UserError where a tied head would need one."""
    return without_logits(
        *folded(transfer.plan, transfer.multipliers, transfer.target.model), stack
    )


def without_logits(rows: list[Planned], left: float, stack: str) -> list[Planned]:
    """The rows, where nothing is left to multiply the logits; UserError otherwise."""
    if abs(left - 1) > 1e-9:
        raise UserError(
            f"format {stack!r} has no logits multiplier, and a tied head would need one of {left:.4g}:"
            " set model.tied = false, or emit 'granite', which has one"
        )
    return rows


def neutral(head_dim: int) -> dict[str, float]:
    """The forward multipliers of a stack that has none."""
    return {"embedding": 1.0, "attention": head_dim**-0.5, "residual": 1.0, "logits": 1.0}


def partly_folded(
    transfer: Transfer, native: Collection[str]
) -> tuple[list[Planned], dict[str, float]]:
    """(rows, forward multipliers) for a stack whose config has the `native` ones: those stay, the others are written into the weights.

    A tied head needs native logits where the embedding is written into the weights, as `folded` says.
    """
    model = transfer.target.model
    none = neutral(getattr(model, "head_dim", 1))
    rows, left = folded(
        transfer.plan, transfer.multipliers | {name: none[name] for name in native}, model
    )
    kept = {name: transfer.multipliers[name] if name in native else none[name] for name in none}
    return rows, kept | {"logits": kept["logits"] * left}
