"""`lint` finds one mistake per rule, and nothing in correct configs, including emitted ones."""

import json

import pytest
from test_linting_stacks import FOLDER_FAULTS, MODEL_FAULTS, TEXT_FAULTS
from test_transferring import EVERYTHING, EVIDENCE, VOCAB, WIDE

from scaletune import cli, counting
from scaletune.errors import UserError
from scaletune.linting import group_list_rules, group_rules
from scaletune.linting.lint import RULES, lint
from scaletune.rules import FORMS
from scaletune.transferring import Transfer
from scaletune.transferring.formats import granite, hyperclovax, llama, pytorch, recipe

GRANITE = {  # of width 1024, base 256, sigma 0.02: m = 4
    "model_type": "granite",
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "attention_multiplier": 0.125,
    "initializer_range": 0.01,
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 1.0,
}
T8 = [  # m = 4, lr 0.01, weight decay 0.1, eps 4e-9 / 4
    {
        "name": "model.embed_tokens.weight",
        "lr": 0.01,
        "weight_decay": 0.1,
        "eps": 1e-9,
        "init_std": 0.02,
    },
    {
        "name": "model.layers.0.self_attn.k_proj.weight",
        "lr": 0.0025,
        "weight_decay": 0.4,
        "eps": 1e-9,
        "init_std": 0.01,
    },
    {
        "name": "model.layers.0.input_layernorm.weight",
        "lr": 0.01,
        "weight_decay": 0.0,
        "eps": 1e-9,
        "init_std": 0.0,
    },
    {"name": "model.norm.weight", "lr": 0.01, "weight_decay": 0.0, "eps": 1e-9, "init_std": 0.0},
    {"name": "lm_head.weight", "lr": 0.0025, "weight_decay": 0.4, "eps": 4e-9, "init_std": 0.005},
]
MEGATRON = (
    "torchrun pretrain_gpt.py --use-mup \\\n"
    "  --mup-base-hidden-size 256 --lr 1e-3 --weight-decay 0 --adam-eps 1e-8"
)
NEOX = (
    "use-mup: true\n"
    "mup-init-scale: 1.0\n"
    "optimizer:\n"
    "  type: Adam\n"
    "  params: {lr: 0.001}\n"
    "weight-decay: 0\n"
)
DEEPSPEED = {
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 100, "warmup_num_steps": 10},
    },
}
LM_ENGINE = (
    "model_args: {pretrained_config: {m_width: 4, m_residual: 0.5, init_method: mup, "
    "use_depth_scaled_init: %s}}\n"
    "optimizer_args: {params_group_method: mup, class_args: {weight_decay: %s}}\n"
)
LITGPT = (
    "model_name: x\n"
    "model_config: {n_embd: 256%s}\n"
    "train: {lr_warmup_steps: 10, min_lr: %s}\n"
    "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.001, weight_decay: "
    "0.1}}\n"
)
LEVANTER = (
    "trainer: {mp: x}\noptimizer: {type: %s, lr: 0.02, learning_rate: 0.02, min_lr_ratio: 0.1%s}\n"
)
LINGUA = "optim: {lr: 0.001, lr_min_ratio: 0.1}\nmodel: {dim: 512%s}\n"
OPEN_LM = "torchrun main.py --lr 1e-3 --lr-cooldown-end 1e-5 --wd 0.1 %s"
MINICPM3 = {"model_type": "minicpm3", "scale_emb": 1.0, "scale_depth": 1.4, "dim_model_base": 64}
TORCHTITAN = (
    "\ngroups = [\n"
    '    ParamGroupConfig(pattern=r"layers\\..*wk\\.weight", optimizer_name="AdamW", '
    'optimizer_kwargs={"lr": 0.0025, "eps": 1e-9, "weight_decay": %s}),\n'
    '    optimizer.ParamGroupConfig(pattern=r"lm_head\\.weight", optimizer_kwargs={"lr": '
    '0.0025, "eps": 4e-9, "weight_decay": 0.4}),\n'
    '    ParamGroupConfig(pattern="tok_embeddings", optimizer_kwargs={"lr": 0.01, "eps": '
    '1e-9, "weight_decay": 0.1}),\n'
    '    ParamGroupConfig(pattern=".*", optimizer_kwargs={"lr": 0.01, "eps": 1e-9, '
    '"weight_decay": 0.0}),\n'
    "    ParamGroupConfig(pattern=name, optimizer_kwargs=later),\n"
    "]\n"
)
OLMO = (
    "\noverrides = [\n"
    '    OptimGroupOverride(params=["embeddings.weight"], opts={"lr": 0.01, "eps": 1e-9, '
    '"weight_decay": 0.1}),\n'
    '    OptimGroupOverride(params=["blocks.*.attention.w_k.weight"], opts={"lr": '
    '0.0025, "eps": 1e-9, "weight_decay": 0.4}),\n'
    '    OptimGroupOverride(params=["lm_head.w_out.weight"], opts={"lr": %s, "eps": '
    '4e-9, "weight_decay": 0.4}),\n'
    '    OptimGroupOverride(params=["blocks.*.attention_norm.weight", '
    '"lm_head.norm.weight"], opts={"lr": 0.01, "eps": 1e-9, "weight_decay": 0.0}),\n'
    "]\n"
)
CEREBRAS = (
    "trainer:\n"
    "  init:\n"
    "    model: {mup_base_hidden_size: 256, mup_base_filter_size: 1024, "
    "scale_qk_dot_by_d: true}\n"
)
NANOGPT = (
    "mup_enabled = True\n"
    "mup_width_multiplier = 4.0\n"
    "mup_disable_hidden_lr_scaling = False\n"
    "import os\n"
)
NANOTRON = (
    "model:\n"
    "  init_method: {use_mup: %s}\n"
    "optimizer: {learning_rate_scheduler: {learning_rate: 0.001}}\n"
)


def groups(**changed):
    """T8's groups, changed by `{part of a name: {key: value}}`."""
    return [
        row | next((put for part, put in changed.items() if part in row["name"]), {}) for row in T8
    ]


def deepspeed(optimizer="AdamW", scheduler="WarmupCosineLR", stage=2, **params):
    return DEEPSPEED | {
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": optimizer, "params": {"lr": 1e-3, "weight_decay": 0.1, **params}},
        "scheduler": {"type": scheduler, "params": {"warmup_max_lr": 1e-3}},
    }


CLEAN = {
    "granite.json": GRANITE,
    "groups.json": T8,
    "megatron.sh": MEGATRON,
    "untied.sh": MEGATRON + " --hidden-size 1024 --untie-embeddings-and-output-weights",
    "deepspeed.json": DEEPSPEED,
    "cerebras.yaml": CEREBRAS,
    "nanogpt.py": NANOGPT,
    "nanotron.yaml": NANOTRON % "false",
    "lm_engine.yml": LM_ENGINE % ("false", 0),
    "hyper.json": GRANITE | {"model_type": "hyperclovax", "logits_scaling": 0.5},
    "llama.json": {"model_type": "llama"},
    "lists.json": deepspeed()
    | {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [1e-3, 2e-3]}}},
    "adam_w.json": deepspeed("Adam"),
    "foundry.yaml": "optimizer: {name: decoupled_adamw, lr: 0.01, weight_decay: 0.0, eps: "
    "1.0e-9}\n",
    "empty.toml": "",
    "litgpt.yaml": LITGPT % ("", 1e-4),
    "levanter.yaml": LEVANTER % ("muon", ", adam_lr: 0.001"),
    "levanter2.yaml": LEVANTER % ("adam", ""),
    "lingua.yaml": LINGUA % "",
    "open_lm.sh": OPEN_LM % "",
    "minicpm3.json": MINICPM3,
    "minicpm3d.json": {"model_type": "minicpm3"},
    "titan.py": TORCHTITAN % 0.4,
    "olmo.py": OLMO % 0.0025,
    "afmoe.json": {"model_type": "afmoe"},
    "neox.yml": NEOX.replace("true", "false") + "pipe-parallel-size: 1\n",
    "megatron2.sh": "train --decoupled-lr 1e-3 --weight-decay 0.1",
    "cerebras2.yaml": "trainer: {init: {model: {scale_output_logits_by_d: true}}}\n",
    "moe.json": GRANITE | {"model_type": "granitemoe"},
    "phi.json": {"model_type": "phi3small", "mup_use_scaling": True},
}
MISTAKES = [  # (rule, file, content)
    (
        "default_attention_multiplier",
        "a.json",
        {k: v for k, v in GRANITE.items() if k != "attention_multiplier"},
    ),
    ("default_attention_multiplier", "a.json", GRANITE | {"attention_multiplier": 1.0}),
    ("init_std_default", "a.json", {k: v for k, v in GRANITE.items() if k != "initializer_range"}),
    ("misspelt_key", "a.json", GRANITE | {"embeding_multiplier": 2.0}),
    ("logits_direction", "a.json", GRANITE | {"logits_scaling": 0.5}),
    ("logits_direction", "a.json", GRANITE | {"model_type": "hyperclovax"}),
    ("readout_divided_twice", "a.sh", MEGATRON + " --hidden-size 1024 --decoupled-lr 2.5e-4"),
    ("weight_decay_not_scaled", "a.sh", MEGATRON.replace("--weight-decay 0", "--weight-decay 0.1")),
    ("weight_decay_not_scaled", "a.yml", LM_ENGINE % ("false", 0.1)),
    ("weight_decay_not_scaled", "a.py", NANOGPT + "weight_decay = 0.1\n"),
    ("absolute_scheduler", "a.json", deepspeed(scheduler="WarmupLR")),
    ("absolute_scheduler", "a.json", deepspeed(scheduler="WarmupDecayLR")),
    ("absolute_scheduler", "a.yml", NEOX),
    ("coupled_l2", "a.json", deepspeed("MuAdam", eps=1e-10)),
    ("eps_not_scaled", "a.json", deepspeed("MuAdamW")),
    ("no_mup_key", "a.json", {"model_type": "llama", "mup": True}),
    ("no_mup_key", "a.yaml", LEVANTER % ("adam", ", use_mup: true")),
    ("no_mup_key", "a.yaml", LINGUA % ", mup: true"),
    ("no_mup_key", "a.sh", OPEN_LM % "--mup"),
    ("one_lr_written", "a.yaml", LITGPT % (", attention_scores_scalar: 1024", 1e-4)),
    ("one_lr_written", "a.yaml", LITGPT % (", scale_embeddings: true", 1e-4)),
    ("floor_above_peak", "a.yaml", LITGPT % ("", 2e-3)),
    ("floor_above_peak", "a.py", NANOGPT + "learning_rate = 5e-5\n"),
    (
        "left_at_the_librarys",
        "a.json",
        {k: v for k, v in MINICPM3.items() if k != "dim_model_base"},
    ),
    ("left_at_the_librarys", "a.yaml", LEVANTER % ("muon", "")),
    ("embeddings_alone", "a.json", {"model_type": "afmoe", "mup_enabled": True}),
    (
        "readout_not_scaled",
        "a.yaml",
        CEREBRAS.replace("scale_qk", "scale_output_logits_by_d: false, scale_qk"),
    ),
    ("default_attention_multiplier", "a.yaml", CEREBRAS.replace(", scale_qk_dot_by_d: true", "")),
    (
        "default_attention_multiplier",
        "a.json",
        GRANITE | {"model_type": "granitemoe", "attention_multiplier": 1.0},
    ),
    (
        "weight_decay_not_scaled",
        "a.yaml",
        CEREBRAS + "    optimizer: {AdamW: {weight_decay: 0.1}}\n",
    ),
    ("weight_decay_not_scaled", "a.py", TORCHTITAN % 0.1),
    ("readout_divided_twice", "a.py", OLMO % (0.01 / 16)),
    ("init_not_mup", "a.yml", (LM_ENGINE % ("false", 0)).replace("init_method: mup, ", "")),
    (
        "hidden_lr_not_scaled",
        "a.yml",
        (LM_ENGINE % ("false", 0.1)).replace("params_group_method: mup, ", ""),
    ),
    ("coupled_l2", "a.toml", "[optimizer]\ntype = 'Adam'\nparams = { weight_decay = 0.1 }\n"),
    ("coupled_l2", "a.json", deepspeed("Adam", adam_w_mode=False)),
    (
        "coupled_l2",
        "a.yaml",
        "optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.001, weight_decay: 0.1}}\n",
    ),
    ("coupled_l2", "a.json", {"optimizer": {"class": "torch.optim.Adam"}, "groups": T8}),
    ("shapes_lost", "a.json", deepspeed("MuAdamW", stage=3, eps=1e-10)),
    ("square_not_scaled", "a.yaml", NANOTRON % "true"),
    ("hidden_lr_not_scaled", "a.py", NANOGPT.replace("False", "True")),
    ("half_of_a_base", "a.yaml", CEREBRAS.replace("mup_base_filter_size: 1024, ", "")),
    ("depth_scaled_twice", "a.yml", LM_ENGINE % ("true", 0)),
    ("weight_decay_not_scaled", "a.json", groups(k_proj={"weight_decay": 0.1})),
    ("eps_not_scaled", "a.json", [row | {"eps": 1e-8} for row in T8]),
    ("init_std_not_scaled", "a.json", groups(k_proj={"init_std": 0.02})),
    ("readout_divided_twice", "a.json", groups(lm_head={"lr": 0.01 / 16})),
]


def write_file(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "granite", "logits_scaling": "x"},
        {"model_type": "granite", "logits_scaling": None},
        {"groups": 1},
        [],
        {"groups": [{"patterns": [[1], "^lm_head"], "lr": "x", "opts": 3}]},
        {"multipliers": [], "groups": [{"lr": 1}]},
    ],
)
def test_values_of_a_wrong_type_are_a_one_line_error(content, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    assert cli.main(["lint", str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert err.startswith("scaletune: ")
    assert str(path) in err


@pytest.mark.parametrize("name", CLEAN)
def test_correct_configs_have_no_findings(tmp_path, name):
    assert lint(write_file(tmp_path, name, CLEAN[name]))["findings"] == []


@pytest.mark.parametrize(
    ("rule", "name", "content"),
    MISTAKES,
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "",
)
def test_each_mistake_is_reported(tmp_path, rule, name, content):
    findings = lint(write_file(tmp_path, name, content))["findings"]
    assert [finding["rule"] for finding in findings] == [rule]
    assert all(findings[0][key] for key in ("at", "says", "fix"))


def test_every_rule_has_a_config_with_its_mistake():
    planted = {row[-1] for rows in (TEXT_FAULTS, MODEL_FAULTS, FOLDER_FAULTS) for row in rows}
    rules = (*RULES, *group_rules.RULES, *group_list_rules.RULES)
    assert {rule for rule, _, _ in MISTAKES} | planted == {rule.__name__ for rule in rules}


@pytest.mark.parametrize(
    ("change", "rule"),
    [(lambda row: row | {"lr": 0.01}, "hidden_lr_not_scaled"), (lambda row: row, None)],
)
def test_groups_are_read_with_the_config_beside_them(tmp_path, change, rule):
    """One init std for all tensors: embedding and head at lr 0.01 / 2, hidden at 0.01 / 4."""
    lrs = {"embed": 0.005, "k_proj": 0.0025, "norm": 0.01, "lm_head": 0.005}
    one_std = [
        row
        | {
            "lr": next(lr for part, lr in lrs.items() if part in row["name"]),
            "init_std": 0.01 * (row["init_std"] > 0),
        }
        for row in T8
    ]
    write_file(tmp_path, "config.json", GRANITE)
    write_file(tmp_path, "param_groups.json", {"groups": [change(row) for row in one_std]})
    assert [finding["rule"] for finding in lint(tmp_path)["findings"]] == ([rule] if rule else [])


def test_a_readout_divided_in_config_and_in_groups_is_reported(tmp_path):
    """Table 8's multiplier 1 / m together with Table 3's lr / m: the most common mistake."""
    write_file(
        tmp_path, "config.json", GRANITE | {"embedding_multiplier": 1.0, "logits_scaling": 4.0}
    )
    write_file(tmp_path, "param_groups.json", {"groups": T8})
    assert [finding["rule"] for finding in lint(tmp_path)["findings"]] == ["readout_divided_twice"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        EVERYTHING,
        {"width": 32},
        {"width": 64, "optimizer.decay": "independent"},
        {"model.depth": 16, "parametrization.depth_alpha": 1, "parametrization.base_depth": 2},
    ],
)
@pytest.mark.parametrize("form", sorted(FORMS))
def test_emitted_configs_have_no_findings(tiny, tmp_path, form, settings):
    target = tiny(WIDE | settings | {"form": form, "evidence": EVIDENCE})
    prepared = Transfer(
        target,
        VOCAB,
        counting.plan_tensors(target, VOCAB),
        counting.multipliers(target, VOCAB),
        EVIDENCE,
    )
    for emitter in (granite, hyperclovax, llama, pytorch):
        emitter.emit(prepared, tmp_path / emitter.__name__)
        assert lint(tmp_path / emitter.__name__)["findings"] == []
    assert lint(recipe.emit(prepared, tmp_path)[0])["findings"] == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a config must be readable as .json, but `"),
        ("a.yaml", "a: [", "a config must be readable as .yaml, but `"),
        ("a.toml", "a =", "a config must be readable as .toml, but `"),
        ("a.py", "a = (", "a config must be readable as .py, but `"),
        ("a.sh", "--a 'b", "a config must be readable as .sh, but `"),
        ("a.json", "3", "a config must hold keys or a list of groups, but `"),
    ],
)
def test_an_unreadable_config_is_a_one_line_error(tmp_path, name, content, message):
    with pytest.raises(UserError, match=f"^{message}"):
        lint(write_file(tmp_path, name, content))


def test_a_missing_config_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match=r"^the file to lint must exist, but got `"):
        lint(tmp_path / "no.json")
    with pytest.raises(
        UserError, match=r"^a folder to lint must have a config\.json or a param_groups\.json, but "
    ):
        lint(tmp_path)


def test_the_command_prints_lines_and_json(tmp_path, capsys):
    path = write_file(tmp_path, "a.json", GRANITE | {"attention_multiplier": 1.0})
    assert cli.main(["lint", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(
        "default_attention_multiplier at attention_multiplier: the softmax scale is 1.0"
    )
    assert printed[1].endswith("(granite): 1 known fault")
    assert cli.main(["lint", str(path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content.keys() == {"path", "stack", "findings", "not_read"}
    assert content["findings"][0]["rule"] == "default_attention_multiplier"
