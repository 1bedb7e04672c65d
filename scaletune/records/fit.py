"""`Fit`: a law fitted to trials, stored in `fits/NAME.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError
from scaletune.records.files import digest, write_atomically

if TYPE_CHECKING:
    from scaletune.predicting.prediction import Prediction


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law fitted to trials, with everything needed to predict from it and to judge it.

    Example:
        >>> import scaletune as st
        >>> fit = st.Fit(
        ...     law="chinchilla",
        ...     params={"E": {"value": 1.8, "interval": [1.7, 1.9]}},
        ...     solution={
        ...         "vector": [1.8, 482.0, 2085.4, 0.348, 0.366],
        ...         "draws": ["1.8 482.0 2085.4 0.348 0.366"],
        ...         "scatter": 0.002,
        ...     },
        ...     objective=0.0,
        ... )
        >>> round(fit.predict(n_params=7e9, tokens=1.4e12).loss, 2)
        2.06
    """

    law: str
    """The law. lr_nd: lr = c * n_params**a * tokens**b. loss_nd and chinchilla:
    E + A / n_params**alpha + B / tokens**beta. joint: the loss surface of surface/model.py."""
    params: dict[str, dict[str, Any]]
    """Parameter -> {"value": float, "interval": [low, high]} at `level`."""
    solution: dict[str, Any]
    """What a prediction reads: the vector of the solver, its covariance, centres, quantile."""
    objective: float
    """Value of the objective at the solution."""
    cells: list[dict[str, Any]] = field(default_factory=list)
    """One row per setting (n_params, tokens): its optimum and how certain that is."""
    ranges: dict[str, list[float]] = field(default_factory=dict)
    """Column -> [lowest, highest] value of the runs."""
    used: list[str] = field(default_factory=list)
    """Ids of the runs."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Id of a run that was not used -> the reason."""
    status: list[str] = field(default_factory=lambda: ["ok"])
    """Sentences on what makes the fit uncertain; ["ok"] if there is nothing to say."""
    held_out: dict[str, Any] = field(default_factory=dict)
    """How well the law predicts settings that it was not fitted to."""
    loss_law: Fit | None = None
    """The law of the minimum loss, fitted to the same runs."""
    level: float = 0.95
    """Level of every interval."""
    assumptions: list[str] = field(default_factory=list)
    """Sentences on what the fit assumes."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, time and source of the fit."""

    @property
    def digest(self) -> str:
        """The identity that written configs name: of the content without `provenance`."""
        content = self.to_dict() | {"loss_law": self.loss_law.digest if self.loss_law else None}
        content.pop("provenance")
        return digest(content)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the JSON file. `write` refuses NaN and infinities."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Fit:
        """A Fit from plain values; UserError if a field is missing or unknown."""
        unknown = set(content) - {f.name for f in fields(cls)} - {"digest"}
        required = ("law", "params", "solution", "objective")
        missing = [f"no {name}" for name in required if name not in content]
        if unknown or missing:
            raise UserError(
                "a fit file must hold the fields of a Fit, but got"
                f" {', '.join(sorted(unknown) or missing)}"
            )
        values = {key: value for key, value in content.items() if key != "digest"}
        if values.get("loss_law"):
            values["loss_law"] = cls.from_dict(values["loss_law"])
        return cls(**values)

    def write(self, path: str | Path) -> Path:
        """Writes the fit file, with its digest."""
        path = Path(path)
        content = {"digest": self.digest} | self.to_dict()
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Fit:
        """Reads a fit file; UserError if it is missing or is not one."""
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

    def predict(self, *, n_params: float, tokens: float, **others: float) -> Prediction:
        """The optimum at a target scale, with its interval and near-optimal band.

        Args:
            n_params: Non-embedding parameters of the target.
            tokens: Training tokens of the target.
            **others: `batch_tokens`, the batch size in tokens per step.

        Returns:
            The prediction: see `scaletune.predicting.from_fit`.
        """
        from scaletune.predicting.fitted_law import from_fit

        return from_fit(self, n_params=n_params, tokens=tokens, **others)
