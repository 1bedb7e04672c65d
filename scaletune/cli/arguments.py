"""The command-line parser: the commands, their arguments and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from scaletune import __version__
from scaletune.cli import ask_tell_commands, fit_commands, setup_commands, train_commands
from scaletune.errors import UserError

DESCRIPTION = (
    "Scaling laws and hyperparameter transfer: train small proxies, fit a law, predict the optimum"
    " at the target scale, with its uncertainty."
)
RELATIONS = (  # repeated here because importing the fitter takes a second
    *("annealing", "asymptote_n", "broken_flops", "critical_batch", "critical_batch_loss"),
    *("critical_batch_tokens", "error_of_loss", "frontier", "isoflop", "kaplan_n"),
    *("kaplan_trajectory", "learning_curve", "multi_power", "pass_rate", "repeated_tokens"),
    "seconds_per_step",
)


class Command(NamedTuple):
    """One command: the function that runs it, the function that adds its arguments, its help."""

    run: Callable[[argparse.Namespace], tuple[Any, list[str]]]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    help: str
    example: str


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line and exit with status 2."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("scaletune").strip()
        raise UserError(f"{command}: {message}" if command else message)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        message = f"must be a number such as 1e9, but got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _duration(text: str) -> float:
    """`2h` -> 7200.0 seconds."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
    try:
        seconds = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        message = f"must be a time such as 90s, 30m, 2h or 1d, but got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return seconds


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        message = f"must be whole numbers such as 32,64,128, but got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _file(text: str) -> str:
    if not Path(text).name:
        raise argparse.ArgumentTypeError(f"must name a file, but got {text!r}")
    return text


def _parameter(text: str) -> tuple[str, float | str]:
    """NAME=NUMBER fixes a parameter; NAME=NAME ties it to another."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, but got {text!r}")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def _column(text: str) -> tuple[str, str]:
    """NAME=COLUMN: a contract column, and the column of the records or an expression of them."""
    name, _, column = text.partition("=")
    if not name.strip() or not column.strip():
        raise argparse.ArgumentTypeError(f"must be NAME=COLUMN, but got {text!r}")
    return name.strip(), column.strip()


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override a recipe setting, e.g. --set model.depth=4; may be repeated",
    )


def _add_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--level",
        type=float,
        default=0.95,
        help="confidence level of all intervals (default: 0.95)",
    )


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--where",
        metavar="EXPR",
        help="rows to use, e.g. \"1e6 < n_params < 1e8 and optimizer in ('adamw', 'lion')\""
        " or '6*n_params*tokens > 1e18'; names such as `train/loss` go in backticks",
    )


def _add_adopt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adopt",
        action="store_true",
        help="accept the trials of an existing .jsonl record instead of training them again",
    )


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study", help="a recipe with `axes`; optional: `holdout`, `compare` and `target`"
    )
    parser.add_argument(
        "--out", default=".", help="folder for sweeps/, fits/ and configs/ (default: this folder)"
    )
    _add_adopt(parser)
    _add_settings(parser)


def _laws(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="?", help="show this law in full")
    parser.add_argument("--kind", help="laws of this kind: learning_rate, batch, loss, ...")
    parser.add_argument(
        "--gives", metavar="NAME", help="laws that give this quantity: lr, batch_tokens, loss, ..."
    )
    parser.add_argument("--text", help="laws whose entry contains this text")
    parser.add_argument(
        "--confirmed", action="store_true", help="laws whose coefficients were all read in a source"
    )


def _predict(parser: argparse.ArgumentParser) -> None:
    from scaletune.laws.columns import COLUMNS, option

    for name, column in COLUMNS.items():
        if column.option:
            kind = str if isinstance(column.example, str) else _number
            parser.add_argument(option(name), type=kind, help=column.means)
    parser.add_argument(
        "--given",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other quantity, or a coefficient that a law leaves open; may be repeated",
    )
    parser.add_argument(
        "--law",
        action="append",
        metavar="ID",
        help="a published law; may be repeated (default: every law that gives a learning rate)",
    )
    parser.add_argument("--fit", metavar="FIT.json", help="a fit from `scaletune fit` or `run`")


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET.toml", help="a recipe of the large model")
    parser.add_argument(
        "--budget",
        default="5%",
        help="a share of the target's FLOPs (5%%), FLOPs (1e18) or hours (2h) (default: 5%%)",
    )
    parser.add_argument(
        "--noise",
        type=_number,
        help="standard deviation of ln loss between equal runs (default: the fit's, or 0.001)",
    )
    parser.add_argument(
        "--fit", metavar="FIT.json", help="an earlier fit of law `joint`, to start from"
    )
    _add_level(parser)
    parser.add_argument("--seeds", type=int, default=1, help="runs per point (default: 1)")
    parser.add_argument(
        "--flops-per-second",
        type=_number,
        help="speed used to estimate hours (default: 6e10, one laptop core)",
    )
    parser.add_argument(
        "--out", type=_file, metavar="STUDY.toml", help="write the study for `scaletune run` here"
    )
    _add_settings(parser)


def _count(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe")
    _add_settings(parser)


def _check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe")
    parser.add_argument(
        "--over",
        choices=["width", "depth"],
        default="width",
        help="the size that the check varies (default: width)",
    )
    parser.add_argument(
        "--widths",
        type=_whole_numbers,
        default=[32, 64, 128, 256],
        metavar="W,W,...",
        help="widths to train (default: 32,64,128,256)",
    )
    parser.add_argument(
        "--depths",
        type=_whole_numbers,
        default=[2, 4, 8, 16],
        metavar="L,L,...",
        help="depths to train with `--over depth` (default: 2,4,8,16)",
    )
    parser.add_argument(
        "--what",
        choices=["coordinate", "sharpness", "alignment", "regime", "all"],
        default="coordinate",
        help="which check (default: coordinate)",
    )
    parser.add_argument(
        "--seeds", type=int, help="number of seeds (default: 3 for the coordinate check, else 2)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for a plot and a JSON file per check")
    _add_settings(parser)


def _sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe")
    parser.add_argument(
        "--engine",
        metavar="ENGINE",
        help="local, ray or slurm; overrides engine.kind of the recipe",
    )
    parser.add_argument("--out", default=".", help="folder for sweeps/ (default: this folder)")
    _add_adopt(parser)
    _add_settings(parser)


def _ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe")
    parser.add_argument(
        "-n", type=int, default=1, metavar="N", help="largest number of trials (default: 1)"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="also those that were handed out and have no result, and those that failed",
    )
    parser.add_argument(
        "--older-than",
        type=_duration,
        metavar="TIME",
        help="also those that were handed out longer ago than this: 90s, 30m, 2h, 1d",
    )
    parser.add_argument("--out", default=".", help="folder for sweeps/ (default: this folder)")
    _add_adopt(parser)
    _add_settings(parser)


def _tell(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe")
    parser.add_argument(
        "what",
        nargs="*",
        metavar="ID | FILE",
        help="the trial's id; files of JSON objects or JSON lines with `id`; a trial's results file"
        " (ID FILE, or RUNS/ID/results.jsonl); - for standard input",
    )
    numbers = {
        "--loss": "held-out loss; nan: the trial diverged",
        "--tokens": "training tokens at this loss; below the budget the trial goes on",
        "--train-loss": "training loss",
        "--n-params": "non-embedding parameters",
        "--n-params-total": "all parameters",
        "--flops": "training FLOPs",
        "--seconds": "training time",
    }
    for name, meaning in numbers.items():
        parser.add_argument(name, type=_number, metavar="X", help=meaning)
    parser.add_argument(
        "--status",
        metavar="STATUS",
        help="done, diverged, failed, stopped or running (default: by the loss)",
    )
    parser.add_argument("--message", metavar="TEXT", help="the reason, if it is not done")
    parser.add_argument(
        "--replace", action="store_true", help="replace another result that is recorded"
    )
    parser.add_argument("--out", default=".", help="folder for sweeps/ (default: this folder)")
    _add_settings(parser)


def _recorded(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help="name, recipe or .db file of the sweep")
    parser.add_argument(
        "--out", default=".", help="folder that contains sweeps/ (default: this folder)"
    )


def _fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="+",
        metavar="RECIPE.toml | RECORDS",
        help="the recipe of a sweep, or runs: .jsonl, .db, .csv, .parquet, or logs of W&B,"
        " TensorBoard, a Hugging Face Trainer or MLflow; several sources are merged",
    )
    parser.add_argument(
        "--map",
        action="append",
        type=_column,
        default=[],
        metavar="NAME=COLUMN",
        help="where your records have a column, e.g. loss=eval/ce, or how to compute it,"
        " e.g. 'n_params=1e6*size_millions' or 'loss=log(perplexity)'; may be repeated",
    )
    parser.add_argument(
        "--tokens-per-step",
        type=_number,
        metavar="N",
        help="tokens of one optimizer step, for runs that log steps and no tokens",
    )
    _add_where(parser)
    parser.add_argument(
        "--law",
        help="lr_nd (default), lr_ndb, joint, loss_nd, chinchilla, or a relation between other"
        f" columns: {', '.join(RELATIONS)}",
    )
    parser.add_argument(
        "--fix",
        action="append",
        type=_parameter,
        default=[],
        metavar="NAME=VALUE",
        help="fix a parameter of a loss law (alpha=0.34) or tie two (beta=alpha)",
    )
    parser.add_argument(
        "--holdout",
        metavar="EXPR",
        help="settings to validate on instead of fitting: 'n_params > 5e6 and tokens >= 1e9';"
        " any column, as in --where",
    )
    _add_level(parser)
    parser.add_argument(
        "--out",
        dest="to",
        type=_file,
        metavar="FILE",
        help="where to write the fit (default for a recipe: fits/NAME.json)",
    )


def _transfer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fit", metavar="FIT.json")
    parser.add_argument("target", metavar="TARGET.toml", help="a recipe of the large model")
    parser.add_argument(
        "--to",
        action="append",
        metavar="FORMAT[@VERSION]",
        help="llama, torchtitan, ...; may be repeated (default: granite and recipe;"
        " recipe alone where only your code knows the model)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="allow a target more than 30x outside the fitted range, or settings that no proxy had;"
        " the written files say so",
    )
    parser.add_argument(
        "--out",
        default="configs/transferred",
        metavar="DIR",
        help="folder to write to (default: configs/transferred)",
    )
    _add_settings(parser)


def _lint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help=".json, .yaml, .toml, .py, a file of arguments, or a folder with a config.json",
    )


def _plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FIT.json | RECORDS")
    _add_where(parser)
    parser.add_argument(
        "--out", default="plots", metavar="DIR", help="folder to write to (default: plots)"
    )


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fit", metavar="FIT.json")
    parser.add_argument(
        "--out",
        type=_file,
        default="report.html",
        metavar="FILE",
        help="file to write (default: report.html)",
    )


def _init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="folder for the examples")


def _completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", help="bash, zsh, fish, tcsh or powershell")


def _help(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("about", nargs="?", metavar="COMMAND", help="show the help of this command")


COMMANDS = (
    Command(
        train_commands.run,
        _run,
        "Run a whole study: sweep, fit, validate, transfer, report. Resumes.",
        "scaletune run configs/quickstart.toml",
    ),
    Command(
        fit_commands.laws,
        _laws,
        "List published laws, or show one in full.",
        "scaletune laws --kind allocation --confirmed",
    ),
    Command(
        fit_commands.predict,
        _predict,
        "Predict the optimum at a scale, with published laws or with a fit.",
        "scaletune predict --n-params 1e9 --tokens 1e11 --law steplaw_lr_bs",
    ),
    Command(
        train_commands.plan,
        _plan,
        "Choose the proxies that make the prediction for a target most precise. Trains nothing.",
        "scaletune plan configs/quickstart-target.toml --budget 5% --out study.toml",
    ),
    Command(
        train_commands.count,
        _count,
        "Count parameters, FLOPs, tokens, memory and seconds of each point. Trains nothing.",
        "scaletune count configs/quickstart.toml",
    ),
    Command(
        train_commands.check,
        _check,
        "Check a parametrization over width or depth: coordinates, sharpness, alignment, regime.",
        "scaletune check configs/quickstart.toml --widths 32,64,128 --what all --out checks",
    ),
    Command(
        train_commands.sweep,
        _sweep,
        "Train the points of a recipe that are not recorded yet. Resumes.",
        "scaletune sweep configs/quickstart.toml --set model.depth=4",
    ),
    Command(
        ask_tell_commands.ask,
        _ask,
        "Hand out the next trials of a recipe that others train, with `trainer.external`.",
        "scaletune ask mine.toml -n 4 --json",
    ),
    Command(
        ask_tell_commands.tell,
        _tell,
        "Record the result of a trial that `scaletune ask` has handed out.",
        "scaletune tell mine.toml 6b86b273ff34fce1 --loss 3.21",
    ),
    Command(
        train_commands.status,
        _recorded,
        "Show the progress of a sweep that runs in another terminal.",
        "scaletune status quickstart",
    ),
    Command(
        train_commands.export,
        _recorded,
        "Write the record NAME.jsonl from the database NAME.db, also while the sweep runs.",
        "scaletune export quickstart",
    ),
    Command(
        fit_commands.fit,
        _fit,
        "Fit a law to records.",
        "scaletune fit sweeps/quickstart.jsonl --law lr_nd --holdout 'n_params > 4e5'",
    ),
    Command(
        fit_commands.transfer,
        _transfer,
        "Write training configs for a target from a fit.",
        "scaletune transfer fits/quickstart.json configs/quickstart-target.toml"
        " --to granite --force --out out",
    ),
    Command(
        fit_commands.lint,
        _lint,
        "Find known muP mistakes in a config, in arguments or in parameter groups.",
        "scaletune lint config.json",
    ),
    Command(
        fit_commands.plot,
        _plot,
        "Plot a fit or records.",
        "scaletune plot fits/quickstart.json --out plots",
    ),
    Command(
        fit_commands.report,
        _report,
        "Write a fit as one HTML page.",
        "scaletune report fits/quickstart.json --out report.html",
    ),
    Command(
        setup_commands.init,
        _init,
        "Write the example recipes and targets to a folder.",
        "scaletune init my-study",
    ),
    Command(
        setup_commands.completion,
        _completion,
        "Print a completion script for a shell.",
        "scaletune completion bash",
    ),
    Command(
        setup_commands.help,
        _help,
        "Show this help, or the help of a command.",
        "scaletune help fit",
    ),
)


def build_parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """Builds the parser of all commands, and lists the names of the commands."""
    parser = _Parser(
        prog="scaletune",
        description=DESCRIPTION,
        epilog="`scaletune help COMMAND` shows the arguments of a command and an example.",
    )
    parser.add_argument("--version", action="version", version=f"scaletune {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    for command in COMMANDS:
        added = commands.add_parser(
            command.run.__name__,
            help=command.help,
            description=command.help,
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run_command=command.run, parser=parser)
        added.add_argument("--json", action="store_true", help="print JSON only")
        command.add_arguments(added)
    return parser, list(commands.choices)
