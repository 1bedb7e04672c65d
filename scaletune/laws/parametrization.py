"""Published rules that scale hyperparameters with width, depth, batch size and duration.

`scaletune.rules` applies them tensor by tensor; this module contains only the factors.
"""

from __future__ import annotations

import math

from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import B, D
from scaletune.laws.transfer import BASE_B, BASE_D, BASE_LR, BASE_WD

W = Input("w", "width", "width, d_model")
W1 = Input("w1", "base_width", "width of the tuned run")
DEPTH, DEPTH1 = (
    Input("depth", "depth", "layers"),
    Input("depth1", "base_depth", "layers of the tuned run"),
)
VARIANCE1 = Input("var1", "base_variance", "initial variance of a hidden weight in the tuned run")


def by_layer(lr1: float, w: float, w1: float, *, x_h: float, x_r: float) -> dict[str, float]:
    """lr times (w/w1)^-x for hidden matrices and the output head    arXiv:2407.05872."""
    return {
        "lr_hidden": lr1 * (w / w1) ** -x_h,
        "lr_embedding": lr1,
        "lr_readout": lr1 * (w / w1) ** -x_r,
    }


def mup(
    w: float, w1: float, lr1: float, var1: float, d_head: float, wd1: float
) -> dict[str, float]:
    """Factors of muP with Adam for the width ratio m = w/w1    arXiv:2203.03466.

    Hidden lr and variance / m, weight decay * m, logits / m, attention / d_head.
    """
    m = w / w1
    return {
        "lr_hidden": lr1 / m,
        "variance_hidden": var1 / m,
        "lr_embedding": lr1,
        "logit_factor": 1 / m,
        "attention_scale": 1 / d_head,
        "weight_decay_hidden": wd1 * m,
    }


def completep(
    w: float,
    depth: float,
    w1: float,
    depth1: float,
    lr1: float,
    eps1: float,
    wd1: float,
    var1: float,
    *,
    alpha: float,
) -> dict[str, float]:
    """Factors of width m = w/w1 and depth r = depth/depth1    arXiv:2505.01618.

    Residual blocks r^-alpha, their lr r^(alpha-1), epsilon r^-alpha / m.
    """
    m, r = w / w1, depth / depth1
    return {
        "residual_factor": r**-alpha,
        "lr_hidden": lr1 / m * r ** (alpha - 1),
        "lr_vectors": lr1 * r ** (alpha - 1),
        "eps_hidden": eps1 / m * r**-alpha,
        "weight_decay_hidden": wd1 * m,
        "variance_hidden": var1 / m,
    }


def completedp(
    B: float, B1: float, D: float, D1: float, lr1: float, wd1: float
) -> dict[str, float]:
    """lr and lambda times sqrt((B/B1) / (D/D1))    arXiv:2512.22382."""
    factor = math.sqrt(B / B1 / (D / D1))
    return {"lr_factor": factor, "lr": lr1 * factor, "weight_decay": wd1 * factor}


def embedding_ratio(w: float, *, k: float, p: float) -> dict[str, float]:
    """lr of the embedding over lr of hidden matrices is k w^p    arXiv:2506.15025."""
    return {"lr_ratio": k * w**p}


LAWS = (
    Law(
        id="everett_width",
        name="Everett et al.: lr per layer over width, standard parametrization and Adam",
        summary="Scales the lr per layer with width in standard parametrization.",
        kind="parametrization",
        formula=(
            "lr_hidden = lr1 * (w / w1)**-x_h; lr_embedding = lr1; lr_readout = lr1 * (w / "
            "w1)**-x_r"
        ),
        function=by_layer,
        inputs=(BASE_LR, W, W1),
        gives=("lr_hidden", "lr_embedding", "lr_readout"),
        coefficients={"x_h": 1.0, "x_r": 1.0},
        fitted={"n_params": (0.0, 26.8e9)},
        conditions={"optimizer": "Adam; SGD and Adafactor have other exponents"},
        setup=(
            "The exponents assume full alignment; without alignment both are 0.5. With "
            "additional constants tuned per layer, this parametrization was better than "
            "muP."
        ),
        source="Everett et al. 2024, arXiv:2407.05872",
        caveats=("Adam's epsilon must shrink with width, or Adam must be replaced by Adam-atan2",),
        confirmed=False,
        unconfirmed=(
            (
                "the exponents (they also follow from an argument on root mean squares; the "
                "constants per layer are not in the catalogue)"
            ),
        ),
    ),
    Law(
        id="mup_adam",
        name="muP for AdamW over width",
        summary="Scales lr, initial variance, logits and weight decay with width by muP.",
        kind="parametrization",
        formula=(
            "m = w / w1; lr_hidden = lr1 / m; variance_hidden = var1 / m; lr_embedding = "
            "lr1; logit_factor = 1 / m; attention_scale = 1 / d_head; weight_decay_hidden "
            "= wd1 * m"
        ),
        function=mup,
        inputs=(
            W,
            W1,
            BASE_LR,
            VARIANCE1,
            Input("d_head", "head_dim", "width of one attention head"),
            BASE_WD,
        ),
        gives=(
            "lr_hidden",
            "variance_hidden",
            "lr_embedding",
            "logit_factor",
            "attention_scale",
            "weight_decay_hidden",
        ),
        setup="weight_decay_hidden keeps lr * weight_decay constant.",
        source="Yang et al. 2022, arXiv:2203.03466; microsoft/mup",
        caveats=(
            (
                "In microsoft/mup, weight decay is scaled only with decoupled_wd=False, its "
                "default; its example divides attention by d_head / 8"
            ),
        ),
    ),
    Law(
        id="completep",
        name="CompleteP over width and depth",
        summary="Scales lr, residual branches, epsilon and weight decay with width and depth.",
        kind="parametrization",
        formula=(
            "m = w / w1; r = depth / depth1; residual_factor = r**-alpha; lr_hidden = lr1 "
            "/ m * r**(alpha - 1); lr_vectors = lr1 * r**(alpha - 1); eps_hidden = eps1 / "
            "m * r**-alpha; weight_decay_hidden = wd1 * m; variance_hidden = var1 / m"
        ),
        function=completep,
        inputs=(
            W,
            DEPTH,
            W1,
            DEPTH1,
            BASE_LR,
            Input("eps1", "base_eps", "Adam's epsilon of the tuned run"),
            BASE_WD,
            VARIANCE1,
        ),
        gives=(
            "residual_factor",
            "lr_hidden",
            "lr_vectors",
            "eps_hidden",
            "weight_decay_hidden",
            "variance_hidden",
        ),
        coefficients={"alpha": 1.0},
        fitted={"n_params": (50e6, 1.5e9)},
        setup="alpha = 1 is CompleteP, alpha = 0.5 is depth-muP.",
        source="Dey et al. 2025, arXiv:2505.01618",
        caveats=(
            (
                "With alpha = 1, lr does not depend on depth; with alpha = 0.5, lr scales as "
                "depth**-0.5"
            ),
            "Public reference code uses one epsilon for all tensors, including the embedding",
        ),
    ),
    Law(
        id="completedp",
        name="Complete(d)P over batch size and duration",
        summary="Scales lr and weight decay with batch size and training tokens.",
        kind="parametrization",
        formula=(
            "lr_factor = sqrt(B / B1 / (D / D1)); lr = lr1 * lr_factor; weight_decay = wd1 "
            "* lr_factor"
        ),
        function=completedp,
        inputs=(B, BASE_B, D, BASE_D, BASE_LR, BASE_WD),
        gives=("lr_factor", "lr", "weight_decay"),
        fitted={
            "n_params": (50e6, 7.2e9),
            "width": (128, 2048),
            "depth": (4, 128),
            "batch_ratio": (0.125, 4),
        },
        conditions={"schedule": "cosine", "data": "RedPajama"},
        setup=(
            "These factors multiply CompleteP's factors of width and depth. At a fixed "
            "batch size, lr scales as 1 over the square root of the steps."
        ),
        source="Mlodozeniec et al. 2025, arXiv:2512.22382",
        caveats=(
            "The epsilon of a QK norm shared over heads scales by the inverse factor",
            (
                "The exponent over duration is -0.5; bjorck_lr has -0.32, and its authors saw "
                "0.3 to 0.7"
            ),
        ),
    ),
    Law(
        id="embedding_lr_vocab",
        name="Hayou & Liu: lr of the embedding over lr of hidden matrices, large vocabularies",
        summary=(
            "Predicts the ratio of embedding lr to hidden lr from width, for large vocabularies."
        ),
        kind="parametrization",
        formula="lr_ratio = k * w**p",
        function=embedding_ratio,
        inputs=(W,),
        gives=("lr_ratio",),
        coefficients={"p": 0.5},
        unknown={"k": "ratio at width 1, fitted on a proxy"},
        conditions={"vocabulary": "far larger than the width"},
        setup=(
            "muP has p = 1, which assumes that the vocabulary stays constant while the width grows."
        ),
        shown_at={"w": 4096, "k": 1},
        source="Hayou & Liu 2025, arXiv:2506.15025",
    ),
)
