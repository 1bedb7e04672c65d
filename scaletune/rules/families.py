"""Optimizer families: how the step of an optimizer scales with its gradient and with width.

One line of exponents per family (arXiv:2407.05872, derived here). Symbols: n_in, n_out are the
growing dimensions of a tensor over the base model's (1 where it does not grow); theta is its
multiplier; s is the alignment of an update with its input (1 full, 1/2 none); g is the form's
backward exponent: gradients are ~ theta * n_out**-g.
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
    """How an optimizer scales: lr ~ n_in**x * n_out**y / theta**multiplier, (x, y) = lr(s, g).

    With `relative` also over theta * std.
    """

    lr: Callable[[float, float], Exponents]
    multiplier: int = 1
    """lr ~ theta**-multiplier. 2: the step is the gradient; 1: normalised; 0: invariant."""
    relative: bool = False
    """The step is scaled by the RMS of W."""
    eps: int = 0
    """eps ~ gradient**eps. 1: beside a gradient; 2: beside its square; 0: no eps, or relative."""
    frobenius: bool = False
    """eps stands beside the norm of the gradient, not its RMS."""
    gradient: int = 0
    """The step is ~ gradient**gradient. 1: SGD; 0: normalised; -1: natural gradient."""
    decay: int | None = None
    """None: weights shrink by lr * weight_decay. k: it acts inside a trust ratio, beside
    gradient**k."""
    damping: Literal["kfac", "shampoo"] | None = None
    """Which statistics have a damping term."""
    shape_factor: ShapeFactor | None = None
    """The factor by which the optimizer itself multiplies an orthogonal update."""
    roles: tuple[Role, ...] = ("emb", "hid", "out", "vec", "fin")
    """The roles that follow this rule; AdamW trains the others."""
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


_ARGUED = (
    "lr for alignment 'none', for vectors and for finite tensors is derived by argument,"
    " not measured"
)
_RATIO = "a trust ratio needs weights that are not zero: clamp it for a zero-initialised readout"
_NS_EPS = "eps of Newton-Schulz follows the Frobenius norm of the gradient: derived"
_MUON_DECAY = (
    "weight_decay keeps lr * weight_decay constant; arXiv:2512.05620 finds an independent one"
    " ~ 1 / width nearly optimal"
)
_MUON = (
    _NS_EPS,
    _MUON_DECAY,
    "Adam trains every tensor except hidden matrices, with its own base lr",
)
_MATCH_RMS = (
    "derived: the factor 0.2 * sqrt(max(out, in)) gives lr ~ m**-0.5, which makes it equal to the"
    " original factor; 1 / m, as for Adam, is also in use and contradicted by arXiv:2512.05620",
)
_DAMPING = "damping is confirmed for hidden layers of muP only; elsewhere it is derived"
_KFAC = (
    _DAMPING,
    "depth and forms other than muP are derived; a damping relative to the trace scales itself:"
    " do not change it",
)
_SHAMPOO = (
    _DAMPING,
    "no grafting, no blocks: grafted to Adam it follows the rule of adamw (arXiv:2512.05620)",
)
_SOAP = (
    "unconfirmed: the rule of Adam, which arXiv:2512.05620 gives for a fixed block size; without"
    " blocks it gives sqrt(out / in) and finds that the coordinate check fails",
)
_RMS_MINIMUM = (
    "a minimum on the RMS of W (torch: eps[1]) breaks the rule for tensors below it, and a shift"
    " can move a tensor there; torch also limits lr to step**-0.5 and adds eps[0] to the gradient"
    " and to its square: recipes set it to 1e-18, so that it has no effect",
)
_UNRULED = (
    "no rule is confirmed for it: its tensors have the ratios of adamw on the base lr that it"
    " finds or is given",
)
_LION = (_ARGUED, "lr ~ sqrt(batch / tokens) is quoted for Lion; unconfirmed")


def _muon(shape_factor: ShapeFactor, caveats: tuple[str, ...] = _MUON) -> Family:
    return Family(
        _orthogonal,
        eps=1,
        frobenius=True,
        shape_factor=shape_factor,
        roles=("hid",),
        caveats=caveats,
    )


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
    # scale_parameter=True, torch's always
    "adafactor": Family(_adam, multiplier=0, relative=True, eps=2, caveats=_RMS_MINIMUM),
    "adafactor_unscaled": Family(_adam, eps=2, caveats=(_ARGUED,)),  # scale_parameter=False
    "lamb": Family(_adam, multiplier=0, relative=True, eps=1, decay=0, caveats=(_ARGUED, _RATIO)),
    "lars": Family(_adam, multiplier=0, relative=True, decay=1, caveats=(_ARGUED, _RATIO)),
    "muon": _muon("original"),
    "muon_match_rms": _muon("match_rms_adamw", _MUON + _MATCH_RMS),
    "muon_spectral": _muon("spectral"),
    "muon_raw": Family(  # every matrix, no shape factor
        _orthogonal, eps=1, frobenius=True, roles=_MATRICES, caveats=(_NS_EPS, _MUON_DECAY)
    ),
    "shampoo": Family(  # powers -1/4, -1/4
        _orthogonal, eps=1, damping="shampoo", roles=_MATRICES, caveats=_SHAMPOO
    ),
    "shampoo_half": Family(  # powers -1/2, -1/2
        _natural,
        multiplier=0,
        eps=1,
        gradient=-1,
        damping="shampoo",
        roles=_MATRICES,
        caveats=_SHAMPOO,
    ),
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
            f"optimizer `family` must be a known family, but got {name!r}{nearest(name, FAMILIES)}"
        )
    return FAMILIES[name]


def trained_by(name: str, role: Role) -> str:
    """Name of the family that trains a tensor of this role: AdamW if the named one does not."""
    return name if role in family_named(name).roles else "adamw"


def family_of(name: str, role: Role) -> Family:
    return FAMILIES[trained_by(name, role)]


def shape_factor(name: ShapeFactor, fan_in: float, fan_out: float) -> float:
    """Muon's factor on an orthogonal update.

    sqrt(max(1, out / in)), 0.2 * sqrt(max(out, in)) or sqrt(out / in).
    """
    if name == "original":
        return max(1.0, fan_out / fan_in) ** 0.5
    if name == "match_rms_adamw":
        return 0.2 * max(fan_in, fan_out) ** 0.5
    return (fan_out / fan_in) ** 0.5
