"""The one generator: (form, role, optimizer family, alignment) -> how a tensor scales with width, and with depth.

Every form is a shift of one without multipliers, so a family's exponents there and its power of the multiplier say all there is
to know (arXiv:2011.14522; arXiv:2407.05872 for the exponents per optimizer and alignment, derived here).
"""

from __future__ import annotations

from dataclasses import dataclass

from scaletune.errors import UserError, nearest
from scaletune.rules.families import Family, family_named, family_of, shape_factor
from scaletune.rules.forms import Form, Role, form_named

ALIGNMENTS = {"full": 1.0, "none": 0.5}
ROLES: tuple[Role, ...] = ("emb", "hid", "out", "vec", "fin")
ALPHAS = (0, 0.5, 1)
DECAYS = ("torch", "independent", "l2")


@dataclass(frozen=True)
class Scale:
    """Factors on the base values of one tensor."""

    multiplier: float = 1.0
    std: float = 1.0
    lr: float = 1.0
    weight_decay: float = (
        1.0  # PyTorch's convention: lr * weight_decay stays what it is at the base width
    )
    eps: float = 1.0
    damping: tuple[float, float] = (
        1.0,
        1.0,
    )  # of the input's and the output's statistics: K-FAC, Shampoo


def scale(
    form: str, role: Role, m_in: float = 1.0, m_out: float = 1.0, *,
    family: str = "adamw", alignment: str = "full", base_fans: tuple[float, float] = (1.0, 1.0),
) -> Scale:  # fmt: skip
    """Under Adam lr ~ m**(a - s) for hid and out, m**a for emb, 1 for vec; other families by their line (arXiv:2407.05872, derived).

    `m_in`, `m_out`: fan-in and fan-out over the base model's, read only where the role grows. `base_fans`: the base tensor's own
    (fan-in, fan-out), which only Muon's shape factors look at.
    """
    f, optimizer = form_named(form), family_of(family, role)
    s, grown = _alignment(alignment), _grown(role, m_in, m_out)
    if f.emb_lr and not family_named(family).like_adam:
        raise UserError(
            f"form {form!r} is defined for Adam and its like, but got family={family!r}; its skeleton is 'u_mup'"
        )
    m = grown[1] if role == "emb" else grown[0]
    a, b = f.exponents(role)
    if not f.per_tensor:
        return Scale(m**-a, m**-b)
    return _settings(f, optimizer, role, grown, (m**-a, m**-b), s, base_fans)


def _alignment(name: str) -> float:
    if name not in ALIGNMENTS:
        raise UserError(
            f"`alignment` must be one we know, but got {name!r}{nearest(name, ALIGNMENTS)}"
        )
    return ALIGNMENTS[name]


def _grown(role: str, m_in: float, m_out: float) -> tuple[float, float]:
    """(n_in, n_out): the ratios of the dimensions that grow in this role, 1 for the others."""
    grown = {
        "emb": (1.0, m_out),
        "hid": (m_in, m_out),
        "out": (m_in, 1.0),
        "vec": (1.0, m_out),
        "fin": (1.0, 1.0),
    }
    if role not in grown:
        raise UserError(f"`role` must be one we know, but got {role!r}{nearest(role, grown)}")
    return grown[role]


def _settings(
    form: Form,
    family: Family,
    role: Role,
    grown: tuple[float, float],
    acts: tuple[float, float],
    s: float,
    fans: tuple[float, float],
) -> Scale:
    """What the optimizer is told of a tensor that grew by (n_in, n_out) and acts as `multiplier * W`, `acts` = (multiplier, std)."""
    (n_in, n_out), (multiplier, std), g = grown, acts, form.backward
    gradient = multiplier * n_out**-g
    x, y = family.lr(
        s, g if s == 1 else min(g, 0.5)
    )  # unaligned, the moved readout sends back n**-1/2
    lr = n_in**x * n_out**y / multiplier**family.multiplier / _own_factor(family, grown, fans)
    lr *= n_out**form.emb_lr if role == "emb" else 1.0
    lr /= multiplier * std if family.relative else 1.0
    decay = 1 / lr if family.decay is None else gradient**family.decay / (lr * std)
    eps = gradient**family.eps * ((n_in * n_out) ** 0.5 if family.frobenius else 1.0)
    return Scale(
        multiplier,
        std,
        lr,
        decay,
        eps,
        _damping(family, grown, multiplier**2 * n_out ** (1 - 2 * g)),
    )


def _own_factor(family: Family, grown: tuple[float, float], fans: tuple[float, float]) -> float:
    """By how much the factor that the optimizer itself puts on the tensor has grown since the base model."""
    if family.shape_factor is None:
        return 1.0
    return shape_factor(family.shape_factor, fans[0] * grown[0], fans[1] * grown[1]) / shape_factor(
        family.shape_factor, *fans
    )


def _damping(family: Family, grown: tuple[float, float], backward: float) -> tuple[float, float]:
    """Growth of |x|**2 and of the gradient's |dL/dy|**2, one for each factor (K-FAC) or both in each (Shampoo)."""
    if family.damping is None:
        return 1.0, 1.0
    return (
        (grown[0], backward)
        if family.damping == "kfac"
        else (grown[0] * backward, grown[0] * backward)
    )


def depth(alpha: float, m_depth: float, family: str = "adamw") -> Scale:
    """Scale of a tensor inside the residual blocks: branch and gradients ~ m**-alpha, its change ~ m**(alpha - 1).

    alpha 0: no rule; 1/2: depth-muP (arXiv:2310.02244); 1: CompleteP (arXiv:2505.01618), whose weight decay takes no depth factor.
    """
    optimizer = family_named(family)
    if alpha not in ALPHAS:
        raise UserError(f"`alpha` must be 0, 0.5 or 1, but got {alpha}")
    if alpha == 0:
        return Scale()
    branch = m_depth**-alpha
    lr = m_depth ** (alpha - 1) / branch**optimizer.gradient
    damping = {None: (1.0, 1.0), "kfac": (1.0, branch**2), "shampoo": (branch**2, branch**2)}[
        optimizer.damping
    ]
    return Scale(multiplier=branch, lr=lr, eps=branch**optimizer.eps, damping=damping)


def weight_decay(scaled: Scale, mode: str = "torch", family: str = "adamw") -> float:
    """Factor on weight decay where a step shrinks weights by lr * weight_decay ("torch"), by weight_decay ("independent"), or by "l2".

    Truly independent decay takes none (arXiv:2405.13698, arXiv:2309.14322). L2 in the gradient is the same as decoupled under SGD alone.
    """
    optimizer = family_named(family)
    if mode not in DECAYS:
        raise UserError(
            f"weight decay must be of a kind we know, but got {mode!r}{nearest(mode, DECAYS)}"
        )
    if mode == "l2" and optimizer.gradient != 1:
        raise UserError(
            f"L2 in the gradient does not scale as the loss gradient with width, and no coordinate check shows it: "
            f"{family!r} needs decoupled weight decay, but got mode='l2'"
        )
    return 1.0 if mode == "independent" else scaled.weight_decay


def caveats(form: str, family: str = "adamw", alignment: str = "full") -> list[str]:
    """What is derived, argued or unconfirmed in the rule of this form, family and alignment: for users to see."""
    _alignment(alignment)
    unaligned = (
        ["alignment 'none': derived, updates are taken as uncorrelated with what they meet"]
        if alignment == "none"
        else []
    )
    return [*form_named(form).caveats, *family_named(family).caveats, *unaligned]
