"""Values in config files: numbers that a parser reads as text, dotted keys, sentences on gaps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")
GROUP_KEYS = ("groups", "param_groups", "group_overrides")
"""Keys of param groups."""
WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "none": None, "~": None}
MATTERS = re.compile(
    r"(^|[._])(u?mup|lr|eps|epsilon|std|beta|mult|muon|tied?|untie|groups?|width|dim|heads?)([._]|$)"
    r"|learning_rate|weight_decay|hidden_size|d_model|n_embd|n_head|kv_channels|_(mult|std|lr|eps)$"
    r"|^(m_|lr_|mup_)|init_|initializer|multiplier|scal(e|ing)|warmup|train_iters|max_iters"
    r"|(max|train)_steps|optim|sched"
)
"""Keys that a rule may read. Only their values are named when they cannot be read."""


class Unread:
    """Stands for a value that cannot be read from the file."""

    def __repr__(self) -> str:
        return "UNREAD"

    def __deepcopy__(self, memo: object) -> Unread:
        return self


UNREAD = Unread()
ANY = "*"
"""Among the gaps if any key may be set elsewhere."""
OTHER = "(other settings)"
"""Key for the settings that a config takes from elsewhere."""


@dataclass
class Source:
    """What was read from a file."""

    content: Any
    """Nested mappings and lists, or one of them per config if the file builds several."""
    not_read: list[str] = field(default_factory=list)
    """A sentence for each part that was not understood."""
    gaps: set[str] = field(default_factory=set)
    """Last parts of the keys that are set to values that cannot be read."""


def parse_scalar(text: str) -> Any:
    """A number, a boolean, None, or the text itself; 1e-3 is a number, unlike in YAML."""
    text = text.strip()
    if NUMBER.fullmatch(text) and len(text) < 40:
        plain = text.replace("_", "")
        return int(plain) if re.fullmatch(r"[+-]?\d+", plain) else float(plain)
    return WORDS.get(text.lower(), text)


def normalize_key(key: Any) -> str:
    """`--hidden-size` -> `hidden_size`."""
    return str(key).lstrip("-").replace("-", "_")


def read_numbers(content: Any) -> Any:
    """The content with its numeric texts as numbers, and unified keys."""
    if isinstance(content, Mapping):
        return {normalize_key(key): read_numbers(value) for key, value in content.items()}
    if isinstance(content, list):
        return [read_numbers(value) for value in content]
    if isinstance(content, str) and NUMBER.fullmatch(content):
        return parse_scalar(content)
    return content


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys.

    A list is a value, and if it contains mappings other than param groups, these are numbered.
    """
    if not isinstance(content, Mapping):
        return {prefix.rstrip("."): content}
    values: dict[str, Any] = {}
    for key, value in content.items():
        nested = value
        if isinstance(value, list) and key not in GROUP_KEYS:
            nested = {index: each for index, each in enumerate(value) if isinstance(each, Mapping)}
            values |= {f"{prefix}{key}": value}
        if isinstance(nested, Mapping) and nested:
            values |= flatten(nested, f"{prefix}{key}.")
        elif not isinstance(value, list) or key in GROUP_KEYS:
            values |= {f"{prefix}{key}": value}
    return values


def drop_unread(content: Any, path: str = "") -> tuple[Any, list[str]]:
    """The content without unread values, and the dotted keys of those that matter."""
    if isinstance(content, Mapping):
        kept, gaps = {}, []
        for key, value in content.items():
            place = f"{path}.{key}" if path else str(key)
            if value is UNREAD:
                matters = key == OTHER or MATTERS.search(normalize_key(key))
                gaps += [place] if matters else []
                continue
            kept[key], below = drop_unread(value, place)
            gaps += below
        return kept, gaps
    if isinstance(content, list | tuple):
        pairs = [drop_unread(value, path) for value in content if value is not UNREAD]
        lost = [path] if len(pairs) < len(content) and MATTERS.search(normalize_key(path)) else []
        return [value for value, _ in pairs], lost + [gap for _, gaps in pairs for gap in gaps]
    return content, []


def last_parts(gaps: list[str]) -> set[str]:
    """The last part of each dotted key."""
    names = {gap.rsplit(".", 1)[-1] for gap in gaps}
    return names | ({ANY} if OTHER in names else set())


def name_gaps(gaps: list[str]) -> list[str]:
    """One sentence on the keys whose values are computed elsewhere."""
    unique = list(dict.fromkeys(gaps))
    if not unique:
        return []
    shown = ", ".join(unique[:8]) + (f" and {len(unique) - 8} more" if len(unique) > 8 else "")
    return [f"{shown}: the value is not a constant in this file"]
