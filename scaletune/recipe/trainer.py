"""The `trainer` table of a recipe: who trains a trial, if not scaletune's own loop."""

from __future__ import annotations

import re
from typing import Any

from pydantic import field_validator, model_validator

from scaletune.recipe.placeholders import placeholder_names, require_known
from scaletune.sections import Positive, Section

FUNCTION = re.compile(r"[\w.]+:[\w.<>]+(<.*>)?", re.DOTALL)
REPORTED = ("loss", "train_loss", "tokens", "step", "n_params", "n_params_total", "flops")
"""What a named group of `trainer.pattern` may be."""


class Trainer(Section):
    """Who trains a trial, if not scaletune's own loop.

    Either `command` or `function`: it gets the trial's settings, trains, and reports its loss
    through `scaletune.trial`, on standard output (`pattern`) or in a log (`log`). Or `external`:
    `scaletune ask` hands out the trials and `scaletune tell` takes their results.
    """

    command: list[str] = []
    """Program and arguments, started without a shell. `{lr}`, `{model.width}`, `{my.dropout}`,
    `{run_dir}`, `{seed}`, `{steps}` ... are replaced by the trial's values; `{{` is a brace."""
    function: str = ""
    """`package.module:function`. It is called with the trial and returns its loss, or a dict."""
    external: bool = False
    """Whether somebody else runs the trials, outside scaletune: `scaletune ask` hands them out, and
    `scaletune tell` takes their results. A recipe with a command or function does not need
    it: `ask` shows how to start the trial."""
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
    """Folders in which `model.build` is searched first. Default in a recipe file: its own folder.
    Not part of the identity."""
    pattern: str = ""
    """Regular expression for lines of standard output, with the named groups `loss`, `train_loss`,
    `tokens`, `step`, `n_params`, `n_params_total` or `flops`: `val loss (?P<loss>\\S+)`."""
    log: str = ""
    """File or folder that the trainer writes and `scaletune fit` can read (Trainer state,
    TensorBoard, W&B offline, CSV ...), read when the trainer has ended: `{run_dir}/logs`."""
    grace: Positive = 30.0
    """Seconds between the request to stop (`should_stop`) and SIGTERM, and from there to SIGKILL.
    """

    @field_validator("version", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """A number as text: `version = 2` is as good as `version = "2"`."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if is_number else value

    @field_validator("command", mode="before")
    @classmethod
    def _is_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            words = ", ".join(f'"{word}"' for word in value.split()[:2])
            raise ValueError(
                f"`trainer.command` must be a list of arguments, such as [{words}], but got the"
                f" text {value!r}"
            )
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Trainer:
        ways = [name for name in ("command", "function", "external") if getattr(self, name)]
        if len(ways) > 1:
            ask = ": leave out `external`, `scaletune ask` shows how to start the trial"
            ask = ask if "external" in ways else ""
            raise ValueError(
                "`trainer` must have one of `command`, `function` and `external`, but got"
                f" `{ways[0]}` and `{ways[1]}`{ask}"
            )
        reader = next((name for name in ("pattern", "log") if getattr(self, name)), "")
        if self.external and reader:
            raise ValueError(
                f"`trainer.{reader}` is not read with `trainer.external`, whose results come from"
                " `scaletune tell`: remove it"
            )
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
        """Whether the user's command or function trains, or somebody else."""
        return bool(self.command or self.function or self.external)

    def identity(self) -> dict[str, Any]:
        """What of the trainer identifies a trial."""
        names = ("command", "function", "external", "version")
        return {name: value for name in names if (value := getattr(self, name))}

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
