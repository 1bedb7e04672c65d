"""The `data` table of a recipe: what to train on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scaletune.sections import Count, Positive, Section
from scaletune.sections import Whole as Seed

NAMED_SOURCES = ("python-stdlib", "digits", "power-law")
"""Built-in sources, which are no files."""
PYTHON_STDLIB, DIGITS, POWER_LAW = NAMED_SOURCES
HUB_PREFIX = "hub:"
"""Prefix of the name of a dataset on the Hugging Face Hub."""


class PowerLaw(Section):
    """The source "power-law": a synthetic regression with power-law spectra (arXiv:2402.01092).

    Feature k has variance k**-b, its term in the target has variance k**-a: see
    `scaletune.data.synthetic`.
    """

    inputs: Count = 128
    """Number of features."""
    examples: Count = 65536
    """Number of examples."""
    spectrum: Positive = 1.5
    """Exponent b of the feature variances."""
    task: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.5
    """Exponent a of the variances of the target's terms."""
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Standard deviation of the noise on the target. The variance of the target itself is 1."""
    seed: Seed = 0
    """Seed of the features, the target and the noise."""


class Data(Section):
    """What to train on. An example that is not text counts as one token: `seq_len = 1`."""

    source: str = PYTHON_STDLIB
    """One of "python-stdlib", "digits", "power-law" and "hub:NAME" (a dataset on the Hub), or a
    file or folder."""
    format: Literal[
        "auto", "text", "tokens", "dataset", "cifar10", "cifar100", "cifar100-coarse"
    ] = "auto"
    """Format of the source. auto: from the file names."""
    seq_len: Count = 64
    """Tokens per sequence."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the files (of a single file: its end) held out for evaluation, if the source has no
    such split."""
    order: Literal["random", "shuffle"] = "random"
    """random: sequences are drawn with replacement; shuffle: epochs without replacement."""
    epochs: Count = 1
    """How many times training may use the train split. A longer training is an error."""
    vocab_size: Count | None = None
    """Vocabulary size to which the model is padded. Default: the size of the tokenizer."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Integer type of the tokens in a .bin file."""
    tokenizer: str | None = None
    """Either "bytes" or the path of a tokenizer.json. Text is tokenised once, into `cache`."""
    column: str = "text"
    """Text column of a dataset."""
    separator: str = "\n\n"
    """Text after each document, or a special token of the tokenizer."""
    subset: str | None = None
    """Subset (configuration) of a dataset on the Hub."""
    limit: Count | None = None
    """Maximum number of tokens per split when text is tokenised. A Hub dataset needs it."""
    cache: str | None = None
    """Folder of tokenised text. Default: $XDG_CACHE_HOME/scaletune or ~/.cache/scaletune."""
    power_law: PowerLaw = PowerLaw()
    """Settings of the source "power-law"."""

    @model_validator(mode="after")
    def _whole(self) -> Data:
        of_examples = self.source in (DIGITS, POWER_LAW) or self.format.startswith("cifar")
        if of_examples and self.seq_len != 1:
            raise ValueError(
                "`seq_len == 1` must hold where an example counts as one token, but got"
                f" seq_len={self.seq_len}"
            )
        if self.source.startswith(HUB_PREFIX) and self.limit is None:
            raise ValueError(
                "`data.limit` must give the number of tokens to take from a Hub dataset, but got"
                f" none for {self.source!r}"
            )
        return self
