"""What repeated tokens and more compute are worth when data run out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scaletune.fitting.relations.critical import LOSS, TOKENS
from scaletune.fitting.relations.relation import Array, Box, Column, Columns, Relation, Values
from scaletune.laws.repetition import worth

N_TOTAL = Column("n_params_total", "all parameters, embeddings included")
UNIQUE = Column("unique_tokens", "tokens that are not repeats")


def _repeated(x: Columns, p: Values) -> Array:
    alpha, beta = p["alpha"], p["alpha"]  # tied, as the source ties them
    G = (alpha * p["A"] / (beta * p["B"])) ** (1 / (alpha + beta))
    fed = np.minimum(x["n_params_total"], (x["unique_tokens"] * G) ** (beta / alpha) * G)
    n, d = (
        worth(x["n_params_total"], fed, p["r_params"]),
        worth(x["tokens"], x["unique_tokens"], p["r_tokens"]),
    )
    return p["E"] + p["A"] * n**-alpha + p["B"] * d**-beta


REPEATED = Relation(
    id="repeated_tokens",
    formula="loss = E + A * N_worth**-alpha + B * D_worth**-alpha; X_worth = U * (1 + r * (1 - exp(-(X / U - 1) / r)))",
    source="arXiv:2305.16264, eq. 5 to 7, alpha and beta tied",
    inputs=(N_TOTAL, TOKENS, UNIQUE),
    output=LOSS,
    parameters={
        "E": Box(0.2, 6.0), "A": Box(1.0, 1e5), "B": Box(1.0, 1e6), "alpha": Box(0.1, 0.8), "r_tokens": Box(0.5, 200.0),
        "r_params": Box(0.5, 200.0),
    },
    function=_repeated,
    along="tokens",
)  # fmt: skip
ASYMPTOTE = Relation(
    id="asymptote_n",
    formula="loss = E + A * n_params**-alpha at fixed unique tokens, everything else tuned at each size",
    source="arXiv:2509.14786",
    inputs=(Column("n_params", "parameters of one model, or of all members of an ensemble"),),
    output=LOSS,
    parameters={"E": Box(0.2, 8.0), "A": Box(1e-3, 1e12), "alpha": Box(0.05, 2.5)},
    function=lambda x, p: p["E"] + p["A"] * x["n_params"] ** -p["alpha"],
    along="n_params",
    groups=("unique_tokens", "method"),
)
RELATIONS: Mapping[str, Relation] = {relation.id: relation for relation in (REPEATED, ASYMPTOTE)}
