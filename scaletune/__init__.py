"""scaletune: tune small proxies, fit the law, predict the optimum at the target scale, say how sure.

The verbs, each the command of the same name: `run plan sweep status export fit predict transfer lint plot report check count`; `laws` is the
catalogue of published laws. Loaded on first use: predicting imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaletune import laws as laws
    from scaletune.checking import check as check
    from scaletune.checking import check_model as check_model
    from scaletune.counting import count as count
    from scaletune.errors import UserError as UserError
    from scaletune.fitting.fit import fit as fit
    from scaletune.linting import lint as lint
    from scaletune.parametrizing import parametrize as parametrize
    from scaletune.planning import plan as plan
    from scaletune.plotting import plot as plot
    from scaletune.predicting import predict as predict
    from scaletune.recipe import Recipe as Recipe
    from scaletune.records import Fit as Fit
    from scaletune.records import Trial as Trial
    from scaletune.records import read_trials as read_trials
    from scaletune.reporting import report as report
    from scaletune.study import run as run
    from scaletune.sweeping import export as export
    from scaletune.sweeping import sweep as sweep
    from scaletune.sweeping.status import status as status
    from scaletune.transferring import transfer as transfer

_HOME = {
    "check": "checking", "count": "counting", "fit": "fitting", "parametrize": "parametrizing", "plan": "planning", "plot": "plotting", "predict": "predicting",
    "report": "reporting", "run": "study", "sweep": "sweeping", "status": "sweeping", "export": "sweeping", "transfer": "transferring", "lint": "linting",
    "check_model": "checking", "Fit": "records", "Recipe": "recipe", "Trial": "records", "UserError": "errors", "read_trials": "records",
}  # fmt: skip
__all__ = [*_HOME, "laws"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"scaletune.{_HOME[name]}"), name)
    if name == "laws":
        return import_module("scaletune.laws")
    raise AttributeError(f"module 'scaletune' has no attribute {name!r}")
