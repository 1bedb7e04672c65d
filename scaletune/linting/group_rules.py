"""Faults of param groups: what each tensor gets, put beside what the others get. Groups alone, or with the config.json they go with.

The ratio m of widths is read off the groups: a gain inside the blocks keeps its lr, a hidden matrix gets lr / m; so depth rules,
which multiply both, drop out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaletune.linting.config_rules import Found

ROLES = {  # role -> what names of that role look like, as patterns or plainly, in the stacks that we know
    "emb": r"embed(?!.*norm)|wte", "out": r"lm_head(?!.*norm)|^\^?output",
    "hid": r"k_proj|w_k\b|wk\b|c_attn|wqkv|linear_qkv", "vec": r"layers.*norm|blocks.*norm|ln_1|^\.\*$", "last": r"norm|ln_f",
}  # fmt: skip


@dataclass(frozen=True)
class Groups:
    """One group of each role, and the forward multipliers of the config they go with (1 where there is none)."""

    roles: Mapping[str, Mapping[str, Any]]
    multipliers: Mapping[str, float]

    def of(self, role: str, key: str) -> float:
        return float(self.roles[role].get(key) or 0.0)

    @property
    def m(self) -> float:
        """Target width over base width."""
        return self.of("vec", "lr") / self.of("hid", "lr")

    @property
    def depth(self) -> float:
        """Factor on lr inside the blocks."""
        return self.of("vec", "lr") / self.of("last", "lr")


def _names(group: Mapping[str, Any]) -> list[Any]:
    """Names or patterns of a group, by the key that its stack has for them."""
    given: Any = next(
        (
            group[key]
            for key in ("patterns", "names", "params", "pattern", "name", "param_str_match")
            if group.get(key)
        ),
        [],
    )
    return given if isinstance(given, list) else [given]


def found_in(
    groups: Sequence[Mapping[str, Any]], multipliers: Mapping[str, float]
) -> Groups | None:
    """The group of each role by the names or patterns it has; None unless the hidden matrices, gains and the embedding are there."""
    roles: dict[str, Mapping[str, Any]] = {}
    for group in groups:
        for name in (str(name).replace("\\", "") for name in _names(group)):
            role = next((role for role, pattern in ROLES.items() if re.search(pattern, name)), None)
            if role and "bias" not in name:
                roles.setdefault(role, group)
    needed = {"emb", "hid", "vec"}
    if not needed <= roles.keys() or not all(roles[role].get("lr") for role in needed):
        return None
    return Groups({"last": roles["vec"]} | roles, multipliers)


def readout_divided_twice(g: Groups) -> Found:
    """Logits times 1/m and the head's lr over m: the readout moves as m**-2 where m**-1 is right, in every form."""
    if "out" not in g.roles or g.m < 1.5:
        return []
    moves = g.of("out", "lr") * g.multipliers["logits"] / g.of("last", "lr")
    if abs(moves * g.m**2 - 1) > 0.05 and abs(moves * g.m**1.5 - 1) > 0.05:
        return []
    return [("lm_head lr", f"lr and logits multiplier together are {moves:.3g} of the base lr, where 1/m = {1 / g.m:.3g} is meant", "divide one of them by m, not both")]  # fmt: skip


def weight_decay_not_scaled(g: Groups) -> Found:
    """The same weight decay under another lr: lr * weight_decay is what must stay."""
    hidden, embedding = g.of("hid", "weight_decay"), g.of("emb", "weight_decay")
    if (
        g.m < 1.5
        or not hidden
        or hidden != embedding
        or abs(g.of("hid", "lr") / g.depth / g.of("emb", "lr") - 1) < 0.05
    ):
        return []
    return [("hidden weight_decay", f"hidden matrices have lr / {g.m:.3g} and the embedding's weight_decay {hidden:g}", f"set theirs to {hidden * g.m:g}")]  # fmt: skip


def eps_not_scaled(g: Groups) -> Found:
    """The library's default eps at a width where gradients are m times smaller."""
    if g.m < 1.5 or {float(group.get("eps") or 1e-8) for group in g.roles.values()} != {1e-8}:
        return []
    return [
        (
            "eps",
            f"eps is the default 1e-8 in every group while gradients shrink {g.m:.3g}-fold",
            "set it to base eps / m, as the plan says",
        )
    ]


def init_std_not_scaled(g: Groups) -> Found:
    """Hidden matrices that start as the embedding does."""
    hidden, embedding = (
        g.of("hid", "init_std"),
        g.of("emb", "init_std") * g.multipliers["embedding"],
    )
    if g.m < 1.5 or not hidden or abs(hidden / embedding - 1) > 0.01:
        return []
    return [("hidden init_std", f"hidden matrices start with the embedding's std {hidden:g} at {g.m:.3g} times the width", f"set theirs to {hidden / g.m**0.5:.4g}")]  # fmt: skip


def hidden_lr_not_scaled(g: Groups) -> Found:
    """Multipliers of a wider model and the base model's learning rates."""
    s = (
        g.multipliers["embedding"]
        if abs(g.multipliers["embedding"] * g.multipliers["logits"] - 1) < 1e-9
        else 1.0
    )
    if g.m > 1.01 or s < 1.2:
        return []
    return [("hidden lr", f"the config has the multipliers of {s**2:.3g} times the base width, but hidden matrices the base lr", f"divide it by {s**2:.3g}")]  # fmt: skip


RULES: tuple[Callable[[Groups], Found], ...] = (
    readout_divided_twice, weight_decay_not_scaled, eps_not_scaled, init_std_not_scaled, hidden_lr_not_scaled,
)  # fmt: skip
