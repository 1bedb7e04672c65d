"""Published laws of the loss of over-trained models, from compute and tokens per parameter."""

from __future__ import annotations

from dataclasses import replace

from scaletune.laws.entry import Law
from scaletune.laws.symbols import N_TOTAL, D


def gadre(N: float, D: float, *, E0: float, a: float, b: float, eta: float) -> dict[str, float]:
    """L = E0 + (a M^eta + b M^-eta) C^-eta, with M = D/N and C = 6ND    arXiv:2403.08540."""
    M, C = D / N, 6 * N * D
    return {"loss": E0 + (a * M**eta + b * M**-eta) * C**-eta}


C4 = Law(
    id="gadre_loss_c4",
    name="Over-training: loss, trained and evaluated on C4",
    summary="Predicts the loss of over-trained models on C4 from model size and tokens.",
    kind="loss",
    formula="M = D / N; C = 6 * N * D; loss = E0 + (a * M**eta + b * M**-eta) * C**-eta",
    function=gadre,
    inputs=(N_TOTAL, D),
    gives=("loss",),
    coefficients={
        "E0": 1.50826054441,
        "a": 141.277255297,
        "b": 189.515521496,
        "eta": 0.121236119638,
    },
    fitted={"n_params_total": (10.6e6, 410e6), "tokens_per_param": (5, 640)},
    validated={"n_params_total": 6.9e9},
    conditions={
        "schedule": "cosine, 2000 steps of warmup",
        "optimizer": (
            "AdamW, lr 3e-3, weight decay 0.033, 512 sequences of 2048 tokens (varies with size)"
        ),
        "data": "C4, GPT-NeoX tokenizer",
    },
    setup=(
        "Fitted to 5 points: four small models at 20 tokens per parameter, the "
        "smallest (11e6) also at 320. Validated on 6.9e9 parameters."
    ),
    source="Gadre et al. 2024, arXiv:2403.08540; refitted from its released code and data",
    caveats=(
        (
            "The released code fits A * N**-(2 * eta) + B * 6**-eta * D**-(2 * eta) above "
            "E0: a here is A * 6**eta, and b is B"
        ),
        "eta is half the exponent of N and of D",
        (
            "N includes both embeddings; the released records' parameter count without "
            "embedding leaves out only one of them"
        ),
        (
            "The level depends on the evaluation set: on other sets the coefficients "
            "differ by a factor of several"
        ),
    ),
)

LAWS = (
    C4,
    replace(
        C4,
        id="gadre_loss_rpj",
        name="Over-training: loss, trained on RedPajama, evaluated on C4",
        summary=(
            "Predicts the C4 loss of over-trained models trained on RedPajama from model "
            "size and tokens."
        ),
        coefficients={
            "E0": 1.83664840874,
            "a": 212.236121679,
            "b": 366.687197962,
            "eta": 0.136425353089,
        },
        conditions=C4.conditions | {"data": "RedPajama, evaluated on C4; GPT-NeoX tokenizer"},
        setup=(
            "Fitted to 5 points: four small models at 20 tokens per parameter, the "
            "smallest (11e6) also at 320. Validated on 6.9e9 parameters (error 0.73 %) and "
            "on 1.4e9 at 640 tokens per parameter (error 0.71 %)."
        ),
    ),
    replace(
        C4,
        id="gadre_loss_rw",
        name="Over-training: loss, trained on RefinedWeb, evaluated on C4",
        summary=(
            "Predicts the C4 loss of over-trained models trained on RefinedWeb from model "
            "size and tokens."
        ),
        coefficients={
            "E0": 1.73446208933,
            "a": 157.11628411,
            "b": 246.206686243,
            "eta": 0.127197422316,
        },
        conditions=C4.conditions | {"data": "RefinedWeb, evaluated on C4; GPT-NeoX tokenizer"},
    ),
)
