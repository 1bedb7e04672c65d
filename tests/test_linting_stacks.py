"""Recall and precision of `lint` on files in the shape of each stack's public ones.

A fault is a correct file with one value changed. The files are in fixtures/lint.
"""

import json
from pathlib import Path

import pytest

from scaletune import cli
from scaletune.linting.lint import HEAD_IN_MEGATRON, lint
from scaletune.linting.python_reader import read_python
from scaletune.linting.shell_reader import read_shell

FILES = Path(__file__).parent / "fixtures" / "lint"
TEXTS = {path.name: path.read_text() for path in sorted(FILES.iterdir())}
GRANITE = {  # width 1024 against 256, one init std
    "architectures": ["GraniteForCausalLM"],
    "model_type": "granite",
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "initializer_range": 0.01,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.22,
    "logits_scaling": 2.0,
    "tie_word_embeddings": False,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
MODELS = {
    "granite.json": GRANITE,
    "granite_published.json": GRANITE
    | {"hidden_size": 2048, "num_attention_heads": 32, "embedding_multiplier": 12.0}
    | {"attention_multiplier": 0.015625, "logits_scaling": 8.0, "initializer_range": 0.02},
    "llama.json": LLAMA,
    "llama_neutral.json": LLAMA | {"attention_multiplier": 128**-0.5, "logits_scaling": 1.0},
    "vision.json": {"model_type": "granite4_vision", "text_config": GRANITE},
    "minicpm3.json": {
        "model_type": "minicpm3",
        "hidden_size": 2560,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    },
    "falcon.json": {
        "model_type": "falcon_h1",
        "hidden_size": 1024,
        "embedding_multiplier": 5.65,
        "lm_head_multiplier": 0.0390625,
    },
    "hyper.json": GRANITE | {"model_type": "hyperclovax", "logits_scaling": 0.125},
    "btlm.json": {"model_type": "btlm", "mup_width_scale": 0.1, "mup_output_alpha": 2.2},
    "remote.json": LLAMA | {"auto_map": {"AutoConfig": "x.Config"}, "logits_scaling": 8.0},
}
GROUPS = [  # m = 4 in the form without multipliers
    {"patterns": ["^model.embed_tokens.weight$"], "lr": 8e-3, "weight_decay": 0.1, "eps": 2.5e-9}
    | {"init_std": 0.02, "family": "adamw"},
    {"patterns": ["^model.layers.\\d+.self_attn.k_proj.weight$"], "lr": 2e-3, "weight_decay": 0.4}
    | {"eps": 2.5e-9, "init_std": 0.01, "family": "adamw"},
    {"patterns": ["^model.layers.\\d+.input_layernorm.weight$"], "lr": 8e-3, "weight_decay": 0.0}
    | {"eps": 2.5e-9, "init_std": 0.0, "family": "adamw"},
    {"patterns": ["^model.norm.weight$"], "lr": 8e-3, "weight_decay": 0.0, "eps": 2.5e-9}
    | {"init_std": 0.0, "family": "adamw"},
    {"patterns": ["^lm_head.weight$"], "lr": 2e-3, "weight_decay": 0.4, "eps": 1e-8}
    | {"init_std": 0.005, "family": "adamw"},
]
FOLDER = LLAMA | {"initializer_range": 0.01}
"""config.json beside the groups."""

TEXT_FAULTS = [  # (file, text, replacement, rule)
    ("megatron.sh", "--min-lr 3e-5", "--min-lr 3e-3", "floor_above_peak"),
    ("megatron.sh", "--lr-warmup-iters 2000", "--lr-warmup-iters 60000", "warmup_beyond_run"),
    ("megatron.sh", "--weight-decay 0.0", "--weight-decay 0.1", "weight_decay_not_scaled"),
    ("megatron.sh", "BASE=$((WIDTH / 4))", "BASE=$((WIDTH * 4))", "base_above_width"),
    ("megatron.sh", "BASE=$((WIDTH / 4))", "BASE=1", "base_above_width"),
    ("megatron.sh", "--use-mup\n", "--use-mup --mup-output-mult 4.0\n", "logits_direction"),
    ("megatron.sh", "--use-mup\n", "--use-mup\n --decoupled-lr 7.5e-5\n", "readout_divided_twice"),
    (
        "megatron.sh",
        "--use-mup\n",
        "--use-mup --mup-output-mult 0.0625\n",
        "readout_divided_twice",
    ),
    (
        "megatron.sh",
        "--mup-base-head-dim 128",
        "--mup-base-head-dim 64 --mup-attn-scale-power 0.5",
        "attention_scale",
    ),
    ("megatron.sh", "--adam-eps", "--apply-wd-to-qk-layernorm --adam-eps", "decay_on_gains"),
    ("megatron.yaml", "--weight-decay: 0", "--weight-decay: 1e-2", "weight_decay_not_scaled"),
    ("megatron.yaml", "--min-lr: 2e-5", "--min-lr: 2e-3", "floor_above_peak"),
    ("megatron.yaml", "size: 256", "size: 2048", "base_above_width"),
    ("megatron.yaml", "--bf16", "--decoupled-lr: 5e-5\n  --bf16", "readout_divided_twice"),
    ("neox.yml", '"Adam"', '"cpu_torch_adam"', "coupled_l2"),
    ("neox.yml", '"weight_decay": 0.1', '"use-mup": true', "absolute_scheduler"),
    ("neox.yml", '"min_lr": 0.00004', '"min_lr": 0.004', "floor_above_peak"),
    ("nanotron.yaml", "std: 0.0125", "use_mup: true", "square_not_scaled"),
    ("nanotron.yaml", "min_decay_lr: 5.0e-05", "min_decay_lr: 5.0e-03", "floor_above_peak"),
    ("nanotron.yaml", "lr_warmup_steps: 500", "lr_warmup_steps: 20000", "warmup_beyond_run"),
    ("torchtitan.py", "dict(lr=LR, eps=EPS, weight_decay=DECAY)", "hidden", "embedding_lr_divided"),
    (
        "torchtitan.py",
        "lr=LR / M, eps=1e-8",
        "lr=LR / M**2, eps=1e-8",
        "readout_divided_twice",
    ),
    ("torchtitan.py", "dict(lr=LR / M, eps=1e-8", "dict(lr=LR, eps=1e-8", "readout_not_scaled"),
    ("torchtitan.py", "weight_decay=0.0)", "weight_decay=DECAY)", "decay_on_gains"),
    (
        "torchtitan.py",
        "eps=EPS, weight_decay=DECAY * M)\n    return",
        "eps=EPS, weight_decay=DECAY)\n    return",
        "weight_decay_not_scaled",
    ),
    ("torchtitan.py", "EPS = 1e-8 / M", "EPS = 1e-8", "eps_not_scaled"),
    (
        "torchtitan.py",
        'pattern=r"output',
        'pattern=r"layers\\..*(wq|wk|wv|wo|w1|w2|w3)',
        "duplicate_group",
    ),
    (
        "torchtitan.py",
        "param_groups=[\n",
        'param_groups=[\n ParamGroupConfig(pattern=r".*", optimizer_kwargs=hidden),\n',
        "shadowed_group",
    ),
    ("torchtitan.py", "min_lr_factor=0.1", "min_lr_factor=10.0", "floor_above_peak"),
    (
        "torchtitan.py",
        "config.training.steps = 4_000",
        "config.training.steps = 400",
        "warmup_beyond_run",
    ),
    ("jobconfig.py", '"AdamW"', '"Adam"', "coupled_l2"),
    ("jobconfig.py", "warmup_steps=200", "warmup_steps=2 * 10_000", "warmup_beyond_run"),
    ("jobconfig.py", "min_lr_factor=0.1", "min_lr_factor=1 / PEAK", "floor_above_peak"),
    ("olmo_core.py", "init_std=SIGMA / math.sqrt(M)", "init_std=SIGMA", "init_std_not_scaled"),
    ("olmo_core.py", 'opts={"lr": LR / M,', 'opts={"lr": LR / M / M,', "readout_divided_twice"),
    ("olmo_core.py", "dict(weight_decay=0.1)", "dict(lr=LR / M)", "embedding_lr_divided"),
    ("olmo_core.py", "            weight_decay=0.0", "weight_decay=0.1", "decay_on_gains"),
    ("olmo_core.py", "weight_decay=0.1 * M),", "weight_decay=0.1),", "weight_decay_not_scaled"),
    ("olmo_core.py", '["lm_head.w_out', '["blocks.0.attention.w_q', "duplicate_group"),
    ("olmo_core.py", "alpha_f=0.1", "alpha_f=10", "floor_above_peak"),
    ("litgpt.yaml", "min_lr: 3.0e-05", "min_lr: 3.0e-03", "floor_above_peak"),
    ("litgpt.yaml", "lr_warmup_steps: 1000", "lr_warmup_steps: 40000", "warmup_beyond_run"),
    ("litgpt.yaml", "AdamW", "Adam", "coupled_l2"),
    ("litgpt.yaml", "n_layer: 12", "scale_embeddings: true", "one_lr_written"),
    ("lm_engine.yml", "params_group_method: mup", "class: x", "hidden_lr_not_scaled"),
    ("lm_engine.yml", "weight_decay: 0", "weight_decay: 0.1", "weight_decay_not_scaled"),
    ("lm_engine.yml", "eps: 1e-10", "eps: 1e-8", "eps_not_scaled"),
    ("lm_engine.yml", "init_method: mup", "init_method: normal", "init_not_mup"),
    ("lm_engine.yml", "m_width: 8", "m_width: 0.125", "base_above_width"),
    ("lm_engine.yml", "init: false", "init: true", "depth_scaled_twice"),
    ("lm_engine.yml", "num_warmup_steps: 500", "num_warmup_steps: 50000", "warmup_beyond_run"),
    ("llm_foundry.yaml", "logit_scale: 0.25", "logit_scale: 4.0", "logits_direction"),
    ("llm_foundry.yaml", "init_std: 0.01", "init_std: 0.02", "init_std_not_scaled"),
    ("llm_foundry.yaml", "t_warmup: 100ba", "t_warmup: 9600ba", "warmup_beyond_run"),
    ("llm_foundry.yaml", "y: 1.0e-4\n  - ", "y: 4.0e-4\n  - ", "weight_decay_not_scaled"),
    ("llm_foundry.yaml", "eps: 2.5e-9", "eps: 1.0e-8", "eps_not_scaled"),
    ("llm_foundry.yaml", "  weight_decay: 0.0", "  weight_decay: 1.0e-4", "decay_on_gains"),
    ("llm_foundry.yaml", "match: wte", "match: wte\n    lr: 1.5e-3", "embedding_lr_divided"),
    (
        "llm_foundry.yaml",
        "  - param_str_match: wte",
        "  - param_str_match: lm_head\n    lr: 1.5e-3\n  - param_str_match: wte",
        "tied_head_has_group",
    ),
    ("fairseq2.yaml", "      lr: 4.0e-3", "      lr: 2.0e-3", "embedding_lr_divided"),
    ("fairseq2.yaml", "    weight_decay: 0.0", "    weight_decay: 0.1", "decay_on_gains"),
    ("fairseq2.yaml", "final_lr: 4.0e-4", "final_lr: 4.0e-2", "floor_above_peak"),
    ("fairseq2.yaml", "warmup_steps: 1000", "warmup_steps: 60000", "warmup_beyond_run"),
    ("levanter.yaml", "adam_lr: 6.4e-4", "adam_lr: 0.02", "muon_lr_on_embeddings"),
    ("levanter.yaml", "  adam_lr: 6.4e-4\n", "", "left_at_the_librarys"),
    ("levanter.yaml", "warmup: 1000", "warmup: 50000", "warmup_beyond_run"),
    ("levanter.yaml", "min_lr_ratio: 0.1", "min_lr_ratio: 2.0", "floor_above_peak"),
    ("deepspeed.json", '"MuAdamW"', '"MuAdam"', "coupled_l2"),
    ("deepspeed.json", '"stage": 2', '"stage": 3', "shapes_lost"),
    ("deepspeed.json", "1e-12", "1e-8", "eps_not_scaled"),
    ("deepspeed.json", '"WarmupCosineLR"', '"WarmupLR"', "absolute_scheduler"),
    ("deepspeed.json", '"WarmupCosineLR"', '"OneCycle"', "absolute_scheduler"),
    ("deepspeed.json", '"warmup_num_steps": 500', '"warmup_num_steps": 90000', "warmup_beyond_run"),
    ("cerebras.yaml", "scale_qk_dot_by_d: true", "dropout: 0", "default_attention_multiplier"),
    ("cerebras.yaml", "weight_decay: 0.0", "weight_decay: 0.1", "weight_decay_not_scaled"),
    ("cerebras.yaml", "mup_base_filter_size: 1024", "dropout: 0", "half_of_a_base"),
    (
        "cerebras.yaml",
        "mup_base_hidden_size: 256",
        "mup_base_hidden_size: 2048",
        "base_above_width",
    ),
    ("cerebras.yaml", "logits_by_d: true", "logits_by_d: false", "readout_not_scaled"),
    (
        "cerebras.yaml",
        "weight_decay: 0.0",
        "adjust_learning_rate: {embedding: 0.25}",
        "embedding_lr_divided",
    ),
    ("cerebras.yaml", "end_learning_rate: 0.0006", "end_learning_rate: 0.06", "rising_tail"),
    (
        "nanogpt_mup.py",
        "hidden_lr_scaling = False",
        "hidden_lr_scaling = True",
        "hidden_lr_not_scaled",
    ),
    ("nanogpt_mup.py", "width / base_width", "base_width / width", "base_above_width"),
    ("nanogpt_mup.py", "learning_rate / 10", "learning_rate * 10", "floor_above_peak"),
    ("nanogpt_mup.py", "weight_decay = 0.0", "weight_decay = 1e-1", "weight_decay_not_scaled"),
    ("nanogpt_mup.sh", "attention_scaling=False", "attention_scaling=True", "attention_scale"),
    ("nanogpt_mup.sh", "--weight_decay=0.0", "--weight_decay=0.1", "weight_decay_not_scaled"),
    ("nanogpt_mup.sh", "--min_lr=2e-4", "--min_lr=2e-2", "floor_above_peak"),
    ("nanogpt_mup.sh", "output_alpha=1.0", "output_alpha=$mult", "width_cancelled"),
    ("heredoc.sbatch", '"WarmupCosineLR"', '"WarmupDecayLR"', "absolute_scheduler"),
    ("heredoc.sbatch", "WARMUP=500", "WARMUP=50000", "warmup_beyond_run"),
    ("heredoc.sbatch", '"lr": $LR,', '"lr": $LR, "adam_w_mode": false,', "coupled_l2"),
    (
        "cerebras_gpt.yaml",
        "output_logits_scale: 0.1",
        "output_logits_scale: 10",
        "logits_direction",
    ),
    ("cerebras_gpt.yaml", "decoder_kernel: 0.1", "decoder_kernel: 10", "hidden_lr_not_scaled"),
    ("cerebras_gpt.yaml", "adjust_learning_rate:\n    d", "x:\n    d", "hidden_lr_not_scaled"),
    ("cerebras_gpt.yaml", "kernel: 0.1", "kernel: 0.1\n    embedding: 0.1", "embedding_lr_divided"),
    ("cerebras_gpt.yaml", "std: 0.0253", "std: 0.08", "init_std_not_scaled"),
    ("cerebras_gpt.yaml", "dot_by_d: true", "dot_by_d: false", "default_attention_multiplier"),
    ("cerebras_gpt.yaml", "decay: 0.0", "decay: 0.1", "weight_decay_not_scaled"),
    ("torchtitan.py", 'name="AdamW"', 'name="Adam"', "coupled_l2"),
    ("olmo_core.py", "dict(lr=LR / M, w", "dict(lr=LR, w", "hidden_lr_not_scaled"),
    ("olmo_core.py", "dict(lr=LR / M, w", "dict(lr=LR * M, w", "hidden_lr_not_scaled"),
    ("litgpt.yaml", "torch.optim.AdamW", "mup.MuAdamW", "one_lr_written"),
    (
        "nanogpt_mup.py",
        "n_layer = 12",
        "depth_alpha_enabled = True; depth_alpha_exp = -1.0",
        "growing_branches",
    ),
    (
        "megatron.sh",
        "--min-lr",
        "--lr-warmup-samples 9 --lr-decay-samples 8 --min-lr",
        "warmup_beyond_run",
    ),
    ("axolotl.yml", "warmup_steps: 20", "warmup_steps: 2000", "warmup_beyond_run"),
    ("axolotl.yml", "cosine_min_lr_ratio: 0.1", "cosine_min_lr_ratio: 10", "floor_above_peak"),
]
MODEL_FAULTS = [  # (file, changes, rule)
    ("llama.json", {"logits_scaling": 8.0}, "unread_multiplier"),
    ("llama.json", {"model_type": "qwen3", "embedding_multiplier": 12.0}, "unread_multiplier"),
    ("llama.json", {"model_type": "mistral", "residual_multiplier": 0.22}, "unread_multiplier"),
    ("llama.json", {"scale_emb": 12, "scale_depth": 1.4}, "unread_multiplier"),
    ("llama.json", {"mup_base_width": 256}, "no_mup_key"),
    ("granite.json", {"scale_emb": 12}, "unread_multiplier"),
    ("granite.json", {"logits_scaling": 0.5}, "logits_direction"),
    ("granite_published.json", {"logits_scaling": 0.125}, "logits_direction"),
    ("granite.json", {"attention_multiplier": 8.0}, "default_attention_multiplier"),
    ("granite.json", {"attention_multiplier": 1.0}, "default_attention_multiplier"),
    ("granite.json", {"attention_multiplier": 64**-2}, "default_attention_multiplier"),
    ("granite.json", {"residual_multiplier": 4.5}, "growing_branches"),
    ("llama.json", {"model_type": None, "logits_scaling": 8.0}, "unread_multiplier"),
    ("granite.json", {"logit_scaling": 2.0}, "misspelt_key"),
    ("vision.json", {"text_config": GRANITE | {"logits_scaling": 0.5}}, "logits_direction"),
    (
        "vision.json",
        {"model_type": "llava", "text_config": LLAMA | {"logits_scaling": 8}},
        "unread_multiplier",
    ),
    ("minicpm3.json", {"dim_model_base": 5120}, "base_above_width"),
    ("minicpm3.json", {"logits_scaling": 8.0}, "unread_multiplier"),
    ("falcon.json", {"lm_head_multiplier": 25.6}, "logits_direction"),
    ("hyper.json", {"logits_scaling": 8.0}, "logits_direction"),
    ("btlm.json", {"mup_width_scale": 10.0}, "base_above_width"),
]
FOLDER_FAULTS = [  # (changes of config.json, {group: changes}, rule)
    ({"initializer_range": 0.02}, {}, "init_contradicts"),
    ({"tie_word_embeddings": True}, {}, "tied_head_has_group"),
    ({}, {0: {"lr": 2e-3}}, "embedding_lr_divided"),
    ({}, {4: {"lr": 5e-4}}, "readout_divided_twice"),
    ({}, {4: {"lr": 8e-3}}, "readout_not_scaled"),
    ({}, {2: {"weight_decay": 0.1}}, "decay_on_gains"),
    ({}, {3: {"weight_decay": 0.1}}, "decay_on_gains"),
    ({}, {1: {"weight_decay": 0.1}}, "weight_decay_not_scaled"),
    ({}, {1: {"weight_decay": 0.025}}, "weight_decay_not_scaled"),
    ({}, {index: {"eps": 1e-8} for index in range(5)}, "eps_not_scaled"),
    ({"initializer_range": 0.02}, {1: {"init_std": 0.02}}, "init_std_not_scaled"),
    ({}, {3: {"patterns": ["^model.embed_tokens.weight$"]}}, "duplicate_group"),
    ({}, {0: {"family": "muon"}}, "muon_on_embeddings"),
]


def write_text(folder, name, text):
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def write_folder(folder, config, changes):
    write_text(folder, "config.json", FOLDER | config)
    groups = [group | changes.get(index, {}) for index, group in enumerate(GROUPS)]
    write_text(folder, "param_groups.json", {"groups": groups})
    return folder


def found_rules(path):
    return {finding["rule"] for finding in lint(path)["findings"]}


def planted_faults(folder):
    """(name, path, rule) of each planted fault, written to its own folder."""
    written = [
        (name, TEXTS[name].replace(old, new, 1), rule) for name, old, new, rule in TEXT_FAULTS
    ]
    written += [(name, MODELS[name] | changed, rule) for name, changed, rule in MODEL_FAULTS]
    for index, (name, content, rule) in enumerate(written):
        (folder / str(index)).mkdir()
        yield name, write_text(folder / str(index), name, content), rule
    for index, (config, changes, rule) in enumerate(FOLDER_FAULTS):
        place = folder / f"folder{index}"
        place.mkdir()
        yield "folder", write_folder(place, config, changes), rule


def measure(folder):
    """(planted faults, missed ones, findings beside the planted one, number of findings)."""
    faults = list(planted_faults(folder))
    found = [found_rules(path) for _, path, _ in faults]
    missed = [
        (name, rule)
        for (name, _, rule), rules in zip(faults, found, strict=True)
        if rule not in rules
    ]
    beside = [
        (name, rule, rules - {rule})
        for (name, _, rule), rules in zip(faults, found, strict=True)
        if rules - {rule}
    ]
    return faults, missed, beside, sum(len(rules) for rules in found)


def test_recall_and_precision_on_planted_faults(tmp_path):
    """A fault counts as found under the rule that names its cause; other findings are false."""
    faults, missed, beside, findings = measure(tmp_path)
    false = sum(len(rules) for _, _, rules in beside)
    recall, precision = 1 - len(missed) / len(faults), 1 - false / findings
    print(f"{len(faults)} faults in {len({name for name, _, _ in faults})} kinds of file: recall")
    print(f"{recall:.3f} (missed {missed}), precision {precision:.3f} (beside {beside})")
    assert len(faults) > 100
    assert recall >= 0.97
    assert precision >= 0.97


def test_planted_faults_change_their_file():
    assert all(old in TEXTS[name] for name, old, _, _ in TEXT_FAULTS)


@pytest.mark.parametrize("name", [*TEXTS, *MODELS])
def test_a_correct_file_has_no_findings(tmp_path, name):
    path = FILES / name if name in TEXTS else write_text(tmp_path, name, MODELS[name])
    assert lint(path)["findings"] == []


def test_correct_groups_beside_their_config_have_no_findings(tmp_path):
    assert lint(write_folder(tmp_path, {}, {}))["findings"] == []


STACK_OF = {
    "axolotl.yml": "axolotl",
    "cerebras.yaml": "cerebras",
    "cerebras_gpt.yaml": "cerebras",
    "deepspeed.json": "deepspeed",
    "fairseq2.yaml": "fairseq2",
    "heredoc.sbatch": "deepspeed",
    "jobconfig.py": "torchtitan",
    "levanter.yaml": "levanter",
    "litgpt.yaml": "litgpt",
    "llm_foundry.yaml": "llm-foundry",
    "lm_engine.yml": "lm-engine",
    "megatron.sh": "megatron",
    "megatron.yaml": "megatron",
    "nanogpt_mup.py": "nanogpt-mup",
    "nanogpt_mup.sh": "nanogpt-mup",
    "nanotron.yaml": "nanotron",
    "neox.yml": "gpt-neox",
    "olmo_core.py": "olmo-core",
    "torchtitan.py": "torchtitan",
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_stack_is_recognised(name):
    assert lint(FILES / name)["stack"] == STACK_OF[name]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.sh", "python pretrain.py --use-mup $MORE --hidden-size 8 --lr $X", "$X"),
        ("a.sh", "torchrun pretrain_gpt.py --use-mup $EXTRA", "$EXTRA"),
        (
            "a.sh",
            'M=$(echo "8/2" | bc)\ntrain.py --mup_width_multiplier=$M',
            "a command computes it",
        ),
        ("a.sh", "A=(--lr 1)\nif [ $X ]; then A+=(--use-mup); fi\ntrain.py ${A[@]}", "--use-mup"),
        (
            "a.sh",
            "if [ $X ]; then\nLR=1\nfi\nLR=2\nif [ $Y ]; then LR=3; fi\nt.py --lr $LR",
            "--lr",
        ),
        ("a.sh", "train.py --lr 1e-3 --deepspeed_config ds.json", "ds.json"),
        ("a.sh", "train.py --lr 1\ncat <<E\n --lr isn't set\nE\n", "--lr isn't set"),
        ("a.py", "config = dict(lr=base_lr() / 4, weight_decay=0.1)", "config.lr"),
        ("a.py", "def optim_config():\n    return other.build()\n", "optim_config"),
        ("a.py", "cfg = base_config()\ncfg.optimizer.lr = 1e-3\n", "cfg.(other settings)"),
        ("a.yaml", "optimizer: {name: adamw, lr: '{{ lr }}'}\n", "optimizer.lr"),
        ("a.yaml", "optimizer: {name: adamw, lr: '${other.lr}'}\n", "optimizer.lr"),
        ("a.yaml", "a: 1\n---\nb: 2\n", "1 more YAML document"),
        (
            "a.json",
            {"model_type": "newmodel", "hidden_size": 64},
            "model_type 'newmodel' not recognised",
        ),
        ("a.json", MODELS["remote.json"], "auto_map"),
        ("a.json", {"something": 1}, "stack not recognised: few rules apply"),
        ("megatron.sh", TEXTS["megatron.sh"], ""),
    ],
)
def test_what_is_not_read_is_said_in_place_of_no_known_faults(
    tmp_path, capsys, name, content, named
):
    """Only a file that was read in full has "no known faults"."""
    path = write_text(tmp_path, name, content)
    assert cli.main(["lint", str(path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    if not named:
        assert lines == ["not read: " + HEAD_IN_MEGATRON]
        return
    assert any(line.startswith("not read: ") and named in line for line in lines)
    assert "no known faults" not in last
    assert last.endswith("nothing found in what was read")


def test_a_key_that_other_arguments_may_set_is_no_fault(tmp_path):
    text = "pretrain.py --use-mup --hidden-size 1024 ${MORE}"
    assert not found_rules(write_text(tmp_path, "a.sh", text))


def test_the_base_width_of_a_fork_is_no_fault(tmp_path):
    text = "pretrain.py --use-mup --hidden-size 1024 --mup-multiplier "
    for value in ("4", "$M"):
        assert not found_rules(write_text(tmp_path, "a.sh", text + value))


def test_groups_in_another_file_are_named(tmp_path):
    content = TEXTS["lm_engine.yml"].replace("params_group_method: mup", "param_groups: mup.yml")
    report = lint(write_text(tmp_path, "a.yml", content))
    assert report["findings"] == []
    assert report["not_read"] == ["the param groups, which stand in 'mup.yml'"]


def test_a_micro_batch_in_lm_engine_does_not_make_it_megatron(tmp_path):
    content = TEXTS["lm_engine.yml"] + "mixer: {num_attention_heads: 32}\n"
    assert lint(write_text(tmp_path, "a.yml", content))["stack"] == "lm-engine"
    text = "learning_rate = 6e-4\ngradient_accumulation_steps = 40\nblock_size = 8\nmax_iters = 9\n"
    assert lint(write_text(tmp_path, "a.py", text))["stack"] == "nanogpt"


def test_a_group_for_gains_and_biases_counts_as_that_of_gains(tmp_path):
    group = "    groups:\n    - {params: '.*(norm|bias).*', lr: 4.0e-3, weight_decay: 0.0}\n"
    text = TEXTS["fairseq2.yaml"].replace("    weight_decay: 0.0", "    weight_decay: 0.1", 1)
    text = text.replace("    groups:\n", group)
    assert "(norm|bias)" in text
    assert not found_rules(write_text(tmp_path, "a.yaml", text))


def test_a_missing_key_is_no_fault_if_its_value_is_not_read(tmp_path):
    known = "train.py --use-mup --hidden-size 1024"
    assert found_rules(write_text(tmp_path, "a.sh", known)) == {"half_of_a_base"}
    assert not found_rules(write_text(tmp_path, "b.sh", known + " --mup-base-hidden-size $BASE"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr = 1024 / 256", 4.0),
        ("lr = 2**-0.5", 2**-0.5),
        ("base = 3e-4\nlr = base * 2", 6e-4),
        ("import math\nlr = math.sqrt(16) / 4", 1.0),
        ("lr = dict(a=1, b=2)['a']", 1),
        ("lr = dict(a=1, b=2)['c']", None),
        ("lr = dict(a=1)[[1], 2]", None),
        ("lr = __import__('os').getpid()", None),
        ("lr = 9**9**9", None),
        ("lr: float = 1e-3", 1e-3),
    ],
)
def test_python_constants_are_folded_and_never_evaluated(text, value):
    assert read_python(text).content.get("lr") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train --lr 1e-3", 1e-3),
        ("train --lr=1e-3", 1e-3),
        ("LR=1e-3\ntrain --lr $LR", 1e-3),
        ("LR=1e-3; train --lr ${LR}", 1e-3),
        ("train --lr ${LR:-1e-3}", 1e-3),
        ("LR=1e-3\ntrain --lr ${LR:?set it}", 1e-3),
        ("A=(--lr 1e-3)\ntrain ${A[@]}", 1e-3),
        ('A=(\n --wd 0 # no\n --lr 1e-3\n)\ntrain "${A[@]}"', 1e-3),
        ('A="--lr 1e-3"\nA+=" --b 2"\ntrain $A', 1e-3),
        ('A="--b 2"\nA="$A --lr 1e-3"\ntrain $A', 1e-3),
        ("srun bash -c 'train --lr 1e-3 --x 2'", 1e-3),
        ('srun -N 2 bash -c "cd x; train \\\n --lr 1e-3 --x 2"', 1e-3),
        ("W=$((4 * 256))\ntrain --lr $((W / 256))", 4),
        ("sbatch <<EOT\n#!/bin/bash\ntrain --lr 1e-3\nEOT\n", 1e-3),
        ("python train.py optim.lr=1e-3", None),
        ('X="$(dirname "$0")"\ntrain --lr 1e-3', 1e-3),
        ("train --lr $(python -c 'print(1)')", None),
        ("# train --lr 1\ntrain --lr 1e-3", 1e-3),
    ],
)
def test_shell_arguments_are_read_wherever_they_stand(text, value):
    assert read_shell(text).content.get("lr") == value


def test_arguments_in_yaml_are_read(tmp_path):
    fault = "--use-mup --hidden-size 256 --mup-base-hidden-size 1024"
    for text in (
        f"MODEL_ARGS: {json.dumps(fault)}\n",
        f"command: [bash, -c, {json.dumps('train ' + fault)}]\n",
        f"args: {json.dumps(fault.split())}\n",
        f"args: {json.dumps(['--' + x.strip() for x in fault.split('--')[1:]])}\n",
        f"spec:\n  script: |\n    train \\\n      {fault}\n",
    ):
        assert "base_above_width" in found_rules(write_text(tmp_path, "a.yaml", text)), text


@pytest.mark.parametrize("form", ["LlamaConfig", "transformers.Qwen3Config"])
def test_models_in_python_are_checked(tmp_path, form):
    text = f"config = {form}(hidden_size=1024, logits_scaling=8.0)\n"
    assert found_rules(write_text(tmp_path, "a.py", text)) == {"unread_multiplier"}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("fits/2026-11-quickstart.json", "is a fit: use `scaletune predict"),
        ("sweeps/2026-11-quickstart.jsonl", "is a table of runs: use `scaletune fit"),
        ("configs/2026-11-quickstart/answer.json", "is the answer of a transfer"),
        ("configs/2026-11-quickstart/recipe/plan.json", "is the plan of every tensor"),
    ],
)
def test_files_of_scaletune_are_named_with_their_command(capsys, path, words):
    assert cli.main(["lint", str(FILES.parents[2] / path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_recipe_is_named_with_its_commands(capsys):
    assert cli.main(["lint", str(FILES.parents[2] / "configs" / "quickstart.toml")]) == 0
    assert "not read: the file, which is a recipe of scaletune" in capsys.readouterr().out
