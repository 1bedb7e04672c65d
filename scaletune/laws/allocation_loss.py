"""Published compute-optimal allocations that follow from a loss law."""

from __future__ import annotations

from scaletune.laws.entry import Input, Law
from scaletune.laws.loss import BESIROGLU, HOFFMANN, chinchilla
from scaletune.laws.moe import JOINT, joint_terms
from scaletune.laws.symbols import C_6ND_TOTAL, N_UNSTATED, D, E


def frontier(
    C: float, *, E0: float, A: float, B: float, alpha: float, beta: float
) -> dict[str, float]:
    """N = G (C/6)^a, D = (C/6)^(1-a) / G    arXiv:2203.15556, eq. 4.

    G = (alpha A / (beta B))^(1/(alpha+beta)), a = beta/(alpha+beta).
    """
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    a = beta / (alpha + beta)
    N, D = G * (C / 6) ** a, (C / 6) ** (1 - a) / G
    return {"n_params_opt": N, "tokens_opt": D, "tokens_per_param": D / N} | chinchilla(
        N, D, E0=E0, A=A, B=B, alpha=alpha, beta=beta
    )


def ratio(C: float, *, A: float, B: float, alpha: float, beta: float, a: float) -> dict[str, float]:
    """D/N = (C/6)^(1-2a) / G^2 with the printed `a`    the notebook of arXiv:2404.10102."""
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    return {"tokens_per_param": (C / 6) ** (1 - 2 * a) / G**2}


def joint_frontier(C: float, E: float, **coefficients: float) -> dict[str, float]:
    """`frontier` of m N^mu + n D^nu    arXiv:2502.05172, eq. 7 with corrected signs."""
    m, mu, n, nu = joint_terms(E, **coefficients)
    best = frontier(C, E0=coefficients["c"], A=m, B=n, alpha=-mu, beta=-nu)
    return {name: best[name] for name in ("n_params_opt", "tokens_opt", "loss")}


def wedge(N: float, D: float, D_inf: float) -> dict[str, float]:
    """The optimality condition and the FLOPs of training and inference    arXiv:2401.00448.

    alpha A N^-alpha / (beta B D^-beta) = 1 + D_inf/(3D); FLOPs 6ND + 2 N D_inf.
    """
    return {"elasticity_ratio": 1 + D_inf / (3 * D), "flops": 6 * N * D + 2 * N * D_inf}


LAWS = (
    Law(
        id="besiroglu_alloc",
        name="Chinchilla, approach 3 refitted by Epoch AI: allocation",
        summary=(
            "Predicts the compute-optimal model size, tokens and loss from compute, by the "
            "law `besiroglu`."
        ),
        kind="allocation",
        formula=(
            "G = (alpha * A / (beta * B))**(1 / (alpha + beta)); a = beta / (alpha + "
            "beta); n_params_opt = G * (C / 6)**a; tokens_opt = (C / 6)**(1 - a) / G; "
            "tokens_per_param = tokens_opt / n_params_opt; loss = E0 + A * "
            "n_params_opt**-alpha + B * tokens_opt**-beta"
        ),
        function=frontier,
        inputs=(C_6ND_TOTAL,),
        gives=("n_params_opt", "tokens_opt", "tokens_per_param", "loss"),
        coefficients=BESIROGLU.coefficients,
        intervals={"a": (0.5126 - 0.018, 0.5126 + 0.018)},
        level="one standard error, bootstrap",
        fitted={"flops": (1e18, 1e22)},
        setup="The minimum of `besiroglu` at a fixed compute budget.",
        source="Besiroglu et al. 2024, arXiv:2404.10102",
        caveats=(
            (
                "The notebook prints 25.66 tokens per parameter for Chinchilla's compute, but "
                "that is the value at 1e18 FLOPs; at 5.88e23 FLOPs it is 18.4"
            ),
        ),
    ),
    Law(
        id="chinchilla_tex_ratio",
        name="Chinchilla, approach 3: tokens per parameter with the printed exponent",
        summary=(
            "Predicts the compute-optimal tokens per parameter from compute, with the "
            "exponent that the paper prints."
        ),
        kind="allocation",
        formula=(
            "G = (alpha * A / (beta * B))**(1 / (alpha + beta)); tokens_per_param = (C / "
            "6)**(1 - 2 * a) / G**2"
        ),
        function=ratio,
        inputs=(C_6ND_TOTAL,),
        gives=("tokens_per_param",),
        coefficients={name: HOFFMANN.coefficients[name] for name in ("A", "B", "alpha", "beta")}
        | {"a": 0.4545},
        setup=(
            "a is the middle of the printed interval 0.454 to 0.455. The other "
            "coefficients are the unrounded ones."
        ),
        source="the notebook of Besiroglu et al. 2024, arXiv:2404.10102",
        caveats=("Here a does not follow from alpha and beta; in besiroglu_alloc it does",),
    ),
    Law(
        id="jointmoe_alloc",
        name="Joint MoE: compute-optimal active parameters and tokens",
        summary=(
            "Predicts the compute-optimal active parameters, tokens and loss from compute "
            "and number of experts."
        ),
        kind="allocation",
        formula=(
            "Eh = 1 / (1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max); mu = "
            "alpha + gam * log(Eh); nu = beta + zet * log(Eh); m = a * Eh**delt; n = b * "
            "Eh**om; G = (mu * m / (nu * n))**(-1 / (mu + nu)); n_params_opt = G * (C / "
            "6)**(nu / (mu + nu)); tokens_opt = (C / 6)**(mu / (mu + nu)) / G; loss = m * "
            "n_params_opt**mu + n * tokens_opt**nu + c"
        ),
        function=joint_frontier,
        inputs=(
            Input(
                "C",
                "flops",
                "training FLOPs, 6 D times the active parameters",
                "in this law, N counts active parameters",
            ),
            E,
        ),
        gives=("n_params_opt", "tokens_opt", "loss"),
        coefficients=JOINT.coefficients,
        fitted={"flops": (1e20, 1e22), "n_experts": (1, 32)},
        conditions=JOINT.conditions,
        setup=(
            "The minimum of `jointmoe` at a fixed compute budget. n_params_opt counts "
            "active parameters."
        ),
        source="Ludziejewski et al. 2025, arXiv:2502.05172, eq. 7 and Table 1",
        caveats=(
            (
                "Eq. 7 as printed has the negative exponents inside G; it reproduces Table 1 "
                "only with their signs reversed"
            ),
        ),
        shown_at={"C": 1e21},
    ),
    Law(
        id="sardana_wedge",
        name="Beyond Chinchilla: the optimality condition with inference compute",
        summary=(
            "States the optimality condition on N and D when inference compute counts, and "
            "the total FLOPs."
        ),
        kind="allocation",
        formula="elasticity_ratio = 1 + D_inf / (3 * D); flops = 6 * N * D + 2 * N * D_inf",
        function=wedge,
        inputs=(
            N_UNSTATED,
            D,
            Input(
                "D_inf",
                "inference_tokens",
                "tokens read and generated over the lifetime of the model",
            ),
        ),
        gives=("elasticity_ratio", "flops"),
        setup=(
            "elasticity_ratio is alpha A N**-alpha over beta B D**-beta at the cheapest "
            "split for a given loss, for any law in N and D. It is 1 without inference."
        ),
        source="Sardana et al. 2024, arXiv:2401.00448; the condition follows from its problem",
        caveats=(
            "There is no closed form for N and D: solve the condition together with a loss law",
        ),
    ),
)
