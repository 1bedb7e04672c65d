"""Optimizer families: how a step answers to its gradient, one line of exponents each (arXiv:2407.05872, derived here).

Symbols: n_in, n_out the growing dimensions of a tensor over the base model's (1 where it does not grow), theta its multiplier, s the
alignment of an update with what it meets (1 full, 1/2 none), g the form's backward exponent, so gradients are ~ theta * n_out**-g.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from scaletune.errors import UserError, nearest
from scaletune.rules.forms import Role

_MATRICES: tuple[Role, ...] = ("emb", "hid", "out")
ShapeFactor = Literal["original", "match_rms_adamw", "spectral"]
Exponents = tuple[float, float]


@dataclass(frozen=True)
class Family:
    """lr ~ n_in**x * n_out**y / theta**multiplier, over theta * std too if `relative`, with (x, y) = `lr(s, g)`."""

    lr: Callable[[float, float], Exponents]
    multiplier: int = 1  # lr ~ theta**-multiplier: 2 where a step is the gradient, 1 where it is normalised, 0 where invariant
    relative: bool = False  # a step is scaled by the RMS of W
    eps: int = 0  # eps ~ gradient**eps: 1 beside a gradient, 2 beside its square, 0 where there is none or it is relative
    frobenius: bool = False  # that eps stands beside the gradient's norm, not its RMS
    gradient: int = 0  # a step ~ gradient**gradient: 1 SGD, 0 normalised, -1 natural
    decay: int | None = (
        None  # None: weights shrink by lr * weight_decay; k: it acts inside a trust ratio, beside gradient**k
    )
    damping: Literal["kfac", "shampoo"] | None = None
    shape_factor: ShapeFactor | None = (
        None  # what the optimizer itself puts on an orthogonal update
    )
    roles: tuple[Role, ...] = (
        "emb",
        "hid",
        "out",
        "vec",
        "fin",
    )  # that take this rule; the others take AdamW's
    caveats: tuple[str, ...] = ()

    @property
    def like_adam(self) -> bool:
        """Normalised entry by entry, whatever the size of the weights."""
        return self.lr is _adam and not self.relative

    @property
    def decay_of_multiplier(self) -> int:
        """k in weight_decay ~ theta**k for a tensor rewritten as theta * (W / theta)."""
        return self.multiplier if self.decay is None else self.decay + 1


def _sgd(s: float, g: float) -> Exponents:
    return -s, g


def _adam(s: float, g: float) -> Exponents:
    return -s, 0.0


def _orthogonal(s: float, g: float) -> Exponents:
    """Spectral norm 1 before lr: sqrt(out / in), aligned or not (arXiv:2310.17813)."""
    return -0.5, 0.5


def _natural(s: float, g: float) -> Exponents:
    """Both sides whitened: width-free in muP (arXiv:2312.12226); for other g and s derived."""
    return 1 - s, 1 - g


_ARGUED = "lr for alignment 'none', vectors and finite tensors by argument, not measured"
_RATIO = "a trust ratio needs weights that are not zero: clamp it for a zero-initialised readout"
_NS_EPS = "Newton-Schulz eps by the gradient's Frobenius norm: derived"
_MUON_DECAY = "weight_decay keeps lr * weight_decay; arXiv:2512.05620 finds an independent one ~ 1 / width nearly optimal"
_MUON = (
    _NS_EPS,
    _MUON_DECAY,
    "every tensor but hidden matrices is Adam's, with Adam's own base lr",
)
_MATCH_RMS = (
    "derived: the factor 0.2 * sqrt(max(out, in)) leaves lr ~ m**-0.5 (what makes it equal to the original factor); "
    "Adam's 1 / m is also in use and contradicted by arXiv:2512.05620",
)
_DAMPING = "damping beyond hidden layers of muP is derived, not confirmed"
_KFAC = (
    _DAMPING,
    "depth and forms other than muP are derived; a damping relative to the trace scales itself: leave it alone",
)
_SHAMPOO = (
    _DAMPING,
    "no grafting, no blocks: grafted to Adam it takes adamw's row (arXiv:2512.05620)",
)
_SOAP = (
    "unconfirmed: Adam's row, which arXiv:2512.05620 gives for a fixed block size; without blocks it gives sqrt(out / in) "
    "and finds that the coordinate check fails",
)
_FLOOR = (
    "a floor on the RMS of W (torch: eps[1]) breaks the rule for tensors below it, and a shift can move them there; torch also caps lr "
    "at step**-0.5 and puts eps[0] beside both the gradient and its square: recipes put it out of the way, at 1e-18"
)
_UNRULED = (
    "no rule is confirmed for it: its tensors stand in adamw's ratios, on the base lr that it finds or is given",
)
_LION = (_ARGUED, "lr ~ sqrt(batch / tokens) is quoted for Lion; unconfirmed")

FAMILIES: dict[str, Family] = {
    "sgd": Family(
        _sgd,
        multiplier=2,
        gradient=1,
        caveats=("alignment 'none': emb and hid of muP forms by argument, not measured",),
    ),
    "adam": Family(_adam, eps=1, caveats=("no L2 in the gradient: decay must be decoupled",)),
    "adamw": Family(_adam, eps=1),
    "adam_atan2": Family(_adam, caveats=(_ARGUED,)),
    "lion": Family(_adam, caveats=_LION),
    "adafactor": Family(
        _adam, multiplier=0, relative=True, eps=2, caveats=(_FLOOR,)
    ),  # scale_parameter=True, torch's always
    "adafactor_unscaled": Family(_adam, eps=2, caveats=(_ARGUED,)),  # scale_parameter=False
    "lamb": Family(_adam, multiplier=0, relative=True, eps=1, decay=0, caveats=(_ARGUED, _RATIO)),
    "lars": Family(_adam, multiplier=0, relative=True, decay=1, caveats=(_ARGUED, _RATIO)),
    "muon": Family(
        _orthogonal, eps=1, frobenius=True, shape_factor="original", roles=("hid",), caveats=_MUON
    ),
    "muon_match_rms": Family(
        _orthogonal,
        eps=1,
        frobenius=True,
        shape_factor="match_rms_adamw",
        roles=("hid",),
        caveats=_MUON + _MATCH_RMS,
    ),
    "muon_spectral": Family(
        _orthogonal, eps=1, frobenius=True, shape_factor="spectral", roles=("hid",), caveats=_MUON
    ),
    "muon_raw": Family(
        _orthogonal, eps=1, frobenius=True, roles=_MATRICES, caveats=(_NS_EPS, _MUON_DECAY)
    ),  # every matrix, no shape factor
    "shampoo": Family(
        _orthogonal, eps=1, damping="shampoo", roles=_MATRICES, caveats=_SHAMPOO
    ),  # powers -1/4, -1/4
    "shampoo_half": Family(
        _natural,
        multiplier=0,
        eps=1,
        gradient=-1,
        damping="shampoo",
        roles=_MATRICES,
        caveats=_SHAMPOO,
    ),  # powers -1/2, -1/2
    "soap": Family(_adam, eps=1, caveats=_SOAP),
    "dadapt_adam": Family(_adam, eps=1, caveats=_UNRULED),
    "prodigy": Family(_adam, eps=1, caveats=_UNRULED),
    "schedulefree_adamw": Family(_adam, eps=1, caveats=_UNRULED),
    "momo_adam": Family(_adam, eps=1, caveats=_UNRULED),
    "kfac": Family(_natural, multiplier=0, gradient=-1, damping="kfac", caveats=_KFAC),
}


def family_named(name: str) -> Family:
    """The family of that name; UserError with the nearest."""
    if name not in FAMILIES:
        raise UserError(
            f"optimizer `family` must be one we know, but got {name!r}{nearest(name, FAMILIES)}"
        )
    return FAMILIES[name]


def trained_by(name: str, role: Role) -> str:
    """The name of the family that trains a tensor of this role: AdamW where the named one leaves it out."""
    return name if role in family_named(name).roles else "adamw"


def family_of(name: str, role: Role) -> Family:
    return FAMILIES[trained_by(name, role)]


def shape_factor(name: ShapeFactor, fan_in: float, fan_out: float) -> float:
    """What Muon multiplies an orthogonal update by: sqrt(max(1, out / in)), 0.2 * sqrt(max(out, in)) or sqrt(out / in)."""
    if name == "original":
        return max(1.0, fan_out / fan_in) ** 0.5
    return (
        0.2 * max(fan_in, fan_out) ** 0.5
        if name == "match_rms_adamw"
        else (fan_out / fan_in) ** 0.5
    )
