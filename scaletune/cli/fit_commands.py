"""Commands that learn from records and use what was learned: fit, predict, laws, transfer, lint, plot, report."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError, nearest

if TYPE_CHECKING:
    from scaletune.fitting.relations import Relation
    from scaletune.predicting import Prediction
    from scaletune.records import Fit

Answer = tuple[Any, list[str]]


def _records_of(source: Path, out: Path) -> tuple[Path, str | None, Path | None]:
    """(records, law, where the Fit goes) of a recipe or of a records file."""
    if source.suffix != ".toml":
        return source, None, None
    from scaletune import recipe

    asked = recipe.load(source)
    workbench, record = (out / "sweeps" / f"{asked.name}{suffix}" for suffix in (".db", ".jsonl"))
    return (
        workbench if workbench.exists() else record,
        asked.fit.law,
        out / "fits" / f"{asked.name}.json",
    )


def fit(args: argparse.Namespace) -> Answer:
    from scaletune import fitting, importing, reporting

    records, law, path = _records_of(Path(args.source[0]), Path("."))
    table, guessed = importing.trials([records, *args.source[1:]], dict(args.map))
    made = fitting.fit(
        table,
        args.law or law or "lr_nd",
        holdout=args.holdout,
        fixed=dict(args.fix),
        level=args.level,
    )
    made = dataclasses.replace(made, assumptions=[*made.assumptions, *guessed])
    path = Path(args.to) if args.to else path
    if path:
        made.write(path)
    lines = [*reporting.fit_lines(made), *(f"  guessed: {sentence}" for sentence in guessed)]
    lines += [f"written to {path}" if path else "not written: --out FILE keeps it"]
    beyond, best = _allocated(made)
    lines[-1:-1] = beyond
    answer = {
        "law": made.law,
        "status": made.status,
        "params": made.params,
        "objective": made.objective,
        "n_used": len(made.used),
    }
    return answer | best | {
        "n_dropped": len(made.dropped),
        "held_out": made.held_out,
        "path": str(path) if path else None,
    }, lines


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
    said = f"  compute-optimal at {flops:.3g} FLOPs: {n:.3g} parameters [{ends[0]:.3g}, {ends[1]:.3g}], {best['tokens'][0]:.3g} tokens, loss"
    return [
        f"{said} {best['loss'][0]:.4g}; n_params ~ flops**{a:.3f} [{between[0]:.3f}, {between[1]:.3f}]"
    ], {"allocation": {"flops": flops} | best}


def predict(args: argparse.Namespace) -> Answer:
    from scaletune import laws, predicting

    options = {name: getattr(args, name) for name, column in laws.COLUMNS.items() if column.option}
    given = _given(
        args.given, {name: value for name, value in options.items() if value is not None}
    )
    if args.fit and not args.law and (answer := _of_relation(args.fit, given)):
        return answer
    missing = [laws.columns.option(name) for name in ("n_params", "tokens") if name not in given]
    if missing and (args.fit or not args.law):
        raise UserError(f"predict: the following arguments are required: {', '.join(missing)}")
    found = predicting.predict(law=args.law, fit=args.fit, **given)
    wide = max([12, *(len(name) for made in found for name in made.values)])
    return {"predictions": [made.to_dict() for made in found]}, [
        _asked(given),
        *(line for made in found for line in _said(made, wide)),
    ]


def _of_relation(path: str, given: dict[str, Any]) -> Answer | None:
    """What a fitted relation between columns says at `given`; None for a fit of another kind."""
    from scaletune.predicting import FITTED, distance
    from scaletune.records import Fit

    fit = Fit.read(path)
    if fit.law in FITTED:
        return None
    from scaletune import fitting

    fitting.known_law(fit.law)
    own = fitting.RELATIONS[fit.law]
    fit = fitting.of_group(fit, own, given)
    relation = fitting.solved_relation(fit, own)
    columns = _columns(
        relation,
        {
            name: value
            for name, value in given.items()
            if name not in own.groups or relation is not own
        },
        fit.law,
    )
    found = {
        key: value[-1] for key, value in fitting.predict_relation(fit, relation, columns).items()
    }
    output, warnings = (
        relation.output.name,
        [sentence for sentence in fit.status if sentence != "ok"],
    )
    warnings += distance(fit, {name: column[-1] for name, column in columns.items()})
    answer = {
        "law": fit.law, "lr": None, "batch_tokens": None, "loss": found["value"] if output == "loss" else None,
        "interval": {output: [found["low"], found["high"]]}, "band": {}, "warnings": warnings,
        "values": {output: found["value"]}, "units": {output: relation.output.means},
    }  # fmt: skip
    text = f"{fit.law}: {output} {found['value']:.5g} {relation.output.means}  interval [{found['low']:.4g}, {found['high']:.4g}]"
    return {"predictions": [answer]}, [text, *(f"  ! {warning}" for warning in warnings)]


def _columns(relation: Relation, given: dict[str, Any], law: str) -> dict[str, Any]:
    """What a relation is asked by, as columns: a row of them, or the rows of a whole lr schedule."""
    from scaletune.fitting.relations import schedule
    from scaletune.laws.schedules import lr_schedule

    names = [column.name for column in relation.inputs]
    whole = (
        {"lr_schedule": given.pop("lr_schedule")}
        if "lr_schedule" in given and relation.prepare
        else {}
    )
    other = next((name for name in given if name not in names), None)
    if other and (whole or given.keys() >= set(names)):
        raise UserError(
            f"a fit of {law!r} is asked by {', '.join(names)} alone, but got {other}{nearest(other, names)}"
        )
    if relation.prepare and not whole:
        raise UserError(
            f"a fit of {law!r} is asked by the whole schedule of a run: give --lr-schedule"
        )
    return (
        dict(schedule.logged(lr_schedule(whole["lr_schedule"])))
        if whole
        else {name: [value] for name, value in given.items()}
    )


def _said(made: Prediction, wide: int) -> list[str]:
    """A line a quantity, names `wide` letters wide, and a line a warning."""
    from scaletune.predicting import POINTS, batch_of

    points = [(name, unit, getattr(made, name)) for name, unit in POINTS.items()]
    lines = []
    for name, unit, value in points + [
        (name, made.units[name], value) for name, value in made.values.items()
    ]:
        interval, band = made.interval.get(name), made.band.get(name)
        if value is not None:
            sure = f"  interval [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
            near = f"  near-optimal [{band[0]:.4g}, {band[1]:.4g}]" if band else ""
            beside = f"  {said}" if name == "lr" and (said := batch_of(made)) else ""
            lines.append(f"{made.law:24} {name:{wide}} {value:<12.5g} {unit}{sure}{near}{beside}")
    return [
        *(lines or [f"{made.law:24} gives nothing here"]),
        *(f"{'':24} ! {warning}" for warning in made.warnings),
    ]


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
    return "at " + (
        ", ".join([" and ".join(first), *others] if first else others)
        or "what laws take by default"
    )


def laws(args: argparse.Namespace) -> Answer:
    from scaletune import laws

    chosen = {
        "kind": args.kind,
        "gives": args.gives,
        "text": args.text,
        "confirmed": args.confirmed,
    }
    if args.id:
        if any(chosen.values()):
            raise UserError(
                f"`laws` takes an id or a choice of laws, but got both, `{args.id}` and --{next(n for n, v in chosen.items() if v)}"
            )
        return laws.law(args.id).to_dict(), [laws.describe(laws.law(args.id))]
    found = laws.select(**chosen)
    return [entry.to_dict() for entry in found], [laws.listing(found)]


def transfer(args: argparse.Namespace) -> Answer:
    from scaletune import recipe, reporting, transferring
    from scaletune.records import Fit

    fit = Fit.read(args.fit)
    made = transferring.transfer(
        fit,
        recipe.load(args.target, args.set),
        args.to or ["granite", "recipe"],
        args.out,
        args.force,
    )
    return made, [
        *reporting.transfer_lines(made, fit.level),
        "files:",
        *(f"  {path}" for path in made["files"]),
    ]


def lint(args: argparse.Namespace) -> Answer:
    from scaletune.linting import lint as lint_config

    made = lint_config(args.config)
    lines = [
        f"{found['rule']} at {found['at']}: {found['says']}; {found['fix']}"
        for found in made["findings"]
    ]
    known = (
        "stack not recognised, so few rules apply" if made["stack"] == "unknown" else made["stack"]
    )
    return made, [
        *lines,
        f"{made['path']} ({known}): {len(lines) or 'no'} known fault{'s' * (len(lines) != 1)}",
    ]


def plot(args: argparse.Namespace) -> Answer:
    from scaletune import plotting

    files = [str(path) for path in plotting.plot(args.source, args.out)]
    return {"files": files}, files


def report(args: argparse.Namespace) -> Answer:
    from scaletune import reporting
    from scaletune.records import Fit

    path = reporting.report(Fit.read(args.fit), args.out)
    return {"path": str(path)}, [str(path)]
