"""Commands that train or plan training: run, sweep, status, export, plan, count, check."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaletune.recipe import Recipe

Answer = tuple[Any, list[str]]


def run(args: argparse.Namespace) -> Answer:
    """`scaletune run`."""
    from scaletune import reporting
    from scaletune.study import run

    answer = run(args.study, out=args.out, adopt=args.adopt, settings=args.set)
    return strings(answer | {"fit": answer["fit"].to_dict()}), reporting.answer_lines(answer)


def sweep(args: argparse.Namespace) -> Answer:
    """`scaletune sweep`."""
    from scaletune import recipe, sweeping
    from scaletune.recipe.passed_settings import unpassed_sentence
    from scaletune.sweeping.search.pareto import describe_scaling as scaling_line
    from scaletune.sweeping.status import COUNTED, shown_statuses

    engine = [f"engine.kind={args.engine}"] if args.engine else []
    loaded = recipe.load(args.recipe, [*args.set, *engine])
    trials = sweeping.sweep(loaded, out=args.out, adopt=args.adopt)
    counts = {status: int((trials["status"] == status).sum()) for status in COUNTED}
    done = trials[trials["status"] == "done"]
    columns = ["id", "width", "depth", "tokens", "lr", "seed", "loss"]
    best = done.nsmallest(1, "loss")[columns].to_dict("records")[0] if len(done) else None
    path = Path(args.out) / "sweeps" / f"{loaded.name}.jsonl"
    by_status = ", ".join(f"{counts[name]} {name}" for name in shown_statuses(counts))
    lines = [f"{len(trials)} trials: {by_status}"]
    if best:
        lr = f", lr {best['lr']:.4g}" if best["lr"] == best["lr"] else ""
        tokens = f", {best['tokens']:,.0f} tokens" if best["tokens"] == best["tokens"] else ""
        lines.append(f"best: loss {best['loss']:.4f} at width {best['width']}{lr}{tokens}")
    lines.append(f"records: {path}")
    if done["loss"].nunique() < len(done) and (caution := unpassed_sentence(loaded)):
        lines.append(caution)
    frontier = _frontier(path.with_suffix(".search.json")) if loaded.search.kind == "pareto" else {}
    scaling = [law for setting in frontier.get("learnt", []) for law in setting["scaling"]]
    answer = {"sweep": loaded.name, "n_trials": len(trials), **counts, "best": best}
    return answer | {"path": str(path)} | frontier, [*lines, *map(scaling_line, scaling)]


def _frontier(path: Path) -> dict[str, Any]:
    return {"learnt": json.loads(path.read_text("utf-8"))} if path.exists() else {}


def status(args: argparse.Namespace) -> Answer:
    """`scaletune status`."""
    from scaletune import sweeping
    from scaletune.sweeping.status import format_table

    answer = sweeping.status(args.sweep, out=args.out)
    driver = "none; `scaletune sweep` or `scaletune run` continues"
    if answer["handed_out"]:
        driver = f"none; {answer['handed_out']} trials are handed out by `scaletune ask`"
    if answer["driver"]:
        driver = "{pid} on {host}, since {since}".format(**answer["driver"])
    return answer, [*format_table(answer), f"driver: {driver}"]


def export(args: argparse.Namespace) -> Answer:
    """`scaletune export`."""
    from scaletune import sweeping
    from scaletune.records import read_jsonl

    path = sweeping.export(args.sweep, out=args.out)
    n = len(read_jsonl(path))
    return {"path": str(path), "n_trials": n}, [f"{n} trials: {path}"]


def check(args: argparse.Namespace) -> Answer:
    """`scaletune check`."""
    from scaletune import checking, recipe
    from scaletune.checking.text import lines

    loaded = recipe.load(args.recipe, args.set)
    seeds = None if args.seeds is None else range(args.seeds)
    # alignment compares widths, so it needs a check over width
    whole = [what for what in checking.CHECKS if what != "alignment" or args.over == "width"]
    results = {
        what: checking.check(
            loaded, args.widths, seeds, over=args.over, depths=args.depths, what=what
        )
        for what in (whole if args.what == "all" else [args.what])
    }
    text = [line for each in results.values() for line in lines(each)]
    results = _finite(results)
    answer = results.get(args.what, {"what": "all", **results})
    if not args.out:
        return answer, text
    files = _write_checks(results, Path(args.out))
    return answer | {"files": files}, text + files


def _write_checks(results: dict[str, Any], out: Path) -> list[str]:
    """Writes each check as a plot and as JSON under `out`."""
    from scaletune.plotting import checks
    from scaletune.records import write_atomically

    files = []
    for what, each in results.items():
        picture, record = checks.plot(each, out), out / f"{what}.json"
        write_atomically(record, json.dumps(each, indent=1, allow_nan=False) + "\n")
        files += [str(picture), str(record)]
    return files


def _finite(value: Any) -> Any:
    """Replaces NaN and infinities by None inside plain containers: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _vocab_size(recipe: Recipe) -> tuple[int, bool]:
    """The vocabulary of a recipe's data, and whether it was read from the data.

    Data that are not on this machine have the vocabulary that the recipe states or implies.
    """
    from scaletune import counting, data
    from scaletune.recipe import DIGITS, POWER_LAW, PYTHON_STDLIB

    source = recipe.data.source
    local = source != PYTHON_STDLIB and Path(source).exists()
    if source in (DIGITS, POWER_LAW) or local:
        return data.load(recipe.data).vocab_size, True
    return counting.default_vocab_size(recipe), False


def plan(args: argparse.Namespace) -> Answer:
    """`scaletune plan`."""
    from scaletune import planning, recipe
    from scaletune.cli.fit_commands import own_sizes
    from scaletune.planning.text import lines, study
    from scaletune.records import write_atomically
    from scaletune.transferring.formats.recipe import toml

    target = recipe.load(args.target, args.set)
    planned = planning.plan(
        target,
        args.budget,
        noise=args.noise,
        fit=args.fit,
        level=args.level,
        seeds=args.seeds,
        flops_per_second=args.flops_per_second,
        vocab_size=_vocab_size(target)[0],
        sizes=own_sizes(target),
    )
    answer, text = planned.to_dict(), lines(planned)
    if not args.out:
        return answer, text
    shared, cells = study(planned, Path(args.out).parent, args.target)
    head = f"# Planned by `scaletune plan {args.target} --budget {args.budget}`.\n"
    head += "# Each [[cells]] table is one setting; `scaletune run` trains exactly these runs.\n"
    body = toml(shared) + "".join(f"\n[[cells]]\n{toml(cell)}" for cell in cells)
    write_atomically(Path(args.out), head + body)
    line = f"written to {args.out}; next: `scaletune run {args.out}`"
    return answer | {"path": args.out}, [*text, line]


def count(args: argparse.Namespace) -> Answer:
    """`scaletune count`."""
    from scaletune import recipe
    from scaletune.counting import branches
    from scaletune.recipe.passed_settings import unpassed_sentence
    from scaletune.sweeping.point_counts import count_points

    loaded = recipe.load(args.recipe, args.set)
    points = recipe.points(loaded)
    vocab_size, known = _vocab_size(loaded)
    rows = count_points(points, vocab_size)
    if loaded.foreign:
        flops = [row["flops"] for row in rows]
        spent = {"trials": len(rows), "flops": None if None in flops else sum(flops)}
        lines = _foreign_count_lines(rows, spent["flops"])
        caution = unpassed_sentence(loaded)
        return {"points": rows, "total": spent}, [*lines, *([caution] if caution else [])]
    total = {
        "trials": len(rows),
        "flops": sum(row["flops"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "branched": branches.branched_cost(points, rows),
    }
    lines = [*_count_table(rows), *_first_point_lines(rows[0])]
    if loaded.data.source != recipe.PYTHON_STDLIB and not known:
        lines.append(
            f"`{loaded.data.source}` is not on this machine: counted with the default"
            f" vocabulary, {vocab_size}"
        )
    lines.append(
        f"{total['trials']} trial{'s' * (total['trials'] != 1)}, {total['flops']:.3g} FLOPs,"
        f" about {total['seconds']:.0f} core"
        " seconds (estimated with 60 GFLOP/s and 2.5 ms per step)"
    )
    return {"points": rows, "total": total}, lines + _branch_lines(points, total)


def _foreign_count_lines(rows: Sequence[dict[str, Any]], flops: float | None) -> list[str]:
    """What is known of the points of the user's trainer before they are trained."""
    names = ("n_params", "n_params_total", "tokens")
    lines = [f"{'width':>6} {'n_params':>14} {'total':>14} {'tokens':>14} {'FLOPs':>9}  trials"]
    for row, n in _group_equal(rows):
        values = row["params"] | {"tokens": row["tokens"]}
        sizes = " ".join(
            f"{'unknown' if values[name] is None else f'{values[name]:,.0f}':>14}" for name in names
        )
        each = "unknown" if row["flops"] is None else f"{row['flops']:.2e}"
        lines.append(f"{row['width']:6} {sizes} {each:>9}  {n}")
    sources = sorted({row["flops_from"] for row in rows})
    total = f"{flops:.3g} FLOPs ({', '.join(sources)})" if flops else "FLOPs unknown"
    lines.append(f"{len(rows)} trial{'s' * (len(rows) != 1)}, {total}")
    if any(row["params"]["n_params"] is None for row in rows):
        lines.append(
            "n_params is unknown: state `model.n_params`, give `trainer.describe` or `model.build`,"
            " or let the trainer report it"
        )
    return lines


def _mebibytes(count: int | None, form: str = ".4g", space: str = " ") -> str:
    return "unknown" if count is None else f"{count / 2**20:{form}}{space}MiB"


def _count_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per group of points that cost the same."""
    lines = [
        f"{'width':>6} {'depth':>5} {'n_params':>12} {'total':>12} {'tokens':>12} {'steps':>8}"
        f" {'FLOPs':>9} {'memory':>9} {'seconds':>8}  trials"
    ]
    for row, n in _group_equal(rows):
        params, parts = row["params"], row["memory_bytes"].values()
        memory = None if None in parts else sum(parts)
        lines.append(
            f"{row['width']:6} {row['depth']:5} {params['n_params']:12,}"
            f" {params['n_params_total']:12,} {row['tokens']:12,} {row['steps']:8,}"
            f" {row['flops']:9.2e} {_mebibytes(memory, '6.0f', ''):>9} {row['seconds']:8.3g}  {n}"
        )
    return lines


def _branch_lines(points: Sequence[Recipe], total: dict[str, Any]) -> list[str]:
    """The saving of branched training, or the reason why these token horizons share no trunk."""
    from scaletune.counting import branches

    spent = total["branched"]
    if spent["branches"]:
        share = 1 - spent["flops"] / total["flops"]
        return [
            f"{spent['branches']} of the trials branch off the trunk of a longer token horizon:"
            f" {spent['flops']:.3g} FLOPs ({share:.0%} saved), about {spent['seconds']:.0f} core"
            " seconds"
        ]
    horizons = {point.budget.tokens for point in points}
    if len(horizons) == 1 or any(point.engine.branch is False for point in points):
        return []
    reasons = {branches.no_branch_reason(point) for point in points} - {""}
    return [f"no branched training: {reason}" for reason in sorted(reasons)]


def _first_point_lines(row: dict[str, Any]) -> list[str]:
    """Parameters, FLOPs per token and memory of the first point, part by part."""
    groups, flops, memory = row["params"], row["flops_per_token_by"], row["memory_bytes"]
    names = {"six_n": "6N", "deepseek_m": "DeepSeek's M"}
    by_group = ", ".join(f"{k} {n:,}" for k, n in groups.items() if not k.startswith("n_params"))
    if "experts" in groups:
        by_group += (
            f"; active per token: {groups['n_params_active']:,} of {groups['n_params']:,}"
            " outside embedding and readout"
        )
    by_part = ", ".join(f"{names.get(k, k.replace('_', ' '))} {n:.4g}" for k, n in flops.items())
    return [
        "first point:",
        f"  parameters by group: {by_group}",
        f"  training FLOPs per token: {by_part}",
        f"  memory: weights and optimizer {_mebibytes(memory['weights_optimizer'])},"
        f" activations {_mebibytes(memory['activations'])};"
        f" memory traffic per step at least {_mebibytes(row['bytes_per_step'])}",
    ]


def _group_equal(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Groups points that cost the same, because they differ only in lr or seed: (row, number)."""
    groups: dict[str, tuple[dict[str, Any], int]] = {}
    for row in rows:
        key = json.dumps(row)
        groups[key] = (row, groups[key][1] + 1 if key in groups else 1)
    return list(groups.values())


def strings(value: Any) -> Any:
    """Replaces paths by strings inside plain containers."""
    if isinstance(value, dict):
        return {key: strings(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [strings(v) for v in value]
    return str(value) if isinstance(value, Path) else value
