"""The command line: each command is one function `(arguments) -> (JSON value, lines of text)`.

Exit status: 0 on success; 2 on a user's error, with one line on stderr; 130 when interrupted. The
first Ctrl-C stops cleanly, the second stops at once. Only the answer goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence

from scaletune import environment
from scaletune.cli.arguments import build_parser
from scaletune.errors import UserError, nearest

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    Args:
        argv: The arguments after the program's name (default: those of the process).

    Returns:
        0, 2 or 130 (see the module's docstring).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    # A shell starts background jobs with SIGINT ignored: then it stays ignored.
    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)  # schedulers stop a job with SIGTERM
    try:
        if environment.leave_launch():
            return 0
        environment.note_ignored_precision()
        args = _parse(argv)
        answer, lines = args.run_command(args)
        print(json.dumps(answer, allow_nan=False) if args.json else "\n".join(lines), flush=True)
    except UserError as error:
        print(f"scaletune: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except OSError as error:
        return _report_os_error(error)
    except KeyboardInterrupt:
        message = "interrupted; finished trials are recorded, the same command continues"
        print(f"scaletune: {message}", file=sys.stderr)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser, commands = build_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise UserError(f"unknown command `{argv[0]}`{nearest(argv[0], commands)}")
    return parser.parse_args(argv or ["help"])


def _report_os_error(error: OSError) -> int:
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    where = f"`{error.filename}`: {error.strerror}" if error.filename else str(error)
    print(f"scaletune: {where}", file=sys.stderr)
    return 2


def _stop(number: int, frame: object) -> None:
    """Handles the first interrupt. The next one has its default effect, even during a wait."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    message = "scaletune: stopping cleanly; a second interrupt stops at once"
    # os.write, because the interrupt may have come inside print; \r keeps a progress table whole
    os.write(2, (f"\r{message}\r" if os.isatty(2) else f"{message}\n").encode())
    raise KeyboardInterrupt
