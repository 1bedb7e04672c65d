"""`Plan`: the settings of every tensor of a model, by name. It is saved as JSON and printed."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from scaletune.errors import UserError
from scaletune.parametrizing import apply
from scaletune.parametrizing import row as rows_module
from scaletune.parametrizing.attention import QueryMultiplier
from scaletune.parametrizing.row import HEADER, Row
from scaletune.parametrizing.shapes import name_pattern, named_tensors
from scaletune.records import digest, write_atomically
from scaletune.rules import FAMILIES, ROLES, caveats

SCHEMA = "scaletune.parametrization/1"
SHARDED = "_fsdp_wrapped_module"  # FullyShardedDataParallel shows local pieces, of other shapes

NOT_JSON = (OSError, json.JSONDecodeError, UnicodeDecodeError)
UNREADABLE = (*NOT_JSON, AttributeError, KeyError, TypeError)
"""What reading a file that is not a plan raises."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is parametrized: `st.parametrize` returns it.

    `attach` hooks the multipliers to a model, `initialise` draws its tensors, and `param_groups`
    gives the groups for any optimizer. `plan[name]` is the `Row` of a tensor, `print(plan)` shows
    the table, `save` and `read` keep it as JSON. A plan stores no tensors.

    Example:
        >>> import scaletune as st
        >>> from torch import nn
        >>> def mlp(width):
        ...     return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
        >>> model = mlp(64)
        >>> plan = st.parametrize(model, base=mlp(32), lr=0.01, init_std=0.1)
        >>> plan["2.weight"].role, plan["2.weight"].multiplier
        ('out', 0.5)
        >>> print(plan)
        plan: form mup, optimizer adamw, 4 tensors, shapes b6739061e748b6b0
        tensor    role  shape     m_in  m_out  multiplier  init     lr    weight_decay  eps    count
        0.weight  emb   32->64x8  1     2      1           std 0.1  0.01  0             5e-09  1
        0.bias    vec   32->64    1     2      1           0        0.01  0             5e-09  1
        2.weight  out   2x32->64  2     1      0.5         std 0.1  0.01  0             5e-09  1
        2.bias    fin   2         1     1      1           0        0.01  0             1e-08  1
    """

    form: str
    """Parametrization, as in a recipe: "mup", "mup_t3", "mup_t8", "mup_t9", "sp", "ntk", ..."""

    optimizer: str
    """Optimizer family that the learning rates are for: "adamw", "sgd", "muon", ..."""

    rows: tuple[Row, ...]
    """One row per tensor, in the order of `model.named_parameters()`."""

    branches: tuple[str, ...] = ()
    """Patterns of the modules whose output is a residual branch (depth rule)."""

    queries: tuple[QueryMultiplier, ...] = ()
    """Modules whose queries are multiplied, where the head size grows, so that attention logits
    scale as 1 / d_head."""

    notes: tuple[str, ...] = ()
    """What the user has to do by hand: one sentence each."""

    def __getitem__(self, name: str) -> Row:
        """The row of the tensor `name`."""
        return self._by_name[name]

    @property
    def _by_name(self) -> dict[str, Row]:
        return {row.name: row for row in self.rows}

    @property
    def digest(self) -> str:
        """Digest of the base and target shapes by name. It identifies the model of a plan."""
        return digest({row.name: [list(dim) for dim in row.shape] for row in self.rows})

    def multipliers(self) -> dict[str, float]:
        """Multiplier of each tensor under each of its names (a tied tensor has several)."""
        return rows_module.multipliers(self.rows)

    def extra(self, row: Row) -> dict[str, Any]:
        """Settings in a param group of this optimizer besides lr and weight decay.

        These are `eps`, except for SGD, and `damping` for K-FAC and Shampoo: factors on the damping
        that you choose.
        """
        if FAMILIES[self.optimizer].damping:
            return {"eps": row.eps, "damping": row.damping}
        return {"eps": row.eps} if self.optimizer != "sgd" else {}

    def check(self, model: nn.Module) -> None:
        """Checks that the model has the tensors of the plan in the same shapes.

        Raises:
            UserError: A tensor is missing or has another shape. The message names it.
        """
        tensors, rows = named_tensors(model), self._by_name
        if odd := sorted(tensors.keys() ^ rows.keys()):
            side = "model" if odd[0] in tensors else "plan"
            raise UserError(
                f"plan and model must have the same tensors, but `{odd[0]}` is only in the {side}:"
                " make a plan for this model with `parametrize`"
            )
        sharded = any(SHARDED in name for name, _ in model.named_parameters())
        for name, tensor in tensors.items():
            planned = tuple(size for _, size in rows[name].shape)
            if tuple(tensor.shape) != planned and not sharded:
                raise UserError(
                    f"plan and model must have the same shapes, but `{name}` has shape"
                    f" {tuple(tensor.shape)} in the model and {planned} in the plan: make a plan"
                    " for this model with `parametrize`"
                )

    def attach(self, model: nn.Module) -> nn.Module:
        """Hooks every multiplier to the module that owns its tensor.

        `st.parametrize` does this already, unless `apply=False`. A second call has no further
        effect. A model that was loaded from a checkpoint needs it, because hooks are not in the
        `state_dict`.

        Args:
            model: A model with the shapes of the plan.

        Returns:
            The model.

        Raises:
            UserError: The model has other tensors or shapes.

        Example:
            >>> import scaletune as st
            >>> from torch import nn
            >>> def mlp(width):
            ...     return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
            >>> plan = st.parametrize(mlp(64), base=mlp(32), init_std=0.1, apply=False)
            >>> model = plan.initialise(plan.attach(mlp(64)), seed=1)
        """
        self.check(model)
        apply.attach(model, self.rows, self.branches, self.queries)
        return model

    def initialise(self, model: nn.Module, seed: int = 0) -> nn.Module:
        """Initialises every tensor in place, as its row says.

        `init_value`: the constant. `init_std`: N(0, init_std**2) from a generator seeded by `seed`
        and the tensor's name, so that the values do not depend on the order of tensors or on how
        they are sharded. `init_scale`: multiplies the model's own initial values, once.

        Args:
            model: A model with the shapes of the plan, on a real device.
            seed: Seed of the random values.

        Returns:
            The model.

        Raises:
            UserError: The model is on the meta device, has other tensors or shapes, or has been
                rescaled before.
        """
        self.check(model)
        apply.initialise(model, self.rows, seed, self.digest)
        return model

    def param_groups(
        self, model: nn.Module, roles: Collection[str] = ROLES
    ) -> list[dict[str, Any]]:
        """Param groups for any optimizer: one group for each distinct setting.

        A learning-rate schedule must multiply each group's `initial_lr`; a schedule that writes
        absolute learning rates (such as OneCycleLR) destroys the ratios between groups.

        Args:
            model: A model with the shapes of the plan, wrapped (DDP, FSDP, compile) or not.
            roles: Roles of the tensors to include. If two optimizers share a model, for example
                `("hid",)` for Muon and the other roles for AdamW.

        Returns:
            A list of dicts with keys `params`, `lr`, `initial_lr`, `weight_decay` and, depending
            on the optimizer, `eps` and `damping`.

        Raises:
            UserError: The model has other tensors or shapes.

        Example:
            >>> import scaletune as st
            >>> import torch
            >>> from torch import nn
            >>> def mlp(width):
            ...     return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width))
            >>> model = mlp(64)
            >>> plan = st.parametrize(model, base=mlp(32), lr=0.01, init_std=0.1)
            >>> groups = plan.param_groups(model)
            >>> [(len(group["params"]), group["lr"]) for group in groups]
            [(3, 0.01), (1, 0.005)]
            >>> optimizer = torch.optim.AdamW(groups)
        """
        self.check(model)
        rows = [row for row in self.rows if row.role in roles]
        return apply.param_groups(model, rows, self.extra)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, with its schema and digest."""
        return {"schema": SCHEMA, "digest": self.digest, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Writes the plan to `path` as JSON, atomically."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Reads a plan that `save` wrote.

        Raises:
            UserError: The file is not a plan, or its shapes do not match its digest.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            if content.pop("schema") != SCHEMA:
                raise UserError(f"`{path}` must be a plan of schema {SCHEMA!r}")
            recorded = content.pop("digest")
            plan = cls(**content | _records_of(content))
        except UNREADABLE as error:
            raise UserError(
                f"`{path}` must be a plan that `Plan.save` wrote, but reading it raised"
                f" {type(error).__name__}: {error}"
            ) from None
        if plan.digest != recorded:
            raise UserError(
                f"`{path}` must hold the shapes that its digest was made from, but its digest is"
                f" {recorded} and the shapes have {plan.digest}: the file was changed"
            )
        return plan

    def __str__(self) -> str:
        """A table. Tensors whose names differ only in layer numbers share a line."""
        same: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            same.setdefault((name_pattern(row.name), *rows_module.cells(row)), []).append(row.name)
        lines = [
            (names[0] if len(names) == 1 else cells[0], *cells[1:], str(len(names)))
            for cells, names in same.items()
        ]
        head = (
            f"plan: form {self.form}, optimizer {self.optimizer}, {len(self.rows)} tensors,"
            f" shapes {self.digest}"
        )
        notes = (*self.notes, *_query_notes(self.queries), *caveats(self.form, self.optimizer))
        return "\n".join(
            [head, *_align([(*HEADER, "count"), *lines]), *map("note: {}".format, notes)]
        )


def _records_of(content: dict[str, Any]) -> dict[str, Any]:
    """The nested records of a plan read from JSON."""
    return {
        "rows": tuple(rows_module.from_dict(row) for row in content["rows"]),
        "branches": tuple(content["branches"]),
        "queries": tuple(QueryMultiplier(**query) for query in content.get("queries", [])),
        "notes": tuple(content.get("notes", [])),
    }


def _align(table: list[tuple[str, ...]]) -> list[str]:
    """Lines with columns padded to the same width."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]


def _query_notes(queries: Collection[QueryMultiplier]) -> list[str]:
    if not queries:
        return []
    factors = " or ".join(sorted({f"{query.factor:.4g}" for query in queries}))
    return [
        f"the queries of {len(queries)} attention modules are multiplied by {factors}, so that"
        " attention logits scale as 1 / d_head"
    ]
