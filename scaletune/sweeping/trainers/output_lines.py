"""Reports in the lines of a trainer's standard output, by `trainer.pattern`."""

from __future__ import annotations

import re
from typing import Any

LINE = 1 << 16  # bytes of a line that are searched
_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\))")
_NUMBER = re.compile(r"[-+]?(?:\d[\d,_']*(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?", re.I)
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:([,_'])\d{3})(?:\1\d{3})*(?:\.\d*)?(?:e[-+]?\d+)?", re.I)
_NOT_FINITE = re.compile(r"[-+]?(nan|inf(inity)?)\b", re.I)
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_COUNTED = ("tokens", "step", "n_params", "n_params_total", "flops")


class OutputLines:
    """The lines of standard output, and the reports in them."""

    def __init__(self, pattern: str):
        self.pattern = re.compile(pattern) if pattern else None
        self._unread = b""

    def feed(self, output: bytes) -> list[dict[str, Any]]:
        """The reports in new output. A carriage return ends a line too (progress bars)."""
        if self.pattern is None:
            return []
        *lines, self._unread = (self._unread + output.replace(b"\r", b"\n")).split(b"\n")
        self._unread = self._unread[-LINE:]
        return [row for line in lines if (row := self._parse(line))]

    def rest(self) -> list[dict[str, Any]]:
        """The report in the last line, if it does not end with a line break."""
        return self.feed(b"\n")

    def _parse(self, line: bytes) -> dict[str, Any]:
        assert self.pattern
        hit = self.pattern.search(_ESCAPE.sub("", line[:LINE].decode(errors="replace")))
        groups = hit.groupdict() if hit else {}
        return {name: parse_number(name, v) for name, v in groups.items() if v is not None}


def parse_number(name: str, text: str) -> float | str:
    """A number as programs print it: `3.21,`, `1,234,567`, `tensor(3.21)`, `1.5M` tokens.

    Text that is no number, or may be two (`3,21`), is returned as it is: it is no report.
    """
    body = text.strip().removeprefix("tensor(").strip("\"'[](){}<>=:;,%| ")
    if bare := _NOT_FINITE.match(body):
        return float(bare[0])
    hit = _NUMBER.match(body)
    if not hit:
        return text
    digits, unit = hit[0], body[hit.end() :].strip(" ,;:)]}")
    if re.search(r"[,_']", digits):
        if not _GROUPED.fullmatch(digits) or (name not in _COUNTED and "." not in digits):
            return text
        digits = re.sub(r"[,_']", "", digits)
    if not unit or unit.startswith(("device=", "dtype=", "grad_fn=", "requires_grad")):
        return float(digits)
    factor = _UNITS.get(unit.lower()) if name in _COUNTED else None
    return text if factor is None else float(digits) * factor
