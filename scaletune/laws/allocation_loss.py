"""Published allocations that follow from a law of the loss."""

from __future__ import annotations

from scaletune.laws.entry import Input, Law
from scaletune.laws.loss import BESIROGLU, HOFFMANN, chinchilla
from scaletune.laws.moe import JOINT, joint_terms
from scaletune.laws.symbols import C_6ND_TOTAL, N_UNSTATED, D, E


def frontier(
    C: float, *, E0: float, A: float, B: float, alpha: float, beta: float
) -> dict[str, float]:
    """N = G (C/6)^a, D = (C/6)^(1-a) / G, with G = (alpha A / (beta B))^(1/(alpha+beta)), a = beta/(alpha+beta)    arXiv:2203.15556, eq. 4."""
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    a = beta / (alpha + beta)
    N, D = G * (C / 6) ** a, (C / 6) ** (1 - a) / G
    return {"n_params_opt": N, "tokens_opt": D, "tokens_per_param": D / N} | chinchilla(
        N, D, E0=E0, A=A, B=B, alpha=alpha, beta=beta
    )


def ratio(C: float, *, A: float, B: float, alpha: float, beta: float, a: float) -> dict[str, float]:
    """D/N = (C/6)^(1-2a) / G^2 with `a` as printed    the notebook of arXiv:2404.10102."""
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    return {"tokens_per_param": (C / 6) ** (1 - 2 * a) / G**2}


def joint_frontier(C: float, E: float, **coefficients: float) -> dict[str, float]:
    """`frontier` of m N^mu + n D^nu, whose exponents are negative    arXiv:2502.05172, eq. 7 with its signs mended."""
    m, mu, n, nu = joint_terms(E, **coefficients)
    found = frontier(C, E0=coefficients["c"], A=m, B=n, alpha=-mu, beta=-nu)
    return {name: found[name] for name in ("n_params_opt", "tokens_opt", "loss")}


def wedge(N: float, D: float, D_inf: float) -> dict[str, float]:
    """alpha A N^-alpha / (beta B D^-beta) = 1 + D_inf/(3D) at the optimum; 6ND + 2 N D_inf FLOPs    arXiv:2401.00448."""
    return {"elasticity_ratio": 1 + D_inf / (3 * D), "flops": 6 * N * D + 2 * N * D_inf}


LAWS = (
    Law(
        id="besiroglu_alloc",
        name="Chinchilla, approach 3 refitted by Epoch AI: the frontier",
        kind="allocation",
        formula="G = (alpha * A / (beta * B))**(1 / (alpha + beta)); a = beta / (alpha + beta); n_params_opt = G * (C / 6)**a; "
        "tokens_opt = (C / 6)**(1 - a) / G; tokens_per_param = tokens_opt / n_params_opt; "
        "loss = E0 + A * n_params_opt**-alpha + B * tokens_opt**-beta",
        function=frontier,
        inputs=(C_6ND_TOTAL,),
        gives=("n_params_opt", "tokens_opt", "tokens_per_param", "loss"),
        coefficients=BESIROGLU.coefficients,
        intervals={"a": (0.5126 - 0.018, 0.5126 + 0.018)},
        level="one standard error, bootstrap",
        fitted={"flops": (1e18, 1e22)},
        setup="the optimum of `besiroglu`",
        source="Besiroglu et al. 2024, arXiv:2404.10102",
        traps=(
            "the notebook prints 25.66 tokens per parameter as of Chinchilla's compute; that is of 1e18 FLOPs, at 5.88e23 it is 18.4",
        ),
    ),
    Law(
        id="chinchilla_tex_ratio",
        name="Chinchilla, approach 3: tokens per parameter with the printed exponent",
        kind="allocation",
        formula="G = (alpha * A / (beta * B))**(1 / (alpha + beta)); tokens_per_param = (C / 6)**(1 - 2 * a) / G**2",
        function=ratio,
        inputs=(C_6ND_TOTAL,),
        gives=("tokens_per_param",),
        coefficients={name: HOFFMANN.coefficients[name] for name in ("A", "B", "alpha", "beta")}
        | {"a": 0.4545},
        setup="a is the middle of the printed 0.454 to 0.455, the rest the unrounded coefficients",
        source="the notebook of Besiroglu et al. 2024, arXiv:2404.10102",
        traps=("a does not follow from alpha and beta here: besiroglu_alloc has one that does",),
    ),
    Law(
        id="jointmoe_alloc",
        name="Joint MoE, active parameters and tokens",
        kind="allocation",
        formula="Eh = 1 / (1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max); mu = alpha + gam * log(Eh); nu = beta + zet * log(Eh); "
        "m = a * Eh**delt; n = b * Eh**om; G = (mu * m / (nu * n))**(-1 / (mu + nu)); n_params_opt = G * (C / 6)**(nu / (mu + nu)); "
        "tokens_opt = (C / 6)**(mu / (mu + nu)) / G; loss = m * n_params_opt**mu + n * tokens_opt**nu + c",
        function=joint_frontier,
        inputs=(
            Input(
                "C",
                "flops",
                "training FLOPs, 6 D times active parameters",
                "its N counts active parameters",
            ),
            E,
        ),
        gives=("n_params_opt", "tokens_opt", "loss"),
        coefficients=JOINT.coefficients,
        fitted={"flops": (1e20, 1e22), "n_experts": (1, 32)},
        conditions=JOINT.conditions,
        setup="the optimum of `jointmoe`; n_params_opt are active ones",
        source="Ludziejewski et al. 2025, arXiv:2502.05172, eq. 7 and Table 1",
        traps=(
            "eq. 7 as printed has the negative exponents inside G; only with their signs turned does it give Table 1",
        ),
        shown_at={"C": 1e21},
    ),
    Law(
        id="sardana_wedge",
        name="Inference counted in: the condition on parameters and tokens",
        kind="allocation",
        formula="elasticity_ratio = 1 + D_inf / (3 * D); flops = 6 * N * D + 2 * N * D_inf",
        function=wedge,
        inputs=(
            N_UNSTATED,
            D,
            Input(
                "D_inf", "inference_tokens", "tokens read and generated over the life of the model"
            ),
        ),
        gives=("elasticity_ratio", "flops"),
        setup="alpha A N**-alpha over beta B D**-beta at the split of least cost for one loss, with any law of N and D: 1 without inference",
        source="Sardana et al. 2024, arXiv:2401.00448; the condition follows from its problem",
        traps=("no closed form for N and D: solve it beside a law of the loss",),
    ),
)
