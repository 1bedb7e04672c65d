"""Formats of stacks too large to install: declared keys, base-size configs, schedules, errors, loaders."""

import json
import math
import re
from fnmatch import fnmatch

import pytest
import torch
from test_transferring import WIDE, learned
from test_transferring_native import (
    COSINE,
    DECLARED,
    FEW,
    RESIDUAL,
    SCALED,
    STACKS,
    WIDTH,
    files,
    imported,
    megatrons,
    names_in,
    toy,
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


# --- declared keys ---------------------------------------------------------------------------------------------------


def of_megatron(config, declared):
    yield config, [key.replace("-", "_") for key in declared["arguments"]]


def of_fairseq2(config, declared):
    for section in ("model", "optimizer", "lr_scheduler", "trainer", "regime"):
        yield (
            config[section],
            declared[
                {"lr_scheduler": "LRScheduler"}.get(section, section.capitalize()) + "Section"
            ],
        )
    yield config["model"]["config_overrides"], declared["LLaMAConfig"]
    yield config["optimizer"]["config"], declared["AdamWConfig"]
    for group in config["optimizer"]["config"]["groups"]:
        yield group, declared["AdamWGroupConfig"]
    kind = {
        "cosine_annealing": "CosineAnnealingLRConfig",
        "polynomial_decay": "PolynomialDecayLRConfig",
    }[config["lr_scheduler"]["name"]]
    yield config["lr_scheduler"]["config"], declared[kind]


def of_llm_foundry(config, declared):
    yield config, declared["TrainConfig"]
    yield config["model"], declared["MPTConfig"]
    for section in ("attn_config", "ffn_config", "init_config"):
        yield config["model"][section], declared[section]
    yield config["optimizer"], declared["optimizer"]
    yield config["scheduler"], declared["scheduler"]
    for group in config["optimizer"]["param_groups"]:
        yield group, declared["param_group"]


def of_lm_engine(config, declared):
    for section, fields in config.items():
        yield fields, declared[section]
    mine = config["model_args"]["pretrained_config"]
    yield mine, declared["pretrained_config"]
    assert mine.keys() == set(declared["pretrained_config"])  # its own files leave none out
    yield config["optimizer_args"]["class_args"], declared["class_args"]
    for block in ("sequence_mixer_block", "mlp_block"):
        assert len(mine[block + "s"]) == mine["num_layers"]
        for each in mine[block + "s"]:
            yield each, declared[block]


def of_cerebras(config, declared):
    init = config["trainer"]["init"]
    yield init, declared["init"]
    yield init["model"], declared["model"]
    yield init["optimizer"]["AdamW"], declared["AdamW"]
    for scheduler in init["schedulers"]:
        for name, fields in scheduler.items():
            yield fields, declared[name]
            for phase in fields.get("schedulers", []):
                yield from ((each, declared[kind]) for kind, each in phase.items())


OF = {
    "megatron": of_megatron,
    "cerebras": of_cerebras,
    "lm_engine": of_lm_engine,
    "fairseq2": of_fairseq2,
    "llm_foundry": of_llm_foundry,
}


@pytest.mark.parametrize(
    "settings",
    [{}, {"model.tied": True} | WIDTH, SCALED | FEW | WIDTH | {"schedule.kind": "linear"}],
)
@pytest.mark.parametrize("stack", STACKS)
def test_every_key_is_declared(transferred, tmp_path, stack, settings):
    """Many stacks keep or drop an unknown key without a message."""
    if stack == "fairseq2" and "model.tied" in settings:
        settings = {}
    if stack == "cerebras" and "model.kv_heads" in settings:
        settings = settings | {"width": 32}  # few keys and values have another eps at another width
    for fields, declared in OF[stack](
        files(stack, transferred(settings), tmp_path), DECLARED[stack]["keys"]
    ):
        assert fields.keys() <= set(declared)


def test_every_stack_is_written_under_its_name(tiny, tmp_path):
    """From a fit, as a user asks for them; what a config cannot hold and the evidence go along."""
    asked = [*STACKS, "megatron_bridge"]
    answer = transfer(learned(tiny), tiny(WIDE | COSINE), asked, tmp_path)
    assert {path.split("/")[-2] for path in answer["files"]} == {
        *asked,
        tmp_path.name,
    }  # the answer lies above them
    for stack in asked:
        said = json.loads((tmp_path / stack / "param_groups.json").read_text())
        assert said["cannot"] and said["evidence"]["fit"] == answer["fit"]


@pytest.mark.parametrize("stack", STACKS)
def test_the_pinned_version_is_the_formats(stack):
    assert DECLARED[stack]["at"] == FORMATS[stack]


# --- the base size ---------------------------------------------------------------------------------------------------

NATIVE = {  # the keys that make it muP, or that are neutral
    "megatron": ("use_mup",), "cerebras": ("mup_base_hidden_size", "mup_base_filter_size", "output_logits_alpha"),
    "llm_foundry": ("logit_scale", "softmax_scale"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["mup_t9", "mean_field"])
@pytest.mark.parametrize("stack", STACKS)
def test_at_the_base_size_it_is_the_ordinary_config(transferred, tmp_path, stack, form):
    config = files(stack, transferred({"width": 32, "form": form}), tmp_path)
    text = "".join(
        path.read_text() for path in tmp_path.iterdir() if path.suffix in (".yaml", ".args")
    )
    assert not [
        key for key in NATIVE.get(stack, ()) if re.search(rf"\b{key.replace('_', '[-_]')}\b", text)
    ]
    said = json.loads((tmp_path / "param_groups.json").read_text())["groups"]
    assert {group["lr"] for group in said} == {0.005} and {group["eps"] for group in said} == {1e-8}
    assert {group["init_std"] for group in said} <= {0.0, 0.2}
    if stack == "lm_engine":
        mine = config["model_args"]["pretrained_config"]
        assert [mine[key] for key in ("m_emb", "m_width", "m_residual")] == [None] * 3
        assert mine["sequence_mixer_blocks"][0]["attention_multiplier"] == 0.25
    if stack == "cerebras":
        mine = config["trainer"]["init"]["model"]
        assert (
            mine["embeddings_scale"] == mine["attention_logits_alpha"] == 1.0
            and mine["initializer"]["std"] == 0.2
        )


# --- schedules -------------------------------------------------------------------------------------------------------


def cerebras_lr(phases, step):
    """cerebras_pytorch 2.10.0: schedulers that follow each other, each counting its own steps."""
    for name, fields in (item for phase in phases for item in phase.items()):
        if step < fields["total_iters"] or fields is next(iter(phases[-1].values())):
            first = fields.get("initial_learning_rate", fields.get("learning_rate"))
            last = fields.get("end_learning_rate", first)
            done = min(1.0, step / fields["total_iters"])
            return last + (first - last) * (
                (1 + math.cos(math.pi * done)) / 2 if name == "CosineDecayLR" else 1 - done
            )
        step -= fields["total_iters"]
    raise AssertionError("no phase")


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_cerebras_takes_every_tag_through_the_plans_schedule(transferred, tmp_path, kind):
    made = transferred(SHARES | (WSD if kind == "wsd" else {"schedule.kind": kind}))
    config = files("cerebras", made, tmp_path)
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
            [optim.multiplier(made.target.schedule, step / 8)] * len(chains), abs=1e-9
        )


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_fairseq2_takes_every_group_through_the_plans_schedule(transferred, tmp_path, kind):
    made = transferred(SHARES | {"schedule.kind": kind})
    config = files("fairseq2", made, tmp_path)
    told, peaks = (
        config["lr_scheduler"]["config"],
        [group["lr"] for group in config["optimizer"]["config"]["groups"]],
    )
    warmup, steps = told["num_warmup_steps"], config["regime"]["num_steps"]
    for step in range(9):
        if kind == "cosine":
            ends = [told["final_lr_scale"] * peak for peak in peaks]
            left = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        else:
            ends, left = told["final_lr"], ((steps - step) / (steps - warmup)) ** told["power"]
        now = [
            peak * step / warmup if step < warmup else end + (peak - end) * left
            for peak, end in zip(peaks, ends, strict=True)
        ]
        expected = optim.multiplier(made.target.schedule, step / 8)
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
    assert (
        files("llm_foundry", transferred(SHARES | {"schedule.kind": kind}), tmp_path)["scheduler"]
        == expected
    )


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
    told = files("lm_engine", transferred(SHARES | settings), tmp_path)["lr_scheduler_args"]
    counts = tuple(told[f"num_{phase}_steps"] for phase in ("warmup", "constant", "decay"))
    assert (told["lr_decay_style"], *counts) == expected and told["lr_decay_factor"] == 0.1


# --- what cannot be said ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "settings", "said"),
    [
        (
            cerebras,
            {"parametrization.depth_alpha": 1, "parametrization.base_depth": 1},
            "one eps for all tensors, but the plan needs",
        ),
        (
            cerebras,
            RESIDUAL,
            "one eps for all tensors.*: set depth_alpha = 0, residual_multiplier = 1 and as many key-value heads as heads, or emit 'pytorch'$",
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
            "^format 'fairseq2' supports `schedule.kind` 'constant', 'linear', 'cosine', but got 'wsd'$",
        ),
        (
            llm_foundry,
            WSD,
            "^format 'llm_foundry' supports `schedule.kind` 'constant', 'linear', 'cosine', but got 'wsd'$",
        ),
        (
            llm_foundry,
            {"parametrization.init_gain": 1.0},
            "^format 'llm_foundry' has one init std for a branch's last matrices",
        ),
        *(
            (
                each,
                {"model.biases": True},
                "has none for 'self_attn.q_proj.bias': set model.biases = false$",
            )
            for each in STACKS.values()
        ),
        *(
            (each, {"model.norm": "layer"}, "needs `model.norm` 'rms', but the target has 'layer'$")
            for each in STACKS.values()
        ),
        *(
            (
                each,
                {"optimizer.family": "muon"},
                "supports `optimizer.family` 'adamw', but got 'muon'$",
            )
            for each in STACKS.values()
        ),
    ],
)
def test_what_they_cannot_say_is_refused(transferred, tmp_path, module, settings, said):
    with pytest.raises(UserError, match=said):
        module.emit(transferred(settings), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "module",
    [megatron, megatron_bridge, lm_engine],
    ids=lambda module: module.__name__.split(".")[-1],
)
def test_an_eps_that_one_tensor_cannot_hold_is_said(transferred, tmp_path, module):
    """Keys and values of few heads are one tensor with the queries, whose eps shrinks with width."""
    module.emit(transferred(FEW), tmp_path)
    said = json.loads((tmp_path / "param_groups.json").read_text())["cannot"]
    assert [line for line in said if line.startswith("eps of")] == [
        f"eps of self_attn.{kind}_proj.weight: 1e-08 in the plan, 2.5e-09 here, because the stack keeps it in one tensor with others"
        for kind in "kv"
    ]


# --- loaders ---------------------------------------------------------------------------------------------------------


def test_the_megatron_loader_refuses_what_it_cannot_explain(transferred, tmp_path, monkeypatch):
    made = transferred()
    files("megatron", made, tmp_path)
    for stages in (1, 2):
        megatrons(monkeypatch, None, stages)
        loader, model = imported(tmp_path / "scaletune_megatron.py"), toy("megatron", made)
        del model.output_layer
        if stages == 1:
            with pytest.raises(
                ValueError,
                match=r"every pattern must match a parameter, but not these: \['output_layer",
            ):
                loader.overrides([model])
        else:  # another stage has it
            assert len(loader.overrides([model])) == len(loader.GROUPS)
        model.scale = torch.nn.Parameter(torch.ones(1))
        with pytest.raises(
            ValueError,
            match=r"one pattern must match scale, but it matches \[\]",
        ):
            loader.overrides([model])


def test_the_fairseq2_loader_leaves_what_is_not_there_and_says_what_is_missing(
    transferred, tmp_path
):
    made = transferred()
    files("fairseq2", made, tmp_path)
    loader, model = imported(tmp_path / "scaletune_fairseq2.py"), toy("fairseq2", made).to("meta")
    assert loader.initialize(model) is model and all(
        parameter.is_meta for parameter in model.parameters()
    )
    del model.final_proj
    with pytest.raises(
        ValueError,
        match=r"every pattern must match a parameter, but not these: .*final_proj",
    ):
        loader.initialize(model)


def test_every_name_of_theirs_is_told_apart(transferred):
    """Each pattern matches the kind it is for and no other, in every stack."""
    made = transferred()
    for stack, module in STACKS.items():
        real = names_in(stack, made)
        for pattern in set(module.NAMES.values()):
            found = {
                re.sub(r"^model\.layers\.\d+\.", "", ours)
                for ours, name in real.items()
                if _matches(stack, pattern, name)
            }
            assert found == {kind for kind, own in module.NAMES.items() if own == pattern}, (
                stack,
                pattern,
            )


def _matches(stack, pattern, name):
    return fnmatch(name, pattern) if stack == "cerebras" else bool(re.search(pattern, name))


# --- lint ------------------------------------------------------------------------------------------------------------


def test_lint_still_names_megatrons_fault_at_the_proxys_base(transferred, tmp_path):
    """At a base of its own width its muP scales nothing; at the proxy's it scales the head twice and no weight decay."""
    files("megatron", transferred(), tmp_path)
    path = tmp_path / "megatron.args"
    assert lint(path) == {"path": str(path), "stack": "megatron", "findings": []}
    path.write_text(
        path.read_text().replace("--mup-base-hidden-size 128", "--mup-base-hidden-size 32")
    )
    assert [each["rule"] for each in lint(path)["findings"]] == [
        "readout_divided_twice",
        "weight_decay_not_scaled",
    ]
