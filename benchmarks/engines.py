"""What an engine costs a trial: seconds of the sweep beside the seconds that the trial itself says it took.

`python benchmarks/engines.py [--rounds 5]` drives sweeps of trivial trials (one step of a model of width 32, never stacked) through each
engine that is installed, in turn, with one worker; between the first record and the last, so that no engine's start is in it. The start,
until the first record, stands beside it. Table in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import psutil
from chaos import base

from scaletune import sweeping
from scaletune.recipe import with_settings
from scaletune.records import Trial

TRIALS = 100
NEEDS = {"local": "torch", "ray": "ray"}  # engines that start what they run on by themselves


def round_of(kind: str, folder: Path) -> tuple[float, list[float], list[float], float]:
    """(seconds to the first record; of each later trial, ms since the record before, and ms its own; MB that all processes hold alone)."""
    point = {"engine.kind": kind, "engine.stack": 1, "tokens": 256, "budget.eval_tokens": 64}
    recipe = with_settings(base(folder), point)
    asked = sweeping.tasks(
        "main", [with_settings(recipe, {"seed": seed}) for seed in range(TRIALS)]
    )
    at, own, memory = [time.monotonic()], list[float](), 0.0

    def then(trial: Trial) -> list[sweeping.Task]:
        nonlocal memory
        assert trial.status == "done"
        at.append(time.monotonic())
        own.append(1000 * trial.seconds)
        if len(own) == TRIALS:
            memory = (
                sum(
                    child.memory_full_info().uss
                    for child in psutil.Process().children(recursive=True)
                )
                / 2**20
            )
        return []

    sweeping.train_all(asked, folder / f"sweeps/{kind}", 1, then=then)
    return at[1] - at[0], [1000 * (b - a) for a, b in pairwise(at[1:])], own[1:], memory


def row(kind: str, rounds: list[tuple[float, list[float], list[float], float]]) -> str:
    first, memory = (statistics.median(found[i] for found in rounds) for i in (0, 3))
    gaps, own = ([ms for found in rounds for ms in found[i]] for i in (1, 2))
    low, middle, high = statistics.quantiles(
        [gap - its for gap, its in zip(gaps, own, strict=True)], n=4
    )
    return (
        f"| {kind} | {statistics.median(gaps):.1f} | {statistics.median(own):.1f} | {middle:.1f} ({low:.1f} to {high:.1f}) |"
        f" {first:.1f} | {memory:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args().rounds
    found = {
        kind: list[tuple[float, list[float], list[float], float]]()
        for kind, package in NEEDS.items()
        if find_spec(package)
    }
    for _ in range(asked):
        for kind, rounds in found.items():
            with tempfile.TemporaryDirectory() as name:
                rounds.append(round_of(kind, Path(name)))
    print(
        f"{TRIALS} trials of one step, one worker, {asked} alternated rounds; medians (and quartiles) over trials"
    )
    print(
        "| engine | ms a trial | of it its own | overhead, ms | first record, s | MB of the processes started |"
    )
    print("|---|---|---|---|---|---|")
    for kind, rounds in found.items():
        print(row(kind, rounds))


if __name__ == "__main__":
    main()
