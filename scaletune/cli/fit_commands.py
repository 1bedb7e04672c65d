"""Commands that fit laws and use them: fit, predict, laws, transfer, lint, plot, report."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError, nearest
from scaletune.units import human

if TYPE_CHECKING:
    from scaletune.counting.point_sizes import Measure
    from scaletune.fitting.relations import Relation
    from scaletune.predicting import Prediction
    from scaletune.recipe import Recipe
    from scaletune.records import Fit

Answer = tuple[Any, list[str]]
COUNTS = ("params", "tokens", "flops", "steps")
BEYOND = 60.0  # ten times 6 * n_params * tokens, the training FLOPs of the largest run


def _records_of(source: Path, out: Path) -> tuple[Path, str | None, Path | None]:
    """The records, the law and the file of the fit that belong to a recipe or to a records file."""
    if source.suffix != ".toml":
        return source, None, None
    from scaletune import recipe

    loaded = recipe.load(source)
    database, record = (out / "sweeps" / f"{loaded.name}{suffix}" for suffix in (".db", ".jsonl"))
    records = database if database.exists() else record
    return records, loaded.fit.law, out / "fits" / f"{loaded.name}.json"


def fit(args: argparse.Namespace) -> Answer:
    """`scaletune fit`."""
    from scaletune import fitting, importing, reporting
    from scaletune.fitting.drop_reasons import group_reasons

    records, law, path = _records_of(Path(args.source[0]), Path("."))
    law = args.law or law or "lr_nd"
    fitting.require_known_law(law)
    table, guesses = importing.trials(
        [records, *args.source[1:]],
        dict(args.map),
        tokens_per_step=args.tokens_per_step,
        every_row=fitting.reads_every_row(law),
    )
    fitted = fitting.fit(
        table,
        law,
        where=args.where,
        holdout=args.holdout,
        fixed=dict(args.fix),
        level=args.level,
    )
    fitted = dataclasses.replace(fitted, assumptions=[*fitted.assumptions, *guesses])
    path = Path(args.to) if args.to else path
    if path:
        fitted.write(path)
    allocation_lines, allocation = _allocation(fitted)
    assumed = fitted.assumptions if law in fitting.RELATIONS else guesses
    lines = [*reporting.fit_lines(fitted), *(f"  assumed: {sentence}" for sentence in assumed)]
    lines += [*allocation_lines, f"written to {path}" if path else "not saved: use --out FILE"]
    return {
        "law": fitted.law,
        "status": fitted.status,
        "params": fitted.params,
        "objective": fitted.objective,
        "n_used": len(fitted.used),
        **allocation,
        "n_dropped": len(fitted.dropped),
        "dropped": {kind.reason: kind.runs for kind in group_reasons(fitted.dropped)},
        "held_out": fitted.held_out,
        "path": str(path) if path else None,
    }, lines


def _allocation(fitted: Fit) -> tuple[list[str], dict[str, Any]]:
    """The compute-optimal allocation of a loss law at ten times the compute of its largest run."""
    from scaletune.predicting import LOSS_LAWS, allocation

    if fitted.law not in LOSS_LAWS or min(fitted.solution["vector"][1:]) <= 0:
        return [], {}
    if columns := fitted.solution.get("unmeasured", {}).get("columns"):
        names = " and ".join(f"`{name}`" for name in columns)
        return [f"  compute-optimal: not identified, the runs do not measure {names}"], {}
    if "points" in fitted.solution:
        flops = BEYOND * max(n * d for n, d, _ in fitted.solution["points"])
    else:
        flops = BEYOND * fitted.ranges["n_params"][1] * fitted.ranges["tokens"][1]
    best = allocation(fitted, flops)
    (n, *n_interval), (a, *a_interval) = best["n_params"], best["n_exponent"]
    line = (
        f"  compute-optimal at {flops:.3g} FLOPs: {human(n)} parameters"
        f" ({human(n_interval[0])} to {human(n_interval[1])}), {human(best['tokens'][0])} tokens,"
        f" loss {best['loss'][0]:.4g}; n_params ~ flops**{a:.3f}"
        f" ({a_interval[0]:.3f} to {a_interval[1]:.3f})"
    )
    return [line], {"allocation": {"flops": flops} | best}


def predict(args: argparse.Namespace) -> Answer:
    """`scaletune predict`."""
    from scaletune import laws, predicting

    options = {name: getattr(args, name) for name, column in laws.COLUMNS.items() if column.option}
    given = _given(args.given, {name: v for name, v in options.items() if v is not None})
    if args.fit and not args.law and (answer := _predict_relation(args.fit, given)):
        return answer
    missing = [laws.columns.option(name) for name in ("n_params", "tokens") if name not in given]
    if missing and (args.fit or not args.law):
        raise UserError(f"predict: the following arguments are required: {', '.join(missing)}")
    predictions = predicting.predict(law=args.law, fit=args.fit, **given)
    width = max([12, *(len(name) for each in predictions for name in each.values)])
    lines = [line for each in predictions for line in _prediction_lines(each, width)]
    return {"predictions": [each.to_dict() for each in predictions]}, [_scale_line(given), *lines]


def _predict_relation(path: str, given: dict[str, Any]) -> Answer | None:
    """The prediction of a fitted relation between columns; None for a fit of another kind."""
    from scaletune.predicting import FITTED, extrapolation_warnings
    from scaletune.records import Fit

    fitted = Fit.read(path)
    if fitted.law in FITTED:
        return None
    from scaletune import fitting

    fitting.require_known_law(fitted.law)
    declared = fitting.RELATIONS[fitted.law]
    fitted = fitting.select_group(fitted, declared, given)
    relation = fitting.fitted_relation(fitted, declared)
    groups = declared.groups if relation is declared else ()
    inputs = {name: value for name, value in given.items() if name not in groups}
    columns = _columns(relation, inputs, fitted.law)
    predicted = fitting.predict_relation(fitted, relation, columns)
    value, low, high = (predicted[key][-1] for key in ("value", "low", "high"))
    output, unit = relation.output.name, relation.output.description
    warnings = [sentence for sentence in fitted.status if sentence != "ok"]
    warnings += extrapolation_warnings(
        fitted, {name: column[-1] for name, column in columns.items()}
    )
    answer = {
        "law": fitted.law,
        "lr": None,
        "batch_tokens": None,
        "loss": value if output == "loss" else None,
        "interval": {output: [low, high]},
        "band": {},
        "warnings": warnings,
        "values": {output: value},
        "units": {output: unit},
    }
    text = f"{fitted.law}: {output} {_format(output, value)} {unit}"
    text += _range_text("interval", output, [low, high])
    return {"predictions": [answer]}, [text, *(f"  ! {warning}" for warning in warnings)]


def _columns(relation: Relation, given: dict[str, Any], law: str) -> dict[str, Any]:
    """The inputs of a relation as columns: one row, or the rows of a whole lr schedule."""
    from scaletune.fitting.relations import schedule
    from scaletune.laws.schedules import lr_schedule

    names = [column.name for column in relation.inputs]
    takes_schedule = relation.prepare is not None
    text = given.pop("lr_schedule", None) if takes_schedule else None
    other = next((name for name in given if name not in names), None)
    if other and (text or given.keys() >= set(names)):
        expected = "--lr-schedule" if text else ", ".join(names)
        hint = nearest(other, names)
        raise UserError(f"a fit of {law!r} takes {expected} only, but got {other}{hint}")
    if takes_schedule and not text:
        raise UserError(f"a fit of {law!r} needs the lr schedule of a run: give --lr-schedule")
    if text:
        return dict(schedule.sample_schedule(lr_schedule(text)))
    return {name: [value] for name, value in given.items()}


def _prediction_lines(prediction: Prediction, width: int) -> list[str]:
    """One line per quantity, with names `width` characters wide, and one line per warning."""
    from scaletune.predicting import POINTS, describe_batch

    rows = [(name, unit, getattr(prediction, name)) for name, unit in POINTS.items()]
    rows += [(name, prediction.units[name], value) for name, value in prediction.values.items()]
    lines = []
    for name, unit, value in rows:
        if value is None:
            continue
        line = f"{prediction.law:24} {name:{width}} {_format(name, value):<10} {unit}"
        line += _range_text("interval", name, prediction.interval.get(name))
        line += _range_text("near-optimal", name, prediction.band.get(name))
        batch = describe_batch(prediction) if name == "lr" else ""
        lines.append(line + (f"  {batch}" if batch else ""))
    lines = lines or [f"{prediction.law:24} gives nothing for these inputs"]
    return [*lines, *(f"{'':24} ! {warning}" for warning in prediction.warnings)]


def _format(name: str, value: float) -> str:
    """Counts as people write them, other numbers with up to five digits."""
    return human(value) if any(count in name for count in COUNTS) else f"{value:.5g}"


def _range_text(label: str, name: str, ends: Sequence[float] | None) -> str:
    return f"  {label} {_format(name, ends[0])} to {_format(name, ends[1])}" if ends else ""


def _given(pairs: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """The options and every `--given NAME=VALUE`; a value that is a number becomes a number."""
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


def _scale_line(given: dict[str, Any]) -> str:
    """`at 1.0B parameters (non-embedding) and 20.0B tokens`, then the other inputs."""
    scale = [
        f"{human(given[name])} {unit}"
        for name, unit in (("n_params", "parameters (non-embedding)"), ("tokens", "tokens"))
        if isinstance(given.get(name), float)
    ]
    others = [
        f"{name} {_format(name, value) if isinstance(value, float) else value}"
        for name, value in given.items()
        if name not in ("n_params", "tokens")
    ]
    parts = [" and ".join(scale), *others] if scale else others
    return "at " + (", ".join(parts) or "the laws' default inputs")


def laws(args: argparse.Namespace) -> Answer:
    """`scaletune laws`."""
    from scaletune import laws

    names = ("kind", "gives", "text", "confirmed")
    filters = {name: getattr(args, name) for name in names}
    if args.id:
        used = next((name for name, value in filters.items() if value), None)
        if used:
            raise UserError(f"`laws` takes an id or filters, but got both `{args.id}` and --{used}")
        return laws.law(args.id).to_dict(), [laws.describe(laws.law(args.id))]
    chosen = laws.select(**filters)
    return [entry.to_dict() for entry in chosen], [laws.listing(chosen)]


def transfer(args: argparse.Namespace) -> Answer:
    """`scaletune transfer`."""
    from scaletune import recipe, reporting, transferring
    from scaletune.records import Fit

    fitted, target = Fit.read(args.fit), recipe.load(args.target, args.set)
    answer = transferring.transfer(
        fitted, target, args.to or None, args.out, args.force, own_sizes(target)
    )
    files = [f"  {path}" for path in answer["files"]]
    return answer, [*reporting.transfer_lines(answer), "Files:", *files]


def own_sizes(recipe: Recipe) -> Measure | None:
    """What measures the model of a recipe: None for the zoo, which needs no torch."""
    from scaletune.zoo import OwnConfig

    if not isinstance(recipe.model, OwnConfig):
        return None
    from scaletune.sweeping.sizes import point_sizes

    return point_sizes


def lint(args: argparse.Namespace) -> Answer:
    """`scaletune lint`."""
    from scaletune.linting import lint

    answer = lint(args.config)
    lines = [
        f"{finding['rule']} at {finding['at']}: {finding['says']}; {finding['fix']}"
        for finding in answer["findings"]
    ]
    count = f"{len(lines) or 'no'} known fault{'s' * (len(lines) != 1)}"
    if answer["not_read"]:
        count = f"{count if lines else 'nothing found'} in what was read"
        lines += [f"not read: {sentence}" for sentence in answer["not_read"]]
    return answer, [*lines, f"{answer['path']} ({answer['stack']}): {count}"]


def plot(args: argparse.Namespace) -> Answer:
    """`scaletune plot`."""
    from scaletune import plotting

    files = [str(path) for path in plotting.plot(args.source, args.out, where=args.where)]
    return {"files": files}, files


def report(args: argparse.Namespace) -> Answer:
    """`scaletune report`."""
    from scaletune import reporting
    from scaletune.records import Fit

    path = reporting.report(Fit.read(args.fit), args.out)
    return {"path": str(path)}, [str(path)]
