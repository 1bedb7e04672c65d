"""Compares every law with numbers of its source, or computed from its published coefficients.

Every new law needs a row in GOLDEN or FORMS.
"""

import math
from itertools import accumulate

import numpy as np
import pytest

from scaletune.errors import UserError
from scaletune.laws import CATALOGUE, COLUMNS, KINDS, UNITS, describe, law
from scaletune.laws.moe import joint_terms
from scaletune.laws.precision import effective_share
from scaletune.laws.repetition import effective_amount

pytestmark = pytest.mark.filterwarnings("error")

# law, symbols, expected values, relative tolerance. Units are those of the catalogue: batch sizes
# that a source prints in sequences are in tokens here.
GOLDEN = [
    (
        "steplaw_lr_bs",
        {"N": 1e9, "D": 1e11},
        {"lr": 0.001632499, "batch_tokens": 1107714.9},
        0.0001,
    ),
    (
        "steplaw_lr_bs",
        {"N": 7e9, "D": 1.4e12},
        {"lr": 0.0009165569, "batch_tokens": 4998815.4},
        0.0001,
    ),
    (
        "steplaw_lr_bs",
        {"N": 214663680, "D": 1e11},
        {"lr": 0.004890003, "batch_tokens": 1107714.9},
        0.0001,
    ),
    (
        "steplaw_lr_bs_bootstrap",
        {"N": 1e9, "D": 1e11},
        {"lr": 0.0016623791, "batch_tokens": 1107466.62},
        1e-5,
    ),
    (
        "steplaw_lr_bs_bootstrap",
        {"N": 7e9, "D": 1.4e12},
        {"lr": 0.00093468407, "batch_tokens": 4996961.32},
        1e-5,
    ),
    (
        "deepseek_lr_bs",
        {"C": 8.455716864e22},
        {"lr": 0.0004246023, "batch_tokens": 9222608},
        0.0001,
    ),
    (
        "deepseek_lr_bs",
        {"C": 9.9455336448e23},
        {"lr": 0.000312013, "batch_tokens": 20654134},
        0.0001,
    ),
    ("deepseek_lr_bs", {"C": 1e20}, {"lr": 0.0009859982, "batch_tokens": 1017145}, 0.0001),
    (
        "deepseek_M",
        {"n_layer": 30, "d_model": 4096, "l_seq": 4096, "D": 2e12},
        {"flops_per_token": 42278580000, "flops": 8.455717e22},
        1e-5,
    ),
    (
        "deepseek_alloc",
        {"C": 1e21},
        {"flops_per_token": 1.75616e10, "tokens_opt": 56949210000},
        0.0001,
    ),
    ("bjorck_lr", {"N": 1e9, "D": 1e11}, {"lr": 0.0003550845}, 0.0001),
    ("bjorck_lr", {"N": 6.7e9, "D": 1e12}, {"lr": 0.0001097323}, 0.0001),
    ("bjorck_horizon_rule", {"lr1": 0.001, "D1": 2.5e10, "D": 8e11}, {"lr": 0.000329877}, 0.0001),
    ("porian_lr_bs", {"N": 1e8}, {"lr": 0.004877639, "batch_tokens": 318728.6}, 0.0001),
    ("porian_lr_bs", {"N": 1e9}, {"lr": 0.002129128, "batch_tokens": 1.60857e6}, 0.0001),
    ("porian_alloc_rw", {"C": 5.88e23}, {"n_params_opt": 76942303484.4}, 1e-6),
    ("porian_alloc_owt2", {"C": 5.88e23}, {"n_params_opt": 98817455942.9}, 1e-6),
    ("kaplan_lr", {"N": 1.5e9}, {"lr": 0.000291542}, 0.0001),
    ("kaplan_lr", {"N": 1e6}, {"lr": 0.001311734}, 0.0001),
    ("kaplan_bcrit", {"L": 3}, {"critical_batch_tokens": 1.12257e6}, 0.0001),
    ("minicpm_bs", {"L": 3}, {"batch_tokens": 1275113}, 0.0001),
    ("minicpm_bs", {"L": 2.5}, {"batch_tokens": 3.97777e6}, 0.0001),
    ("minicpm_alloc", {"C": 4.08e21}, {"tokens_per_param": 191.9936}, 0.0001),
    (
        "power_scheduler",
        {"lr_max": 0.02, "T": 1e11, "B": 5.24288e5},
        {"lr_now": 0.001445333},
        0.0001,
    ),
    ("power_scheduler", {"lr_max": 0.02, "T": 1e8, "B": 5.24288e5}, {"lr_now": 0.02}, 1e-9),
    (
        "zhang_cbs_def",
        {"a": 1293.82686947, "b": 1451140141.501, "B1": 1.31072e5},
        {"critical_batch_tokens": 381603.915264},
        1e-6,
    ),
    (
        "zhang_cbs_def",
        {"a": 3897.30659733, "b": 22211138674.84, "B1": 1.31072e5},
        {"critical_batch_tokens": 1297106.330624},
        1e-6,
    ),
    ("zhang_cbs_N", {"N": 1.2e9}, {"critical_batch_tokens": 1320032.36352}, 1e-5),
    ("zhang_cbs_N", {"N": 8.5e7}, {"critical_batch_tokens": 382099.009536}, 1e-6),
    ("zhang_cbs_D", {"D": 2.4e10}, {"critical_batch_tokens": 1342747.4432}, 1e-5),
    (
        "mccandlish_tradeoff",
        {"S_min": 1000, "D_min": 1e9, "B": 1e6},
        {"steps": 2000, "tokens": 2e9, "critical_batch_tokens": 1e6},
        1e-12,
    ),
    ("mccandlish_lr", {"lr_max": 1, "B": 1, "B_noise": 1}, {"lr": 0.5}, 1e-12),
    ("surge_lr", {"lr_max": 1, "B": 1, "B_noise": 1}, {"lr": 1}, 1e-12),
    ("surge_lr", {"lr_max": 1, "B": 0.0625, "B_noise": 1}, {"lr": 0.4705882}, 1e-6),
    ("surge_lr", {"lr_max": 1, "B": 4, "B_noise": 1}, {"lr": 0.8}, 1e-9),
    (
        "adam_sde_batch",
        {"B1": 1, "B": 4, "lr1": 0.001, "wd1": 0.1},
        {"lr": 0.002, "weight_decay": 0.2, "weight_decay_decoupled": 0.4},
        1e-9,
    ),
    (
        "adam_batch_betas",
        {"B1": 1, "B": 4, "b1": 0.95, "b2": 0.99},
        {"beta1": 0.8, "beta2": 0.96, "beta2_half_life": 0.96059601},
        1e-8,
    ),
    (
        "adamw_timescale",
        {"B": 1e6, "lr": 0.001, "wd": 0.1, "D": 1e11, "tau_target": 0.1},
        {"timescale": 0.1, "weight_decay": 0.1},
        1e-9,
    ),
    (
        "powerlines_tau",
        {"B": 1032192, "D": 1.22e10, "lr": 0.001, "N": 6.1e8},
        {"timescale": 0.2235561, "weight_decay": 0.378459},
        0.0001,
    ),
    ("powerlines_bopt", {"D": 1.22e10}, {"batch_tokens": 457220.096}, 0.0001),
    ("powerlines_bcrit", {"D_min": 1e10}, {"critical_batch_tokens": 4021104.64}, 0.0001),
    (
        "nanochat_recipe",
        {"D": 4e9, "D1": 1e9, "B1": 5.24288e5, "wd1": 0.2},
        {
            "batch_tokens": 891577.077663,
            "lr_factor": 1.30405073526,
            "weight_decay": 0.0652025367629,
        },
        1e-5,
    ),
    ("ling_moe_lr_bs", {"C": 1e21}, {"lr": 0.0007122927, "batch_tokens": 3117163}, 0.0001),
    (
        "ling_alloc_moe",
        {"C": 1e21},
        {"flops_per_token": 9586692000, "tokens_opt": 104336600000},
        0.0001,
    ),
    (
        "ling_alloc_dense",
        {"C": 1e21},
        {"flops_per_token": 15938274416.2, "tokens_opt": 62705163300.6},
        1e-9,
    ),
    ("jointmoe_lr", {"E": 1, "N": 1e9}, {"lr": 0.0002258035}, 0.0001),
    ("jointmoe_lr", {"E": 8, "N": 1e9}, {"lr": 0.0001342636}, 0.0001),
    ("moonlight_lr_bs", {"C": 2.13545e19}, {"lr": 0.001004669, "batch_tokens": 647822.3}, 0.0001),
    ("moonlight_lr_bs", {"C": 3.5019e20}, {"lr": 0.0008566007, "batch_tokens": 2061324}, 0.0001),
    ("moonlight_table_refit", {"C": 2.13545e19}, {"lr": 0.00095031}, 0.002),
    ("moonlight_table_refit", {"C": 3.5019e20}, {"lr": 0.00083139}, 0.002),
    (
        "everett_width",
        {"lr1": 0.01, "w": 2048, "w1": 256},
        {"lr_hidden": 0.00125, "lr_embedding": 0.01, "lr_readout": 0.00125},
        1e-9,
    ),
    (
        "mup_adam",
        {"w": 1024, "w1": 256, "lr1": 0.01, "var1": 0.02, "d_head": 64, "wd1": 0.1},
        {
            "lr_hidden": 0.0025,
            "variance_hidden": 0.005,
            "logit_factor": 0.25,
            "attention_scale": 0.015625,
            "weight_decay_hidden": 0.4,
        },
        1e-12,
    ),
    (
        "completep",
        {
            "w": 1024,
            "depth": 24,
            "w1": 256,
            "depth1": 2,
            "lr1": 0.01,
            "eps1": 1e-12,
            "wd1": 0.1,
            "var1": 0.02,
        },
        {
            "residual_factor": 0.08333333,
            "lr_hidden": 0.0025,
            "lr_vectors": 0.01,
            "eps_hidden": 2.0833333e-14,
            "weight_decay_hidden": 0.4,
        },
        1e-6,
    ),
    (
        "completedp",
        {"B": 4, "B1": 1, "D": 16, "D1": 1, "lr1": 0.01, "wd1": 0.1},
        {"lr_factor": 0.5, "lr": 0.005, "weight_decay": 0.05},
        1e-12,
    ),
    (
        "completedp",
        {"B": 4, "B1": 1, "D": 4, "D1": 1, "lr1": 0.01, "wd1": 0.1},
        {"lr_factor": 1, "lr": 0.01},
        1e-12,
    ),
    ("embedding_lr_vocab", {"k": 1, "w": 4096}, {"lr_ratio": 64}, 1e-12),
    ("wd_data_constrained", {"wd": 0.1}, {"weight_decay": 3}, 1e-12),
    ("kaplan_L_N", {"N": 1e9}, {"loss": 2.37564}, 1e-5),
    ("kaplan_L_D", {"D": 1e10}, {"loss": 2.262442}, 1e-5),
    ("kaplan_L_Cmin", {"C": 8.64e19}, {"loss": 2.65808, "loss_fixed_batch": 2.574156}, 1e-5),
    ("kaplan_L_ND", {"N": 1e9, "D": 2e10}, {"loss": 2.373882}, 1e-5),
    ("kaplan_L_NS", {"N": 1e9, "S": 2e5, "B": 1e6, "B_crit": 1e6}, {"loss": 2.400514}, 1e-5),
    ("kaplan_alloc", {"C": 8.64e19}, {"n_params_opt": 1.3e9, "exponent": 0.05198697}, 1e-5),
    ("hoffmann_rounded", {"N": 7e10, "D": 1.4e12}, {"loss": 1.93664547056}, 1e-6),
    ("hoffmann_rounded", {"N": 1e9, "D": 2e10}, {"loss": 2.58004787224}, 1e-9),
    ("hoffmann_tex", {"N": 7e10, "D": 1.4e12}, {"loss": 1.92084602657}, 1e-6),
    ("chinchilla_tex_ratio", {"C": 5.6234132519e23}, {"tokens_per_param": 72.8652571872}, 1e-9),
    ("besiroglu", {"N": 7e10, "D": 1.4e12}, {"loss": 1.97388186316}, 1e-6),
    ("besiroglu", {"N": 1e9, "D": 2e10}, {"loss": 2.53005032368}, 1e-9),
    (
        "besiroglu_alloc",
        {"C": 1e21},
        {
            "n_params_opt": 2778459000,
            "tokens_opt": 59985280000,
            "tokens_per_param": 21.589402,
            "loss": 2.305529,
        },
        1e-5,
    ),
    (
        "besiroglu_alloc",
        {"C": 5.76e23},
        {
            "n_params_opt": 7.22487e10,
            "tokens_opt": 1328744000000,
            "tokens_per_param": 18.391245,
            "loss": 1.974441,
        },
        1e-5,
    ),
    ("besiroglu_alloc", {"C": 1e18}, {"tokens_per_param": 25.7}, 0.002),
    ("hoffmann_alloc", {"C": 1.21e20}, {"n_params_opt": 1e9}, 0.002),
    ("pearce_embed", {"N": 1e9}, {"n_params_total": 1047491000}, 1e-6),
    ("gadre_loss_c4", {"N": 1439795200, "D": 921468928000}, {"loss": 2.38386332526}, 1e-6),
    ("gadre_loss_c4", {"N": 6889410560, "D": 137788211200}, {"loss": 2.27989814456}, 1e-6),
    ("gadre_err_c4_46", {"L": 2.5}, {"error": 0.645559156043}, 1e-6),
    ("gadre_err_c4_17", {"L": 2.5}, {"error": 0.535772646557}, 1e-6),
    ("gadre_loss_rpj", {"N": 1439795200, "D": 921468928000}, {"loss": 2.51982653899}, 1e-6),
    ("gadre_loss_rpj", {"N": 6889410560, "D": 137788211200}, {"loss": 2.44274517036}, 1e-6),
    ("gadre_err_rpj_46", {"L": 2.5}, {"error": 0.618140007434}, 1e-6),
    ("gadre_err_rpj_17", {"L": 2.5}, {"error": 0.487295591499}, 1e-6),
    ("gadre_err_rpj_17", {"L": 2.51982653899}, {"error": 0.49249647}, 1e-6),
    ("gadre_err_rpj_17", {"L": 2.44274517036}, {"error": 0.47185624}, 1e-6),
    ("gadre_loss_rw", {"N": 1439795200, "D": 921468928000}, {"loss": 2.49707841623}, 1e-6),
    ("gadre_loss_rw", {"N": 6889410560, "D": 137788211200}, {"loss": 2.41497311962}, 1e-6),
    ("gadre_err_rw_46", {"L": 2.5}, {"error": 0.623008483292}, 1e-6),
    ("gadre_err_rw_17", {"L": 2.5}, {"error": 0.48712504071}, 1e-6),
    ("muennighoff", {"N": 6.34e9, "D": 2.42e11, "U": 2.5e10}, {"loss": 2.225644089}, 1e-8),
    ("muennighoff", {"N": 8.67e9, "D": 1.78e11, "U": 2.5e10}, {"loss": 2.22696340751}, 1e-8),
    ("infinite_compute", {"N": 3e8}, {"loss": 3.600729}, 1e-5),
    ("infinite_compute", {"N": 1.4e9}, {"loss": 3.465475}, 1e-5),
    ("parscale_stack", {"P": 1, "N": 535813376}, {"loss": 1.172821}, 1e-5),
    ("parscale_stack", {"P": 8, "N": 4414502408}, {"loss": 0.979683}, 1e-5),
    ("parscale_pile", {"P": 1, "N": 535813376}, {"loss": 2.110698}, 1e-5),
    ("parscale_pile", {"P": 8, "N": 4414502408}, {"loss": 1.778548}, 1e-5),
    (
        "densing",
        {"rho0": 1, "t": 99.0210258, "N": 1e9},
        {"density": 2, "doubling_days": 99.02103, "n_params_effective": 2e9},
        1e-5,
    ),
    ("passuntil", {"c": 10, "alpha": 0.1, "N": 1e9}, {"pass_rate": 0.2841936}, 0.001),
    (
        "tissue_refit_25m",
        {"lrs": "cosine:24000:2160:3e-4:3e-5", "steps": 23921},
        {"loss": 3.3055},
        0.0002,
    ),
    (
        "tissue_refit_100m",
        {"lrs": "cosine:24000:2160:3e-4:3e-5", "steps": 23921},
        {"loss": 2.9785},
        0.0002,
    ),
    (
        "tissue_refit_400m",
        {"lrs": "cosine:24000:2160:3e-4:3e-5", "steps": 23921},
        {"loss": 2.7402},
        0.0002,
    ),
    ("mpl_25m", {"lrs": "cosine:72000:2160:3e-4:3e-5", "steps": 71921}, {"loss": 3.2018}, 0.0002),
    ("mpl_100m", {"lrs": "cosine:72000:2160:3e-4:3e-5", "steps": 71921}, {"loss": 2.8618}, 0.0002),
    ("mpl_400m", {"lrs": "cosine:72000:2160:3e-4:3e-5", "steps": 71937}, {"loss": 2.6185}, 0.0002),
    ("farseer", {"N": 1e9, "D": 2e10}, {"loss_per_char": 0.618001}, 0.0001),
    ("gemstones_hot", {"N": 1e9, "D": 2e10}, {"loss": 2.86227173405}, 1e-9),
    ("gemstones_hot_100bp", {"N": 1e9, "D": 2e10}, {"loss": 2.84373219322}, 1e-9),
    ("gemstones_cool_end", {"N": 1e9, "D": 2e10}, {"loss": 2.80678124058}, 1e-9),
    (
        "gemstones_width_depth",
        {"w": 2048, "depth": 24, "N": 1.3e9, "D": 1e11},
        {"loss": 2.610485},
        1e-5,
    ),
    (
        "gemstones_approach1",
        {"C": 1e21},
        {"n_params_opt": 1783898000, "tokens_opt": 84009220000},
        1e-5,
    ),
    (
        "bnsl",
        {"a": 0.1, "b": 1, "x": 1, "c0": 0.3, "d1": 1, "f1": 0.5, "c1": 0.4},
        {"value": 0.970550563296},
        1e-9,
    ),
    (
        "alabdulmohsin_m4",
        {
            "x": 4,
            "b": 1,
            "c": -0.5,
            "einf": 0.1,
            "g": 0,
            "c3": -0.5,
            "e0": 0.9,
            "alpha": 0,
            "y": 0.6,
        },
        {
            "power": 0.5,
            "saturating_power": 0.6,
            "shifted_power": 0.5,
            "sigmoid_left": 0.5,
            "sigmoid_right": 0.5,
        },
        1e-9,
    ),
    (
        "precision",
        {"Pw": 16, "Pa": 1e6, "Pkv": 1e6, "N": 2.2e8, "D": 2.6e10},
        {"loss": 3.197132},
        1e-5,
    ),
    ("precision", {"Pw": 4, "Pa": 4, "Pkv": 4, "N": 2.2e8, "D": 2.6e10}, {"loss": 3.591847}, 1e-5),
    ("precision_ptq", {"N": 2.2e8, "D": 2.6e10, "P": 4}, {"loss_increase": 0.01758613}, 1e-5),
    ("clark_sbase", {"E": 64, "N": 1e9}, {"loss": 2.08581463174}, 1e-6),
    ("clark_sbase", {"E": 128, "N": 5e6}, {"loss": 2.891533}, 1e-5),
    ("clark_rlr", {"E": 64, "N": 1e9}, {"loss": 2.14977047934}, 1e-6),
    ("clark_hash", {"E": 64, "N": 1e9}, {"loss": 2.11072756869}, 1e-6),
    ("clark_dense", {"N": 1e9}, {"loss": 2.265109}, 1e-5),
    ("krajewski_moe", {"G": 1, "N": 1e9, "D": 2e10}, {"loss": 3.276133}, 1e-5),
    ("krajewski_moe", {"G": 8, "N": 1e9, "D": 2e10}, {"loss": 3.140393}, 1e-5),
    ("krajewski_dense", {"N": 1e9, "D": 2e10}, {"loss": 2.980305}, 1e-5),
    ("jointmoe_alloc", {"E": 1, "C": 1e20}, {"n_params_opt": 1.7e9, "tokens_opt": 9.7e9}, 0.025),
    ("jointmoe_alloc", {"E": 8, "C": 1e21}, {"n_params_opt": 3.8e9, "tokens_opt": 4.43e10}, 0.015),
    (
        "jointmoe_alloc",
        {"E": 32, "C": 1e22},
        {"n_params_opt": 1.22e10, "tokens_opt": 1.369e11},
        0.015,
    ),
    ("abnar_sparsity", {"S": 0, "N": 1e9, "D": 2e10}, {"loss": 2.565681}, 1e-5),
    ("abnar_sparsity", {"S": 0.9, "N": 1e9, "D": 2e10}, {"loss": 2.701872}, 1e-5),
    (
        "sardana_wedge",
        {"N": 7e9, "D": 2e12, "D_inf": 2e12},
        {"elasticity_ratio": 1.3333333, "flops": 1.12e23},
        1e-6,
    ),
    ("sardana_fit", {"N": 1e9, "D": 2e10}, {"loss": 2.72567264403}, 1e-9),
    ("hernandez_transfer", {"DF": 1e7, "N": 1e8}, {"transferred_characters": 379099800}, 1e-5),
    ("ncpl_baseline_steplaw", {"N": 214663680, "D": 4e9}, {"loss": 2.615357}, 1e-5),
    ("ncpl_baseline_steplaw", {"N": 1073741824, "D": 5.69e10}, {"loss": 2.172101}, 1e-5),
    ("ncpl_baseline_marin", {"N": 3e8, "D": 6e9}, {"loss": 3.21426994765}, 1e-9),
    ("llama3_alloc", {"C": 3.8e25}, {"tokens_opt": 1.655e13, "n_params_opt": 4.02e11}, 0.04),
    ("moonlight_loss_muon", {"C": 8.64e19}, {"loss": 2.506}, 1e-12),
    ("moonlight_loss_muon", {"C": 2.135450000002e19}, {"loss": 2.694923}, 1e-5),
    ("moonlight_loss_adamw", {"C": 8.64e19}, {"loss": 2.608}, 1e-12),
    ("moonlight_loss_adamw", {"C": 2.135450000002e19}, {"loss": 2.812464}, 1e-5),
    ("moonlight_muon_ratio", {"C": 8.64e19}, {"compute_ratio": 0.464299}, 1e-5),
    ("su_unraveling", {"N": 1e9, "S_min": 1e5}, {"loss": 2.56060713355}, 1e-9),
    # E = 1 and 32 with the m, mu, n, nu that arXiv:2502.05172 prints in its Table 4
    (
        "jointmoe",
        {"N": 1e9, "D": 2e10, "E": 1},
        {"loss": 30.364 * 1e9**-0.1817 + 53.9838 * 2e10**-0.1965 + 1.3637},
        1e-3,
    ),
    (
        "jointmoe",
        {"N": 1e9, "D": 2e10, "E": 32},
        {"loss": 16.5424 * 1e9**-0.1557 + 234.6726 * 2e10**-0.2652 + 1.3637},
        1e-3,
    ),
]

# laws without published coefficients, at values whose result is easy to calculate by hand
FORMS = [
    ("meituan_lr", {"L": 2, "lam": 8, "alpha": 3}, {"lr": 1}),
    ("critical_sqrt_t", {"D": 1e10, "k": 2}, {"critical_batch_tokens": 2e5}),
    (
        "time_transfer",
        {"D": 1e10, "k": 1e-4, "k_opt": 3},
        {"critical_batch_tokens": 1e6, "batch_tokens": 3e5},
    ),
    ("nmt_multilingual", {"N": 2e10, "beta": 2, "f": 0.5, "alpha": 0.1, "Linf": 1}, {"loss": 1.2}),
    (
        "time_matters",
        {
            "N": 1e8,
            "B_tok": 1e6,
            "T": 2e4,
            "copies": 1e11,
            "c0": 1,
            "c1": 1e-11,
            "E0": 1,
            "A": 100,
            "alpha": 0.25,
            "B": 10,
            "beta": 0.1,
        },
        {"loss": 3},
    ),
    (
        "frantar_sparse",
        {
            "N": 1e10,
            "D": 1e10,
            "S": 0.75,
            "aS": 4,
            "bS": 0.5,
            "cS": 3,
            "bN": 0.1,
            "aD": 1e8,
            "bD": 0.5,
            "c": 1,
        },
        {"loss": 1.6},
    ),
    (
        "tao_vocab",
        {"N": 1e9, "V": 1e9, "H": 1e10, "unit_N": 1e9, "unit_H": 1e10},
        {"loss_over_unigram": -5.533 + 1.831 + 0.196 + 2.124},
    ),
    (
        "tissue_annealing",
        {"lrs": [1, 0.5, 0.5], "steps": 3, "L0": 2, "A": 1, "alpha": 1, "C": 1, "lam": 0.9},
        {"loss": 2 + 0.5 - 0.95},
    ),
    (
        "tissue_annealing",
        {"lrs": [0.5, 0.5, 9], "steps": 2, "L0": 2, "A": 1, "alpha": 3, "C": 1, "lam": 0.9},
        {"loss": 3},
    ),
]


@pytest.mark.parametrize(("law_id", "inputs", "expected", "tolerance"), GOLDEN)
def test_number(law_id, inputs, expected, tolerance):
    values = law(law_id)(**inputs)
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(("law_id", "inputs", "expected"), FORMS)
def test_form(law_id, inputs, expected):
    assert law(law_id)(**inputs) == pytest.approx(expected, rel=1e-12)


def test_every_law_has_a_number():
    assert {row[0] for row in GOLDEN} | {row[0] for row in FORMS} == set(CATALOGUE)


@pytest.mark.parametrize("law_id", [entry.id for entry in CATALOGUE.values() if entry.unknown])
def test_a_law_without_published_coefficients_names_them(law_id):
    entry = law(law_id)
    inputs = {one.symbol: COLUMNS[one.column].example for one in entry.inputs}
    first, means = next(iter(entry.unknown.items()))
    with pytest.raises(UserError, match=rf"{law_id} has no published value of {first} \(") as error:
        entry(**inputs)
    assert means in str(error.value)
    assert f"--given {first}=VALUE" in str(error.value)
    assert "\n" not in str(error.value)
    assert f"not published, give it with --given {first}=VALUE" in " ".join(describe(entry).split())


def test_four_epochs_are_worth_3_73():
    r_star = law("muennighoff").coefficients["R_Dstar"]
    assert effective_amount(40e9, 10e9, r_star) == pytest.approx(37256730000, rel=1e-6)
    columns = np.array([40e9, 5e9]), np.array([10e9, 10e9])  # fits pass columns
    assert effective_amount(*columns, r_star) == pytest.approx([37256730000, 10e9], rel=1e-6)


@pytest.mark.parametrize(
    ("E", "printed"),
    [(1, (30.364, -0.1817, 53.9838, -0.1965)), (32, (16.5424, -0.1557, 234.6726, -0.2652))],
)
def test_joint_terms_are_those_printed(E, printed):
    """arXiv:2502.05172, Table 4."""
    assert joint_terms(E, **law("jointmoe").coefficients) == pytest.approx(printed, rel=0.003)


def test_three_bits_of_activations_give_no_loss():
    """arXiv:2411.04330: such runs diverged. With 16-bit weights, 0.9966 of parameters remain."""
    entry = law("precision")
    assert effective_share(16, entry.coefficients["gw"], entry.coefficients["nw"]) == pytest.approx(
        0.9965821, rel=1e-6
    )
    assert math.isnan(entry(N=1e9, D=1e10, Pw=16, Pa=3, Pkv=16)["loss"])


def test_nanochat_keeps_the_timescale():
    recipe = law("nanochat_recipe")(D=4e9, D1=1e9, B1=2**19, wd1=0.2)
    assert recipe["batch_tokens"] / 2**19 / (
        recipe["lr_factor"] * recipe["weight_decay"] / 0.2 * 4
    ) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("law_id", CATALOGUE)
def test_formula_text_equals_the_function(law_id):
    entry = CATALOGUE[law_id]
    worked = entry.example()
    tools = {name: getattr(math, name) for name in ("log", "log10", "exp", "sqrt")} | {
        "accumulate": accumulate
    }
    names = tools | entry.coefficients | entry.read(worked["inputs"])
    exec(entry.formula.replace("; ", "\n"), names)
    assert {name: names[name] for name in entry.gives} == pytest.approx(worked["values"], rel=1e-11)


def test_formula_text_of_laws_without_coefficients():
    for law_id, inputs, expected in FORMS:
        names = {"sqrt": math.sqrt} | law(law_id).coefficients | law(law_id).read(inputs)
        exec(law(law_id).formula.replace("; ", "\n"), names)
        assert {name: names[name] for name in expected} == pytest.approx(expected, rel=1e-12), (
            law_id
        )


@pytest.mark.parametrize("law_id", CATALOGUE)
def test_names_are_those_of_the_tables(law_id):
    entry = CATALOGUE[law_id]
    assert {one.column for one in entry.inputs} | {
        name for one in entry.inputs for name in one.instead
    } <= set(COLUMNS)
    assert entry.kind in KINDS and set(entry.gives) <= set(UNITS)
    known = {*COLUMNS, *UNITS, "tokens_per_param", "epochs", "batch_ratio", "peak_lr"}
    assert {*entry.fitted, *entry.held, *entry.band, *entry.validated} <= known
    assert not set(entry.unknown) & set(COLUMNS)  # a given name is either a column or a coefficient
    assert all(low <= high for low, high in [*entry.fitted.values(), *entry.intervals.values()])
    assert set(entry.validated) <= set(entry.fitted) and bool(entry.intervals) == bool(entry.level)
    assert entry.confirmed or entry.unconfirmed
    symbols = [one.symbol for one in entry.inputs]
    assert len({*symbols, *entry.coefficients, *entry.unknown}) == len(symbols) + len(
        entry.coefficients
    ) + len(entry.unknown)


def test_every_quantity_is_used_by_a_law():
    assert {name for entry in CATALOGUE.values() for name in entry.gives} == set(UNITS)
    read = {
        name
        for entry in CATALOGUE.values()
        for one in entry.inputs
        for name in (one.column, *one.instead)
    }
    assert read == set(COLUMNS)
