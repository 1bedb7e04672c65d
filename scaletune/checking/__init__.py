"""Four checks of a parametrization: does training scale as intended with width (or depth)?

- coordinate: how far activations change in a few steps; it names the likely bug.
- sharpness: the top eigenvalue of the Hessian, as the optimizer sees it.
- alignment: how strongly weight updates are correlated with their inputs.
- regime: feature learning, or a kernel that stays constant.

`check` runs one on a recipe, `check_model` on your own model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from scaletune import environment
from scaletune.checking import alignment, coordinates, regime, sharpness, slope_fit
from scaletune.checking.bug_signatures import BUGS as BUGS
from scaletune.checking.bug_signatures import diagnose as diagnose
from scaletune.checking.coordinates import Slope as Slope
from scaletune.checking.slope_fit import DEPTHS as DEPTHS
from scaletune.checking.slope_fit import SEEDS as SEEDS
from scaletune.checking.slope_fit import WIDTHS as WIDTHS
from scaletune.checking.target import CheckTarget as CheckTarget
from scaletune.checking.target import model_target, recipe_target
from scaletune.errors import UserError, nearest
from scaletune.parametrizing import Plan
from scaletune.recipe import Recipe, with_settings
from scaletune.recipe.resolve import resolve_recipe

CHECKS = {
    "coordinate": coordinates.check,
    "sharpness": sharpness.check,
    "alignment": alignment.check,
    "regime": regime.check,
}


def check(
    recipe: str | Path | Recipe,
    widths: Sequence[int] = WIDTHS,
    seeds: Sequence[int] | None = None,
    *,
    over: str = "width",
    depths: Sequence[int] = DEPTHS,
    what: str = "coordinate",
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Checks the parametrization of a recipe: trains its model at several widths or depths.

    Each run trains a few steps on one batch, with the learning rates of the plan, without schedule
    or gradient clipping. For the coordinate check a tied readout is untied.

    Args:
        recipe: A recipe file, or a `Recipe`. Its axes are ignored.
        widths: Widths to train at, if `over="width"`.
        seeds: Seeds of each model. None: 0, 1, 2 for the coordinate check and 0, 1 for the others.
        over: What varies, "width" or "depth".
        depths: Depths to train at, if `over="depth"`.
        what: "coordinate", "sharpness", "alignment" or "regime".
        settings: Overrides of recipe settings, as in `--set`: ["model.depth=4"].

    Returns:
        {"what", "verdict", "over", "widths", "depths", "seeds", "caveats"} and the measurements of
        the check: "slopes", "sizes", "diagnosis" (coordinate); "steps", "slope", "threshold",
        "finding" (sharpness); "tensors", "finding" (alignment); "changes", "finding" (regime).

    Raises:
        UserError: A setting is not valid, or no slope can be computed.

    Example:
        >>> import scaletune as st
        >>> result = st.check(
        ...     "configs/examples/mlp-digits.toml", (32, 64, 128), (0,), settings=["model.depth=1"]
        ... )
        >>> result["verdict"], result["diagnosis"]
        ('pass', [])
    """
    _check_name(what)
    environment.require_full_precision()
    recipe = resolve_recipe(recipe, settings)
    if what == "coordinate" and getattr(recipe.model, "tied", False):
        recipe = with_settings(recipe, {"model.tied": False})  # only the readout may be zeroed
    own = (recipe.model.width, recipe.model.depth)
    grid = slope_fit.size_grid(over, widths, depths, _seeds(what, seeds), own)
    return _run_check(recipe_target(recipe), grid, what)


def check_model(
    build: Callable[..., nn.Module],
    *,
    widths: Sequence[int],
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    base_width: int | None = None,
    depths: Sequence[int] = (),
    base_depth: int | None = None,
    seeds: Sequence[int] | None = None,
    over: str = "width",
    what: str = "coordinate",
    form: str = "mup",
    optimizer: str = "adamw",
    lr: float = 1e-3,
    make: Callable[[Plan, nn.Module], Any] | None = None,
    logits: Callable[[nn.Module, Any], Tensor] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Checks a parametrization on your own model: trains it at several widths or depths.

    Args:
        build: `build(width)` returns a new model; with `over="depth"`, `build(width, depth)`.
        widths: Widths to train at; with `over="depth"` the first one is used.
        batch: The batch to train on, of any type.
        loss: `loss(model, batch)` returns the scalar loss.
        base_width: Width at which the hyperparameters are written. None: the smallest of `widths`.
        depths: Depths to train at, if `over="depth"`.
        base_depth: Depth at which the hyperparameters are written. None: the smallest of `depths`.
        seeds: Seeds of each model. None: 0, 1, 2 for the coordinate check and 0, 1 for the others.
        over: What varies, "width" or "depth".
        what: "coordinate", "sharpness", "alignment" or "regime".
        form: Parametrization, as in `parametrize`.
        optimizer: Optimizer family, as in `parametrize`.
        lr: Peak learning rate at the base size.
        make: `make(plan, model)` returns an optimizer, or a list of them. None: the family of this
            name as a recipe builds it, with default options.
        logits: `logits(model, batch)` returns the logits, if the model changes the output of its
            readout module. None: that output.
        settings: Other arguments of `parametrize`: `weight_decay`, `eps`, `init_std`, `overrides`,
            `alignment`, `depth` (needed with `over="depth"`).

    Returns:
        As `check`.

    Raises:
        UserError: A setting is not valid, or no slope can be computed.

    Example:
        >>> import scaletune as st
        >>> import torch
        >>> from torch import nn
        >>> def mlp(width):
        ...     hidden = nn.Linear(width, width)
        ...     return nn.Sequential(nn.Linear(8, width), nn.Tanh(), hidden, nn.Linear(width, 4))
        >>> x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
        >>> batch = (x, torch.arange(16) % 4)
        >>> def loss(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> result = st.check_model(
        ...     mlp, widths=(32, 64, 128), seeds=(0,), batch=batch, loss=loss, form="sp", lr=3e-3
        ... )
        >>> result["verdict"]
        'fail'
        >>> result["diagnosis"][0].split(":")[0]
        'standard parametrization with one global lr'
    """
    _check_name(what)
    if not widths:
        raise UserError("a check needs at least one width, but got none")
    base_width = base_width or min(widths)
    if over == "depth" and depths:
        base_depth = base_depth or min(depths)
    own = (widths[0], base_depth or 1)
    grid = slope_fit.size_grid(over, widths, depths, _seeds(what, seeds), own)
    target = model_target(
        build,
        batch=batch,
        loss=loss,
        base_width=base_width,
        other_width=next((width for width in widths if width != base_width), 2 * base_width),
        base_depth=base_depth,
        form=form,
        optimizer=optimizer,
        make=make,
        logits=logits,
        lr=lr,
        **settings,
    )
    return _run_check(target, grid, what)


def _seeds(what: str, seeds: Sequence[int] | None) -> Sequence[int]:
    """Three seeds for the coordinate check; two for the others, which cost more and vary less."""
    return seeds if seeds is not None else SEEDS if what == "coordinate" else SEEDS[:2]


def _check_name(what: str) -> None:
    if what not in CHECKS:
        raise UserError(
            f"`what` must be one of {', '.join(CHECKS)}, but got {what!r}{nearest(what, CHECKS)}"
        )


def _run_check(target: CheckTarget, grid: slope_fit.SizeGrid, what: str) -> dict[str, Any]:
    shared = {
        "what": what,
        "over": grid.over,
        "widths": grid.widths,
        "depths": grid.depths,
        "seeds": grid.seeds,
    }
    return shared | CHECKS[what](target, grid)
