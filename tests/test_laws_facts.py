"""Compares every law of the catalogue with the table of published laws, if it is available."""

from pathlib import Path

import pytest

from scaletune.laws import CATALOGUE, law
from scaletune.laws.moe import joint_terms
from scaletune.laws.precision import effective_share
from scaletune.laws.repetition import effective_amount

TABLE = Path(__file__).parents[1] / "../shared/facts/laws.yaml"
yaml = pytest.importorskip("yaml")
FACTS = yaml.safe_load(TABLE.read_text()) if TABLE.is_file() else []
CHECKS = [(fact["id"], i, check) for fact in FACTS for i, check in enumerate(fact["checks"])]
needs_table = pytest.mark.skipif(not FACTS, reason="the table of published laws is not available")

PF_DAY = 8.64e19
INPUTS = {  # name in the table -> our symbol, factor into our unit
    "N_M": ("N", 1e6), "N_B": ("N", 1e9), "D_M": ("D", 1e6), "D_B": ("D", 1e9),
    "C_pf": ("C", PF_DAY), "F": ("C", 1), "Cb": ("C", 1e18), "N_E": ("N", 1), "N_act": ("N", 1),
    "N_act_ne": ("N", 1), "n_exp": ("E", 1), "G_gran": ("G", 1), "Ppost": ("P", 1),
    "t_days": ("t", 1), "E_min": ("D_min", 1), "D2": ("D", 1), "B2": ("B", 1), "bs_tok": ("B", 1),
    "B_opt": ("B1", 512), "bs": ("B", 4096), "wd_std": ("wd", 1), "lr_base": ("lr1", 1),
    "width": ("w", 1), "base": ("w1", 1), "base_width": ("w1", 1), "base_depth": ("depth1", 1),
    "wd_base": ("wd1", 1), "var_base": ("var1", 1), "eps_base": ("eps1", 1), "beta1_1": ("b1", 1),
    "beta2_1": ("b2", 1), "D_ref": ("D1", 1), "B_ref": ("B1", 1), "wd_ref": ("wd1", 1),
    "D_base": ("D1", 1), "B_base": ("B1", 1),
}  # fmt: skip
OUTPUTS = {
    "bs_tok": ("batch_tokens", 1), "bs_seq": ("batch_tokens", 2048), "L": ("loss", 1),
    "L_cmin": ("loss", 1), "L_c": ("loss_fixed_batch", 1), "L_opt": ("loss", 1),
    "dL": ("loss_increase", 1), "Err": ("error", 1), "PU": ("pass_rate", 1), "y": ("value", 1),
    "m1": ("power", 1), "m2": ("saturating_power", 1), "m3": ("shifted_power", 1),
    "m4_lhs": ("sigmoid_left", 1), "m4_rhs": ("sigmoid_right", 1), "M": ("flops_per_token", 1),
    "M_opt": ("flops_per_token", 1), "C": ("flops", 1), "cost": ("flops", 1),
    "N_T": ("n_params_total", 1), "N_opt": ("n_params_opt", 1), "N_a1": ("n_params_opt", 1),
    "D_opt": ("tokens_opt", 1), "DN": ("tokens_per_param", 1), "D_over_N": ("tokens_per_param", 1),
    "alpha_cmin": ("exponent", 1), "rho": ("density", 1), "N_eff": ("n_params_effective", 1),
    "DT": ("transferred_characters", 1), "B_crit": ("critical_batch_tokens", 1),
    "B_star": ("critical_batch_tokens", 512), "B_star_tok": ("critical_batch_tokens", 1),
    "B_seq": ("critical_batch_tokens", 2048), "B_crit_def": ("critical_batch_tokens", 1),
    "S": ("steps", 1), "Ex": ("tokens", 1), "tau": ("timescale", 1),
    "wd_from_tau": ("weight_decay", 1), "wd": ("weight_decay", 1), "lr2": ("lr", 1),
    "wd2": ("weight_decay", 1), "wd2_decoupled": ("weight_decay_decoupled", 1),
    "B": ("batch_tokens", 1), "lr_scale": ("lr_factor", 1), "sde": ("lr_factor", 1),
    "beta1_2": ("beta1", 1), "beta2_2": ("beta2", 1), "beta2_halflife": ("beta2_half_life", 1),
    "lr_embed": ("lr_embedding", 1), "var_hidden": ("variance_hidden", 1),
    "logit_mult": ("logit_factor", 1), "attn_scale": ("attention_scale", 1),
    "wd_hidden": ("weight_decay_hidden", 1), "res_mult": ("residual_factor", 1),
    "lr_norm_bias": ("lr_vectors", 1), "eps_block": ("eps_hidden", 1),
}  # fmt: skip
OUTPUTS_OF = {
    ("chinchilla_tex_ratio", "ratio"): ("tokens_per_param", 1),
    ("moonlight_muon_ratio", "ratio"): ("compute_ratio", 1),
    ("embedding_lr_vocab", "ratio"): ("lr_ratio", 1),
    ("power_scheduler", "lr"): ("lr_now", 1),
    ("farseer", "L"): ("loss_per_char", 1),
    ("powerlines_bopt", "bs_seq"): ("batch_tokens", 2048),
}
EXPERTS = {30.364: 1, 21.833: 8, 16.5424: 32}  # by the m of arXiv:2502.05172, Table 4
STEPS = {
    "cosine_24000": "cosine:24000:2160:3e-4:3e-5",
    "cosine_72000": "cosine:72000:2160:3e-4:3e-5",
}
INTERMEDIATE = {  # intermediate values of laws
    ("muennighoff", "Dp"): lambda at, outputs: effective_amount(
        at["D"], at["U"], law("muennighoff").coefficients["R_Dstar"]
    ),
    ("precision", "f_w"): lambda at, outputs: effective_share(
        at["Pw"], *(law("precision").coefficients[name] for name in ("gw", "nw"))
    ),
    ("kaplan_L_Cmin", "C_flops"): lambda at, outputs: at["C"],
    # 6 * N * D of the row, which is not a law of the catalogue
    ("hoffmann_alloc", "C_of"): lambda at, outputs: 6 * 1e9 * 20.2e9,
    ("nanochat_recipe", "Tepoch_ratio"): lambda at, outputs: (
        outputs["batch_tokens"]
        / at["B1"]
        / (outputs["lr_factor"] * (outputs["weight_decay"] / at["wd1"]) * (at["D"] / at["D1"]))
    ),
    **{
        ("jointmoe", name): lambda at, outputs, i=i: joint_terms(
            at["E"], **law("jointmoe").coefficients
        )[i]
        for i, name in enumerate(("m", "mu", "n", "nu"))
    },
}


def our_inputs(law_id, inputs):
    """The inputs of a check as symbols of the catalogue's law."""
    symbols = {}
    for name, value in inputs.items():
        symbol, factor = INPUTS.get(name, (name, 1))
        symbols[symbol] = value * factor if isinstance(value, int | float) else value
    if law_id == "jointmoe_alloc":
        symbols["E"] = EXPERTS[inputs["m"]]
    if "M" in inputs:  # tokens per parameter
        symbols["D"] = inputs["M"] * inputs["N"]
    if "TPP" in inputs:
        symbols["N"] = inputs["D"] / inputs["TPP"]
    if "schedule" in inputs:
        symbols |= {"lrs": STEPS[inputs["schedule"].split()[0]], "steps": inputs["step"] + 1}
    if law_id == "zhang_cbs_def":
        symbols["b"] *= 512
    if law_id.startswith(("gemstones", "completep")) and "depth" in inputs:
        symbols["depth"] = inputs["depth"]
    entry = law(law_id)
    takes = {one.symbol for one in entry.inputs} | set(entry.unknown)
    defaults = {one.symbol: one.default for one in entry.inputs if one.default is not None}
    return defaults | {name: value for name, value in symbols.items() if name in takes}


def table_value(law_id, name, at, outputs):
    """The value of our law for a name of the table."""
    if (law_id, name) in INTERMEDIATE:
        return INTERMEDIATE[law_id, name](at, outputs)
    column, factor = OUTPUTS_OF.get((law_id, name)) or OUTPUTS.get(name, (name, 1))
    return outputs[column] / factor


@needs_table
def test_every_law_of_the_table_is_in_the_catalogue_and_no_other():
    assert {fact["id"] for fact in FACTS} == set(CATALOGUE)


@needs_table
@pytest.mark.parametrize(
    ("law_id", "i", "check"), CHECKS, ids=[f"{law_id}-{i}" for law_id, i, _ in CHECKS]
)
def test_check_of_the_table(law_id, i, check):
    at = our_inputs(law_id, check["inputs"])
    outputs = law(law_id)(**at)
    values = {name: table_value(law_id, name, at, outputs) for name in check["expected"]}
    assert values == pytest.approx(check["expected"], rel=check["tolerance"])


@needs_table
@pytest.mark.parametrize("fact", FACTS, ids=[fact["id"] for fact in FACTS])
def test_confirmed_laws_are_those_of_the_table(fact):
    entry = law(fact["id"])
    assert entry.confirmed == fact["confirmed"]
    assert bool(entry.unconfirmed) >= bool(fact.get("unconfirmed_parts"))


@needs_table
@pytest.mark.parametrize("fact", FACTS, ids=[fact["id"] for fact in FACTS])
def test_every_coefficient_of_the_table_is_in_the_law(fact):
    coefficients = [*law(fact["id"]).coefficients.values()]
    only_in_text = {
        ("precision_ptq", "b_post"),
        ("hoffmann_alloc", "b1"),
        ("hoffmann_alloc", "a2"),
        ("hoffmann_alloc", "b2"),
    }
    for name, value in fact["coefficients"].items():
        if (fact["id"], name) not in only_in_text:
            assert any(abs(own) == pytest.approx(abs(value), rel=1e-12) for own in coefficients), (
                name,
                value,
            )
