"""The state of a sweep: what `scaletune status` reads from its database, and both forms as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from scaletune.recipe import load
from scaletune.records import Store, Trial, read_store
from scaletune.records.pending_trial import read_pending
from scaletune.sweeping import lockfile
from scaletune.units import human

COUNTED = ("done", "diverged", "stopped", "failed")
SHAPE = ("width", "depth", "tokens", "batch_tokens", "lr", "seed")
BAR = 24  # characters of the progress bar


def best_of(trials: Iterable[Trial]) -> dict[str, Any] | None:
    """The id, the shape and the loss of the trial with the lowest loss."""
    done = [trial for trial in trials if trial.loss is not None]
    if not done:
        return None
    best = min(done, key=lambda trial: trial.loss or 0.0)
    return {name: getattr(best, name) for name in ("id", *SHAPE, "loss")}


def _database(sweep: str | Path, out: str | Path) -> Path:
    """`sweeps/NAME.db` of a sweep's name, of its recipe file, or of one of its own files."""
    path = Path(sweep)
    if path.suffix in (".db", ".jsonl"):
        return path.with_suffix(".db")
    return Path(out) / "sweeps" / f"{load(path).name if path.suffix == '.toml' else sweep}.db"


def export(sweep: str | Path, *, out: str | Path = ".") -> Path:
    """Writes the record `NAME.jsonl` of a sweep from its database, also while the sweep runs.

    Args:
        sweep: The sweep's name, its recipe file, or its `.db` or `.jsonl` file.
        out: The folder that holds `sweeps/`.

    Returns:
        The path of the record.

    Raises:
        UserError: There is no such database, or the record cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import scaletune as st
        >>> from scaletune.records import Store
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Store(Path(folder) / "sweeps" / "tiny").close()  # a sweep without trials
        ...     st.export("tiny", out=folder).name
        'tiny.jsonl'
    """
    path = _database(sweep, out)
    read_store(path)  # refuses a file that is no database, which `Store` would create
    with closing(Store(path)) as store:
        return store.export()


def status(sweep: str | Path, *, out: str | Path = ".") -> dict[str, Any]:
    """Reads how far a sweep is from its database, which it does not change.

    Args:
        sweep: The sweep's name, its recipe file, or its `.db` or `.jsonl` file.
        out: The folder that holds `sweeps/`.

    Returns:
        A dictionary with these keys:

        - `sweep`: the name.
        - `driver`: `pid`, `host` and `since` of the process that drives the sweep; None if none.
        - `running`: for each trial in training its id, shape, `share` done, `seconds` and `try`.
        - `wanted`, `recorded`, `done`, `diverged`, `stopped`, `failed`: numbers of trials.
        - `handed_out`: number of trials that others train (`scaletune ask`), without a result.
        - `best`: id, shape and loss of the recorded trial with the lowest loss.
        - `seconds`, `flops`: sums over all recorded trials.
        - `share`, `elapsed`, `left`: share of the driver's work done, seconds since it started and
          estimated seconds until it ends; None without a driver.

    Raises:
        UserError: There is no such database.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import scaletune as st
        >>> from scaletune.records import Store
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Store(Path(folder) / "sweeps" / "tiny").close()  # a sweep without trials
        ...     now = st.status("tiny", out=folder)
        >>> now["recorded"], now["driver"], now["best"]
        (0, None, None)
    """
    path = _database(sweep, out)
    trials, live = read_store(path)
    driven = lockfile.is_driven(path.with_suffix(""), live)
    counts = Counter(trial.status for trial in trials)
    return {
        "sweep": path.stem,
        "driver": live["driver"] if driven else None,
        "running": live["running"] if driven else [],
        "wanted": live.get("wanted", len(trials)),
        "recorded": len(trials),
        **{name: counts[name] for name in COUNTED},
        "handed_out": sum(trial.since is not None for trial in read_pending(path)),
        "best": best_of(trials),
        "seconds": sum(trial.seconds or 0.0 for trial in trials),
        "flops": sum(trial.flops or 0.0 for trial in trials),
        "share": live["share"] if driven else None,
        "elapsed": live["elapsed"] if driven else None,
        "left": live["left"] if driven else None,
    }


def shown_statuses(counts: Mapping[str, Any]) -> list[str]:
    """The statuses whose numbers are shown: "stopped" only where a search has stopped trials."""
    return [name for name in COUNTED if name != "stopped" or counts[name]]


def format_clock(seconds: float | None) -> str:
    """`3:07` or `1:02:07`; `?` for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_line(now: dict[str, Any]) -> str:
    """A status as one line."""
    ended = sum(now[name] for name in COUNTED)
    percent = f" {100 * now['share']:3.0f}%" if now["share"] is not None else ""
    parts = [f"trials {ended}/{now['wanted']}{percent}"]
    if now["share"] is not None:
        parts += [_times(now)]
    parts += [f"training time {now['seconds']:.0f} s"]
    if now["running"]:
        parts += [f"{len(now['running'])} running"]
    parts += [f"{now[name]} {name}" for name in COUNTED[1:] if now[name]]
    return ", ".join(parts) + (f"; {_best(now)}" if now["best"] else "")


def _times(now: dict[str, Any]) -> str:
    return f"elapsed {format_clock(now['elapsed'])}, ETA {format_clock(now['left'])}"


def _best(now: dict[str, Any]) -> str:
    best = now["best"]
    lr = "" if best["lr"] is None else f", lr {best['lr']:.3g}"
    return f"lowest loss {best['loss']:.4f} at width {best['width']}{lr}"


def format_table(now: dict[str, Any]) -> list[str]:
    """A status as a few lines, with one row per trial in training."""
    counts = "  ".join(f"{name} {now[name]}" for name in shown_statuses(now))
    ended = sum(now[name] for name in COUNTED)
    lines = [
        f"{now['sweep']}  trials {ended}/{now['wanted']}  {counts}"
        f"  running {len(now['running'])}  training time {now['seconds']:.0f} s"
    ]
    if now["share"] is not None:
        bar = ("#" * round(BAR * now["share"])).ljust(BAR, ".")
        lines.append(f"{100 * now['share']:3.0f}% {bar} {_times(now)}")
    if now["best"]:
        lines.append(_best(now))
    if now["running"]:
        lines.append(
            f"{'width':>8} {'depth':>5} {'tokens':>7} {'batch':>7} {'lr':>9} {'seed':>4}"
            f" {'done':>5} {'elapsed':>8}  try"
        )
    return lines + [_row(trial) for trial in now["running"]]


def _row(trial: dict[str, Any]) -> str:
    tokens, batch = (
        "-" if trial[name] is None else human(trial[name]) for name in ("tokens", "batch_tokens")
    )
    lr = "-" if trial["lr"] is None else f"{trial['lr']:.3g}"
    return (
        f"{trial['width']:8} {trial['depth']:5} {tokens:>7} {batch:>7} {lr:>9}"
        f" {trial['seed']:4} {100 * trial['share']:4.0f}% {format_clock(trial['seconds']):>8}"
        f"  {trial['try']}"
    )
