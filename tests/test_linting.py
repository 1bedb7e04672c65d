"""`lint`: one planted fault a rule, and nothing said of a config that is right, ours among them."""

import json

import pytest
from test_transferring import EVERYTHING, EVIDENCE, VOCAB, WIDE

from scaletune import cli, counting
from scaletune.errors import UserError
from scaletune.rules import FORMS
from scaletune.transferring import Transfer, granite, hyperclovax, llama, own, pytorch
from scaletune.transferring.faults import RULES
from scaletune.transferring.group_faults import RULES as GROUP_RULES
from scaletune.transferring.linting import lint

GRANITE = {  # of width 1024, base 256, sigma 0.02: m = 4
    "model_type": "granite", "hidden_size": 1024, "num_attention_heads": 16, "attention_multiplier": 0.125, "initializer_range": 0.01,
    "embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 1.0,
}  # fmt: skip
T8 = [  # m = 4, lr 0.01, weight decay 0.1, eps 4e-9 / 4
    {"name": "model.embed_tokens.weight", "lr": 0.01, "weight_decay": 0.1, "eps": 1e-9, "init_std": 0.02},
    {"name": "model.layers.0.self_attn.k_proj.weight", "lr": 0.0025, "weight_decay": 0.4, "eps": 1e-9, "init_std": 0.01},
    {"name": "model.layers.0.input_layernorm.weight", "lr": 0.01, "weight_decay": 0.0, "eps": 1e-9, "init_std": 0.0},
    {"name": "model.norm.weight", "lr": 0.01, "weight_decay": 0.0, "eps": 1e-9, "init_std": 0.0},
    {"name": "lm_head.weight", "lr": 0.0025, "weight_decay": 0.4, "eps": 4e-9, "init_std": 0.005},
]
MEGATRON = "torchrun pretrain_gpt.py --use-mup \\\n  --mup-base-hidden-size 256 --lr 1e-3 --weight-decay 0 --adam-eps 1e-8"
NEOX = "use-mup: true\nmup-init-scale: 1.0\noptimizer:\n  type: Adam\n  params: {lr: 0.001}\nweight-decay: 0\n"
DEEPSPEED = {
    "zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 100, "warmup_num_steps": 10}},
}  # fmt: skip
LM_ENGINE = "model_args: {pretrained_config: {m_width: 4, m_residual: 0.5, use_depth_scaled_init: %s}}\noptimizer_args: {class_args: {weight_decay: %s}}\n"
CEREBRAS = "trainer:\n  init:\n    model: {mup_base_hidden_size: 256, mup_base_filter_size: 1024, scale_qk_dot_by_d: true}\n"
NANOGPT = "mup_enabled = True\nmup_width_multiplier = 4.0\nmup_disable_hidden_lr_scaling = False\nimport os\n"
NANOTRON = "model:\n  init_method: {use_mup: %s}\noptimizer: {learning_rate_scheduler: {learning_rate: 0.001}}\n"


def groups(**changed):
    """T8's groups with `{part of a name: {key: value}}` put in."""
    return [row | next((put for part, put in changed.items() if part in row["name"]), {}) for row in T8]


def deepspeed(optimizer="AdamW", scheduler="WarmupCosineLR", stage=2, **params):
    return DEEPSPEED | {
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": optimizer, "params": {"lr": 1e-3, "weight_decay": 0.1, **params}},
        "scheduler": {"type": scheduler, "params": {"warmup_max_lr": 1e-3}},
    }


CLEAN = {
    "granite.json": GRANITE, "groups.json": T8, "megatron.sh": MEGATRON, "deepspeed.json": DEEPSPEED, "cerebras.yaml": CEREBRAS,
    "nanogpt.py": NANOGPT, "nanotron.yaml": NANOTRON % "false", "lm_engine.yml": LM_ENGINE % ("false", 0),
    "hyper.json": GRANITE | {"model_type": "hyperclovax", "logits_scaling": 0.5}, "llama.json": {"model_type": "llama"},
    "lists.json": deepspeed() | {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [1e-3, 2e-3]}}},
    "adam_w.json": deepspeed("Adam"), "foundry.yaml": "optimizer: {name: decoupled_adamw, lr: 0.01, weight_decay: 0.0, eps: 1.0e-9}\n",
    "empty.toml": "",
}  # fmt: skip
PLANTED = [  # (rule, file, content)
    ("default_attention_multiplier", "a.json", {k: v for k, v in GRANITE.items() if k != "attention_multiplier"}),
    ("default_attention_multiplier", "a.json", GRANITE | {"attention_multiplier": 1.0}),
    ("init_std_default", "a.json", {k: v for k, v in GRANITE.items() if k != "initializer_range"}),
    ("misspelt_key", "a.json", GRANITE | {"embeding_multiplier": 2.0}),
    ("logits_direction", "a.json", GRANITE | {"logits_scaling": 0.5}),
    ("logits_direction", "a.json", GRANITE | {"model_type": "hyperclovax"}),
    ("readout_divided_twice", "a.sh", MEGATRON + " --untie-embeddings-and-output-weights"),
    ("weight_decay_not_scaled", "a.sh", MEGATRON.replace("--weight-decay 0", "--weight-decay 0.1")),
    ("weight_decay_not_scaled", "a.yml", LM_ENGINE % ("false", 0.1)),
    ("weight_decay_not_scaled", "a.py", NANOGPT + "weight_decay = 0.1\n"),
    ("absolute_scheduler", "a.json", deepspeed(scheduler="WarmupLR")),
    ("absolute_scheduler", "a.json", deepspeed(scheduler="WarmupDecayLR")),
    ("absolute_scheduler", "a.yml", NEOX),
    ("coupled_l2", "a.json", deepspeed("MuAdam")),
    ("coupled_l2", "a.toml", "[optimizer]\ntype = 'Adam'\nparams = { weight_decay = 0.1 }\n"),
    ("coupled_l2", "a.json", deepspeed("Adam", adam_w_mode=False)),
    ("coupled_l2", "a.yaml", "optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.001, weight_decay: 0.1}}\n"),
    ("coupled_l2", "a.json", {"optimizer": {"class": "torch.optim.Adam"}, "groups": T8}),
    ("shapes_lost", "a.json", deepspeed("MuAdamW", stage=3)),
    ("square_not_scaled", "a.yaml", NANOTRON % "true"),
    ("hidden_lr_not_scaled", "a.py", NANOGPT.replace("False", "True")),
    ("half_of_a_base", "a.yaml", CEREBRAS.replace("mup_base_filter_size: 1024, ", "")),
    ("depth_scaled_twice", "a.yml", LM_ENGINE % ("true", 0)),
    ("weight_decay_not_scaled", "a.json", groups(k_proj={"weight_decay": 0.1})),
    ("eps_not_scaled", "a.json", [row | {"eps": 1e-8} for row in T8]),
    ("init_std_not_scaled", "a.json", groups(k_proj={"init_std": 0.02})),
    ("readout_divided_twice", "a.json", groups(lm_head={"lr": 0.01 / 16})),
]


def file_of(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_said_of_what_is_right(tmp_path, name):
    assert lint(file_of(tmp_path, name, CLEAN[name]))["findings"] == []


@pytest.mark.parametrize(
    ("rule", "name", "content"), PLANTED, ids=lambda value: value if isinstance(value, str) and len(value) < 40 else ""
)
def test_a_planted_fault_is_named(tmp_path, rule, name, content):
    found = lint(file_of(tmp_path, name, content))["findings"]
    assert [each["rule"] for each in found] == [rule]
    assert all(found[0][key] for key in ("at", "says", "fix"))


def test_every_rule_has_a_planted_fault():
    assert {rule for rule, _, _ in PLANTED} == {rule.__name__ for rule in (*RULES, *GROUP_RULES)}


@pytest.mark.parametrize(("groups_of", "rule"), [(lambda row: row | {"lr": 0.01}, "hidden_lr_not_scaled"), (lambda row: row, None)])
def test_groups_are_read_with_the_config_beside_them(tmp_path, groups_of, rule):
    """One-std: embedding and head at lr / 2, hidden at lr / 4 of 0.01."""
    lrs = {"embed": 0.005, "k_proj": 0.0025, "norm": 0.01, "lm_head": 0.005}
    one_std = [
        row | {"lr": next(lr for part, lr in lrs.items() if part in row["name"]), "init_std": 0.01 * (row["init_std"] > 0)} for row in T8
    ]
    file_of(tmp_path, "config.json", GRANITE)
    file_of(tmp_path, "param_groups.json", {"groups": [groups_of(row) for row in one_std]})
    assert [each["rule"] for each in lint(tmp_path)["findings"]] == ([rule] if rule else [])


def test_a_readout_divided_in_config_and_in_groups_is_found(tmp_path):
    """Table 8's multiplier of 1 / m beside Table 3's lr / m: the mixture that users meet most."""
    file_of(tmp_path, "config.json", GRANITE | {"embedding_multiplier": 1.0, "logits_scaling": 4.0})
    file_of(tmp_path, "param_groups.json", {"groups": T8})
    assert [each["rule"] for each in lint(tmp_path)["findings"]] == ["readout_divided_twice"]


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {"width": 32}, {"width": 64, "optimizer.decay": "independent"}, {"model.depth": 16, "parametrization.depth_alpha": 1, "parametrization.base_depth": 2}])  # fmt: skip
@pytest.mark.parametrize("form", sorted(FORMS))
def test_what_we_emit_is_clean(tiny, tmp_path, form, settings):
    target = tiny(WIDE | settings | {"form": form, "evidence": EVIDENCE})
    made = Transfer(target, VOCAB, counting.planned(target, VOCAB), counting.multipliers(target, VOCAB), EVIDENCE)
    for emitter in (granite, hyperclovax, llama, pytorch):
        emitter.emit(made, tmp_path / emitter.__name__)
        assert lint(tmp_path / emitter.__name__)["findings"] == []
    assert lint(own.emit(made, tmp_path)[0])["findings"] == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "{", "a config must be readable as .json, but `"),
        ("a.yaml", "a: [", "a config must be readable as .yaml, but `"),
        ("a.toml", "a =", "a config must be readable as .toml, but `"),
        ("a.py", "a = (", "a config must be readable as .py, but `"),
        ("a.sh", "--a 'b", "a config must be readable as .sh, but `"),
        ("a.json", "3", "a config must hold keys or a list of groups, but `"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, said):
    with pytest.raises(UserError, match=f"^{said}"):
        lint(file_of(tmp_path, name, content))


def test_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^the file to lint must exist, but got `"):
        lint(tmp_path / "no.json")
    with pytest.raises(UserError, match=r"^a folder to lint must have a config\.json or a param_groups\.json, but "):
        lint(tmp_path)


def test_the_command_says_it_in_lines_and_in_json(tmp_path, capsys):
    path = file_of(tmp_path, "a.json", GRANITE | {"attention_multiplier": 1.0})
    assert cli.main(["lint", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("default_attention_multiplier at attention_multiplier: the softmax scale is 1.0") and said[1].endswith(
        "(granite): 1 known fault"
    )
    assert cli.main(["lint", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.keys() == {"path", "stack", "findings"} and answer["findings"][0]["rule"] == "default_attention_multiplier"
