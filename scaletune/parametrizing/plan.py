"""The plan: what every parameter of a model gets, keyed by name; a frozen record, saved as JSON, printed as a table."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from scaletune.errors import UserError
from scaletune.parametrizing import apply
from scaletune.parametrizing.attention import Queries
from scaletune.parametrizing.shapes import Dims, named, skeleton
from scaletune.records import digest, write_atomically
from scaletune.rules import FAMILIES, ROLES, Role, caveats

SCHEMA = "scaletune.parametrization/1"
SHARDED = (
    "_fsdp_wrapped_module"  # FullyShardedDataParallel shows local pieces: their shapes say nothing
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor. Of `init_value`, `init_std` and `init_scale` the first that is not None is what initialising does."""

    name: str
    role: Role
    shape: Dims  # (base size or None where it does not grow, size) of each dimension
    m_in: float
    m_out: float
    multiplier: float  # the tensor acts as multiplier * W
    init_value: float | None  # a constant: gains, biases, a readout that starts at zero
    init_std: float | None
    init_scale: float | None  # times what the model itself drew
    lr: float
    weight_decay: float
    eps: float
    tied: Mapping[str, float] = field(
        default_factory=dict
    )  # the tensor's other names, with the multiplier it has there
    branch: float = 1.0  # factor on the output of its residual branch
    damping: tuple[float, float] = (
        1.0,
        1.0,
    )  # factors on that of the input's and the output's statistics: K-FAC, Shampoo


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is parametrized: `attach` hooks its multipliers, `initialise` draws its tensors, `param_groups` feeds any optimizer."""

    form: str
    optimizer: str
    rows: tuple[Row, ...]
    branches: tuple[str, ...] = ()  # patterns of the modules whose output is a residual branch
    queries: tuple[
        Queries, ...
    ] = ()  # what makes a softmax go as 1 / d_head where the head size grows
    notes: tuple[str, ...] = ()  # what the user must see to

    def __getitem__(self, name: str) -> Row:
        return self._named[name]

    @property
    def _named(self) -> dict[str, Row]:
        return {row.name: row for row in self.rows}

    @property
    def digest(self) -> str:
        """Of the base's and the target's shapes by name: what a plan belongs to."""
        return digest({row.name: [list(dim) for dim in row.shape] for row in self.rows})

    def multipliers(self) -> dict[str, float]:
        """Tensor, by each of its names -> what it is multiplied by where that name owns it."""
        return {
            name: factor
            for row in self.rows
            for name, factor in ((row.name, row.multiplier), *row.tied.items())
        }

    def extra(self, row: Row) -> dict[str, Any]:
        """Settings beside lr and weight decay that this optimizer's groups carry; `damping`: factors on your own."""
        if FAMILIES[self.optimizer].damping:
            return {"eps": row.eps, "damping": row.damping}
        return {"eps": row.eps} if self.optimizer != "sgd" else {}

    def check(self, model: nn.Module) -> None:
        """UserError, naming a tensor, unless the model has the plan's tensors in the plan's shapes."""
        found, rows = named(model), self._named
        if odd := sorted(found.keys() ^ rows.keys()):
            raise UserError(
                f"plan and model must name the same tensors, but `{odd[0]}` is in {'the model' if odd[0] in found else 'the plan'} alone"
            )
        sharded = any(SHARDED in name for name, _ in model.named_parameters())
        for name, parameter in found.items():
            planned = tuple(size for _, size in rows[name].shape)
            if tuple(parameter.shape) != planned and not sharded:
                raise UserError(
                    f"a plan belongs to the shapes it was made for, but `{name}` has {tuple(parameter.shape)}, planned {planned}"
                )

    def attach(self, model: nn.Module) -> nn.Module:
        """Hook every multiplier to the module that owns its tensor, by name; again is the same. Returns the model."""
        apply.attach(self, model)
        return model

    def initialise(self, model: nn.Module, seed: int = 0) -> nn.Module:
        """Draw N(0, init_std**2) from a generator seeded by `seed` and name, put constants back, or rescale, once, what the model drew."""
        apply.initialise(self, model, seed)
        return model

    def param_groups(
        self, model: nn.Module, roles: Collection[str] = ROLES
    ) -> list[dict[str, Any]]:
        """{params, lr, initial_lr, weight_decay, eps} for each distinct setting; wrappers' prefixes are looked through.

        roles: those tensors only, where two optimizers share a model: Muon takes "hid", AdamW the others.
        """
        return apply.param_groups(self, model, roles)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "digest": self.digest, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """A plan from its file. UserError unless it is one, whole and unaltered."""
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            if content.pop("schema") != SCHEMA:
                raise UserError(f"`{path}` must be a plan of schema {SCHEMA!r}")
            said = content.pop("digest")
            softmax = tuple(Queries(**found) for found in content.get("queries", []))
            rows = tuple(_row(row) for row in content["rows"])
            plan = cls(
                **content
                | {
                    "rows": rows,
                    "branches": tuple(content["branches"]),
                    "queries": softmax,
                    "notes": tuple(content.get("notes", [])),
                }
            )
        except (
            OSError,
            json.JSONDecodeError,
            UnicodeDecodeError,
            AttributeError,
            KeyError,
            TypeError,
        ) as error:
            raise UserError(
                f"`{path}` must be a plan that `Plan.save` wrote, but {type(error).__name__}: {error}"
            ) from None
        if plan.digest != said:
            raise UserError(
                f"`{path}` must hold the shapes its digest says, but the digest is {said} and theirs {plan.digest}"
            )
        return plan

    def __str__(self) -> str:
        """A table with one line for tensors that differ in their numbers only."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            alike.setdefault((skeleton(row.name), *_cells(row)), []).append(row.name)
        found = [
            (names[0] if len(names) == 1 else cells[0], *cells[1:], str(len(names)))
            for cells, names in alike.items()
        ]
        table = [(*HEADER, "x"), *found]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        body = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        )
        notes = "".join(
            f"\nnote: {note}"
            for note in (*self.notes, *_softmax(self.queries), *caveats(self.form, self.optimizer))
        )
        return f"form {self.form}, optimizer {self.optimizer}, {len(self.rows)} tensors, shapes {self.digest}\n{body}{notes}"


HEADER = (
    "tensor",
    "role",
    "shape",
    "m_in",
    "m_out",
    "multiplier",
    "init",
    "lr",
    "weight_decay",
    "eps",
)


def _softmax(found: Collection[Queries]) -> list[str]:
    factors = sorted({f"{each.factor:.4g}" for each in found})
    return (
        [
            f"queries of {len(found)} attention modules times {' or '.join(factors)}: the softmax goes as 1 / d_head"
        ]
        if found
        else []
    )


def _cells(row: Row) -> tuple[str, ...]:
    shape = "x".join(
        f"{base}->{size}" if base is not None else str(size) for base, size in row.shape
    )
    multiplier = "/".join(f"{factor:.4g}" for factor in (row.multiplier, *row.tied.values()))
    numbers = (f"{value:.4g}" for value in (row.lr, row.weight_decay, row.eps))
    return (
        row.role,
        shape,
        f"{row.m_in:.4g}",
        f"{row.m_out:.4g}",
        multiplier,
        _init(row),
        *numbers,
    )


def _init(row: Row) -> str:
    if row.init_value is not None:
        return f"{row.init_value:.4g}"
    return (
        f"std {row.init_std:.4g}"
        if row.init_std is not None
        else ("?" if row.init_scale is None else f"times {row.init_scale:.4g}")
    )


def _row(content: Mapping[str, Any]) -> Row:
    if unknown := content.keys() - {f.name for f in fields(Row)}:
        raise KeyError(min(unknown))
    tuples = {"shape": tuple(tuple(dim) for dim in content["shape"])} | {
        "damping": tuple(content.get("damping", (1.0, 1.0)))
    }
    return Row(**{**content, **tuples})
