"""Folds forward multipliers into the weights they act on, for stacks whose model has none.

A factor on a linear map's output equals the same factor on its weights (arXiv:2011.14522,
abc-symmetry): the embedding multiplier goes into the embedding, the logits multiplier into the
head, a residual branch's into its last matrix, the softmax scale into the queries. The shift is as
exact as that of `target.one_std`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from scaletune.errors import UserError
from scaletune.rules import TensorPlan, shift
from scaletune.transferring.target import Transfer, is_router
from scaletune.zoo import DecoderConfig, Model

EXACT = (
    "folded into the weights (exact under AdamW, except that the global gradient norm, and with it"
    " gradient clipping, changes)"
)


def _factors(multipliers: Mapping[str, float], head_dim: int) -> dict[str, float]:
    """Part of a tensor's name -> the forward multiplier that acts on its output."""
    return {
        "embed_": multipliers["embedding"],
        "lm_head.": multipliers["logits"],
        "q_proj.": multipliers["attention"] * head_dim**0.5,
        "o_proj.": multipliers["residual"],
        "down_proj.": multipliers["residual"],
    }


def fold(
    rows: Sequence[TensorPlan], multipliers: Mapping[str, float], model: Model
) -> tuple[list[TensorPlan], float]:
    """Folds all multipliers into the weights.

    Returns:
        The rows without multipliers, and the factor that remains on the logits: 1, or for a tied
        head the ratio of the logits and embedding multipliers.
    """
    if not isinstance(model, DecoderConfig) or model.qk_norm:
        decoder = isinstance(model, DecoderConfig)
        what = "`model.qk_norm` True" if decoder else f"`model.family` {model.family!r}"
        raise UserError(
            "multipliers can only be folded into the weights of a decoder without query and key"
            f" norms, but got {what}"
        )
    factors = _factors(multipliers, model.head_dim)
    folded = [_fold_row(row, factors) for row in rows]
    return folded, multipliers["logits"] / multipliers["embedding"] if model.tied else 1.0


def _fold_row(row: TensorPlan, factors: Mapping[str, float]) -> TensorPlan:
    factor = next((f for part, f in factors.items() if part in row.name), 1.0)
    # `multipliers` already contains those of the embedding and the head
    factor *= row.multiplier if row.role == "hid" or is_router(row) else 1.0
    # rounding must not separate tensors that a stack keeps in one
    factor = 1.0 if math.isclose(factor, 1, rel_tol=1e-12) else factor
    return shift(replace(row, multiplier=factor), 1 / factor, row.family)


def fold_all(transfer: Transfer, stack: str) -> list[TensorPlan]:
    """The rows for a stack without multipliers; a tied head that needs one is an error."""
    folded = fold(transfer.plan, transfer.multipliers, transfer.target.model)
    return require_no_logits_multiplier(*folded, stack)


def require_no_logits_multiplier(
    rows: list[TensorPlan], logits_multiplier: float, stack: str
) -> list[TensorPlan]:
    """Returns the rows if no logits multiplier remains."""
    if abs(logits_multiplier - 1) > 1e-9:
        raise UserError(
            f"format {stack!r} has no logits multiplier, but the tied head needs one of"
            f" {logits_multiplier:.4g}: set model.tied = false, or emit 'granite', which has one"
        )
    return rows


def default_multipliers(head_dim: int) -> dict[str, float]:
    """The forward multipliers of an ordinary model."""
    return {"embedding": 1.0, "attention": head_dim**-0.5, "residual": 1.0, "logits": 1.0}


def fold_except(
    transfer: Transfer, native: Collection[str]
) -> tuple[list[TensorPlan], dict[str, float]]:
    """Folds all multipliers but the `native` ones, for which the stack's config has keys.

    If the embedding multiplier is folded, a tied head needs a native logits multiplier; see `fold`.

    Returns:
        The rows, and the forward multipliers for the config.
    """
    model = transfer.target.model
    default = default_multipliers(getattr(model, "head_dim", 1))
    others = transfer.multipliers | {name: default[name] for name in native}
    rows, on_logits = fold(transfer.plan, others, model)
    own = {name: transfer.multipliers[name] for name in native}
    kept = default | own
    return rows, kept | {"logits": kept["logits"] * on_logits}
