"""The main job: sweep, fit, put the law to the test on a cell it never saw, transfer, draw, answer."""

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
    """Carry out a study file: what is on record is not trained again. Returns the answer and writes it with all it rests on.

    `out/sweeps/NAME.jsonl` the trials, `out/fits/NAME.json` the fit, `out/fits/NAME/` pictures and report,
    `out/configs/NAME/FORMAT/` the target's configs. UserError on a study that is not sound, before anything is trained.
    """
    recipe, out = recipes.load(study, settings), Path(out)
    target = recipes.load(Path(study).parent / recipe.target) if recipe.target else None
    _require_sound(recipe, target)
    stem, vocab_size = out / "sweeps" / recipe.name, data.load(recipe.data).vocab_size
    trials = _train(_asked(recipe, stem, adopt), stem, recipe, "proxies", adopt)
    main = trials[trials["sweep"] == "main"]
    fit = fitting.fit(main, recipe.fit.law)
    fit_path = fit.write(out / "fits" / f"{recipe.name}.json")
    if recipe.holdout:
        fit = _validated(fit, recipe, vocab_size, stem, fit_path)
    answer: dict[str, Any] = {
        "study": recipe.name,
        "fit": fit,
        "path": fit_path,
        "shift": reporting.shifts(trials),
    }
    if target:
        answer["transfer"] = transferring.transfer(
            fit, target, recipe.to, out / "configs" / recipe.name, force=True
        )
    answer["pictures"] = _pictures(trials, fit, recipe, out / "fits" / recipe.name)
    answer["report"] = reporting.report(fit, out / "fits" / recipe.name / "report.html", answer)
    return answer


def _require_sound(recipe: Recipe, target: Recipe | None) -> None:
    """UserError on what would otherwise show after the training: a law, a format, a target or a held-out cell that cannot be."""
    fitting.known_law(recipe.fit.law)
    if recipe.fit.law in LOSS_LAWS:
        raise UserError(
            f"a study answers with a learning rate, but `fit.law` is {recipe.fit.law!r}: fit that to the records with `scaletune fit`"
        )
    transferring.known_formats(recipe.to)
    points = [point.point() for point in recipes.points(recipe)]
    if recipe.search.kind == "pbt":
        raise UserError(
            "a law is fitted to trials of one schedule, and search.kind 'pbt' finds each its own: `scaletune sweep` trains it"
        )
    if target:
        transferring.differences(target, common_setting(pd.DataFrame({"point": points})))
    if recipe.holdout:
        held = recipes.with_settings(
            recipe.model_copy(update={"axes": {}}), recipe.holdout.set
        ).point()
        if any(
            point["model"] == held["model"]
            and point["budget"]["tokens"] == held["budget"]["tokens"]
            for point in points
        ):
            width, tokens = held["model"]["width"], held["budget"]["tokens"]
            raise UserError(
                f"a held-out cell must be one that no proxy trains, but `axes` has width {width} and tokens {tokens}"
            )


def _asked(recipe: Recipe, stem: Path, adopt: bool) -> list[Task]:
    """The study's proxies (of a search: those it asked for, then trained) and, beside them, each comparison's."""
    beside = [
        task
        for other in recipe.compare
        for task in tasks(other.name, recipes.points(recipes.compared(recipe, other)))
    ]
    if recipe.search.kind == "grid":
        return tasks("main", recipes.points(recipe)) + beside
    return loop.search(recipe, stem, adopt=adopt, beside=beside)[0] + beside


def _train(
    wanted: list[Task], stem: Path, recipe: Recipe, what: str, adopt: bool = False
) -> pd.DataFrame:
    print(f"{recipe.name}: {len(wanted)} {what}, recorded in {stem}.jsonl", file=sys.stderr)
    asked = {
        task.id: task.sweep for task in reversed(wanted)
    }  # a trial may be on record for another sweep: last time's validation
    trials = train_all(wanted, stem, recipe.engine.workers, adopt=adopt)
    return trials.assign(sweep=trials["id"].map(asked))


def _validated(fit: Fit, recipe: Recipe, vocab_size: int, stem: Path, path: Path) -> Fit:
    """Predict the held-out cell, write the prediction down, train the cell, and write down by how much it missed."""
    assert recipe.holdout
    cell = recipes.with_settings(recipe.model_copy(update={"axes": {}}), recipe.holdout.set)
    n_params = counting.params(cell.model, vocab_size)["n_params"]
    predicted = fit.predict(
        n_params=n_params, tokens=cell.budget.tokens, batch_tokens=cell.budget.batch_tokens
    )
    assert predicted.lr is not None
    chosen = float(
        f"{predicted.lr:.3g}"
    )  # three digits: the same point on every machine, so that a second run trains nothing
    before = {
        "kind": "predicted, not trained yet",
        "prediction": predicted.to_dict(),
        "leave_one_cell_out": fit.held_out,
    }
    replace(fit, held_out=before).write(path)
    points = [
        recipes.with_settings(cell, {"lr": lr}) for lr in sorted({*recipe.holdout.lr, chosen})
    ]
    trials = _train(
        tasks("validation", points), stem, recipe, f"held-out trials, predicted lr {chosen:g}"
    )
    judged = replace(fit, held_out=judge(fit, predicted, chosen, trials))
    judged.write(path)
    return judged


def judge(fit: Fit, predicted: Prediction, chosen: float, trials: pd.DataFrame) -> dict[str, Any]:
    """What the held-out cell says of the prediction: `loss_excess` is the loss of the trial at the predicted lr over the grid's best, minus 1."""
    done = trials[trials["status"] == "done"]
    losses = dict(zip(done["lr"], done["loss"], strict=True))
    best = min(losses, key=lambda lr: losses[lr]) if losses else None
    at = losses.get(chosen)
    compared = fitting.compare(predicted, fitting.measure(trials)[0])
    row = compared | {
        "interval": predicted.interval, "band": predicted.band, "trained_lr": chosen, "loss_at_predicted": at,
        "best_lr": best, "best_loss": losses[best] if best else None,
        "loss_excess": at / losses[best] - 1 if at and best else None,
        "grid": [{"lr": lr, "loss": loss} for lr, loss in sorted(losses.items())],
    }  # fmt: skip
    return {"kind": "validation", "cells": [row], "leave_one_cell_out": fit.held_out}


def _pictures(trials: pd.DataFrame, fit: Fit, recipe: Recipe, out: Path) -> list[Path]:
    """Loss against lr by width, each comparison beside the study at the horizon they share; the law with the held-out point."""
    main = trials[trials["sweep"] == "main"]
    panels = {}
    for other in recipe.compare:
        rows = trials[trials["sweep"] == other.name]
        panels[f"{other.name}, {plotting.tokens_label(rows['tokens'].max())}"] = rows[
            rows["tokens"] == rows["tokens"].max()
        ]
    shared = max(
        {rows["tokens"].max() for rows in panels.values()} & set(main["tokens"]),
        default=main["tokens"].max(),
    )
    panels[f"{recipe.parametrization.form}, {plotting.tokens_label(shared)}"] = main[
        main["tokens"] == shared
    ]
    figures = {"basins.png": plotting.basins_figure(panels), "law.png": plotting.law_figure(fit)}
    return [plotting.save(figure, out / name) for name, figure in figures.items()]
