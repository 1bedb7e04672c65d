"""A target that the user's own code trains: what is known of it, and how to start it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletune.counting.point_sizes import Measure, PointSizes, require_n_params, stated_sizes
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.recipe.placeholder_values import derived_values, setting_values
from scaletune.recipe.placeholders import fill_template
from scaletune.rules import TransferPrior
from scaletune.zoo import OwnConfig

FILES = ("plan", "results")
"""Placeholders of files that only a sweep writes."""
UNKNOWN_OPTIMIZER = "unknown optimizer"
"""Name of the rule that changes nothing."""
LR = ("lr", "optimizer.lr", "plan")


def knows_tensors(target: Recipe) -> bool:
    """Whether the tensors of the target's model are known: a family of the zoo."""
    return not isinstance(target.model, OwnConfig)


def measure_target(target: Recipe, sizes: Measure | None) -> PointSizes:
    """The sizes of a target whose tensors are not known.

    Raises:
        UserError: The parameters or the budget are not stated.
    """
    if not target.has_budget:
        raise UserError(
            "a target must state how long it trains: set `budget.tokens` and `budget.batch_tokens`"
        )
    measured = (sizes or stated_sizes)(target)
    require_n_params(measured, "a target")
    return measured


def require_formats(target: Recipe, formats: list[str]) -> None:
    """UserError if a format needs tensors that are not known."""
    needs = [name for name in formats if name != "recipe"]
    if needs and not knows_tensors(target):
        raise UserError(
            f"format {needs[0]!r} needs the tensors of the target's model, which only your code"
            " knows: emit 'recipe', or give the target `model.hf` or a family of the zoo"
        )


def unknown_batch_rule(batch_tokens: float, fitted_at: float) -> TransferPrior:
    """No change of the lr with the batch size: the rule depends on the optimizer."""
    return TransferPrior(
        1.0,
        f"batch size {fitted_at:g} -> {batch_tokens:g} tokens: lr is not adjusted to it, because"
        " the rule depends on the optimizer and the recipe does not state `optimizer.family`; train"
        " proxies at several batch sizes",
        UNKNOWN_OPTIMIZER,
    )


def unused_lr(target: Recipe) -> list[str]:
    """A sentence if the target's command does not get the predicted lr."""
    names = target.trainer.names()
    if not target.trainer.command or any(n in LR or n.startswith("lr.") for n in names):
        return []
    return [
        "the command of the target has no placeholder {lr}: it does not get the predicted learning"
        " rate, so set it in your code"
    ]


def other_trainer(target: Recipe, shared: Mapping[str, Any]) -> list[str]:
    """A sentence if another program, or another version of it, trains the target."""
    own = target.trainer.identity()
    if not own or own == dict(shared):
        return []
    return [
        f"{_program(own)} trains the target, and {_program(shared)} trained every proxy: assumed to"
        " train alike"
    ]


def _program(trainer: Mapping[str, Any]) -> str:
    name = " ".join(trainer.get("command", [])) or trainer.get("function") or "somebody else"
    version = f" at version {trainer['version']}" if trainer.get("version") else ""
    return f"`{name}`{version}"


def start(target: Recipe, written: Path | None) -> dict[str, str | None]:
    """How to start the target run: as a sweep of the written recipe, and by hand.

    Args:
        target: The target with the predicted settings.
        written: The recipe that was written for it.
    """
    function = target.trainer.function
    if target.trainer.external:
        return {"ask": f"scaletune ask {shlex.quote(str(written))}" if written else None}
    forked = function.startswith("__main__:") or "<" in function
    sweep = None
    if written is not None:
        sweep = f"scaletune sweep {shlex.quote(str(written))}"
        if forked:
            sweep = f"st.sweep({str(written)!r}, train={function.split(':')[1].split('.')[-1]})"
    return {"sweep": sweep, "command": filled_command(target)}


def filled_command(target: Recipe) -> str | None:
    """The command with the target's settings; None if a sweep must write files for it first."""
    trainer = target.trainer
    if not trainer.command or trainer.names() & set(FILES):
        return None
    hardware, engine = target.hardware, target.engine
    values: Mapping[str, Any] = {
        "run_dir": f"runs/{target.name}",
        "id": target.name,
        "gpus": hardware.gpus if hardware else engine.requested_gpus or engine.processes,
        "nodes": engine.nodes_per_trial,
        "resume_from": None,
        **setting_values(target),
        **derived_values(target),
    }
    return shlex.join(fill_template("trainer.command", text, values) for text in trainer.command)
