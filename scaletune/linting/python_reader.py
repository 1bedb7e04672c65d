"""Reads Python config files: assignments, dataclasses, and functions that return a config.

The file is parsed and never executed.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Mapping
from typing import Any

from scaletune.linting.constants import CLASS, dotted_name, fold
from scaletune.linting.values import OTHER, UNREAD, Source, drop_unread, last_parts, name_gaps

Names = dict[str, Any]
CONFIGURES = re.compile(r"config|optim|recipe|model_spec|debugmodel|_\d+[bm]($|_)", re.IGNORECASE)
"""Names of functions that return a config or a part of one."""


def read_python(text: str) -> Source:
    """The constants that a Python file assigns, and the configs that its functions return.

    If several functions return the same class, each is a config of its own: the content is then a
    mapping `{"configs": {function: config}}`.
    """
    module = ast.parse(text)
    names: Names = {}
    _run(module.body, names)
    built: Names = {}
    lost: list[str] = []
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            result = _call(node, names)
            if isinstance(result, Mapping) and result:
                built[node.name] = result
                names[f"{node.name}()"] = result
            elif result is UNREAD and CONFIGURES.search(node.name):
                lost.append(node.name)
        elif isinstance(node, ast.ClassDef):
            fields: Names = {}
            _run(node.body, fields, names)
            fields = {key: value for key, value in fields.items() if value is not UNREAD}
            names |= {f"{node.name}()": {CLASS: node.name} | fields} if fields else {}
            built |= {node.name: fields} if fields else {}
    _run(module.body, names)  # a config that is built from functions further down
    plain = {key: value for key, value in names.items() if not key.endswith("()")}
    content, gaps = drop_unread(_arrange(plain, built))
    sentences = [f"what {', '.join(lost[:8])} return is built in other files"] if lost else []
    return Source(content, name_gaps(gaps) + sentences, last_parts(gaps))


def _arrange(plain: Names, built: Names) -> Names:
    """One config, or one for each function if several return the same class."""
    roots = built | {
        key: value for key, value in plain.items() if isinstance(value, Mapping) and CLASS in value
    }
    classes = [str(value.get(CLASS)) for value in roots.values()]
    if len(classes) == len(set(classes)) or len(roots) < 2:
        merged = dict(plain)
        for name, value in built.items():
            merged[name] = value
        return merged
    return {"configs": {name: plain | value for name, value in roots.items()}}


def _call(node: ast.FunctionDef | ast.AsyncFunctionDef, names: Names) -> Any:
    """What a function returns when it is called with its defaults."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    defaults = node.args.defaults
    local = dict.fromkeys((word.arg for word in arguments), UNREAD)
    for word, value in zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True):
        local[word.arg] = fold(value, names)
    for word, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        local[word.arg] = fold(default, names)
    return _run(node.body, local, names)


def _run(body: list[ast.stmt], local: Names, outer: Mapping[str, Any] | None = None) -> Any:
    """Applies the assignments of a block to `local`; returns what the block returns."""
    for node in body:
        scope = {**(outer or {}), **local}
        match node:
            case ast.Return(value=value):
                return copy.deepcopy(fold(value, scope))
            case ast.Assign(targets=[target], value=value):
                _assign(target, fold(value, scope), local)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                _assign(target, fold(value, scope), local)
            case ast.AugAssign(target=target, op=op, value=value):
                joined = ast.BinOp(target, op, value)
                _assign(target, fold(joined, scope), local)
            case ast.If(test=test, body=then, orelse=other):
                _branch(test, then, other, local, outer)
            case ast.With(body=inner) | ast.Try(body=inner):
                if (result := _run(inner, local, outer)) is not None:
                    return result
            case ast.For(body=inner) | ast.While(body=inner):
                _forget(inner, local)
    return None


def _branch(
    test: ast.expr,
    then: list[ast.stmt],
    other: list[ast.stmt],
    local: Names,
    outer: Mapping[str, Any] | None,
) -> None:
    """Keeps what both branches assign alike; what depends on the condition is unread."""
    known = fold(test, {**(outer or {}), **local})
    if isinstance(known, bool):
        _run(then if known else other, local, outer)
        return
    first, second = copy.deepcopy(local), copy.deepcopy(local)
    _run(then, first, outer)
    _run(other, second, outer)
    for name in first.keys() | second.keys():
        same = first.get(name) == second.get(name)
        local[name] = first.get(name) if same else UNREAD


def _forget(body: list[ast.stmt], local: Names) -> None:
    """Marks what a loop assigns as unread."""
    for node in (part for statement in body for part in ast.walk(statement)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            local[node.id] = UNREAD


def _assign(target: ast.expr, value: Any, local: Names) -> None:
    """Sets a name, or a key of a config that is already known."""
    if isinstance(target, ast.Name):
        local[target.id] = copy.deepcopy(value)
        return
    if isinstance(target, ast.Tuple) and isinstance(value, list):
        for element, each in zip(target.elts, value, strict=False):
            _assign(element, each, local)
        return
    parts = dotted_name(target).split(".")
    if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        parts = [*dotted_name(target.value).split("."), str(target.slice.value)]
    if local.get(parts[0]) is UNREAD and len(parts) > 1:
        local[parts[0]] = {OTHER: UNREAD}  # only what is set here is known
    owner = local.get(parts[0])
    for part in parts[1:-1]:
        below = owner.get(part) if isinstance(owner, dict) else None
        if isinstance(owner, dict) and not isinstance(below, dict):
            below = owner[part] = {}
        owner = below
    if isinstance(owner, dict) and len(parts) > 1:
        owner[parts[-1]] = copy.deepcopy(value)
