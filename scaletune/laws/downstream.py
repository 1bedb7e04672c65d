"""Published laws of model capability: task error, pass rate and capability density."""

from __future__ import annotations

import math
from dataclasses import replace

from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import N_BODY, N_UNSTATED, L


def error_of_loss(L: float, *, eps: float, k: float, gam: float) -> dict[str, float]:
    """eps - k exp(-gam L)    arXiv:2403.08540, eq. 5."""
    return {"error": eps - k * math.exp(-gam * L)}


def pass_rate(N: float, *, c: float, alpha: float) -> dict[str, float]:
    """exp(-c N^-alpha)    arXiv:2310.03262."""
    return {"pass_rate": math.exp(-c * N**-alpha)}


def densing(t: float, rho0: float, N: float, *, A: float) -> dict[str, float]:
    """rho = rho0 e^(A t), doubling in ln 2 / A days    arXiv:2412.04315."""
    rho = rho0 * math.exp(A * t)
    return {"density": rho, "doubling_days": math.log(2) / A, "n_params_effective": rho * N}


C4_46 = Law(
    id="gadre_err_c4_46",
    name="Over-training: task error from loss, trained on C4, 46 tasks",
    summary="Predicts the mean error on 46 tasks from the loss, for models trained on C4.",
    kind="downstream",
    formula="error = eps - k * exp(-gam * L)",
    function=error_of_loss,
    inputs=(replace(L, means="loss on C4, nats per token"),),
    gives=("error",),
    coefficients={"eps": 0.758949444305, "k": 1.28851604004, "gam": 0.972164292974},
    fitted={"loss": (2.4, 4.8)},
    conditions={"data": "C4, GPT-NeoX tokenizer", "tasks": "46, mean top-1 error"},
    setup=(
        "Fitted to 6 points: those of the loss law, and 1.4e9 parameters at 20 tokens "
        "per parameter."
    ),
    source="Gadre et al. 2024, arXiv:2403.08540, eq. 5; refitted from its released code and data",
    caveats=(
        (
            "Random guessing gives an error of 0.75 on average, a little below eps; the "
            "law is not informative near that value"
        ),
    ),
)
C4_17 = replace(
    C4_46,
    id="gadre_err_c4_17",
    name="Over-training: task error from loss, trained on C4, 17 tasks",
    summary="Predicts the mean error on 17 tasks from the loss, for models trained on C4.",
    coefficients={"eps": 0.849742014717, "k": 2.07890716243, "gam": 0.756120881771},
    conditions=C4_46.conditions | {"tasks": "17, mean top-1 error"},
    caveats=(
        (
            "Random guessing gives an error of 0.8088 on average, below eps; the law is "
            "not informative near that value"
        ),
    ),
)


def _trained_on(law: Law, data: str, short: str, eps: float, k: float, gam: float) -> Law:
    """The same law for models trained on other data."""
    return replace(
        law,
        id=law.id.replace("c4", short),
        name=law.name.replace("C4", data),
        summary=law.summary.replace("trained on C4", f"trained on {data}"),
        coefficients={"eps": eps, "k": k, "gam": gam},
        conditions=law.conditions | {"data": f"{data}, loss on C4; GPT-NeoX tokenizer"},
    )


LAWS = (
    C4_46,
    C4_17,
    _trained_on(C4_46, "RedPajama", "rpj", 0.760849510031, 1.32289888735, 0.890707848283),
    _trained_on(C4_17, "RedPajama", "rpj", 0.856991927614, 2.20649009146, 0.714590553049),
    _trained_on(C4_46, "RefinedWeb", "rw", 0.767679213148, 1.12807422515, 0.821522760295),
    _trained_on(C4_17, "RefinedWeb", "rw", 0.865279537457, 2.21481484361, 0.707048501307),
    Law(
        id="passuntil",
        name="PassUntil: pass rate from model size",
        summary="Predicts the pass rate on a task from model size.",
        kind="downstream",
        formula="pass_rate = exp(-c * N**-alpha)",
        function=pass_rate,
        inputs=(N_BODY,),
        gives=("pass_rate",),
        unknown={"c": "prefactor of the task", "alpha": "exponent of the task"},
        fitted={"n_params": (30e6, 2.4e9)},
        setup=(
            "log(-log(pass_rate)) is linear in log N. The pass rate is measured by "
            "sampling until one sample passes. The HumanEval score of a model with 2.4e9 "
            "parameters was predicted within 0.05 %."
        ),
        shown_at={"c": 10, "alpha": 0.1},
        source="Hu et al. 2023, arXiv:2310.03262",
        confirmed=False,
        unconfirmed=("the functional form",),
    ),
    Law(
        id="densing",
        name="Densing law: capability per parameter over time",
        summary="Predicts the growth of capability per parameter of open models over time.",
        kind="density",
        formula=(
            "density = rho0 * exp(A * t); doubling_days = log(2) / A; n_params_effective = "
            "density * N"
        ),
        function=densing,
        inputs=(
            Input("t", "days", "days since the reference model"),
            Input(
                "rho0",
                "base_density",
                "density at the start: effective over actual parameters",
                default=1.0,
            ),
            N_UNSTATED,
        ),
        gives=("density", "doubling_days", "n_params_effective"),
        coefficients={"A": 0.007},
        conditions={"models": "open base models, February 2023 to November 2024"},
        setup=(
            "Fitted to the frontier of density, R2 near 0.93. The effective parameters are "
            "those of a reference model family with the same score."
        ),
        source="Xiao et al. 2024, arXiv:2412.04315",
        caveats=(
            "The rounded coefficient gives 99 days, 3.25 months; the paper says about 3.3 months",
        ),
    ),
)
