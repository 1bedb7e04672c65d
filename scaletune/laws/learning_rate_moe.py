"""Published laws of the optimal learning rate for mixtures of experts and for Muon."""

from __future__ import annotations

import math

from scaletune.laws.entry import Input, Law
from scaletune.laws.learning_rate import by_compute
from scaletune.laws.symbols import C_6ND, C_UNSTATED, N_ACTIVE, E


def by_experts(N: float, E: float, *, c: float, a: float, b: float) -> dict[str, float]:
    """ln lr = c + a ln N + b ln E    arXiv:2502.05172, eq. 8."""
    return {"lr": math.exp(c + a * math.log(N) + b * math.log(E))}


LAWS = (
    Law(
        id="moonlight_lr_bs",
        name="Moonlight: lr and batch size, tuned for AdamW and reused for Muon",
        summary=(
            "Predicts the optimal peak lr and batch size of AdamW (and scaled Muon) from compute."
        ),
        kind="learning_rate",
        formula="lr = c_lr * C**a; batch_tokens = c_bs * C**b",
        function=by_compute,
        inputs=(C_UNSTATED,),
        gives=("lr", "batch_tokens"),
        coefficients={"c_lr": 0.0127, "a": -0.057, "c_bs": 0.0065, "b": 0.4138},
        fitted={"n_params": (399e6, 1.5e9), "tokens": (8.9e9, 39e9), "tokens_per_param": (22, 26)},
        conditions={
            "optimizer": (
                "AdamW, weight decay 0.1; Muon with updates scaled by 0.2 * sqrt(max(rows, "
                "columns))"
            ),
            "sequences": "8192 tokens",
        },
        setup="AdamW baselines found by grid search.",
        source="Liu et al. 2025, arXiv:2502.16982v1, as quoted by a survey",
        caveats=("C is in raw FLOPs, while the loss law of the same paper uses PFLOP/s-days",),
        warnings=(
            (
                "The source does not say how C is counted. With 6ND, the law's lr is 3 to 6 % "
                "above the lr of its authors' own runs; counting attention over 8192 tokens "
                "and the output head may explain the difference (a guess)"
            ),
        ),
    ),
    Law(
        id="ling_moe_lr_bs",
        name="Ling: lr and batch size of mixture-of-experts models",
        summary="Predicts the optimal lr and batch size of mixtures of experts from compute.",
        kind="learning_rate",
        formula="lr = c_lr * C**a; batch_tokens = c_bs * C**b",
        function=by_compute,
        inputs=(
            Input(
                "C",
                "flops",
                (
                    "training FLOPs M * D, where M (FLOPs per token) counts active experts and no "
                    "embedding"
                ),
                "this law counts the FLOPs per token of the active experts only, not parameters",
            ),
        ),
        gives=("lr", "batch_tokens"),
        coefficients={"c_lr": 1.1576, "a": -0.1529, "c_bs": 0.0694, "b": 0.3644},
        fitted={
            "flops": (3e17, 3e20),
            "lr": (0.000488, 0.00195),
            "batch_tokens": (262144, 2097152),
        },
        conditions={
            "schedule": "WSD",
            "model": (
                "7.8 % of the experts active (4 of 64, and 1 shared), granularity 2; checked "
                "at 4.7 to 10.9 %"
            ),
        },
        setup=(
            "Fitted to the runs within 0.25 % of the lowest loss at each C. At large C the "
            "batch size is larger and lr a little lower than for dense models."
        ),
        source="Ling team 2025, arXiv:2507.17702, eq. 3",
        warnings=(
            (
                "This law was fitted on mixtures of experts with 7.8 % of the experts active, "
                "not on dense models"
            ),
            (
                "The paper defines M by one forward pass but calls M * D training compute, so "
                "C is uncertain by a factor of 3"
            ),
        ),
    ),
    Law(
        id="moonlight_table_refit",
        name="Moonlight's own runs, refitted with C = 6ND",
        summary="Predicts the optimal peak lr and batch size from compute counted as 6ND.",
        kind="learning_rate",
        formula="lr = c_lr * C**a; batch_tokens = c_bs * C**b",
        function=by_compute,
        inputs=(C_6ND,),
        gives=("lr", "batch_tokens"),
        coefficients={
            "c_lr": 0.00798107751152,
            "a": -0.047823418462,
            "c_bs": 0.242546544107,
            "b": 0.336884337879,
        },
        fitted={"flops": (2.1e19, 3.5e20)},
        conditions={
            "optimizer": "AdamW, weight decay 0.1; Muon scaled to it",
            "sequences": "8192 tokens",
        },
        setup=(
            "A log-log line fitted by scaletune through the 5 rows of the paper's table of "
            "runs. Use this law when C is counted as 6ND."
        ),
        source="Liu et al. 2025, arXiv:2502.16982, Table 2; fitted by scaletune",
    ),
    Law(
        id="jointmoe_lr",
        name="Joint MoE: lr from active parameters and number of experts",
        summary="Predicts the optimal peak lr from active parameters and number of experts.",
        kind="learning_rate",
        formula="lr = exp(c + a * log(N) + b * log(E))",
        function=by_experts,
        inputs=(N_ACTIVE, E),
        gives=("lr",),
        coefficients={"c": 8.39, "a": -0.81, "b": -0.25},
        fitted={"n_active": (1e7, 1e9), "n_experts": (1, 32)},
        conditions={
            "schedule": "warmup over 130e6 tokens, constant, linear decay over the last 20 %",
            "batch": "65536 tokens; 131072 from 0.5e9 tokens on, 262144 from 1e9 tokens on",
            "model": "Switch mixture of experts, top-1 routing",
            "data": "FineWeb-Edu, GPT-2 tokenizer",
        },
        setup=(
            "Least squares on log lr of the best grid points, with 1 and 8 experts; "
            "validated with 4 and 32 experts."
        ),
        source="Ludziejewski et al. 2025, arXiv:2502.05172, eq. 8",
        warnings=(
            (
                "The batch grew during training to 262144 tokens; the predicted lr belongs to "
                "that batch size"
            ),
        ),
        shown_at={"E": 8},
    ),
)
