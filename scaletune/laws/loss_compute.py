"""Published laws of the loss as a function of compute alone."""

from __future__ import annotations

from dataclasses import replace

from scaletune.laws.entry import Law
from scaletune.laws.loss_size import KAPLAN_RUNS
from scaletune.laws.symbols import C_PF, C_UNSTATED, PF_DAY


def kaplan(
    C: float, *, C_cmin: float, alpha_cmin: float, C_c: float, alpha_c: float
) -> dict[str, float]:
    """(C_c/C)^alpha_c for both batch-size rules, C in PF-days    arXiv:2001.08361, eq. 1.3."""
    days = C / PF_DAY
    return {"loss": (C_cmin / days) ** alpha_cmin, "loss_fixed_batch": (C_c / days) ** alpha_c}


def power(C: float, *, k: float, a: float) -> dict[str, float]:
    """L = k C^a, C in PF-days    arXiv:2502.16982, Table 3."""
    return {"loss": k * (C / PF_DAY) ** a}


def muon_ratio(C: float, *, k: float, a: float, k_muon: float, a_muon: float) -> dict[str, float]:
    """Compute of Muon over compute of AdamW at the same loss    arXiv:2502.16982, Table 3."""
    loss = power(C, k=k, a=a)["loss"]
    return {"loss": loss, "compute_ratio": (k_muon / loss) ** (-1 / a_muon) / (C / PF_DAY)}


ADAMW = Law(
    id="moonlight_loss_adamw",
    name="Moonlight: loss over compute with AdamW",
    summary="Predicts the loss of compute-optimal AdamW training from compute.",
    kind="loss_compute",
    formula="loss = k * (C / 8.64e19)**a",
    function=power,
    inputs=(C_UNSTATED,),
    gives=("loss",),
    coefficients={"k": 2.608, "a": -0.054},
    fitted={"flops": (0.2 * PF_DAY, 5 * PF_DAY)},
    conditions={
        "optimizer": "AdamW",
        "sequences": "8192 tokens",
        "tokens per parameter": "22 to 26",
    },
    setup="Fitted to 5 model sizes, each at its compute optimum.",
    source="Liu et al. 2025, arXiv:2502.16982, Table 3",
    caveats=(
        (
            "C enters in PF-days, while moonlight_lr_bs takes FLOPs: with raw FLOPs the "
            "loss would be 0.25"
        ),
    ),
)

LAWS = (
    Law(
        id="kaplan_L_Cmin",
        name="Kaplan et al.: loss over compute",
        summary="Predicts the loss from compute, for small batches and for a fixed batch size.",
        kind="loss_compute",
        formula=(
            "loss = (C_cmin / (C / 8.64e19))**alpha_cmin; loss_fixed_batch = (C_c / (C / "
            "8.64e19))**alpha_c"
        ),
        function=kaplan,
        inputs=(C_PF,),
        gives=("loss", "loss_fixed_batch"),
        coefficients={"C_cmin": 3.1e8, "alpha_cmin": 0.05, "C_c": 1.6e7, "alpha_c": 0.057},
        fitted={"n_params": (768, 1.5e9), "tokens": (22e6, 23e9)},
        conditions=KAPLAN_RUNS,
        setup=(
            "`loss` is for batch sizes far below the critical one, `loss_fixed_batch` for "
            "524288 tokens per step. Both are at the best model size."
        ),
        source="Kaplan et al. 2020, arXiv:2001.08361, eq. 1.3",
        caveats=("C_cmin and C_c are in PF-days, not FLOPs",),
        shown_at={"C": PF_DAY},
    ),
    replace(
        ADAMW,
        id="moonlight_loss_muon",
        name="Moonlight: loss over compute with Muon",
        summary="Predicts the loss of compute-optimal Muon training from compute.",
        coefficients={"k": 2.506, "a": -0.052},
        conditions=ADAMW.conditions | {"optimizer": "Muon"},
    ),
    ADAMW,
    replace(
        ADAMW,
        id="moonlight_muon_ratio",
        name="Moonlight: compute that Muon needs for AdamW's loss",
        summary="Predicts the share of AdamW's compute that Muon needs for the same loss.",
        formula=(
            "loss = k * (C / 8.64e19)**a; compute_ratio = (k_muon / loss)**(-1 / a_muon) / "
            "(C / 8.64e19)"
        ),
        function=muon_ratio,
        gives=("loss", "compute_ratio"),
        coefficients={"k": 2.608, "a": -0.054, "k_muon": 2.506, "a_muon": -0.052},
        conditions={},
        setup=(
            "The compute at which moonlight_loss_muon reaches the loss of "
            "moonlight_loss_adamw at C."
        ),
        caveats=(
            (
                "The rounded coefficients give a ratio of 0.44 to 0.49 over the range; the "
                "paper's headline number is 0.52"
            ),
        ),
        shown_at={"C": PF_DAY},
    ),
)
