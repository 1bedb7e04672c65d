"""`Row`: the settings of one tensor of a model, as a plan stores and prints them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from scaletune.parametrizing.shapes import Dims
from scaletune.rules import Role

HEADER = (
    *("tensor", "role", "shape", "m_in", "m_out"),
    *("multiplier", "init", "lr", "weight_decay", "eps"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The settings of one tensor.

    At most one of `init_value`, `init_std` and `init_scale` is not None; it says how the tensor is
    initialised.
    """

    name: str
    """Name of the parameter in the model, without the prefixes of wrappers (DDP, FSDP, compile)."""

    role: Role
    """"emb" (only fan-out grows with width), "hid" (both grow), "out" (only fan-in grows), "vec"
    (a vector that grows: bias, norm gain) or "fin" (nothing grows)."""

    shape: Dims
    """(size in the base model, size) of each dimension; the base size is None where the dimension
    does not grow."""

    m_in: float
    """Fan-in divided by the fan-in in the base model."""

    m_out: float
    """Fan-out divided by the fan-out in the base model."""

    multiplier: float
    """Factor of the tensor in the forward pass: the model computes with multiplier * W."""

    init_value: float | None
    """Constant initial value: norm gains, biases, a readout that starts at zero."""

    init_std: float | None
    """Standard deviation of a normal initialisation with mean 0."""

    init_scale: float | None
    """Factor on the values that the model's own constructor drew."""

    lr: float
    """Peak learning rate."""

    weight_decay: float
    """Weight decay in PyTorch's convention: one step multiplies W by 1 - lr * weight_decay."""

    eps: float
    """Epsilon of Adam and similar optimizers."""

    tied: Mapping[str, float] = field(default_factory=dict)
    """Other names of the same tensor (a tied readout), with the multiplier under each name."""

    branch: float = 1.0
    """Factor on the output of the residual branch that the tensor belongs to (depth rule)."""

    damping: tuple[float, float] = (1.0, 1.0)
    """Factors on the damping of the input's and of the output's statistics (K-FAC, Shampoo)."""


def multipliers(rows: Iterable[Row]) -> dict[str, float]:
    """Multiplier of each tensor under each of its names."""
    return {
        name: factor
        for row in rows
        for name, factor in ((row.name, row.multiplier), *row.tied.items())
    }


def from_dict(content: Mapping[str, Any]) -> Row:
    """A row from plain values as JSON stores them. KeyError for a key that `Row` does not have."""
    if unknown := content.keys() - {f.name for f in fields(Row)}:
        raise KeyError(min(unknown))
    shape = tuple(tuple(dim) for dim in content["shape"])
    damping = tuple(content.get("damping", (1.0, 1.0)))
    return Row(**{**content, "shape": shape, "damping": damping})


def cells(row: Row) -> tuple[str, ...]:
    """The printed columns of a row, in the order of HEADER, without its name."""
    shape = "x".join(
        f"{base}->{size}" if base is not None else str(size) for base, size in row.shape
    )
    multiplier = "/".join(f"{factor:.4g}" for factor in (row.multiplier, *row.tied.values()))
    ratios = (f"{ratio:.4g}" for ratio in (row.m_in, row.m_out))
    numbers = (f"{value:.4g}" for value in (row.lr, row.weight_decay, row.eps))
    return (row.role, shape, *ratios, multiplier, _format_init(row), *numbers)


def _format_init(row: Row) -> str:
    if row.init_value is not None:
        return f"{row.init_value:.4g}"
    if row.init_std is not None:
        return f"std {row.init_std:.4g}"
    return "?" if row.init_scale is None else f"times {row.init_scale:.4g}"
