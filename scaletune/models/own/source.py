"""Imports the function that `model.build` names, from the recipe's folder or the working folder."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from scaletune.errors import UserError, nearest

STAMP = "__scaletune_read_at__"
"""Attribute of an imported module: modification time and size of its file when it was imported."""


@contextmanager
def importable(folders: Sequence[str]) -> Iterator[None]:
    """Imports look into these folders first, in this order. Restores `sys.path` at the end."""
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in folders:
            with suppress(ValueError):  # the user's module may have changed the path
                sys.path.remove(folder)


def load_function(name: str, folders: Sequence[str]) -> Callable[..., Any]:
    """The function of `package.module:function`. Call it inside `importable(folders)`.

    Raises:
        UserError: There is no such module or function, or the module cannot be imported.
    """
    module_name, _, path = name.partition(":")
    value: Any = _import(module_name, folders)
    for part in path.split("."):
        if not hasattr(value, part):
            names = [each for each in vars(value) if not each.startswith("_")]
            raise UserError(
                f"`model.build` must name a function of module `{module_name}`, but it has no"
                f" `{part}`{nearest(part, names)}"
            )
        value = getattr(value, part)
    if not callable(value):
        raise UserError(f"`model.build` must name a function, but `{name}` is {value!r}"[:300])
    return value


def _import(name: str, folders: Sequence[str]) -> ModuleType:
    if name == "__main__":  # of a script or notebook, in this process or one forked from it
        return sys.modules[name]
    _forget_outdated(name)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"`model.build` must name a module that can be imported, but there is no module"
                f" `{error.name}` in {' or '.join(folders)}, nor is it installed"
            ) from None
        raise UserError(f"`model.build`: importing `{name}` raised {describe(error)}") from error
    except Exception as error:
        raise UserError(f"`model.build`: importing `{name}` raised {describe(error)}") from error
    if not hasattr(module, STAMP):
        setattr(module, STAMP, _stamp(module))
    return module


def _forget_outdated(name: str) -> None:
    """Removes a module of this name that came from another folder, or whose file has changed.

    A worker, which starts anew, would import the current file.
    """
    top = name.partition(".")[0]
    loaded, spec = sys.modules.get(top), PathFinder.find_spec(top)
    if loaded is None or spec is None:
        return
    module = sys.modules.get(name)
    changed = module is not None and getattr(module, STAMP, None) not in (None, _stamp(module))
    if _places(loaded) == _places(spec) and not changed:
        return
    if top in sys.stdlib_module_names:
        raise UserError(
            f"`model.build` must not name a module of Python's own library, but got `{top}`: rename"
            " the file"
        )
    for each in [each for each in sys.modules if each == top or each.startswith(f"{top}.")]:
        del sys.modules[each]


def _places(module: ModuleType | ModuleSpec) -> list[str]:
    """Where a module comes from: its file, or the folders of a package without one."""
    if isinstance(module, ModuleSpec):
        file, paths = module.origin, module.submodule_search_locations
    else:
        file, paths = getattr(module, "__file__", None), getattr(module, "__path__", None)
    return [os.path.realpath(each) for each in ([file] if file else list(paths or []))]


def _stamp(module: ModuleType) -> tuple[int, int] | None:
    file = getattr(module, "__file__", None)
    if not file or not os.path.exists(file):
        return None
    stat = os.stat(file)
    return stat.st_mtime_ns, stat.st_size


def describe(error: BaseException) -> str:
    """`ValueError: message (model.py:31)`, with the last line of code outside torch and Python."""
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).parents[2])
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith((here, "<frozen"))
        and "site-packages" not in frame.filename
        and f"{os.sep}importlib{os.sep}" not in frame.filename
    ]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}{where}"[:500]
