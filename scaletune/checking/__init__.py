"""Does this parametrization hold? Four checks of what training does at several widths (or depths), on a recipe or on your own model.

coordinate: how far activations move, with the likely bug named. sharpness: the top eigenvalue of the Hessian as the optimizer sees it.
alignment: how updates line up with what they meet. regime: features that are learned, or a kernel that stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from scaletune.checking import alignment, coordinates, regime, sharpness, slope_fit
from scaletune.checking import target as subjects
from scaletune.checking.bug_signatures import BUGS as BUGS
from scaletune.checking.bug_signatures import diagnose as diagnose
from scaletune.checking.coordinates import Slope as Slope
from scaletune.checking.slope_fit import DEPTHS as DEPTHS
from scaletune.checking.slope_fit import SEEDS as SEEDS
from scaletune.checking.slope_fit import WIDTHS as WIDTHS
from scaletune.checking.target import Subject as Subject
from scaletune.errors import UserError, nearest
from scaletune.parametrizing import Plan
from scaletune.recipe import Recipe, with_settings

CHECKS = {
    "coordinate": coordinates.check,
    "sharpness": sharpness.check,
    "alignment": alignment.check,
    "regime": regime.check,
}


def check(
    recipe: Recipe, widths: Sequence[int] = WIDTHS, seeds: Sequence[int] | None = None, *,
    over: str = "width", depths: Sequence[int] = DEPTHS, what: str = "coordinate",
) -> dict[str, Any]:  # fmt: skip
    """One of CHECKS on a recipe's model: {"what", "verdict", "over", "widths", "depths", "seeds", "caveats", ...}; each check's own
    `check` says the rest. Learning rates are the plan's own, without schedule or clipping; a tied head is untied for the coordinate check.
    """
    _known(what)
    if what == "coordinate" and getattr(recipe.model, "tied", False):
        recipe = with_settings(
            recipe, {"model.tied": False}
        )  # a zeroed head must not be the embedding
    own = (recipe.model.width, recipe.model.depth)
    asked = slope_fit.asked(over, widths, depths, _seeds(what, seeds), own)
    return _checked(subjects.of_recipe(recipe), asked, what)


def check_model(
    build: Callable[..., nn.Module], *, widths: Sequence[int], batch: Any, loss: Callable[[nn.Module, Any], Tensor],
    base_width: int | None = None, depths: Sequence[int] = (), base_depth: int | None = None, seeds: Sequence[int] | None = None,
    over: str = "width", what: str = "coordinate", form: str = "mup", optimizer: str = "adamw", lr: float = 1e-3,
    make: Callable[[Plan, nn.Module], Any] | None = None, logits: Callable[[nn.Module, Any], Tensor] | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """One of CHECKS on your own model: `build(width)` makes it, `loss(model, batch)` is its scalar loss on a batch of any kind.

    base_width: where hyperparameters are written; the narrowest, unless said. make: (plan, model) -> an optimizer or several, where the
    recipe's family of that name, at its defaults, does not do. logits: (model, batch) -> them, where more is done to the readout's output. over="depth": `build(width, depth)` at `widths[0]`, with `depth=(alpha, patterns)` among the
    settings. settings: `parametrize`'s others (weight_decay, eps, init_std, overrides, alignment, depth).
    """
    _known(what)
    if not widths:
        raise UserError("a check needs a width, but got none")
    base_width = base_width or min(widths)
    deep = (base_depth or min(depths)) if over == "depth" and depths else base_depth
    asked = slope_fit.asked(over, widths, depths, _seeds(what, seeds), (widths[0], deep or 1))
    other = next((width for width in widths if width != base_width), 2 * base_width)
    made = subjects.of_model(
        build, batch=batch, loss=loss, base_width=base_width, other_width=other, base_depth=deep, form=form, optimizer=optimizer,
        make=make, logits=logits, lr=lr, **settings,
    )  # fmt: skip
    return _checked(made, asked, what)


def _seeds(what: str, seeds: Sequence[int] | None) -> Sequence[int]:
    """Three for the coordinate check, two for the others, which cost more and vary less with the seed."""
    return seeds if seeds is not None else SEEDS if what == "coordinate" else SEEDS[:2]


def _known(what: str) -> None:
    if what not in CHECKS:
        raise UserError(f"`what` must be a check we know, but got {what!r}{nearest(what, CHECKS)}")


def _checked(subject: Subject, asked: slope_fit.Asked, what: str) -> dict[str, Any]:
    shared = {
        "what": what,
        "over": asked.over,
        "widths": asked.widths,
        "depths": asked.depths,
        "seeds": asked.seeds,
    }
    return shared | CHECKS[what](subject, asked)
