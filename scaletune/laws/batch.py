"""Published laws of the optimal batch size alone."""

from __future__ import annotations

from scaletune.laws.entry import Law
from scaletune.laws.symbols import D, L


def powerlines(D: float, *, c: float, p: float) -> dict[str, float]:
    """batch = 2048 c D^p, where c D^p counts sequences of 2048 tokens    arXiv:2505.13738."""
    return {"batch_tokens": 2048 * c * D**p}


def minicpm(L: float, *, c: float, p: float) -> dict[str, float]:
    """batch = c L^-p    arXiv:2404.06395."""
    return {"batch_tokens": c / L**p}


LAWS = (
    Law(
        id="powerlines_bopt",
        name="Power Lines: optimal batch size",
        summary="Predicts the batch size of lowest loss from training tokens.",
        kind="batch",
        formula="batch_tokens = 2048 * c * D**p",
        function=powerlines,
        inputs=(D,),
        gives=("batch_tokens",),
        coefficients={"c": 0.0306, "p": 0.383},
        fitted={"tokens": (2e9, 300e9)},
        conditions={"parametrization": "muP", "sequences": "2048 tokens"},
        setup="The batch size depends on D only.",
        source="arXiv:2505.13738",
        caveats=("c * D**p counts sequences of 2048 tokens, not tokens",),
        confirmed=False,
        unconfirmed=(
            (
                "the prefactor 0.0306 (at 12.2e9 tokens it gives 223 sequences; the best batch "
                "size of the sweep is 252)"
            ),
        ),
    ),
    Law(
        id="minicpm_bs",
        name="MiniCPM: optimal batch size from the loss",
        summary="Predicts the batch size that reaches a given loss with the fewest tokens.",
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
        setup=(
            "A log-log line through the batch sizes that reach a loss with the fewest "
            "tokens (not the fewest steps)."
        ),
        source="Hu et al. 2024, arXiv:2404.06395",
        caveats=(
            (
                "Table 1 of the Step Law paper prints 2e18 / L**6.24, which is wrong by nine "
                "orders of magnitude"
            ),
            "1.21e9 is rounded: exp(20.91) = 1.2053e9",
            (
                "L is the loss with MiniCPM's tokenizer and data; a difference in loss changes "
                "the batch size by its 6th power"
            ),
        ),
    ),
)
