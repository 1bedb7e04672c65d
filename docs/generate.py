"""Generates the reference pages of the docs from the code: recipe keys, commands, published laws.

mkdocs runs `on_files` before it builds the site (`hooks` in mkdocs.yml). It writes no files.
"""

from __future__ import annotations

import argparse
import ast
import html
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin

import griffe
from annotated_types import Ge, Gt, Le, Lt, MinLen
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel, Discriminator, Tag
from pydantic.fields import FieldInfo

from scaletune import laws
from scaletune.cli.arguments import COMMANDS, build_parser
from scaletune.recipe import Recipe
from scaletune.recipe.placeholder_values import DERIVED_FROM, ROLE_NAMES, SCALARS
from scaletune.recipe.placeholders import GIVEN
from scaletune.recipe.short_names import SHORT_NAMES


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds one page per kind of law to the navigation."""
    (reference,) = (part["Reference"] for part in config.nav or [] if "Reference" in part)
    pages = [{laws.KIND_TITLES[kind]: f"reference/laws/{kind}.md"} for kind in laws.KINDS]
    reference.append({"Published laws": ["reference/laws/index.md", *pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to the site."""
    pages = {"reference/recipe.md": recipe_page(), "reference/commands.md": commands_page()}
    pages |= {f"reference/laws/{name}.md": text for name, text in law_pages().items()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


class ExampleSections(griffe.Extension):
    """Reads the section "Example:" of a docstring as griffe's "Examples:"."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each function and class that the API page shows."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )


# --- recipe keys ----------------------------------------------------------------------


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """The string under each field of a class and of its bases: name -> text."""
    docs: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or cls is BaseModel:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        body = definition.body
        for field, below in pairwise(body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            value = below.value if isinstance(below, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docs[field.target.id] = inspect.cleandoc(value.value)
    return docs


def type_text(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """A type in words: "whole number, at least 1"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return type_text(args[0], (*annotation.__metadata__, *metadata))
    if origin is Literal:
        return " or ".join(f"`{quote(value)}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(a) for a in args if a is not type(None)))
    if origin is list or origin is tuple:
        return f"list of {type_text(args[0])}"
    if origin is dict:
        return f"table of {type_text(args[1])}"
    if annotation is list:
        return "list"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    names = {int: "whole number", float: "number", str: "string", bool: "`true` or `false`"}
    return names.get(annotation, "any value") + bounds(metadata)


def bounds(metadata: tuple[Any, ...]) -> str:
    """The constraints of a number: ", above 0, at most 1"."""
    flat = [
        each
        for item in metadata
        for each in (item.metadata if isinstance(item, FieldInfo) else [item])
    ]
    words = {Gt: "above {0.gt}", Ge: "at least {0.ge}", Lt: "below {0.lt}", Le: "at most {0.le}"}
    words[MinLen] = "at least {0.min_length} entries"
    found = [words[type(each)].format(each) for each in flat if type(each) in words]
    return "".join(f", {text}" for text in found)


def quote(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def default_text(field: FieldInfo) -> str:
    """The default of a key, as TOML writes it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "not set"
    return "see below" if isinstance(value, BaseModel) else f"`{quote(value)}`"


def sections(annotation: Any) -> list[tuple[str, type[BaseModel]]]:
    """The tables that an annotation allows: (tag of a tagged union or "", class)."""
    if isinstance(annotation, type):
        return [("", annotation)] if issubclass(annotation, BaseModel) else []
    metadata = getattr(annotation, "__metadata__", ())
    tag = next((each.tag for each in metadata if isinstance(each, Tag)), "").strip("[]")
    inner = [pair for each in get_args(annotation) for pair in sections(each)]
    return [(tag or name, cls) for name, cls in inner if not isinstance(cls, Discriminator)]


def table(model: type[BaseModel]) -> Iterator[str]:
    """The keys of one table: key, type, default, meaning."""
    docs = field_docs(model)
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        kind = type_text(field.annotation, tuple(field.metadata))
        meaning = " ".join(docs.get(name, "").split()).replace("|", "\\|")
        yield f"| `{name}` | {kind} | {default_text(field)} | {meaning} |"


def recipe_page() -> str:
    """`reference/recipe.md`: every key of a recipe."""
    lines = [
        "# Recipe keys",
        "",
        "A recipe is a TOML file. Every key, with its type, default and meaning. An unknown key is"
        " an error that names the nearest key. `--set a.b=c` on the command line overrides a key.",
        "",
        *described("Top level", Recipe),
        *placeholders(),
    ]
    return "\n".join(lines) + "\n"


def placeholders() -> Iterator[str]:
    """The placeholders of the `trainer` table."""
    yield from ("## Placeholders", "")
    yield (
        "In `trainer.command`, `describe`, `env`, `folder` and `log`, a placeholder stands for a"
        " value of the trial: any setting that the recipe states, by its path, such as"
        " `{model.width}` or `{my.dropout}`, and those below. It may compute with + - * / // % **,"
        " min() and max(): `{lr / 10}`, `{width // 64}`."
    )
    yield from ("", "| placeholder | value |", "|---|---|")
    for short, path in SHORT_NAMES.items():
        yield f"| `{{{short}}}` | `{path}` |"
    for name, meaning in GIVEN.items():
        needs = f"; needs {DERIVED_FROM[name]}" if name in DERIVED_FROM else ""
        yield f"| `{{{name}}}` | {meaning}{needs} |"
    for scalar in SCALARS:
        names = ", ".join(f"`{{{scalar}.{role}}}`" for role in ROLE_NAMES)
        yield f"| {names} | `{scalar}` of the tensors of a role; needs `parametrization` |"
    yield ""


def described(title: str, model: type[BaseModel], level: int = 2) -> Iterator[str]:
    """A heading, the first paragraph of the class, its keys, then the tables inside it."""
    yield from (f"{'#' * level} {title}", "")
    yield from ((inspect.getdoc(model) or "").split("\n\nExample:")[0], "")
    yield from (*table(model), "")
    for name, field in model.model_fields.items():
        for tag, inner in sections(field.rebuild_annotation()):
            path = name if title == "Top level" else f"{title.split('`')[1].strip('[]')}.{name}"
            heading = f"`[{path}]`"
            if tag:
                heading += f', `family = "{tag}"`'
            yield from described(heading, inner)


# --- commands -------------------------------------------------------------------------


def commands_page() -> str:
    """`reference/commands.md`: every command with its arguments and an example."""
    parser, _ = build_parser()
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    lines = [
        "# Commands",
        "",
        "Every command takes `--json` (one JSON value on stdout, nothing else) and `--help`. The"
        " exit status is 0 on success, 2 after a user's error (one line on stderr) and 130 after"
        " Ctrl-C.",
        "",
    ]
    for command in COMMANDS:
        name = command.run.__name__
        lines += [f"## {name}", "", command.help, "", f"```bash\n{command.example}\n```", ""]
        lines += [*arguments(subparsers.choices[name]), ""]
    return "\n".join(lines) + "\n"


def arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table of a command's arguments; none if it has no argument of its own."""
    actions = [a for a in parser._actions if a.dest not in ("help", "json")]
    if actions:
        yield from ("| argument | meaning |", "|---|---|")
    for action in actions:
        meaning = (action.help or "").replace("%%", "%")
        row = [f"`{argument(action)}`", html.escape(meaning, quote=False)]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def argument(action: argparse.Action) -> str:
    """`--out DIR`, `--force` or `FIT.json`: an argument as the help writes it."""
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    names = ", ".join(action.option_strings)
    return f"{names} {value if action.nargs != 0 else ''}".strip() if names else str(value)


# --- published laws -------------------------------------------------------------------


def law_pages() -> dict[str, str]:
    """One page per kind of law, and an index: name -> text."""
    pages = {}
    index = [
        "# Published laws",
        "",
        f"The catalogue has {len(laws.CATALOGUE)} laws. `scaletune laws ID` shows one in the"
        " terminal; `scaletune predict --law ID` evaluates it.",
        "",
    ]
    for kind in laws.KINDS:
        entries = laws.select(kind=kind)
        index += [f"## [{laws.KIND_TITLES[kind]}]({kind}.md)", ""]
        index += [f"- [`{law.id}`]({kind}.md#{law.id.lower()}): {law.name}" for law in entries]
        index += [""]
        pages[kind] = f"# {laws.KIND_TITLES[kind]}\n\n" + "\n".join(
            law_text(law) for law in entries
        )
    return pages | {"index": "\n".join(index)}


def law_text(law: laws.Law) -> str:
    """One law: its summary and formula, then everything else as a list of definitions."""
    parts = dict(laws.sections(law))
    summary, formula = parts.pop("summary"), parts.pop("formula")
    lines = [f"## {law.id}", "", f"**{law.name}.** {' '.join(summary)}", ""]
    lines += ["```text", *formula, "```", ""]
    lines += ["| | |", "|---|---|"]
    for heading, rows in parts.items():
        lines.append(f"| {heading} | {'<br>'.join(map(escape, rows))} |")
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text whose `*`, `_` and `<` are not Markdown."""
    return re.sub(r"([*_<|])", r"\\\1", text)
