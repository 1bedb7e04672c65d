"""Text that programs printed, made fit for a record and a terminal: printable, short, redacted."""

from __future__ import annotations

import re
from itertools import groupby

from scaletune.records import redact

LAST = 3  # lines of a log in a message
WIDE = 200  # characters of such a line, at most
BAD = "\ufffd"  # in the place of what is not printable
_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?)")


def printable(text: str) -> str:
    """The text as one line: without colours, other escape sequences and what is not printable."""
    words = _ESCAPE.sub("", text).split()
    return " ".join("".join(c if c.isprintable() else BAD for c in word) for word in words)


def plain_text(text: str, most: int) -> str:
    """At most `most` characters of the printable text, without credentials."""
    line = redact(printable(text))
    return line if len(line) <= most else line[: most - 3] + "..."


def last_lines(log: str) -> str:
    """The last lines of a log, of a progress bar only its last state: `one / two / three`."""
    lines = [plain_text(line.rstrip("\r").rpartition("\r")[2], WIDE) for line in log.split("\n")]
    texts = ["(binary)" if line.count(BAD) > len(line) / 4 else line for line in lines if line]
    shown = [text for text, _ in groupby(texts) if text.strip("^~ ")]  # no marks under a line
    return " / ".join(shown[-LAST:]) or "none"
