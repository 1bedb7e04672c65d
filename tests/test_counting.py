"""Parameter, FLOP and memory counts, compared with the built models and torch's FLOP counter."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import scaletune
from scaletune import counting, models, zoo
from scaletune.cli import main
from scaletune.errors import UserError
from scaletune.rules import FORMS, Tensor

CONFIGS = Path(__file__).parent.parent / "configs"
depths, heads, head_dims = st.integers(1, 3), st.integers(1, 4), st.sampled_from([4, 8])
choices = {
    "norm": st.sampled_from(["rms", "layer"]),
    "kv_heads": st.sampled_from([None, 1]),
    "qk_norm": st.booleans(),
    "ffn_ratio": st.sampled_from([1.0, 2.0, 3.0]),
}
decoding = {
    "tied": st.booleans(),
    "positions": st.sampled_from(["rotary", "learned"]),
    "max_positions": st.integers(32, 40),
}
mixtures = {
    "n_experts": st.integers(2, 5),
    "top_k": st.integers(1, 2),
    "n_shared_experts": st.integers(0, 2),
    "norm_top_k": st.just(False),
}
ffns = {"mlp": st.sampled_from(["swiglu", "gelu"]), "biases": st.booleans()}
blocks = {
    zoo.TransformerConfig: choices | decoding | ffns,
    zoo.MoEConfig: choices | decoding | mixtures,
    zoo.ViTConfig: choices
    | ffns
    | {
        "image_size": st.just(8),
        "patch": st.sampled_from([2, 4]),
        "pool": st.sampled_from(["class", "mean"]),
    },
}
others = {
    zoo.MLPConfig: {"inputs": st.integers(1, 9), "biases": st.booleans()},
    zoo.ResNetConfig: {
        "image_size": st.just(8),
        "stages": st.integers(1, 3),
        "groups": st.just(2),
        "readout": st.sampled_from(["linear", "conv"]),
    },
}


def config_strategy(section, options, width):
    """Configs of one model family; `width` draws a table with the width."""
    return st.builds(
        lambda depth, kept, size: section(**kept | size, depth=depth),
        depths,
        st.fixed_dictionaries(options),
        width,
    )


widths_in_heads = st.builds(
    lambda n, head_dim: {"width": n * head_dim, "head_dim": head_dim}, heads, head_dims
)
shapes = st.one_of(
    *(config_strategy(section, options, widths_in_heads) for section, options in blocks.items()),
    *(
        config_strategy(section, options, st.sampled_from([{"width": 4}, {"width": 8}]))
        for section, options in others.items()
    ),
)


def recipe_of(tiny, model, **settings):
    """A recipe at its base width; vision and feature models count one example as one token."""
    seq_len = 32 if isinstance(model, zoo.DecoderConfig) else 1
    return tiny(
        {"model": model.model_dump(), "parametrization.base_width": model.width, "seq_len": seq_len}
        | settings
    )


def build_model(tiny, model, vocab_size):
    return models.build(recipe_of(tiny, model), vocab_size)


def batch_of(model, rows=4, seq_len=32):
    """Returns (inputs, targets)."""
    if isinstance(model, zoo.DecoderConfig):
        return (torch.arange(rows * seq_len).view(rows, -1) % 7,) * 2
    shape = (
        (model.inputs,)
        if isinstance(model, zoo.MLPConfig)
        else (model.channels, model.image_size, model.image_size)
    )
    return torch.ones(rows, *shape), torch.zeros(rows, dtype=torch.long)


@given(model=shapes, vocab_size=st.integers(2, 50))
def test_tensors_are_those_of_the_model(tiny, model, vocab_size):
    counted = [(tensor.name, tensor.shape) for tensor in counting.tensors(model, vocab_size)]
    assert sorted(counted) == sorted(
        (name, tuple(p.shape[1:]))
        for name, p in build_model(tiny, model, vocab_size).named_parameters()
    )


@given(model=shapes, vocab_size=st.integers(2, 50))
def test_params_are_those_of_the_model(tiny, model, vocab_size):
    counted = counting.params(model, vocab_size)
    sizes = {name: p.numel() for name, p in build_model(tiny, model, vocab_size).named_parameters()}
    assert counted["n_params_total"] == sum(sizes.values())
    outside = {
        "embed_tokens",
        "embed_positions",
        "lm_head",
        "embeddings",
        "classifier",
        "input",
        "readout",
    }
    stem = "embedder.convolution.weight"  # the norm of the stem counts as a norm
    assert counted["n_params"] == sum(
        size for name, size in sizes.items() if not outside & set(name.split(".")) and name != stem
    )
    assert counted["n_params_total"] == sum(
        size for group, size in counted.items() if not group.startswith("n_params")
    )
    assert (counted["head"] == 0) == getattr(model, "tied", False)
    assert counted["n_params_active"] <= counted["n_params"]
    assert counted["n_params_active"] == counted["n_params"] or isinstance(model, zoo.MoEConfig)


@given(model=shapes, vocab_size=st.integers(7, 50))
def test_flops_are_what_torch_counts(tiny, model, vocab_size):
    """Counts attention without the causal mask, twice what is needed, as arXiv:2204.02311 does."""
    inputs, targets = batch_of(model)
    network = build_model(tiny, model, vocab_size)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        network(inputs, targets).sum().backward()
    assert counting.flops_per_token(model, vocab_size, 32) * targets.numel() == pytest.approx(
        counter.get_total_flops(), rel=1e-12
    )


@given(model=shapes, vocab_size=st.integers(2, 50), seq_len=st.integers(1, 40))
def test_parts_of_the_flops_sum_to_the_whole(model, vocab_size, seq_len):
    parts = counting.flops(model, vocab_size, seq_len)
    assert parts["exact"] == pytest.approx(parts["matrices"] + parts["attention"] + parts["head"])
    assert parts["without_attention"] == pytest.approx(parts["matrices"] + parts["head"])
    assert parts["without_head"] == pytest.approx(parts["matrices"] + parts["attention"])
    assert (parts["attention"] > 0) == isinstance(model, zoo.BlocksConfig)


@pytest.mark.parametrize(
    "ffn", [{"mlp": "gelu", "ffn_ratio": 4.0}, {"mlp": "swiglu", "ffn_ratio": 8 / 3}], ids=str
)
def test_shorthands_are_exact_where_they_are_meant_to_be(ffn):
    """Checks a block of 12 * width**2 parameters without norms (arXiv:2401.02954).

    DeepSeek's M is then exact, and 6N is exact without attention and head.
    """
    model = zoo.TransformerConfig(width=3 * 32, depth=5, **ffn)
    parts = counting.flops(model, 100, 48)
    assert parts["deepseek_m"] == pytest.approx(parts["without_head"])
    norms = 6 * counting.params(model, 100)["norm"]
    assert parts["six_n"] - norms == pytest.approx(parts["without_head"] - parts["attention"])


def test_m_of_deepseek_7b_is_the_printed_one():
    """30 layers of width 4096 at 4096 tokens (arXiv:2401.02954, eq. 2)."""
    model = zoo.TransformerConfig(width=4096, depth=30, head_dim=128)
    assert counting.flops(model, 102400, 4096)["deepseek_m"] == pytest.approx(
        42278580000.0, rel=1e-5
    )


def test_params_are_those_of_published_models():
    """Checks LLaMA-7B, Mixtral-8x7B (12.9e9 of 46.7e9 active), GPT-2 small and ViT-B/16."""
    llama = zoo.TransformerConfig(width=4096, depth=32, head_dim=128, ffn_ratio=11008 / 4096)
    assert counting.params(llama, 32000)["n_params_total"] == 6738415616
    mixtral = zoo.MoEConfig(
        width=4096, depth=32, head_dim=128, ffn_ratio=3.5, kv_heads=8, n_experts=8, top_k=2
    )
    counted = counting.params(mixtral, 32000)
    assert counted["n_params_total"] == 46702792704
    assert counted["n_params_active"] + counted["embedding"] + counted["head"] == pytest.approx(
        12.9e9, rel=2e-3
    )
    gpt2 = zoo.TransformerConfig(
        width=768,
        depth=12,
        head_dim=64,
        ffn_ratio=4.0,
        norm="layer",
        mlp="gelu",
        positions="learned",
        biases=True,
        tied=True,
    )
    assert counting.params(gpt2, 50257)["n_params_total"] == 124439808
    vit = zoo.ViTConfig(width=768, depth=12, head_dim=64, image_size=224, patch=16)
    assert counting.params(vit, 1000)["n_params_total"] == 86567656


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_tied_head_needs_a_form_that_treats_both_alike(tiny, form):
    wide = tiny({"form": form, "model.tied": True, "width": 128})
    if form in ("mup", "mup_t8", "mup_t9", "mean_field", "u_mup"):
        assert counting.multipliers(wide, 64)["logits"] < 1
    else:
        with pytest.raises(
            UserError,
            match=f"a tied head needs a form whose embedding and readout share std and lr .* got "
            f"form='{form}'",
        ):
            counting.multipliers(wide, 64)
    at_base_width = tiny({"form": form, "model.tied": True})  # any form may tie here
    assert counting.multipliers(at_base_width, 64)["logits"] == 1


@given(alpha=st.sampled_from([0.0, 0.5, 1.0]), depth=st.integers(1, 8), base=st.integers(1, 8))
def test_residual_branches_shrink_with_depth(tiny, alpha, depth, base):
    recipe = tiny(
        {"depth": depth, "parametrization.base_depth": base, "parametrization.depth_alpha": alpha}
    )
    assert counting.multipliers(recipe, 64)["residual"] == pytest.approx((depth / base) ** -alpha)
    lr = {row.name: row.lr for row in counting.plan_tensors(recipe, 64)}
    inside = lr["model.layers.0.input_layernorm.weight"] / lr["model.norm.weight"]
    assert inside == pytest.approx((depth / base) ** (alpha - 1) if alpha else 1)


def test_a_plan_reaches_layers_that_the_base_model_lacks(tiny):
    recipe = tiny(
        {
            "depth": 12,
            "width": 64,
            "parametrization.base_depth": 2,
            "parametrization.depth_alpha": 1.0,
        }
    )
    rows = {row.name: row for row in counting.plan_tensors(recipe, 64)}
    one, last = (rows[f"model.layers.{i}.mlp.down_proj.weight"] for i in (1, 11))
    assert (one.m_in, one.lr, one.eps) == (last.m_in, last.lr, last.eps)
    assert one.m_in == 2


def saved_floats(model, inputs, targets):
    """Floats that autograd saves in a forward pass; each storage counts once, weights do not."""
    weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # keep a reference, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs, targets)
    return sum(storage.nbytes() for storage in saved.values()) / 4


@pytest.mark.parametrize(
    "model",
    [
        zoo.TransformerConfig(width=128, depth=3),
        zoo.TransformerConfig(
            width=128, depth=3, mlp="gelu", norm="layer", biases=True, positions="learned"
        ),
        zoo.TransformerConfig(width=128, depth=3, qk_norm=True, kv_heads=1),
        zoo.MoEConfig(width=128, n_shared_experts=1, top_k=4),
        zoo.MLPConfig(width=128, depth=3),
        zoo.MLPConfig(width=64, activation="gelu"),
        zoo.ResNetConfig(width=16, depth=2, image_size=16),
        zoo.ViTConfig(width=64, image_size=16),
    ],
    ids=repr,
)
def test_activations_are_what_autograd_keeps(tiny, model):
    inputs, targets = batch_of(model)
    expected = saved_floats(build_model(tiny, model, 50), inputs, targets)
    counted = counting.memory_bytes(model, 50, targets.numel(), 32)["activations"] / 4
    assert counted == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("family", "moments"), [("adamw", 2), ("sgd", 1), ("lion", 1)])
def test_memory_and_traffic_follow_the_optimizers_moments(family, moments):
    model = zoo.TransformerConfig(width=64)
    n = counting.params(model, 50)["n_params_total"]
    memory = counting.memory_bytes(model, 50, 256, 64, family)
    assert memory["weights_optimizer"] == 4 * n * (2 + moments)
    assert (
        counting.bytes_moved(model, 50, 256, family)
        == 4 * n * (6 + 2 * moments) + 2 * memory["activations"]
    )


def floats_of(state):
    """Number of tensor entries in an optimizer's state, without step counters."""
    if isinstance(state, torch.Tensor):
        return state.numel() if state.numel() > 1 else 0
    parts = (
        state.values()
        if isinstance(state, dict)
        else state
        if isinstance(state, list | tuple)
        else ()
    )
    return sum(map(floats_of, parts))


@pytest.mark.parametrize(
    "family",
    ["adamw", "sgd", "adafactor", "muon", "lion", "shampoo", "soap", "prodigy", "dadapt_adam"],
)
def test_an_optimizer_keeps_what_its_library_does(family):
    """Compares the state of one hidden matrix."""
    weight = torch.nn.Parameter(torch.ones(64, 32))
    torch_classes = {
        "adamw": torch.optim.AdamW,
        "sgd": lambda p: torch.optim.SGD(p, 1e-3, 0.9),
        "adafactor": torch.optim.Adafactor,
        "muon": getattr(torch.optim, "Muon", None),
    }
    class_names = {
        "lion": "Lion",
        "shampoo": "Shampoo",
        "soap": "SOAP",
        "prodigy": "Prodigy",
        "dadapt_adam": "DAdaptAdam",
    }
    make = torch_classes.get(family) or getattr(
        pytest.importorskip("pytorch_optimizer"), class_names.get(family, "Muon")
    )
    optimizer = make([weight])
    for seed in range(3):
        weight.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    assert counting.optimizer_floats(Tensor("a", "hid", (64, 32), "mlp"), family) == floats_of(
        dict(optimizer.state)
    )


def test_muon_keeps_one_moment_of_hidden_matrices(tiny):
    model = zoo.TransformerConfig(width=64)
    counted = counting.params(model, 50)
    saved = 4 * (counted["attention"] + counted["mlp"])
    with_adam, with_muon = (
        counting.memory_bytes(model, 50, 1, 64, family)["weights_optimizer"]
        for family in ("adamw", "muon")
    )
    assert with_adam - with_muon == saved


def test_count_is_consistent_with_its_parts(tiny):
    recipe = tiny(width=64)
    counted = scaletune.count(recipe, 256)
    assert counted["flops"] == counted["flops_per_token"] * counted["tokens"]
    assert counted["steps"] * counted["batch_tokens"] == counted["tokens"]
    model = models.build(recipe, 256)
    assert counted["memory_bytes"]["weights_optimizer"] == 4 * sum(
        p.numel() * p.element_size() for p in model.parameters()
    )


@given(factor=st.integers(2, 10))
def test_a_longer_trial_takes_longer(tiny, factor):
    one, more = (counting.seconds(tiny(tokens=2048 * n), 256) for n in (1, factor))
    assert one < more <= factor * one


# --- recipe files, axes and overrides -------------------------------------------------------------


def test_count_takes_a_recipe_file_as_the_command_does(capsys, tmp_path):
    """`counting.count` returns the "points" of `scaletune count --json`.

    The recipes have text, classes, values and an explicit vocabulary size as data.
    """
    for name in (
        "quickstart",
        "examples/mlp-digits",
        "examples/mlp-power-law",
        "targets/llama-2-7b",
    ):
        path = str(CONFIGS / f"{name}.toml")
        assert main(["count", path, "--set", "model.depth=3", "--json"]) == 0
        expected = json.loads(capsys.readouterr().out)["points"]
        counted = scaletune.count(path, settings=["model.depth=3"])
        assert json.loads(json.dumps(counted)) == expected and counted[0]["depth"] == 3
    with pytest.raises(UserError, match=r"the recipe file must exist, but got `nowhere\.toml`"):
        scaletune.count("nowhere.toml")


def test_count_of_a_recipe_is_one_dict_or_one_per_point(tiny):
    recipe = tiny()
    assert scaletune.count(recipe) == scaletune.count(recipe, 256)
    assert scaletune.count(recipe, settings=["width=64"]) == scaletune.count(tiny(width=64))
    swept = tiny({"axes": {"width": [32, 64], "lr": [0.1, 0.2]}})
    assert [point["width"] for point in scaletune.count(swept)] == [32, 32, 64, 64]
    assert scaletune.count(tiny({"data.vocab_size": 300}))["vocab_size"] == 300


def test_the_outputs_of_images_are_their_classes():
    """`data.vision` reads the labels of these formats; counting does not read the files."""
    from scaletune.data.vision import CIFAR

    classes = {name: size for name, (_, _, size) in CIFAR.items()}
    assert classes == {name: counting.OUTPUTS[name] for name in CIFAR}
