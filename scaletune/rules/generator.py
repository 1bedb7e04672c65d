"""Computes how a tensor scales with width and depth, from form, role, optimizer family, alignment.

Every form is a shift of a form without multipliers. A family is therefore described by its
exponents there and its power of the multiplier (arXiv:2011.14522; arXiv:2407.05872 for the
exponents per optimizer and alignment, derived here).
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
    weight_decay: float = 1.0
    """PyTorch's convention: lr * weight_decay stays as at the base width."""
    eps: float = 1.0
    damping: tuple[float, float] = (1.0, 1.0)
    """Of the statistics of input and output: K-FAC, Shampoo."""


def scale(
    form: str,
    role: Role,
    m_in: float = 1.0,
    m_out: float = 1.0,
    *,
    family: str = "adamw",
    alignment: str = "full",
    base_fans: tuple[float, float] = (1.0, 1.0),
) -> Scale:
    """The factors on the base values of a tensor that grew in width.

    Under Adam lr ~ m**(a - s) for hid and out, m**a for emb, 1 for vec. Other families follow
    their line in `families` (arXiv:2407.05872, derived).

    Args:
        form: Name in `FORMS`.
        role: Role of the tensor.
        m_in: Fan-in over the base model's; read only where the fan-in grows in this role.
        m_out: Fan-out over the base model's; read only where it grows.
        family: Name in `FAMILIES`.
        alignment: "full" or "none": correlation of updates with their inputs.
        base_fans: (fan-in, fan-out) of the base tensor; only Muon's shape factors read it.

    Returns:
        The factors.

    Raises:
        UserError: A name is unknown, or the form is not defined for the family.
    """
    f, optimizer = form_named(form), family_of(family, role)
    s, grown = _alignment(alignment), _grown(role, m_in, m_out)
    if f.emb_lr and not family_named(family).like_adam:
        raise UserError(
            f"form {form!r} is defined for Adam and its variants only, but got family={family!r}:"
            " use form 'u_mup'"
        )
    m = grown[1] if role == "emb" else grown[0]
    a, b = f.exponents(role)
    if not f.per_tensor:
        return Scale(m**-a, m**-b)
    return _settings(f, optimizer, role, grown, (m**-a, m**-b), s, base_fans)


def _alignment(name: str) -> float:
    if name not in ALIGNMENTS:
        raise UserError(
            f"`alignment` must be 'full' or 'none', but got {name!r}{nearest(name, ALIGNMENTS)}"
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
        raise UserError(f"`role` must be a known role, but got {role!r}{nearest(role, grown)}")
    return grown[role]


def _settings(
    form: Form,
    family: Family,
    role: Role,
    grown: tuple[float, float],
    multiplier_and_std: tuple[float, float],
    s: float,
    fans: tuple[float, float],
) -> Scale:
    """Factors of a tensor that grew by (n_in, n_out) and is `multiplier * W` with init `std`."""
    (n_in, n_out), (multiplier, std), g = grown, multiplier_and_std, form.backward
    gradient = multiplier * n_out**-g
    # without alignment the trained readout sends back gradients ~ n**-1/2
    x, y = family.lr(s, g if s == 1 else min(g, 0.5))
    lr = n_in**x * n_out**y / multiplier**family.multiplier / _own_factor(family, grown, fans)
    lr *= n_out**form.emb_lr if role == "emb" else 1.0
    lr /= multiplier * std if family.relative else 1.0
    decay = 1 / lr if family.decay is None else gradient**family.decay / (lr * std)
    eps = gradient**family.eps * ((n_in * n_out) ** 0.5 if family.frobenius else 1.0)
    damping = _damping(family, grown, multiplier**2 * n_out ** (1 - 2 * g))
    return Scale(multiplier, std, lr, decay, eps, damping)


def _own_factor(family: Family, grown: tuple[float, float], fans: tuple[float, float]) -> float:
    """Growth since the base model of the factor that the optimizer itself applies."""
    if family.shape_factor is None:
        return 1.0
    now = shape_factor(family.shape_factor, fans[0] * grown[0], fans[1] * grown[1])
    return now / shape_factor(family.shape_factor, *fans)


def _damping(family: Family, grown: tuple[float, float], backward: float) -> tuple[float, float]:
    """Growth of |x|**2 and of |dL/dy|**2: one per factor (K-FAC), both in each (Shampoo)."""
    if family.damping is None:
        return 1.0, 1.0
    if family.damping == "kfac":
        return grown[0], backward
    return grown[0] * backward, grown[0] * backward


def depth(alpha: float, m_depth: float, family: str = "adamw") -> Scale:
    """Scale of a tensor inside a residual branch whose depth grew by `m_depth`.

    The branch and its gradients are ~ m**-alpha, its change ~ m**(alpha - 1). alpha 0: no rule;
    1/2: depth-muP (arXiv:2310.02244); 1: CompleteP (arXiv:2505.01618), whose weight decay has no
    depth factor.
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
    """Factor on weight decay.

    mode "torch": a step shrinks weights by lr * weight_decay; "independent": by weight_decay, which
    has no factor (arXiv:2405.13698, arXiv:2309.14322); "l2": a term in the gradient, equal to
    decoupled decay only under SGD.
    """
    optimizer = family_named(family)
    if mode not in DECAYS:
        raise UserError(
            "weight decay must be 'torch', 'independent' or 'l2', but got"
            f" {mode!r}{nearest(mode, DECAYS)}"
        )
    if mode == "l2" and optimizer.gradient != 1:
        raise UserError(
            "L2 in the gradient does not scale with width like the gradient of the loss, and a"
            f" coordinate check does not detect it: {family!r} needs decoupled weight decay, but"
            " got mode='l2'"
        )
    return 1.0 if mode == "independent" else scaled.weight_decay


def caveats(form: str, family: str = "adamw", alignment: str = "full") -> list[str]:
    """What is derived or unconfirmed in the rule of this form, family and alignment."""
    _alignment(alignment)
    derived = "alignment 'none': derived; it assumes updates uncorrelated with their inputs"
    unaligned = [derived] if alignment == "none" else []
    return [*form_named(form).caveats, *family_named(family).caveats, *unaligned]
