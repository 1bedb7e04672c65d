"""Reads a config file into nested mappings, and says which parts were not understood."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from scaletune.errors import UserError
from scaletune.linting.python_reader import read_python
from scaletune.linting.shell_reader import read_shell
from scaletune.linting.values import (
    UNREAD,
    Source,
    drop_unread,
    flatten,
    last_parts,
    read_numbers,
)

ARGUMENTS = re.compile(r"(^|\s)--[a-z][\w-]+(\s|=).*(^|\s)--[a-z]", re.DOTALL)
"""A text with at least two arguments."""
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
"""A value that stands elsewhere in the same file, as in OmegaConf."""
PLACEHOLDER = re.compile(r"\$\{?\w|\{\{|^\s*<[^>]*>\s*$")
"""A value that another tool fills in: `${lr}`, `{{ lr }}`, `<your lr>`."""


class Loader(yaml.SafeLoader):
    """Reads YAML with unknown tags, whose values count as unread."""


Loader.add_multi_constructor("", lambda loader, suffix, node: UNREAD)


def _read_json(text: str) -> Source:
    """JSON, with comments and trailing commas if need be."""
    try:
        return Source(json.loads(text))
    except json.JSONDecodeError:
        stripped = re.sub(r"^\s*//.*$|(?<=[\s,{])//[^\"\n]*$", "", text, flags=re.MULTILINE)
        stripped = re.sub(r",(\s*[}\]])", r"\1", stripped)
        if stripped == text:
            raise
        return Source(json.loads(stripped))


def _read_yaml(text: str) -> Source:
    documents = [each for each in yaml.load_all(text, Loader) if each is not None]
    content = documents[0] if documents else {}
    more = len(documents) - 1
    return Source(content, [f"{more} more YAML documents in the file"] if more > 0 else [])


READERS: dict[str, Callable[[str], Source]] = {
    ".json": _read_json,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".toml": lambda text: Source(tomllib.loads(text)),
    ".py": read_python,
}


def read(path: Path) -> Source:
    """The content of a config file by its suffix; any other file is read as a shell script."""
    try:
        text = path.read_text()
        source = READERS.get(path.suffix, read_shell)(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"a config must be a readable text file, but `{path}`: {error}") from None
    except (RecursionError, SyntaxError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"a config must be readable as {path.suffix or 'arguments'}, but `{path}`: {reason}"
        ) from None
    content = read_numbers(source.content)
    content = _resolve(content, flatten(content) if isinstance(content, Mapping) else {})
    content, gaps = drop_unread(content)
    names = [f"{gap}: the file leaves its value open" for gap in dict.fromkeys(gaps)]
    read_in = _hoist_arguments(content)
    return Source(
        read_in.content,
        [*source.not_read, *names, *read_in.not_read],
        source.gaps | last_parts(gaps) | read_in.gaps,
    )


def _resolve(content: Any, root: Mapping[str, Any]) -> Any:
    """Values of `${key}` from the file itself; those that another tool fills in are unread."""
    if isinstance(content, Mapping):
        return {key: _resolve(value, root) for key, value in content.items()}
    if isinstance(content, list):
        return [_resolve(value, root) for value in content]
    if isinstance(content, str) and (name := REFERENCE.fullmatch(content)):
        value = root.get(name[1], root.get(f"variables.{name[1]}", UNREAD))
        return UNREAD if isinstance(value, str) and "${" in value else value
    if isinstance(content, str) and PLACEHOLDER.search(content) and not ARGUMENTS.search(content):
        return UNREAD
    return content


def _texts(content: Any) -> Iterator[str]:
    """The texts in nested content; a list of texts counts as one text."""
    if isinstance(content, Mapping):
        for value in content.values():
            yield from _texts(value)
    elif (
        isinstance(content, list)
        and content
        and all(isinstance(x, str | int | float) for x in content)
    ):
        words = (str(each) for each in content)
        plain = re.compile(r"\S*|--[\w-]+\s+\S+")  # `- --lr 1e-3` is two words
        yield " ".join(word if plain.fullmatch(word) else f"'{word}'" for word in words)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value)
    elif isinstance(content, str):
        yield content


def _hoist_arguments(content: Any) -> Source:
    """Arguments in `MODEL_ARGS:` or in a command's text become keys of the config itself."""
    if not isinstance(content, Mapping):
        return Source(content)
    arguments = content.get("MODEL_ARGS")
    values, sentences, gaps = dict(content), [], set()
    if isinstance(arguments, Mapping):
        values |= arguments
    for text in _texts(content):
        if ARGUMENTS.search(text):
            try:
                inner = read_shell(text)
            except ValueError as error:
                sentences.append(f"the arguments in `{text[:40]}...`: {error}")
                continue
            values = {**inner.content, **values}
            sentences += inner.not_read
            gaps |= inner.gaps
    return Source(values, sentences, gaps)
