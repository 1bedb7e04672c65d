"""What to train on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scaletune.sections import Count, Positive, Section
from scaletune.sections import Whole as Seed

PYTHON_STDLIB, DIGITS, POWER_LAW = NAMED = (
    "python-stdlib",
    "digits",
    "power-law",
)  # sources that are no files
HUB = "hub:"  # before the name of a dataset on the Hugging Face Hub


class PowerLaw(Section):
    """The source "power-law": features of variance k**-b, target terms of variance k**-a (arXiv:2402.01092); see `scaletune.data.synthetic`."""

    inputs: Count = 128
    examples: Count = 65536
    spectrum: Positive = 1.5  # b
    task: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.5  # a
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = (
        0.0  # standard deviation of the target's; its own variance is 1
    )
    seed: Seed = 0


class Data(Section):
    """What to train on. Of examples that are not text, each counts as one token: `seq_len = 1`."""

    source: str = PYTHON_STDLIB  # a name above, hub:NAME, a file or a folder
    format: Literal[
        "auto", "text", "tokens", "dataset", "cifar10", "cifar100", "cifar100-coarse"
    ] = "auto"
    seq_len: Count = 64
    held_out: Annotated[float, Field(gt=0, lt=1)] = (
        0.05  # share of files (of a single file: its tail), where the source has no such split
    )
    order: Literal["random", "shuffle"] = "random"  # with replacement; or epochs without
    epochs: Count = 1  # how often the train split may be gone through: repetition must be asked for
    vocab_size: Count | None = None  # padded to this
    dtype: Literal["uint16", "uint32"] = "uint16"  # of tokens in .bin
    tokenizer: str | None = (
        None  # "bytes" or a tokenizer.json: text becomes tokens once, in `cache`
    )
    column: str = "text"  # of a dataset
    separator: str = "\n\n"  # after each document; a special token of the tokenizer may be named
    subset: str | None = None  # of a dataset on the Hub
    limit: Count | None = None  # tokens to take of each split of what is tokenised
    cache: str | None = (
        None  # folder of tokenised text; none: $XDG_CACHE_HOME/scaletune or ~/.cache/scaletune
    )
    power_law: PowerLaw = PowerLaw()

    @model_validator(mode="after")
    def _whole(self) -> Data:
        if (
            self.source in (DIGITS, POWER_LAW) or self.format.startswith("cifar")
        ) and self.seq_len != 1:
            raise ValueError(
                f"`seq_len == 1` must hold where an example counts as one token, but got seq_len={self.seq_len}"
            )
        if self.source.startswith(HUB) and self.limit is None:
            raise ValueError(
                f"`data.limit` must say how many tokens to take of a stream, but got none for {self.source!r}"
            )
        return self
