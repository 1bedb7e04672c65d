"""Measures what processes that stay between trials save.

Drives a sweep of short trials of two processes (one worker, gloo, CPU) and of the same trials of
one process, in turn; and the trials of two processes where each starts its own.
Table: benchmarks/README.md.

    python benchmarks/process_groups.py [--trials 8] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from chaos import base_recipe

from scaletune import sweeping, training
from scaletune.recipe import Recipe, with_settings

HEADER = (
    "| trials of | processes | whole sweep, s | first trial, s | each later trial, s |\n"
    + "|---" * 5
    + "|"
)


def points(folder: Path, processes: int, trials: int) -> list[Recipe]:
    settings = {"engine.stack": 1, "engine.processes": processes, "tokens": 256 * 64}
    recipe = with_settings(base_recipe(folder), settings)
    return [with_settings(recipe, {"seed": seed}) for seed in range(trials)]


def time_sweep(folder: Path, processes: int, trials: int) -> list[float]:
    """Seconds from the start of a sweep to each of its records."""
    tasks = sweeping.tasks("main", points(folder, processes, trials))
    times, start = list[float](), time.monotonic()

    def record(trial: object) -> list[sweeping.Task]:
        times.append(time.monotonic() - start)
        return []

    sweeping.train_all(tasks, folder / "sweeps/groups", 1, then=record)
    return times


def time_new_groups(folder: Path, processes: int, trials: int) -> list[float]:
    """The same where each trial starts its processes anew."""
    times, start = list[float](), time.monotonic()
    for point in points(folder, processes, trials):
        with training.RankGroup() as group:
            group.run_trial(point, "main")
        times.append(time.monotonic() - start)
    return times


WAYS = {
    ("1 process", "a worker"): (time_sweep, 1),
    ("2 processes", "stay"): (time_sweep, 2),
    ("2 processes", "start with each trial"): (time_new_groups, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds: dict[tuple[str, str], list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, (measure, processes) in WAYS.items():
            with tempfile.TemporaryDirectory() as name:
                rounds[way].append(measure(Path(name), processes, args.trials))
    print(f"{args.trials} trials of 64 steps, {args.rounds} rounds in turn, medians\n\n{HEADER}")
    for (trials, kind), times in rounds.items():
        whole = statistics.median(each[-1] for each in times)
        first = statistics.median(each[0] for each in times)
        later = statistics.median((each[-1] - each[0]) / (len(each) - 1) for each in times)
        print(f"| {trials} | {kind} | {whole:.1f} | {first:.1f} | {later:.2f} |")


if __name__ == "__main__":
    main()
