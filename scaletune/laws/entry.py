"""What one published law is: a function with its coefficients, and everything a user must know before believing it."""

# Symbols, in this package only: N parameters, D tokens, C training FLOPs, U unique tokens; each Input says whose count it is.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from scaletune.errors import UserError
from scaletune.laws.columns import COLUMNS, QUANTITIES, checked, finite


@dataclass(frozen=True)
class Input:
    """One argument of a law: its symbol in the formula, the column its value is read from, and how the source counts it."""

    symbol: str
    column: str
    means: str
    mismatch: str = ""  # said when the value came from elsewhere than `column`
    instead: tuple[
        str, ...
    ] = ()  # columns taken where `column` is not given: counts near enough, with `mismatch`
    default: float | None = None  # the value of most runs, said when it is used
    doubt: str = ""  # said always: what is not known of how the source counts


@dataclass(frozen=True, kw_only=True)
class Law:
    """A published law. Calling it with its symbols evaluates it: ``law(N=1e9, D=2e10) -> {"lr": ..., "batch_tokens": ...}``.

    Ranges are keyed by the name of a quantity: a column, an answer, or what consulting derives of columns (`tokens_per_param`).
    """

    id: str
    name: str
    kind: str  # of laws.KINDS
    formula: str  # assignments in Python's notation, for the reader; `function` is what runs
    function: Callable[..., dict[str, float]]  # takes inputs and coefficients by name
    inputs: tuple[Input, ...]
    gives: tuple[str, ...]  # names of columns.QUANTITIES
    coefficients: dict[str, float] = field(default_factory=dict)
    unknown: dict[str, str] = field(
        default_factory=dict
    )  # coefficients the source gives no value for, and what they are
    intervals: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # published, of coefficients or exponents
    level: str = ""  # what kind of interval that is
    fitted: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # quantity -> range of the runs behind the law
    validated: dict[str, float] = field(
        default_factory=dict
    )  # quantity -> how far above `fitted` the source checked it
    held: dict[str, float] = field(
        default_factory=dict
    )  # quantity -> the one value it had in every run
    band: dict[str, float] = field(
        default_factory=dict
    )  # quantity -> full width, as a factor, of the 0.25 % loss band
    conditions: dict[str, str] = field(default_factory=dict)  # schedule, optimizer, data, ...
    setup: str
    source: str
    traps: tuple[str, ...] = ()  # shown with the law
    cautions: tuple[str, ...] = ()  # shown with the law and said with each prediction
    confirmed: bool = True  # every coefficient was seen in a source or recomputed from its data
    unconfirmed: tuple[str, ...] = ()  # what rests on memory; said with each prediction
    shown_at: dict[str, Any] = field(
        default_factory=dict
    )  # symbols of the worked number, where not at the columns' examples

    def __call__(self, **values: Any) -> dict[str, float]:
        """The law at these values of its symbols; UserError when one is missing, unknown, or outside of its domain."""
        numbers = self.read(values)
        try:
            found = self.function(**numbers, **self.coefficients)
        except ArithmeticError as error:
            raise UserError(
                f"{self.id} must be asked within what a float holds, but got {_brief(numbers)}"
            ) from error
        if any(isinstance(value, complex) for value in found.values()):
            raise UserError(
                f"{self.id} must be asked where its powers are real numbers, but got {_brief(numbers)}"
            )
        return found

    def read(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values of the symbols, checked."""
        columns = {entry.symbol: entry.column for entry in self.inputs}
        missing = [name for name in self.unknown if name not in values]
        if missing and set(columns) <= set(values):
            told = "; ".join(f"{name}, {self.unknown[name]}" for name in missing)
            raise UserError(
                f"{self.id} has no published value of {told}: give your own, --given {missing[0]}=VALUE on the command line"
            )
        if set(values) != {*columns, *self.unknown}:
            takes = ", ".join((*columns, *self.unknown))
            raise UserError(
                f"{self.id} takes {takes}, but got {', '.join(sorted(values)) or 'nothing'}"
            )
        own = {name: finite(values[name]) for name in self.unknown}
        for name, value in own.items():
            if value != value:
                raise UserError(f"`{name}` must be a finite number, but got {values[name]!r}")
        return {
            symbol: checked(symbol, values[symbol], column) for symbol, column in columns.items()
        } | own

    def example(self) -> dict[str, dict[str, Any]]:
        """A worked number: the symbols at the columns' examples (a billion parameters, 20 tokens each), and what the law says there.

        Coefficients in `unknown` stand there as an illustration, of no source.
        """
        inputs = {
            entry.symbol: COLUMNS[entry.column].example for entry in self.inputs
        } | self.shown_at
        return {"inputs": inputs, "values": self(**inputs)}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        content = asdict(self)
        del content["function"]
        return content | {
            "units": {name: QUANTITIES[name] for name in self.gives},
            "example": self.example(),
        }


def _brief(numbers: dict[str, Any]) -> dict[str, Any]:
    """For a message: a schedule by its length."""
    return {
        name: f"{len(value)} lrs" if isinstance(value, tuple) else value
        for name, value in numbers.items()
    }
