"""`Fit`: a law fitted to trials, in `fits/NAME.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.records.files import digest, write_atomically


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law fitted to trials, with everything needed to predict from it and to judge it. Written to `fits/NAME.json`."""

    law: str  # "lr_nd": lr = c * n_params**a * tokens**b; "loss_nd", "chinchilla": E + A / n_params**alpha + B / tokens**beta; "joint": laws/surface.py
    params: dict[str, dict[str, Any]]  # name -> {"value": float, "interval": [lo, hi]} at `level`
    solution: dict[
        str, Any
    ]  # what prediction needs: the solver's own vector, its covariance, centres, quantile
    objective: float
    cells: list[dict[str, Any]] = field(
        default_factory=list
    )  # one row a (n_params, tokens) cell: its optimum and how sure
    ranges: dict[str, list[float]] = field(
        default_factory=dict
    )  # column -> [lowest, highest] fitted on
    used: list[str] = field(default_factory=list)  # ids of the runs
    dropped: dict[str, str] = field(default_factory=dict)  # id -> reason
    status: list[str] = field(
        default_factory=lambda: ["ok"]
    )  # sentences; ["ok"] when there is nothing to say
    held_out: dict[str, Any] = field(
        default_factory=dict
    )  # how well it predicted what it did not see
    loss_law: Fit | None = None  # the floor under the basin, fitted to the same runs
    level: float = 0.95  # of every interval
    assumptions: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The identity an emitted config names: of what was learned, not of when or where."""
        content = self.to_dict() | {"loss_law": self.loss_law.digest if self.loss_law else None}
        content.pop("provenance")
        return digest(content)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; writing refuses NaN and infinities."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Fit:
        unknown = set(content) - {f.name for f in fields(cls)} - {"digest"}
        missing = [
            f"no {name}"
            for name in ("law", "params", "solution", "objective")
            if name not in content
        ]
        if unknown or missing:
            raise UserError(
                f"a fit file must hold the fields of a Fit, but got {', '.join(sorted(unknown) or missing)}"
            )
        values = {key: value for key, value in content.items() if key != "digest"}
        if values.get("loss_law"):
            values["loss_law"] = cls.from_dict(values["loss_law"])
        return cls(**values)

    def write(self, path: str | Path) -> Path:
        """Write `fits/NAME.json`, its own digest in it."""
        path = Path(path)
        write_atomically(
            path,
            json.dumps({"digest": self.digest} | self.to_dict(), indent=1, allow_nan=False) + "\n",
        )
        return path

    @classmethod
    def read(cls, path: str | Path) -> Fit:
        """Read a fit file; UserError when it is missing or is not one."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"the fit file must exist, but got `{path}`")
        try:
            content = json.loads(path.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"a fit file must be JSON as `scaletune fit --out` writes it, but `{path}`: {error}"
            ) from error
        if not isinstance(content, dict):
            raise UserError(
                f"a fit file must hold one object, but `{path}` holds a {type(content).__name__}"
            )
        return cls.from_dict(content)

    def predict(self, *, n_params: float, tokens: float, **others: float):
        """The optimum at a target scale, with interval and near-optimal band: see `scaletune.predicting.from_fit`."""
        from scaletune.predicting import from_fit

        return from_fit(self, n_params=n_params, tokens=tokens, **others)
