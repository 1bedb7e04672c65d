"""`count`: parameters, FLOPs, memory and estimated seconds of every point; trains nothing.

Models of the zoo are counted from their config; the user's module is built on the meta device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaletune import counting
from scaletune.recipe import Recipe, points
from scaletune.recipe.resolve import resolve_recipe
from scaletune.sweeping.sizes import foreign_sizes, size_key
from scaletune.zoo import OwnConfig


def count(
    recipe: str | Path | Recipe, vocab_size: int | None = None, *, settings: Sequence[str] = ()
) -> Any:
    """Counts parameters, FLOPs, memory and estimated seconds; trains nothing.

    Args:
        recipe: A recipe file, or a `Recipe`.
        vocab_size: Size of the vocabulary, or number of classes or outputs. Default: that of a
            built-in source, else `data.vocab_size`, else 256 (bytes).
        settings: Overrides of recipe settings, as in `--set`: ["model.depth=4"].

    Returns:
        A dict per point: `params` by group; `flops_per_token` and total `flops`;
        `flops_per_token_by` part; `memory_bytes` and `bytes_per_step` of float32 training;
        `seconds`, a rough estimate for one CPU core; and the settings that they belong to. A list
        of them for a file or for a `Recipe` with axes; one dict for a `Recipe` without axes. Of a
        user's module the activations and the memory traffic are not known (None).

    Raises:
        UserError: The file is missing, a setting is not valid, or a module cannot be built.

    Example:
        >>> import scaletune as st
        >>> points = st.count("configs/quickstart.toml")
        >>> len(points), points[0]["width"], points[0]["params"]["n_params_total"]
        (54, 32, 43168)
    """
    whole = resolve_recipe(recipe, settings)
    size = counting.default_vocab_size(whole) if vocab_size is None else vocab_size
    if isinstance(recipe, Recipe) and not (whole.axes or whole.cells):
        return count_any(whole, size)
    return count_points(points(whole), size)


def count_points(points: Sequence[Recipe], vocab_size: int) -> list[dict[str, Any]]:
    """The counts of each point. Points of one shape are counted once."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = []
    for point in points:
        if (key := size_key(point)) not in known:
            known[key] = count_any(point, vocab_size)
        rows.append(dict(known[key]))
    return rows


def count_any(point: Recipe, vocab_size: int) -> dict[str, Any]:
    """The counts of one point: see `count`.

    Of a foreign trainer, what the recipe states and what `trainer.describe` says.
    """
    if point.foreign:
        return _count_foreign(point)
    if not isinstance(point.model, OwnConfig):
        return counting.count_point(point, vocab_size)
    from scaletune.sweeping.built_sizes import count_built  # imports torch

    return count_built(point, vocab_size)


def _count_foreign(point: Recipe) -> dict[str, Any]:
    sizes = foreign_sizes(point)
    known = {name: None if value != value else value for name, value in vars(sizes).items()}
    return {
        "family": point.model.family,
        "width": point.model.width,
        "depth": point.model.depth,
        "vocab_size": None,
        "params": {name: known[name] for name in ("n_params", "n_params_total")},
        "tokens": known["tokens"],
        "batch_tokens": known["batch_tokens"],
        "steps": point.budget.steps if point.has_budget else None,
        "flops_per_token": None,
        "flops": known["flops"],
        "flops_from": sizes.flops_from if known["flops"] else None,
        "flops_per_token_by": {},
        "memory_bytes": {"weights_optimizer": None, "activations": None},
        "bytes_per_step": None,
        "seconds": None,
    }
