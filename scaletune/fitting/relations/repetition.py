"""Relations for repeated tokens and for training on a fixed amount of unique data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scaletune.fitting.relations.critical import LOSS, TOKENS
from scaletune.fitting.relations.relation import (
    Array,
    Box,
    Columns,
    Relation,
    RelationColumn,
    Values,
)
from scaletune.laws.repetition import effective_amount

N_TOTAL = RelationColumn("n_params_total", "all parameters, embeddings included")
UNIQUE = RelationColumn("unique_tokens", "tokens that are not repeats")


def _repeated(x: Columns, p: Values) -> Array:
    alpha, beta = p["alpha"], p["alpha"]  # tied, as the source ties them
    G = (alpha * p["A"] / (beta * p["B"])) ** (1 / (alpha + beta))
    optimal = (x["unique_tokens"] * G) ** (beta / alpha) * G  # size for the unique tokens
    unique_params = np.minimum(x["n_params_total"], optimal)
    n = effective_amount(x["n_params_total"], unique_params, p["r_params"])
    d = effective_amount(x["tokens"], x["unique_tokens"], p["r_tokens"])
    return p["E"] + p["A"] * n**-alpha + p["B"] * d**-beta


REPEATED = Relation(
    id="repeated_tokens",
    formula="loss = E + A * N_eff**-alpha + B * D_eff**-alpha; "
    "X_eff = U * (1 + r * (1 - exp(-(X / U - 1) / r)))",
    source="arXiv:2305.16264, eq. 5 to 7, alpha and beta tied",
    inputs=(N_TOTAL, TOKENS, UNIQUE),
    output=LOSS,
    parameters={
        "E": Box(0.2, 6.0),
        "A": Box(1.0, 1e5),
        "B": Box(1.0, 1e6),
        "alpha": Box(0.1, 0.8),
        "r_tokens": Box(0.5, 200.0),
        "r_params": Box(0.5, 200.0),
    },
    function=_repeated,
    along="tokens",
)
ASYMPTOTE = Relation(
    id="asymptote_n",
    formula="loss = E + A * n_params**-alpha at fixed unique tokens, tuned at each size",
    source="arXiv:2509.14786",
    inputs=(RelationColumn("n_params", "parameters of one model, or of a whole ensemble"),),
    output=LOSS,
    parameters={"E": Box(0.2, 8.0), "A": Box(1e-3, 1e12), "alpha": Box(0.05, 2.5)},
    function=lambda x, p: p["E"] + p["A"] * x["n_params"] ** -p["alpha"],
    along="n_params",
    groups=("unique_tokens", "method"),
)
RELATIONS: Mapping[str, Relation] = {relation.id: relation for relation in (REPEATED, ASYMPTOTE)}
