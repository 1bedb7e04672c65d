"""Stacks too large to install: their documented rules turn the emitted files into the plan.

`fixtures/declared.json` holds, for a commit or version of each stack, its declared keys and
parameter names. The functions here implement its documented rules: how it builds param groups,
initial weights and multipliers from its config.
"""

import importlib.util
import json
import math
import re
import sys
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch, translate
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from test_transferring import EVERYTHING, EVIDENCE, VOCAB, WIDE

from scaletune import counting
from scaletune.linting.lint import lint
from scaletune.linting.shell_reader import read_shell
from scaletune.transferring import Transfer
from scaletune.transferring.fold_multipliers import default_multipliers, fold
from scaletune.transferring.formats import cerebras, fairseq2, llm_foundry, lm_engine, megatron
from scaletune.transferring.read_back import plan_settings, read
from scaletune.transferring.read_back import settings as tensor_settings

DECLARED = json.loads((Path(__file__).parent / "fixtures" / "declared.json").read_text())
STACKS = {
    "megatron": megatron,
    "cerebras": cerebras,
    "lm_engine": lm_engine,
    "fairseq2": fairseq2,
    "llm_foundry": llm_foundry,
}
COSINE = {"schedule.kind": "cosine", "schedule.floor": 0.1}
SCALED = {"parametrization.attention_multiplier": 2.0}
FEW = {"model.kv_heads": 2}
WIDTH = {"parametrization.embedding_multiplier": 3.0, "parametrization.logits_multiplier": 0.7}
RESIDUAL = {"parametrization.residual_multiplier": 0.3}
PLANS = {
    "t8": {},
    "everything": EVERYTHING | SCALED | RESIDUAL,
    "width": WIDTH | SCALED,
    "t3": {"form": "mup_t3"},
    "t9": {"form": "mup_t9"} | WIDTH,
    "ntk": {"form": "ntk"},
    "sp": {"form": "sp_per_layer"},
    "base": {"width": 32},
    "tied": {"model.tied": True} | WIDTH,
    "few": FEW | {"width": 32},
    "deep": {"parametrization.depth_alpha": 1, "parametrization.base_depth": 1, "model.depth": 4},
}
# test_transferring_declared.py tests the errors.
REFUSED = {("cerebras", "everything"), ("cerebras", "deep"), ("fairseq2", "tied")}
SUPPORTED = [(stack, plan) for stack in STACKS for plan in PLANS if (stack, plan) not in REFUSED]


@pytest.fixture(scope="module")
def transferred(tiny):
    """settings -> a Transfer, without a fit."""

    def make(settings=()):
        target = tiny(WIDE | COSINE | dict(settings) | {"evidence": EVIDENCE})
        return Transfer(
            target,
            VOCAB,
            counting.plan_tensors(target, VOCAB),
            counting.multipliers(target, VOCAB),
            EVIDENCE,
        )

    return make


def stack_names(stack, prepared):
    """Name of our tensor -> name of the stack's tensor that holds it."""
    templates = DECLARED[stack]["parameters"]
    names = {}
    for row in prepared.plan:
        layer = re.match(r"model\.layers\.(\d+)\.", row.name)
        kind = row.name[layer.end() :] if layer else row.name
        names[row.name] = templates[kind].format(layer[1] if layer else "")
    return names


def toy_model(stack, prepared):
    """A module with the stack's parameter names.

    Matrices are large enough to measure their std; gains are ones.
    """
    model = torch.nn.Module()
    for ours, name in stack_names(stack, prepared).items():
        *path, last = name.split(".")
        at = model
        for part in path:
            at = at._modules.setdefault(part, torch.nn.Module())
        at.register_parameter(
            last, torch.nn.Parameter(torch.ones(8) if "norm" in ours else torch.ones(100, 100))
        )
    return model


def emit_and_read(stack, prepared, folder):
    """Emits the files and returns the content of the config."""
    STACKS[stack].emit(prepared, folder)
    path = next(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml", ".args"))
    return (
        read_shell(path.read_text()).content
        if path.suffix == ".args"
        else yaml.safe_load(path.read_text())
    )


def import_file(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def single_match(hits, name):
    assert len(hits) == 1, (name, hits)
    return hits[0]


# --- the rules of each stack ----------------------------------------------------------------------
# config -> {name: {lr, weight_decay, eps}}, {name: init std}, forward multipliers


def result_of_fairseq2(config, folder, model, monkeypatch):
    """A tensor is in the first group with a pattern that re.match finds.

    Every group must have a tensor, because schedules count groups.
    """
    optimizer, settings, used = config["optimizer"]["config"], {}, set()
    for name, _ in model.named_parameters():
        i = next(
            i
            for i, group in enumerate(optimizer["groups"])
            if any(re.match(p, name) for p in group["params"])
        )
        settings[name] = {key: optimizer["groups"][i][key] for key in ("lr", "weight_decay", "eps")}
        used.add(i)
    assert used == set(range(len(optimizer["groups"])))
    import_file(folder / "scaletune_fairseq2.py").initialize(model)
    return settings, measure_std(model), default_multipliers(16)


def measure_std(model):
    """Name -> std of the values."""
    return {name: float(p.detach().std()) for name, p in model.named_parameters()}


def result_of_llm_foundry(config, folder, model, monkeypatch):
    """Each group in turn takes the remaining tensors that re.search finds.

    Composer multiplies weights by 1 - (lr / peak) * weight_decay.
    """
    optimizer, remaining, group_of = config["optimizer"], dict(model.named_parameters()), {}
    for group in optimizer["param_groups"]:
        matched = [name for name in remaining if re.search(group["param_str_match"], name)]
        assert matched
        assert all(
            len([p for p in group["param_str_match"].split("|") if re.search(p, name)]) == 1
            for name in matched
        )
        group_of |= {name: group for name in matched if remaining.pop(name) is not None}
    assert remaining and all("norm" in name for name in remaining)
    group_of |= {name: optimizer for name in remaining}
    init, mpt = config["model"]["init_config"], config["model"]
    last = init["init_std"] / init["init_div_is_residual"]
    std = {
        name: last if name.endswith(("out_proj.weight", "down_proj.weight")) else init["init_std"]
        for name in group_of
    }
    std |= {name: init["emb_init_std"] for name in group_of if name.endswith("wte.weight")}
    groups = {
        name: {"lr": g["lr"], "weight_decay": g["weight_decay"] / g["lr"], "eps": g["eps"]}
        for name, g in group_of.items()
    }
    assert init["name"] == "baseline_"
    attention = mpt["attn_config"].get("softmax_scale", (mpt["d_model"] / mpt["n_heads"]) ** -0.5)
    return (
        groups,
        std,
        default_multipliers(16) | {"attention": attention, "logits": mpt.get("logit_scale", 1.0)},
    )


def result_of_cerebras(config, folder, model, monkeypatch):
    """Globs give a tensor's tag, and the schedulers of a tag its lr and weight decay.

    muP divides the init std of the last matrices of a branch by sqrt(2L).
    """
    init, settings, std = config["trainer"]["init"], {}, {}
    adamw, model_config = init["optimizer"]["AdamW"], init["model"]
    for name, _ in model.named_parameters():
        tag = single_match(
            [
                g["tag"]
                for g in adamw["params"]
                for p in g["params"]
                if re.compile(translate(p)).search(name)
            ],
            name,
        )
        of_tag = [
            s[k] | {"kind": k}
            for s in init["schedulers"]
            for k in s
            if s[k]["param_group_tags"] == tag
        ]
        decay = single_match([s["val"] for s in of_tag if s["kind"] == "ConstantWD"], name)
        chain = single_match([s for s in of_tag if s["kind"] != "ConstantWD"], name)
        peak = max(
            value
            for phase in chain["schedulers"]
            for fields in phase.values()
            for key, value in fields.items()
            if "rate" in key
        )
        settings[name] = {"lr": peak, "weight_decay": decay, "eps": adamw["eps"]}
        slot = next((slot for slot, ends in SLOTS.items() if name.endswith(ends)), None)
        std[name] = model_config[slot]["std"] if slot else model_config["initializer_range"]
        if slot in cerebras.OUTPUT_INITIALIZERS and "mup_base_hidden_size" in model_config:
            std[name] /= (2 * model_config["num_hidden_layers"]) ** 0.5
    used = {
        p
        for g in adamw["params"]
        for p in g["params"]
        if any(fnmatch(name, p) for name in settings)
    }
    assert used == {p for g in adamw["params"] for p in g["params"]}
    logits = (
        model_config.get("output_logits_alpha", 1.0)
        * model_config.get("mup_base_hidden_size", model_config["hidden_size"])
        / model_config["hidden_size"]
    )
    head_dim = model_config["hidden_size"] // model_config["num_heads"]
    attention = model_config["attention_logits_alpha"] * head_dim**-0.5
    return (
        settings,
        std,
        default_multipliers(16)
        | {"embedding": model_config["embeddings_scale"], "attention": attention, "logits": logits},
    )


SLOTS = {
    "embedding_initializer": ("word_embeddings.weight",),
    "initializer": ("q_dense_layer.weight", "k_dense_layer.weight", "v_dense_layer.weight"),
    "output_layer_initializer": ("output_dense_layer.weight",),
    "ffn_initializer": ("0.linear_layer.weight", "linear_layer_for_glu.weight"),
    "ffn_output_layer_initializer": ("1.linear_layer.weight",),
}


def result_of_lm_engine(config, folder, model, monkeypatch):
    """Our loader builds the groups; one init std for all tensors; m_width divides the logits."""

    @dataclass
    class ParamsGroup:
        name: str
        parameter_name_map: dict
        params_group_kwargs: dict

    params_group = SimpleNamespace(
        _ParamsGroup=ParamsGroup,
        _ParamsGroupsList=lambda params_groups: params_groups,
        _PARAM_GROUPS={None: None},
    )
    monkeypatch.setitem(sys.modules, "lm_engine", ModuleType("lm_engine"))
    monkeypatch.setitem(
        sys.modules, "lm_engine.optimization", SimpleNamespace(params_group=params_group)
    )
    import_file(folder / "scaletune_lm_engine.py").install()
    groups = params_group._PARAM_GROUPS[config["optimizer_args"]["params_group_method"]](
        model, config["optimizer_args"]["class_args"]
    )
    settings = {
        name: group.params_group_kwargs for group in groups for name in group.parameter_name_map
    }
    model_config = config["model_args"]["pretrained_config"]
    assert model_config["init_method"] == model_config["embedding_init_method"] == "normal"
    assert model_config["use_depth_scaled_init"] is False
    multipliers = {
        "embedding": model_config["m_emb"] or 1.0,
        "residual": model_config["m_residual"] or 1.0,
        "logits": 1 / (model_config["m_width"] or 1.0),
        "attention": model_config["sequence_mixer_blocks"][0]["attention_multiplier"],
    }
    return settings, dict.fromkeys(settings, model_config["initializer_range"]), multipliers


@dataclass(frozen=True)
class ParamWithNamePredicate:
    name: str
    fn: object = field(compare=False, hash=False)


@dataclass(frozen=True)
class ParamKey:
    with_name_predicate: ParamWithNamePredicate


class Tracker:
    def fork(self):
        return torch.random.fork_rng()


def fake_megatron_modules(monkeypatch, get_optimizer, stages=1):
    """Replaces the modules that the loader imports; `get_optimizer`: get_megatron_optimizer."""
    training = SimpleNamespace(get_megatron_optimizer=get_optimizer)
    contents = {
        "megatron": {},
        "megatron.core": {
            "parallel_state": SimpleNamespace(get_pipeline_model_parallel_world_size=lambda: stages)
        },
        "megatron.core.optimizer": {},
        "megatron.training": {"training": training},
        "megatron.core.optimizer.optimizer_config": {
            "ParamKey": ParamKey,
            "ParamWithNamePredicate": ParamWithNamePredicate,
        },
        "megatron.core.tensor_parallel": {"get_cuda_rng_tracker": Tracker},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return training


def result_of_megatron(config, folder, model, monkeypatch):
    """Each tensor has one matching override; its wd_mult multiplies the weight decay.

    The embedding has its own init.
    """
    overrides = {}
    training = fake_megatron_modules(
        monkeypatch,
        lambda config, model, config_overrides=None, **rest: overrides.update(config_overrides),
    )
    import_file(folder / "scaletune_megatron.py").install()
    torch.manual_seed(0)
    embedding = model.embedding.word_embeddings.weight
    torch.nn.init.normal_(embedding, std=config["init_method_std"])
    training.get_megatron_optimizer(
        None, [model], config_overrides={"their own": {}}, use_gloo_process_groups=True
    )
    settings, identities = {}, {}
    for name, parameter in model.named_parameters():
        override = single_match(
            [
                override
                for key, override in overrides.items()
                if key.with_name_predicate.fn(parameter, name)
            ],
            name,
        )
        assert override["min_lr"] == pytest.approx(0.1 * override["max_lr"])
        assert override.keys() == set(DECLARED["megatron"]["keys"]["override"])
        settings[name] = {
            "lr": override["max_lr"],
            "weight_decay": config["weight_decay"] * override["wd_mult"],
            "eps": override["eps"],
        }
        # A checkpoint identifies a group by these two multipliers.
        identity = (override["wd_mult"], override["lr_mult"])
        assert identities.setdefault(identity, settings[name]) == settings[name]
    std, head_dim = measure_std(model), config["kv_channels"]
    # Megatron's width multiplier is 1.
    assert config.get("mup_base_hidden_size", config["hidden_size"]) == config["hidden_size"]
    multipliers = {
        "embedding": config.get("mup_embedding_mult", 1.0),
        "logits": config.get("mup_output_mult", 1.0),
        "residual": 1.0,
    }
    return (
        settings,
        std,
        multipliers | {"attention": config.get("mup_base_head_dim", head_dim) ** 0.5 / head_dim},
    )


RESULT_OF = {
    "megatron": result_of_megatron,
    "cerebras": result_of_cerebras,
    "lm_engine": result_of_lm_engine,
    "fairseq2": result_of_fairseq2,
    "llm_foundry": result_of_llm_foundry,
}


@pytest.mark.parametrize(("stack", "plan"), SUPPORTED)
def test_their_rules_make_the_plan_of_the_files(transferred, tmp_path, monkeypatch, stack, plan):
    """Each tensor has the plan's lr, weight decay, eps and init std.

    The multipliers of the config are folded into the weights. Reading the files back gives the same
    settings, and `lint` has no findings.
    """
    prepared = transferred(PLANS[plan])
    config = emit_and_read(stack, prepared, tmp_path)
    groups, std, multipliers = RESULT_OF[stack](
        config, tmp_path, toy_model(stack, prepared), monkeypatch
    )
    rows = [
        replace(row, multiplier=1.0, init_std=std[name] if row.init_std else 0.0, **groups[name])
        for row, name in zip(prepared.plan, stack_names(stack, prepared).values(), strict=True)
    ]
    assert set(groups) == set(stack_names(stack, prepared).values())
    tolerance = 5 / math.sqrt(2 * 100 * 100) if stack in ("megatron", "fairseq2") else 1e-9
    results, expected = (
        tensor_settings(*fold(rows, multipliers, prepared.target.model)),
        plan_settings(prepared),
    )
    for name, values in expected.items():
        for key, value in values.items():
            assert results[name][key] == pytest.approx(
                value, rel=tolerance if key == "init_std" else 1e-9
            ), (name, key)
    assert read(tmp_path, prepared.target.model) == {
        name: pytest.approx(values, rel=1e-12) for name, values in expected.items()
    }
    assert [
        finding
        for path in tmp_path.iterdir()
        if path.is_file() and path.suffix != ".py"
        for finding in lint(path)["findings"]
    ] == []


@pytest.mark.parametrize("stack", STACKS)
def test_every_loader_is_short(transferred, tmp_path, stack):
    emit_and_read(stack, transferred(), tmp_path)
    for path in tmp_path.glob("*.py"):
        lines = path.read_text().split('"""', 2)[2].splitlines()
        assert sum(bool(line.strip()) for line in lines) < 60
