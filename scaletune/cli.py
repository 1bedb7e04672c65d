"""The command line: one function a command, each `(arguments) -> (plain values for --json, lines for people)`.

Exits 0; 2 on the user's error, with one line on stderr; 130 when interrupted. Only the answer goes to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from scaletune.errors import UserError, nearest

if TYPE_CHECKING:
    from scaletune.predicting import Prediction
    from scaletune.recipe import Recipe
    from scaletune.records import Fit

Answer = tuple[Any, list[str]]


def _run(args: argparse.Namespace) -> Answer:
    from scaletune import reporting, running

    answer = running.run(args.study, out=args.out, adopt=args.adopt, settings=args.set)
    return _strings(answer | {"fit": answer["fit"].to_dict()}), reporting.answer_lines(answer)


def _sweep(args: argparse.Namespace) -> Answer:
    from scaletune import recipe, sweeping

    asked = recipe.load(args.recipe, args.set)
    trials = sweeping.sweep(asked, out=args.out, adopt=args.adopt)
    counts = {status: int((trials["status"] == status).sum()) for status in ("done", "diverged", "failed")}
    done = trials[trials["status"] == "done"]
    columns = ["id", "width", "depth", "tokens", "lr", "seed", "loss"]
    best = done.nsmallest(1, "loss")[columns].to_dict("records")[0] if len(done) else None
    path = Path(args.out) / "sweeps" / f"{asked.name}.jsonl"
    lines = [f"{len(trials)} trials: " + ", ".join(f"{n} {status}" for status, n in counts.items()), f"records: {path}"]
    if best:
        lines.insert(1, f"best: loss {best['loss']:.4f} at width {best['width']}, lr {best['lr']:.4g}, {best['tokens']:,} tokens")
    return {"sweep": asked.name, "n_trials": len(trials), **counts, "best": best, "path": str(path)}, lines


def _status(args: argparse.Namespace) -> Answer:
    from scaletune import sweeping
    from scaletune.sweeping.standing import table

    now = sweeping.status(args.sweep, out=args.out)
    who = "{pid} on {host}, since {since}".format(**now["driver"]) if now["driver"] else "none: `scaletune sweep` or `run` carries on"
    return now, [*table(now), f"driver: {who}"]


def _export(args: argparse.Namespace) -> Answer:
    from scaletune import sweeping
    from scaletune.records import read_jsonl

    path = sweeping.export(args.sweep, out=args.out)
    n = len(read_jsonl(path))
    return {"path": str(path), "n_trials": n}, [f"{n} trials: {path}"]


def _records_of(source: Path, out: Path) -> tuple[Path, str | None, Path | None]:
    """(records, law, where the Fit goes) of a recipe or of a records file."""
    if source.suffix != ".toml":
        return source, None, None
    from scaletune import recipe

    asked = recipe.load(source)
    workbench, record = (out / "sweeps" / f"{asked.name}{suffix}" for suffix in (".db", ".jsonl"))
    return workbench if workbench.exists() else record, asked.fit.law, out / "fits" / f"{asked.name}.json"


def _fit(args: argparse.Namespace) -> Answer:
    from scaletune import fitting, importing, reporting

    records, law, path = _records_of(Path(args.source[0]), Path("."))
    table, guessed = importing.trials([records, *args.source[1:]], dict(args.map))
    made = fitting.fit(table, args.law or law or "lr_nd", holdout=args.holdout, fixed=dict(args.fix), level=args.level)
    made = dataclasses.replace(made, assumptions=[*made.assumptions, *guessed])
    path = Path(args.to) if args.to else path
    if path:
        made.write(path)
    lines = [*reporting.fit_lines(made), *(f"  guessed: {sentence}" for sentence in guessed)]
    lines += [f"written to {path}" if path else "not written: --out FILE keeps it"]
    beyond, best = _allocated(made)
    lines[-1:-1] = beyond
    answer = {"law": made.law, "status": made.status, "params": made.params, "objective": made.objective, "n_used": len(made.used)}
    return answer | best | {"n_dropped": len(made.dropped), "held_out": made.held_out, "path": str(path) if path else None}, lines


def _allocated(made: Fit) -> tuple[list[str], dict[str, Any]]:
    """How a loss law would spend ten times the compute of its largest run."""
    from scaletune.predicting import LOSS_LAWS, allocation

    if made.law not in LOSS_LAWS or min(made.solution["vector"][1:]) <= 0:
        return [], {}
    flops = (
        60.0 * max(n * d for n, d, _ in made.solution["points"])
        if "points" in made.solution
        else 60.0 * made.ranges["n_params"][1] * made.ranges["tokens"][1]
    )
    best = allocation(made, flops)
    (n, *ends), (a, *between) = best["n_params"], best["n_exponent"]
    said = (
        f"  compute-optimal at {flops:.3g} FLOPs: {n:.3g} parameters [{ends[0]:.3g}, {ends[1]:.3g}], {best['tokens'][0]:.3g} tokens, loss"
    )
    return [f"{said} {best['loss'][0]:.4g}; n_params ~ flops**{a:.3f} [{between[0]:.3f}, {between[1]:.3f}]"], {
        "allocation": {"flops": flops} | best
    }


def _predict(args: argparse.Namespace) -> Answer:
    from scaletune import laws, predicting

    options = {name: getattr(args, name) for name, column in laws.COLUMNS.items() if column.option}
    given = _given(args.given, {name: value for name, value in options.items() if value is not None})
    if args.fit and not args.law and (answer := _of_relation(args.fit, given)):
        return answer
    missing = [laws.columns.option(name) for name in ("n_params", "tokens") if name not in given]
    if missing and (args.fit or not args.law):
        raise UserError(f"predict: the following arguments are required: {', '.join(missing)}")
    found = predicting.predict(law=args.law, fit=args.fit, **given)
    wide = max([12, *(len(name) for made in found for name in made.values)])
    return {"predictions": [made.to_dict() for made in found]}, [_asked(given), *(line for made in found for line in _said(made, wide))]


def _of_relation(path: str, given: dict[str, Any]) -> Answer | None:
    """What a fitted relation between columns says at `given`; None for a fit of another kind."""
    from scaletune.predicting import FITTED
    from scaletune.records import Fit

    fit = Fit.read(path)
    if fit.law in FITTED:
        return None
    from scaletune import fitting

    fitting.known_law(fit.law)
    relation = fitting.solved_relation(fit, fitting.RELATIONS[fit.law])
    found = {key: value[0] for key, value in fitting.predict_relation(fit, relation, {k: [v] for k, v in given.items()}).items()}
    output, warnings = relation.output.name, [sentence for sentence in fit.status if sentence != "ok"]
    answer = {
        "law": fit.law, "lr": None, "batch_tokens": None, "loss": found["value"] if output == "loss" else None,
        "interval": {output: [found["low"], found["high"]]}, "band": {}, "warnings": warnings,
        "values": {output: found["value"]}, "units": {output: relation.output.means},
    }  # fmt: skip
    text = f"{fit.law}: {output} {found['value']:.5g} {relation.output.means}  interval [{found['low']:.4g}, {found['high']:.4g}]"
    return {"predictions": [answer]}, [text, *(f"  ! {warning}" for warning in warnings)]


def _said(made: Prediction, wide: int) -> list[str]:
    """A line a quantity, names `wide` letters wide, and a line a warning."""
    from scaletune.predicting import POINTS, batch_of

    points = [(name, unit, getattr(made, name)) for name, unit in POINTS.items()]
    lines = []
    for name, unit, value in points + [(name, made.units[name], value) for name, value in made.values.items()]:
        interval, band = made.interval.get(name), made.band.get(name)
        if value is not None:
            sure = f"  interval [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
            near = f"  near-optimal [{band[0]:.4g}, {band[1]:.4g}]" if band else ""
            beside = f"  {said}" if name == "lr" and (said := batch_of(made)) else ""
            lines.append(f"{made.law:24} {name:{wide}} {value:<12.5g} {unit}{sure}{near}{beside}")
    return [*lines, *(f"{'':24} ! {warning}" for warning in made.warnings)]


def _given(pairs: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """The options with every `NAME=VALUE` of `--given`, a number where it is one."""
    given = dict(options)
    for text in pairs:
        name, _, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not (name and value):
            raise UserError(f"`--given` must be NAME=VALUE, but got {text!r}")
        if name in given:
            raise UserError(f"`{name}` must be given once, but got {given[name]!r} and {value!r}")
        try:
            given[name] = float(value)
        except ValueError:
            given[name] = value
    return given


def _asked(given: dict[str, Any]) -> str:
    """`at 1e+09 parameters (non-embedding) and 2e+10 tokens`, then whatever else was given."""
    first = [
        f"{given[name]:.4g} {what}"
        for name, what in (("n_params", "parameters (non-embedding)"), ("tokens", "tokens"))
        if isinstance(given.get(name), float)
    ]
    others = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in given.items()
        if name not in ("n_params", "tokens")
    ]
    return "at " + (", ".join([" and ".join(first), *others] if first else others) or "what laws take by default")


def _laws(args: argparse.Namespace) -> Answer:
    from scaletune import laws

    chosen = {"kind": args.kind, "gives": args.gives, "text": args.text, "confirmed": args.confirmed}
    if args.id:
        if any(chosen.values()):
            raise UserError(
                f"`laws` takes an id or a choice of laws, but got both, `{args.id}` and --{next(n for n, v in chosen.items() if v)}"
            )
        return laws.law(args.id).to_dict(), [laws.describe(laws.law(args.id))]
    found = laws.select(**chosen)
    return [entry.to_dict() for entry in found], [laws.listing(found)]


def _transfer(args: argparse.Namespace) -> Answer:
    from scaletune import recipe, reporting, transferring
    from scaletune.records import Fit

    fit = Fit.read(args.fit)
    made = transferring.transfer(fit, recipe.load(args.target, args.set), args.to or ["granite", "recipe"], args.out, args.force)
    return made, [*reporting.transfer_lines(made, fit.level), "files:", *(f"  {path}" for path in made["files"])]


def _lint(args: argparse.Namespace) -> Answer:
    from scaletune.transferring import linting

    made = linting.lint(args.config)
    lines = [f"{found['rule']} at {found['at']}: {found['says']}; {found['fix']}" for found in made["findings"]]
    return made, [*lines, f"{made['path']} ({made['stack']}): {len(lines) or 'no'} known fault{'s' * (len(lines) != 1)}"]


def _plot(args: argparse.Namespace) -> Answer:
    from scaletune import plotting

    files = [str(path) for path in plotting.plot(args.source, args.out)]
    return {"files": files}, files


def _report(args: argparse.Namespace) -> Answer:
    from scaletune import reporting
    from scaletune.records import Fit

    path = reporting.report(Fit.read(args.fit), args.out)
    return {"path": str(path)}, [str(path)]


def _check(args: argparse.Namespace) -> Answer:
    from scaletune import checking, recipe
    from scaletune.checking.saying import lines

    asked, seeds = recipe.load(args.recipe, args.set), None if args.seeds is None else range(args.seeds)
    whole = [what for what in checking.CHECKS if what != "alignment" or args.over == "width"]
    found = {
        what: checking.check(asked, args.widths, seeds, over=args.over, depths=args.depths, what=what)
        for what in (whole if args.what == "all" else [args.what])
    }
    said = [line for each in found.values() for line in lines(each)]
    found = _finite(found)
    files = _kept(found, Path(args.out)) if args.out else []
    answer = found.get(args.what, {"what": "all", **found})
    return answer | ({"files": files} if args.out else {}), said + files


def _kept(found: dict[str, Any], out: Path) -> list[str]:
    """Each check as a picture and as JSON under `out`."""
    from scaletune.plotting import checks
    from scaletune.records import write_atomically

    files = []
    for what, each in found.items():
        picture, record = checks.plot(each, out), out / f"{what}.json"
        write_atomically(record, json.dumps(each, indent=1, allow_nan=False) + "\n")
        files += [str(picture), str(record)]
    return files


def _finite(value: Any) -> Any:
    """Inside plain containers null for what JSON has no number for: the slope of an activation that blew up."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _vocab_size(asked: Recipe) -> tuple[int, bool]:
    """Of the recipe's data, and whether they are here to be read; that of text otherwise."""
    from scaletune import counting, data, recipe

    source = asked.data.source
    known = source in (recipe.DIGITS, recipe.POWER_LAW) or (source != recipe.PYTHON_STDLIB and Path(source).exists())
    return (data.load(asked.data).vocab_size if known else counting.BYTES_TEXT_VOCAB), known


def _plan(args: argparse.Namespace) -> Answer:
    from scaletune import planning, recipe
    from scaletune.planning.saying import lines, study
    from scaletune.records import write_atomically
    from scaletune.transferring.own import toml

    target = recipe.load(args.target, args.set)
    made = planning.plan(
        target, args.budget, noise=args.noise, fit=args.fit, level=args.level, seeds=args.seeds,
        flops_per_second=args.flops_per_second, vocab_size=_vocab_size(target)[0],
    )  # fmt: skip
    answer, said = made.to_dict(), lines(made)
    if args.out:
        shared, cells = study(made, Path(args.out).parent, args.target)
        head = f"# Planned for {args.target} by a budget of {args.budget}; cells are trained as they stand.\n"
        write_atomically(Path(args.out), head + toml(shared) + "".join(f"\n[[cells]]\n{toml(cell)}" for cell in cells))
        answer, said = answer | {"path": args.out}, [*said, f"written to {args.out}: `scaletune run {args.out}`"]
    return answer, said


def _count(args: argparse.Namespace) -> Answer:
    from scaletune import counting, recipe

    asked = recipe.load(args.recipe, args.set)
    source, (vocab_size, known) = asked.data.source, _vocab_size(asked)
    rows = [counting.count(point, vocab_size) for point in recipe.points(asked)]
    total = {"trials": len(rows), "flops": sum(row["flops"] for row in rows), "seconds": sum(row["seconds"] for row in rows)}
    lines = [
        f"{'width':>6} {'depth':>5} {'n_params':>12} {'total':>12} {'tokens':>12} {'steps':>8} {'FLOPs':>9} {'memory':>9} {'seconds':>8}  trials"
    ]
    for row, n in _counted(rows):
        p, memory = row["params"], sum(row["memory_bytes"].values())
        lines.append(
            f"{row['width']:6} {row['depth']:5} {p['n_params']:12,} {p['n_params_total']:12,} {row['tokens']:12,} {row['steps']:8,}"
            f" {row['flops']:9.2e} {memory / 2**20:6.0f}MiB {row['seconds']:8.3g}  {n}"
        )
    lines += _first_counted(rows[0])
    if source != recipe.PYTHON_STDLIB and not known:
        lines.append(f"`{source}` is not here: counted with a vocabulary of {vocab_size}, that of text")
    lines.append(
        f"{total['trials']} trials, {total['flops']:.3g} FLOPs, about {total['seconds']:.0f} core seconds (a guess: 60 GFLOP/s and 2.5 ms a step)"
    )
    return {"points": rows, "total": total}, lines


def _first_counted(row: dict[str, Any]) -> list[str]:
    """The first point part by part: parameters, FLOPs a token, memory."""
    groups, flops, memory = row["params"], row["flops_per_token_by"], row["memory_bytes"]
    met = (
        f"; {groups['n_params_active']:,} of {groups['n_params']:,} outside embedding and head meet a token" if "experts" in groups else ""
    )
    named = {"six_n": "6N", "deepseek_m": "DeepSeek's M"}
    return [
        "of the first point:",
        "  parameters by group: " + ", ".join(f"{name} {n:,}" for name, n in groups.items() if not name.startswith("n_params")) + met,
        "  training FLOPs a token: " + ", ".join(f"{named.get(name, name.replace('_', ' '))} {n:.4g}" for name, n in flops.items()),
        f"  memory: weights and optimizer {memory['weights_optimizer'] / 2**20:.4g} MiB, activations {memory['activations'] / 2**20:.4g} MiB;"
        f" moved each step at least {row['bytes_per_step'] / 2**20:.4g} MiB",
    ]


def _counted(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Points that cost the same (they differ in lr or seed) as one row with their number."""
    found: dict[str, tuple[dict[str, Any], int]] = {}
    for row in rows:
        key = json.dumps(row)
        found[key] = (row, found[key][1] + 1 if key in found else 1)
    return list(found.values())


def _strings(value: Any) -> Any:
    """Paths as strings, inside plain containers."""
    if isinstance(value, dict):
        return {key: _strings(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strings(v) for v in value]
    return str(value) if isinstance(value, Path) else value


class _Parser(argparse.ArgumentParser):
    """argparse that says one line and exits 2."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("scaletune").strip()
        raise UserError(f"{command}: {message}" if command else message)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number such as 1e9, but got {text!r}") from None


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 32,64,128, but got {text!r}") from None


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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="scaletune", description="Scaling laws and hyperparameter transfer: tune small proxies, predict the target, say how sure."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, act: Callable[[argparse.Namespace], Answer], about: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=about, description=about, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.set_defaults(act=act)
        made.add_argument("--json", action="store_true", help="plain values on stdout, nothing else there")
        return made

    def settings(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--set", action="append", default=[], metavar="A.B=C", help="put a setting over the file's, e.g. --set model.depth=4"
        )

    c = command(
        "run",
        _run,
        "The main job: sweep, fit, validate on a held-out cell, transfer, report. Resumes.",
        "scaletune run configs/quickstart.toml",
    )
    c.add_argument("study", help="a recipe with axes, and where wanted `holdout` and `target`")
    c.add_argument("--out", default=".", help="folder that gets sweeps/, fits/ and configs/ (default: here)")
    c.add_argument("--adopt", action="store_true", help="count the records of an existing .jsonl as trained here")
    settings(c)
    c = command(
        "laws", _laws, "The catalogue of published laws, a choice of it, or one in full.", "scaletune laws --kind allocation --confirmed"
    )
    c.add_argument("id", nargs="?")
    c.add_argument("--kind", help="learning_rate, batch, loss, ...: laws of that kind")
    c.add_argument("--gives", metavar="NAME", help="laws that answer with this, e.g. lr, batch_tokens, loss, weight_decay")
    c.add_argument("--text", help="laws that say this anywhere")
    c.add_argument("--confirmed", action="store_true", help="laws whose every coefficient was seen in a source")
    c = command(
        "predict",
        _predict,
        "The optimum at a scale, by published laws or by a fit.",
        "scaletune predict --n-params 1e9 --tokens 1e11 --law steplaw_lr_bs",
    )
    from scaletune.laws.columns import COLUMNS, option

    for name, column in COLUMNS.items():
        if column.option:
            c.add_argument(option(name), type=str if isinstance(column.example, str) else _number, help=column.means)
    c.add_argument(
        "--given", action="append", default=[], metavar="NAME=VALUE", help="any other quantity, or a coefficient that a law leaves open"
    )
    c.add_argument("--law", action="append", metavar="ID", help="a published law; may be repeated (default: all that give an lr)")
    c.add_argument("--fit", metavar="FIT.json", help="a fit written by `scaletune fit` or `run`")
    c = command(
        "plan",
        _plan,
        "Which proxies to train so that the target's predicted lr, batch and loss are tightest. Trains nothing.",
        "scaletune plan configs/quickstart-target.toml --budget 5% --out study.toml",
    )
    c.add_argument("target", metavar="TARGET.toml")
    c.add_argument("--budget", default="5%", help="a share of the target's FLOPs (5%%), FLOPs (1e18) or hours (2h) (default: 5%%)")
    c.add_argument("--noise", type=_number, help="sd of ln loss of one run (default: 0.001, or the fit's)")
    c.add_argument("--fit", metavar="FIT.json", help="an earlier fit of law joint: where to look")
    c.add_argument("--level", type=float, default=0.95, help="of every interval (default: 0.95)")
    c.add_argument("--seeds", type=int, default=1, help="runs of each point (default: 1)")
    c.add_argument("--flops-per-second", type=_number, help="what hours are guessed by (default: 6e10, a laptop core)")
    c.add_argument("--out", type=_file, metavar="STUDY.toml", help="the study, for `scaletune run`, `sweep` and `count`")
    settings(c)
    c = command(
        "count",
        _count,
        "Parameters, FLOPs, tokens, memory and seconds of every point. Trains nothing.",
        "scaletune count configs/quickstart.toml",
    )
    c.add_argument("recipe")
    settings(c)
    c = command(
        "check",
        _check,
        "Does this parametrization hold over width, or depth? Coordinates, sharpness, alignment, regime.",
        "scaletune check configs/quickstart.toml --widths 32,64,128 --what all --out checks",
    )
    c.add_argument("recipe")
    c.add_argument("--over", choices=["width", "depth"], default="width")
    c.add_argument("--widths", type=_whole_numbers, default=[32, 64, 128, 256], metavar="W,W,...")
    c.add_argument("--depths", type=_whole_numbers, default=[2, 4, 8, 16], metavar="L,L,...")
    c.add_argument("--what", choices=["coordinate", "sharpness", "alignment", "regime", "all"], default="coordinate")
    c.add_argument("--seeds", type=int, help="how many (default: 3 for the coordinate check, 2 for the others)")
    c.add_argument("--out", metavar="DIR", help="folder that gets each check as a picture and as JSON")
    settings(c)
    c = command(
        "sweep",
        _sweep,
        "Train every point of a recipe that is not on record.",
        "scaletune sweep configs/quickstart.toml --set model.depth=4",
    )
    c.add_argument("recipe")
    c.add_argument("--engine", choices=["local"], default="local", help="where trials run")
    c.add_argument("--out", default=".", help="folder that gets sweeps/ (default: here)")
    c.add_argument("--adopt", action="store_true", help="count the records of an existing .jsonl as trained here")
    settings(c)
    for name, act, about in (
        ("status", _status, "How a sweep stands, from another terminal: trials under way, done, failed, diverged, the best, time left."),
        ("export", _export, "Write a sweep's record NAME.jsonl from its workbench NAME.db, while it runs too."),
    ):
        c = command(name, act, about, f"scaletune {name} quickstart")
        c.add_argument("sweep", metavar="SWEEP", help="its name, its recipe, or its .db file")
        c.add_argument("--out", default=".", help="folder that has sweeps/ (default: here)")
    c = command("fit", _fit, "Fit a law to records.", "scaletune fit sweeps/quickstart.jsonl --law lr_nd --holdout 'n_params > 4e5'")
    c.add_argument(
        "source",
        nargs="+",
        metavar="RECIPE.toml | RECORDS",
        help="a sweep's recipe, or runs: .jsonl, .db, .csv, .parquet, or logs of W&B, TensorBoard, a Trainer or MLflow; several are merged",
    )
    c.add_argument(
        "--map", action="append", type=_mapped, default=[], metavar="COLUMN=NAME", help="what the records call a column, e.g. loss=eval/ce"
    )
    c.add_argument(
        "--law",
        help="lr_nd (default), lr_ndb, joint, loss_nd, chinchilla, or a relation between other columns: critical_batch, isoflop, ...",
    )
    c.add_argument(
        "--fix",
        action="append",
        type=_fixed,
        default=[],
        metavar="NAME=VALUE",
        help="hold a loss law's parameter, or tie exponents: beta=alpha",
    )
    c.add_argument("--holdout", metavar="EXPR", help="cells to judge on instead of fitting, e.g. 'n_params > 5e6 and tokens >= 1e9'")
    c.add_argument("--level", type=float, default=0.95, help="of every interval (default: 0.95)")
    c.add_argument("--out", dest="to", type=_file, metavar="FILE", help="where the fit is written (of a recipe: fits/NAME.json)")
    c = command(
        "transfer",
        _transfer,
        "Put a fit's answer into a target's configs.",
        "scaletune transfer fits/quickstart.json configs/quickstart-target.toml --to granite --force --out out",
    )
    c.add_argument("fit", metavar="FIT.json")
    c.add_argument("target", metavar="TARGET.toml")
    c.add_argument(
        "--to", action="append", metavar="FORMAT[@VERSION]", help="llama, torchtitan, ...; may be repeated (default: granite and recipe)"
    )
    c.add_argument("--force", action="store_true", help="transfer more than 30x outside the fitted range, and write so into the files")
    c.add_argument("--out", default="configs/transferred", metavar="DIR")
    settings(c)
    c = command("lint", _lint, "Known muP faults of a config, arguments or param groups that you have.", "scaletune lint config.json")
    c.add_argument("config", metavar="CONFIG", help=".json, .yaml, .toml, .py, a file of arguments, or a folder with a config.json")
    c = command("plot", _plot, "Pictures of a fit or of records.", "scaletune plot fits/quickstart.json --out plots")
    c.add_argument("source", metavar="FIT.json | RECORDS")
    c.add_argument("--out", default="plots", metavar="DIR")
    c = command("report", _report, "A fit as one HTML page.", "scaletune report fits/quickstart.json --out report.html")
    c.add_argument("fit", metavar="FIT.json")
    c.add_argument("--out", type=_file, default="report.html", metavar="FILE")
    return parser


def _known_command(argv: Sequence[str]) -> None:
    """A misspelt command names the nearest one, where argparse would list them all."""
    known = ("run", "laws", "predict", "plan", "count", "check", "sweep", "status", "export", "fit", "transfer", "lint", "plot", "report")
    if argv and not argv[0].startswith("-") and argv[0] not in known:
        raise UserError(f"unknown command `{argv[0]}`{nearest(argv[0], known)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to stop us: as clean as Ctrl-C
    try:
        _known_command(argv)
        args = _parser().parse_args(argv)
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
