"""Mixture of experts: logits, loss and gradients equal those of Hugging Face's models.

The models are Mixtral, Qwen3-MoE and Granite-MoE.
"""

import pytest
import torch
from test_models import VOCAB, as_llama, assert_same_logits, drawn, moved
from transformers import (
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from scaletune import counting, models

MOE = {"family": "moe", "width": 32, "depth": 2, "head_dim": 16, "n_experts": 4, "top_k": 2}


def mixture(tiny, options=(), **settings):
    """The tiny recipe with a mixture of four experts."""
    given = {"model": MOE | dict(options), "parametrization.init_std": 0.2}
    return tiny(given | settings)


def as_mixtral(state):
    """Gate and up projections of all experts as one tensor, under Mixtral's names."""
    renamed = {}
    for name, value in state.items():
        if "experts.up_proj" in name:
            continue
        if "experts.gate_proj" in name:
            value = torch.cat([value, state[name.replace("gate_proj", "up_proj")]], 1)
        renamed[
            name.replace("gate_proj.weight", "gate_up_proj").replace(
                "down_proj.weight", "down_proj"
            )
            if "experts" in name
            else name
        ] = value
    return renamed


def as_granite_moe(state):
    """Shared experts beside the block, and the router under another name."""
    renamed = {}
    for name, value in as_mixtral(
        {name: value for name, value in state.items() if "shared_experts" not in name}
    ).items():
        renamed[
            name.replace("mlp.gate.", "block_sparse_moe.router.").replace(
                "mlp.experts", "block_sparse_moe.experts"
            )
        ] = value
    for name in (name for name in state if "shared_experts.gate_proj" in name):
        both = torch.cat([state[name], state[name.replace("gate_proj", "up_proj")]])
        renamed[name.replace("mlp.shared_experts.gate_proj", "shared_mlp.input_linear")] = both
        down = state[name.replace("gate_proj", "down_proj")]
        renamed[name.replace("mlp.shared_experts.gate_proj", "shared_mlp.output_linear")] = down
    return renamed


def mixtral(model, coef=0.0):
    shared = {
        "num_local_experts": model.n_experts,
        "num_experts_per_tok": model.top_k,
        "output_router_logits": True,
    }
    return MixtralForCausalLM(
        MixtralConfig(
            **as_llama(model),
            **shared,
            router_aux_loss_coef=coef,
            sliding_window=None,
            experts_implementation="eager",
        )
    )


@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_mixtrals(tiny, top_k, tied):
    recipe = mixture(tiny, {"top_k": top_k, "tied": tied, "kv_heads": 1})
    ours = moved(recipe)
    assert_same_logits(ours, mixtral(recipe.model), as_mixtral(models.plain_state(ours)), tied)


def test_logits_are_qwen3_moes(tiny):
    """Qwen3 has query and key norms and does not renormalise the chosen probabilities."""
    recipe = mixture(tiny, {"norm_top_k": False, "qk_norm": True})
    ours, m = moved(recipe), recipe.model
    named = {
        "num_experts": m.n_experts,
        "num_experts_per_tok": m.top_k,
        "moe_intermediate_size": m.ffn_width,
        "norm_topk_prob": False,
    }
    assert_same_logits(
        ours,
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**as_llama(m), **named)),
        as_mixtral(models.plain_state(ours)),
    )


def test_logits_are_granite_moes_with_shared_experts_and_multipliers(tiny):
    named = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 1.5,
        "residual_multiplier": 0.4,
        "logits_multiplier": 0.5,
    }
    recipe = mixture(
        tiny,
        {"n_shared_experts": 2},
        **{f"parametrization.{key}": value for key, value in named.items()},
    )
    ours, m = moved(recipe), recipe.model
    config = GraniteMoeSharedConfig(
        **as_llama(m),
        num_local_experts=m.n_experts,
        num_experts_per_tok=m.top_k,
        shared_intermediate_size=2 * m.ffn_width,
        embedding_multiplier=3.0,
        attention_multiplier=1.5 / 4,
        residual_multiplier=0.4,
        logits_scaling=2.0,
    )
    assert_same_logits(
        ours, GraniteMoeSharedForCausalLM(config), as_granite_moe(models.plain_state(ours))
    )


def test_the_reported_loss_is_nats_and_the_gradient_includes_the_balance_loss(tiny):
    """As in Mixtral: the gradient is that of cross-entropy plus coefficient times balance loss."""
    recipe = mixture(tiny, {"balance_coef": 0.3})
    ours, theirs = moved(recipe).double(), mixtral(recipe.model, coef=0.3).double()
    theirs.load_state_dict(as_mixtral(models.plain_state(ours)))
    tokens = drawn()
    targets = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
    theirs_out = theirs(tokens, labels=tokens, shift_labels=targets)
    reported = ours(tokens, targets)
    assert float(reported.detach()) == pytest.approx(
        float(theirs_out.loss.detach() - 0.3 * theirs_out.aux_loss.detach()), rel=1e-6
    )
    assert theirs_out.aux_loss > 2
    theirs_out.loss.backward()
    reported.sum().backward()
    gradients = as_mixtral({name: parameter.grad[0] for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        # Hugging Face computes its norms in float32.
        assert torch.allclose(gradients[name], parameter.grad, rtol=0, atol=2e-6), name
    alone = moved(mixture(tiny, {"balance_coef": 0.0})).double()
    loss = alone(tokens, targets)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(float(reported.detach()), rel=1e-12)
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(
        dict(alone.named_parameters())[gate].grad[0], gradients[gate], atol=1e-5
    )


def test_no_state_of_a_forward_pass_is_kept(tiny):
    model = models.build(mixture(tiny), VOCAB)
    for arguments in ((drawn(),), (drawn(), drawn(seed=1))):
        model(*arguments)
        assert all(
            module.routing is None
            for module in model.modules()
            if isinstance(module, models.moe.MoELayer)
        )


@pytest.mark.parametrize(("router", "factor", "lr"), [("out", 0.25, 1.0), ("hid", 1.0, 0.25)])
def test_a_router_is_a_readout_or_a_matrix(tiny, router, factor, lr):
    """Table 8 at four times the base width.

    A readout has a multiplier and the full lr, a hidden matrix has 1/m in its lr. The output head
    has its own multiplier.
    """
    settings = {"width": 128, "parametrization.logits_multiplier": 3.0}
    rows = {
        row.name: row
        for row in counting.plan_tensors(mixture(tiny, {"router": router}, **settings), VOCAB)
    }
    gate, head = rows["model.layers.0.mlp.gate.weight"], rows["lm_head.weight"]
    assert (gate.multiplier, gate.lr) == pytest.approx((factor, lr * head.lr))
    assert head.multiplier == 0.75


def test_experts_scale_by_their_own_fan_in(tiny):
    rows = {row.name: row for row in counting.plan_tensors(mixture(tiny, width=128), VOCAB)}
    for proj in ("gate_proj", "up_proj", "down_proj"):
        row = rows[f"model.layers.1.mlp.experts.{proj}.weight"]
        assert (row.role, row.m_in, row.m_out) == ("hid", 4, 4)


def test_active_parameters_are_those_that_a_token_uses(tiny):
    """A dense model with an MLP as wide as the chosen and shared experts, plus a router."""
    model = mixture(tiny, {"n_shared_experts": 1}).model
    # Two chosen and one shared expert, each as wide as the model.
    dense = tiny({"model.ffn_ratio": 3.0}).model
    counted, other = counting.params(model, VOCAB), counting.params(dense, VOCAB)
    assert counted["n_params_active"] == other["n_params"] + counted["router"]
    assert counted["router"] == model.depth * model.n_experts * model.width
    assert counted["n_params"] - counted["n_params_active"] == counted["experts"] // 2
