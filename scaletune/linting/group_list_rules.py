"""Known mistakes in a list of param groups: doubled names, wrong optimizers, contradictions.

A rule is `(groups, flat config of the model) -> findings`; the config is the groups' own file or
the config.json in their folder.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scaletune.linting.config_rules import Findings, FlatConfig, find_key
from scaletune.linting.group_rules import CATCH_ALL, ROLES, names_of
from scaletune.linting.stacks import REST

Groups = Sequence[Mapping[str, Any]]
LARGE_FOR_ADAM = 0.01
TIES = (
    "tie_word_embeddings",
    "enable_weight_tying",
    "share_embedding_weights",
    "tied_embeddings",
    "tied",
)
"""Keys that tie the head to the embedding."""


def role_of(name: str) -> str | None:
    """The role that a name or pattern stands for."""
    plain = name.replace("\\", "")
    return next((role for role, pattern in ROLES.items() if re.search(pattern, plain)), None)


def find_role(groups: Groups, role: str) -> Mapping[str, Any] | None:
    """The first group with a name of this role."""
    names = ((group, str(name)) for group in groups for name in names_of(group))
    return next((group for group, name in names if role_of(name) == role), None)


def duplicate_group(groups: Groups, config: FlatConfig) -> Findings:
    """One tensor in two groups."""
    names = [(index, str(name)) for index, group in enumerate(groups) for name in names_of(group)]
    findings = []
    for position, (index, name) in enumerate(names):
        plain = "*" not in name and "\\" not in name and "[" not in name
        for earlier, pattern in names[:position] if name not in CATCH_ALL else ():
            same = name == pattern
            glob = plain and "." in name and "*" in pattern and pattern not in CATCH_ALL
            if earlier != index and (same or (glob and fnmatch.fnmatchcase(name, pattern))):
                findings.append(
                    (
                        name,
                        f"it is in groups {earlier + 1} and {index + 1}: the optimizer refuses it"
                        " or steps it twice, or the second group is never used",
                        "keep it in one group",
                    )
                )
                break
    return findings


def shadowed_group(groups: Groups, config: FlatConfig) -> Findings:
    """A pattern for all names before others, where the first match counts."""
    groups = [group for group in groups if not group.get(REST)]
    for index, group in enumerate(groups[:-1]):
        names = [str(name) for name in names_of(group)]
        later = [str(name) for each in groups[index + 1 :] for name in names_of(each)]
        if any(name in CATCH_ALL for name in names) and any(n not in CATCH_ALL for n in later):
            return [
                (
                    names[0],
                    f"it matches every name before {later[0]!r} is tried: the groups after it are"
                    " never used",
                    "move it to the end",
                )
            ]
    return []


def _optimizer_of(group: Mapping[str, Any]) -> str:
    keys = ("optimizer_name", "optimizer", "algorithm", "family", "name_of_optimizer")
    named = next((str(group[key]) for key in keys if isinstance(group.get(key), str)), "")
    return "muon" if group.get("use_muon") is True else named.lower()


def muon_on_embeddings(groups: Groups, config: FlatConfig) -> Findings:
    """Muon, or Muon's lr, for embeddings, head or gains."""
    hidden = find_role(groups, "hid")
    for role, what in (("emb", "the embedding"), ("out", "the head"), ("last", "gains")):
        group = find_role(groups, role)
        if group is None:
            continue
        if "muon" in _optimizer_of(group):
            return [
                (
                    f"optimizer of {what}",
                    f"Muon orthogonalizes its updates, which is made for hidden matrices, but here"
                    f" it trains {what}",
                    "use AdamW with an own lr",
                )
            ]
        lr, planned = group.get("lr") or 0.0, "family" in group  # a plan scales Muon's lr too
        of_muon = hidden is not None and not planned and "muon" in _optimizer_of(hidden)
        if role == "emb" and of_muon and hidden and LARGE_FOR_ADAM <= lr == hidden.get("lr"):
            return [
                (
                    f"lr of {what}",
                    f"AdamW trains {what} with Muon's lr {lr:g}, which is made for orthogonalized"
                    " updates",
                    "set it to the lr of an AdamW run, often about 10 times smaller",
                )
            ]
    return []


def is_tied(config: FlatConfig) -> bool:
    """Whether the config ties the head to the embedding."""
    return any(find_key(config, name)[1] is True for name in TIES)


def decay_on_gains(groups: Groups, config: FlatConfig) -> Findings:
    """A group of only gains and biases with an own weight decay."""
    for group in groups:
        names = [str(name) for name in names_of(group)]
        only = names and all(re.search(r"norm|ln_|bias", name, re.IGNORECASE) for name in names)
        if only and (group.get("weight_decay") or 0) > 0 and len(groups) > 1:
            return [
                (
                    names[0],
                    f"its group has only gains and biases, and decays them by"
                    f" {group['weight_decay']:g}, but the plan has 0 for them",
                    "set it to 0",
                )
            ]
    return []


def coupled_l2(groups: Groups, config: FlatConfig) -> Findings:
    """A group trained by torch's Adam, which adds its decay to the gradient."""
    return [
        (
            str(names_of(group)[0]),
            f"Adam adds weight_decay {group['weight_decay']:g} to the gradient (coupled L2), where"
            " Adam rescales it: the decay does not scale with width as the plan assumes",
            "use AdamW",
        )
        for group in groups
        if group.get("optimizer_name") == "Adam" and group.get("weight_decay") and names_of(group)
    ]


def tied_head_has_group(groups: Groups, config: FlatConfig) -> Findings:
    """A tied head with an own lr, decay or std: it is the embedding's tensor."""
    embedding, head = find_role(groups, "emb"), find_role(groups, "out")
    if not is_tied(config) or embedding is None or head is None or head is embedding:
        return []
    keys = ("lr", "weight_decay", "init_std")
    changed = [key for key in keys if head.get(key) != embedding.get(key)]
    if not changed:
        return []
    return [
        (
            "lm_head",
            "embedding and head are tied, so the head is the embedding's tensor, but its group has"
            f" another {' and '.join(changed)}, which is not used",
            "remove the group, and scale the logits by a multiplier",
        )
    ]


def init_contradicts(groups: Groups, config: FlatConfig) -> Findings:
    """`initializer_range` of the config against the init std of hidden matrices."""
    hidden = find_role(groups, "hid")
    std, (path, of_config) = (hidden or {}).get("init_std"), find_key(config, "initializer_range")
    if not std or not of_config or abs(std / of_config - 1) < 0.01:
        return []
    return [
        (
            path,
            f"it is {of_config:g}, but the groups were made for hidden matrices with init std"
            f" {std:.4g}",
            f"set it to {std:.6g}",
        )
    ]


RULES: tuple[Callable[[Groups, FlatConfig], Findings], ...] = (
    duplicate_group,
    shadowed_group,
    muon_on_embeddings,
    coupled_l2,
    tied_head_has_group,
    decay_on_gains,
    init_contradicts,
)
