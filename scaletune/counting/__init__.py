"""What a model costs, from its config: parameters by group, FLOPs, memory, seconds.

Trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scaletune.counting.families import activations, attention_flops, tensors
from scaletune.errors import UserError
from scaletune.recipe import DIGITS, POWER_LAW, Model, Recipe, trial_id
from scaletune.rules import Tensor, TensorPlan, depth, plan, scale
from scaletune.zoo import BlocksConfig, DecoderConfig

BYTES_TEXT_VOCAB = 256


def _depth_ratio(recipe: Recipe) -> float:
    depth = recipe.model.depth
    return depth / (recipe.parametrization.base_depth or depth)


def plan_tensors(recipe: Recipe, vocab_size: int) -> list[TensorPlan]:
    """The plan of each tensor of a recipe's model: see `scaletune.rules.plan`."""
    p, model = recipe.parametrization, recipe.model
    base = model.model_copy(update={"width": p.base_width})
    return plan(
        tensors(model, vocab_size),
        tensors(base, vocab_size),
        p,
        recipe.optimizer,
        m_depth=_depth_ratio(recipe),
    )


def multipliers(recipe: Recipe, vocab_size: int) -> dict[str, float]:
    """Forward multipliers of the embedding, the softmax, each residual branch and the logits.

    The softmax scale is head_dim**-1/2. A tied head uses the multiplier of the readout on the
    tensor of the embedding; a form allows that only if it initialises and trains both alike.
    """
    p, model, family = recipe.parametrization, recipe.model, recipe.optimizer.rule
    m = model.width / p.base_width
    emb = scale(p.form, "emb", 1.0, m, family=family)
    out = scale(p.form, "out", m, 1.0, family=family)
    tied = isinstance(model, DecoderConfig) and model.tied
    if tied and (emb.std, emb.lr) != (out.std, out.lr):
        raise UserError(
            "a tied head needs a form whose embedding and readout share std and lr (mup_t8,"
            f" mup_t9), but got form={p.form!r}"
        )
    softmax = (
        {"attention": p.attention_multiplier * model.head_dim**-0.5}
        if isinstance(model, BlocksConfig)
        else {}
    )
    branch = depth(p.depth_alpha, _depth_ratio(recipe), family)
    return {
        "embedding": p.embedding_multiplier * emb.multiplier,
        **softmax,
        "residual": p.residual_multiplier * branch.multiplier,
        "logits": p.logits_multiplier * out.multiplier,
    }


def params(model: Model, vocab_size: int) -> dict[str, int]:
    """Parameters by group, and their sums.

    `n_params` is all except embedding and head, `n_params_total` the sum of the groups.
    `n_params_active` is the part of `n_params` that one token uses; it is smaller only in a mixture
    of experts.
    """
    groups, active = {"embedding": 0}, 0.0
    for tensor in tensors(model, vocab_size):
        groups[tensor.group] = groups.get(tensor.group, 0) + tensor.size
        active += tensor.size * min(tensor.uses, 1.0)
    groups["head"] = groups.pop("head", 0)
    outside, total = groups["embedding"] + groups["head"], sum(groups.values())
    return groups | {
        "n_params": total - outside,
        "n_params_total": total,
        "n_params_active": round(active) - outside,
    }


def _matmul_flops(tensor: Tensor) -> float:
    """2 FLOPs per weight and row forward, 4 backward (input layers: 2, no input gradient)."""
    if tensor.role in ("vec", "fin") or tensor.looked_up:
        return 0.0
    return (4.0 if tensor.role == "emb" else 6.0) * tensor.size * tensor.uses


def flops(model: Model, vocab_size: int, seq_len: int) -> dict[str, float]:
    """Training FLOPs per token (or example) by part.

    `exact` is the sum of the parts; it does not subtract the half that a causal mask saves. A
    decoder also has `six_n` = 6 * n_params_active (arXiv:2001.08361), a dense one `deepseek_m` =
    72 * depth * width**2 + 12 * depth * width * seq_len (arXiv:2401.02954, eq. 2: a block of
    12 * width**2, no vocabulary).
    """
    parts = {"matrices": 0.0, "attention": attention_flops(model, seq_len), "head": 0.0}
    for tensor in tensors(model, vocab_size):
        parts["head" if tensor.group == "head" else "matrices"] += _matmul_flops(tensor)
    if isinstance(model, DecoderConfig) and model.tied:
        parts["head"] = 6.0 * vocab_size * model.width
    parts["exact"] = sum(parts.values())
    parts |= {f"without_{part}": parts["exact"] - parts[part] for part in ("attention", "head")}
    if isinstance(model, DecoderConfig):
        parts["six_n"] = 6.0 * params(model, vocab_size)["n_params_active"]
    if model.family == "transformer":
        parts["deepseek_m"] = (
            72.0 * model.depth * model.width**2 + 12.0 * model.depth * model.width * seq_len
        )
    return parts


def flops_per_token(model: Model, vocab_size: int, seq_len: int) -> float:
    """Training FLOPs per token (arXiv:2204.02311, App. B).

    6 * (matmul parameters, head included) + 12 * depth * width * seq_len.
    """
    return flops(model, vocab_size, seq_len)["exact"]


@dataclass(frozen=True)
class ModelCounts:
    """What a record says of the size of a model."""

    n_params: int
    """Non-embedding parameters."""
    n_params_total: int
    depth: int
    flops_per_token: float
    """Training FLOPs per token (or example)."""
    flops_from: str = "model"
    """Where the FLOPs come from: "model", or "6 N D" where they could not be counted."""


def zoo_counts(model: Model, vocab_size: int, seq_len: int) -> ModelCounts:
    """The counts of a model of the zoo, from its config."""
    counts = params(model, vocab_size)
    per_token = flops_per_token(model, vocab_size, seq_len)
    return ModelCounts(counts["n_params"], counts["n_params_total"], model.depth, per_token)


STATE_FLOATS_PER_WEIGHT = {
    "sgd": 1,
    "lion": 1,
    "dadapt_adam": 3,
    "prodigy": 4,
    "muon": 1,
    "shampoo": 1,
}
"""Floats that an optimizer stores per weight; 2 for the other families."""
OWN_STATE_ROLES = {
    "muon": ("hid",),
    "shampoo": ("emb", "hid", "out"),
    "adafactor": ("emb", "hid", "out"),
}
"""Roles with the family's own kind of state; the others have AdamW's (Adafactor: one float)."""


def optimizer_floats(tensor: Tensor, family: str) -> int:
    """Floats that an optimizer stores for a tensor.

    Moments; for Adafactor, rows and columns; for Shampoo and SOAP, the statistics of both sides and
    the matrices computed from them.
    """
    own = tensor.role in OWN_STATE_ROLES.get(family, (tensor.role,))
    fan_in, fan_out = tensor.fans
    matrices = tensor.size // (fan_in * fan_out)
    if family == "adafactor":
        return matrices * (fan_in + fan_out) if own else tensor.size
    two_sided = family in ("shampoo", "soap") and tensor.role in ("emb", "hid", "out")
    sides = 2 * matrices * (fan_in**2 + fan_out**2) if two_sided else 0
    return sides + tensor.size * (STATE_FLOATS_PER_WEIGHT.get(family, 2) if own else 2)


def memory_bytes(
    model: Model, vocab_size: int, batch_tokens: int, seq_len: int, family: str = "adamw"
) -> dict[str, int]:
    """Memory of float32 training on one device, in bytes.

    Weights, gradients and optimizer states; and, roughly, activations stored for the backward pass.
    """
    floats = sum(
        2 * tensor.size + optimizer_floats(tensor, family) for tensor in tensors(model, vocab_size)
    )
    return {
        "weights_optimizer": 4 * floats,
        "activations": 4 * batch_tokens * activations(model, vocab_size),
    }


def bytes_moved(model: Model, vocab_size: int, batch_tokens: int, family: str = "adamw") -> int:
    """Memory traffic of a float32 step in bytes, if every tensor is moved once per use.

    At a given bandwidth this bounds the time of a step from below. Weights are read forward and
    backward, gradients written; the optimizer reads gradients, and reads and writes weights and its
    states; activations are written and read.
    """
    floats = sum(
        6 * tensor.size + 2 * optimizer_floats(tensor, family)
        for tensor in tensors(model, vocab_size)
    )
    return 4 * (floats + 2 * batch_tokens * activations(model, vocab_size))


def seconds(
    recipe: Recipe,
    vocab_size: int,
    flops_per_second: float = 6e10,
    step_overhead: float = 2.5e-3,
    counts: ModelCounts | None = None,
) -> float:
    """Estimated seconds of one trial: steps * overhead + FLOPs / rate.

    The defaults suit one core of a laptop. The estimate orders trials and gives the ETA. `counts`:
    of a model that is not in the zoo.
    """
    budget = recipe.budget
    counts = counts or zoo_counts(recipe.model, vocab_size, recipe.data.seq_len)
    tokens = budget.tokens + budget.eval_tokens / 3
    return budget.steps * step_overhead + counts.flops_per_token * tokens / flops_per_second


def count_point(recipe: Recipe, vocab_size: int = BYTES_TEXT_VOCAB) -> dict[str, Any]:
    """The counts of one point of the zoo: see `scaletune.count`."""
    model, budget, seq_len = recipe.model, recipe.budget, recipe.data.seq_len
    family, parts = recipe.optimizer.family, flops(model, vocab_size, seq_len)
    return {
        "family": model.family,
        "width": model.width,
        "depth": model.depth,
        "vocab_size": vocab_size,
        "params": params(model, vocab_size),
        "tokens": budget.tokens,
        "batch_tokens": budget.batch_tokens,
        "steps": budget.steps,
        "flops_per_token": parts["exact"],
        "flops": parts["exact"] * budget.tokens,
        "flops_per_token_by": parts,
        "memory_bytes": memory_bytes(model, vocab_size, budget.batch_tokens, seq_len, family),
        "bytes_per_step": bytes_moved(model, vocab_size, budget.batch_tokens, family),
        "seconds": seconds(recipe, vocab_size),
    }


OUTPUTS = {DIGITS: 10, POWER_LAW: 1, "cifar10": 10, "cifar100": 100, "cifar100-coarse": 20}
"""Classes, or outputs, of the sources and formats that are not text."""


def default_vocab_size(recipe: Recipe) -> int:
    """The vocabulary of the recipe's data, without reading them."""
    data = recipe.data
    known = OUTPUTS.get(data.source) or OUTPUTS.get(data.format)
    return known or data.vocab_size or BYTES_TEXT_VOCAB


def trial_fields(
    recipe: Recipe,
    sweep: str,
    vocab_size: int,
    data_digest: str,
    counts: ModelCounts | None = None,
) -> dict[str, Any]:
    """The fields of a `Trial` that are known before training.

    `counts`: of a model that is not in the zoo.
    """
    model, budget, point = recipe.model, recipe.budget, recipe.point()
    counts = counts or zoo_counts(model, vocab_size, recipe.data.seq_len)
    data = {**point["data"], "digest": data_digest, "vocab_size": vocab_size}
    return {
        "id": trial_id(recipe, data_digest),
        "sweep": sweep,
        "point": {**point, "data": data},
        "n_params": counts.n_params,
        "n_params_total": counts.n_params_total,
        "width": model.width,
        "depth": counts.depth,
        "tokens": budget.tokens,
        "batch_tokens": budget.batch_tokens,
        "seq_len": recipe.data.seq_len,
        "seed": recipe.seed,
        "lr": recipe.optimizer.lr,
        "weight_decay": recipe.optimizer.weight_decay,
        "flops": counts.flops_per_token * budget.tokens,
    }
