"""The Transformer equals Hugging Face's LLaMA, Qwen3, Granite and GPT-2.

A stack equals its trials alone.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from scaletune import counting, models
from scaletune.models.build import generator

VOCAB = 61
# At the base width: four heads, and no multipliers.
WIDE = {"parametrization.base_width": 64, "parametrization.init_std": 0.15}


def drawn(rows=3, positions=16, seed=0):
    return torch.randint(VOCAB, (rows, positions), generator=torch.Generator().manual_seed(seed))


def as_llama(m):
    """The settings that configs of LLaMA-like models share."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": m.width,
        "intermediate_size": m.ffn_width,
        "num_hidden_layers": m.depth,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads or m.heads,
        "head_dim": m.head_dim,
        "rms_norm_eps": m.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "tie_word_embeddings": m.tied,
        "attention_bias": m.biases,
        "max_position_embeddings": 32,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def moved(recipe, vocab_size=VOCAB):
    """The recipe's model with random gains and biases, so that a missing one changes the output."""
    model = models.build(recipe, vocab_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator(1, name))
    return model


def assert_same_logits(ours, theirs, state, tied=False):
    """`theirs` with our weights gives the same output as `ours`."""
    loaded = theirs.eval().load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert loaded.missing_keys == (["lm_head.weight"] if tied else [])
    with torch.no_grad():
        expected, got = theirs(drawn()).logits, ours(drawn())[0]
    assert expected.std() > 0.1  # the outputs are not all near zero
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"rope_theta": 5e5}, {"kv_heads": 2}, {"kv_heads": 1, "biases": True}], ids=str
)
def test_logits_are_llamas(tiny, tied, options):
    model = {"tied": tied, "width": 64, **options}
    recipe = tiny({f"model.{key}": value for key, value in model.items()} | WIDE)
    ours = moved(recipe)
    theirs = LlamaForCausalLM(LlamaConfig(**as_llama(recipe.model), mlp_bias=recipe.model.biases))
    assert_same_logits(ours, theirs, models.plain_state(ours), tied)


def test_logits_are_qwen3s(tiny):
    recipe = tiny({"model.qk_norm": True, "model.kv_heads": 2, "width": 64, **WIDE})
    ours = moved(recipe)
    assert_same_logits(
        ours, Qwen3ForCausalLM(Qwen3Config(**as_llama(recipe.model))), models.plain_state(ours)
    )


def test_logits_are_granites_with_every_multiplier(tiny):
    """At twice the base width and depth.

    Granite multiplies embedding and branch, divides logits, and takes the scale of the softmax.
    """
    named = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 1.5,
        "residual_multiplier": 0.4,
        "logits_multiplier": 2.0,
    }
    depth = {"depth": 4, "parametrization.base_depth": 2, "parametrization.depth_alpha": 1.0}
    recipe = tiny(
        {f"parametrization.{key}": value for key, value in named.items()}
        | depth
        | {"width": 64, "parametrization.init_std": 0.15}
    )
    ours = moved(recipe)
    multipliers = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 1.5 / 4,
        "residual_multiplier": 0.2,
        "logits_scaling": 2 / 2,
    }
    assert_same_logits(
        ours,
        GraniteForCausalLM(GraniteConfig(**as_llama(recipe.model), **multipliers)),
        models.plain_state(ours),
    )


def as_gpt2(state):
    """Our tensors under GPT-2's names and layouts.

    GPT-2 fuses queries, keys and values; its matrices are [fan_in, fan_out].
    """
    named = {
        "model.embed_tokens": "wte",
        "model.embed_positions": "wpe",
        "model.norm": "ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
        "model.layers": "h",
    }
    renamed = {}
    for name, value in state.items():
        for ours, theirs in named.items():
            name = name.replace(ours, theirs)
        renamed[name if name.startswith("lm_head") else f"transformer.{name}"] = (
            value.T if ".h." in f".{name}" and value.ndim == 2 else value
        )
    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [
            renamed.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")
        ]
        renamed[name.replace("self_attn.q_proj", "attn.c_attn")] = torch.cat(parts, -1)
    return renamed


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_gpt2s(tiny, tied):
    model = {
        "norm": "layer",
        "mlp": "gelu",
        "positions": "learned",
        "max_positions": 32,
        "biases": True,
        "tied": tied,
    }
    recipe = tiny(
        {f"model.{key}": value for key, value in model.items()} | {"parametrization.init_std": 0.2}
    )
    ours, m = moved(recipe), recipe.model
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=m.width,
        n_layer=m.depth,
        n_head=m.heads,
        n_inner=m.ffn_width,
        layer_norm_epsilon=m.norm_eps,
        activation_function="gelu",
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    assert_same_logits(ours, GPT2LMHeadModel(config), as_gpt2(models.plain_state(ours)), tied)


@given(changed=st.integers(0, 15), seed=st.integers(0, 99))
def test_attention_is_causal(tiny, changed, seed):
    model, tokens = models.build(tiny(), VOCAB), drawn(1, seed=seed)
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % VOCAB
    with torch.no_grad():
        change = (model(tokens) - model(other)).abs().amax((0, 1, 3))
    assert not change[:changed].any() and change[changed:].all()


def test_loss_is_cross_entropy_in_nats(tiny):
    model = models.build(tiny({"parametrization.init_std": 0.2}), VOCAB, [0, 1]).double()
    tokens, targets = drawn(), drawn(seed=1)
    with torch.no_grad():
        loss, log_p = model(tokens, targets), model(tokens).log_softmax(-1)
    expected = [
        -torch.stack(
            [log_p[k].view(-1, VOCAB)[i, t] for i, t in enumerate(targets.view(-1))]
        ).mean()
        for k in (0, 1)
    ]
    assert loss.tolist() == pytest.approx([float(e) for e in expected], rel=1e-12)
    assert loss[0] != loss[1]


def test_a_zero_readout_has_the_loss_of_a_uniform_prediction(tiny):
    model = models.build(tiny(), VOCAB)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert float(model(drawn(), drawn(seed=1)).detach()) == pytest.approx(math.log(VOCAB), rel=1e-6)


GPT2 = {
    "model.norm": "layer",
    "model.mlp": "gelu",
    "model.positions": "learned",
    "model.biases": True,
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model.tied": True, "width": 64},
        {"form": "mean_field", "width": 64},
        GPT2,
        {"model.qk_norm": True, "model.kv_heads": 1},
    ],
    ids=str,
)
def test_a_stack_is_its_trials_bitwise(tiny, settings):
    recipe, seeds, tokens, targets = tiny(settings), [3, 0, 7], drawn(), drawn(seed=1)
    stack = models.build(recipe, VOCAB, seeds)
    together = stack(tokens, targets)
    together.sum().backward()
    for k, seed in enumerate(seeds):
        alone = models.build(recipe, VOCAB, [seed])
        loss = alone(tokens, targets)
        loss.sum().backward()
        assert torch.equal(together[k].detach(), loss[0].detach())
        gradients = dict(alone.named_parameters())
        for name, parameter in stack.named_parameters():
            assert torch.equal(parameter.grad[k], gradients[name].grad[0]), name


def test_the_recipes_seed_is_a_stack_of_one(tiny):
    one, two = (
        models.build(recipe, VOCAB, seeds) for recipe, seeds in ((tiny(seed=5), ()), (tiny(), [5]))
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = models.build(tiny(seed=6), VOCAB)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("form", ["mup_t3", "mup_t9", "sp"])
def test_weights_start_at_the_planned_std(tiny, form):
    recipe = tiny(form=form, width=128)
    plan = {row.name: row.init_std for row in counting.plan_tensors(recipe, VOCAB)}
    for name, parameter in models.build(recipe, VOCAB).named_parameters():
        values = parameter.detach()
        if plan[name]:
            assert float(values.std()) == pytest.approx(
                plan[name], rel=5 / math.sqrt(2 * values.numel())
            ), name
            assert abs(float(values.mean())) < 5 * plan[name] / math.sqrt(values.numel()), name
        else:
            assert (values == 1).all(), name


def test_a_tensors_first_values_depend_on_its_name_and_seed_alone(tiny):
    """They depend on neither the order of tensors, the depth nor torch's global stream."""
    torch.manual_seed(0)
    shallow = models.plain_state(models.build(tiny(), VOCAB))
    torch.manual_seed(1)
    deep = models.plain_state(models.build(tiny(depth=5), VOCAB))
    assert all(torch.equal(values, deep[name]) for name, values in shallow.items())
    flat = [values.flatten()[:100] for values in shallow.values() if values.std() > 0]
    # No two tensors share a random stream.
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(flat) for b in flat[:i])


@pytest.mark.parametrize("form", ["ntk", "mean_field", "mup_t9"])
def test_multipliers_act_where_the_plan_says(tiny, form):
    """Folding every multiplier into its weight leaves the logits as they are."""
    recipe = tiny(
        {
            "form": form,
            "width": 128,
            "parametrization.embedding_multiplier": 3.0,
            "parametrization.logits_multiplier": 0.7,
        }
    )
    model = models.build(recipe, VOCAB).double()
    expected = model(drawn()).detach()
    plan = {row.name: row.multiplier for row in counting.plan_tensors(recipe, VOCAB)}
    assert len(set(plan.values())) > 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= plan[name]
    model.model.embedding = model.logits = 1.0
    for module in model.modules():
        if isinstance(module, models.layers.Linear):
            module.multiplier = 1.0
    assert torch.allclose(model(drawn()).detach(), expected, rtol=1e-12)


def test_loss_does_not_depend_on_how_long_the_context_could_be(tiny):
    short, long = (models.build(tiny(seq_len=n), VOCAB) for n in (16, 64))
    assert F.mse_loss(short(drawn()), long(drawn())) == 0
