"""What one published law is: a function with its coefficients, and everything a user must know before believing it."""

# Symbols, in this package only: N parameters, D tokens, C training FLOPs, U unique tokens; each Input says whose count it is.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from scaletune.errors import UserError

EXAMPLE = {"n_params": 1e9, "tokens": 2e10, "flops": 6 * 1e9 * 2e10}  # where every law shows a worked number


def positive(name: str, value: Any) -> float:
    """`value` as a float; UserError unless it is a positive, finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise UserError(f"`{name}` must be a positive, finite number, but got {value!r}")
    return number


@dataclass(frozen=True)
class Input:
    """One argument of a law: its symbol in the formula, and how the source counts it."""

    symbol: str
    column: str  # of the contract, where its value is read from
    means: str
    mismatch: str = ""  # said to a user whose column counts differently


N_BODY = Input("N", "n_params", "parameters without the embedding and the output head")
N_WITH_HEAD = Input(
    "N",
    "n_params",
    "parameters with the output head (vocabulary x width, once), without the input embedding",
    "its N counts the output head (vocabulary x width), which n_params leaves out; that matters most in small models",
)
N_TOTAL = Input(
    "N",
    "n_params",
    "all parameters, both embeddings included",
    "its N counts all parameters, while n_params leaves the embeddings out: "
    "about 47491 * n_params**(1/3) more in Chinchilla-like shapes (arXiv:2406.12907)",
)
N_UNSTATED = Input(
    "N", "n_params", "parameters; whether embeddings count is not recorded", "whether its N counts embeddings is not recorded"
)
D = Input("D", "tokens", "tokens trained on")


@dataclass(frozen=True, kw_only=True)
class Law:
    """A published law. Calling it with its symbols evaluates it: ``law(N=1e9, D=2e10) -> {"lr": ..., "batch_tokens": ...}``.

    Ranges are keyed by the name of a quantity: a column of the contract or `tokens_per_param`.
    """

    id: str
    name: str
    kind: str  # "learning_rate" | "batch" | "loss": the file it stands in
    formula: str  # assignments in Python's notation, for the reader; `function` is what runs
    function: Callable[..., dict[str, float]]  # takes inputs and coefficients by name
    inputs: tuple[Input, ...]
    gives: tuple[str, ...]
    coefficients: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # published, of coefficients or exponents
    level: str = ""  # what kind of interval that is
    fitted: dict[str, tuple[float, float]] = field(default_factory=dict)  # quantity -> range of the runs behind the law
    validated: dict[str, float] = field(default_factory=dict)  # quantity -> how far above `fitted` the source checked it
    held: dict[str, float] = field(default_factory=dict)  # quantity -> the one value it had in every run
    band: dict[str, float] = field(default_factory=dict)  # quantity -> full width, as a factor, of the 0.25 % loss band
    conditions: dict[str, str] = field(default_factory=dict)  # schedule, optimizer, data, ...
    setup: str
    source: str
    traps: tuple[str, ...] = ()  # shown with the law
    cautions: tuple[str, ...] = ()  # shown with the law and said with each prediction
    confirmed: bool = True  # every coefficient was seen in a source or recomputed from its data
    unconfirmed: tuple[str, ...] = ()  # what rests on memory; said with each prediction

    def __call__(self, **values: float) -> dict[str, float]:
        """The law at these values of its symbols; UserError when one is missing, unknown, or not positive and finite."""
        symbols = [entry.symbol for entry in self.inputs]
        if set(values) != set(symbols):
            raise UserError(f"{self.id} takes {', '.join(symbols)}, but got {', '.join(sorted(values)) or 'nothing'}")
        numbers = {symbol: positive(symbol, values[symbol]) for symbol in symbols}
        try:
            return self.function(**numbers, **self.coefficients)
        except ArithmeticError as error:
            raise UserError(f"{self.id} must be asked within what a float holds, but got {numbers}") from error

    def example(self) -> dict[str, dict[str, float]]:
        """A worked number: the symbols at a billion parameters and 20 tokens each, and what the law says there."""
        inputs = {entry.symbol: EXAMPLE[entry.column] for entry in self.inputs}
        return {"inputs": inputs, "values": self(**inputs)}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        content = asdict(self)
        del content["function"]
        return content | {"example": self.example()}
