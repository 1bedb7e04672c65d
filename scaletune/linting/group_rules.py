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
    "out": r"lm_head(?!.*norm)|^\^?output|output_layer|final_proj|\boutput\.weight",
    "hid": r"^(?!.*norm).*((?<![A-Za-z])(q_proj|k_proj|w_?[qkv]|[Ww]qkv|c_attn|linear_qkv)\b"
    r"|\b(attention|feed_forward|mlp|ffn|self_attn)\b)",
    "vec": r"layers.*norm|blocks.*norm|(attn|ffn|attention)_(layer_)?norm|ln_[12]|norm_[12]"
    r"|input_layernorm",
    "last": r"norm|ln_f",
}
"""Role -> pattern of parameter names, or of patterns for them, in the stacks that lint knows."""

CATCH_ALL = (".*", "*", ".+", "", "^.*$")
"""Patterns for the tensors that no other group has."""
NAME_KEYS = ("patterns", "names", "params", "pattern", "name", "param_str_match")
"""Keys that stacks use for the names of a group."""


@dataclass(frozen=True)
class RoleGroups:
    """One param group per role, and the forward multipliers of the config they go with."""

    roles: Mapping[str, Mapping[str, Any]]
    """Role of `ROLES` -> settings of its group."""

    multipliers: Mapping[str, float]
    """`embedding` and `logits`; 1 if the config has none."""

    complete: bool = False
    """Whether `multipliers` are all that the model has, so that no other file can add some."""

    decays_alone: bool = False
    """Whether the optimizer multiplies weights by 1 - weight_decay, without the lr."""

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


def names_of(group: Mapping[str, Any]) -> list[Any]:
    """Names or patterns of a group."""
    names: Any = next((group[key] for key in NAME_KEYS if group.get(key)), [])
    return names if isinstance(names, list) else [names]


def assign_roles(
    groups: Sequence[Mapping[str, Any]],
    multipliers: Mapping[str, float],
    complete: bool = False,
    decays_alone: bool = False,
) -> RoleGroups | None:
    """Assigns groups to roles by their names or patterns.

    None unless hidden matrices, gains and the embedding are there, each with an lr.
    """
    roles: dict[str, Mapping[str, Any]] = {}
    rest: Mapping[str, Any] | None = None
    for group in groups:
        for name in (str(name).replace("\\", "") for name in names_of(group)):
            role = next((role for role, pattern in ROLES.items() if re.search(pattern, name)), None)
            if role and ("bias" not in name or role in ("vec", "last")):
                roles.setdefault(role, group)
            rest = group if name in CATCH_ALL else rest
    others = roles.get("last", rest)
    if others is not None:
        roles.setdefault("vec", others)
    needed = {"emb", "hid", "vec"}
    if not needed <= roles.keys() or not all(roles[role].get("lr") for role in needed):
        return None
    return RoleGroups({"last": roles["vec"]} | roles, multipliers, complete, decays_alone)


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


def _scaled_in_vain(g: RoleGroups) -> Findings:
    hidden, embedding = g.of("hid", "weight_decay"), g.of("emb", "weight_decay")
    return [
        (
            "hidden weight_decay",
            f"it is {hidden:g}, {g.m:.3g} times the embedding's, but this optimizer does not"
            " multiply the decay by the lr: hidden matrices shrink more per step than in the proxy",
            f"set it to {embedding:g}",
        )
    ]


def _below_the_heads(g: RoleGroups) -> Findings:
    """The decay against the head's, where the embedding has none."""
    same_lr = "out" in g.roles and g.of("out", "lr") == g.of("hid", "lr")
    hidden, head = (g.of(role, "weight_decay") if same_lr else 0.0 for role in ("hid", "out"))
    if hidden >= 0.95 * head:
        return []
    return [
        (
            "hidden weight_decay",
            f"hidden matrices have weight_decay {hidden:g}, below {head:g} of the head with the"
            " same lr: they shrink less per step than in the proxy",
            f"set it to {head:g} for hidden matrices",
        )
    ]


def weight_decay_not_scaled(g: RoleGroups) -> Findings:
    """The same weight decay with another lr; lr * weight_decay must stay the same."""
    hidden, embedding = g.of("hid", "weight_decay"), g.of("emb", "weight_decay")
    same_lr = abs(g.of("hid", "lr") / g.depth / g.of("emb", "lr") - 1) < 0.05
    if g.m < 1.5 or not hidden or same_lr:
        return []
    if g.decays_alone:
        return _scaled_in_vain(g) if abs(hidden / embedding / g.m - 1) < 0.05 else []
    if not embedding:
        return _below_the_heads(g)
    if hidden > 1.05 * embedding:
        return []
    return [
        (
            "hidden weight_decay",
            f"hidden matrices have lr / {g.m:.3g} and weight_decay {hidden:g}, not above the"
            f" embedding's {embedding:g}: they shrink less per step than in the proxy",
            f"set it to {embedding * g.m:g} for hidden matrices",
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
    head = g.of("last", "lr") / g.of("out", "lr") if g.roles.get("out", {}).get("lr") else 1.0
    hidden = g.m / g.depth  # the base lr over the hidden one
    if (
        g.complete
        and head >= 1.9
        and logits == 1
        and (hidden == 1 or abs(hidden * head - 1) < 0.05)
    ):
        does = "have the base lr" if hidden == 1 else f"have it times {1 / hidden:.3g}"
        return [
            (
                "hidden lr",
                f"the head's lr is the base lr / {head:.3g}, but hidden matrices {does}",
                f"divide the base lr by {head:.3g}, as for the head",
            )
        ]
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


def readout_not_scaled(g: RoleGroups) -> Findings:
    """Neither the head's lr nor the logits shrink with width."""
    if "out" not in g.roles or g.m < 1.5 or not g.complete:
        return []
    moves = g.of("out", "lr") * g.multipliers["logits"] / g.of("last", "lr")
    if not moves or abs(moves - 1) > 0.03:
        return []
    return [
        (
            "lm_head lr",
            f"the head has the base lr and no logits multiplier at {g.m:.3g} times the base width:"
            " the logits move too fast",
            f"divide the head's lr by {g.m:.3g}, or the logits",
        )
    ]


def embedding_lr_divided(g: RoleGroups) -> Findings:
    """The embedding's lr scaled as the hidden one's; with Adam it keeps the base lr.

    Where one init std serves all tensors, an embedding multiplier sqrt(m) goes with lr / sqrt(m).
    u-muP also has lr / m there, with weight decay * m.
    """
    ratio = g.of("emb", "lr") / g.of("last", "lr")
    embedding, logits = g.multipliers["embedding"], g.multipliers["logits"]
    one_std = embedding > 1.2 and abs(embedding * logits - 1) < 1e-6
    decays = [g.of(role, "lr") * g.of(role, "weight_decay") for role in ("emb", "hid")]
    alone = decays[0] > 0 and abs(decays[1] / g.depth / decays[0] - 1) > 0.05
    divided = abs(ratio * g.m - 1) < 0.03 and (embedding <= 1.2 or (one_std and alone))
    multiplied = abs(ratio / g.m - 1) < 0.03 and g.complete
    unchanged = one_std and abs(ratio - 1) < 0.03 and abs(embedding**2 / g.m - 1) < 0.03
    if g.m < 1.5 or not (divided or multiplied or unchanged):
        return []
    right = g.of("last", "lr") / (embedding if one_std else 1.0)
    return [
        (
            "embedding lr",
            f"the embedding's lr is {ratio:.3g} of the base lr with an embedding multiplier of"
            f" {embedding:.3g}, but its steps must not change with width",
            f"set it to {right:.4g}",
        )
    ]


def decay_on_gains(g: RoleGroups) -> Findings:
    """Weight decay on gains, where the plan decays matrices only."""
    decays = {role: g.of(role, "weight_decay") for role in ("vec", "last")}
    role, decay = max(decays.items(), key=lambda pair: pair[1])
    if g.m < 1.2 or not decay:
        return []
    return [
        (
            "weight_decay of gains" + (" after the blocks" if role == "last" else ""),
            f"gains and biases are decayed by {decay:g}, but the plan has 0 for them",
            "set it to 0 for norms and biases",
        )
    ]


RULES: tuple[Callable[[RoleGroups], Findings], ...] = (
    readout_divided_twice,
    readout_not_scaled,
    weight_decay_not_scaled,
    eps_not_scaled,
    init_std_not_scaled,
    hidden_lr_not_scaled,
    embedding_lr_divided,
    decay_on_gains,
)
