"""The zoo's Transformer: against Hugging Face's LLaMA, and a stack against its trials alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from scaletune import counting, models

VOCAB = 61


def drawn(rows=3, positions=16, seed=0):
    return torch.randint(VOCAB, (rows, positions), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope_theta", [1e4, 5e5])
def test_logits_are_llamas(tiny, tied, rope_theta):
    recipe = tiny({"model.tied": tied, "model.rope_theta": rope_theta, "parametrization.init_std": 0.2})
    m = recipe.model
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=m.width, intermediate_size=m.ffn_width, num_hidden_layers=m.depth, num_attention_heads=m.width // m.head_dim,
        rms_norm_eps=m.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, tie_word_embeddings=tied,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs, ours = LlamaForCausalLM(config).eval(), models.build(recipe, VOCAB)
    loaded = theirs.load_state_dict(models.plain_state(ours), strict=False)
    assert not loaded.unexpected_keys and loaded.missing_keys == (["lm_head.weight"] if tied else [])
    with torch.no_grad():
        expected, got = theirs(drawn()).logits, ours(drawn())[0]
    assert expected.std() > 0.1  # not an equality of zeros
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)


@given(changed=st.integers(0, 15), seed=st.integers(0, 99))
def test_a_token_is_seen_from_its_place_on_only(tiny, changed, seed):
    model, tokens = models.build(tiny(), VOCAB), drawn(1, seed=seed)
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % VOCAB
    with torch.no_grad():
        moved = (model(tokens) - model(other)).abs().amax((0, 1, 3))
    assert not moved[:changed].any() and moved[changed:].all()


def test_loss_is_cross_entropy_in_nats(tiny):
    model = models.build(tiny({"parametrization.init_std": 0.2}), VOCAB, [0, 1]).double()
    tokens, targets = drawn(), drawn(seed=1)
    with torch.no_grad():
        loss, log_p = model(tokens, targets), model(tokens).log_softmax(-1)
    expected = [-torch.stack([log_p[k].view(-1, VOCAB)[i, t] for i, t in enumerate(targets.view(-1))]).mean() for k in (0, 1)]
    assert loss.tolist() == pytest.approx([float(e) for e in expected], rel=1e-12)
    assert loss[0] != loss[1]


def test_an_untrained_readout_of_zero_knows_nothing(tiny):
    model = models.build(tiny(), VOCAB)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert float(model(drawn(), drawn(seed=1)).detach()) == pytest.approx(math.log(VOCAB), rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"model.tied": True, "width": 64}, {"form": "mean_field", "width": 64}])
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
    one, two = (models.build(recipe, VOCAB, seeds) for recipe, seeds in ((tiny(seed=5), ()), (tiny(), [5])))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = models.build(tiny(seed=6), VOCAB)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("form", ["mup_t3", "mup_t9", "sp"])
def test_weights_start_at_the_planned_std(tiny, form):
    recipe = tiny(form=form, width=128)
    plan = {row.name: row.init_std for row in counting.planned(recipe, VOCAB)}
    for name, parameter in models.build(recipe, VOCAB).named_parameters():
        values = parameter.detach()
        if plan[name]:
            assert float(values.std()) == pytest.approx(plan[name], rel=5 / math.sqrt(2 * values.numel())), name
            assert abs(float(values.mean())) < 5 * plan[name] / math.sqrt(values.numel()), name
        else:
            assert (values == 1).all(), name


def test_a_tensors_first_values_depend_on_its_name_and_seed_alone(tiny):
    """Not on the order of tensors, nor on the depth of the model, nor on torch's global stream."""
    torch.manual_seed(0)
    shallow = models.plain_state(models.build(tiny(), VOCAB))
    torch.manual_seed(1)
    deep = models.plain_state(models.build(tiny(depth=5), VOCAB))
    assert all(torch.equal(values, deep[name]) for name, values in shallow.items())
    flat = [values.flatten()[:100] for values in shallow.values() if values.std() > 0]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(flat) for b in flat[:i])  # no two share a stream


@pytest.mark.parametrize("form", ["ntk", "mean_field", "mup_t9"])
def test_multipliers_act_where_the_plan_says(tiny, form):
    """Folding every multiplier into its weight leaves the logits as they are."""
    recipe = tiny({"form": form, "width": 128, "parametrization.embedding_multiplier": 3.0, "parametrization.logits_multiplier": 0.7})
    model = models.build(recipe, VOCAB).double()
    expected = model(drawn()).detach()
    plan = {row.name: row.multiplier for row in counting.planned(recipe, VOCAB)}
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
