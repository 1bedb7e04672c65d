"""Commands that train, or count what training would cost: run, sweep, status, export, plan, count, check."""

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
    from scaletune import reporting
    from scaletune import study as study_module

    answer = study_module.run(args.study, out=args.out, adopt=args.adopt, settings=args.set)
    return strings(answer | {"fit": answer["fit"].to_dict()}), reporting.answer_lines(answer)


def sweep(args: argparse.Namespace) -> Answer:
    from scaletune import recipe, sweeping
    from scaletune.sweeping.search.pareto import said

    asked = recipe.load(
        args.recipe, [*args.set, *([f"engine.kind={args.engine}"] if args.engine else [])]
    )
    trials = sweeping.sweep(asked, out=args.out, adopt=args.adopt)
    counts = {
        status: int((trials["status"] == status).sum()) for status in ("done", "diverged", "failed")
    }
    done = trials[trials["status"] == "done"]
    columns = ["id", "width", "depth", "tokens", "lr", "seed", "loss"]
    best = done.nsmallest(1, "loss")[columns].to_dict("records")[0] if len(done) else None
    path = Path(args.out) / "sweeps" / f"{asked.name}.jsonl"
    lines = [
        f"{len(trials)} trials: " + ", ".join(f"{n} {status}" for status, n in counts.items()),
        f"records: {path}",
    ]
    if best:
        lines.insert(
            1,
            f"best: loss {best['loss']:.4f} at width {best['width']}, lr {best['lr']:.4g}, {best['tokens']:,} tokens",
        )
    learnt = _learnt(path.with_suffix(".search.json")) if asked.search.kind == "pareto" else {}
    answer = {
        "sweep": asked.name,
        "n_trials": len(trials),
        **counts,
        "best": best,
        "path": str(path),
    }
    return answer | learnt, [
        *lines,
        *(said(law) for cell in learnt.get("learnt", []) for law in cell["scaling"]),
    ]


def _learnt(path: Path) -> dict[str, Any]:
    return {"learnt": json.loads(path.read_text("utf-8"))} if path.exists() else {}


def status(args: argparse.Namespace) -> Answer:
    from scaletune import sweeping
    from scaletune.sweeping.status import table

    now = sweeping.status(args.sweep, out=args.out)
    who = (
        "{pid} on {host}, since {since}".format(**now["driver"])
        if now["driver"]
        else "none: `scaletune sweep` or `run` carries on"
    )
    return now, [*table(now), f"driver: {who}"]


def export(args: argparse.Namespace) -> Answer:
    from scaletune import sweeping
    from scaletune.records import read_jsonl

    path = sweeping.export(args.sweep, out=args.out)
    n = len(read_jsonl(path))
    return {"path": str(path), "n_trials": n}, [f"{n} trials: {path}"]


def check(args: argparse.Namespace) -> Answer:
    from scaletune import checking, recipe
    from scaletune.checking.text import lines

    asked, seeds = (
        recipe.load(args.recipe, args.set),
        None if args.seeds is None else range(args.seeds),
    )
    whole = [what for what in checking.CHECKS if what != "alignment" or args.over == "width"]
    found = {
        what: checking.check(
            asked, args.widths, seeds, over=args.over, depths=args.depths, what=what
        )
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
    """Of the recipe's data, and whether they are here to be read; what it says itself otherwise, or that of text."""
    from scaletune import counting, data, recipe

    source = asked.data.source
    known = source in (recipe.DIGITS, recipe.POWER_LAW) or (
        source != recipe.PYTHON_STDLIB and Path(source).exists()
    )
    return (
        data.load(asked.data).vocab_size
        if known
        else asked.data.vocab_size or counting.BYTES_TEXT_VOCAB
    ), known


def plan(args: argparse.Namespace) -> Answer:
    from scaletune import planning, recipe
    from scaletune.planning.text import lines, study
    from scaletune.records import write_atomically
    from scaletune.transferring.formats.recipe import toml

    target = recipe.load(args.target, args.set)
    made = planning.plan(
        target, args.budget, noise=args.noise, fit=args.fit, level=args.level, seeds=args.seeds,
        flops_per_second=args.flops_per_second, vocab_size=_vocab_size(target)[0],
    )  # fmt: skip
    answer, said = made.to_dict(), lines(made)
    if args.out:
        shared, cells = study(made, Path(args.out).parent, args.target)
        head = f"# Planned for {args.target} by a budget of {args.budget}; cells are trained as they stand.\n"
        write_atomically(
            Path(args.out),
            head + toml(shared) + "".join(f"\n[[cells]]\n{toml(cell)}" for cell in cells),
        )
        answer, said = (
            answer | {"path": args.out},
            [*said, f"written to {args.out}: `scaletune run {args.out}`"],
        )
    return answer, said


def count(args: argparse.Namespace) -> Answer:
    from scaletune import counting, recipe
    from scaletune.counting import branches

    asked = recipe.load(args.recipe, args.set)
    source, (vocab_size, known) = asked.data.source, _vocab_size(asked)
    points = recipe.points(asked)
    rows = [counting.count(point, vocab_size) for point in points]
    total = {
        "trials": len(rows),
        "flops": sum(row["flops"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
    }
    total["branched"] = branches.saving(points, rows)
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
        lines.append(
            f"`{source}` is not here: counted with a vocabulary of {vocab_size}, that of text"
        )
    lines.append(
        f"{total['trials']} trials, {total['flops']:.3g} FLOPs, about {total['seconds']:.0f} core seconds (a guess: 60 GFLOP/s and 2.5 ms a step)"
    )
    return {"points": rows, "total": total}, lines + _branched(points, total)


def _branched(points: Sequence[Recipe], total: dict[str, Any]) -> list[str]:
    """What trunks that serve several horizons save; why there are none, where horizons might share one."""
    from scaletune.counting import branches

    spent, reasons = total["branched"], {branches.apart(point) for point in points}
    if spent["branches"]:
        share = 1 - spent["flops"] / total["flops"]
        return [
            f"{spent['branches']} of them branch off the trunk of a longer horizon: {spent['flops']:.3g} FLOPs ({share:.0%} saved), about"
            f" {spent['seconds']:.0f} core seconds"
        ]
    several = len({point.budget.tokens for point in points}) > 1 and all(
        point.engine.branch is not False for point in points
    )
    return [f"no trunk serves several horizons: {why}" for why in sorted(reasons - {""}) if several]


def _first_counted(row: dict[str, Any]) -> list[str]:
    """The first point part by part: parameters, FLOPs a token, memory."""
    groups, flops, memory = row["params"], row["flops_per_token_by"], row["memory_bytes"]
    met = (
        f"; {groups['n_params_active']:,} of {groups['n_params']:,} outside embedding and head meet a token"
        if "experts" in groups
        else ""
    )
    named = {"six_n": "6N", "deepseek_m": "DeepSeek's M"}
    return [
        "of the first point:",
        "  parameters by group: "
        + ", ".join(
            f"{name} {n:,}" for name, n in groups.items() if not name.startswith("n_params")
        )
        + met,
        "  training FLOPs a token: "
        + ", ".join(
            f"{named.get(name, name.replace('_', ' '))} {n:.4g}" for name, n in flops.items()
        ),
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


def strings(value: Any) -> Any:
    """Paths as strings, inside plain containers."""
    if isinstance(value, dict):
        return {key: strings(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [strings(v) for v in value]
    return str(value) if isinstance(value, Path) else value
