"""The `trainer` table of a recipe: the user's own command or function that trains a trial."""

from __future__ import annotations

import re
from typing import Any

from pydantic import model_validator

from scaletune.recipe.placeholders import placeholder_names, require_known
from scaletune.sections import Positive, Section

FUNCTION = re.compile(r"[\w.]+:[\w.<>]+")
REPORTED = ("loss", "train_loss", "tokens", "step", "n_params", "n_params_total", "flops")
"""What a named group of `trainer.pattern` may be."""


class Trainer(Section):
    """Who trains a trial, if not scaletune's own loop.

    Either `command` or `function`. It gets the trial's settings, trains, and reports its loss:
    through `scaletune.trial`, on standard output (`pattern`) or in a log (`log`).
    """

    command: list[str] = []
    """Program and arguments, started without a shell. `{lr}`, `{model.width}`, `{my.dropout}`,
    `{run_dir}`, `{seed}`, `{steps}` ... are replaced by the trial's values; `{{` is a brace."""
    function: str = ""
    """`package.module:function`. It is called with the trial and returns its loss, or a dict."""
    describe: list[str] | str = []
    """A command or function that prints, or returns, what a point has before it is trained:
    {"n_params": ..., "n_params_total": ..., "tokens": ..., "flops": ...}, one line of JSON."""
    version: str = ""
    """Version of the user's code, part of a trial's identity: raise it when the code changes."""
    env: dict[str, str] = {}
    """Environment variables of the trainer. Placeholders are replaced. Not part of the identity."""
    folder: str = ""
    """Working folder. Default: the folder where scaletune was started. Not part of the identity."""
    import_from: list[str] = []
    """Folders in which `model.build` is searched first. Set by a recipe file with `model.build`: its
    own folder. Not part of the identity."""
    pattern: str = ""
    """Regular expression for lines of standard output, with the named groups `loss`, `train_loss`,
    `tokens`, `step`, `n_params`, `n_params_total` or `flops`: `val loss (?P<loss>\\S+)`."""
    log: str = ""
    """File or folder that the trainer writes and `scaletune fit` can read (Trainer state,
    TensorBoard, W&B offline, CSV ...), read when the trainer has ended: `{run_dir}/logs`."""
    grace: Positive = 30.0
    """Seconds between the request to stop (`should_stop`) and SIGTERM, and from there to SIGKILL.
    """

    @model_validator(mode="after")
    def _one_way(self) -> Trainer:
        if self.command and self.function:
            raise ValueError("`trainer` must have either `command` or `function`, but got both")
        if self.command and not self.command[0]:
            raise ValueError("`trainer.command` must start with a program, but got ''")
        for name in ("function", "describe"):
            value = getattr(self, name)
            if isinstance(value, str) and value and not FUNCTION.fullmatch(value):
                raise ValueError(
                    f"`trainer.{name}` must look like package.module:function, but got {value!r}"
                )
        return self

    @model_validator(mode="after")
    def _pattern(self) -> Trainer:
        try:
            groups = re.compile(self.pattern).groupindex
        except re.error as error:
            raise ValueError(
                f"`trainer.pattern` must be a regular expression, but {error}: {self.pattern!r}"
            ) from None
        if unknown := [name for name in groups if name not in REPORTED]:
            raise ValueError(
                f"the groups of `trainer.pattern` must be of {', '.join(REPORTED)}, but got"
                f" {unknown[0]!r}"
            )
        if self.pattern and not {"loss", "train_loss"} & set(groups):
            raise ValueError(
                "`trainer.pattern` must have a group `loss`, as in `val loss (?P<loss>\\S+)`, but"
                f" got {self.pattern!r}"
            )
        return self

    @property
    def given(self) -> bool:
        """Whether the user's command or function trains."""
        return bool(self.command or self.function)

    def identity(self) -> dict[str, Any]:
        """What of the trainer identifies a trial."""
        parts = {"command": self.command, "function": self.function, "version": self.version}
        return {name: value for name, value in parts.items() if value}

    def templates(self) -> list[tuple[str, str]]:
        """(setting, template) of every text whose placeholders are replaced."""
        describe = self.describe if isinstance(self.describe, list) else []
        return [
            *(("trainer.command", text) for text in self.command),
            *(("trainer.describe", text) for text in describe),
            *((f"trainer.env.{name}", text) for name, text in self.env.items()),
            ("trainer.folder", self.folder),
            ("trainer.log", self.log),
        ]

    def names(self) -> set[str]:
        """The names of all placeholders."""
        return {name for where, text in self.templates() for name in placeholder_names(where, text)}

    def check(self, known: set[str]) -> None:
        """ValueError if a placeholder has another name than the known ones."""
        for where, text in self.templates():
            require_known(where, text, known)
