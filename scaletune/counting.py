"""What a model costs, from its config alone: tensors, parameters by group, FLOPs, memory, seconds. Trains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scaletune.errors import UserError
from scaletune.recipe import Model, Recipe, identity
from scaletune.rules import Planned, Tensor, depth, plan, scale

BYTES_TEXT_VOCAB = 256


def tensors(model: Model, vocab_size: int) -> list[Tensor]:
    """Every parameter of a zoo model, named as Hugging Face's LLaMA and Granite name theirs."""
    return list(_transformer(model, vocab_size))


def _transformer(model: Model, vocab_size: int) -> Iterator[Tensor]:
    width, ffn = model.width, model.ffn_width
    yield Tensor("model.embed_tokens.weight", "emb", (vocab_size, width), "embedding")
    for i in range(model.depth):
        layer = f"model.layers.{i}"
        yield Tensor(f"{layer}.input_layernorm.weight", "vec", (width,), "norm", True)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield Tensor(f"{layer}.self_attn.{name}.weight", "hid", (width, width), "attention", True)
        yield Tensor(f"{layer}.post_attention_layernorm.weight", "vec", (width,), "norm", True)
        for name, shape in (("gate_proj", (ffn, width)), ("up_proj", (ffn, width)), ("down_proj", (width, ffn))):
            yield Tensor(f"{layer}.mlp.{name}.weight", "hid", shape, "mlp", True)
    yield Tensor("model.norm.weight", "vec", (width,), "norm")
    if not model.tied:
        yield Tensor("lm_head.weight", "out", (vocab_size, width), "head")


def planned(recipe: Recipe, vocab_size: int) -> list[Planned]:
    """The plan of a recipe's point: `scaletune.rules.plan` with the base model its parametrization names."""
    p, model = recipe.parametrization, recipe.model
    base = model.model_copy(update={"width": p.base_width, "depth": p.base_depth or model.depth})
    return plan(tensors(model, vocab_size), tensors(base, vocab_size), p, recipe.optimizer, m_depth=model.depth / base.depth)


def multipliers(recipe: Recipe, vocab_size: int) -> dict[str, float]:
    """Forward multipliers: of the embedding's output, the softmax (head_dim**-1/2), each residual branch, the logits.

    A tied head acts with the readout's multiplier on the embedding's tensor, which a form allows only where both would
    be initialised and trained alike.
    """
    p, model = recipe.parametrization, recipe.model
    m = model.width / p.base_width
    family = recipe.optimizer.family
    emb, out = scale(p.form, "emb", 1.0, m, family=family), scale(p.form, "out", m, 1.0, family=family)
    if model.tied and (emb.std, emb.lr) != (out.std, out.lr):
        raise UserError(f"a tied head needs a form whose embedding and readout share std and lr (mup_t8, mup_t9), but got form={p.form!r}")
    return {
        "embedding": p.embedding_multiplier * emb.multiplier,
        "attention": model.head_dim**-0.5,
        "residual": depth(p.depth_alpha, model.depth / (p.base_depth or model.depth), family).multiplier,
        "logits": p.logits_multiplier * out.multiplier,
    }


def params(model: Model, vocab_size: int) -> dict[str, int]:
    """Parameters by group; `n_params` is all but embedding and head, `n_params_total` the sum of the groups."""
    groups = {"embedding": 0, "attention": 0, "mlp": 0, "norm": 0, "head": 0}
    for tensor in tensors(model, vocab_size):
        groups[tensor.group] += tensor.size
    total = sum(groups.values())
    return groups | {"n_params": total - groups["embedding"] - groups["head"], "n_params_total": total}


def flops_per_token(model: Model, vocab_size: int, seq_len: int) -> float:
    """Training FLOPs a token: 6 * (matmul parameters, head included) + 12 * depth * width * seq_len (arXiv:2204.02311, App. B)."""
    matmul = sum(t.size for t in tensors(model, vocab_size) if t.role in ("hid", "out"))
    head_of_tied = vocab_size * model.width if model.tied else 0
    return 6.0 * (matmul + head_of_tied) + 12.0 * model.depth * model.width * seq_len


def memory_bytes(model: Model, vocab_size: int, batch_tokens: int, seq_len: int) -> dict[str, int]:
    """float32 training: weights, gradients and AdamW's two moments; activations kept for the backward pass, roughly."""
    n = params(model, vocab_size)["n_params_total"]
    per_layer = 10 * model.width + 3 * model.ffn_width + model.width // model.head_dim  # floats a token, attention matrix not kept
    activations = 4 * batch_tokens * (model.depth * per_layer + 2 * vocab_size)
    return {"weights_optimizer": 16 * n, "activations": activations}


def seconds(recipe: Recipe, vocab_size: int, flops_per_second: float = 6e10, step_overhead: float = 2.5e-3) -> float:
    """A guess for one trial: steps * overhead + FLOPs / rate; the defaults suit one laptop core. Used to order and to show time left."""
    flops = flops_per_token(recipe.model, vocab_size, recipe.data.seq_len) * (recipe.budget.tokens + recipe.budget.eval_tokens / 3)
    return recipe.budget.steps * step_overhead + flops / flops_per_second


def count(recipe: Recipe, vocab_size: int = BYTES_TEXT_VOCAB) -> dict[str, Any]:
    """All of the above for a recipe's point, as plain values."""
    model, budget = recipe.model, recipe.budget
    per_token = flops_per_token(model, vocab_size, recipe.data.seq_len)
    return {
        "width": model.width, "depth": model.depth, "vocab_size": vocab_size,
        "params": params(model, vocab_size),
        "tokens": budget.tokens, "batch_tokens": budget.batch_tokens, "steps": budget.steps,
        "flops_per_token": per_token, "flops": per_token * budget.tokens,
        "memory_bytes": memory_bytes(model, vocab_size, budget.batch_tokens, recipe.data.seq_len),
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
