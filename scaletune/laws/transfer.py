"""Published rules that transfer hyperparameters to another batch size or token horizon."""

from __future__ import annotations

import math

from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import B, D

BASE_LR = Input("lr1", "base_lr", "lr of the tuned run")
BASE_D = Input("D1", "base_tokens", "tokens of the tuned run")
BASE_B = Input("B1", "base_batch_tokens", "batch size of the tuned run, tokens per step")
BASE_WD = Input("wd1", "base_weight_decay", "weight decay of the tuned run, PyTorch's lambda")
NOISE = Input("B_noise", "noise_batch_tokens", "gradient noise scale, tokens")
PEAK = Input("lr_max", "lr_at_noise", "highest optimal lr over batch sizes")


def horizon(lr1: float, D1: float, D: float, *, b: float) -> dict[str, float]:
    """lr = lr1 (D/D1)^-b, at a fixed batch    arXiv:2409.19913."""
    return {"lr": lr1 * (D / D1) ** -b}


def saturating(lr_max: float, B: float, B_noise: float) -> dict[str, float]:
    """lr = lr_max / (1 + B_noise/B)    arXiv:1812.06162, eq. 2.6."""
    return {"lr": lr_max / (1 + B_noise / B)}


def surging(lr_max: float, B: float, B_noise: float) -> dict[str, float]:
    """lr = 2 lr_max / (sqrt(B_noise/B) + sqrt(B/B_noise))    arXiv:2405.14578."""
    return {"lr": 2 * lr_max / (math.sqrt(B_noise / B) + math.sqrt(B / B_noise))}


def square_root(B1: float, B: float, lr1: float, wd1: float) -> dict[str, float]:
    """lr and lambda times sqrt(k), decoupled decay times k, where k = B/B1

    arXiv:2205.10287, arXiv:2512.22382.
    """
    k = B / B1
    return {
        "lr": lr1 * math.sqrt(k),
        "weight_decay": wd1 * math.sqrt(k),
        "weight_decay_decoupled": wd1 * k,
    }


def betas(B1: float, B: float, b1: float, b2: float) -> dict[str, float]:
    """1 - beta times k = B/B1, or beta^k    arXiv:2205.10287."""
    k = B / B1
    return {"beta1": 1 - k * (1 - b1), "beta2": 1 - k * (1 - b2), "beta2_half_life": b2**k}


def nanochat(D: float, D1: float, B1: float, wd1: float, *, p: float) -> dict[str, float]:
    """B = B1 (D/D1)^p, lr times sqrt(B/B1), lambda times sqrt(B/B1) D1/D.

    B / (lr lambda D) is constant.
    """
    batch = B1 * (D / D1) ** p
    factor = math.sqrt(batch / B1)
    return {"batch_tokens": batch, "lr_factor": factor, "weight_decay": wd1 * factor * D1 / D}


LAWS = (
    Law(
        id="bjorck_horizon_rule",
        name="Björck et al.: lr at another token horizon",
        summary=(
            "Transfers the lr of a tuned run to another token horizon at the same batch size."
        ),
        kind="transfer",
        formula="lr = lr1 * (D / D1)**-b",
        function=horizon,
        inputs=(BASE_LR, BASE_D, D),
        gives=("lr",),
        coefficients={"b": 0.32},
        intervals={"b": (0.3, 0.7)},
        level=(
            "spread over models and setups, the larger for small models; not a confidence interval"
        ),
        conditions={"model": "the same", "batch": "the same"},
        setup="One batch size throughout. The SDE argument of `completedp` would give b = 0.5.",
        source="Björck et al. 2024, arXiv:2409.19913",
        warnings=(
            (
                "The rule holds at the batch size of the tuned run; if the batch size changes "
                "too, apply a batch-size rule on top"
            ),
        ),
        shown_at={"lr1": 0.001, "D1": 25e9, "D": 800e9},
    ),
    Law(
        id="mccandlish_lr",
        name="McCandlish et al.: optimal lr of SGD from the batch size",
        summary="Computes the optimal lr of SGD from batch size and gradient noise scale.",
        kind="transfer",
        formula="lr = lr_max / (1 + B_noise / B)",
        function=saturating,
        inputs=(PEAK, B, NOISE),
        gives=("lr",),
        conditions={"optimizer": "SGD"},
        setup=(
            "Linear in B well below the noise scale tr(H S) / (G' H G), constant above it. "
            "tr(S) / |G|**2 is its simple estimate."
        ),
        source="McCandlish et al. 2018, arXiv:1812.06162, eq. 2.6",
        caveats=("For SGD only; for Adam use surge_lr or adam_sde_batch",),
    ),
    Law(
        id="surge_lr",
        name="Surge: optimal lr of Adam from the batch size",
        summary=(
            "Computes the optimal lr of Adam from batch size and gradient noise scale; the "
            "lr rises, then falls."
        ),
        kind="transfer",
        formula="lr = 2 * lr_max / (sqrt(B_noise / B) + sqrt(B / B_noise))",
        function=surging,
        inputs=(PEAK, B, NOISE),
        gives=("lr",),
        conditions={"optimizer": "Adam and similar optimizers"},
        setup="Grows as sqrt(B) below B_noise, is lr_max at B_noise, and falls above it.",
        source="Li et al. 2024, arXiv:2405.14578",
        caveats=(
            "The formula is also quoted with nested roots, which is a different function",
            (
                "Hunyuan-Large applies it per expert, with B / n tokens for n routed experts; "
                "its factor 0.31 at n = 16 corresponds to B near 0.26 B_noise"
            ),
        ),
    ),
    Law(
        id="adam_sde_batch",
        name="Square-root rule of Adam, with weight decay",
        summary="Transfers lr and weight decay of a tuned run to another batch size.",
        kind="transfer",
        formula=(
            "k = B / B1; lr = lr1 * sqrt(k); weight_decay = wd1 * sqrt(k); "
            "weight_decay_decoupled = wd1 * k"
        ),
        function=square_root,
        inputs=(BASE_B, B, BASE_LR, BASE_WD),
        gives=("lr", "weight_decay", "weight_decay_decoupled"),
        fitted={"batch_ratio": (0.125, 4)},
        conditions={
            "batch": "0.125 to 4 times the tuned batch size, below the critical batch size",
            "tokens": "the same, so 1/k of the steps",
        },
        setup="Keeps the stochastic differential equation of the run unchanged.",
        source=(
            "Malladi et al. 2022, arXiv:2205.10287; weight decay by Mlodozeniec et al., "
            "arXiv:2512.22382"
        ),
        caveats=(
            (
                "weight_decay is PyTorch's, multiplied by lr; weight_decay_decoupled is "
                "Loshchilov and Hutter's, not multiplied by lr"
            ),
            "Scale epsilon too where it is not negligible; for the betas see adam_batch_betas",
        ),
        shown_at={"B": 2097152},
    ),
    Law(
        id="adam_batch_betas",
        name="Betas of Adam from the batch size",
        summary="Transfers Adam's betas of a tuned run to another batch size.",
        kind="transfer",
        formula=(
            "k = B / B1; beta1 = 1 - k * (1 - b1); beta2 = 1 - k * (1 - b2); "
            "beta2_half_life = b2**k"
        ),
        function=betas,
        inputs=(
            BASE_B,
            B,
            Input("b1", "base_beta1", "beta1 of the tuned run"),
            Input("b2", "base_beta2", "beta2 of the tuned run"),
        ),
        gives=("beta1", "beta2", "beta2_half_life"),
        fitted={"batch_ratio": (0.125, 4)},
        setup=(
            "Two rules that agree to first order: scale 1 - beta, or keep the half-life in tokens."
        ),
        source="Malladi et al. 2022, arXiv:2205.10287 (scaling 1 - beta)",
        confirmed=False,
        unconfirmed=("both rules",),
        shown_at={"B": 2097152},
    ),
    Law(
        id="nanochat_recipe",
        name="nanochat: batch size, lr and weight decay relative to a tuned run",
        summary=(
            "Transfers batch size, lr and weight decay of a tuned run to another token horizon."
        ),
        kind="transfer",
        formula=(
            "batch_tokens = B1 * (D / D1)**p; lr_factor = sqrt(batch_tokens / B1); "
            "weight_decay = wd1 * lr_factor * D1 / D"
        ),
        function=nanochat,
        inputs=(D, BASE_D, BASE_B, BASE_WD),
        gives=("batch_tokens", "lr_factor", "weight_decay"),
        coefficients={"p": 0.383},
        fitted={"depth": (8, 50)},
        conditions={
            "optimizer": "Muon on matrices, AdamW on the rest",
            "batch": "rounded to a power of two afterwards",
        },
        setup=(
            "Combines the exponent of Power Lines, the square-root rule, and a constant B "
            "/ (lr weight_decay D). Its author calls the use with Muon an assumption."
        ),
        source="karpathy/nanochat, scripts/base_train.py, 2026; exponent of arXiv:2505.13738",
        caveats=("The parameter count includes matrices and output head, not the input embedding",),
    ),
)
