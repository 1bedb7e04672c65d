"""Runs a study: sweep, fit, validate on a held-out setting, transfer, plot, report."""

from __future__ import annotations

import math
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from scaletune import fitting, plotting, reporting, transferring
from scaletune import recipe as recipes
from scaletune.counting.point_sizes import HOW_TO_COUNT
from scaletune.errors import UserError
from scaletune.fitting.shared_settings import common_setting
from scaletune.predicting import LOSS_LAWS, Prediction
from scaletune.recipe import Recipe
from scaletune.recipe.resolve import resolve_recipe
from scaletune.records import Fit
from scaletune.sweeping import Task, tasks, train_all
from scaletune.sweeping.search import loop
from scaletune.sweeping.sizes import Sizes, point_sizes
from scaletune.sweeping.trainers.own_function import resolve_own, trained_by

if TYPE_CHECKING:
    from scaletune.trial import CurrentTrial

    Train = Callable[[CurrentTrial], Any]


def run(
    study: str | Path | Recipe,
    *,
    out: str | Path = ".",
    adopt: bool = False,
    settings: Sequence[str] = (),
    train: Train | None = None,
) -> dict[str, Any]:
    """Runs a study file and writes everything that the answer rests on. Resumes.

    Writes `sweeps/NAME.jsonl` (the trials), `fits/NAME.json` (the fit), `fits/NAME/` (plots and
    `report.html`) and, for a study with a target, `configs/NAME/FORMAT/` (its configs). Trials that
    are recorded are not trained again.

    Args:
        study: A recipe with `axes`, or its file; optional: `holdout`, `compare` and `target`.
        out: The folder for `sweeps/`, `fits/` and `configs/`.
        adopt: Accept the trials of an existing `.jsonl` record instead of training them again.
        settings: Overrides such as `"model.depth=4"`.
        train: A function that trains a trial, instead of scaletune's loop: see `scaletune.sweep`.

    Returns:
        `study` (its name), `fit` (a `Fit`), `path` (the fit's file), `shift` (by how much the
        optimal lr moves over width), `transfer` (the answer at the target, if there is one),
        `pictures` and `report` (files).

    Raises:
        UserError: The study is not valid. Nothing is trained then.

    Example:
        >>> import scaletune as st
        >>> st.run("configs/quickstart.toml", settings=["fit.law='loss_nd'"])
        Traceback (most recent call last):
        ...
        scaletune.errors.UserError: `fit.law` of a study must predict a learning rate, but got ...
    """
    (recipe, forked), out = resolve_own(study, settings, train), Path(out)
    folder = Path() if isinstance(study, Recipe) else Path(study).parent
    target = _load_target(folder / recipe.target, train) if recipe.target else None
    _validate_study(recipe, target)
    held_out = _measure_held_out(recipe)
    stem = out / "sweeps" / recipe.name
    runs = StudyRuns(recipe, stem, forked)
    trials = runs.train(runs.tasks(adopt), "proxies", adopt)
    main = trials[trials["sweep"] == "main"]
    fit = fitting.fit(main, recipe.fit.law)
    fit_path = fit.write(out / "fits" / f"{recipe.name}.json")
    if held_out:
        fit = _validate_law(fit, runs, held_out, fit_path)
    answer: dict[str, Any] = {
        "study": recipe.name,
        "fit": fit,
        "path": fit_path,
        "shift": reporting.shifts(trials),
    }
    if target:
        folder = out / "configs" / recipe.name
        answer["transfer"] = transferring.transfer(
            fit, target, _formats(recipe, target), folder, force=True, sizes=point_sizes
        )
    answer["pictures"] = _plot_study(trials, fit, recipe, out / "fits" / recipe.name)
    answer["report"] = reporting.report(fit, out / "fits" / recipe.name / "report.html", answer)
    return answer


def _load_target(path: Path, train: Train | None) -> Recipe:
    """The target's recipe. One without a trainer has the function that trains the study."""
    if train is None or not path.is_file():
        return recipes.load(path)
    try:
        trainer = tomllib.loads(path.read_text("utf-8")).get("trainer", {})
    except ValueError:
        return recipes.load(path)  # which reports it
    own = isinstance(trainer, dict) and ("command" in trainer or "function" in trainer)
    return recipes.load(path) if own else resolve_recipe(path, (), trained_by(train))


def _formats(recipe: Recipe, target: Recipe) -> list[str]:
    """The formats that the study names, else those of the target's model."""
    unnamed = recipe.to == Recipe.model_fields["to"].default
    return transferring.default_formats(target) if unnamed else recipe.to


def _validate_study(recipe: Recipe, target: Recipe | None) -> None:
    """Checks law, formats, target and held-out setting before anything is trained."""
    fitting.require_known_law(recipe.fit.law)
    if recipe.fit.law in LOSS_LAWS:
        raise UserError(
            f"`fit.law` of a study must predict a learning rate, but got {recipe.fit.law!r}: use"
            f" `scaletune fit RECORDS --law {recipe.fit.law}`"
        )
    formats = transferring.known_formats(_formats(recipe, target) if target else recipe.to)
    points = [point.point() for point in recipes.points(recipe)]
    if recipe.search.kind == "pbt":
        raise UserError(
            "a law needs trials of one schedule, but `search.kind` is 'pbt', which finds one"
            " schedule per trial: use `scaletune sweep`"
        )
    if target:
        transferring.require_formats(target, formats)
        if not transferring.knows_tensors(target):
            transferring.measure_target(target, point_sizes)
        transferring.differences(target, common_setting(pd.DataFrame({"point": points})))
    if recipe.holdout:
        held = _held_out(recipe).point()
        if any(_setting_of(point) == _setting_of(held) for point in points):
            raise UserError(
                "no proxy may train the held-out setting, but `axes` contains width"
                f" {held['model']['width']}"
                + (f" with {held['budget']['tokens']} tokens" if "budget" in held else "")
            )


def _setting_of(point: dict[str, Any]) -> tuple[Any, ...]:
    """What the size and the token budget of a point depend on."""
    return point["model"], point.get("my"), point.get("budget", {}).get("tokens")


def _held_out(recipe: Recipe) -> Recipe:
    assert recipe.holdout
    return recipes.with_settings(recipe.model_copy(update={"axes": {}}), recipe.holdout.set)


def _measure_held_out(recipe: Recipe) -> Sizes | None:
    """The sizes of the held-out setting, which is predicted before it is trained."""
    if not recipe.holdout:
        return None
    sizes = point_sizes(_held_out(recipe))
    unknown = [name for name in ("n_params", "tokens") if math.isnan(getattr(sizes, name))]
    if unknown:
        how = HOW_TO_COUNT if "n_params" in unknown else "set `budget.tokens`"
        raise UserError(
            f"the held-out setting is predicted before it is trained, which needs its"
            f" {' and '.join(f'`{name}`' for name in unknown)}, but nobody states"
            f" {'it' if len(unknown) == 1 else 'them'}: {how}"
        )
    return sizes


@dataclass(frozen=True)
class StudyRuns:
    """Trains what a study needs."""

    recipe: Recipe
    stem: Path
    """Path of the sweep's files without suffix."""
    forked: Train | None = None
    """The user's function that trains, where it cannot be imported by its name."""

    def tasks(self, adopt: bool) -> list[Task]:
        """The tasks of the proxies and of each comparison. A search trains its proxies here."""
        recipe = self.recipe
        compared = [
            task
            for other in recipe.compare
            for task in tasks(other.name, recipes.points(recipes.comparison_recipe(recipe, other)))
        ]
        if not recipe.search.decides:
            return tasks("main", recipes.points(recipe)) + compared
        return (
            loop.run_search(recipe, self.stem, adopt=adopt, beside=compared, train=self.forked)[0]
            + compared
        )

    def train(self, wanted: list[Task], what: str, adopt: bool = False) -> pd.DataFrame:
        """Trains tasks that are not recorded, and returns the trials of all."""
        recipe, stem = self.recipe, self.stem
        print(f"{recipe.name}: {len(wanted)} {what}, recorded in {stem}.jsonl", file=sys.stderr)
        # a trial may be recorded for another sweep, for example for an earlier validation
        sweeps = {task.id: task.sweep for task in reversed(wanted)}
        workers = recipe.engine.workers
        trials = train_all(wanted, stem, workers, adopt=adopt, train=self.forked)
        return trials.assign(sweep=trials["id"].map(sweeps))


def _validate_law(fit: Fit, runs: StudyRuns, sizes: Sizes, path: Path) -> Fit:
    """Predicts the held-out setting, writes that down, trains the setting, writes the error."""
    holdout = runs.recipe.holdout
    assert holdout
    scale = {
        name: getattr(sizes, name)
        for name in ("n_params", "tokens", "batch_tokens")
        if not math.isnan(getattr(sizes, name))
    }
    predicted = fit.predict(**scale)
    assert predicted.lr is not None
    # three digits: the same point on every machine, so that a second run trains nothing
    chosen = float(f"{predicted.lr:.3g}")
    before = {
        "kind": "predicted, not trained yet",
        "prediction": predicted.to_dict(),
        "leave_one_cell_out": fit.held_out,
    }
    replace(fit, held_out=before).write(path)
    lrs = sorted({*holdout.lr, chosen})
    points = [recipes.with_settings(_held_out(runs.recipe), {"lr": lr}) for lr in lrs]
    what = f"held-out trials, predicted lr {chosen:g}"
    trials = runs.train(tasks("validation", points), what)
    validated = replace(fit, held_out=judge(fit, predicted, chosen, trials))
    validated.write(path)
    return validated


def judge(fit: Fit, predicted: Prediction, chosen: float, trials: pd.DataFrame) -> dict[str, Any]:
    """Compares the prediction for the held-out setting with its trials.

    Args:
        fit: The fit that predicted.
        predicted: Its prediction.
        chosen: The learning rate that was trained for the prediction.
        trials: The trials of the held-out setting.

    Returns:
        A value for `Fit.held_out`. `loss_excess` is the loss at the predicted learning rate over
        the lowest loss of the grid, minus 1.
    """
    done = trials[trials["status"] == "done"]
    losses = dict(zip(done["lr"], done["loss"], strict=True))
    best = min(losses, key=lambda lr: losses[lr]) if losses else None
    at_chosen = losses.get(chosen)
    row = fitting.compare(predicted, fitting.measure(trials)[0]) | {
        "interval": predicted.interval,
        "band": predicted.band,
        "trained_lr": chosen,
        "loss_at_predicted": at_chosen,
        "best_lr": best,
        "best_loss": losses[best] if best else None,
        "loss_excess": at_chosen / losses[best] - 1 if at_chosen and best else None,
        "grid": [{"lr": lr, "loss": loss} for lr, loss in sorted(losses.items())],
    }
    return {"kind": "validation", "cells": [row], "leave_one_cell_out": fit.held_out}


def _plot_study(trials: pd.DataFrame, fit: Fit, recipe: Recipe, out: Path) -> list[Path]:
    """Plots loss against lr by width, for each comparison and the study, and the fitted law."""
    main = trials[trials["sweep"] == "main"]
    panels = {}
    for other in recipe.compare:
        rows = trials[trials["sweep"] == other.name]
        longest = rows["tokens"].max()
        title = f"{other.name}, {plotting.tokens_label(longest)}"
        panels[title] = rows[rows["tokens"] == longest]
    horizons = {rows["tokens"].max() for rows in panels.values()} & set(main["tokens"])
    shared = max(horizons, default=main["tokens"].max())
    form = recipe.parametrization.form if recipe.parametrization.model_fields_set else recipe.name
    title = f"{form}, {plotting.tokens_label(shared)}"
    panels[title] = main[main["tokens"] == shared]
    figures = {"basins.png": plotting.basins_figure(panels), "law.png": plotting.law_figure(fit)}
    return [plotting.save(figure, out / name) for name, figure in figures.items()]
