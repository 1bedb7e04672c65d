"""Memory, parallel splits and GPU-hours, compared with torch's allocations and published runs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaletune import counting, hardware, models, zoo
from scaletune.counting import memory, parallelism
from scaletune.counting.families import layer_floats
from scaletune.counting.memory import Split
from scaletune.errors import UserError
from scaletune.recipe import validate_recipe

VOCAB = 64
LLAMA_2_7B = {"width": 4096, "depth": 32, "head_dim": 128, "ffn_ratio": 2.6875}
LLAMA_2_70B = {"width": 8192, "depth": 80, "head_dim": 128, "ffn_ratio": 3.5, "kv_heads": 8}
BATCH = 4 * 1024**2  # tokens (arXiv:2307.09288, section 2.2)
STEPS = 476_837  # 2T tokens
STATES = ("weights", "gradients", "optimizer_states", "master_weights")


def target(model, gpu="A100-80", **hardware):
    return validate_recipe(
        {
            "model": model,
            "parametrization": {"base_width": 256},
            "data": {"seq_len": 4096},
            "budget": {"tokens": STEPS * BATCH, "batch_tokens": BATCH},
            "hardware": {"gpu": gpu} | hardware,
        },
        "target",
    )


def torch_bytes(tiny, precision):
    """Bytes of weights, gradients, optimizer states and float32 masters after one AdamW step."""
    model = models.build(tiny(), VOCAB).to(
        torch.bfloat16 if precision == "mixed" else torch.float32
    )
    parameters = list(model.parameters())
    masters = (
        [torch.nn.Parameter(p.detach().float()) for p in parameters]
        if precision == "mixed"
        else parameters
    )
    optimizer = torch.optim.AdamW(masters)
    model(torch.zeros(2, 8, dtype=torch.long))[0].float().square().mean().backward()
    for master, p in zip(masters, parameters, strict=True):
        master.grad = p.grad.float()
    optimizer.step()
    moments = [
        value for state in optimizer.state.values() for key, value in state.items() if key != "step"
    ]
    size = lambda tensors: sum(t.nbytes for t in tensors)  # noqa: E731
    parts = (
        size(parameters),
        size(p.grad for p in parameters),
        size(moments),
        size(masters) if precision == "mixed" else 0,
    )
    return dict(zip(STATES, parts, strict=True))


@pytest.mark.parametrize("precision", memory.PRECISIONS)
def test_states_are_the_bytes_that_torch_holds(tiny, precision):
    counted = memory.training_memory(tiny().model, VOCAB, 32, Split(), precision=precision)
    assert {name: counted[name] for name in STATES} == torch_bytes(tiny, precision)
    assert counted["total"] == sum(value for name, value in counted.items() if name != "total")


WHOLE = {
    "moe": zoo.MoEConfig(width=64, head_dim=16, n_experts=4, n_shared_experts=1),
    "vit": zoo.ViTConfig(width=64, head_dim=16),
    "resnet": zoo.ResNetConfig(width=16),
    "mlp": zoo.MLPConfig(width=64),
    "transformer": zoo.TransformerConfig(width=64, head_dim=16, kv_heads=2, depth=3),
}


@pytest.mark.parametrize("family", ["adamw", "muon", "adafactor", "sgd"])
@pytest.mark.parametrize("name", WHOLE)
def test_without_a_split_in_float32_memory_is_that_of_count(name, family):
    model, seq_len = WHOLE[name], 8 if isinstance(WHOLE[name], zoo.DecoderConfig) else 1
    split_memory = memory.training_memory(
        model, 100, seq_len, Split(micro_rows=3), family=family, precision="float32"
    )
    counted = counting.memory_bytes(model, 100, 3 * seq_len, seq_len, family)
    assert sum(split_memory[part] for part in STATES) == counted["weights_optimizer"]
    assert split_memory["activations"] == counted["activations"]


def test_states_are_those_of_zeros_paper():
    """Compares with arXiv:1910.02054, figure 1: 7.5e9 weights on 64 GPUs.

    Each GPU holds 120 GB, or 31.4 GB when the optimizer states are sharded.
    """
    model = zoo.TransformerConfig(**LLAMA_2_7B)
    scale = 7.5e9 / counting.params(model, 32000)["n_params_total"]
    for zero, gigabytes in ((0, 120), (1, 31.4)):
        parts = memory.training_memory(model, 32000, 4096, Split(dp=64), zero=zero)
        assert sum(parts[name] for name in STATES) * scale / 1e9 == pytest.approx(
            gigabytes, rel=2e-3
        )


def test_activations_are_those_of_the_published_count():
    """Compares with arXiv:2205.05198, eq. 1: s b h (34 + 5 a s / h) bytes per layer.

    Our models have no dropout masks (2 fewer) and no stored scores, but unfused norms (4 more).
    """
    model = zoo.TransformerConfig(
        width=1024,
        head_dim=64,
        ffn_ratio=4.0,
        norm="layer",
        mlp="gelu",
        positions="learned",
        biases=True,
        depth=4,
    )
    assert 2 * (layer_floats(model) - model.heads) == (34 - 2 + 4) * 1024
    one, four = (
        memory.training_memory(model, VOCAB, 128, Split(tp=tp))["activations"] for tp in (1, 4)
    )
    assert one == 4 * four  # eq. 4
    piped = memory.training_memory(model, VOCAB, 128, Split(pp=4, micro_batches=8))["activations"]
    # The first stage holds as much as all layers of one micro-batch: section 4.2.3.
    assert piped == 4 * 128 * layer_floats(model) * 2


def test_recomputed_layers_keep_their_input_and_one_is_whole():
    model = zoo.TransformerConfig(**LLAMA_2_7B)
    recomputed, whole = (
        memory.training_memory(model, 1, 4096, Split(), recompute=on)["activations"]
        for on in (True, False)
    )
    layer, ends = 2 * 4096 * layer_floats(model), 4096 * (3 * 4096 * 2 + 4)
    assert whole == 32 * layer + ends and recomputed == 4096 * 4096 * 2 * 32 + layer + ends


@given(tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2, 4]), tied=st.booleans())
def test_the_parts_of_a_split_sum_to_the_model(tp, pp, tied):
    model = zoo.TransformerConfig(width=64, head_dim=16, depth=4, tied=tied)
    stages = memory._weights_and_states(model, 100, "adamw", Split(tp, pp))
    gains = sum(t.size for t in counting.tensors(model, 100) if t.role == "vec")
    copies = 100 * 64 if tied and pp > 1 else 0  # the first and the last stage both hold it
    assert (
        tp * sum(weights for weights, _ in stages)
        == counting.params(model, 100)["n_params_total"] + copies + (tp - 1) * gains
    )


# --- splits ---------------------------------------------------------------------------------------


def test_a_small_model_is_split_by_its_data_alone():
    placed = parallelism.choose_split(
        target(LLAMA_2_7B, gpus=64), 32000, hardware.Hardware(gpu="H200", gpus=64)
    )
    assert placed.fits
    assert (
        placed.split.tp,
        placed.split.pp,
        placed.split.dp,
        placed.split.micro_batches,
    ) == (1, 1, 64, 16)


def test_a_large_one_takes_the_smallest_tp_then_the_smallest_pp_that_fits():
    recipe = target(LLAMA_2_70B, gpus=512)
    placed = parallelism.choose_split(recipe, 32000, recipe.hardware)
    assert placed.fits and placed.split.tp * placed.split.pp * placed.split.dp == 512
    room = 80e9 * recipe.hardware.usable
    for split in parallelism.splits(recipe, recipe.hardware):
        if (split.tp, split.pp) < (placed.split.tp, placed.split.pp):
            assert parallelism.gpu_memory(recipe, 32000, split, recipe.hardware)["total"] > room
    assert placed.memory["total"] <= room


@pytest.mark.parametrize("gpus", [1, 8, 48, 64, 96])
def test_every_split_divides(gpus):
    recipe = target(LLAMA_2_70B, gpus=gpus)
    for split in parallelism.splits(recipe, recipe.hardware):
        assert split.tp * split.pp * split.dp == gpus and split.tp <= 8
        assert 64 % split.tp == 8 % split.tp == 28672 % split.tp == 80 % split.pp == 0
        assert split.dp * split.micro_batches * 4096 == BATCH


def test_a_model_that_fits_no_split_and_gpus_that_do_not_divide():
    recipe = target(LLAMA_2_70B, gpus=8)
    assert not parallelism.choose_split(recipe, 32000, recipe.hardware).fits
    recipe = target(LLAMA_2_70B, gpus=7)
    assert parallelism.choose_split(recipe, 32000, recipe.hardware) is None
    assert parallelism.no_split_message(recipe, recipe.hardware).startswith(
        "7 GPUs do not divide a batch of 1024 sequences, 64 heads, 8 key-value heads"
    )


def test_the_pipeline_bubble_is_the_published_one():
    """The bubble is (p - 1) / m of the ideal time (arXiv:2104.04473, section 2.2)."""
    idle = Split(pp=4, micro_batches=12).bubble
    assert idle / (1 - idle) == pytest.approx(3 / 12)


# --- hours ----------------------------------------------------------------------------------------

RUNS = {  # arXiv:2307.09288, table 2: A100-80 hours for 2T tokens at 4096
    "7B": (LLAMA_2_7B, 184_320),
    "70B": (LLAMA_2_70B, 1_720_320),
}


@pytest.mark.parametrize("name", RUNS)
def test_published_hours_lie_within_the_range(name):
    model, published = RUNS[name]
    recipe = target(model, gpus=1024)
    flops = counting.flops_per_token(recipe.model, 32000, 4096) * recipe.budget.tokens
    assert (
        counting.flops(recipe.model, 32000, 4096)["six_n"]
        == 6 * counting.params(recipe.model, 32000)["n_params"]
    )
    estimate = parallelism.hours(flops, recipe.hardware, recipe.hardware.utilisation()[:3])
    low, high = estimate["gpu_hours_range"]
    assert low <= published <= high
    implied = flops / (published * 3600 * 312e12)
    assert 0.38 < implied < 0.47  # MFU: 0.445 and 0.460
    assert parallelism.hours(flops, recipe.hardware, (implied,) * 3)["gpu_hours"] == pytest.approx(
        published
    )


def test_six_n_of_gpt_3_is_its_published_compute():
    """3.14e23 FLOPs for 174,600M parameters and 300B tokens (arXiv:2005.14165, table D.1)."""
    gpt3 = zoo.TransformerConfig(
        width=12288,
        depth=96,
        head_dim=128,
        ffn_ratio=4.0,
        norm="layer",
        mlp="gelu",
        positions="learned",
        biases=True,
    )
    assert counting.flops(gpt3, 50257, 2048)["six_n"] * 300e9 == pytest.approx(3.14e23, rel=5e-3)
    assert counting.params(gpt3, 50257)["n_params_total"] == pytest.approx(174.6e9, rel=6e-3)


def test_a_warning_where_bandwidth_is_slower_than_compute(tiny):
    recipe = tiny({"hardware": {"gpu": "H100", "gpus": 8}})
    placed = parallelism.choose_split(recipe, VOCAB, recipe.hardware)
    warnings = parallelism.bandwidth_warnings(recipe, VOCAB, placed, recipe.hardware, 0.4)
    assert [sentence.split(" takes ")[0] for sentence in warnings] == [
        "reading and writing weights and optimizer states",
        "reducing gradients, if all GPUs were in one node,",
    ]
    recipe = target(LLAMA_2_7B, gpus=64)
    assert (
        parallelism.bandwidth_warnings(
            recipe,
            32000,
            parallelism.choose_split(recipe, 32000, recipe.hardware),
            recipe.hardware,
            0.4,
        )
        == []
    )


# --- the table ------------------------------------------------------------------------------------


def test_given_numbers_replace_the_datasheets():
    gpu = hardware.Hardware(gpu="H100", memory_gb=94.0).gpu_spec()
    assert gpu.memory == 94e9
    assert gpu.peak == hardware.GPUS["H100"].peak
    assert "memory_gb as given" in gpu.source
    assert hardware.Hardware(memory_gb=24.0, peak_flops=1e14).gpu_spec().memory_bandwidth == 0
    assert hardware.Hardware(gpu="H100", mfu=[0.2, 0.5]).utilisation()[:3] == (
        pytest.approx(0.1**0.5),
        0.2,
        0.5,
    )


BAD = {
    "unknown": (
        {"gpu": "H10"},
        r"`hardware.gpu` must be a known GPU, or give its numbers instead, but got 'H10' "
        r"\(nearest: 'H100'\)",
    ),
    "nothing": ({"gpus": 8}, "`hardware` needs `gpu` .*, or `memory_gb` and `peak_flops`"),
    "half a node": (
        {"gpu": "H100", "gpus": 12},
        "`gpus % gpus_per_node == 0` must hold, but got gpus=12, gpus_per_node=8",
    ),
    "float32": (
        {"gpu": "H100", "precision": "float32"},
        "`hardware.peak_flops` must be given for precision 'float32'",
    ),
    "a range upside down": (
        {"gpu": "H100", "mfu": [0.5, 0.2]},
        r"`hardware.mfu` must be above 0 and at most 1, .* but got \[0.5, 0.2\]",
    ),
    "twice": (
        {"gpu": "H100", "mfu": 0.4, "calibration": "x.json"},
        "takes `mfu` or a `calibration` that measures it, but got both",
    ),
    "over one": (
        {"gpu": "H100", "mfu": 1.4},
        "`hardware.mfu` must be above 0 and at most 1, .* but got 1.4",
    ),
    "a typo": (
        {"gpu": "H100", "gpu_per_node": 8},
        r"unknown key `hardware.gpu_per_node` \(nearest: 'gpus_per_node'\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_hardware_is_one_clear_line(tiny, name):
    table, sentence = BAD[name]
    with pytest.raises(UserError, match=sentence) as error:
        tiny({"hardware": table})
    assert "\n" not in str(error.value)
