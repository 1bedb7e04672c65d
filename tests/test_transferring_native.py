"""Stacks too large to install: keys are declared, and their own rules turn the files into the plan.

`fixtures/declared.json` pins, to a commit or version, the keys each stack declares and the names of its parameters; the functions here say
again, from their documented rules, how each makes groups, initial weights and multipliers of its config.
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
from scaletune.linting.lint import _arguments, lint
from scaletune.transferring import Transfer
from scaletune.transferring.fold_multipliers import default_multipliers, fold
from scaletune.transferring.formats import cerebras, fairseq2, llm_foundry, lm_engine, megatron
from scaletune.transferring.read_back import plan_settings, read
from scaletune.transferring.read_back import settings as told_of

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
    "t8": {}, "everything": EVERYTHING | SCALED | RESIDUAL, "width": WIDTH | SCALED, "t3": {"form": "mup_t3"}, "t9": {"form": "mup_t9"} | WIDTH,
    "ntk": {"form": "ntk"}, "sp": {"form": "sp_per_layer"}, "base": {"width": 32}, "tied": {"model.tied": True} | WIDTH,
    "few": FEW | {"width": 32}, "deep": {"parametrization.depth_alpha": 1, "parametrization.base_depth": 1, "model.depth": 4},
}  # fmt: skip
CANNOT = {
    ("cerebras", "everything"),
    ("cerebras", "deep"),
    ("fairseq2", "tied"),
}  # refused, as tested below
HELD = [(stack, plan) for stack in STACKS for plan in PLANS if (stack, plan) not in CANNOT]


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


def names_in(stack, made):
    """Our tensor -> the stack's real name of the one that holds it."""
    templates = DECLARED[stack]["parameters"]
    found = {}
    for row in made.plan:
        layer = re.match(r"model\.layers\.(\d+)\.", row.name)
        kind = row.name[layer.end() :] if layer else row.name
        found[row.name] = templates[kind].format(layer[1] if layer else "")
    return found


def toy(stack, made):
    """A module with the stack's parameter names; matrices are large enough to see an std, gains are ones."""
    model = torch.nn.Module()
    for ours, name in names_in(stack, made).items():
        *path, last = name.split(".")
        at = model
        for part in path:
            at = at._modules.setdefault(part, torch.nn.Module())
        at.register_parameter(
            last, torch.nn.Parameter(torch.ones(8) if "norm" in ours else torch.ones(100, 100))
        )
    return model


def files(stack, made, folder):
    """(the config's content, the folder): emitted."""
    STACKS[stack].emit(made, folder)
    path = next(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml", ".args"))
    return (
        _arguments(path.read_text()) if path.suffix == ".args" else yaml.safe_load(path.read_text())
    )


def imported(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def once(hits, name):
    assert len(hits) == 1, (name, hits)
    return hits[0]


# --- what each stack makes of its config: {name: {lr, weight_decay, eps}}, std of a name, forward multipliers -----------


def of_fairseq2(config, folder, model, monkeypatch):
    """The first group of which a pattern re.matches; every group must have a tensor, for schedules count groups."""
    told, found, used = config["optimizer"]["config"], {}, set()
    for name, _ in model.named_parameters():
        i = next(
            i
            for i, group in enumerate(told["groups"])
            if any(re.match(p, name) for p in group["params"])
        )
        found[name] = {key: told["groups"][i][key] for key in ("lr", "weight_decay", "eps")}
        used.add(i)
    assert used == set(range(len(told["groups"])))
    imported(folder / "scaletune_fairseq2.py").initialize(model)
    return found, measured(model), default_multipliers(16)


def measured(model):
    """name -> the std its values were drawn with."""
    return {name: float(p.detach().std()) for name, p in model.named_parameters()}


def of_llm_foundry(config, folder, model, monkeypatch):
    """Groups in order, each takes what re.search finds of the rest; Composer shrinks by (lr / peak) * weight_decay."""
    told, left, found = config["optimizer"], dict(model.named_parameters()), {}
    for group in told["param_groups"]:
        taken = [name for name in left if re.search(group["param_str_match"], name)]
        assert taken and all(
            len([p for p in group["param_str_match"].split("|") if re.search(p, name)]) == 1
            for name in taken
        )
        found |= {name: group for name in taken if left.pop(name) is not None}
    assert left and all("norm" in name for name in left)
    found |= {name: told for name in left}
    init, mpt = config["model"]["init_config"], config["model"]
    last = init["init_std"] / init["init_div_is_residual"]
    std = {
        name: last if name.endswith(("out_proj.weight", "down_proj.weight")) else init["init_std"]
        for name in found
    }
    std |= {name: init["emb_init_std"] for name in found if name.endswith("wte.weight")}
    groups = {
        name: {"lr": g["lr"], "weight_decay": g["weight_decay"] / g["lr"], "eps": g["eps"]}
        for name, g in found.items()
    }
    assert init["name"] == "baseline_"
    attention = mpt["attn_config"].get("softmax_scale", (mpt["d_model"] / mpt["n_heads"]) ** -0.5)
    return (
        groups,
        std,
        default_multipliers(16) | {"attention": attention, "logits": mpt.get("logit_scale", 1.0)},
    )


def of_cerebras(config, folder, model, monkeypatch):
    """Tags by globs; a tag's schedulers give its lr and weight decay, muP divides the last matrices' std by sqrt(2L)."""
    init, found, std = config["trainer"]["init"], {}, {}
    adamw, mine = init["optimizer"]["AdamW"], init["model"]
    for name, _ in model.named_parameters():
        tag = once(
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
        decay = once([s["val"] for s in of_tag if s["kind"] == "ConstantWD"], name)
        chain = once([s for s in of_tag if s["kind"] != "ConstantWD"], name)
        peak = max(
            value
            for phase in chain["schedulers"]
            for fields in phase.values()
            for key, value in fields.items()
            if "rate" in key
        )
        found[name] = {"lr": peak, "weight_decay": decay, "eps": adamw["eps"]}
        slot = next((slot for slot, ends in SLOTS.items() if name.endswith(ends)), None)
        std[name] = mine[slot]["std"] if slot else mine["initializer_range"]
        if slot in cerebras.OUTPUT_INITIALIZERS and "mup_base_hidden_size" in mine:
            std[name] /= (2 * mine["num_hidden_layers"]) ** 0.5
    used = {
        p for g in adamw["params"] for p in g["params"] if any(fnmatch(name, p) for name in found)
    }
    assert used == {p for g in adamw["params"] for p in g["params"]}
    logits = (
        mine.get("output_logits_alpha", 1.0)
        * mine.get("mup_base_hidden_size", mine["hidden_size"])
        / mine["hidden_size"]
    )
    head_dim = mine["hidden_size"] // mine["num_heads"]
    attention = mine["attention_logits_alpha"] * head_dim**-0.5
    return (
        found,
        std,
        default_multipliers(16)
        | {"embedding": mine["embeddings_scale"], "attention": attention, "logits": logits},
    )


SLOTS = {
    "embedding_initializer": ("word_embeddings.weight",), "initializer": ("q_dense_layer.weight", "k_dense_layer.weight", "v_dense_layer.weight"),
    "output_layer_initializer": ("output_dense_layer.weight",), "ffn_initializer": ("0.linear_layer.weight", "linear_layer_for_glu.weight"),
    "ffn_output_layer_initializer": ("1.linear_layer.weight",),
}  # fmt: skip


def of_lm_engine(config, folder, model, monkeypatch):
    """Their list of groups, made by our loader; one std for all, m_width divides the logits."""

    @dataclass
    class ParamsGroup:
        name: str
        parameter_name_map: dict
        params_group_kwargs: dict

    theirs = SimpleNamespace(
        _ParamsGroup=ParamsGroup,
        _ParamsGroupsList=lambda params_groups: params_groups,
        _PARAM_GROUPS={None: None},
    )
    monkeypatch.setitem(sys.modules, "lm_engine", ModuleType("lm_engine"))
    monkeypatch.setitem(sys.modules, "lm_engine.optimization", SimpleNamespace(params_group=theirs))
    imported(folder / "scaletune_lm_engine.py").install()
    groups = theirs._PARAM_GROUPS[config["optimizer_args"]["params_group_method"]](
        model, config["optimizer_args"]["class_args"]
    )
    found = {
        name: group.params_group_kwargs for group in groups for name in group.parameter_name_map
    }
    mine = config["model_args"]["pretrained_config"]
    assert (
        mine["init_method"] == mine["embedding_init_method"] == "normal"
        and mine["use_depth_scaled_init"] is False
    )
    multipliers = {
        "embedding": mine["m_emb"] or 1.0, "residual": mine["m_residual"] or 1.0, "logits": 1 / (mine["m_width"] or 1.0),
        "attention": mine["sequence_mixer_blocks"][0]["attention_multiplier"],
    }  # fmt: skip
    return found, dict.fromkeys(found, mine["initializer_range"]), multipliers


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


def megatrons(monkeypatch, theirs, stages=1):
    """Megatron's modules as far as the loader imports them; `theirs`: its get_megatron_optimizer."""
    training = SimpleNamespace(get_megatron_optimizer=theirs)
    each = {
        "megatron": {}, "megatron.core": {"parallel_state": SimpleNamespace(get_pipeline_model_parallel_world_size=lambda: stages)},
        "megatron.core.optimizer": {}, "megatron.training": {"training": training},
        "megatron.core.optimizer.optimizer_config": {"ParamKey": ParamKey, "ParamWithNamePredicate": ParamWithNamePredicate},
        "megatron.core.tensor_parallel": {"get_cuda_rng_tracker": Tracker},
    }  # fmt: skip
    for name, content in each.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return training


def of_megatron(config, folder, model, monkeypatch):
    """All overrides of which the key matches, put together, none contradicting; weight decay times wd_mult; the embedding's own init."""
    given = {}
    training = megatrons(
        monkeypatch,
        lambda config, model, config_overrides=None, **rest: given.update(config_overrides),
    )
    imported(folder / "scaletune_megatron.py").install()
    torch.manual_seed(0)
    embedding = model.embedding.word_embeddings.weight
    torch.nn.init.normal_(embedding, std=config["init_method_std"])
    training.get_megatron_optimizer(
        None, [model], config_overrides={"their own": {}}, use_gloo_process_groups=True
    )
    found, identities = {}, {}
    for name, parameter in model.named_parameters():
        own = once(
            [
                settings
                for key, settings in given.items()
                if key.with_name_predicate.fn(parameter, name)
            ],
            name,
        )
        assert own["min_lr"] == pytest.approx(0.1 * own["max_lr"]) and own.keys() == set(
            DECLARED["megatron"]["keys"]["override"]
        )
        found[name] = {
            "lr": own["max_lr"],
            "weight_decay": config["weight_decay"] * own["wd_mult"],
            "eps": own["eps"],
        }
        assert (
            identities.setdefault((own["wd_mult"], own["lr_mult"]), found[name]) == found[name]
        )  # a checkpoint tells groups by it
    std, d = measured(model), config["kv_channels"]
    assert (
        config.get("mup_base_hidden_size", config["hidden_size"]) == config["hidden_size"]
    )  # so that its width multiplier is 1
    multipliers = {
        "embedding": config.get("mup_embedding_mult", 1.0),
        "logits": config.get("mup_output_mult", 1.0),
        "residual": 1.0,
    }
    return found, std, multipliers | {"attention": config.get("mup_base_head_dim", d) ** 0.5 / d}


OF = {
    "megatron": of_megatron,
    "cerebras": of_cerebras,
    "lm_engine": of_lm_engine,
    "fairseq2": of_fairseq2,
    "llm_foundry": of_llm_foundry,
}


@pytest.mark.parametrize(("stack", "plan"), HELD)
def test_their_rules_make_the_plan_of_the_files(transferred, tmp_path, monkeypatch, stack, plan):
    """Each tensor's lr, weight decay, eps and init std, with the config's own multipliers written into it, are the plan's; so are they read
    back, and nothing is found at fault."""
    made = transferred(PLANS[plan])
    config = files(stack, made, tmp_path)
    groups, std, multipliers = OF[stack](config, tmp_path, toy(stack, made), monkeypatch)
    rows = [
        replace(row, multiplier=1.0, init_std=std[name] if row.init_std else 0.0, **groups[name])
        for row, name in zip(made.plan, names_in(stack, made).values(), strict=True)
    ]
    assert set(groups) == set(names_in(stack, made).values())
    drawn = 5 / math.sqrt(2 * 100 * 100) if stack in ("megatron", "fairseq2") else 1e-9
    got, expected = told_of(*fold(rows, multipliers, made.target.model)), plan_settings(made)
    for name, values in expected.items():
        for key, value in values.items():
            assert got[name][key] == pytest.approx(
                value, rel=drawn if key == "init_std" else 1e-9
            ), (name, key)
    assert read(tmp_path, made.target.model) == {
        name: pytest.approx(values, rel=1e-12) for name, values in expected.items()
    }
    assert [
        found
        for path in tmp_path.iterdir()
        if path.is_file() and path.suffix != ".py"
        for found in lint(path)["findings"]
    ] == []


@pytest.mark.parametrize("stack", STACKS)
def test_every_loader_is_short(transferred, tmp_path, stack):
    files(stack, transferred(), tmp_path)
    for path in tmp_path.glob("*.py"):
        lines = path.read_text().split('"""', 2)[2].splitlines()
        assert sum(bool(line.strip()) for line in lines) < 60
