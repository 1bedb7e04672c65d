"""Finds `n_params` that count the embeddings, although laws are for non-embedding parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaletune.counting.embedding import NON_EMBEDDING_FACTOR
from scaletune.importing.names import (
    TOTAL_NAMES,
    USUAL_NAMES,
    VOCABULARY_NAMES,
    find_names,
)

FFN_NAMES = (
    *("ffn_width", "intermediate_size", "ffn_hidden_size", "d_ff", "mlp_hidden_size"),
    *("feed_forward_size", "ffn_dim", "model.intermediate_size"),
)
NON_EMBEDDING_NAMES = tuple(name for name in USUAL_NAMES["n_params"] if "emb" in name)
BLOCK_RATIO = (0.5, 1.2)  # parameters over those of full attention and the feed-forward layer
SAME_FACTOR = 0.05  # sd of the logarithm of a constant factor; public families reach 0.033
WRONG = 0.02  # relative error of n_params that is worth a sentence
SMALL_SHARE = 0.1  # an embedding below this share of the smallest model hardly changes a law
STEEP = 0.55  # exponent of n_params from which small models suggest total counts
STEEP_LOW = 0.45  # lower end of the exponent's interval
SMALL_MODEL = 1e9

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Shapes:
    """Each different model of a table once."""

    n_params: Array
    width: Array
    vocab_size: Array
    names: tuple[str, str, str]
    """The columns that `--map` reads: of n_params, the vocabulary and the width."""

    depth: Array | None
    ffn_width: Array | None

    def without(self, matrices: int) -> Array:
        """`n_params` minus this many embedding matrices."""
        return self.n_params - matrices * self.vocab_size * self.width

    def subtraction(self, matrices: int) -> str:
        times = "2*" if matrices == 2 else ""
        count, vocabulary, width = self.names
        return f"{count}-{times}{vocabulary}*{width}"


def embedding_doubts(runs: pd.DataFrame) -> list[str]:
    """A sentence if `n_params` counts the embeddings, or may do so and it matters."""
    if "n_params" not in runs:
        return []
    n_params = _numbers(runs, "n_params")
    for name in find_names(runs.columns, NON_EMBEDDING_NAMES):
        own = _numbers(runs, name)
        if name != "n_params" and own.notna().any():
            return _compare_columns(n_params / own, name)
    for name in find_names(runs.columns, TOTAL_NAMES):
        share = (n_params / _numbers(runs, name)).dropna()
        if len(share) and share.between(0, 0.999).all():
            return _check_subtraction(runs, name)
        if len(share) and share.between(0.999, 1.001).all():
            return [
                f"`n_params` equals `{name}`, which counts all parameters: laws are for "
                "non-embedding parameters; subtract vocab_size * width (twice unless the "
                "embeddings are tied)"
            ]
    shapes = _shapes(runs)
    if shapes is None:
        return []
    return _judge_shapes(shapes) if shapes.depth is not None else _both_counts(shapes)


def _compare_columns(ratio: pd.Series, name: str) -> list[str]:
    if not ratio.max() > 1.01:
        return []
    return [
        f"`n_params` is up to {ratio.max():.3g} times the column `{name}`, so it counts the "
        "embeddings, but laws are for non-embedding parameters: read the other column with "
        f"--map n_params={name}"
    ]


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    return pd.to_numeric(table[column], errors="coerce").astype(float)


def source(table: pd.DataFrame, column: str) -> str:
    """The column that `column` was read from, as `--map` takes it: the first with its values."""
    values = _numbers(table, column)
    others = [name for name in map(str, table.columns) if name not in ("cell", column)]
    name = next((name for name in others if _numbers(table, name).equals(values)), column)
    return name if name.isidentifier() else f"`{name}`"


def _column(table: pd.DataFrame, names: Sequence[str]) -> str | None:
    """The first column with one of the names that has only positive numbers."""
    return next(
        (name for name in find_names(table.columns, names) if (_numbers(table, name) > 0).all()),
        None,
    )


def _shapes(runs: pd.DataFrame) -> Shapes | None:
    width = _column(runs, ("width", *USUAL_NAMES["width"]))
    vocabulary = _column(runs, VOCABULARY_NAMES)
    if width is None or vocabulary is None:
        return None
    depth = _column(runs, ("depth", *USUAL_NAMES["depth"]))
    ffn = _column(runs, FFN_NAMES)
    names = ["n_params", width, vocabulary, *(name for name in (depth, ffn) if name)]
    table = pd.DataFrame({name: _numbers(runs, name) for name in names}).drop_duplicates()
    columns = {name: table[name].to_numpy(float) for name in names}
    return Shapes(
        n_params=columns["n_params"],
        width=columns[width],
        vocab_size=columns[vocabulary],
        names=(source(runs, "n_params"), source(runs, vocabulary), source(runs, width)),
        depth=columns[depth] if depth else None,
        ffn_width=columns[ffn] if ffn else None,
    )


def _block_units(shapes: Shapes) -> list[tuple[Array, tuple[float, float]]]:
    """Parameters of the blocks up to a constant factor, and the plausible range of the factor."""
    assert shapes.depth is not None
    w, d = shapes.width, shapes.depth
    units = [(d * w**2, NON_EMBEDDING_FACTOR)]
    if (f := shapes.ffn_width) is not None:
        units += [(d * (4 * w**2 + matrices * w * f), BLOCK_RATIO) for matrices in (2, 3)]
    return units


def _plausible_counts(shapes: Shapes) -> list[tuple[float, int, Array]]:
    """For each number of embeddings whose subtraction leaves a Transformer's blocks, best first.

    (sd of the logarithm of the factor to the blocks, number of embeddings, factor of n_params).
    """
    fits = []
    for unit, (low, high) in _block_units(shapes):
        for matrices in (0, 1, 2):
            factor = shapes.without(matrices) / unit
            if low <= factor.min() and factor.max() <= high:
                fits.append((float(np.std(np.log(factor))), matrices, shapes.n_params / unit))
    return sorted(fits, key=lambda fit: (round(fit[0], 3), fit[1]))


def _check_subtraction(runs: pd.DataFrame, total: str) -> list[str]:
    """A sentence if `n_params` is a total minus the wrong number of embeddings."""
    shapes = _shapes(runs.assign(n_params=_numbers(runs, total)))
    given = _shapes(runs)
    if shapes is None or given is None or shapes.depth is None or len(shapes.n_params) < 2:
        return []
    fits = _plausible_counts(shapes)
    if not fits or fits[0][0] > SAME_FACTOR:
        return []
    right, n_params = shapes.without(fits[0][1]), given.n_params
    if len(right) != len(n_params) or np.abs(n_params / right - 1).max() < WRONG:
        return []
    own = n_params / (shapes.depth * shapes.width**2)
    if np.std(np.log(own)) < 2 * fits[0][0] + 0.03:
        return []
    return [
        f"`n_params` is {_span(n_params)}, but `{total}` minus {fits[0][1]} embedding matrices, "
        f"{_span(right)}, is in proportion to depth * width**2, as the blocks of a Transformer "
        "are: check whether the embeddings are tied"
    ]


def _judge_shapes(shapes: Shapes) -> list[str]:
    """Which of n_params minus 0, 1 or 2 embeddings grows in proportion to the blocks."""
    fits = _plausible_counts(shapes)
    plausible = {matrices for _, matrices, _ in fits}
    share = (shapes.vocab_size * shapes.width / shapes.n_params).max()
    if share < SMALL_SHARE / 2:
        return []
    if not fits:
        return _both_counts(shapes)
    spread, matrices, whole = fits[0]
    if spread <= SAME_FACTOR and len(shapes.n_params) > 1:
        if not matrices or float(np.std(np.log(whole))) < 2 * spread + 0.03:
            return []
    elif 0 in plausible:
        return []
    elif spread > SAME_FACTOR or len(plausible) > 1:
        return _both_counts(shapes)
    rest = shapes.without(matrices)
    return [
        f"`n_params` counts the embeddings: only `{shapes.subtraction(matrices)}` is in proportion "
        "to depth * width**2, as the blocks of a Transformer are; laws are for non-embedding "
        f"parameters, here {_span(rest)} instead of {_span(shapes.n_params)}: fit with "
        f"--map 'n_params={shapes.subtraction(matrices)}'"
    ]


def _both_counts(shapes: Shapes) -> list[str]:
    """What the non-embedding count would be, where `n_params` may count the embeddings."""
    share = (shapes.vocab_size * shapes.width / shapes.n_params).max()
    if share < SMALL_SHARE or (shapes.without(1) <= 0).any():
        return []
    twice = shapes.without(2)
    untied = f", or {_span(twice)} if they are not tied" if (twice > 0).all() else ""
    return [
        f"one embedding matrix is up to {share:.0%} of `n_params`, and the columns do not say "
        "whether n_params counts the embeddings: if it does, the non-embedding parameters are "
        f"{_span(shapes.without(1))}{untied}, not {_span(shapes.n_params)}; fit with --map "
        f"'n_params={shapes.subtraction(1)}' or 'n_params={shapes.subtraction(2)}'"
    ]


def _span(values: Array) -> str:
    return f"{values.min():.3g} to {values.max():.3g}"


def steep_exponent_doubt(
    runs: pd.DataFrame, value: float, interval: Sequence[float] | None
) -> list[str]:
    """A sentence if the exponent of `n_params` is that of total rather than non-embedding counts.

    With total counts, the loss of small models falls too steeply (arXiv:2406.12907): in public
    tables with a vocabulary of 128k the exponent is 0.61 to 0.65 with total counts and 0.30 to 0.37
    with non-embedding ones. With a vocabulary of 50k it is 0.24 to 0.30 either way, so a lower
    exponent proves nothing.
    """
    if value < STEEP or interval is None or not STEEP_LOW < interval[0] < interval[1]:
        return []
    known = find_names(runs.columns, (*VOCABULARY_NAMES, *NON_EMBEDDING_NAMES, *TOTAL_NAMES))
    if known or _numbers(runs, "n_params").min() > SMALL_MODEL:
        return []
    return [
        f"the loss falls as n_params**-{value:.2f}, but with non-embedding parameters published "
        "exponents are 0.2 to 0.5: check that n_params does not count the embeddings, or add a "
        "column `vocab_size` so that this can be tested"
    ]
