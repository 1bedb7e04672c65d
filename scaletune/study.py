"""Runs a study: sweep, fit, validate on a held-out setting, transfer, plot, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from scaletune import counting, data, fitting, plotting, reporting, transferring
from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.fitting.shared_settings import common_setting
from scaletune.predicting import LOSS_LAWS, Prediction
from scaletune.recipe import Recipe
from scaletune.records import Fit
from scaletune.sweeping import Task, tasks, train_all
from scaletune.sweeping.search import loop


def run(
    study: str | Path, *, out: str | Path = ".", adopt: bool = False, settings: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs a study file and writes everything that the answer rests on. Resumes.

    Writes `sweeps/NAME.jsonl` (the trials), `fits/NAME.json` (the fit), `fits/NAME/` (plots and
    `report.html`) and, for a study with a target, `configs/NAME/FORMAT/` (its configs). Trials that
    are recorded are not trained again.

    Args:
        study: A recipe file with `axes`; optional: `holdout`, `compare` and `target`.
        out: The folder for `sweeps/`, `fits/` and `configs/`.
        adopt: Accept the trials of an existing `.jsonl` record instead of training them again.
        settings: Overrides such as `"model.depth=4"`.

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
    recipe, out = recipes.load(study, settings), Path(out)
    target = recipes.load(Path(study).parent / recipe.target) if recipe.target else None
    _validate_study(recipe, target)
    stem, vocab_size = out / "sweeps" / recipe.name, data.load(recipe.data).vocab_size
    trials = _train(_study_tasks(recipe, stem, adopt), stem, recipe, "proxies", adopt)
    main = trials[trials["sweep"] == "main"]
    fit = fitting.fit(main, recipe.fit.law)
    fit_path = fit.write(out / "fits" / f"{recipe.name}.json")
    if recipe.holdout:
        fit = _validate_law(fit, recipe, vocab_size, stem, fit_path)
    answer: dict[str, Any] = {
        "study": recipe.name,
        "fit": fit,
        "path": fit_path,
        "shift": reporting.shifts(trials),
    }
    if target:
        folder = out / "configs" / recipe.name
        answer["transfer"] = transferring.transfer(fit, target, recipe.to, folder, force=True)
    answer["pictures"] = _plot_study(trials, fit, recipe, out / "fits" / recipe.name)
    answer["report"] = reporting.report(fit, out / "fits" / recipe.name / "report.html", answer)
    return answer


def _validate_study(recipe: Recipe, target: Recipe | None) -> None:
    """Checks law, formats, target and held-out setting before anything is trained."""
    fitting.require_known_law(recipe.fit.law)
    if recipe.fit.law in LOSS_LAWS:
        raise UserError(
            f"`fit.law` of a study must predict a learning rate, but got {recipe.fit.law!r}: use"
            f" `scaletune fit RECORDS --law {recipe.fit.law}`"
        )
    transferring.known_formats(recipe.to)
    points = [point.point() for point in recipes.points(recipe)]
    if recipe.search.kind == "pbt":
        raise UserError(
            "a law needs trials of one schedule, but `search.kind` is 'pbt', which finds one"
            " schedule per trial: use `scaletune sweep`"
        )
    if target:
        transferring.differences(target, common_setting(pd.DataFrame({"point": points})))
    if recipe.holdout:
        held = _held_out(recipe).point()
        width, tokens = held["model"]["width"], held["budget"]["tokens"]
        if any(p["model"] == held["model"] and p["budget"]["tokens"] == tokens for p in points):
            raise UserError(
                "no proxy may train the held-out setting, but `axes` contains width"
                f" {width} with {tokens} tokens"
            )


def _held_out(recipe: Recipe) -> Recipe:
    assert recipe.holdout
    return recipes.with_settings(recipe.model_copy(update={"axes": {}}), recipe.holdout.set)


def _study_tasks(recipe: Recipe, stem: Path, adopt: bool) -> list[Task]:
    """The tasks of the proxies and of each comparison. A search trains its proxies here."""
    compared = [
        task
        for other in recipe.compare
        for task in tasks(other.name, recipes.points(recipes.comparison_recipe(recipe, other)))
    ]
    if recipe.search.kind == "grid":
        return tasks("main", recipes.points(recipe)) + compared
    return loop.run_search(recipe, stem, adopt=adopt, beside=compared)[0] + compared


def _train(
    wanted: list[Task], stem: Path, recipe: Recipe, what: str, adopt: bool = False
) -> pd.DataFrame:
    print(f"{recipe.name}: {len(wanted)} {what}, recorded in {stem}.jsonl", file=sys.stderr)
    # a trial may be recorded for another sweep, for example for an earlier validation
    sweeps = {task.id: task.sweep for task in reversed(wanted)}
    trials = train_all(wanted, stem, recipe.engine.workers, adopt=adopt)
    return trials.assign(sweep=trials["id"].map(sweeps))


def _validate_law(fit: Fit, recipe: Recipe, vocab_size: int, stem: Path, path: Path) -> Fit:
    """Predicts the held-out setting, writes that down, trains the setting, writes the error."""
    held_out = _held_out(recipe)
    assert recipe.holdout
    n_params = counting.params(held_out.model, vocab_size)["n_params"]
    budget = held_out.budget
    predicted = fit.predict(
        n_params=n_params, tokens=budget.tokens, batch_tokens=budget.batch_tokens
    )
    assert predicted.lr is not None
    # three digits: the same point on every machine, so that a second run trains nothing
    chosen = float(f"{predicted.lr:.3g}")
    before = {
        "kind": "predicted, not trained yet",
        "prediction": predicted.to_dict(),
        "leave_one_cell_out": fit.held_out,
    }
    replace(fit, held_out=before).write(path)
    lrs = sorted({*recipe.holdout.lr, chosen})
    points = [recipes.with_settings(held_out, {"lr": lr}) for lr in lrs]
    what = f"held-out trials, predicted lr {chosen:g}"
    trials = _train(tasks("validation", points), stem, recipe, what)
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
    title = f"{recipe.parametrization.form}, {plotting.tokens_label(shared)}"
    panels[title] = main[main["tokens"] == shared]
    figures = {"basins.png": plotting.basins_figure(panels), "law.png": plotting.law_figure(fit)}
    return [plotting.save(figure, out / name) for name, figure in figures.items()]
