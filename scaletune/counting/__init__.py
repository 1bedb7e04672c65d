"""What a model costs, from its config alone: tensors, parameters by group, FLOPs, memory, seconds. Trains nothing."""

from __future__ import annotations

from typing import Any

from scaletune.counting.families import activations, attention_flops, tensors
from scaletune.errors import UserError
from scaletune.recipe import Model, Recipe, identity
from scaletune.rules import Planned, Tensor, depth, plan, scale
from scaletune.zoo import Blocks, Decoder

BYTES_TEXT_VOCAB = 256


def planned(recipe: Recipe, vocab_size: int) -> list[Planned]:
    """The plan of a recipe's point: `scaletune.rules.plan` with the model of its base width, and the ratio to its base depth."""
    p, model = recipe.parametrization, recipe.model
    base = model.model_copy(update={"width": p.base_width})
    m_depth = model.depth / (p.base_depth or model.depth)
    return plan(
        tensors(model, vocab_size), tensors(base, vocab_size), p, recipe.optimizer, m_depth=m_depth
    )


def multipliers(recipe: Recipe, vocab_size: int) -> dict[str, float]:
    """Forward multipliers: of the embedding's output, the softmax (head_dim**-1/2), each residual branch, the logits.

    A tied head acts with the readout's multiplier on the embedding's tensor, which a form allows only where both would
    be initialised and trained alike.
    """
    p, model = recipe.parametrization, recipe.model
    m = model.width / p.base_width
    family = recipe.optimizer.rule
    emb, out = (
        scale(p.form, "emb", 1.0, m, family=family),
        scale(p.form, "out", m, 1.0, family=family),
    )
    if isinstance(model, Decoder) and model.tied and (emb.std, emb.lr) != (out.std, out.lr):
        raise UserError(
            f"a tied head needs a form whose embedding and readout share std and lr (mup_t8, mup_t9), but got form={p.form!r}"
        )
    softmax = (
        {"attention": p.attention_multiplier * model.head_dim**-0.5}
        if isinstance(model, Blocks)
        else {}
    )
    return {
        "embedding": p.embedding_multiplier * emb.multiplier,
        **softmax,
        "residual": p.residual_multiplier
        * depth(p.depth_alpha, model.depth / (p.base_depth or model.depth), family).multiplier,
        "logits": p.logits_multiplier * out.multiplier,
    }


def params(model: Model, vocab_size: int) -> dict[str, int]:
    """Parameters by group; `n_params` is all but embedding and head, `n_params_total` the sum of the groups.

    `n_params_active`: of `n_params`, those that a token meets; fewer in a mixture of experts alone.
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
    """Forward 2 a weight and row, backward twice that; what reads the data has no gradient to send back."""
    if tensor.role in ("vec", "fin") or tensor.looked_up:
        return 0.0
    return (4.0 if tensor.role == "emb" else 6.0) * tensor.size * tensor.uses


def flops(model: Model, vocab_size: int, seq_len: int) -> dict[str, float]:
    """Training FLOPs a token, or an example of a vision or feature model, by part; `exact` is their sum, without the mask's half.

    Of a decoder also the field's shorthands: `six_n` = 6 * n_params_active (arXiv:2001.08361), and of a dense one `deepseek_m` =
    72 * depth * width**2 + 12 * depth * width * seq_len (arXiv:2401.02954, eq. 2: a block of 12 * width**2, no vocabulary).
    """
    found = {"matrices": 0.0, "attention": attention_flops(model, seq_len), "head": 0.0}
    for tensor in tensors(model, vocab_size):
        found["head" if tensor.group == "head" else "matrices"] += _matmul_flops(tensor)
    if isinstance(model, Decoder) and model.tied:
        found["head"] = 6.0 * vocab_size * model.width
    found["exact"] = sum(found.values())
    found |= {f"without_{part}": found["exact"] - found[part] for part in ("attention", "head")}
    if isinstance(model, Decoder):
        found["six_n"] = 6.0 * params(model, vocab_size)["n_params_active"]
    if model.family == "transformer":
        found["deepseek_m"] = (
            72.0 * model.depth * model.width**2 + 12.0 * model.depth * model.width * seq_len
        )
    return found


def flops_per_token(model: Model, vocab_size: int, seq_len: int) -> float:
    """Training FLOPs a token: 6 * (matmul parameters, head included) + 12 * depth * width * seq_len (arXiv:2204.02311, App. B)."""
    return flops(model, vocab_size, seq_len)["exact"]


FLOATS_A_WEIGHT = {
    "sgd": 1,
    "lion": 1,
    "dadapt_adam": 3,
    "prodigy": 4,
    "muon": 1,
    "shampoo": 1,
}  # that an optimizer keeps; 2 unless said
REST_TO_ADAMW = {
    "muon": ("hid",),
    "shampoo": ("emb", "hid", "out"),
    "adafactor": ("emb", "hid", "out"),
}  # roles of its own kind of state


def kept_floats(tensor: Tensor, family: str) -> int:
    """Floats an optimizer keeps of a tensor: moments, Adafactor's rows and columns, both sides' statistics and what is made of them."""
    own = tensor.role in REST_TO_ADAMW.get(family, (tensor.role,))
    fan_in, fan_out = tensor.fans
    matrices = tensor.size // (fan_in * fan_out)
    if family == "adafactor":
        return matrices * (fan_in + fan_out) if own else tensor.size
    sides = (
        2 * matrices * (fan_in**2 + fan_out**2)
        if family in ("shampoo", "soap") and tensor.role in ("emb", "hid", "out")
        else 0
    )
    return sides + tensor.size * (FLOATS_A_WEIGHT.get(family, 2) if own else 2)


def memory_bytes(
    model: Model, vocab_size: int, batch_tokens: int, seq_len: int, family: str = "adamw"
) -> dict[str, int]:
    """float32 training: weights, gradients and what the optimizer keeps; activations kept for the backward pass, roughly."""
    kept = sum(
        2 * tensor.size + kept_floats(tensor, family) for tensor in tensors(model, vocab_size)
    )
    return {
        "weights_optimizer": 4 * kept,
        "activations": 4 * batch_tokens * activations(model, vocab_size),
    }


def bytes_moved(model: Model, vocab_size: int, batch_tokens: int, family: str = "adamw") -> int:
    """Memory traffic of a float32 step if each tensor passed once a use: a floor for its time at a given bandwidth.

    Weights read forward and backward, gradients written; the optimizer reads gradients, reads and writes weights and what it keeps;
    activations written and read.
    """
    each = sum(
        6 * tensor.size + 2 * kept_floats(tensor, family) for tensor in tensors(model, vocab_size)
    )
    return 4 * (each + 2 * batch_tokens * activations(model, vocab_size))


def seconds(
    recipe: Recipe, vocab_size: int, flops_per_second: float = 6e10, step_overhead: float = 2.5e-3
) -> float:
    """A guess for one trial: steps * overhead + FLOPs / rate; the defaults suit one laptop core. Used to order and to show time left."""
    seen = recipe.budget.tokens + recipe.budget.eval_tokens / 3
    return (
        recipe.budget.steps * step_overhead
        + flops_per_token(recipe.model, vocab_size, recipe.data.seq_len) * seen / flops_per_second
    )


def count(recipe: Recipe, vocab_size: int = BYTES_TEXT_VOCAB) -> dict[str, Any]:
    """All of the above for a recipe's point, as plain values."""
    model, budget = recipe.model, recipe.budget
    family, parts = recipe.optimizer.family, flops(model, vocab_size, recipe.data.seq_len)
    return {
        "family": model.family, "width": model.width, "depth": model.depth, "vocab_size": vocab_size,
        "params": params(model, vocab_size),
        "tokens": budget.tokens, "batch_tokens": budget.batch_tokens, "steps": budget.steps,
        "flops_per_token": parts["exact"], "flops": parts["exact"] * budget.tokens, "flops_per_token_by": parts,
        "memory_bytes": memory_bytes(model, vocab_size, budget.batch_tokens, recipe.data.seq_len, family),
        "bytes_per_step": bytes_moved(model, vocab_size, budget.batch_tokens, family),
        "seconds": seconds(recipe, vocab_size),
    }  # fmt: skip


def trial_fields(recipe: Recipe, sweep: str, vocab_size: int, data_digest: str) -> dict[str, Any]:
    """The fields of a `Trial` that its recipe point settles before anything is trained."""
    model, budget, point = recipe.model, recipe.budget, recipe.point()
    n = params(model, vocab_size)
    return {
        "id": identity(recipe, data_digest), "sweep": sweep,
        "point": {**point, "data": {**point["data"], "digest": data_digest, "vocab_size": vocab_size}},
        "n_params": n["n_params"], "n_params_total": n["n_params_total"], "width": model.width, "depth": model.depth,
        "tokens": budget.tokens, "batch_tokens": budget.batch_tokens, "seq_len": recipe.data.seq_len, "seed": recipe.seed,
        "lr": recipe.optimizer.lr, "weight_decay": recipe.optimizer.weight_decay,
        "flops": flops_per_token(model, vocab_size, recipe.data.seq_len) * budget.tokens,
    }  # fmt: skip
