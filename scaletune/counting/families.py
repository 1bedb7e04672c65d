"""Lists the tensors of each model family: name, role, shape, group, rows that it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from scaletune.errors import UserError
from scaletune.rules import Role, Tensor
from scaletune.zoo import (
    BlocksConfig,
    DecoderConfig,
    MLPConfig,
    Model,
    MoEConfig,
    ResNetConfig,
    TransformerConfig,
    ViTConfig,
)


def tensors(model: Model, vocab_size: int) -> list[Tensor]:
    """Every tensor of a model. `vocab_size` is also the number of classes or outputs."""
    lists: dict[str, Callable[..., Iterator[Tensor]]] = {
        "transformer": _decoder,
        "moe": _decoder,
        "mlp": _mlp,
        "resnet": _resnet,
        "vit": _vit,
    }
    if model.family not in lists:
        raise UserError(
            "only models of the zoo have tensors that are known without building them"
            f" (`model.family` {', '.join(lists)}), but got {model.family!r}"
        )
    return list(lists[model.family](model, vocab_size))


def _linear(
    name: str,
    role: Role,
    fan_in: int,
    fan_out: int,
    group: str,
    bias: bool,
    in_block: bool = True,
    uses: float = 1.0,
) -> Iterator[Tensor]:
    """A matrix and its bias, if any: a vector, or finite where the fan-out does not grow."""
    own = (fan_in, fan_out) if role == "emb" else None
    yield Tensor(f"{name}.weight", role, (fan_out, fan_in), group, in_block, own, uses)
    if bias:
        yield Tensor(f"{name}.bias", "fin" if role == "out" else "vec", (fan_out,), group, in_block)


def _conv(
    name: str,
    role: Role,
    fan_in: int,
    fan_out: int,
    side: int,
    group: str,
    in_block: bool,
    positions: int,
) -> Iterator[Tensor]:
    shape, fans = (fan_out, fan_in, side, side), (fan_in * side**2, fan_out)
    yield Tensor(f"{name}.weight", role, shape, group, in_block, fans, positions)


def _norm(
    name: str, size: int, bias: bool, role: Role = "vec", in_block: bool = True
) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", role, (size,), "norm", in_block)
    if bias:
        yield Tensor(f"{name}.bias", role, (size,), "norm", in_block)


# --- residual blocks


def _block(name: str, model: BlocksConfig, rows: int) -> Iterator[Tensor]:
    """One block of attention and MLP, whose matrices multiply `rows` rows."""
    width, kv, shift = model.width, model.kv_width, model.norm == "layer" and model.biases
    yield from _norm(f"{name}.input_layernorm", width, shift)
    for proj, fan_in, fan_out in (
        ("q_proj", width, width),
        ("k_proj", width, kv),
        ("v_proj", width, kv),
        ("o_proj", width, width),
    ):
        yield from _linear(
            f"{name}.self_attn.{proj}", "hid", fan_in, fan_out, "attention", model.biases, uses=rows
        )
    for norm in ("q_norm", "k_norm") if model.qk_norm else ():
        # the head size does not grow
        yield from _norm(f"{name}.self_attn.{norm}", model.head_dim, shift, role="fin")
    yield from _norm(f"{name}.post_attention_layernorm", width, shift)
    if isinstance(model, MoEConfig):
        yield from _mixture(f"{name}.mlp", model)
    else:
        yield from _feed_forward(f"{name}.mlp", model, model.ffn_width, rows)


def _feed_forward(name: str, model: BlocksConfig, inner: int, rows: int) -> Iterator[Tensor]:
    for proj in ("gate_proj", "up_proj") if model.mlp == "swiglu" else ("up_proj",):
        yield from _linear(
            f"{name}.{proj}", "hid", model.width, inner, "mlp", model.biases, uses=rows
        )
    yield from _linear(
        f"{name}.down_proj", "hid", inner, model.width, "mlp", model.biases, uses=rows
    )


def _mixture(name: str, model: MoEConfig) -> Iterator[Tensor]:
    """Router, routed experts (arXiv:2101.03961) and shared experts (arXiv:2401.06066)."""
    width, inner, share = model.width, model.ffn_width, model.top_k / model.n_experts
    yield from _linear(f"{name}.gate", model.router, width, model.n_experts, "router", bias=False)
    for proj, fan_in, fan_out in (
        ("gate_proj", width, inner),
        ("up_proj", width, inner),
        ("down_proj", inner, width),
    ):
        shape = (model.n_experts, fan_out, fan_in)
        yield Tensor(
            f"{name}.experts.{proj}.weight", "hid", shape, "experts", True, (fan_in, fan_out), share
        )
    if model.n_shared_experts:
        yield from _feed_forward(f"{name}.shared_experts", model, model.n_shared_experts * inner, 1)


# --- models


def _decoder(model: TransformerConfig | MoEConfig, vocab_size: int) -> Iterator[Tensor]:
    """Names are those of LLaMA and Granite in Hugging Face."""
    yield Tensor("model.embed_tokens.weight", "emb", (vocab_size, model.width), "embedding")
    if model.positions == "learned":
        yield Tensor(
            "model.embed_positions.weight", "emb", (model.max_positions, model.width), "embedding"
        )
    for i in range(model.depth):
        yield from _block(f"model.layers.{i}", model, 1)
    yield from _norm(
        "model.norm", model.width, model.norm == "layer" and model.biases, in_block=False
    )
    if not model.tied:
        yield from _linear(
            "lm_head", "out", model.width, vocab_size, "head", bias=False, in_block=False
        )


def _vit(model: ViTConfig, vocab_size: int) -> Iterator[Tensor]:
    """Patches, class token, positions, blocks, head."""
    patches = "vit.embeddings.patch_embeddings.projection"
    yield from _conv(
        patches, "emb", model.channels, model.width, model.patch, "embedding", False, model.patches
    )
    if model.biases:
        yield Tensor(f"{patches}.bias", "vec", (model.width,), "embedding")
    if model.pool == "class":
        yield Tensor("vit.embeddings.cls_token.weight", "emb", (1, model.width), "embedding")
    yield Tensor(
        "vit.embeddings.position_embeddings.weight", "emb", (model.tokens, model.width), "embedding"
    )
    for i in range(model.depth):
        yield from _block(f"vit.layers.{i}", model, model.tokens)
    yield from _norm(
        "vit.layernorm", model.width, model.norm == "layer" and model.biases, in_block=False
    )
    yield from _linear(
        "classifier", "out", model.width, vocab_size, "head", model.biases, in_block=False
    )


def _mlp(model: MLPConfig, vocab_size: int) -> Iterator[Tensor]:
    yield from _linear(
        "input", "emb", model.inputs, model.width, "embedding", model.biases, in_block=False
    )
    for i in range(model.depth):
        yield from _linear(
            f"layers.{i}", "hid", model.width, model.width, "mlp", model.biases, in_block=False
        )
    yield from _linear(
        "readout", "out", model.width, vocab_size, "head", model.biases, in_block=False
    )


def _resnet(model: ResNetConfig, vocab_size: int) -> Iterator[Tensor]:
    """Stem, stages, classifier. The kernel of a shortcut is outside the residual branches."""
    yield from _normed_conv(
        "embedder", "emb", model.channels, model.width, 3, model.image_size**2, in_block=False
    )
    for stage in range(model.stages):
        size, positions = model.width * 2**stage, (model.image_size // 2**stage) ** 2
        for i in range(model.depth):
            name, fan_in = f"stages.{stage}.layers.{i}", size // 2 if stage and not i else size
            if fan_in != size:
                yield from _normed_conv(
                    f"{name}.shortcut", "hid", fan_in, size, 1, positions, in_block=False
                )
            yield from _normed_conv(f"{name}.layer.0", "hid", fan_in, size, 3, positions)
            yield from _normed_conv(f"{name}.layer.1", "hid", size, size, 3, positions)
    if model.readout == "linear":
        yield from _linear("classifier", "out", size, vocab_size, "head", bias=True, in_block=False)
    else:
        yield from _conv("classifier", "out", size, vocab_size, 1, "head", False, positions)
        yield Tensor("classifier.bias", "fin", (vocab_size,), "head")


def _normed_conv(
    name: str,
    role: Role,
    fan_in: int,
    fan_out: int,
    side: int,
    positions: int,
    in_block: bool = True,
) -> Iterator[Tensor]:
    group = "embedding" if role == "emb" else "conv"
    yield from _conv(f"{name}.convolution", role, fan_in, fan_out, side, group, in_block, positions)
    yield from _norm(f"{name}.normalization", fan_out, bias=True, in_block=in_block)


# --- attention FLOPs and activations


def attention_flops(model: Model, seq_len: int) -> float:
    """FLOPs of softmax attention per token (ViT: per image), forward and backward.

    12 * depth * width * seq_len per token. Every pair is counted, as in arXiv:2204.02311; a causal
    mask needs half.
    """
    if not isinstance(model, BlocksConfig):
        return 0.0
    rows, keys = (1, seq_len) if isinstance(model, DecoderConfig) else (model.tokens, model.tokens)
    return 12.0 * model.depth * model.width * keys * rows


def activations(model: Model, vocab_size: int) -> int:
    """Floats stored for the backward pass per token or example, as in eager torch.

    Without the attention matrix. A compiler stores fewer. Each sum is what the operators of a layer
    save: a norm saves its input, its normalised rows and its output, and so on.
    """
    if isinstance(model, MLPConfig):
        per_layer = (2 if model.activation == "gelu" else 1) * model.width
        return model.inputs + (model.depth + 1) * per_layer + vocab_size
    if isinstance(model, ResNetConfig):
        first, *rest = (
            model.width * 2**stage * (model.image_size // 2**stage) ** 2
            for stage in range(model.stages)
        )
        return (
            model.channels * model.image_size**2
            + 2 * first
            + 4 * model.depth * (first + sum(rest))
            + sum(rest)
            + vocab_size
        )
    assert isinstance(model, BlocksConfig)
    per_row = model.depth * layer_floats(model) + 3 * model.width
    if isinstance(model, DecoderConfig):
        return per_row + vocab_size
    return model.tokens * per_row + model.channels * model.image_size**2 + vocab_size


def layer_floats(model: BlocksConfig) -> int:
    """Floats stored for one layer per row of attention.

    For a GPT: 32 * width (arXiv:2205.05198, eq. 1, without dropout masks and attention matrix),
    4 * width of norms that are not fused, and one float per head.
    """
    return _attention_floats(model) + _mlp_floats(model)


def _attention_floats(model: BlocksConfig) -> int:
    normed = 2 * (model.width + model.kv_width) if model.qk_norm else 0
    return 5 * model.width + 2 * model.kv_width + normed + model.heads


def _mlp_floats(model: BlocksConfig) -> int:
    """MLP after its norm. A routed token: the row, its products and the output of each expert."""
    inner = (4 if model.mlp == "swiglu" else 2) * model.ffn_width
    if isinstance(model, MoEConfig):
        inner = (
            model.top_k * (3 * model.width + inner + 8)
            + model.n_shared_experts * inner
            + 2 * model.n_experts
        )
    return 3 * model.width + inner
