"""What a model costs, from its config: parameters by group, FLOPs, memory, seconds.

Trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaletune.counting.families import activations, attention_flops, tensors
from scaletune.errors import UserError
from scaletune.recipe import DIGITS, POWER_LAW, Model, Recipe, points, trial_id
from scaletune.recipe.resolve import resolve_recipe
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
    recipe: Recipe, vocab_size: int, flops_per_second: float = 6e10, step_overhead: float = 2.5e-3
) -> float:
    """Estimated seconds of one trial: steps * overhead + FLOPs / rate.

    The defaults suit one core of a laptop. The estimate orders trials and gives the ETA.
    """
    tokens = recipe.budget.tokens + recipe.budget.eval_tokens / 3
    return (
        recipe.budget.steps * step_overhead
        + flops_per_token(recipe.model, vocab_size, recipe.data.seq_len) * tokens / flops_per_second
    )


def count_point(recipe: Recipe, vocab_size: int = BYTES_TEXT_VOCAB) -> dict[str, Any]:
    """The counts of one point: see `count`."""
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


def count(
    recipe: str | Path | Recipe, vocab_size: int | None = None, *, settings: Sequence[str] = ()
) -> Any:
    """Counts parameters, FLOPs, memory and estimated seconds; trains nothing.

    Args:
        recipe: A recipe file, or a `Recipe`.
        vocab_size: Size of the vocabulary, or number of classes or outputs. Default: that of a
            built-in source, else `data.vocab_size`, else 256 (bytes).
        settings: Overrides of recipe settings, as in `--set`: ["model.depth=4"].

    Returns:
        A dict per point: `params` by group; `flops_per_token` and total `flops`;
        `flops_per_token_by` part; `memory_bytes` and `bytes_per_step` of float32 training;
        `seconds`, a rough estimate for one CPU core; and the settings that they belong to. A list
        of them for a file or for a `Recipe` with axes; one dict for a `Recipe` without axes.

    Raises:
        UserError: The file is missing, or a setting is not valid.

    Example:
        >>> import scaletune as st
        >>> points = st.count("configs/quickstart.toml")
        >>> len(points), points[0]["width"], points[0]["params"]["n_params_total"]
        (54, 32, 43168)
    """
    whole = resolve_recipe(recipe, settings)
    size = default_vocab_size(whole) if vocab_size is None else vocab_size
    if isinstance(recipe, Recipe) and not (whole.axes or whole.cells):
        return count_point(whole, size)
    return [count_point(point, size) for point in points(whole)]


def trial_fields(recipe: Recipe, sweep: str, vocab_size: int, data_digest: str) -> dict[str, Any]:
    """The fields of a `Trial` that are known before training."""
    model, budget, point = recipe.model, recipe.budget, recipe.point()
    counts, seq_len = params(model, vocab_size), recipe.data.seq_len
    data = {**point["data"], "digest": data_digest, "vocab_size": vocab_size}
    return {
        "id": trial_id(recipe, data_digest),
        "sweep": sweep,
        "point": {**point, "data": data},
        "n_params": counts["n_params"],
        "n_params_total": counts["n_params_total"],
        "width": model.width,
        "depth": model.depth,
        "tokens": budget.tokens,
        "batch_tokens": budget.batch_tokens,
        "seq_len": seq_len,
        "seed": recipe.seed,
        "lr": recipe.optimizer.lr,
        "weight_decay": recipe.optimizer.weight_decay,
        "flops": flops_per_token(model, vocab_size, seq_len) * budget.tokens,
    }
