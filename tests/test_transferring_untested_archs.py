"""MiniCPM3 and Falcon-H1; and doubling a multiplier in any Hugging Face config equals doubling weights."""

import dataclasses
import importlib
import json
import re

import numpy as np
import pytest
import torch
import transformers
from conftest import VOCAB, WIDE
from test_transferring import EVERYTHING, drawn, learned, loader
from test_transferring_moe import MOE
from torch.nn import functional as F

from scaletune.errors import UserError
from scaletune.linting.lint import lint
from scaletune.transferring import transfer
from scaletune.transferring.formats import falcon_h1, minicpm3, untested_archs
from scaletune.transferring.formats.unsupported import UNTESTED

BRANCHES = ("o_proj", "down_proj", "shared_mlp.output_linear")
GRANITE = {
    "embedding_multiplier": ("embed_tokens",), "attention_multiplier": ("q_proj",), "residual_multiplier": BRANCHES,
    "logits_scaling": ("lm_head",),
}  # fmt: skip
ACTS_ON = {  # format -> config key (an item of a list after a dot) -> parts of names of the weights that it acts on
    "granite": GRANITE, "hyperclovax": GRANITE, "granitemoe": GRANITE,
    "minicpm3": {"scale_emb": ("embed_tokens",), "scale_depth": BRANCHES, "dim_model_base": ("lm_head",)},
    "falcon_h1": {
        "embedding_multiplier": ("embed_tokens",), "lm_head_multiplier": ("lm_head",), "key_multiplier": ("k_proj",),
        "attention_in_multiplier": ("q_proj", "k_proj", "v_proj"), "attention_out_multiplier": ("o_proj",), "mlp_multipliers.0": ("gate_proj",),
        "mlp_multipliers.1": ("down_proj",), "ssm_in_multiplier": ("in_proj",), "ssm_out_multiplier": ("out_proj",),
        "ssm_multipliers": ("in_proj",),
    },
}  # fmt: skip
DIVIDES = {("granite", "logits_scaling"), ("granitemoe", "logits_scaling")}
KINDS = {"minicpm3": (minicpm3, minicpm3.MINICPM3), "falcon_h1": (falcon_h1, falcon_h1.FALCON_H1)}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def built(content):
    cls = content["architectures"][0]
    config = getattr(transformers, cls.replace("ForCausalLM", "Config"))(**content)
    config._experts_implementation = "eager"  # grouped products have no float64
    return getattr(transformers, cls)(config).eval()


def emitted(transferred, name, folder, settings=()):
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
def test_a_doubled_multiplier_is_doubled_weights(transferred, tmp_path, name, key):
    content = emitted(transferred, name, tmp_path, EVERYTHING)
    theirs, other = built(content).double(), built(doubled(content, key)).double()
    factor = 0.5 if (name, key) in DIVIDES else 2.0
    other.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        before, got = theirs(drawn()).logits, other(drawn()).logits
        touched = [
            p.mul_(factor)
            for n, p in theirs.named_parameters()
            if any(part in n for part in ACTS_ON[name][key])
        ]
        expected = theirs(drawn()).logits
    assert touched and torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.std()))
    assert (got - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("name", ACTS_ON)
def test_no_multiplier_is_left_unprobed(transferred, tmp_path, name):
    said = {
        key
        for key in emitted(transferred, name, tmp_path)
        if "multiplier" in key or "scal" in key or "dim_model" in key
    }
    assert said == {key.partition(".")[0] for key in ACTS_ON[name]}


# --- architectures that no family of ours is -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, EVERYTHING, {"model.tied": True}, {"form": "sp_per_layer"}]
)
@pytest.mark.parametrize("name", KINDS)
def test_it_builds_with_the_shapes_and_stds_that_were_planned(
    transferred, tmp_path, name, settings
):
    if name == "minicpm3" and settings is EVERYTHING:
        settings = settings | {"parametrization.attention_multiplier": 2.0}
    made = transferred(settings)
    content = emitted(transferred, name, tmp_path, settings)
    theirs = built(content)
    cls = type(theirs.config)
    assert content.keys() <= {field.name for field in dataclasses.fields(cls)} | {"model_type"}
    assert content == {key: getattr(theirs.config, key) for key in content}
    planned = {
        tensor.name: tensor.shape
        for tensor in untested_archs.tensors(KINDS[name][1], made.target.model, VOCAB)
    }
    assert planned == {n: tuple(p.shape) for n, p in theirs.named_parameters()}
    loader(tmp_path).initialize(theirs)
    stds = {
        n: g["init_std"]
        for g in loader(tmp_path).SETTINGS["groups"]
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


def moved(transferred, name, folder, width, steps=4, scaled=True):
    """RMS of what the last residual stream and the logits moved by in a few steps of AdamW."""
    emitted(transferred, name, folder, {"width": width, "lr": LR, "parametrization.init_std": 0.1})
    torch.manual_seed(0)
    theirs, attach = built(config_of(folder)), loader(folder)
    attach.initialize(theirs)
    opt = attach.make_optimizer(theirs)
    if not scaled:  # what is left of it in standard parametrization: one lr
        for group in opt.param_groups:
            group["lr"] = LR
    tokens, targets, stream = drawn(), drawn(1), []
    list(theirs.model.children())[-2].register_forward_pre_hook(
        lambda _, args: stream.append(args[0].detach())
    )

    def seen():
        with torch.no_grad():
            logits = theirs(tokens).logits
        return stream[-1], logits

    start = seen()
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).backward()
        opt.step()
    return [
        float((after - before).pow(2).mean().sqrt())
        for before, after in zip(start, seen(), strict=True)
    ]


def slopes(transferred, name, folder, scaled=True):
    """Exponents of width in that movement."""
    widths = [32, 64, 128]
    found = [
        moved(transferred, name, folder / f"{name}{width}{scaled}", width, scaled=scaled)
        for width in widths
    ]
    return [
        np.polyfit(np.log2(widths), np.log2(column), 1)[0] for column in zip(*found, strict=True)
    ]


@pytest.mark.parametrize("name", KINDS)
def test_what_it_learns_in_a_few_steps_is_no_matter_of_width(transferred, tmp_path, name):
    """As it is of Granite, whose plan our own models were tested with; with one lr for all tensors it grows."""
    granite, ours, plain = (
        slopes(transferred, *of)
        for of in (("granite", tmp_path), (name, tmp_path), (name, tmp_path, False))
    )
    assert abs(ours[0]) < 0.1 and ours == pytest.approx(granite, abs=0.1) and plain[0] > 0.5


@pytest.mark.parametrize("name", KINDS)
def test_it_is_written_when_forced_and_says_what_no_proxy_had(tiny, tmp_path, name):
    with pytest.raises(
        UserError,
        match=f"^format `{name}` has {UNTESTED[name]}, which no proxy can test: emit it anyway with --force",
    ):
        transfer(learned(tiny), tiny(WIDE), [name], tmp_path)
    assert not list(tmp_path.iterdir())
    transfer(learned(tiny), tiny(WIDE), [name], tmp_path, force=True)
    said = json.loads((tmp_path / name / "param_groups.json").read_text())["evidence"][
        "assumptions"
    ]
    assert [
        line
        for line in said
        if line.startswith("forced: no proxy had ") and "optimum is untested" in line
    ]


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "minicpm3",
            {"model.kv_heads": 2},
            "^MiniCPM3 needs as many key-value heads as heads, but got kv_heads=2, heads=8$",
        ),
        (
            "minicpm3",
            {"model.head_dim": 4},
            "^MiniCPM3 needs a `head_dim` and a `base_width` that are multiples of 8, but got head_dim=4",
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
def test_what_they_cannot_say_is_refused(transferred, tmp_path, name, settings, said):
    with pytest.raises(UserError, match=said):
        emitted(transferred, name, tmp_path, settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", KINDS)
def test_at_the_base_size_it_is_the_ordinary_config(transferred, tmp_path, name):
    content = emitted(transferred, name, tmp_path, {"width": 32})
    ordinary = (
        {"scale_emb": 1.0, "scale_depth": 2**0.5, "dim_model_base": 32}
        if name == "minicpm3"
        else {"lm_head_multiplier": 1.0, "key_multiplier": 1.0}
    )
    assert {key: content[key] for key in ordinary} == pytest.approx(ordinary) and content[
        "initializer_range"
    ] == 0.2
    groups = json.loads((tmp_path / "param_groups.json").read_text())["groups"]
    assert {(group["lr"], group["eps"]) for group in groups} == {(0.005, 1e-8)}
