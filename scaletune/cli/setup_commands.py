"""Commands that set up a machine: init, completion, help."""

from __future__ import annotations

import argparse
from typing import Any

from scaletune.errors import UserError, nearest

Answer = tuple[Any, list[str]]


def init(args: argparse.Namespace) -> Answer:
    """`scaletune init`: writes the example recipes."""
    from scaletune.examples import init

    files = [str(path) for path in init(args.folder)]
    start = next(path for path in files if path.endswith("quickstart.toml"))
    return {"files": files}, [*files, f"next: `scaletune run {start}`"]


def completion(args: argparse.Namespace) -> Answer:
    """`scaletune completion`: prints a completion script."""
    import shtab

    if args.shell not in shtab.SUPPORTED_SHELLS:
        known = ", ".join(shtab.SUPPORTED_SHELLS)
        hint = nearest(args.shell, shtab.SUPPORTED_SHELLS)
        raise UserError(f"the shell must be one of {known}, but got `{args.shell}`{hint}")
    script = shtab.complete(args.parser, args.shell)
    return {"shell": args.shell, "script": script}, [script]


def help(args: argparse.Namespace) -> Answer:
    """`scaletune help`: the help of all commands, or of one."""
    parser: argparse.ArgumentParser = args.parser
    (group,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    if args.about and args.about not in group.choices:
        raise UserError(f"unknown command `{args.about}`{nearest(args.about, group.choices)}")
    text = group.choices[args.about].format_help() if args.about else parser.format_help()
    return {"help": text}, [text.rstrip()]
