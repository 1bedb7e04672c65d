"""Published laws of AdamW's weight decay (PyTorch's lambda, which is multiplied by lr)."""

from __future__ import annotations

from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import N_UNSTATED, B, D

LR = Input("lr", "lr", "peak lr of the weight, after any width factor")


def timescale(B: float, lr: float, wd: float, D: float, tau_target: float) -> dict[str, float]:
    """tau = B / (lr lambda D); lambda for a target tau    arXiv:2405.13698."""
    return {"timescale": B / (lr * wd * D), "weight_decay": B / (lr * tau_target * D)}


def powerlines(N: float, B: float, D: float, lr: float, *, c: float, m: float) -> dict[str, float]:
    """tau = c (D/N)^m; lambda = B / (lr tau D)    arXiv:2505.13738."""
    tau = c * (D / N) ** m
    return {"timescale": tau, "weight_decay": B / (lr * tau * D)}


def multiplied(wd: float, *, factor: float) -> dict[str, float]:
    """lambda times `factor`    arXiv:2509.14786."""
    return {"weight_decay": wd * factor}


LAWS = (
    Law(
        id="adamw_timescale",
        name="AdamW as an average of updates: timescale",
        summary=(
            "Computes AdamW's averaging timescale, and the weight decay for a target timescale."
        ),
        kind="weight_decay",
        formula="timescale = B / (lr * wd * D); weight_decay = B / (lr * tau_target * D)",
        function=timescale,
        inputs=(
            B,
            LR,
            Input("wd", "base_weight_decay", "weight decay in use, PyTorch's lambda"),
            D,
            Input("tau_target", "timescale", "target timescale, as a share of the run"),
        ),
        gives=("timescale", "weight_decay"),
        setup=(
            "The weights are an average of updates over 1 / (lr * wd) steps. Over widths, "
            "muP's lr / m requires wd * m."
        ),
        source="Wang & Aitchison 2024, arXiv:2405.13698",
        caveats=(
            (
                "With many epochs the timescale is counted in epochs. For language models "
                "trained for one epoch the optimal timescale is not constant: see "
                "powerlines_tau"
            ),
            "If weight decay is not multiplied by lr, lr drops out of the product",
        ),
        shown_at={"B": 1e6, "D": 1e11},
    ),
    Law(
        id="powerlines_tau",
        name="Power Lines: optimal timescale from tokens per parameter",
        summary=(
            "Predicts the optimal averaging timescale and weight decay from model size, "
            "tokens, batch size and lr."
        ),
        kind="weight_decay",
        formula="timescale = c * (D / N)**m; weight_decay = B / (lr * timescale * D)",
        function=powerlines,
        inputs=(N_UNSTATED, B, D, LR),
        gives=("timescale", "weight_decay"),
        coefficients={"c": 1.084, "m": -0.527},
        intervals={"m": (-0.529, -0.507)},
        level="10 to 90 % bootstrap",
        fitted={"tokens_per_param": (20, 1000), "n_params": (111e6, 3.3e9)},
        conditions={
            "schedule": "10 % warmup, then linear to zero",
            "parametrization": "muP",
            "data": "SlimPajama",
            "sequences": "2048 tokens",
        },
        setup=(
            "R2 is 0.975. Weight decay grows with the batch size up to the critical batch size."
        ),
        source="Bergsma et al. 2025, arXiv:2505.13738",
        confirmed=False,
        unconfirmed=(
            (
                "c = 1.084 and the last digit of m = -0.527 (at 20 tokens per parameter they "
                "give 0.22; about 0.21 was measured)"
            ),
        ),
    ),
    Law(
        id="wd_data_constrained",
        name="Weight decay for data that is repeated many times",
        summary="Predicts the optimal weight decay when data is repeated many times.",
        kind="weight_decay",
        formula="weight_decay = wd * factor",
        function=multiplied,
        inputs=(
            Input("wd", "base_weight_decay", "weight decay usual for one epoch, 0.1", default=0.1),
        ),
        gives=("weight_decay",),
        coefficients={"factor": 30.0},
        fitted={"tokens": (2e8, 1.6e9), "n_params": (150e6, 1.4e9)},
        conditions={"data": "DCLM"},
        setup=(
            "Weight decay, lr and epochs are tuned in turn; the best weight decays were "
            "1.6 to 3.2. Members of an ensemble use twice the epochs and half the weight "
            "decay."
        ),
        source="Kim et al. 2025, arXiv:2509.14786",
        caveats=(
            "A rule of thumb for repeated data, not for one epoch",
            "The token counts are unique tokens",
        ),
    ),
)
