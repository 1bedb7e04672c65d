"""Parameters of a Transformer without its embedding and readout, from the total and the shape."""

from __future__ import annotations

from scaletune.errors import UserError

NON_EMBEDDING_FACTOR = (6.0, 20.0)
"""Plausible range of n_params / (depth * width**2) of a dense Transformer.

It is 12 for attention with as many key as query heads and a feed-forward layer of 4 * width
(arXiv:2001.08361, section 2.1), less with grouped queries, up to 16 with a gated layer of
4 * width.
"""


def embedding_params(vocab_size: float, width: float, tied: bool) -> float:
    """Parameters of the embedding and the readout: one matrix if they are tied, otherwise two."""
    return (1 if tied else 2) * float(vocab_size) * float(width)


def without_embedding(total: float, vocab_size: float, width: float, tied: bool) -> float:
    """Non-embedding parameters: the total without the embedding and the readout.

    Args:
        total: All parameters.
        vocab_size: Rows of the embedding, padding included.
        width: Width of the model.
        tied: Whether the readout is the embedding's own matrix, so that it is counted once.

    Raises:
        UserError: The embeddings alone have as many parameters as the total.

    Example:
        >>> without_embedding(124_439_808, 50257, 768, tied=True)  # GPT-2, positions included
        85842432.0
    """
    embedding = embedding_params(vocab_size, width, tied)
    if not 0 < embedding < total:
        matrices = "one matrix" if tied else "two matrices"
        raise UserError(
            f"`0 < embedding parameters < total parameters` must hold, but {matrices} of vocab_size"
            f" {vocab_size:g} * width {width:g} have {embedding:g} of {total:g} parameters: check"
            " the vocabulary, the width and whether the embeddings are tied"
        )
    return float(total) - embedding


def shape_factor(n_params: float, width: float, depth: float) -> float:
    """`n_params / (depth * width**2)`: about 12 for non-embedding parameters of a Transformer."""
    return n_params / (depth * width**2)
