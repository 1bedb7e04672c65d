"""The command line: one function a command, each `(arguments) -> (plain values for --json, lines for people)`.

Exits 0; 2 on the user's error, with one line on stderr; 130 when interrupted, in good order at the first Ctrl-C and at once, by the
signal itself, at the second. Only the answer goes to stdout.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence

from scaletune.cli.arguments import parser
from scaletune.errors import UserError, nearest

STOPS = (signal.SIGINT, signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    before = {number: signal.getsignal(number) for number in STOPS}
    if (
        before[signal.SIGINT] is signal.default_int_handler
    ):  # a shell's background job ignores it, and so do we
        signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)  # a scheduler's way to stop us: as clean as Ctrl-C
    try:
        whole, known = parser()
        if (
            argv and not argv[0].startswith("-") and argv[0] not in known
        ):  # where argparse would list them all
            raise UserError(f"unknown command `{argv[0]}`{nearest(argv[0], known)}")
        args = whole.parse_args(argv)
        answer, lines = args.act(args)
        print(json.dumps(answer, allow_nan=False) if args.json else "\n".join(lines), flush=True)
    except UserError as error:
        print(f"scaletune: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(
            error, BrokenPipeError
        ):  # the reader of our output left: nothing to say, and nobody to say it to
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(
            f"scaletune: `{error.filename}`: {error.strerror}"
            if error.filename
            else f"scaletune: {error}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(
            "scaletune: interrupted; what was trained is on record, the same command carries on",
            file=sys.stderr,
        )
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _stop(number: int, frame: object) -> None:
    """The first interrupt: stop in good order. The kernel takes the next, even where we wait for a disk or a lock."""
    for each in STOPS:
        signal.signal(each, signal.SIG_DFL)
    said = "scaletune: stopping in good order; a second interrupt stops at once"
    os.write(
        2, (f"\r{said}\r" if os.isatty(2) else f"{said}\n").encode()
    )  # print may be what was interrupted; under a table, no line more
    raise KeyboardInterrupt
