"""Train small proxies, fit a law, predict the optimum at the target scale, with intervals.

Each function has a command of the same name: `run`, `plan`, `sweep`, `status`, `export`, `fit`,
`predict`, `transfer`, `lint`, `plot`, `report`, `check`, `count`, `init`. `Search` is `scaletune
ask` and `scaletune tell`. `laws` is the catalogue of published laws. Names load on first use:
`import scaletune` and `predict` import no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaletune import laws as laws
    from scaletune.checking import check as check
    from scaletune.checking import check_model as check_model
    from scaletune.errors import UserError as UserError
    from scaletune.examples import init as init
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
    from scaletune.sweeping.point_counts import count as count
    from scaletune.sweeping.search.ask_tell import Search as Search
    from scaletune.sweeping.status import status as status
    from scaletune.transferring import transfer as transfer

__version__ = "0.1.0"

_MODULES = {
    "Fit": "records",
    "Recipe": "recipe",
    "Search": "sweeping.search.ask_tell",
    "Trial": "records",
    "UserError": "errors",
    "check": "checking",
    "check_model": "checking",
    "count": "sweeping.point_counts",
    "export": "sweeping",
    "fit": "fitting",
    "init": "examples",
    "lint": "linting",
    "parametrize": "parametrizing",
    "plan": "planning",
    "plot": "plotting",
    "predict": "predicting",
    "read_trials": "records",
    "report": "reporting",
    "run": "study",
    "status": "sweeping",
    "sweep": "sweeping",
    "transfer": "transferring",
}
__all__ = [*_MODULES, "laws"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"scaletune.{_MODULES[name]}"), name)
    if name == "laws":
        return import_module("scaletune.laws")
    raise AttributeError(f"module 'scaletune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
