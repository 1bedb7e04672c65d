"""What may be asked on the command line, and of which command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from scaletune.cli import fit_commands, train_commands
from scaletune.errors import UserError


class _Parser(argparse.ArgumentParser):
    """argparse that says one line and exits 2."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("scaletune").strip()
        raise UserError(f"{command}: {message}" if command else message)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number such as 1e9, but got {text!r}"
        ) from None


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers such as 32,64,128, but got {text!r}"
        ) from None


def _file(text: str) -> str:
    if not Path(text).name:
        raise argparse.ArgumentTypeError(f"must name a file, but got {text!r}")
    return text


def _fixed(text: str) -> tuple[str, float | str]:
    """NAME=NUMBER or NAME=NAME."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, but got {text!r}")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def _mapped(text: str) -> tuple[str, str]:
    """COLUMN=NAME, a column of the contract and what the records call it."""
    column, _, name = text.partition("=")
    if not column or not name:
        raise argparse.ArgumentTypeError(f"must be COLUMN=NAME, but got {text!r}")
    return column, name


def _settings(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="put a setting over the file's, e.g. --set model.depth=4",
    )


def _run(c: argparse.ArgumentParser) -> None:
    c.add_argument("study", help="a recipe with axes, and where wanted `holdout` and `target`")
    c.add_argument(
        "--out", default=".", help="folder that gets sweeps/, fits/ and configs/ (default: here)"
    )
    c.add_argument(
        "--adopt",
        action="store_true",
        help="count the records of an existing .jsonl as trained here",
    )
    _settings(c)


def _laws(c: argparse.ArgumentParser) -> None:
    c.add_argument("id", nargs="?")
    c.add_argument("--kind", help="learning_rate, batch, loss, ...: laws of that kind")
    c.add_argument(
        "--gives",
        metavar="NAME",
        help="laws that answer with this, e.g. lr, batch_tokens, loss, weight_decay",
    )
    c.add_argument("--text", help="laws that say this anywhere")
    c.add_argument(
        "--confirmed", action="store_true", help="laws whose every coefficient was seen in a source"
    )


def _predict(c: argparse.ArgumentParser) -> None:
    from scaletune.laws.columns import COLUMNS, option

    for name, column in COLUMNS.items():
        if column.option:
            c.add_argument(
                option(name),
                type=str if isinstance(column.example, str) else _number,
                help=column.means,
            )
    c.add_argument(
        "--given",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other quantity, or a coefficient that a law leaves open",
    )
    c.add_argument(
        "--law",
        action="append",
        metavar="ID",
        help="a published law; may be repeated (default: all that give an lr)",
    )
    c.add_argument("--fit", metavar="FIT.json", help="a fit written by `scaletune fit` or `run`")


def _plan(c: argparse.ArgumentParser) -> None:
    c.add_argument("target", metavar="TARGET.toml")
    c.add_argument(
        "--budget",
        default="5%",
        help="a share of the target's FLOPs (5%%), FLOPs (1e18) or hours (2h) (default: 5%%)",
    )
    c.add_argument(
        "--noise", type=_number, help="sd of ln loss of one run (default: 0.001, or the fit's)"
    )
    c.add_argument("--fit", metavar="FIT.json", help="an earlier fit of law joint: where to look")
    c.add_argument("--level", type=float, default=0.95, help="of every interval (default: 0.95)")
    c.add_argument("--seeds", type=int, default=1, help="runs of each point (default: 1)")
    c.add_argument(
        "--flops-per-second",
        type=_number,
        help="what hours are guessed by (default: 6e10, a laptop core)",
    )
    c.add_argument(
        "--out",
        type=_file,
        metavar="STUDY.toml",
        help="the study, for `scaletune run`, `sweep` and `count`",
    )
    _settings(c)


def _count(c: argparse.ArgumentParser) -> None:
    c.add_argument("recipe")
    _settings(c)


def _check(c: argparse.ArgumentParser) -> None:
    c.add_argument("recipe")
    c.add_argument("--over", choices=["width", "depth"], default="width")
    c.add_argument("--widths", type=_whole_numbers, default=[32, 64, 128, 256], metavar="W,W,...")
    c.add_argument("--depths", type=_whole_numbers, default=[2, 4, 8, 16], metavar="L,L,...")
    c.add_argument(
        "--what",
        choices=["coordinate", "sharpness", "alignment", "regime", "all"],
        default="coordinate",
    )
    c.add_argument(
        "--seeds", type=int, help="how many (default: 3 for the coordinate check, 2 for the others)"
    )
    c.add_argument(
        "--out", metavar="DIR", help="folder that gets each check as a picture and as JSON"
    )
    _settings(c)


def _sweep(c: argparse.ArgumentParser) -> None:
    c.add_argument("recipe")
    c.add_argument(
        "--engine",
        metavar="ENGINE",
        help="where trials run, in place of the recipe's engine.kind: local, ray, slurm",
    )
    c.add_argument("--out", default=".", help="folder that gets sweeps/ (default: here)")
    c.add_argument(
        "--adopt",
        action="store_true",
        help="count the records of an existing .jsonl as trained here",
    )
    _settings(c)


def _recorded(c: argparse.ArgumentParser) -> None:
    c.add_argument("sweep", metavar="SWEEP", help="its name, its recipe, or its .db file")
    c.add_argument("--out", default=".", help="folder that has sweeps/ (default: here)")


RELATIONS = (  # here too, as the fitter takes a second to import
    "annealing", "asymptote_n", "broken_flops", "critical_batch", "critical_batch_loss", "critical_batch_tokens", "error_of_loss", "frontier",
    "isoflop", "kaplan_n", "kaplan_trajectory", "learning_curve", "multi_power", "pass_rate", "repeated_tokens", "seconds_per_step",
)  # fmt: skip


def _fit(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "source",
        nargs="+",
        metavar="RECIPE.toml | RECORDS",
        help="a sweep's recipe, or runs: .jsonl, .db, .csv, .parquet, or logs of W&B, TensorBoard, a Trainer or MLflow; several are merged",
    )
    c.add_argument(
        "--map",
        action="append",
        type=_mapped,
        default=[],
        metavar="COLUMN=NAME",
        help="what the records call a column, e.g. loss=eval/ce",
    )
    c.add_argument(
        "--law",
        help="lr_nd (default), lr_ndb, joint, loss_nd, chinchilla, or a relation between other columns: "
        + ", ".join(RELATIONS),
    )
    c.add_argument(
        "--fix",
        action="append",
        type=_fixed,
        default=[],
        metavar="NAME=VALUE",
        help="hold a loss law's parameter, or tie exponents: beta=alpha",
    )
    c.add_argument(
        "--holdout",
        metavar="EXPR",
        help="cells to judge on instead of fitting, e.g. 'n_params > 5e6 and tokens >= 1e9'",
    )
    c.add_argument("--level", type=float, default=0.95, help="of every interval (default: 0.95)")
    c.add_argument(
        "--out",
        dest="to",
        type=_file,
        metavar="FILE",
        help="where the fit is written (of a recipe: fits/NAME.json)",
    )


def _transfer(c: argparse.ArgumentParser) -> None:
    c.add_argument("fit", metavar="FIT.json")
    c.add_argument("target", metavar="TARGET.toml")
    c.add_argument(
        "--to",
        action="append",
        metavar="FORMAT[@VERSION]",
        help="llama, torchtitan, ...; may be repeated (default: granite and recipe)",
    )
    c.add_argument(
        "--force",
        action="store_true",
        help="transfer more than 30x outside the fitted range, or to what no proxy had, and write so into the files",
    )
    c.add_argument("--out", default="configs/transferred", metavar="DIR")
    _settings(c)


def _lint(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "config",
        metavar="CONFIG",
        help=".json, .yaml, .toml, .py, a file of arguments, or a folder with a config.json",
    )


def _plot(c: argparse.ArgumentParser) -> None:
    c.add_argument("source", metavar="FIT.json | RECORDS")
    c.add_argument("--out", default="plots", metavar="DIR")


def _report(c: argparse.ArgumentParser) -> None:
    c.add_argument("fit", metavar="FIT.json")
    c.add_argument("--out", type=_file, default="report.html", metavar="FILE")


COMMANDS = (  # what acts, what it reads, what it is for, an example
    (
        train_commands.run,
        _run,
        "The main job: sweep, fit, validate on a held-out cell, transfer, report. Resumes.",
        "scaletune run configs/quickstart.toml",
    ),
    (
        fit_commands.laws,
        _laws,
        "The catalogue of published laws, a choice of it, or one in full.",
        "scaletune laws --kind allocation --confirmed",
    ),
    (
        fit_commands.predict,
        _predict,
        "The optimum at a scale, by published laws or by a fit.",
        "scaletune predict --n-params 1e9 --tokens 1e11 --law steplaw_lr_bs",
    ),
    (
        train_commands.plan,
        _plan,
        "Which proxies to train so that the target's predicted lr, batch and loss are tightest. Trains nothing.",
        "scaletune plan configs/quickstart-target.toml --budget 5% --out study.toml",
    ),
    (
        train_commands.count,
        _count,
        "Parameters, FLOPs, tokens, memory and seconds of every point. Trains nothing.",
        "scaletune count configs/quickstart.toml",
    ),
    (
        train_commands.check,
        _check,
        "Does this parametrization hold over width, or depth? Coordinates, sharpness, alignment, regime.",
        "scaletune check configs/quickstart.toml --widths 32,64,128 --what all --out checks",
    ),
    (
        train_commands.sweep,
        _sweep,
        "Train every point of a recipe that is not on record.",
        "scaletune sweep configs/quickstart.toml --set model.depth=4",
    ),
    (
        train_commands.status,
        _recorded,
        "How a sweep stands, from another terminal: trials under way, done, failed, diverged, the best, time left.",
        "scaletune status quickstart",
    ),
    (
        train_commands.export,
        _recorded,
        "Write a sweep's record NAME.jsonl from its workbench NAME.db, while it runs too.",
        "scaletune export quickstart",
    ),
    (
        fit_commands.fit,
        _fit,
        "Fit a law to records.",
        "scaletune fit sweeps/quickstart.jsonl --law lr_nd --holdout 'n_params > 4e5'",
    ),
    (
        fit_commands.transfer,
        _transfer,
        "Put a fit's answer into a target's configs.",
        "scaletune transfer fits/quickstart.json configs/quickstart-target.toml --to granite --force --out out",
    ),
    (
        fit_commands.lint,
        _lint,
        "Known muP faults of a config, arguments or param groups that you have.",
        "scaletune lint config.json",
    ),
    (
        fit_commands.plot,
        _plot,
        "Pictures of a fit or of records.",
        "scaletune plot fits/quickstart.json --out plots",
    ),
    (
        fit_commands.report,
        _report,
        "A fit as one HTML page.",
        "scaletune report fits/quickstart.json --out report.html",
    ),
)


def parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and the names of the commands."""
    whole = _Parser(
        prog="scaletune",
        description="Scaling laws and hyperparameter transfer: tune small proxies, predict the target, say how sure.",
    )
    commands = whole.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    for act, reads, about, example in COMMANDS:
        made = commands.add_parser(
            act.__name__,
            help=about,
            description=about,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(act=act)
        made.add_argument(
            "--json", action="store_true", help="plain values on stdout, nothing else there"
        )
        reads(made)
    return whole, list(commands.choices)
