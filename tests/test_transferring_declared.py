"""Formats of stacks too large to install: declared keys, configs, schedules, errors, loaders."""

import json
import math
import re
from fnmatch import fnmatch

import pytest
import torch
from test_transferring import WIDE, make_fit
from test_transferring_native import (
    COSINE,
    DECLARED,
    FEW,
    RESIDUAL,
    SCALED,
    STACKS,
    WIDTH,
    emit_and_read,
    fake_megatron_modules,
    import_file,
    stack_names,
    toy_model,
    transferred,  # noqa: F401
)

from scaletune import optim
from scaletune.errors import UserError
from scaletune.linting.lint import lint
from scaletune.transferring import FORMATS, transfer
from scaletune.transferring.formats import (
    cerebras,
    fairseq2,
    llm_foundry,
    lm_engine,
    megatron,
    megatron_bridge,
)

SHARES = {"schedule.warmup": 0.25, "schedule.floor": 0.1}
WSD = {"schedule.kind": "wsd", "schedule.decay": 0.25}


# --- declared keys --------------------------------------------------------------------------------


def megatron_sections(config, declared):
    yield config, [key.replace("-", "_") for key in declared["arguments"]]


def fairseq2_sections(config, declared):
    for section in ("model", "optimizer", "lr_scheduler", "trainer", "regime"):
        name = {"lr_scheduler": "LRScheduler"}.get(section, section.capitalize())
        yield config[section], declared[name + "Section"]
    yield config["model"]["config_overrides"], declared["LLaMAConfig"]
    yield config["optimizer"]["config"], declared["AdamWConfig"]
    for group in config["optimizer"]["config"]["groups"]:
        yield group, declared["AdamWGroupConfig"]
    kind = {
        "cosine_annealing": "CosineAnnealingLRConfig",
        "polynomial_decay": "PolynomialDecayLRConfig",
    }[config["lr_scheduler"]["name"]]
    yield config["lr_scheduler"]["config"], declared[kind]


def llm_foundry_sections(config, declared):
    yield config, declared["TrainConfig"]
    yield config["model"], declared["MPTConfig"]
    for section in ("attn_config", "ffn_config", "init_config"):
        yield config["model"][section], declared[section]
    yield config["optimizer"], declared["optimizer"]
    yield config["scheduler"], declared["scheduler"]
    for group in config["optimizer"]["param_groups"]:
        yield group, declared["param_group"]


def lm_engine_sections(config, declared):
    for section, fields in config.items():
        yield fields, declared[section]
    model_config = config["model_args"]["pretrained_config"]
    yield model_config, declared["pretrained_config"]
    # The files of lm-engine itself have every key.
    assert model_config.keys() == set(declared["pretrained_config"])
    yield config["optimizer_args"]["class_args"], declared["class_args"]
    for block in ("sequence_mixer_block", "mlp_block"):
        assert len(model_config[block + "s"]) == model_config["num_layers"]
        for item in model_config[block + "s"]:
            yield item, declared[block]


def cerebras_sections(config, declared):
    init = config["trainer"]["init"]
    yield init, declared["init"]
    yield init["model"], declared["model"]
    yield init["optimizer"]["AdamW"], declared["AdamW"]
    for scheduler in init["schedulers"]:
        for name, fields in scheduler.items():
            yield fields, declared[name]
            for phase in fields.get("schedulers", []):
                yield from ((item, declared[kind]) for kind, item in phase.items())


SECTIONS_OF = {
    "megatron": megatron_sections,
    "cerebras": cerebras_sections,
    "lm_engine": lm_engine_sections,
    "fairseq2": fairseq2_sections,
    "llm_foundry": llm_foundry_sections,
}


@pytest.mark.parametrize(
    "settings",
    [{}, {"model.tied": True} | WIDTH, SCALED | FEW | WIDTH | {"schedule.kind": "linear"}],
)
@pytest.mark.parametrize("stack", STACKS)
def test_every_key_is_declared(transferred, tmp_path, stack, settings):
    """Many stacks accept or drop an unknown key without a message."""
    if stack == "fairseq2" and "model.tied" in settings:
        settings = {}
    if stack == "cerebras" and "model.kv_heads" in settings:
        settings = settings | {"width": 32}  # at another width kv_heads changes eps
    for fields, declared in SECTIONS_OF[stack](
        emit_and_read(stack, transferred(settings), tmp_path), DECLARED[stack]["keys"]
    ):
        assert fields.keys() <= set(declared)


def test_every_stack_is_written_under_its_name(tiny, tmp_path):
    """Each folder lists the evidence and what its config cannot hold."""
    formats = [*STACKS, "megatron_bridge"]
    answer = transfer(make_fit(tiny), tiny(WIDE | COSINE), formats, tmp_path)
    # The answer is in the parent folder.
    assert {path.split("/")[-2] for path in answer["files"]} == {*formats, tmp_path.name}
    for stack in formats:
        groups = json.loads((tmp_path / stack / "param_groups.json").read_text())
        assert groups["cannot"] and groups["evidence"]["fit"] == answer["fit"]


@pytest.mark.parametrize("stack", STACKS)
def test_the_pinned_version_is_the_formats(stack):
    assert DECLARED[stack]["at"] == FORMATS[stack]


# --- the base size --------------------------------------------------------------------------------

NATIVE = {  # keys of muP, absent at the base size
    "megatron": ("use_mup",),
    "cerebras": ("mup_base_hidden_size", "mup_base_filter_size", "output_logits_alpha"),
    "llm_foundry": ("logit_scale", "softmax_scale"),
}


@pytest.mark.parametrize("form", ["mup_t9", "mean_field"])
@pytest.mark.parametrize("stack", STACKS)
def test_at_the_base_size_it_is_the_ordinary_config(transferred, tmp_path, stack, form):
    config = emit_and_read(stack, transferred({"width": 32, "form": form}), tmp_path)
    text = "".join(
        path.read_text() for path in tmp_path.iterdir() if path.suffix in (".yaml", ".args")
    )
    assert not [
        key for key in NATIVE.get(stack, ()) if re.search(rf"\b{key.replace('_', '[-_]')}\b", text)
    ]
    groups = json.loads((tmp_path / "param_groups.json").read_text())["groups"]
    assert {group["lr"] for group in groups} == {0.005}
    assert {group["eps"] for group in groups} == {1e-8}
    assert {group["init_std"] for group in groups} <= {0.0, 0.2}
    if stack == "lm_engine":
        model_config = config["model_args"]["pretrained_config"]
        assert [model_config[key] for key in ("m_emb", "m_width", "m_residual")] == [None] * 3
        assert model_config["sequence_mixer_blocks"][0]["attention_multiplier"] == 0.25
    if stack == "cerebras":
        model_config = config["trainer"]["init"]["model"]
        assert model_config["embeddings_scale"] == model_config["attention_logits_alpha"] == 1.0
        assert model_config["initializer"]["std"] == 0.2


# --- schedules ------------------------------------------------------------------------------------


def cerebras_lr(phases, step):
    """cerebras_pytorch 2.10.0: consecutive schedulers, each of which counts its own steps."""
    for name, fields in (item for phase in phases for item in phase.items()):
        if step < fields["total_iters"] or fields is next(iter(phases[-1].values())):
            first = fields.get("initial_learning_rate", fields.get("learning_rate"))
            last = fields.get("end_learning_rate", first)
            share = min(1.0, step / fields["total_iters"])
            return last + (first - last) * (
                (1 + math.cos(math.pi * share)) / 2 if name == "CosineDecayLR" else 1 - share
            )
        step -= fields["total_iters"]
    raise AssertionError("no phase")


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_cerebras_takes_every_tag_through_the_plans_schedule(transferred, tmp_path, kind):
    prepared = transferred(SHARES | (WSD if kind == "wsd" else {"schedule.kind": kind}))
    config = emit_and_read("cerebras", prepared, tmp_path)
    chains = [
        s["SequentialLR"]["schedulers"]
        for s in config["trainer"]["init"]["schedulers"]
        if "SequentialLR" in s
    ]
    assert len(chains) > 1
    for step in range(9):
        now = [
            cerebras_lr(chain, step) / max(cerebras_lr(chain, s) for s in range(9))
            for chain in chains
        ]
        assert now == pytest.approx(
            [optim.multiplier(prepared.target.schedule, step / 8)] * len(chains), abs=1e-9
        )


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_fairseq2_takes_every_group_through_the_plans_schedule(transferred, tmp_path, kind):
    prepared = transferred(SHARES | {"schedule.kind": kind})
    config = emit_and_read("fairseq2", prepared, tmp_path)
    schedule = config["lr_scheduler"]["config"]
    peaks = [group["lr"] for group in config["optimizer"]["config"]["groups"]]
    warmup, steps = schedule["num_warmup_steps"], config["regime"]["num_steps"]
    for step in range(9):
        if kind == "cosine":
            ends = [schedule["final_lr_scale"] * peak for peak in peaks]
            remaining = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        else:
            ends, remaining = (
                schedule["final_lr"],
                ((steps - step) / (steps - warmup)) ** schedule["power"],
            )
        now = [
            peak * step / warmup if step < warmup else end + (peak - end) * remaining
            for peak, end in zip(peaks, ends, strict=True)
        ]
        expected = optim.multiplier(prepared.target.schedule, step / 8)
        assert [lr / peak for lr, peak in zip(now, peaks, strict=True)] == pytest.approx(
            [expected] * len(peaks), abs=1e-9
        )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {"name": "constant_with_warmup", "t_warmup": "2ba"}),
        ("linear", {"name": "linear_decay_with_warmup", "t_warmup": "2ba", "alpha_f": 0.1}),
        ("cosine", {"name": "cosine_with_warmup", "t_warmup": "2ba", "alpha_f": 0.1}),
    ],
)
def test_llm_foundrys_schedules_multiply(transferred, tmp_path, kind, expected):
    prepared = transferred(SHARES | {"schedule.kind": kind})
    assert emit_and_read("llm_foundry", prepared, tmp_path)["scheduler"] == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule.kind": "constant"}, ("constant", 2, 6, 0)),
        ({"schedule.kind": "linear"}, ("linear", 2, 0, 6)),
        ({"schedule.kind": "cosine"}, ("cosine", 2, 0, 6)),
        (WSD, ("linear", 2, 4, 2)),
    ],
)
def test_lm_engines_schedules_multiply(transferred, tmp_path, settings, expected):
    config = emit_and_read("lm_engine", transferred(SHARES | settings), tmp_path)
    schedule = config["lr_scheduler_args"]
    counts = tuple(schedule[f"num_{phase}_steps"] for phase in ("warmup", "constant", "decay"))
    assert (schedule["lr_decay_style"], *counts) == expected and schedule["lr_decay_factor"] == 0.1


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (
            cerebras,
            {"parametrization.depth_alpha": 1, "parametrization.base_depth": 1},
            "one eps for all tensors, but the plan needs",
        ),
        (
            cerebras,
            RESIDUAL,
            "one eps for all tensors.*: set depth_alpha = 0, residual_multiplier = 1 and as many "
            "key-value heads as heads, or emit 'pytorch'$",
        ),
        (
            fairseq2,
            {"model.tied": True},
            "^format 'fairseq2' has no logits multiplier, but the tied head needs one of 0.25",
        ),
        (
            fairseq2,
            {"model.norm_eps": 1e-6},
            "^fairseq2 LLaMA needs `model.norm_eps` 1e-05, but the target has 1e-06$",
        ),
        (
            lm_engine,
            {"model.rope_theta": 10000.5},
            "^lm-engine gpt_base needs an integer `model.rope_theta`, but the target has 10000.5$",
        ),
        (
            megatron,
            {"model.rope_theta": 10000.5},
            "^Megatron GPT needs an integer `model.rope_theta`, but the target has 10000.5$",
        ),
        (
            fairseq2,
            WSD,
            "^format 'fairseq2' supports `schedule.kind` 'constant', 'linear', 'cosine', but "
            "got 'wsd'$",
        ),
        (
            llm_foundry,
            WSD,
            "^format 'llm_foundry' supports `schedule.kind` 'constant', 'linear', 'cosine', but "
            "got 'wsd'$",
        ),
        (
            llm_foundry,
            {"parametrization.init_gain": 1.0},
            "^format 'llm_foundry' has one init std for a branch's last matrices",
        ),
        *(
            (
                module,
                {"model.biases": True},
                "has none for 'self_attn.q_proj.bias': set model.biases = false$",
            )
            for module in STACKS.values()
        ),
        *(
            (
                module,
                {"model.norm": "layer"},
                "needs `model.norm` 'rms', but the target has 'layer'$",
            )
            for module in STACKS.values()
        ),
        *(
            (
                module,
                {"optimizer.family": "muon"},
                "supports `optimizer.family` 'adamw', but got 'muon'$",
            )
            for module in STACKS.values()
        ),
    ],
)
def test_unsupported_settings_are_refused(transferred, tmp_path, module, settings, message):
    with pytest.raises(UserError, match=message):
        module.emit(transferred(settings), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "module",
    [megatron, megatron_bridge, lm_engine],
    ids=lambda module: module.__name__.split(".")[-1],
)
def test_an_eps_that_one_tensor_cannot_hold_is_listed(transferred, tmp_path, module):
    """Keys and values share a tensor with the queries, whose eps decreases with width."""
    module.emit(transferred(FEW), tmp_path)
    cannot = json.loads((tmp_path / "param_groups.json").read_text())["cannot"]
    assert [line for line in cannot if line.startswith("eps of")] == [
        f"eps of self_attn.{kind}_proj.weight: 1e-08 in the plan, 2.5e-09 here, because the stack "
        f"keeps it in one tensor with others"
        for kind in "kv"
    ]


# --- loaders --------------------------------------------------------------------------------------


def test_the_megatron_loader_refuses_unmatched_patterns_and_parameters(
    transferred, tmp_path, monkeypatch
):
    prepared = transferred()
    emit_and_read("megatron", prepared, tmp_path)
    for stages in (1, 2):
        fake_megatron_modules(monkeypatch, None, stages)
        loader, model = (
            import_file(tmp_path / "scaletune_megatron.py"),
            toy_model("megatron", prepared),
        )
        del model.output_layer
        if stages == 1:
            with pytest.raises(
                ValueError,
                match=r"every pattern must match a parameter, but not these: \['output_layer",
            ):
                loader.overrides([model])
        else:  # another pipeline stage may have it
            assert len(loader.overrides([model])) == len(loader.GROUPS)
        model.scale = torch.nn.Parameter(torch.ones(1))
        with pytest.raises(
            ValueError,
            match=r"one pattern must match scale, but it matches \[\]",
        ):
            loader.overrides([model])


def test_the_fairseq2_loader_skips_meta_tensors_and_names_missing_ones(transferred, tmp_path):
    prepared = transferred()
    emit_and_read("fairseq2", prepared, tmp_path)
    loader, model = (
        import_file(tmp_path / "scaletune_fairseq2.py"),
        toy_model("fairseq2", prepared).to("meta"),
    )
    assert loader.initialize(model) is model
    assert all(parameter.is_meta for parameter in model.parameters())
    del model.final_proj
    with pytest.raises(
        ValueError,
        match=r"every pattern must match a parameter, but not these: .*final_proj",
    ):
        loader.initialize(model)


def test_each_pattern_matches_only_the_tensors_of_its_kind(transferred):
    """Holds in every stack."""
    prepared = transferred()
    for stack, module in STACKS.items():
        names = stack_names(stack, prepared)
        for pattern in set(module.NAMES.values()):
            matched = {
                re.sub(r"^model\.layers\.\d+\.", "", ours)
                for ours, name in names.items()
                if _matches(stack, pattern, name)
            }
            assert matched == {
                kind for kind, template in module.NAMES.items() if template == pattern
            }, (
                stack,
                pattern,
            )


def _matches(stack, pattern, name):
    return fnmatch(name, pattern) if stack == "cerebras" else bool(re.search(pattern, name))


# --- lint -----------------------------------------------------------------------------------------


def test_lint_reports_megatrons_fault_with_the_proxys_base_width(transferred, tmp_path):
    """With its own width as base width, Megatron's muP scales nothing.

    With the proxies' base width it does not scale weight decay, and the head's lr depends on the
    version.
    """
    emit_and_read("megatron", transferred(), tmp_path)
    path = tmp_path / "megatron.args"
    assert lint(path)["stack"] == "megatron"
    assert lint(path)["findings"] == lint(path)["not_read"] == []
    path.write_text(
        path.read_text().replace("--mup-base-hidden-size 128", "--mup-base-hidden-size 32")
    )
    assert [finding["rule"] for finding in lint(path)["findings"]] == ["weight_decay_not_scaled"]
    assert "version of Megatron" in lint(path)["not_read"][0]
