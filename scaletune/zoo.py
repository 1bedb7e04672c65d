"""The `model` table of a recipe: one section per model family.

Every family has a `width`, which the parametrization scales, and a `depth`. Head size and the
numbers of key-value heads, experts and norm groups do not grow with width. A vision or feature
model reads one example where a text model reads one token.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Tag, model_validator

from scaletune.sections import Count, NotNegative, Positive, Section, Whole


def _is_whole(size: float) -> bool:
    """Whether a product is a whole number up to rounding, as 2.7 * 5120 is."""
    return abs(size - round(size)) <= 1e-12 * size


class ModelConfig(Section):
    """Keys that all model families have."""

    family: str
    """Model family: transformer, moe, mlp, resnet, vit or own. A table without it is a transformer.
    """
    width: Count
    """Width of the hidden layers (d_model). For resnet: channels of the first stage."""
    depth: Count = 2
    """Number of blocks or hidden layers. For resnet: blocks per stage."""

    def check(self, seq_len: int, base_width: int, depth_alpha: float) -> None:
        """ValueError unless the rest of the recipe suits the family: here, one of examples."""
        if seq_len != 1:
            raise ValueError(
                f"`data.seq_len` must be 1 for `model.family` {self.family!r}, which counts an"
                f" example as one token, but got {seq_len}"
            )


class BlocksConfig(ModelConfig):
    """Models of pre-norm residual blocks, each with attention and an MLP."""

    head_dim: Count = 32
    """Size of one attention head. It does not grow with width, and width must be a multiple."""
    ffn_ratio: Positive = 3.0
    """Inner width of the MLP over `width`."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Kind of MLP: SwiGLU (three matrices) or GELU (two)."""
    kv_heads: Count | None = None
    """Key-value heads of grouped-query attention (arXiv:2305.13245). Default: one per query head.
    """
    qk_norm: bool = False
    """Whether queries and keys of each head are normalised (arXiv:2302.05442). The heads share the
    gain."""
    biases: bool = False
    """Whether linear layers (except the head of a decoder) and LayerNorms have biases."""
    norm_eps: Positive = 1e-5
    """The eps of the norms."""

    @model_validator(mode="after")
    def _shapes(self) -> BlocksConfig:
        if self.width % self.head_dim:
            raise ValueError(
                "`width % head_dim == 0` must hold, but got"
                f" width={self.width}, head_dim={self.head_dim}"
            )
        if not _is_whole(self.ffn_ratio * self.width):
            raise ValueError(
                "`ffn_ratio * width` must be whole, but got"
                f" ffn_ratio={self.ffn_ratio}, width={self.width}"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(
                "`heads % kv_heads == 0` must hold, but got"
                f" heads={self.heads} (width / head_dim), kv_heads={self.kv_heads}"
            )
        return self

    def _check_base(self, base_width: int) -> None:
        if base_width % self.head_dim:
            raise ValueError(
                "`base_width % head_dim == 0` must hold, but got"
                f" base_width={base_width}, head_dim={self.head_dim}"
            )
        if not _is_whole(self.ffn_ratio * base_width):
            raise ValueError(
                "`ffn_ratio * base_width` must be whole, but got"
                f" ffn_ratio={self.ffn_ratio}, base_width={base_width}"
            )

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def kv_width(self) -> int:
        return (self.kv_heads or self.heads) * self.head_dim

    @property
    def ffn_width(self) -> int:
        return round(self.ffn_ratio * self.width)


class DecoderConfig(BlocksConfig):
    """Causal language models."""

    positions: Literal["rotary", "learned"] = "rotary"
    """Position encoding. Rotary positions need an even `head_dim`."""
    max_positions: Count = 1024
    """Number of learned positions, at least `data.seq_len`. Rotary positions do not read it."""
    tied: bool = False
    """Whether the head and the embedding share one tensor."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""

    @model_validator(mode="after")
    def _even_heads(self) -> DecoderConfig:
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                "`head_dim % 2 == 0` must hold (rotary positions rotate pairs), but got"
                f" head_dim={self.head_dim}"
            )
        return self

    def check(self, seq_len: int, base_width: int, depth_alpha: float) -> None:
        """ValueError unless every token has a position and the base model exists."""
        self._check_base(base_width)
        if self.positions == "learned" and seq_len > self.max_positions:
            raise ValueError(
                "`seq_len <= max_positions` must hold for learned positions, but got"
                f" seq_len={seq_len}, max_positions={self.max_positions}"
            )


class TransformerConfig(DecoderConfig):
    """A decoder Transformer.

    The defaults are LLaMA's. GPT-2 is norm "layer", mlp "gelu", positions "learned", biases true,
    tied true.
    """

    family: Literal["transformer"] = "transformer"
    """Model family."""


class MoEConfig(DecoderConfig):
    """A mixture of experts: a decoder with SwiGLU experts and top-k routing, as in Mixtral."""

    family: Literal["moe"] = "moe"
    """Model family."""
    mlp: Literal["swiglu"] = "swiglu"
    """Kind of expert: SwiGLU."""
    ffn_ratio: Positive = 1.0
    """Inner width of one expert over `width`."""
    n_experts: Count = 8
    """Number of routed experts."""
    top_k: Count = 2
    """Number of experts that each token is routed to."""
    n_shared_experts: Whole = 0
    """Number of experts that every token uses (arXiv:2401.06066), built as one wide MLP."""
    norm_top_k: bool = True
    """Whether the weights of the chosen experts are divided by their sum."""
    router: Literal["out", "hid"] = "out"
    """Role of the router in the parametrization. "out": a readout, as its fan-out does not grow;
    "hid": a hidden matrix, as lm-engine treats it."""
    balance_coef: NotNegative = 0.01
    """Coefficient of the load-balance loss (arXiv:2101.03961, eq. 4). It adds to the gradient, not
    to the reported loss."""

    @model_validator(mode="after")
    def _routed(self) -> MoEConfig:
        if self.biases:
            raise ValueError(
                "`biases` must be false for `model.family` 'moe', whose experts have none, but got"
                " True"
            )
        if self.top_k > self.n_experts:
            raise ValueError(
                "`top_k <= n_experts` must hold, but got"
                f" top_k={self.top_k}, n_experts={self.n_experts}"
            )
        if self.top_k == 1 and self.norm_top_k:
            raise ValueError(
                "`norm_top_k` must be false for top_k=1: a single weight of 1 gives the router no"
                " gradient"
            )
        return self


class MLPConfig(ModelConfig):
    """An MLP on features: input layer, `depth` hidden layers, readout.

    An activation follows each layer except the last. There are no norms and no residual branches.
    """

    family: Literal["mlp"] = "mlp"
    """Model family."""
    inputs: Count = 64
    """Number of input features."""
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    """Activation function of the hidden layers."""
    biases: bool = True
    """Whether the linear layers have biases."""
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    """Loss function: cross-entropy over classes, or mean squared error."""

    def check(self, seq_len: int, base_width: int, depth_alpha: float) -> None:
        """ValueError for a depth rule: there is no residual branch to multiply."""
        super().check(seq_len, base_width, depth_alpha)
        if depth_alpha:
            raise ValueError(
                "`depth_alpha` must be 0 for `model.family` 'mlp', which has no residual branches,"
                f" but got {depth_alpha}"
            )


class ResNetConfig(ModelConfig):
    """A ResNet of basic blocks (arXiv:1512.03385), as for CIFAR, with GroupNorm.

    A 3x3 stem, then `stages` of `depth` blocks. Each stage after the first halves the image and
    doubles the channels. GroupNorm statistics do not depend on the batch.
    """

    family: Literal["resnet"] = "resnet"
    """Model family."""
    image_size: Count = 32
    """Height and width of an image in pixels."""
    channels: Count = 3
    """Channels of an image."""
    stages: Count = 3
    """Number of stages."""
    groups: Count = 8
    """Number of groups of each norm. It does not grow with width."""
    readout: Literal["linear", "conv"] = "linear"
    """Readout: "linear", a matrix after the average over positions, or "conv", a 1x1 convolution
    before it. Both compute the same function."""
    norm_eps: Positive = 1e-5
    """The eps of the norms."""

    @model_validator(mode="after")
    def _shapes(self) -> ResNetConfig:
        if self.width % self.groups:
            raise ValueError(
                f"`width % groups == 0` must hold, but got width={self.width}, groups={self.groups}"
            )
        if self.image_size % 2 ** (self.stages - 1):
            raise ValueError(
                "`image_size % 2**(stages - 1) == 0` must hold, but got"
                f" image_size={self.image_size}, stages={self.stages}"
            )
        return self


class ViTConfig(BlocksConfig):
    """A Vision Transformer (arXiv:2010.11929) with learned positions and full attention."""

    family: Literal["vit"] = "vit"
    """Model family."""
    image_size: Count = 32
    """Height and width of an image in pixels."""
    patch: Count = 4
    """Height and width of a patch in pixels."""
    channels: Count = 3
    """Channels of an image."""
    pool: Literal["class", "mean"] = "class"
    """What the classifier reads: the class token, or the mean over all patches."""
    norm: Literal["rms", "layer"] = "layer"
    """RMSNorm or LayerNorm."""
    mlp: Literal["swiglu", "gelu"] = "gelu"
    """Kind of MLP: SwiGLU (three matrices) or GELU (two)."""
    ffn_ratio: Positive = 4.0
    """Inner width of the MLP over `width`."""
    biases: bool = True
    """Whether linear layers and LayerNorms have biases."""

    @model_validator(mode="after")
    def _patches(self) -> ViTConfig:
        if self.image_size % self.patch:
            raise ValueError(
                "`image_size % patch == 0` must hold, but got"
                f" image_size={self.image_size}, patch={self.patch}"
            )
        return self

    def check(self, seq_len: int, base_width: int, depth_alpha: float) -> None:
        """ValueError unless it reads examples and the base model exists."""
        super().check(seq_len, base_width, depth_alpha)
        self._check_base(base_width)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Rows of attention per image: patches, and the class token."""
        return self.patches + (self.pool == "class")


class OwnConfig(ModelConfig):
    """A model of the user: `build` or the user's trainer makes it from the keys of this table.

    Keys besides those below are the user's own: plain values, passed on by their names.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    family: Literal["own"] = "own"
    """Model family. A table without a family is "own" where `trainer` or `build` is given."""
    depth: Count = 1
    """Depth of the model. 1 where it is not given."""
    build: str = ""
    """`package.module:function` that returns an `nn.Module`, or `hf:` and the path of a Hugging
    Face config.json. Trained by scaletune's own loop. The function gets the keys of this table,
    `vocab_size`, `seq_len`, `seed` and those of `[my]` that it names as parameters; `**kwargs` gets
    the keys of this table, and `recipe` the whole recipe."""
    n_params: Count | None = None
    """Non-embedding parameters, if they are known. Else they are counted, described or reported."""
    n_params_total: Count | None = None
    """All parameters."""

    @model_validator(mode="after")
    def _plain(self) -> OwnConfig:
        for name, value in (self.model_extra or {}).items():
            if not isinstance(value, str | int | float | bool):
                raise ValueError(
                    f"`model.{name}` must be text, a number, true or false, but got {value!r}"
                )
        if self.build and not self.build.startswith(HF_PREFIX) and ":" not in self.build:
            raise ValueError(
                "`model.build` must look like package.module:function or hf:config.json, but got"
                f" {self.build!r}"
            )
        return self

    def check(self, seq_len: int, base_width: int, depth_alpha: float) -> None:
        """Any recipe may suit an own model."""


HF_PREFIX = "hf:"
"""Prefix of `model.build` for a Hugging Face config.json."""

FAMILIES: dict[str, type[ModelConfig]] = {
    "transformer": TransformerConfig,
    "moe": MoEConfig,
    "mlp": MLPConfig,
    "resnet": ResNetConfig,
    "vit": ViTConfig,
    "own": OwnConfig,
}


def _tag(value: Any) -> str:
    """`[family]`, which no recipe key can be; a table without a family is a transformer."""
    if isinstance(value, dict):
        return f"[{value.get('family', 'transformer')}]"
    return f"[{getattr(value, 'family', 'transformer')}]"


Model = Annotated[
    Annotated[TransformerConfig, Tag("[transformer]")]
    | Annotated[MoEConfig, Tag("[moe]")]
    | Annotated[MLPConfig, Tag("[mlp]")]
    | Annotated[ResNetConfig, Tag("[resnet]")]
    | Annotated[ViTConfig, Tag("[vit]")]
    | Annotated[OwnConfig, Tag("[own]")],
    Discriminator(_tag),
]
