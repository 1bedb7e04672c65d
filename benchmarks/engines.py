"""Measures the time that an engine adds to a trial.

Drives sweeps of trivial trials (one step at width 32, never stacked) through each installed engine
in turn, with one worker. The overhead is the time between two records minus the seconds that the
trial itself reports, from the first record to the last, so that no start-up is included. The time
to the first record is printed separately. Table: benchmarks/README.md.

    python benchmarks/engines.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil
from chaos import base_recipe

from scaletune import sweeping
from scaletune.recipe import with_settings
from scaletune.records import Trial

TRIALS = 100
NEEDS = {"local": "torch", "ray": "ray"}  # engines that start their own processes: package needed
HEADER = (
    "| engine | ms per trial | of it training, ms | overhead, ms | first record, s "
    "| MB of the started processes |\n" + "|---" * 6 + "|"
)


class Round(NamedTuple):
    """One sweep with one engine."""

    first: float  # seconds to the first record
    gaps: list[float]  # ms from the previous record, per later trial
    own: list[float]  # ms that the trial itself reports
    memory: float  # MB of private memory (USS) of all child processes


def run_round(kind: str, folder: Path) -> Round:
    point = {"engine.kind": kind, "engine.stack": 1, "tokens": 256, "budget.eval_tokens": 64}
    recipe = with_settings(base_recipe(folder), point)
    recipes = [with_settings(recipe, {"seed": seed}) for seed in range(TRIALS)]
    tasks = sweeping.tasks("main", recipes)
    times, own, memory = [time.monotonic()], list[float](), 0.0

    def record(trial: Trial) -> list[sweeping.Task]:
        nonlocal memory
        assert trial.status == "done"
        times.append(time.monotonic())
        own.append(1000 * trial.seconds)
        if len(own) == TRIALS:
            children = psutil.Process().children(recursive=True)
            memory = sum(child.memory_full_info().uss for child in children) / 2**20
        return []

    sweeping.train_all(tasks, folder / f"sweeps/{kind}", 1, then=record)
    gaps = [1000 * (b - a) for a, b in pairwise(times[1:])]
    return Round(times[1] - times[0], gaps, own[1:], memory)


def format_row(kind: str, rounds: list[Round]) -> str:
    gaps = [ms for each in rounds for ms in each.gaps]
    own = [ms for each in rounds for ms in each.own]
    overhead = [gap - ms for gap, ms in zip(gaps, own, strict=True)]
    low, middle, high = statistics.quantiles(overhead, n=4)
    first = statistics.median(each.first for each in rounds)
    memory = statistics.median(each.memory for each in rounds)
    return (
        f"| {kind} | {statistics.median(gaps):.1f} | {statistics.median(own):.1f} "
        f"| {middle:.1f} ({low:.1f} to {high:.1f}) | {first:.1f} | {memory:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    n_rounds = parser.parse_args().rounds
    results = {kind: list[Round]() for kind, package in NEEDS.items() if find_spec(package)}
    for _ in range(n_rounds):
        for kind, rounds in results.items():
            with tempfile.TemporaryDirectory() as name:
                rounds.append(run_round(kind, Path(name)))
    print(f"{TRIALS} trials of one step, one worker, {n_rounds} alternated rounds;")
    print(f"medians (quartiles) over trials\n\n{HEADER}")
    for kind, rounds in results.items():
        print(format_row(kind, rounds))


if __name__ == "__main__":
    main()
