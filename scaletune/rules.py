"""The parametrization: one generator from (form, role, optimizer family) to how a tensor scales with width and depth.

A form is a pair of exponents (a, b) per role: the tensor acts as `multiplier * W` with multiplier ~ m**-a and
W ~ N(0, std**2), std ~ m**-b, where m is a ratio to the base model, so that at m = 1 every model is the ordinary one.
Learning rate, weight decay and eps follow from (a, b): Yang & Hu's abc-parametrizations (arXiv:2011.14522), the forms of
arXiv:2203.03466 (Tables 3, 8, 9) and the exponents per optimizer of arXiv:2407.05872, derived here under full alignment.
Pure and torch-free; nothing is stored on tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from scaletune.recipe import Optimizer, Parametrization

Role = Literal["emb", "hid", "out", "vec"]  # what grows: the fan-out; both; the fan-in; the only dimension


@dataclass(frozen=True)
class Form:
    """Exponents (a, b) of the matrix roles; `per_tensor` False: one learning rate, weight decay and eps for all."""

    emb: tuple[float, float]
    hid: tuple[float, float]
    out: tuple[float, float]
    per_tensor: bool = True


FORMS: dict[str, Form] = {
    "sp": Form((0, 0), (0, 0.5), (0, 0.5), per_tensor=False),  # standard practice: one global learning rate
    "sp_per_layer": Form((0, 0), (0, 0.5), (0, 0.5)),  # arXiv:2407.05872
    "ntk": Form((0, 0), (0.5, 0), (0.5, 0)),
    "mup_t3": Form((0, 0), (0, 0.5), (0, 1)),  # arXiv:2203.03466, Table 3
    "mup_t8": Form((0, 0), (0, 0.5), (1, 0)),  # Table 8: what the `mup` package implements
    "mup_t9": Form((-0.5, 0.5), (0, 0.5), (0.5, 0.5)),  # Table 9
    "mean_field": Form((0, 0), (0.5, 0), (1, 0)),
}
FORMS["mup"] = FORMS["mup_t8"]


@dataclass(frozen=True)
class Scale:
    """Factors on the base values of one tensor."""

    multiplier: float = 1.0
    std: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0  # PyTorch's convention: lr * weight_decay stays what it is at the base width
    eps: float = 1.0


def adam(form: str, role: Role, m_in: float = 1.0, m_out: float = 1.0) -> Scale:
    """Scale of a tensor under Adam or AdamW, full alignment: lr ~ m**a for emb, m**(a - 1) for hid and out, 1 for vec.

    `m_in`, `m_out`: fan-in and fan-out over the base model's. eps follows the gradient: m**-(a + g) for emb and hid,
    m**-a for out, m**-g for vec, with g = (a + b) of the readout (arXiv:2407.05872, derived).
    """
    f = FORMS[form]
    g = sum(f.out)
    if role == "vec":
        return Scale(eps=m_out**-g if f.per_tensor else 1.0)
    a, b = getattr(f, role)
    m = m_out if role == "emb" else m_in
    multiplier, std = m**-a, m**-b
    if not f.per_tensor:
        return Scale(multiplier, std)
    lr = m ** (a if role == "emb" else a - 1)
    eps = m**-a if role == "out" else m_out ** -(a + g)
    return Scale(multiplier, std, lr, 1 / lr, eps)


def depth(alpha: float, m_depth: float) -> Scale:
    """Scale of a tensor inside the residual blocks: branch ~ m**-alpha, Adam's lr ~ m**(alpha - 1), eps ~ m**-alpha.

    alpha 0: no rule; 1/2: depth-muP (arXiv:2310.02244); 1: CompleteP (arXiv:2505.01618), whose weight decay takes no depth factor.
    """
    if alpha == 0:
        return Scale()
    return Scale(multiplier=m_depth**-alpha, lr=m_depth ** (alpha - 1), eps=m_depth**-alpha)


@dataclass(frozen=True)
class Tensor:
    """One parameter of a model, as its config alone tells: HF names, shape (fan_out, fan_in) or (width,)."""

    name: str
    role: Role
    shape: tuple[int, ...]
    group: str  # "embedding" | "attention" | "mlp" | "norm" | "head"
    in_block: bool = False

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def fans(self) -> tuple[int, int]:
        """(fan_in, fan_out). An embedding's fan-out is its width: its shape is (vocabulary, width)."""
        if self.role == "emb":
            return self.shape[0], self.shape[1]
        return (1, self.shape[0]) if self.role == "vec" else (self.shape[1], self.shape[0])


@dataclass(frozen=True)
class Planned:
    """What one tensor of the target gets: absolute values, and the ratios they came from."""

    name: str
    role: Role
    m_in: float
    m_out: float
    multiplier: float
    init_std: float  # 0 for vec: gains start at one
    lr: float
    weight_decay: float
    eps: float


def _base_of(tensor: Tensor, base: Mapping[str, Tensor]) -> Tensor:
    """The base model's tensor of that name; a layer the base has not is like its layer 0."""
    if tensor.name in base:
        return base[tensor.name]
    parts = tensor.name.split(".")
    return base[".".join("0" if part.isdigit() else part for part in parts)]


def plan(tensors: Sequence[Tensor], base: Sequence[Tensor], p: Parametrization, o: Optimizer, m_depth: float = 1.0) -> list[Planned]:
    """Parameter name -> multiplier, init std, lr, weight decay, eps, from the shapes of the target and of the base model."""
    named = {tensor.name: tensor for tensor in base}
    in_block = depth(p.depth_alpha, m_depth)
    return [_planned(tensor, _base_of(tensor, named), p, o, in_block if tensor.in_block else Scale()) for tensor in tensors]


def _planned(tensor: Tensor, base: Tensor, p: Parametrization, o: Optimizer, block: Scale) -> Planned:
    (fan_in, fan_out), (base_in, base_out) = tensor.fans, base.fans
    m_in, m_out = fan_in / base_in, fan_out / base_out
    s = adam(p.form, tensor.role, m_in, m_out)
    own = {"emb": p.embedding_multiplier, "out": p.logits_multiplier}.get(tensor.role, 1.0)
    return Planned(
        tensor.name, tensor.role, m_in, m_out,
        multiplier=own * s.multiplier,
        init_std=0.0 if tensor.role == "vec" else p.init_std * s.std,
        lr=o.lr * s.lr * block.lr,
        weight_decay=0.0 if tensor.role == "vec" else o.weight_decay * s.weight_decay,
        eps=o.eps * s.eps * block.eps,
    )  # fmt: skip


def shift(row: Planned, theta: float) -> Planned:
    """The same tensor written as `multiplier * theta` over `W / theta`: AdamW trains it identically (arXiv:2011.14522, derived).

    lr / theta, weight_decay * theta, eps * theta. Exact up to clipping: a global gradient norm is not invariant.
    """
    return replace(
        row, multiplier=row.multiplier * theta, init_std=row.init_std / theta,
        lr=row.lr / theta, weight_decay=row.weight_decay * theta, eps=row.eps * theta,
    )  # fmt: skip


@dataclass(frozen=True)
class Prior:
    """A rule taken from the literature where a study has measured nothing; a fit can replace it."""

    factor: float  # on the learning rate
    sentence: str


def batch_rule(batch_tokens: float, fitted_at: float, beta1: float) -> Prior:
    """Square-root rule for Adam: lr ~ batch**(1/2), for ratios r with r * (1 - beta1) < 1 (arXiv:2205.10287)."""
    ratio = batch_tokens / fitted_at
    if ratio == 1:
        return Prior(1.0, f"batch of {batch_tokens:g} tokens, as in the proxies")
    factor = ratio**0.5
    beyond = "" if ratio * (1 - beta1) < 1 else f"; beyond the rule's own validity: {ratio:g} * (1 - beta1) >= 1"
    return Prior(
        factor,
        f"batch {fitted_at:g} -> {batch_tokens:g} tokens: lr times {factor:.4g} by the square-root rule (arXiv:2205.10287), "
        f"a prior that no proxy tested{beyond}",
    )
