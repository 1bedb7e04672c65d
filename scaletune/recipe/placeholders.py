"""Placeholders in the texts of the `trainer` table: `--lr={lr}` -> `--lr=0.004`.

A placeholder is a name, or arithmetic with names: `{lr / 10}`, `{model.width // 64}`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping
from typing import Any

from scaletune.errors import UserError, nearest
from scaletune.recipe.placeholder_arithmetic import compute_expression, names_in

NAME = re.compile(r"([^\W\d][\w.-]*)?")
"""A placeholder that is a name. A minus between names needs spaces around it."""
GIVEN = {
    "run_dir": "folder of the trial's files",
    "results": "JSON lines file for reports",
    "plan": "plan.json: multiplier, init std, lr, weight decay, eps of each tensor",
    "id": "the trial's id",
    "gpus": "GPUs (or processes) of the trial",
    "nodes": "machines of the trial",
    "steps": "optimizer steps, tokens / batch_tokens",
    "batch_sequences": "sequences per step, batch_tokens / seq_len",
    "resume_from": "checkpoint that an earlier try reported, or nothing",
}
"""Placeholders that are no settings -> their meaning."""


def parse_template(where: str, text: str) -> list[tuple[str, str | None, str]]:
    """(literal text, placeholder or None, format) parts of a template.

    Raises:
        UserError: A brace is not closed.
    """
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(
            f"`{where}` must have closed braces, but got {text!r} ({error}): write {{{{ for a brace"
        ) from None
    return [(literal, name, form or "") for literal, name, form, _ in parts]


def placeholder_names(where: str, text: str) -> list[str]:
    """The names in the placeholders of a template.

    Raises:
        UserError: A brace is not closed, or a placeholder is neither a name nor arithmetic.
    """
    names: list[str] = []
    for _, content, _ in parse_template(where, text):
        if content is not None and NAME.fullmatch(content):
            names.append(content)
        elif content is not None:
            try:
                names += names_in(content)
            except ValueError as error:
                raise UserError(f"the placeholder {{{content}}} of `{where}` {error}") from None
    return names


def require_known(where: str, text: str, known: set[str]) -> None:
    """UserError if a placeholder is not known: its name and the nearest."""
    for name in placeholder_names(where, text):
        if name not in known:
            hint = _hint(name, known)
            raise UserError(
                f"`{where}` has an unknown placeholder {{{name}}}{hint}; write {{{{ for a brace"
            )


def _hint(name: str, known: set[str]) -> str:
    """The nearest placeholder; where none is near, what placeholders there are."""
    hint = nearest(name, known)
    if "nearest" in hint:
        return hint
    return f" (known: the recipe's settings such as {{model.width}}, {{my.NAME}}, {_listed(GIVEN)})"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)


def fill_template(where: str, text: str, values: Mapping[str, Any]) -> str:
    """The text with its placeholders replaced.

    A float is written so that reading it gives the same number; None is empty text. A format such
    as `{lr:.3g}` applies to numbers.

    Raises:
        UserError: A value is not known for this trial, or its format is not valid.
    """
    filled = ""
    for literal, content, form in parse_template(where, text):
        filled += literal
        if content is None:
            continue
        value = _value_of(where, content, values)
        try:
            filled += format(value, form) if form else "" if value is None else str(value)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"`{where}` must have a valid format, but {{{content}:{form}}} for {value!r}:"
                f" {error}"
            ) from None
    return filled


def _value_of(where: str, content: str, values: Mapping[str, Any]) -> Any:
    """The value of a placeholder: of its name, or of its arithmetic."""
    try:
        if NAME.fullmatch(content):
            return values[content]
        return compute_expression(content, values)
    except KeyError as error:
        name = error.args[0]
        raise UserError(f"`{where}` uses {{{name}}}, which this trial does not have") from None
    except ValueError as error:
        raise UserError(f"the placeholder {{{content}}} of `{where}` {error}") from None
