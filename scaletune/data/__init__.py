"""Data to train on, and one rule: the batch of step s is a pure function of (seed, s), whatever the number of processes.

A source is text (held in memory), tokens (mapped), documents that are tokenised once into a mapped cache, images, or
a synthetic regression. A shuffle holds nothing of the data's length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from scaletune.data import files, synthetic, tokenization, vision
from scaletune.data.corpus import Batch, Corpus, Examples, Text
from scaletune.errors import UserError
from scaletune.recipe import DIGITS, HUB, NAMED, POWER_LAW, PYTHON_STDLIB, Data, Recipe

__all__ = ["Batch", "Corpus", "Examples", "Text", "check_room", "fits", "load", "matches"]
READERS: dict[str, Callable[[Data], Corpus]] = {
    DIGITS: vision.digits, POWER_LAW: synthetic.power_law,
    "text": files.text, "tokens": files.tokens, "dataset": tokenization.tokenized, **dict.fromkeys(vision.CIFAR, vision.cifar),
}  # fmt: skip


def load(data: Data) -> Corpus:
    """The corpus a recipe names; UserError when it is missing, shorter than a window in either split, or over its vocabulary."""
    corpus = _load(
        data.model_copy(update={"seq_len": 1, "order": "random", "epochs": 1, "vocab_size": None})
    )
    corpus = replace(
        corpus, order=data.order, epochs=data.epochs, vocab_size=_vocabulary(corpus, data)
    )
    for name, length in corpus.lengths().items():
        if not corpus.features and length <= data.seq_len + 1:
            raise UserError(
                f"`seq_len + 1 < {name} tokens` must hold, but got seq_len={data.seq_len} and {length} {name} tokens"
            )
        if not length:
            raise UserError(
                f"`data.held_out` must leave examples in both splits, but got {data.held_out} and no {name} ones"
            )
    return corpus


def fits(recipe: Recipe, corpus: Corpus) -> None:
    """UserError unless the model reads such data and there is enough of it for the budget."""
    matches(corpus, recipe.model)
    check_room(corpus, recipe.budget.tokens, recipe.budget.batch_tokens, recipe.data.seq_len)


def check_room(corpus: Corpus, tokens: int, batch_tokens: int, seq_len: int) -> None:
    """UserError when a batch is more than the train split, or the horizon more than `epochs` times it."""
    room = corpus.room(seq_len)
    if batch_tokens > room:
        raise UserError(
            f"`batch_tokens <= train tokens` must hold, but got batch_tokens={batch_tokens} and {room} train tokens"
        )
    if tokens > corpus.epochs * room:
        rule, got = (
            "`tokens <= epochs * train tokens` must hold",
            f"tokens={tokens}, epochs={corpus.epochs} and {room} train tokens",
        )
        raise UserError(
            f"{rule}, but got {got}; `data.epochs = {-(-tokens // room)}` asks for repetition"
        )


def matches(corpus: Corpus, model: Any) -> None:
    """UserError unless the model's section asks for what an example is: tokens, (channels, height, width) or features; a class or a value."""
    given = {
        name: getattr(model, name)
        for name in ("family", "image_size", "channels", "inputs")
        if hasattr(model, name)
    }
    if "image_size" in given:
        alike = corpus.features == (given["channels"], given["image_size"], given["image_size"])
    else:
        alike = (
            corpus.features == ()
            if "inputs" not in given
            else prod(corpus.features) == given["inputs"] and corpus.features != ()
        )
    if not alike:
        got = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise UserError(
            f"the model must read what the data hold, {_said(corpus.features)}, but got {got}"
        )
    targets, wanted = ("values", "mse") if corpus.regression else ("classes", "cross_entropy")
    if (loss := getattr(model, "loss", "cross_entropy")) != wanted:
        raise UserError(
            f"`model.loss` must be {wanted!r} where the targets are {targets}, but got {loss!r}"
        )


def _said(features: tuple[int, ...]) -> str:
    if not features:
        return "tokens"
    return (
        f"images of {' x '.join(map(str, features))} (channels, height, width)"
        if len(features) == 3
        else f"{features[0]} features"
    )


def _vocabulary(corpus: Corpus, data: Data) -> int:
    """The corpus's own, or the larger one that the recipe pads it to."""
    if data.vocab_size is None:
        return corpus.vocab_size
    if corpus.features:
        raise UserError(
            f"`data.vocab_size` pads a vocabulary of tokens, but {data.source!r} holds {_said(corpus.features)}"
        )
    if data.vocab_size < corpus.vocab_size:
        raise UserError(
            f"`data.vocab_size` must hold every token, {corpus.vocab_size} or more here, but got {data.vocab_size}"
        )
    return data.vocab_size


@lru_cache(maxsize=2)
def _load(data: Data) -> Corpus:
    kind = _format(data)
    if data.tokenizer and kind not in ("text", "dataset"):
        raise UserError(
            f"`data.tokenizer` turns text into tokens, but {data.source!r} was read as {kind}"
        )
    return READERS["dataset" if data.tokenizer else kind](data)


def _format(data: Data) -> str:
    """Which reader: as the recipe says, or by what the source is called."""
    if data.source in NAMED:
        return "text" if data.source == PYTHON_STDLIB else data.source
    if data.source.startswith(HUB):
        return "dataset"
    path = Path(data.source)
    if not path.is_file() and not path.is_dir():
        raise UserError(
            f"`data.source` must be one of {', '.join(map(repr, NAMED))}, a file or a folder that exists, but got {data.source!r}"
        )
    if data.format != "auto":
        return data.format
    if path.suffix in (".bin", ".npy") or files.is_token_folder(path):
        return "tokens"
    return "dataset" if tokenization.is_dataset(path) else "text"
