"""Every parameter of every family of the zoo, from its config alone: name, role, shape, group, and how often it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from scaletune.rules import Role, Tensor
from scaletune.zoo import MLP, Blocks, Decoder, Model, MoE, ResNet, Transformer, ViT


def tensors(model: Model, vocab_size: int) -> list[Tensor]:
    """Every parameter of a zoo model, in groups that sum to the whole; `vocab_size` is the number of classes, or of outputs, too."""
    lists: dict[str, Callable[..., Iterator[Tensor]]] = {
        "transformer": _decoder, "moe": _decoder, "mlp": _mlp, "resnet": _resnet, "vit": _vit,
    }  # fmt: skip
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
    """A matrix and, of a layer that has one, its bias: a vector, or finite where the fan-out does not grow."""
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
    places: int,
) -> Iterator[Tensor]:
    yield Tensor(
        f"{name}.weight",
        role,
        (fan_out, fan_in, side, side),
        group,
        in_block,
        (fan_in * side**2, fan_out),
        places,
    )


def _norm(
    name: str, size: int, bias: bool, role: Role = "vec", in_block: bool = True
) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", role, (size,), "norm", in_block)
    if bias:
        yield Tensor(f"{name}.bias", role, (size,), "norm", in_block)


# --- residual blocks -------------------------------------------------------------------------------------------------


def _block(name: str, model: Blocks, rows: int) -> Iterator[Tensor]:
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
        yield from _norm(
            f"{name}.self_attn.{norm}", model.head_dim, shift, role="fin"
        )  # the head size stays
    yield from _norm(f"{name}.post_attention_layernorm", width, shift)
    if isinstance(model, MoE):
        yield from _mixture(f"{name}.mlp", model)
    else:
        yield from _feed_forward(f"{name}.mlp", model, model.ffn_width, rows)


def _feed_forward(name: str, model: Blocks, inner: int, rows: int) -> Iterator[Tensor]:
    for proj in ("gate_proj", "up_proj") if model.mlp == "swiglu" else ("up_proj",):
        yield from _linear(
            f"{name}.{proj}", "hid", model.width, inner, "mlp", model.biases, uses=rows
        )
    yield from _linear(
        f"{name}.down_proj", "hid", inner, model.width, "mlp", model.biases, uses=rows
    )


def _mixture(name: str, model: MoE) -> Iterator[Tensor]:
    """Router, stacked experts (arXiv:2101.03961) and the experts of every token (arXiv:2401.06066)."""
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


# --- models ----------------------------------------------------------------------------------------------------------


def _decoder(model: Transformer | MoE, vocab_size: int) -> Iterator[Tensor]:
    """Named as Hugging Face's LLaMA and Granite name theirs."""
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


def _vit(model: ViT, vocab_size: int) -> Iterator[Tensor]:
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


def _mlp(model: MLP, vocab_size: int) -> Iterator[Tensor]:
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


def _resnet(model: ResNet, vocab_size: int) -> Iterator[Tensor]:
    """Stem, stages, classifier. A shortcut's kernel is on the stream, not in a branch."""
    yield from _normed_conv(
        "embedder", "emb", model.channels, model.width, 3, model.image_size**2, in_block=False
    )
    for stage in range(model.stages):
        size, places = model.width * 2**stage, (model.image_size // 2**stage) ** 2
        for i in range(model.depth):
            name, fan_in = f"stages.{stage}.layers.{i}", size // 2 if stage and not i else size
            if fan_in != size:
                yield from _normed_conv(
                    f"{name}.shortcut", "hid", fan_in, size, 1, places, in_block=False
                )
            yield from _normed_conv(f"{name}.layer.0", "hid", fan_in, size, 3, places)
            yield from _normed_conv(f"{name}.layer.1", "hid", size, size, 3, places)
    if model.readout == "linear":
        yield from _linear("classifier", "out", size, vocab_size, "head", bias=True, in_block=False)
    else:
        yield from _conv("classifier", "out", size, vocab_size, 1, "head", False, places)
        yield Tensor("classifier.bias", "fin", (vocab_size,), "head")


def _normed_conv(
    name: str, role: Role, fan_in: int, fan_out: int, side: int, places: int, in_block: bool = True
) -> Iterator[Tensor]:
    group = "embedding" if role == "emb" else "conv"
    yield from _conv(f"{name}.convolution", role, fan_in, fan_out, side, group, in_block, places)
    yield from _norm(f"{name}.normalization", fan_out, bias=True, in_block=in_block)


# --- what is not a tensor --------------------------------------------------------------------------------------------


def attention_flops(model: Model, seq_len: int) -> float:
    """Scores and values of softmax attention, forward and backward, a token (of a ViT: an image): 12 * depth * width * tokens each.

    Every pair is counted, as arXiv:2204.02311 does; a causal mask would need half.
    """
    if not isinstance(model, Blocks):
        return 0.0
    rows, seen = (1, seq_len) if isinstance(model, Decoder) else (model.tokens, model.tokens)
    return 12.0 * model.depth * model.width * seen * rows


def activations(model: Model, vocab_size: int) -> int:
    """Floats kept for the backward pass a token or an example, layer by layer as eager torch runs it, attention matrix not kept.

    A compiler keeps fewer. Each sum is what the layer's operators save: a norm its input, its normed rows and what it gives, and so on.
    """
    if isinstance(model, MLP):
        return (
            model.inputs
            + (2 if model.activation == "gelu" else 1) * (model.depth + 1) * model.width
            + vocab_size
        )
    if isinstance(model, ResNet):
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
    assert isinstance(model, Blocks)
    a_row = model.depth * layer_floats(model) + 3 * model.width
    return (
        a_row
        if isinstance(model, Decoder)
        else model.tokens * a_row + model.channels * model.image_size**2
    ) + vocab_size


def layer_floats(model: Blocks) -> int:
    """Floats kept of one layer a row of attention: 32 * width of a GPT's (arXiv:2205.05198, eq. 1, without its dropout masks and attention
    matrix) and 4 * width that norms keep which are not fused, a float a head beside."""
    return _attention_floats(model) + _mlp_floats(model)


def _attention_floats(model: Blocks) -> int:
    normed = 2 * (model.width + model.kv_width) if model.qk_norm else 0
    return 5 * model.width + 2 * model.kv_width + normed + model.heads


def _mlp_floats(model: Blocks) -> int:
    """Behind a norm; of a routed token the row, its products and what comes back, for each chosen expert."""
    inner = (4 if model.mlp == "swiglu" else 2) * model.ffn_width
    if isinstance(model, MoE):
        inner = (
            model.top_k * (3 * model.width + inner + 8)
            + model.n_shared_experts * inner
            + 2 * model.n_experts
        )
    return 3 * model.width + inner
