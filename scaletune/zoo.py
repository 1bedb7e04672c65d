"""The `model` table of a recipe: one section for each family of the zoo, told apart by `family`.

Every family has a `width` that the parametrization scales and a `depth`. Head size, number of key-value heads, of experts and of norm
groups stay as they are when width grows. A vision or feature model reads one example where a text model reads one token.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator

from scaletune.sections import Count, NotNegative, Positive, Section, Whole


def _whole(size: float) -> bool:
    """Whether a product of a ratio is a whole number but for its rounding: 2.7 * 5120 is."""
    return abs(size - round(size)) <= 1e-12 * size


class Family(Section):
    """What all families share."""

    family: str
    width: Count
    depth: Count = 2

    def check(self, seq_len: int, base_width: int, depth_alpha: float) -> None:
        """ValueError unless the rest of the recipe suits the family: here, one that reads examples, not tokens."""
        if seq_len != 1:
            raise ValueError(
                f"`data.seq_len` must be 1 for `model.family` {self.family!r}: an example counts as a token, but got {seq_len}"
            )


class Blocks(Family):
    """Pre-norm residual blocks of attention and an MLP; the softmax's scale is head_dim**-0.5 times `attention_multiplier`."""

    head_dim: Count = 32
    ffn_ratio: Positive = 3.0  # the MLP's inner width over `width`
    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    kv_heads: Count | None = (
        None  # grouped-query attention (arXiv:2305.13245): heads of keys and values; None: as many as of queries
    )
    qk_norm: bool = False  # a norm over each head's queries and keys, gain shared by the heads (arXiv:2302.05442)
    biases: bool = (
        False  # of every linear layer (a decoder has none in its head), and of a LayerNorm
    )
    norm_eps: Positive = 1e-5

    @model_validator(mode="after")
    def _shapes(self) -> Blocks:
        if self.width % self.head_dim:
            raise ValueError(
                f"`width % head_dim == 0` must hold, but got width={self.width}, head_dim={self.head_dim}"
            )
        if not _whole(self.ffn_ratio * self.width):
            raise ValueError(
                f"`ffn_ratio * width` must be whole, but got ffn_ratio={self.ffn_ratio}, width={self.width}"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(
                f"`heads % kv_heads == 0` must hold, but got heads={self.heads} (width / head_dim), kv_heads={self.kv_heads}"
            )
        return self

    def _check_base(self, base_width: int) -> None:
        if base_width % self.head_dim:
            raise ValueError(
                f"`base_width % head_dim == 0` must hold, but got base_width={base_width}, head_dim={self.head_dim}"
            )
        if not _whole(self.ffn_ratio * base_width):
            raise ValueError(
                f"`ffn_ratio * base_width` must be whole, but got ffn_ratio={self.ffn_ratio}, base_width={base_width}"
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


class Decoder(Blocks):
    """A causal language model."""

    positions: Literal["rotary", "learned"] = "rotary"
    max_positions: Count = 1024  # learned: how many there are
    tied: bool = False  # head and embedding are one tensor
    rope_theta: Positive = 10000.0

    @model_validator(mode="after")
    def _pairs(self) -> Decoder:
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"`head_dim % 2 == 0` must hold (rotary positions turn pairs), but got head_dim={self.head_dim}"
            )
        return self

    def check(self, seq_len: int, base_width: int, depth_alpha: float) -> None:
        """ValueError unless there is a position for every token, and a base model."""
        self._check_base(base_width)
        if self.positions == "learned" and seq_len > self.max_positions:
            raise ValueError(
                f"`seq_len <= max_positions` must hold for learned positions, but got seq_len={seq_len}, max_positions={self.max_positions}"
            )


class Transformer(Decoder):
    """A decoder Transformer with LLaMA's choices by default; norm, positions, mlp, biases and tied as GPT-2's make it that."""

    family: Literal["transformer"] = "transformer"


class MoE(Decoder):
    """A decoder Transformer whose MLPs are SwiGLU experts, each token going to `top_k` of them: Mixtral's, with shared experts if asked."""

    family: Literal["moe"] = "moe"
    mlp: Literal["swiglu"] = "swiglu"
    ffn_ratio: Positive = 1.0  # one expert's inner width over `width`
    n_experts: Count = 8
    top_k: Count = 2
    n_shared_experts: Whole = 0  # every token goes through these as well (arXiv:2401.06066), as one MLP of their joint width
    norm_top_k: bool = True  # the chosen experts' weights sum to 1
    router: Literal["out", "hid"] = (
        "out"  # its role: a readout, as its fan-out does not grow; or a matrix, as lm-engine has it
    )
    balance_coef: NotNegative = 0.01  # of the load-balance loss (arXiv:2101.03961, eq. 4), which is in the gradient and not in the loss told

    @model_validator(mode="after")
    def _routed(self) -> MoE:
        if self.biases:
            raise ValueError(
                "`biases` must be false for `model.family` 'moe', whose experts have none, but got True"
            )
        if self.top_k > self.n_experts:
            raise ValueError(
                f"`top_k <= n_experts` must hold, but got top_k={self.top_k}, n_experts={self.n_experts}"
            )
        if self.top_k == 1 and self.norm_top_k:
            raise ValueError(
                "`norm_top_k` must be false for top_k=1: a lone weight of 1 gives the router no gradient"
            )
        return self


class MLP(Family):
    """Features through an input layer, `depth` hidden layers and a readout, an activation after each but the last. No norm, no residual."""

    family: Literal["mlp"] = "mlp"
    inputs: Count = 64
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    biases: bool = True
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"

    def check(self, seq_len: int, base_width: int, depth_alpha: float) -> None:
        """ValueError where a depth rule is asked for that has no branch to multiply."""
        super().check(seq_len, base_width, depth_alpha)
        if depth_alpha:
            raise ValueError(
                f"`depth_alpha` must be 0 for `model.family` 'mlp', which has no residual branches, but got {depth_alpha}"
            )


class ResNet(Family):
    """A ResNet of basic blocks (arXiv:1512.03385) as for CIFAR: a 3x3 stem, then stages of `depth` blocks, each but the first halving the
    image and doubling the channels from `width`. GroupNorm, whose statistics are no matter of the batch."""

    family: Literal["resnet"] = "resnet"
    image_size: Count = 32
    channels: Count = 3
    stages: Count = 3
    groups: Count = 8  # of each norm: their number stays, their size grows
    readout: Literal["linear", "conv"] = (
        "linear"  # after or before the average over places: the same function, by a matrix or a 1x1 kernel
    )
    norm_eps: Positive = 1e-5

    @model_validator(mode="after")
    def _shapes(self) -> ResNet:
        if self.width % self.groups:
            raise ValueError(
                f"`width % groups == 0` must hold, but got width={self.width}, groups={self.groups}"
            )
        if self.image_size % 2 ** (self.stages - 1):
            raise ValueError(
                f"`image_size % 2**(stages - 1) == 0` must hold, but got image_size={self.image_size}, stages={self.stages}"
            )
        return self


class ViT(Blocks):
    """A Vision Transformer (arXiv:2010.11929): patches, learned positions, a class token or the mean of all, full attention."""

    family: Literal["vit"] = "vit"
    image_size: Count = 32
    patch: Count = 4
    channels: Count = 3
    pool: Literal["class", "mean"] = "class"
    norm: Literal["rms", "layer"] = "layer"
    mlp: Literal["swiglu", "gelu"] = "gelu"
    ffn_ratio: Positive = 4.0
    biases: bool = True

    @model_validator(mode="after")
    def _patches(self) -> ViT:
        if self.image_size % self.patch:
            raise ValueError(
                f"`image_size % patch == 0` must hold, but got image_size={self.image_size}, patch={self.patch}"
            )
        return self

    def check(self, seq_len: int, base_width: int, depth_alpha: float) -> None:
        """ValueError unless it reads examples, and has a base model."""
        super().check(seq_len, base_width, depth_alpha)
        self._check_base(base_width)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Rows of attention an image makes."""
        return self.patches + (self.pool == "class")


FAMILIES: dict[str, type[Family]] = {
    "transformer": Transformer,
    "moe": MoE,
    "mlp": MLP,
    "resnet": ResNet,
    "vit": ViT,
}


def _tag(value: Any) -> str:
    """`[family]`, which no key can be; the transformer is what a table that does not say is."""
    return f"[{value.get('family', 'transformer') if isinstance(value, dict) else getattr(value, 'family', 'transformer')}]"


Model = Annotated[
    Annotated[Transformer, Tag("[transformer]")]
    | Annotated[MoE, Tag("[moe]")]
    | Annotated[MLP, Tag("[mlp]")]
    | Annotated[ResNet, Tag("[resnet]")]
    | Annotated[ViT, Tag("[vit]")],
    Discriminator(_tag),
]
