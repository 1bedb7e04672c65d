"""What a model costs, against the model itself and against torch's own FLOP counter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scaletune import counting, models
from scaletune.errors import UserError
from scaletune.rules import FORMS
from scaletune.zoo import Transformer as Model

shapes = st.builds(
    lambda heads, depth, head_dim, ffn, tied: Model(width=heads * head_dim, depth=depth, head_dim=head_dim, ffn_ratio=ffn, tied=tied),
    st.integers(1, 4), st.integers(1, 3), st.sampled_from([4, 8]), st.sampled_from([1.0, 2.0, 3.0]), st.booleans(),
)  # fmt: skip


def real(tiny, model, vocab_size):
    """The model itself, base and target alike."""
    recipe = tiny({f"model.{key}": value for key, value in model.model_dump().items()} | {"parametrization.base_width": model.width})
    return models.build(recipe, vocab_size)


@given(model=shapes, vocab_size=st.integers(2, 50))
def test_tensors_are_those_of_the_model(tiny, model, vocab_size):
    told = [(tensor.name, tensor.shape) for tensor in counting.tensors(model, vocab_size)]
    assert sorted(told) == sorted((name, tuple(p.shape[1:])) for name, p in real(tiny, model, vocab_size).named_parameters())


@given(model=shapes, vocab_size=st.integers(2, 50))
def test_params_are_those_of_the_model(tiny, model, vocab_size):
    counted = counting.params(model, vocab_size)
    sizes = {name: p.numel() for name, p in real(tiny, model, vocab_size).named_parameters()}
    assert counted["n_params_total"] == sum(sizes.values())
    assert counted["n_params"] == sum(size for name, size in sizes.items() if "embed_tokens" not in name and "lm_head" not in name)
    assert counted["n_params_total"] == sum(counted[group] for group in ("embedding", "attention", "mlp", "norm", "head"))
    assert (counted["head"] == 0) == model.tied


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_what_torch_counts(tiny, tied):
    """The matrices exactly; attention twice what is needed, as arXiv:2204.02311 counts it: without the causal mask."""
    recipe = tiny({"model.tied": tied, "depth": 3, "seq_len": 32})
    tokens = torch.zeros(2, 32, dtype=torch.long)
    model = models.build(recipe, 64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(tokens, tokens).sum()
        loss.backward()
    assert counting.flops_per_token(recipe.model, 64, 32) * tokens.numel() == counter.get_total_flops()


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_tied_head_needs_a_form_that_treats_both_alike(tiny, form):
    wide = tiny({"form": form, "model.tied": True, "width": 128})
    if form in ("mup", "mup_t8", "mup_t9", "mean_field", "u_mup"):
        assert counting.multipliers(wide, 64)["logits"] < 1
    else:
        with pytest.raises(UserError, match=f"a tied head needs a form whose embedding and readout share std and lr .* got form='{form}'"):
            counting.multipliers(wide, 64)
    assert counting.multipliers(tiny({"form": form, "model.tied": True}), 64)["logits"] == 1  # at the base width any form may tie


@given(alpha=st.sampled_from([0.0, 0.5, 1.0]), depth=st.integers(1, 8), base=st.integers(1, 8))
def test_residual_branches_shrink_with_depth(tiny, alpha, depth, base):
    recipe = tiny({"depth": depth, "parametrization.base_depth": base, "parametrization.depth_alpha": alpha})
    assert counting.multipliers(recipe, 64)["residual"] == pytest.approx((depth / base) ** -alpha)
    lr = {row.name: row.lr for row in counting.planned(recipe, 64)}
    inside = lr["model.layers.0.input_layernorm.weight"] / lr["model.norm.weight"]
    assert inside == pytest.approx((depth / base) ** (alpha - 1) if alpha else 1)


def test_a_plan_reaches_layers_that_the_base_model_lacks(tiny):
    recipe = tiny({"depth": 12, "width": 64, "parametrization.base_depth": 2, "parametrization.depth_alpha": 1.0})
    rows = {row.name: row for row in counting.planned(recipe, 64)}
    one, last = (rows[f"model.layers.{i}.mlp.down_proj.weight"] for i in (1, 11))
    assert (one.m_in, one.lr, one.eps) == (last.m_in, last.lr, last.eps)
    assert one.m_in == 2


def test_count_is_consistent_with_its_parts(tiny):
    recipe = tiny(width=64)
    counted = counting.count(recipe, 256)
    assert counted["flops"] == counted["flops_per_token"] * counted["tokens"]
    assert counted["steps"] * counted["batch_tokens"] == counted["tokens"]
    model = models.build(recipe, 256)
    assert counted["memory_bytes"]["weights_optimizer"] == 4 * sum(p.numel() * p.element_size() for p in model.parameters())


@given(factor=st.integers(2, 10))
def test_a_longer_trial_takes_longer(tiny, factor):
    one, more = (counting.seconds(tiny(tokens=2048 * n), 256) for n in (1, factor))
    assert one < more <= factor * one
