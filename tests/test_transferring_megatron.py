"""Megatron formats, run with the GPT model, groups and scheduler of megatron-core 0.16.1 on the CPU."""

import dataclasses
import re
import sys
from types import ModuleType

import pytest
import torch
from test_transferring import EVERYTHING, VOCAB, drawn, trained
from test_transferring_native import FEW, RESIDUAL, SCALED, WIDTH, Tracker, imported, transferred  # noqa: F401
from torch.nn import functional as F

from scaletune import models, optim
from scaletune.errors import UserError
from scaletune.linting.lint import lint
from scaletune.transferring.formats import megatron, megatron_bridge
from scaletune.transferring.param_groups import rows_by_name
from scaletune.transferring.read_back import plan_settings, read

pytest.importorskip("megatron.core")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("UserWarning", "DeprecationWarning", "FutureWarning")
]  # of its imports
EXACTLY = {
    "optimizer.eps": 1e-4,
    "lr": 2e-2,
    "schedule.kind": "constant",
    "schedule.warmup": 0.0,
    "schedule.floor": 0.0,
}


@pytest.fixture(scope="module")
def ranks():
    """One process that is all ranks."""
    from megatron.core import parallel_state

    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def emitted(ranks, monkeypatch, tmp_path):
    """made -> (the emitted Bridge module, Megatron's model built from its MODEL, on the CPU)."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    monkeypatch.setattr(
        "megatron.core.tensor_parallel.get_cuda_rng_tracker", Tracker
    )  # its own knows GPUs alone

    class Provider:
        def __init__(self, **fields):
            self.fields, self.hooks = fields, []

        def register_pre_wrap_hook(self, hook):
            self.hooks.append(hook)

    each = {
        "gpt_provider": {"GPTModelProvider": Provider},
        "config": {"OptimizerConfigOverrideProvider": object},
    }
    for name in ("megatron.bridge", "megatron.bridge.models", "megatron.bridge.training"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, within in (("gpt_provider", "models"), ("config", "training")):
        module = ModuleType(f"megatron.bridge.{within}.{name}")
        module.__dict__.update(each[name])
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def make(made):
        megatron_bridge.emit(made, tmp_path)
        module = imported(tmp_path / "scaletune_megatron_bridge.py")
        provider = module.model_provider()
        known = {field.name for field in dataclasses.fields(TransformerConfig)}
        own = {key: value for key, value in provider.fields.items() if key in known}
        config = TransformerConfig(**own, use_cpu_initialization=True, params_dtype=torch.float64)
        assert provider.fields.keys() - known == {
            "position_embedding_type", "rotary_base", "seq_length", "vocab_size", "share_embeddings_and_output_weights",
        }  # fmt: skip
        model = GPTModel(
            config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=provider.fields["vocab_size"],
            max_sequence_length=provider.fields["seq_length"], position_embedding_type=provider.fields["position_embedding_type"],
            rotary_base=provider.fields["rotary_base"], share_embeddings_and_output_weights=provider.fields["share_embeddings_and_output_weights"],
        )  # fmt: skip
        return module, model, provider

    return make


def groups_of(module, model):
    """Megatron's own param groups from the emitted overrides."""
    from megatron.core.optimizer import OptimizerConfig, _get_param_groups

    config = OptimizerConfig(**module.OPTIMIZER)
    return _get_param_groups(
        [model],
        config,
        module.Groups().build_config_overrides(type("Context", (), {"model": [model]})),
    )


def scheduled(module, opt):
    """Megatron's own scheduler over a torch optimizer, as Bridge would build it from the emitted fields."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    s, o = module.SCHEDULER, module.OPTIMIZER
    return OptimizerParamScheduler(
        opt, init_lr=0.0, max_lr=o["lr"], min_lr=o["min_lr"], lr_warmup_steps=s["lr_warmup_iters"], lr_decay_steps=s["lr_decay_iters"],
        lr_decay_style=s["lr_decay_style"], start_wd=o["weight_decay"], end_wd=o["weight_decay"], wd_incr_steps=8, wd_incr_style="constant",
        wsd_decay_steps=s.get("lr_wsd_decay_iters"), lr_wsd_decay_style=s.get("lr_wsd_decay_style"),
    )  # fmt: skip


def optimizer_of(module, model):
    o = module.OPTIMIZER
    return torch.optim.AdamW(
        groups_of(module, model),
        lr=o["lr"],
        betas=(o["adam_beta1"], o["adam_beta2"]),
        eps=o["adam_eps"],
    )


@pytest.mark.parametrize(
    "settings", [{}, EVERYTHING | SCALED | RESIDUAL, {"form": "ntk"}, {"form": "mup_t3"}]
)
def test_megatrons_own_groups_are_the_plan(transferred, emitted, settings):  # noqa: F811
    made = transferred(settings)
    module, model, provider = emitted(made)
    torch.manual_seed(0)
    assert provider.hooks[0]([model]) == [model]
    expected = rows_by_name(
        megatron.rewrite_plan(made, "megatron_bridge", ("attention",))[0], megatron.NAMES
    )
    opt, names = optimizer_of(module, model), {id(p): name for name, p in model.named_parameters()}
    scheduled(module, opt).step(1)
    for group in opt.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            row = next(row for pattern, row in expected.items() if re.search(pattern, name))
            now = (group["max_lr"], group["weight_decay"], group["eps"])
            assert now == pytest.approx((row.lr, row.weight_decay, row.eps), rel=1e-12), name
            if row.init_std:
                assert float(parameter.detach().std()) == pytest.approx(
                    row.init_std, rel=5 / (2 * parameter.numel()) ** 0.5
                ), name
    assert not names


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_megatrons_own_schedule_keeps_the_groups_apart(transferred, emitted, kind):  # noqa: F811
    """At every step each group is at the same share of its peak, which is ours at a whole step."""
    made = transferred(
        {
            "schedule.kind": kind,
            "schedule.warmup": 0.25,
            "schedule.decay": 0.25,
            "schedule.floor": 0.1,
        }
        | ({} if kind == "wsd" else {"schedule.decay": 0.3})
    )
    module, model, _ = emitted(made)
    opt = optimizer_of(module, model)
    schedule = scheduled(module, opt)
    for step in range(9):
        expected = optim.multiplier(made.target.schedule, step / 8)
        assert [group["lr"] / group["max_lr"] for group in opt.param_groups] == pytest.approx(
            [expected] * len(opt.param_groups), abs=1e-9
        )
        schedule.step(1)


def weights(made, model):
    """Our initial weights as the emitted plan writes them, put where Megatron keeps them."""
    ours = models.build(made.target, VOCAB).double()
    state = models.plain_state(ours)
    rows = {
        row.name: row for row in megatron.rewrite_plan(made, "megatron_bridge", ("attention",))[0]
    }
    w = {
        row.name: state[row.name]
        * (rows[row.name].init_std / row.init_std if row.init_std else 1.0)
        for row in made.plan
    }
    shape = made.target.model
    groups, each = shape.kv_heads or shape.heads, shape.head_dim

    def qkv(layer):
        q, k, v = (
            w[f"{layer}self_attn.{kind}_proj.weight"].view(groups, -1, shape.width)
            for kind in "qkv"
        )
        assert k.shape[1] == each
        return torch.cat([q, k, v], 1).reshape(-1, shape.width)

    told = {
        "embedding.word_embeddings.weight": w["model.embed_tokens.weight"],
        "output_layer.weight": w["lm_head.weight"],
    }
    told["decoder.final_layernorm.weight"] = w["model.norm.weight"]
    for i in range(shape.depth):
        a, b = f"model.layers.{i}.", f"decoder.layers.{i}."
        told |= {
            b + "self_attention.linear_qkv.weight": qkv(a), b + "self_attention.linear_proj.weight": w[a + "self_attn.o_proj.weight"],
            b + "mlp.linear_fc1.weight": torch.cat([w[a + "mlp.gate_proj.weight"], w[a + "mlp.up_proj.weight"]]),
            b + "mlp.linear_fc2.weight": w[a + "mlp.down_proj.weight"], b + "input_layernorm.weight": w[a + "input_layernorm.weight"],
            b + "pre_mlp_layernorm.weight": w[a + "post_attention_layernorm.weight"],
        }  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(told.pop(name))
    assert not told
    return ours


@pytest.mark.parametrize(
    "settings",
    [{}, EVERYTHING | SCALED | RESIDUAL, WIDTH | {"form": "mup_t9"}, FEW | {"width": 32}],
)
def test_megatrons_own_model_trains_as_ours(transferred, emitted, monkeypatch, settings):  # noqa: F811
    """Eight steps of AdamW in float64 with the emitted groups under Megatron's scheduler, and ours with our own: the same losses."""
    made = transferred(settings | EXACTLY)
    module, theirs, _ = emitted(made)
    ours, tokens, targets = weights(made, theirs), drawn(), drawn(1)
    monkeypatch.setattr(
        torch.cuda, "current_device", lambda: torch.device("cpu")
    )  # where it looks for its rotary frequencies
    theirs.rotary_pos_emb.inv_freq = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = torch.outer(
        torch.arange(len(ours.model.cos), dtype=torch.float64), theirs.rotary_pos_emb.inv_freq
    ).repeat(1, 2)
    ours.model.cos, ours.model.sin = angles.cos(), angles.sin()
    mask = torch.ones(16, 16, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(16).expand(4, 16)
    opt = optimizer_of(module, theirs)
    schedule = scheduled(module, opt)
    got = trained(
        lambda: F.cross_entropy(theirs(tokens, positions, mask).flatten(0, 1), targets.flatten()),
        opt,
        lambda: schedule.step(1),
    )
    o = made.target.optimizer
    own = torch.optim.AdamW(optim.groups(ours, made.plan), betas=(o.beta1, o.beta2))
    expected = trained(lambda: ours(tokens, targets).sum(), own, lambda: None)
    assert got[0] == pytest.approx(expected[0], rel=1e-12)
    assert got == pytest.approx(
        expected, rel=1e-6
    )  # measured 4e-7: not all of its backward pass is in float64
    assert expected[-1] < expected[0] - 0.1


def test_what_is_read_back_is_the_plan(transferred, tmp_path):  # noqa: F811
    made = transferred(EVERYTHING | SCALED | RESIDUAL)
    megatron_bridge.emit(made, tmp_path)
    got = read(tmp_path, made.target.model)
    assert got == {
        name: pytest.approx(values, rel=1e-12) for name, values in plan_settings(made).items()
    }
    assert lint(tmp_path)["findings"] == []


def test_a_tied_head_that_needs_a_multiplier_is_refused(transferred, tmp_path):  # noqa: F811
    with pytest.raises(
        UserError,
        match=r"^format 'megatron_bridge' has no logits multiplier, but the tied head needs one of 0.25",
    ):
        megatron_bridge.emit(transferred({"model.tied": True}), tmp_path)
    assert not list(tmp_path.iterdir())
