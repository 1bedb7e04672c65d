"""Relations for downstream tasks: average error against loss, pass rate against model size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scaletune.fitting.relations.critical import LOSS, N_PARAMS
from scaletune.fitting.relations.relation import (
    Array,
    Box,
    Columns,
    Relation,
    RelationColumn,
    Values,
)


def _error(x: Columns, p: Values) -> Array:
    return p["eps"] - p["k"] * np.exp(-p["gamma"] * x["loss"])


def _pass(x: Columns, p: Values) -> Array:
    return np.exp(-p["c"] * x["n_params"] ** -p["alpha"])


ERROR = Relation(
    id="error_of_loss",
    formula="error = eps - k * exp(-gamma * loss)",
    source="arXiv:2403.08540, eq. 5",
    inputs=(LOSS,),
    output=RelationColumn("error", "average top-1 error, 0 to 1"),
    parameters={"eps": Box(0.05, 1.5, log=False), "k": Box(1e-3, 1e4), "gamma": Box(0.02, 10.0)},
    function=_error,
    along="loss",
    log=False,
    robust=False,
)
PASS = Relation(
    id="pass_rate",
    formula="pass_rate = exp(-c * n_params**-alpha)",
    source="arXiv:2310.03262; the form is not confirmed",
    inputs=(N_PARAMS,),
    output=RelationColumn("pass_rate", "share of sampled answers that pass, above 0"),
    parameters={"c": Box(1e-2, 1e12), "alpha": Box(0.01, 3.0)},
    function=_pass,
    along="n_params",
)
RELATIONS: Mapping[str, Relation] = {relation.id: relation for relation in (ERROR, PASS)}
