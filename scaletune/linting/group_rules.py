"""Known mistakes in param groups, found by comparing what tensors of different roles get.

The width ratio m is read from the groups: a gain inside a block keeps the base lr, and a hidden
matrix gets lr / m. A depth rule multiplies both, so it cancels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaletune.linting.config_rules import Findings

ROLES = {
    "emb": r"embed(?!.*norm)|wte",
    "out": r"lm_head(?!.*norm)|^\^?output",
    "hid": r"k_proj|w_k\b|wk\b|c_attn|wqkv|linear_qkv",
    "vec": r"layers.*norm|blocks.*norm|ln_1|^\.\*$",
    "last": r"norm|ln_f",
}
"""Role -> pattern of parameter names, or of patterns for them, in the stacks that lint knows."""

NAME_KEYS = ("patterns", "names", "params", "pattern", "name", "param_str_match")
"""Keys that stacks use for the names of a group."""


@dataclass(frozen=True)
class RoleGroups:
    """One param group per role, and the forward multipliers of the config they go with."""

    roles: Mapping[str, Mapping[str, Any]]
    """Role of `ROLES` -> settings of its group."""

    multipliers: Mapping[str, float]
    """`embedding` and `logits`; 1 if the config has none."""

    def of(self, role: str, key: str) -> float:
        """A setting of the role's group; 0 if the group does not have it."""
        return float(self.roles[role].get(key) or 0.0)

    @property
    def m(self) -> float:
        """Target width over base width."""
        return self.of("vec", "lr") / self.of("hid", "lr")

    @property
    def depth(self) -> float:
        """Factor on the lr inside the blocks."""
        return self.of("vec", "lr") / self.of("last", "lr")


def _names(group: Mapping[str, Any]) -> list[Any]:
    """Names or patterns of a group."""
    names: Any = next((group[key] for key in NAME_KEYS if group.get(key)), [])
    return names if isinstance(names, list) else [names]


def assign_roles(
    groups: Sequence[Mapping[str, Any]], multipliers: Mapping[str, float]
) -> RoleGroups | None:
    """Assigns groups to roles by their names or patterns.

    None unless hidden matrices, gains and the embedding are there, each with an lr.
    """
    roles: dict[str, Mapping[str, Any]] = {}
    for group in groups:
        for name in (str(name).replace("\\", "") for name in _names(group)):
            role = next((role for role, pattern in ROLES.items() if re.search(pattern, name)), None)
            if role and "bias" not in name:
                roles.setdefault(role, group)
    needed = {"emb", "hid", "vec"}
    if not needed <= roles.keys() or not all(roles[role].get("lr") for role in needed):
        return None
    return RoleGroups({"last": roles["vec"]} | roles, multipliers)


def readout_divided_twice(g: RoleGroups) -> Findings:
    """The logits multiplier is 1/m and the head's lr is divided by m.

    The readout then moves as m**-2, where m**-1 is right in every form.
    """
    if "out" not in g.roles or g.m < 1.5:
        return []
    moves = g.of("out", "lr") * g.multipliers["logits"] / g.of("last", "lr")
    if abs(moves * g.m**2 - 1) > 0.05 and abs(moves * g.m**1.5 - 1) > 0.05:
        return []
    return [
        (
            "lm_head lr",
            f"lr and logits multiplier together are {moves:.3g} of the base lr, but must be 1/m ="
            f" {1 / g.m:.3g}: the readout learns too slowly",
            "divide one of them by m, not both",
        )
    ]


def weight_decay_not_scaled(g: RoleGroups) -> Findings:
    """The same weight decay with another lr; lr * weight_decay must stay the same."""
    hidden, embedding = g.of("hid", "weight_decay"), g.of("emb", "weight_decay")
    same_lr = abs(g.of("hid", "lr") / g.depth / g.of("emb", "lr") - 1) < 0.05
    if g.m < 1.5 or not hidden or hidden != embedding or same_lr:
        return []
    return [
        (
            "hidden weight_decay",
            f"hidden matrices have lr / {g.m:.3g} but the embedding's weight_decay {hidden:g}: they"
            " shrink less per step than in the proxy",
            f"set it to {hidden * g.m:g} for hidden matrices",
        )
    ]


def eps_not_scaled(g: RoleGroups) -> Findings:
    """The library's default eps at a width where gradients are m times smaller."""
    if g.m < 1.5 or {float(group.get("eps") or 1e-8) for group in g.roles.values()} != {1e-8}:
        return []
    return [
        (
            "eps",
            f"eps is the default 1e-8 in every group, while gradients shrink {g.m:.3g}-fold with"
            " width",
            "set it to base eps / m, as in the plan",
        )
    ]


def init_std_not_scaled(g: RoleGroups) -> Findings:
    """Hidden matrices with the init std of the embedding."""
    hidden = g.of("hid", "init_std")
    embedding = g.of("emb", "init_std") * g.multipliers["embedding"]
    if g.m < 1.5 or not hidden or abs(hidden / embedding - 1) > 0.01:
        return []
    return [
        (
            "hidden init_std",
            f"hidden matrices have the embedding's init std {hidden:g} at {g.m:.3g} times the base"
            " width, but it must shrink with width",
            f"set it to {hidden / g.m**0.5:.4g} for hidden matrices",
        )
    ]


def hidden_lr_not_scaled(g: RoleGroups) -> Findings:
    """Multipliers of a wider model with the learning rates of the base model."""
    embedding, logits = g.multipliers["embedding"], g.multipliers["logits"]
    s = embedding if abs(embedding * logits - 1) < 1e-9 else 1.0
    if g.m > 1.01 or s < 1.2:
        return []
    return [
        (
            "hidden lr",
            f"the config has the multipliers of {s**2:.3g} times the base width, but hidden"
            " matrices have the base lr",
            f"divide it by {s**2:.3g}",
        )
    ]


RULES: tuple[Callable[[RoleGroups], Findings], ...] = (
    readout_divided_twice,
    weight_decay_not_scaled,
    eps_not_scaled,
    init_std_not_scaled,
    hidden_lr_not_scaled,
)
