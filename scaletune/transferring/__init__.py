"""Writes configs for training stacks from a fit and a target recipe.

Each stack has one emitter, `formats/NAME.py`, with `emit(transfer, folder) -> list of paths` and a
row in `FORMATS`. `target` computes the `Transfer` that all emitters write from, `answer/` the
recommended settings with their cost. `read_back` reads emitted folders again.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from scaletune.counting.point_sizes import Measure
from scaletune.errors import UserError, nearest
from scaletune.recipe import Recipe
from scaletune.recipe.resolve import resolve_recipe
from scaletune.records import Fit
from scaletune.transferring.formats.unsupported import UNSUPPORTED, UNTESTED
from scaletune.transferring.own_target import knows_tensors as knows_tensors
from scaletune.transferring.own_target import measure_target as measure_target
from scaletune.transferring.own_target import require_formats as require_formats
from scaletune.transferring.own_target import start
from scaletune.transferring.target import TOO_FAR as TOO_FAR
from scaletune.transferring.target import Transfer as Transfer
from scaletune.transferring.target import at_batch as at_batch
from scaletune.transferring.target import differences as differences
from scaletune.transferring.target import one_std as one_std
from scaletune.transferring.target import prepare as prepare

TRANSFORMERS = "5.23.0"
FORMATS = {
    "granite": TRANSFORMERS,
    "recipe": "1",
    "hyperclovax": TRANSFORMERS,
    "llama": TRANSFORMERS,
    "pytorch": "2.13",
    "granitemoe": TRANSFORMERS,
    "minicpm3": TRANSFORMERS,
    "falcon_h1": TRANSFORMERS,
    "torchtitan": "0.3.0",
    "olmo_core": "3.0.0",
    "deepspeed": "0.16.5",
    "nanogpt_mup": "39044043",
    "megatron": "0044db1f",
    "megatron_bridge": "0.3.1",
    "cerebras": "18bcbd2d",
    "lm_engine": "4a791626",
    "fairseq2": "0.8.1",
    "llm_foundry": "0.22.0",
}
"""Format -> the version or commit of its training stack that the emitter was written for."""


def known_formats(to: Iterable[str], force: bool = False) -> list[str]:
    """Checks the requested formats.

    Args:
        to: Formats as NAME or NAME@VERSION.
        force: Allow formats with an architecture that no proxy can have.

    Returns:
        The names without versions.

    Raises:
        UserError: A format is unknown, supports another version of its stack, or needs `force`.
    """
    requested = [text.partition("@") for text in to]
    for name, _, wanted in requested:
        if reason := UNSUPPORTED.get(name):
            raise UserError(f"format `{name}` is not supported: {reason}")
        if name not in FORMATS:
            raise UserError(f"unknown format `{name}`{nearest(name, FORMATS)}")
        if wanted and wanted != FORMATS[name]:
            raise UserError(
                f"format `{name}` supports version {FORMATS[name]} of its stack, but got {wanted!r}"
            )
        if name in UNTESTED and not force:
            raise UserError(
                f"format `{name}` has {UNTESTED[name]}, which no proxy can test:"
                " emit it anyway with --force, or emit 'granite'"
            )
    return [name for name, _, _ in requested]


def default_formats(target: Recipe) -> list[str]:
    """The formats that are written where none is named."""
    return ["granite", "recipe"] if knows_tensors(target) else ["recipe"]


def transfer(
    fit: Fit | str | Path,
    target: Recipe | str | Path,
    to: Iterable[str] | None = None,
    out: str | Path = "configs/transferred",
    force: bool = False,
    sizes: Measure | None = None,
) -> dict[str, Any]:
    """Predicts the optimum at a target and writes it as configs of training stacks.

    Writes `out/FORMAT/` for each format, `out/ANSWER.md` for people and `out/answer.json` for
    programs.

    Args:
        fit: A fit of a law that gives a learning rate, or its file.
        target: The target recipe, or its file. It must have the proxies' parametrization and
            optimizer.
        to: Formats, as NAME or NAME@VERSION; see `FORMATS`. Default: "granite" and "recipe", or
            "recipe" alone for a model that only your code knows.
        out: Folder to write to.
        force: Allow a target more than 30x outside the fitted range, and formats with an
            architecture that no proxy can have.
        sizes: Measures a target whose model is not in the zoo, for example
            `scaletune.sweeping.sizes.point_sizes`. Default: what the target states.

    Returns:
        The prediction and what it rests on:

        - `lr`: peak learning rate at base width; `lr_at_fitted_batch`: before the batch-size rule
        - `interval`, `band`: quantity -> [low, high]; the band is where the loss is within 0.25 %
          of
          the minimum
        - `loss`: expected loss in nats per token, or None
        - `n_params` (non-embedding), `tokens`, `batch_tokens`, `fit` (digest), `law`, `level`
        - `status`, `assumptions`: sentences
        - `answer`: the content of `answer.json`
        - `files`: the written paths

    Raises:
        UserError: A format is unknown, the target does not match the proxies, or it is too far
            outside the fitted range without `force`.

    Example:
        >>> import tempfile
        >>> import scaletune as st
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fit, target = "fits/2026-11-quickstart.json", "configs/quickstart-target.toml"
        ...     answer = st.transfer(fit, target, ["granite"], folder, force=True)
        >>> low, high = answer["interval"]["lr"]
        >>> low < answer["lr"] < high
        True
        >>> [Path(path).name for path in answer["files"]]
        ['config.json', 'param_groups.json', 'loader.py', 'answer.json', 'ANSWER.md']
    """
    from scaletune.transferring.answer import settings as answer_settings
    from scaletune.transferring.answer import text as answer_text

    recipe = resolve_recipe(target)
    names = known_formats(default_formats(recipe) if to is None else to, force)
    require_formats(recipe, names)
    emitters = {name: import_module(f"scaletune.transferring.formats.{name}") for name in names}
    fit = fit if isinstance(fit, Fit) else Fit.read(fit)
    prepared = prepare(fit, recipe, force=force, sizes=sizes)
    answer = answer_settings.build_answer(fit, prepared)
    if recipe.foreign:
        written = Path(out) / "recipe" / "target.toml" if "recipe" in names else None
        answer["start"] = start(prepared.target, written)
    files = [path for name in names for path in emitters[name].emit(prepared, Path(out) / name)]
    files += answer_text.write(answer, Path(out))
    return prepared.evidence | {"files": [str(path) for path in files], "answer": answer}
