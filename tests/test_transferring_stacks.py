"""All formats: their libraries load them, and reading them back gives the emitted plan."""

import ast
import dataclasses
import importlib.util
import json
import re
from fnmatch import fnmatch
from importlib import import_module

import pytest
import torch
import transformers
from test_transferring import (
    EVERYTHING,
    VOCAB,
    WIDE,
    draw_tokens,
    import_loader,
    in_float64,
    make_fit,
    train,
)
from torch.nn import functional as F

from scaletune import models, optim
from scaletune.errors import UserError
from scaletune.linting.lint import lint
from scaletune.records import Fit
from scaletune.transferring import FORMATS, one_std, prepare, transfer
from scaletune.transferring.fold_multipliers import fold
from scaletune.transferring.formats import (
    deepspeed,
    granite,
    hyperclovax,
    llama,
    nanogpt_mup,
    olmo_core,
    pytorch,
    recipe,
    torchtitan,
)
from scaletune.transferring.formats.unsupported import UNSUPPORTED
from scaletune.transferring.param_groups import rows_by_kind
from scaletune.transferring.read_back import UNREAD, plan_settings, read

CONFIGS = {
    "granite": (granite, "GraniteConfig", "GraniteForCausalLM"),
    "hyperclovax": (hyperclovax, "HyperCLOVAXConfig", "HyperCLOVAXForCausalLM"),
    "llama": (llama, "LlamaConfig", "LlamaForCausalLM"),
}
SCALED = {"parametrization.attention_multiplier": 2.0, "parametrization.residual_multiplier": 0.3}
OPTIONS = {"model.kv_heads": 2, "model.biases": True}


def build_model(folder, config, model, **changed):
    content = json.loads((folder / "config.json").read_text())
    return getattr(transformers, model)(getattr(transformers, config)(**content | changed)).eval()


def build_pair(name, prepared, folder):
    """Returns (transformers' model of the emitted config in float64, ours): one function."""
    emitter, config, model = CONFIGS[name]
    emitter.emit(prepared, folder)
    theirs, ours = build_model(folder, config, model).double(), models.build(prepared.target, VOCAB)
    rows = (
        fold(prepared.plan, prepared.multipliers, prepared.target.model)[0]
        if name == "llama"
        else one_std(prepared)[0]
    )
    theta = {
        old.name: new.init_std / old.init_std if old.init_std else 1.0
        for old, new in zip(prepared.plan, rows, strict=True)
    }
    loaded = theirs.load_state_dict(
        {key: w.double() * theta[key] for key, w in models.plain_state(ours).items()}, strict=False
    )
    assert not loaded.unexpected_keys
    assert loaded.missing_keys == (["lm_head.weight"] if prepared.target.model.tied else [])
    return theirs, ours


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, EVERYTHING | OPTIONS, {"form": "sp"}])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_declared(transferred, tmp_path, name, settings):
    emitter, config, _ = CONFIGS[name]
    emitter.emit(transferred(settings), tmp_path)
    content, cls = json.loads((tmp_path / "config.json").read_text()), getattr(transformers, config)
    assert content.keys() <= {field.name for field in dataclasses.fields(cls)} | {"model_type"}
    read_back = cls(**content)
    assert content == {key: getattr(read_back, key) for key in content}


@pytest.mark.parametrize(
    "form", ["mup_t3", "mup_t8", "mup_t9", "sp_per_layer", "ntk", "mean_field"]
)
@pytest.mark.parametrize("name", ["hyperclovax", "llama"])
def test_logits_are_ours(transferred, tmp_path, name, form):
    theirs, ours = build_pair(
        name, transferred(EVERYTHING | SCALED | OPTIONS | {"form": form}), tmp_path
    )
    with torch.no_grad():
        expected = ours(draw_tokens())[0]
        assert torch.allclose(
            theirs(draw_tokens()).logits.float(),
            expected,
            rtol=0,
            atol=1e-5 * float(expected.std()) + 1e-6,
        )


@pytest.mark.parametrize(
    "key", ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"]
)
@pytest.mark.parametrize("name", ["granite", "hyperclovax"])
def test_each_multiplier_changes_the_logits(transferred, tmp_path, name, key):
    emitter, config, model = CONFIGS[name]
    emitter.emit(transferred(EVERYTHING), tmp_path)
    theirs = build_model(tmp_path, config, model)
    other = build_model(
        tmp_path,
        config,
        model,
        **{key: 2 * json.loads((tmp_path / "config.json").read_text())[key]},
    )
    other.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        before, after = theirs(draw_tokens()).logits, other(draw_tokens()).logits
    if key == "logits_scaling":
        assert torch.allclose(after, before * (2 if name == "hyperclovax" else 0.5))
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("settings", [{}, EVERYTHING | SCALED, {"form": "sp_per_layer"}])
@pytest.mark.parametrize("name", ["hyperclovax", "llama"])
def test_their_model_trains_as_ours(transferred, tmp_path, name, settings):
    """Eight AdamW steps in float64 give the same losses.

    transformers' model has the groups and schedule of loader.py, our model has our own.
    """
    prepared = transferred({"optimizer.eps": 1e-4, "lr": 2e-2} | settings)
    theirs, ours = in_float64(*build_pair(name, prepared, tmp_path))
    attach, tokens, targets = import_loader(tmp_path), draw_tokens(), draw_tokens(1)
    opt = attach.make_optimizer(theirs)
    losses = train(
        lambda: F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()),
        opt,
        attach.make_scheduler(opt).step,
    )
    o, schedule = prepared.target.optimizer, prepared.target.schedule
    own_opt = torch.optim.AdamW(optim.groups(ours, prepared.plan), betas=(o.beta1, o.beta2))
    shares = iter([(step + 0.5) / 8 for step in range(1, 9)])
    optim.set_learning_rates(own_opt, schedule, 0.5 / 8)
    expected = train(
        lambda: ours(tokens, targets).sum(),
        own_opt,
        lambda: optim.set_learning_rates(own_opt, schedule, next(shares)),
    )
    assert losses == pytest.approx(expected, rel=1e-11)
    assert expected[-1] < expected[0] - 0.1


@pytest.mark.parametrize("name", ["llama", "pytorch"])
def test_the_loader_draws_the_folded_std(transferred, tmp_path, name):
    prepared = transferred(EVERYTHING | SCALED)
    {"llama": llama, "pytorch": pytorch}[name].emit(prepared, tmp_path)
    llama.emit(prepared, tmp_path / "llama")
    theirs = build_model(tmp_path / "llama", "LlamaConfig", "LlamaForCausalLM")
    import_loader(tmp_path).initialize(theirs)
    expected = {
        row.name: row.init_std
        for row in fold(prepared.plan, prepared.multipliers, prepared.target.model)[0]
    }
    for key, parameter in theirs.named_parameters():
        values = parameter.detach()
        assert float(values.std()) == pytest.approx(
            expected[key], rel=5 / (2 * values.numel()) ** 0.5
        ), key


@pytest.mark.parametrize("name", ["llama", "pytorch"])
def test_a_tied_head_that_needs_a_multiplier_is_refused(transferred, tmp_path, name):
    with pytest.raises(
        UserError,
        match=f"^format '{name}' has no logits multiplier, but the tied head needs one of 0.25: "
        f"set model.tied",
    ):
        {"llama": llama, "pytorch": pytorch}[name].emit(transferred({"model.tied": True}), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CONFIGS)
def test_at_the_base_size_it_is_the_ordinary_config(transferred, tmp_path, name):
    CONFIGS[name][0].emit(transferred({"width": 32}), tmp_path)
    content, groups = (
        json.loads((tmp_path / file).read_text()) for file in ("config.json", "param_groups.json")
    )
    neutral = {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
    assert {key: content[key] for key in neutral if key in content} == {
        key: neutral[key] for key in neutral if key in content
    }
    assert content["initializer_range"] == 0.2
    assert {group["lr"] for group in groups["groups"]} == {0.005}
    assert {group["eps"] for group in groups["groups"]} == {1e-8}


# --- reading back ---------------------------------------------------------------------------------


def approx(settings):
    return {name: pytest.approx(values, rel=1e-12) for name, values in settings.items()}


OWN_SHAPE = {  # settings that a stack requires of the target
    "granitemoe": {"model.family": "moe", "model.ffn_ratio": 1.0, "model.n_shared_experts": 1},
    "fairseq2": {"schedule.kind": "linear"},
    "llm_foundry": {"schedule.kind": "linear"},
}
# test_transferring_native.py reads these back.
NATIVE = ("megatron", "megatron_bridge", "cerebras", "lm_engine", "fairseq2", "llm_foundry")
BIASED = {"granite", "hyperclovax", "llama", "pytorch", "recipe", "deepspeed"}
KINDS = [
    {},
    EVERYTHING | SCALED | {"model.kv_heads": 2},
    {"form": "mup_t3"},
    {"form": "ntk"},
    {"width": 32},
]


def emit(name, prepared, folder):
    return import_module(f"scaletune.transferring.formats.{name}").emit(prepared, folder)


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in (*UNREAD, *NATIVE)])
def test_what_is_read_back_is_the_plan(transferred, tmp_path, name, settings):
    prepared = transferred(
        OWN_SHAPE.get(name, {}) | settings | (OPTIONS if name in BIASED and settings else {})
    )
    emit(name, prepared, tmp_path)
    assert read(tmp_path, prepared.target.model) == approx(plan_settings(prepared))


@pytest.mark.parametrize("name", UNREAD)
def test_a_format_that_cannot_be_read_back_gives_the_reason(transferred, tmp_path, name):
    emit(name, transferred(GPT2 if name == "nanogpt_mup" else {}), tmp_path)
    reason = (
        "must have a plan.json or a param_groups.json" if name == "nanogpt_mup" else UNREAD[name]
    )
    with pytest.raises(UserError, match=reason):
        read(tmp_path)
    assert name in FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_at_the_base_size_every_tensor_has_the_base_values(transferred, tmp_path, name):
    """At m = 1 the settings are those of a config without a transfer.

    There is one lr, one eps and one init std, weight decay on matrices only, and no multiplier.
    """
    prepared = transferred(
        (GPT2 if name == "nanogpt_mup" else OWN_SHAPE.get(name, {})) | {"width": 32}
    )
    emit(name, prepared, tmp_path)
    if name == "nanogpt_mup":
        text = (tmp_path / "scaletune_nanogpt_mup.py").read_text()
        assert "mup_width_multiplier = 1.0\n" in text
        assert "depth_multiplier = 1.0\n" in text
        assert "learning_rate = 0.005\n" in text
        return
    content = json.loads(
        (tmp_path / ("plan.json" if name == "recipe" else "param_groups.json")).read_text()
    )
    rows = content["tensors"] if name == "recipe" else content["groups"]
    assert {(row["lr"], row["eps"]) for row in rows} == {(0.005, 1e-8)}
    assert {(row["init_std"], row["weight_decay"]) for row in rows} == {(0.2, 0.1), (0.0, 0.0)}
    if name == "recipe":
        assert content["multipliers"] == {
            "embedding": 1.0,
            "attention": 0.25,
            "residual": 1.0,
            "logits": 1.0,
        }


@pytest.mark.parametrize(
    "emitter", [granite, hyperclovax, recipe], ids=lambda module: module.__name__.split(".")[-1]
)
def test_a_tied_plan_is_read_back_with_what_multiplies_its_logits(transferred, tmp_path, emitter):
    prepared = transferred(EVERYTHING | {"model.tied": True})
    emitter.emit(prepared, tmp_path)
    settings = read(tmp_path)
    assert settings == approx(plan_settings(prepared))
    assert settings["logits"]["multiplier"] == pytest.approx(0.7 / 4 / 3)


def test_a_changed_number_is_another_plan(transferred, tmp_path):
    prepared = transferred()
    granite.emit(prepared, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"logits_scaling": 1.0}))
    assert read(tmp_path)["lm_head.weight"] != approx(plan_settings(prepared))["lm_head.weight"]


def test_a_parameter_without_a_pattern_is_refused(transferred, tmp_path):
    pytorch.emit(transferred(), tmp_path)
    with pytest.raises(
        UserError,
        match=r"must have a pattern for every parameter, but none matches "
        r"'model.layers.0.self_attn.q_proj.bias'",
    ):
        read(tmp_path, transferred(OPTIONS).target.model)
    with pytest.raises(UserError, match=r"has no config.json with the model's shape: pass `model`"):
        read(tmp_path)
    with pytest.raises(
        UserError,
        match=r"^a folder to read back must have a plan.json or a param_groups.json, but .* has "
        r"neither$",
    ):
        read(tmp_path / "none")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_stack_that_cannot_hold_the_plan_is_refused_with_a_way_out(tiny, tmp_path, name):
    with pytest.raises(
        UserError, match=rf"^format `{name}` is not supported: .*; emit '(pytorch|granite)'"
    ):
        transfer(make_fit(tiny), tiny(WIDE), [name], tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_another_version_of_the_stack_is_refused(tiny, tmp_path, name):
    with pytest.raises(
        UserError,
        match=f"^format `{name}` supports version {FORMATS[name]} of its stack, but got '0.0'$",
    ):
        transfer(make_fit(tiny), tiny(WIDE), [f"{name}@0.0"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_supported_version_may_be_named(tiny, tmp_path):
    assert transfer(make_fit(tiny), tiny(WIDE), [f"llama@{FORMATS['llama']}"], tmp_path)["files"][
        0
    ] == str(tmp_path / "llama/config.json")


@pytest.mark.parametrize(
    ("column", "ranges", "factor"),
    [
        ("n_params", [1e3, 1e4], 32.8),
        ("tokens", [30, 60], 34.1),
        ("batch_tokens", [1e4, 2e4], 39.1),
        ("depth", [64, 128], 32),
    ],
)
def test_a_target_far_beyond_the_proxies_needs_force(tiny, column, ranges, factor):
    fit = dataclasses.replace(make_fit(tiny), ranges={column: ranges})
    with pytest.raises(
        UserError,
        match=f"^a target must be at most 30x outside the fitted range, but {column} .* is "
        f"{factor}x",
    ):
        prepare(fit, tiny(WIDE))
    assumptions = prepare(fit, tiny(WIDE), force=True).evidence["assumptions"]
    assert [line for line in assumptions if line.startswith(f"forced: {column} ")]


def test_a_transfer_at_thirty_times_needs_no_force(tiny):
    fit = dataclasses.replace(make_fit(tiny), ranges={"tokens": [1, 2048 / 30]})
    assert not [
        line for line in prepare(fit, tiny(WIDE)).evidence["assumptions"] if "forced" in line
    ]


@pytest.mark.parametrize("interval", [{}, {"lr": None}, {"lr": [0.01, float("inf")]}])
def test_a_fit_without_a_bounded_lr_interval_is_refused(tiny, monkeypatch, interval):
    unbounded = dataclasses.replace(
        make_fit(tiny).predict(n_params=1e4, tokens=2048), interval=interval
    )
    monkeypatch.setattr(Fit, "predict", lambda self, **at: unbounded)
    with pytest.raises(
        UserError,
        match=r"^a transfer needs a bounded interval of lr, but the fit's interval at this "
        r"target is ",
    ):
        prepare(make_fit(tiny), tiny(WIDE))


# --- stacks that group by patterns ----------------------------------------------------------------

IGNORE_WARNINGS = pytest.mark.filterwarnings("ignore")  # warnings of imported libraries
PATTERN_STACKS = {
    "torchtitan": (torchtitan, "scaletune_torchtitan"),
    "olmo_core": (olmo_core, "scaletune_olmo_core"),
}


def import_emitted(name, prepared, folder):
    """Imports the emitted module; skips the test where the stack is not installed."""
    emitter, stem = PATTERN_STACKS[name]
    emitter.emit(prepared, folder)
    pytest.importorskip(name, exc_type=ImportError)
    spec = importlib.util.spec_from_file_location(stem, folder / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected_rows(emitter, prepared):
    """The stack's regex or glob -> the row of the plan that it must give."""
    rows, _ = fold(prepared.plan, prepared.multipliers, prepared.target.model)
    return {emitter.NAMES[kind]: row for kind, row in rows_by_kind(rows).items()}


@IGNORE_WARNINGS
@pytest.mark.parametrize("settings", [{}, EVERYTHING | SCALED | {"model.kv_heads": 2}])
def test_torchtitan_builds_the_model_and_its_groups(transferred, tmp_path, settings):
    prepared = transferred(settings)
    module = import_emitted("torchtitan", prepared, tmp_path)
    config = module.model_config()
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    container = module.optimizer_config("for-loop").build(model_parts=[model])
    names, count = {id(parameter): name for name, parameter in model.named_parameters()}, 0
    for group in (group for optimizer in container.optimizers for group in optimizer.param_groups):
        for parameter in group["params"]:
            row = next(
                row
                for p, row in expected_rows(torchtitan, prepared).items()
                if re.search(p, names[id(parameter)])
            )
            assert (group["lr"], group["weight_decay"], group["eps"]) == (
                row.lr,
                row.weight_decay,
                row.eps,
            ), names[id(parameter)]
            values, count = parameter.detach(), count + 1
            assert float(values.std()) == pytest.approx(
                row.init_std, rel=5 / (2 * values.numel()) ** 0.5
            ), names[id(parameter)]
    assert count == len(names) == len(prepared.plan)


@IGNORE_WARNINGS
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_torchtitans_schedule_keeps_the_ratios_of_the_groups(transferred, tmp_path, kind):
    prepared = transferred({"schedule.kind": kind, "schedule.warmup": 0.25, "schedule.floor": 0.1})
    module = import_emitted("torchtitan", prepared, tmp_path)
    model = module.model_config().build()
    container = module.optimizer_config("for-loop").build(model_parts=[model])
    peaks = [group["lr"] for group in container.optimizers[0].param_groups]
    scheduler = module.lr_scheduler_config().build(optimizers=container, training_steps=8)
    for _ in range(8):
        now = [group["lr"] for group in container.optimizers[0].param_groups]
        assert [lr / now[0] for lr in now] == pytest.approx([lr / peaks[0] for lr in peaks])
        container.step()
        scheduler.step()


@IGNORE_WARNINGS
@pytest.mark.parametrize(
    "settings", [{"schedule.kind": "cosine"}, EVERYTHING | SCALED | {"model.kv_heads": 2}]
)
def test_olmo_core_builds_the_model_and_its_groups(transferred, tmp_path, settings):
    prepared = transferred(settings)
    module = import_emitted("olmo_core", prepared, tmp_path)
    model = module.model_config().build(init_device="cpu")
    module.start(model)
    module.scheduler()
    names, count = {id(parameter): name for name, parameter in model.named_parameters()}, 0
    for group in module.optimizer_config().build(model).param_groups:
        for parameter in group["params"]:
            row = next(
                row
                for p, row in expected_rows(olmo_core, prepared).items()
                if fnmatch(names[id(parameter)], p)
            )
            assert (group["lr"], group["weight_decay"], group["eps"]) == (
                row.lr,
                row.weight_decay,
                row.eps,
            ), names[id(parameter)]
            values, count = parameter.detach(), count + 1
            if row.init_std:
                assert float(values.std()) == pytest.approx(
                    row.init_std, rel=5 / (2 * values.numel()) ** 0.5
                ), names[id(parameter)]
    assert count == len(names) == len(prepared.plan)


@pytest.mark.parametrize("name", PATTERN_STACKS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model.tied": True},
            "^format '.*' (initializes head and embedding separately|has no tied head): set "
            "model.tied = false",
        ),
        (
            {"model.biases": True},
            "^the stack must have a tensor for each of the target's, but has none for "
            "'self_attn.q_proj.bias'",
        ),
        ({"model.norm": "layer"}, "needs `model.norm` 'rms', but the target has 'layer'"),
        (
            {"optimizer.family": "muon"},
            "supports `optimizer.family` 'adamw', but got 'muon'",
        ),
    ],
)
def test_unsupported_settings_are_refused(transferred, tmp_path, name, settings, message):
    with pytest.raises(UserError, match=message):
        PATTERN_STACKS[name][0].emit(transferred(settings), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_absolute_floor_is_refused(transferred, tmp_path):
    with pytest.raises(
        UserError,
        match=r"^OLMo-core's WSD ends at one lr for all groups, so `schedule.floor` must be 0, "
        r"but got 0.1",
    ):
        olmo_core.emit(transferred({"schedule.floor": 0.1}), tmp_path)


@pytest.mark.parametrize(
    "emitter", [torchtitan, olmo_core, deepspeed], ids=lambda module: module.__name__.split(".")[-1]
)
def test_the_param_groups_beside_the_module_are_the_plan(transferred, tmp_path, emitter):
    prepared = transferred(EVERYTHING | SCALED)
    emitter.emit(prepared, tmp_path)
    assert read(tmp_path, prepared.target.model) == approx(plan_settings(prepared))
    assert lint(tmp_path)["findings"] == []


@pytest.mark.parametrize("name", PATTERN_STACKS)
def test_every_emitted_module_compiles(transferred, tmp_path, name):
    PATTERN_STACKS[name][0].emit(transferred(), tmp_path)
    text = (tmp_path / f"{PATTERN_STACKS[name][1]}.py").read_text()
    functions = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert {"model_config", "optimizer_config"} <= functions


def test_deepspeed_leaves_optimizer_and_schedule_to_the_loader(transferred, tmp_path):
    deepspeed.emit(transferred(), tmp_path)
    content = json.loads((tmp_path / "deepspeed.json").read_text())
    assert content == {
        "train_batch_size": 8,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    assert lint(tmp_path / "deepspeed.json") == {
        "path": str(tmp_path / "deepspeed.json"),
        "stack": "deepspeed",
        "findings": [],
        "not_read": [],
    }


# --- nanoGPT-mup ----------------------------------------------------------------------------------

GPT2 = {
    "model.norm": "layer",
    "model.mlp": "gelu",
    "model.positions": "learned",
    "model.max_positions": 32,
    "model.tied": True,
    "model.ffn_ratio": 4.0,
    "model.biases": True,
    "schedule.kind": "cosine",
}
GOLDEN = {
    "n_layer": 2,
    "n_head": 8,
    "n_embd": 128,
    "block_size": 32,
    "bias": True,
    "dropout": 0.0,
    "init_std": 0.2,
    "mup_enabled": True,
    "mup_width_multiplier": 4.0,
    "mup_input_alpha": 3.0,
    "mup_output_alpha": 0.7,
    "mup_disable_attention_scaling": True,
    "mup_disable_hidden_lr_scaling": False,
    "depth_alpha_enabled": True,
    "depth_multiplier": 2.0,
    "depth_alpha_exp": 0.5,
    "learning_rate": 0.005,
    "decay_lr": True,
    "warmup_iters": 1,
    "max_iters": 8,
    "lr_decay_iters": 8,
    "min_lr": 0.0,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "adam_eps": 1e-08,
    "grad_clip": 1.0,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
}


def nanogpt_settings(s, name, vector):
    """(init std, lr, weight decay, eps) that nanoGPT-mup's model.py at 39044043 computes."""
    m, depth, alpha = s["mup_width_multiplier"], s["depth_multiplier"], s["depth_alpha_exp"]
    inside, lr, eps = "layers." in name, s["learning_rate"], s["adam_eps"] / m
    std, decay = (0.0, 0.0) if vector else (s["init_std"], s["weight_decay"])
    if inside:
        lr, eps = lr * depth ** (alpha - 1), eps * depth**-alpha
    if inside and not vector:
        lr, decay, std = lr / m, decay * m, std / m**0.5
    return std, lr, decay, eps


@pytest.mark.parametrize(
    "settings",
    [
        EVERYTHING,
        {},
        {"model.depth": 8},
        {"width": 32},
        {"parametrization.base_depth": 1, "parametrization.depth_alpha": 1},
    ],
)
def test_nanogpt_mup_makes_the_plan_of_its_settings(transferred, tmp_path, settings):
    prepared = transferred(GPT2 | settings)
    nanogpt_mup.emit(prepared, tmp_path)
    path = tmp_path / "scaletune_nanogpt_mup.py"
    assigned = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(path.read_text()).body
    }
    for row in prepared.plan:
        expected = (row.init_std, row.lr, row.weight_decay, row.eps)
        assert nanogpt_settings(assigned, row.name, row.role == "vec") == pytest.approx(
            expected, rel=1e-12
        ), row.name
    residual = assigned["depth_multiplier"] ** -assigned["depth_alpha_exp"]
    multipliers = {
        "embedding": assigned["mup_input_alpha"],
        "residual": residual,
        "logits": assigned["mup_output_alpha"] / assigned["mup_width_multiplier"],
    }
    assert prepared.multipliers == pytest.approx(multipliers | {"attention": 16**-0.5})
    assert lint(path)["stack"] == "nanogpt-mup"
    assert lint(path)["findings"] == lint(path)["not_read"] == []
    if settings == EVERYTHING:
        assert assigned == GOLDEN


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.tied": False}, "^nanoGPT-mup needs `model.tied` True, but the target has False$"),
        (
            {"form": "mup_t9"},
            "^nanoGPT-mup needs `parametrization.form` 'mup_t8', but the target has 'mup_t9'$",
        ),
        (
            {"parametrization.residual_multiplier": 0.3},
            "needs `parametrization.residual_multiplier` 1.0, but the target has 0.3$",
        ),
        (
            {"optimizer.decay": "independent"},
            "^nanoGPT-mup needs `optimizer.decay` 'torch', but the target has 'independent'",
        ),
        (
            {"schedule.kind": "wsd"},
            "^format 'nanogpt_mup' supports `schedule.kind` 'cosine', but got 'wsd'$",
        ),
        (
            {"model": {"family": "mlp", "width": 128}, "seq_len": 1},
            "^nanoGPT-mup needs `model.family` 'transformer'",
        ),
    ],
)
def test_settings_that_nanogpt_mup_does_not_support_are_refused(
    transferred, tmp_path, settings, message
):
    with pytest.raises(UserError, match=message):
        nanogpt_mup.emit(
            transferred(
                ({} if "model" in settings else GPT2) | {"schedule.kind": "cosine"} | settings
            ),
            tmp_path,
        )
    assert not list(tmp_path.iterdir())
