"""MiniCPM3 and Falcon-H1, and the effect of each multiplier in every Hugging Face config."""

import dataclasses
import importlib
import json
import re

import numpy as np
import pytest
import torch
import transformers
from conftest import VOCAB, WIDE
from test_transferring import EVERYTHING, draw_tokens, import_loader, make_fit
from test_transferring_moe import MOE
from torch.nn import functional as F

from scaletune.errors import UserError
from scaletune.linting.lint import lint
from scaletune.transferring import transfer
from scaletune.transferring.formats import falcon_h1, minicpm3, untested_archs
from scaletune.transferring.formats.unsupported import UNTESTED

BRANCHES = ("o_proj", "down_proj", "shared_mlp.output_linear")
GRANITE = {
    "embedding_multiplier": ("embed_tokens",),
    "attention_multiplier": ("q_proj",),
    "residual_multiplier": BRANCHES,
    "logits_scaling": ("lm_head",),
}
# format -> config key (with a list item after a dot) -> parts of names of the weights it multiplies
ACTS_ON = {
    "granite": GRANITE,
    "hyperclovax": GRANITE,
    "granitemoe": GRANITE,
    "minicpm3": {
        "scale_emb": ("embed_tokens",),
        "scale_depth": BRANCHES,
        "dim_model_base": ("lm_head",),
    },
    "falcon_h1": {
        "embedding_multiplier": ("embed_tokens",),
        "lm_head_multiplier": ("lm_head",),
        "key_multiplier": ("k_proj",),
        "attention_in_multiplier": ("q_proj", "k_proj", "v_proj"),
        "attention_out_multiplier": ("o_proj",),
        "mlp_multipliers.0": ("gate_proj",),
        "mlp_multipliers.1": ("down_proj",),
        "ssm_in_multiplier": ("in_proj",),
        "ssm_out_multiplier": ("out_proj",),
        "ssm_multipliers": ("in_proj",),
    },
}
DIVIDES = {("granite", "logits_scaling"), ("granitemoe", "logits_scaling")}
KINDS = {"minicpm3": (minicpm3, minicpm3.MINICPM3), "falcon_h1": (falcon_h1, falcon_h1.FALCON_H1)}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def build_model(content):
    cls = content["architectures"][0]
    config = getattr(transformers, cls.replace("ForCausalLM", "Config"))(**content)
    config._experts_implementation = "eager"  # grouped products have no float64
    return getattr(transformers, cls)(config).eval()


def emit_config(transferred, name, folder, settings=()):
    importlib.import_module(f"scaletune.transferring.formats.{name}").emit(
        transferred((MOE if name == "granitemoe" else {}) | dict(settings)), folder
    )
    return config_of(folder)


def doubled(content, key):
    name, _, item = key.partition(".")
    value = content[name]
    return content | {
        name: [v * 2 if item in ("", str(i)) else v for i, v in enumerate(value)]
        if isinstance(value, list)
        else value * 2
    }


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, keys in ACTS_ON.items() for key in keys]
)
def test_a_doubled_multiplier_equals_doubled_weights(transferred, tmp_path, name, key):
    content = emit_config(transferred, name, tmp_path, EVERYTHING)
    theirs, other = build_model(content).double(), build_model(doubled(content, key)).double()
    factor = 0.5 if (name, key) in DIVIDES else 2.0
    other.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        before, doubled_logits = theirs(draw_tokens()).logits, other(draw_tokens()).logits
        touched = [
            p.mul_(factor)
            for n, p in theirs.named_parameters()
            if any(part in n for part in ACTS_ON[name][key])
        ]
        expected = theirs(draw_tokens()).logits
    assert touched
    assert torch.allclose(doubled_logits, expected, rtol=1e-4, atol=1e-5 * float(expected.std()))
    assert (doubled_logits - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("name", ACTS_ON)
def test_every_multiplier_is_tested(transferred, tmp_path, name):
    multipliers = {
        key
        for key in emit_config(transferred, name, tmp_path)
        if "multiplier" in key or "scal" in key or "dim_model" in key
    }
    assert multipliers == {key.partition(".")[0] for key in ACTS_ON[name]}


# --- architectures outside our model families -----------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, EVERYTHING, {"model.tied": True}, {"form": "sp_per_layer"}]
)
@pytest.mark.parametrize("name", KINDS)
def test_it_builds_with_the_shapes_and_stds_that_were_planned(
    transferred, tmp_path, name, settings
):
    if name == "minicpm3" and settings is EVERYTHING:
        settings = settings | {"parametrization.attention_multiplier": 2.0}
    prepared = transferred(settings)
    content = emit_config(transferred, name, tmp_path, settings)
    theirs = build_model(content)
    cls = type(theirs.config)
    assert content.keys() <= {field.name for field in dataclasses.fields(cls)} | {"model_type"}
    assert content == {key: getattr(theirs.config, key) for key in content}
    planned = {
        tensor.name: tensor.shape
        for tensor in untested_archs.tensors(KINDS[name][1], prepared.target.model, VOCAB)
    }
    assert planned == {n: tuple(p.shape) for n, p in theirs.named_parameters()}
    import_loader(tmp_path).initialize(theirs)
    stds = {
        n: g["init_std"]
        for g in import_loader(tmp_path).SETTINGS["groups"]
        for n in planned
        for p in g["patterns"]
        if re.match(p, n)
    }
    for n, p in theirs.named_parameters():
        if stds[n]:
            assert float(p.detach().std()) == pytest.approx(
                stds[n], rel=5 / (2 * p.numel()) ** 0.5
            ), n
    assert lint(tmp_path)["findings"] == []


LR = 1e-2


def update_rms(transferred, name, folder, width, steps=4, scaled=True):
    """RMS change of the last residual stream and of the logits in a few AdamW steps."""
    emit_config(
        transferred, name, folder, {"width": width, "lr": LR, "parametrization.init_std": 0.1}
    )
    torch.manual_seed(0)
    theirs, attach = build_model(config_of(folder)), import_loader(folder)
    attach.initialize(theirs)
    opt = attach.make_optimizer(theirs)
    if not scaled:  # standard parametrization: one lr for all tensors
        for group in opt.param_groups:
            group["lr"] = LR
    tokens, targets, streams = draw_tokens(), draw_tokens(1), []
    list(theirs.model.children())[-2].register_forward_pre_hook(
        lambda _, args: streams.append(args[0].detach())
    )

    def outputs():
        with torch.no_grad():
            logits = theirs(tokens).logits
        return streams[-1], logits

    start = outputs()
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).backward()
        opt.step()
    return [
        float((after - before).pow(2).mean().sqrt())
        for before, after in zip(start, outputs(), strict=True)
    ]


def slopes(transferred, name, folder, scaled=True):
    """Exponents of width in `update_rms`."""
    widths = [32, 64, 128]
    updates = [
        update_rms(transferred, name, folder / f"{name}{width}{scaled}", width, scaled=scaled)
        for width in widths
    ]
    return [
        np.polyfit(np.log2(widths), np.log2(column), 1)[0] for column in zip(*updates, strict=True)
    ]


@pytest.mark.parametrize("name", KINDS)
def test_updates_do_not_grow_with_width(transferred, tmp_path, name):
    """The exponents equal those of Granite; with one lr for all tensors updates grow with width."""
    granite, ours, plain = (
        slopes(transferred, *of)
        for of in (("granite", tmp_path), (name, tmp_path), (name, tmp_path, False))
    )
    assert abs(ours[0]) < 0.1 and ours == pytest.approx(granite, abs=0.1) and plain[0] > 0.5


@pytest.mark.parametrize("name", KINDS)
def test_a_forced_transfer_lists_what_no_proxy_had(tiny, tmp_path, name):
    with pytest.raises(
        UserError,
        match=f"^format `{name}` has {UNTESTED[name]}, which no proxy can test: emit it anyway "
        f"with --force",
    ):
        transfer(make_fit(tiny), tiny(WIDE), [name], tmp_path)
    assert not list(tmp_path.iterdir())
    transfer(make_fit(tiny), tiny(WIDE), [name], tmp_path, force=True)
    assumptions = json.loads((tmp_path / name / "param_groups.json").read_text())["evidence"][
        "assumptions"
    ]
    assert [
        line
        for line in assumptions
        if line.startswith("forced: no proxy had ") and "optimum is untested" in line
    ]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "minicpm3",
            {"model.kv_heads": 2},
            "^MiniCPM3 needs as many key-value heads as heads, but got kv_heads=2, heads=8$",
        ),
        (
            "minicpm3",
            {"model.head_dim": 4},
            "^MiniCPM3 needs a `head_dim` and a `base_width` that are multiples of 8, but got "
            "head_dim=4",
        ),
        (
            "minicpm3",
            {"model.tied": True, "parametrization.logits_multiplier": 0.7},
            "the tied head needs 22.4 / 128: set model.tied",
        ),
        (
            "falcon_h1",
            {"model.biases": True},
            "^FalconH1 needs `model.biases` False, but the target has True$",
        ),
        (
            "falcon_h1",
            {"model.norm": "layer"},
            "^FalconH1 needs `model.norm` 'rms', but the target has 'layer'$",
        ),
        (
            "falcon_h1",
            {"optimizer.family": "muon"},
            "^format 'falcon_h1' supports `optimizer.family` 'adamw', but got 'muon'$",
        ),
    ],
)
def test_unsupported_settings_are_refused(transferred, tmp_path, name, settings, message):
    with pytest.raises(UserError, match=message):
        emit_config(transferred, name, tmp_path, settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", KINDS)
def test_at_the_base_size_it_is_the_ordinary_config(transferred, tmp_path, name):
    content = emit_config(transferred, name, tmp_path, {"width": 32})
    ordinary = (
        {"scale_emb": 1.0, "scale_depth": 2**0.5, "dim_model_base": 32}
        if name == "minicpm3"
        else {"lm_head_multiplier": 1.0, "key_multiplier": 1.0}
    )
    assert {key: content[key] for key in ordinary} == pytest.approx(ordinary)
    assert content["initializer_range"] == 0.2
    groups = json.loads((tmp_path / "param_groups.json").read_text())["groups"]
    assert {(group["lr"], group["eps"]) for group in groups} == {(0.005, 1e-8)}
