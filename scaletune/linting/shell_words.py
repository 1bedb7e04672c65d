"""Splits a shell script into words and operators, without running it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

HEREDOC = re.compile(
    r"<<-?[ \t]*(['\"]?)(\w+)\1([^\n]*)\n(.*?)\n[ \t]*\2[ \t]*(?=\n|\)|$)", re.DOTALL
)
OPERATORS = ";|&()<>\n"
OPENS = {"{": "}", "(": ")"}


@dataclass(frozen=True)
class Word:
    """A word, with its quotes removed."""

    text: str
    quoted: bool = False
    operator: bool = False


def cut_heredocs(text: str) -> tuple[str, list[str]]:
    """The script without its here-documents, and their texts."""
    bodies: list[str] = []

    def cut(match: re.Match[str]) -> str:
        bodies.append(match[4])
        return f"{match[3]}\n"

    return HEREDOC.sub(cut, text), bodies


def _end_of_group(text: str, start: int) -> int:
    """The position after `${...}` or `$(...)` that opens at `start`."""
    close, depth = OPENS[text[start]], 0
    for position in range(start, len(text)):
        depth += (text[position] == text[start]) - (text[position] == close)
        if not depth:
            return position + 1
    raise ValueError(f"No closing {close}")


def _end_of_quotes(text: str, start: int) -> int:
    """The position of the quote that closes the one at `start`."""
    position, double = start + 1, text[start] == '"'
    while position < len(text) and text[position] != text[start]:
        if double and text.startswith("$(", position):
            position = _end_of_group(text, position + 1)  # it may contain quotes of its own
        else:
            position += 2 if double and text[position] == "\\" else 1
    if position >= len(text):
        raise ValueError("No closing quotation")
    return position


def split(text: str) -> Iterator[Word]:
    """Words and operators of a script; comments and line continuations are dropped."""
    text = text.replace("\\\r\n", " ").replace("\\\n", " ").replace("\r", "")
    position, word, quoted = 0, "", False
    while position < len(text):
        char = text[position]
        if char in "'\"":
            end = _end_of_quotes(text, position)
            word, quoted = word + text[position + 1 : end].replace('\\"', '"'), True
            position = end + 1
        elif char == "$" and text[position + 1 : position + 2] in OPENS:
            end = _end_of_group(text, position + 1)
            word, position = word + text[position:end], end
        elif char == "\\":
            word, position = word + text[position + 1 : position + 2], position + 2
        elif char == "#" and not word and not quoted:
            position = (text + "\n").index("\n", position)
        elif char in OPERATORS or char.isspace():
            if word or quoted:
                yield Word(word, quoted)
            if char in OPERATORS:
                yield Word(char, operator=True)
            word, quoted, position = "", False, position + 1
        else:
            word, position = word + char, position + 1
    if word or quoted:
        yield Word(word, quoted)
