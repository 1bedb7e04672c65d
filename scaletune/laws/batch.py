"""Published laws of the batch size alone."""

from __future__ import annotations

from scaletune.laws.entry import Law
from scaletune.laws.symbols import D, L


def powerlines(D: float, *, c: float, p: float) -> dict[str, float]:
    """batch = 2048 c D^p, where c D^p is in sequences of 2048    arXiv:2505.13738."""
    return {"batch_tokens": 2048 * c * D**p}


def minicpm(L: float, *, c: float, p: float) -> dict[str, float]:
    """batch = c L^-p    arXiv:2404.06395."""
    return {"batch_tokens": c / L**p}


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
        unconfirmed=(
            "the prefactor 0.0306; at 12.2e9 tokens it gives 223 sequences, where the best of the swept batches is 252",
        ),
    ),
    Law(
        id="minicpm_bs",
        name="MiniCPM, batch against loss",
        kind="batch",
        formula="batch_tokens = c / L**p",
        function=minicpm,
        inputs=(L,),
        gives=("batch_tokens",),
        coefficients={"c": 1.21e9, "p": 6.24},
        fitted={"n_params": (9e6, 170e6)},
        conditions={
            "schedule": "constant, or WSD",
            "parametrization": "muP; the best lr stayed 0.01 from 0.04e9 to 2.1e9 parameters",
            "data": "C4, MiniCPM tokenizer",
        },
        setup="the batch of fewest tokens (not steps) to a loss, a line in log-log",
        source="Hu et al. 2024, arXiv:2404.06395",
        traps=(
            "Table 1 of the Step Law paper prints 2e18 / L**6.24, nine orders off",
            "1.21e9 is rounded: exp(20.91) = 1.2053e9",
            "L is of its own tokenizer and data: another tokenizer's loss shifts the batch as the 6th power",
        ),
    ),
)
