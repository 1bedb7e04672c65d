"""The laws of the optimal learning rate and of the loss that can be fitted."""

from __future__ import annotations

from scaletune.errors import UserError, nearest
from scaletune.fitting.relations import RELATIONS

LAWS = {
    # lr = c * n_params**a * tokens**b
    "lr_nd": ("n_params", "tokens"),
    # lr = c * n_params**a * tokens**b * batch_tokens**d
    "lr_ndb": ("n_params", "tokens", "batch_tokens"),
    # E + A / n_params**alpha + B / tokens**beta, with the estimator that extrapolates best
    "loss_nd": ("n_params", "tokens"),
    # the same form with the published objective
    "chinchilla": ("n_params", "tokens"),
    # loss as a function of lr and batch size at every scale: surface/model.py
    "joint": ("n_params", "tokens", "batch_tokens"),
}
LEVEL = 0.95  # of every interval


def require_known_law(law: str) -> None:
    """Raises a UserError, with the nearest name, if `law` cannot be fitted."""
    if law not in LAWS and law not in RELATIONS:
        hint = nearest(law, [*LAWS, *RELATIONS])
        raise UserError(f"a law must be one that can be fitted, but got {law!r}{hint}")


def reads_every_row(law: str) -> bool:
    """Whether a law is fitted to whole training curves, one row per logged step."""
    relation = RELATIONS.get(law)
    if relation is None:
        return False
    return relation.curves or relation.reduce is not None or law == "learning_curve"
