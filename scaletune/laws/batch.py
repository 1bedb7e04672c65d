"""Published laws of the batch size alone."""

from __future__ import annotations

from scaletune.laws.entry import D, Law


def powerlines(D: float, *, c: float, p: float) -> dict[str, float]:
    """batch = 2048 c D^p, where c D^p is in sequences of 2048    arXiv:2505.13738."""
    return {"batch_tokens": 2048 * c * D**p}


LAWS = (
    Law(
        id="powerlines_bopt",
        name="Power Lines, batch of lowest loss",
        kind="batch",
        formula="batch_tokens = 2048 * c * D**p",
        function=powerlines,
        inputs=(D,),
        gives=("batch_tokens",),
        coefficients={"c": 0.0306, "p": 0.383},
        fitted={"tokens": (2e9, 300e9)},
        conditions={"parametrization": "muP", "sequences": "2048 tokens"},
        setup="the batch depends on D only",
        source="arXiv:2505.13738",
        traps=("c * D**p is in sequences of 2048, not in tokens",),
        confirmed=False,
        unconfirmed=("the prefactor 0.0306; at 12.2e9 tokens it gives 223 sequences, where the best of the swept batches is 252",),
    ),
)
