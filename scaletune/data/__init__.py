"""Training data. The batch of step s is a pure function of (seed, s) for any number of processes.

A source is text (held in memory), tokens (memory-mapped), documents that are tokenized once into a
memory-mapped cache, images, or a synthetic regression. Shuffling takes constant memory.
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
from scaletune.recipe import (
    DIGITS,
    HUB_PREFIX,
    NAMED_SOURCES,
    POWER_LAW,
    PYTHON_STDLIB,
    Data,
    Recipe,
)
from scaletune.zoo import OwnConfig

__all__ = [
    "Batch",
    "Corpus",
    "Examples",
    "Text",
    "check_model",
    "check_recipe",
    "check_room",
    "load",
]
READERS: dict[str, Callable[[Data], Corpus]] = {
    DIGITS: vision.digits,
    POWER_LAW: synthetic.power_law,
    "text": files.text,
    "tokens": files.tokens,
    "dataset": tokenization.load_tokenized,
    **dict.fromkeys(vision.CIFAR, vision.cifar),
}


def load(data: Data) -> Corpus:
    """Loads the data of a recipe.

    Args:
        data: The `[data]` table of a recipe.

    Returns:
        The corpus, split into train and held-out.

    Raises:
        UserError: The source is missing, a split is shorter than a window of `seq_len + 1` tokens,
            or it has more tokens than `data.vocab_size`.
    """
    corpus = _load(
        data.model_copy(update={"seq_len": 1, "order": "random", "epochs": 1, "vocab_size": None})
    )
    corpus = replace(
        corpus, order=data.order, epochs=data.epochs, vocab_size=_vocab_size(corpus, data)
    )
    for name, length in corpus.lengths().items():
        if not corpus.features and length <= data.seq_len + 1:
            raise UserError(
                f"`seq_len + 1 < {name} tokens` must hold,"
                f" but got seq_len={data.seq_len} and {length} {name} tokens"
            )
        if not length:
            raise UserError(
                "`data.held_out` must leave examples in both splits,"
                f" but {data.held_out} leaves no {name} examples"
            )
    return corpus


def check_recipe(recipe: Recipe, corpus: Corpus) -> None:
    """UserError unless the model accepts these data and they are enough for the budget."""
    check_model(corpus, recipe.model)
    check_room(corpus, recipe.budget.tokens, recipe.budget.batch_tokens, recipe.data.seq_len)


def check_room(corpus: Corpus, tokens: int, batch_tokens: int, seq_len: int) -> None:
    """UserError if a batch exceeds the train split, or the token budget `epochs` times it."""
    available = corpus.epoch_tokens(seq_len)
    if batch_tokens > available:
        raise UserError(
            "`batch_tokens <= train tokens` must hold,"
            f" but got batch_tokens={batch_tokens} and {available} train tokens"
        )
    if tokens > corpus.epochs * available:
        raise UserError(
            "`tokens <= epochs * train tokens` must hold, but got"
            f" tokens={tokens}, epochs={corpus.epochs} and {available} train tokens;"
            f" `data.epochs = {-(-tokens // available)}` allows repetition"
        )


def check_model(corpus: Corpus, model: Any) -> None:
    """UserError unless the model section fits the examples and targets of the data.

    Examples are tokens, images (channels, height, width) or features; targets are classes or
    values. Of a user's own module only its forward knows what it accepts.
    """
    if isinstance(model, OwnConfig):
        return
    names = ("family", "image_size", "channels", "inputs")
    settings = {name: getattr(model, name) for name in names if hasattr(model, name)}
    if not _accepts(settings, corpus.features):
        values = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise UserError(
            f"the model must accept the examples of the data, {_describe(corpus.features)},"
            f" but got {values}"
        )
    targets, expected = ("values", "mse") if corpus.regression else ("classes", "cross_entropy")
    if (loss := getattr(model, "loss", "cross_entropy")) != expected:
        raise UserError(
            f"`model.loss` must be {expected!r} where the targets are {targets}, but got {loss!r}"
        )


def _accepts(settings: dict[str, Any], features: tuple[int, ...]) -> bool:
    """Whether a model with these settings accepts examples of shape `features`."""
    if "image_size" in settings:
        size = settings["image_size"]
        return features == (settings["channels"], size, size)
    if "inputs" in settings:
        return features != () and prod(features) == settings["inputs"]
    return features == ()


def _describe(features: tuple[int, ...]) -> str:
    """The examples of a shape, in words."""
    if not features:
        return "tokens"
    if len(features) == 3:
        return f"images of {' x '.join(map(str, features))} (channels, height, width)"
    return f"{features[0]} features"


def _vocab_size(corpus: Corpus, data: Data) -> int:
    """The vocabulary of the corpus, or the larger one to which the recipe pads it."""
    if data.vocab_size is None:
        return corpus.vocab_size
    if corpus.features:
        raise UserError(
            "`data.vocab_size` pads a vocabulary of tokens,"
            f" but {data.source!r} holds {_describe(corpus.features)}"
        )
    if data.vocab_size < corpus.vocab_size:
        raise UserError(
            "`data.vocab_size` must include every token,"
            f" {corpus.vocab_size} or more here, but got {data.vocab_size}"
        )
    return data.vocab_size


@lru_cache(maxsize=2)
def _load(data: Data) -> Corpus:
    kind = _format(data)
    if data.tokenizer and kind not in ("text", "dataset"):
        raise UserError(
            "`data.tokenizer` turns text into tokens,"
            f" but the format of {data.source!r} is {kind!r}"
        )
    return READERS["dataset" if data.tokenizer else kind](data)


def _format(data: Data) -> str:
    """The reader of the source: `data.format`, or the one that its name implies."""
    if data.source in NAMED_SOURCES:
        return "text" if data.source == PYTHON_STDLIB else data.source
    if data.source.startswith(HUB_PREFIX):
        return "dataset"
    path = Path(data.source)
    if not path.is_file() and not path.is_dir():
        raise UserError(
            f"`data.source` must be one of {', '.join(map(repr, NAMED_SOURCES))},"
            f" a file or a folder that exists, but got {data.source!r}"
        )
    if data.format != "auto":
        return data.format
    if path.suffix in (".bin", ".npy") or files.is_token_folder(path):
        return "tokens"
    return "dataset" if tokenization.is_dataset(path) else "text"
