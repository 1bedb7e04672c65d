"""How a sweep stands: what its driver says every second, what `scaletune status` reads from another terminal, and both as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from scaletune.recipe import load
from scaletune.records import Store, Trial, glance
from scaletune.sweeping import lockfile

COUNTED = ("done", "diverged", "failed")
SHAPE = ("width", "depth", "tokens", "batch_tokens", "lr", "seed")
BAR = 24  # letters


def best_of(trials: Iterable[Trial]) -> dict[str, Any] | None:
    """The trial of the lowest loss, by its id, shape and loss."""
    done = [trial for trial in trials if trial.loss is not None]
    if not done:
        return None
    best = min(done, key=lambda trial: trial.loss or 0.0)
    return {name: getattr(best, name) for name in ("id", *SHAPE, "loss")}


def _workbench(sweep: str | Path, out: str | Path) -> Path:
    """`sweeps/NAME.db` of a sweep's name, of its recipe file, or of one of its own files."""
    path = Path(sweep)
    if path.suffix in (".db", ".jsonl"):
        return path.with_suffix(".db")
    return Path(out) / "sweeps" / f"{load(path).name if path.suffix == '.toml' else sweep}.db"


def export(sweep: str | Path, *, out: str | Path = ".") -> Path:
    """Write the record `NAME.jsonl` of a sweep from its workbench, while it runs too; where it is."""
    path = _workbench(sweep, out)
    glance(path)  # what is no store is refused, and not made into one
    with closing(Store(path)) as store:
        return store.export()


def status(sweep: str | Path, *, out: str | Path = ".") -> dict[str, Any]:
    """How a sweep stands, from its `sweeps/NAME.db`, which stays untouched.

    "driver": who is at it, null when no one is. "running": id, shape, share done, seconds and try of each trial under way. "share", "elapsed",
    "left": of the driver's work, seconds. "done", "diverged", "failed", "best", "seconds" (of training), "flops": of all that is on record.
    """
    path = _workbench(sweep, out)
    trials, live = glance(path)
    on = lockfile.alive(path.with_suffix(""), live)
    counts = Counter(trial.status for trial in trials)
    return {
        "sweep": path.stem, "driver": live["driver"] if on else None, "running": live["running"] if on else [],
        "wanted": live.get("wanted", len(trials)), "recorded": len(trials), **{name: counts[name] for name in COUNTED},
        "best": best_of(trials), "seconds": sum(trial.seconds for trial in trials), "flops": sum(trial.flops for trial in trials),
        "share": live["share"] if on else None, "elapsed": live["elapsed"] if on else None, "left": live["left"] if on else None,
    }  # fmt: skip


def clock(seconds: float | None) -> str:
    """`3:07`, `1:02:07`, `?` when it is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def line(now: dict[str, Any]) -> str:
    """All of it in one line."""
    counts = ", ".join(f"{now[name]} {name}" for name in COUNTED[1:] if now[name])
    running = f", {len(now['running'])} running" if now["running"] else ""
    time = (
        f" {100 * now['share']:3.0f}%, {clock(now['elapsed'])} gone, {clock(now['left'])} left,"
        if now["share"] is not None
        else ""
    )
    said = f"trials {sum(now[name] for name in COUNTED)}/{now['wanted']}{time} {now['seconds']:.0f} s of training{running}"
    return said + (f", {counts}" if counts else "") + (f"; {_best(now)}" if now["best"] else "")


def _best(now: dict[str, Any]) -> str:
    return "best {loss:.4f} at width {width}, lr {lr:.3g}".format(**now["best"])


def table(now: dict[str, Any]) -> list[str]:
    """All of it in a few lines, one for each trial under way."""
    counts = "  ".join(f"{name} {now[name]}" for name in COUNTED)
    ended = sum(now[name] for name in COUNTED)
    lines = [
        f"{now['sweep']}  trials {ended}/{now['wanted']}  {counts}  running {len(now['running'])}  {now['seconds']:.0f} s of training"
    ]
    if now["share"] is not None:
        bar = ("#" * round(BAR * now["share"])).ljust(BAR, ".")
        lines.append(
            f"{100 * now['share']:3.0f}% {bar} {clock(now['elapsed'])} gone, {clock(now['left'])} left"
        )
    lines += [_best(now)] if now["best"] else []
    if now["running"]:
        lines.append(
            f"{'width':>8} {'depth':>5} {'tokens':>13} {'batch':>9} {'lr':>9} {'seed':>4} {'done':>5} {'for':>8}  try"
        )
    for row in now["running"]:
        lines.append(
            "{width:8} {depth:5} {tokens:13,} {batch_tokens:9,} {lr:9.3g} {seed:4} {:4.0f}% {:>8}  {try}".format(
                100 * row["share"], clock(row["seconds"]), **row
            )
        )
    return lines
