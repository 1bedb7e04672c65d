"""The command line: one function a command, each `(arguments) -> (plain values for --json, lines for people)`.

Exits 0; 2 on the user's error, with one line on stderr; 130 when interrupted. Only the answer goes to stdout.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence

from scaletune.cli.parsing import parser
from scaletune.errors import UserError, nearest


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to stop us: as clean as Ctrl-C
    try:
        whole, known = parser()
        if argv and not argv[0].startswith("-") and argv[0] not in known:  # where argparse would list them all
            raise UserError(f"unknown command `{argv[0]}`{nearest(argv[0], known)}")
        args = whole.parse_args(argv)
        answer, lines = args.act(args)
        print(json.dumps(answer, allow_nan=False) if args.json else "\n".join(lines), flush=True)
    except UserError as error:
        print(f"scaletune: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output left: nothing to say, and nobody to say it to
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"scaletune: `{error.filename}`: {error.strerror}" if error.filename else f"scaletune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scaletune: interrupted; what was trained is on record, the same command carries on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
