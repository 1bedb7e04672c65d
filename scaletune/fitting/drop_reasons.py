"""Why runs were dropped, grouped by kind of reason.

Reasons that differ only in their numbers, or in the setting that they name, are one kind.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

SETTING = re.compile(
    r"the setting with (?P<name>\S+ parameters and \S+ tokens(?: at batch size [^\s:]+)?):? ?"
)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:[.,_]\d+)*(?:e[-+]?\d+)?[kKMBT%]?(?!\w)")


class DropReason(NamedTuple):
    """A kind of reason and the runs that were dropped for it."""

    reason: str
    """The sentence; numbers that differ between the runs are "..."."""

    runs: int

    settings: int
    """Different settings that the sentences name; 0 if they name none."""

    example: str
    """Id of one of the runs."""


def group_reasons(dropped: Mapping[str, str]) -> list[DropReason]:
    """Groups {id: reason}; the kind with the most runs is first.

    Example:
        >>> dropped = {"a": "failed: 4 of 10 steps", "b": "diverged", "c": "failed: 3 of 10 steps"}
        >>> [(kind.runs, kind.reason) for kind in group_reasons(dropped)]
        [(2, 'failed: ... of 10 steps'), (1, 'diverged')]
    """
    sentences: dict[str, list[str]] = defaultdict(list)
    for run, sentence in dropped.items():
        sentences[sentence].append(run)
    kinds: dict[str, list[str]] = defaultdict(list)
    for sentence in sentences:
        kinds[NUMBER.sub("#", SETTING.sub("", sentence))].append(sentence)
    reasons = [
        DropReason(
            _common_text([SETTING.sub("", sentence) for sentence in kind]),
            sum(len(sentences[sentence]) for sentence in kind),
            len({match["name"] for sentence in kind if (match := SETTING.match(sentence))}),
            sentences[kind[0]][0],
        )
        for kind in kinds.values()
    ]
    return sorted(reasons, key=lambda reason: -reason.runs)


def _common_text(sentences: list[str]) -> str:
    """The text that sentences of one kind share, with "..." for numbers that differ."""
    text = NUMBER.split(sentences[0])
    numbers = zip(*(NUMBER.findall(sentence) for sentence in sentences), strict=True)
    shown = [each[0] if len(set(each)) == 1 else "..." for each in numbers]
    return "".join(part for pair in zip(text, [*shown, ""], strict=True) for part in pair)
