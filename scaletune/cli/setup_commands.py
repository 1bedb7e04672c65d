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

    from scaletune.cli.arguments import build_parser

    if args.shell not in shtab.SUPPORTED_SHELLS:
        known = ", ".join(shtab.SUPPORTED_SHELLS)
        hint = nearest(args.shell, shtab.SUPPORTED_SHELLS)
        raise UserError(f"the shell must be one of {known}, but got `{args.shell}`{hint}")
    script = shtab.complete(build_parser()[0], args.shell)
    return {"shell": args.shell, "script": script}, [script]


def help(args: argparse.Namespace) -> Answer:
    """`scaletune help`: the help of all commands, or of one."""
    from scaletune.cli.arguments import build_parser

    parser, commands = build_parser()
    if args.about and args.about not in commands:
        raise UserError(f"unknown command `{args.about}`{nearest(args.about, commands)}")
    text = parser.format_help() if not args.about else _help_of(parser, args.about)
    return {"help": text}, [text.rstrip()]


def _help_of(parser: argparse.ArgumentParser, command: str) -> str:
    (commands,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    return commands.choices[command].format_help()
