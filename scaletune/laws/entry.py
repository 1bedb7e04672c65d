"""The record of one published law: function, coefficients, inputs, fitted range and caveats.

In this package only, symbols follow the literature: N parameters, D tokens, C training FLOPs, U
unique tokens. Each `Input` states which parameters or FLOPs its symbol counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from scaletune.errors import UserError
from scaletune.laws.columns import COLUMNS, QUANTITIES, check_value, to_float


@dataclass(frozen=True)
class Input:
    """One argument of a law."""

    symbol: str
    """Name in the formula."""

    column: str
    """Column that the value is read from, a key of `laws.COLUMNS`."""

    means: str
    """What the source counts, with its unit."""

    mismatch: str = ""
    """Warning when the value comes from another column than `column`."""

    instead: tuple[str, ...] = ()
    """Columns that replace a missing `column`: similar counts, used with the warning `mismatch`."""

    default: float | None = None
    """Value of most runs. It is used, with a warning, when no value is given."""

    doubt: str = ""
    """Warning that is always shown: what the source does not state about its count."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """A published law. Call it with its symbols to evaluate it.

    Ranges are keyed by the name of a quantity: a column, an output, or a quantity that is derived
    from columns, such as `tokens_per_param`.

    Example:
        >>> from scaletune import laws
        >>> output = laws.law("steplaw_lr_bs")(N=1e9, D=1e11)
        >>> f"lr {output['lr']:.3g}, batch size {output['batch_tokens']:.3g} tokens"
        'lr 0.00163, batch size 1.11e+06 tokens'
    """

    id: str
    """Name on the command line and in `laws.CATALOGUE`."""

    name: str
    """Title: authors or method, and what the law gives."""

    summary: str
    """One sentence: what the law predicts from what."""

    kind: str
    """One of `laws.KINDS`."""

    formula: str
    """Assignments in Python notation, separated by "; ". `function` is what is evaluated."""

    function: Callable[..., dict[str, float]]
    """Takes inputs and coefficients by name and returns {quantity: value}."""

    inputs: tuple[Input, ...]
    """Arguments, in the order of the formula."""

    gives: tuple[str, ...]
    """Output quantities, keys of `laws.UNITS`."""

    coefficients: dict[str, float] = field(default_factory=dict)
    """Published coefficients by name."""

    unknown: dict[str, str] = field(default_factory=dict)
    """Coefficients without a published value, and what they mean. The user gives their values."""

    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Published intervals of coefficients or exponents."""

    level: str = ""
    """What kind of interval `intervals` contains."""

    fitted: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Quantity -> (low, high) over the runs behind the law."""

    validated: dict[str, float] = field(default_factory=dict)
    """Quantity -> largest value, above `fitted`, at which the source checked the law."""

    held: dict[str, float] = field(default_factory=dict)
    """Quantity -> the one value that it had in every run."""

    band: dict[str, float] = field(default_factory=dict)
    """Quantity -> width, as a factor, of the range where loss is within 0.25 % of its minimum."""

    conditions: dict[str, str] = field(default_factory=dict)
    """Schedule, optimizer, data and other conditions of the runs."""

    setup: str
    """How the law was fitted, and notes on the result."""

    source: str
    """Publication with arXiv id."""

    caveats: tuple[str, ...] = ()
    """What to know before using the law; shown with the law."""

    warnings: tuple[str, ...] = ()
    """Caveats that are also added to the warnings of each prediction."""

    confirmed: bool = True
    """Whether every coefficient was read in a source or recomputed from the source's data."""

    unconfirmed: tuple[str, ...] = ()
    """What was not checked against a source; added to the warnings of each prediction."""

    shown_at: dict[str, Any] = field(default_factory=dict)
    """Symbols of the worked example that differ from the examples of `laws.COLUMNS`."""

    def __call__(self, **values: Any) -> dict[str, float]:
        """Evaluates the law.

        Args:
            **values: Every input by its symbol, and every coefficient in `unknown`.

        Returns:
            {quantity: value} for every name in `gives`, in the units of `laws.UNITS`.

        Raises:
            UserError: A symbol is missing, unknown or outside its domain, or the result is not a
                real number that fits a float.
        """
        numbers = self.read(values)
        try:
            outputs = self.function(**numbers, **self.coefficients)
        except ArithmeticError as error:
            raise UserError(
                f"{self.id} exceeds the range of a float at {_abbreviate(numbers)}"
            ) from error
        if any(isinstance(value, complex) for value in outputs.values()):
            raise UserError(f"{self.id} has no real value at {_abbreviate(numbers)}")
        return outputs

    def read(self, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the values of the symbols, checked."""
        columns = {entry.symbol: entry.column for entry in self.inputs}
        missing = [name for name in self.unknown if name not in values]
        if missing and set(columns) <= set(values):
            needed = "; ".join(f"{name} ({self.unknown[name]})" for name in missing)
            raise UserError(
                f"{self.id} has no published value of {needed}: give your own, "
                f"on the command line with --given {missing[0]}=VALUE"
            )
        if set(values) != {*columns, *self.unknown}:
            takes = ", ".join((*columns, *self.unknown))
            raise UserError(
                f"{self.id} takes {takes}, but got {', '.join(sorted(values)) or 'nothing'}"
            )
        own = {name: to_float(values[name]) for name in self.unknown}
        for name, value in own.items():
            if value != value:
                raise UserError(f"`{name}` must be a finite number, but got {values[name]!r}")
        return {
            symbol: check_value(symbol, values[symbol], column)
            for symbol, column in columns.items()
        } | own

    def example(self) -> dict[str, dict[str, Any]]:
        """Evaluates the law at the example values of its columns (1e9 parameters, 20 tokens each).

        Coefficients in `unknown` have illustrative values without a source.

        Returns:
            {"inputs": {symbol: value}, "values": {quantity: value}}
        """
        inputs = {
            entry.symbol: COLUMNS[entry.column].example for entry in self.inputs
        } | self.shown_at
        return {"inputs": inputs, "values": self(**inputs)}

    def to_dict(self) -> dict[str, Any]:
        """Returns the law as plain JSON values; caveats as `traps`, warnings as `cautions`."""
        content = asdict(self)
        del content["function"]
        return {JSON_KEYS.get(name, name): value for name, value in content.items()} | {
            "units": {name: QUANTITIES[name] for name in self.gives},
            "example": self.example(),
        }


JSON_KEYS = {"caveats": "traps", "warnings": "cautions"}  # field -> its key in `laws --json`


def _abbreviate(numbers: dict[str, Any]) -> dict[str, Any]:
    """Replaces a learning-rate schedule by its length, for an error message."""
    return {
        name: f"{len(value)} learning rates" if isinstance(value, tuple) else value
        for name, value in numbers.items()
    }
