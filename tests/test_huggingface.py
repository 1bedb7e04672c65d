"""Reading a Hugging Face config.json: the same parameters as the model that transformers builds."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from scaletune import counting, huggingface, recipe
from scaletune.errors import UserError
from scaletune.zoo import FAMILIES

CONFIGS = {
    "llama-2-7b": LlamaConfig(),
    "llama-3.2-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "llama-2-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),  # its ffn_ratio of 2.7 has no exact float
    "biased": LlamaConfig(
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=3,
        attention_bias=True,
        mlp_bias=True,
    ),
    "mistral-7b": MistralConfig(sliding_window=None),
    "granite-8b": GraniteConfig(
        intermediate_size=12800, num_key_value_heads=8, vocab_size=49155, embedding_multiplier=12.0
    ),
    "qwen3-8b": Qwen3Config(intermediate_size=12288, num_hidden_layers=36, num_key_value_heads=8),
    "gpt2": GPT2Config(),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "mixtral-8x7b": MixtralConfig(),
    "qwen3-moe": Qwen3MoeConfig(num_attention_heads=16, head_dim=128),
}
# Total parameters: arXiv:2307.09288, arXiv:2401.04088, model cards of Llama 3.2 1B and GPT-2.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.2-1b": 1_235_814_400,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "mixtral-8x7b": 46_702_792_704,
}


def write_config(folder, config, **changed):
    path = folder / "config.json"
    path.write_text(
        json.dumps({**(config if isinstance(config, dict) else config.to_diff_dict()), **changed})
    )
    return path


def count_params(path):
    model, vocab_size, _ = huggingface.read(path)
    return counting.params(
        FAMILIES[model.get("family", "transformer")].model_validate(model), vocab_size
    )["n_params_total"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_that_of_transformers(tmp_path, name):
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(CONFIGS[name])
    total = count_params(write_config(tmp_path, CONFIGS[name]))
    assert total == sum(p.numel() for p in theirs.parameters())
    assert total == PUBLISHED.get(name, count_params(tmp_path))


def test_an_older_config_of_the_hub(tmp_path):
    """Llama 2's own file has no `head_dim` and no biases.

    `rope_theta` and `rope_scaling: null` are at its top level.
    """
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "rope_scaling": None,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "float16",
    }
    folder = write_config(tmp_path, config).parent
    model, vocab_size, notes = huggingface.read(folder)
    assert (
        vocab_size,
        model["rope_theta"],
        model["norm_eps"],
        model["kv_heads"],
        model["tied"],
    ) == (32000, 5e5, 1e-5, None, False)
    assert count_params(tmp_path) == PUBLISHED["llama-2-7b"] and len(notes) == 1


def test_keys_that_are_not_read_are_listed(tmp_path):
    notes = huggingface.read(write_config(tmp_path, GPT2Config(), some_key=3))[2]
    assert "`resid_pdrop` 0.1 is not used: models of the zoo have no dropout" in notes
    assert "not read, because no model of the zoo has it: some_key" in notes
    assert "the config's GELU is the tanh approximation; the zoo has the exact GELU" in notes


LLAMA = LlamaConfig(hidden_size=256, num_attention_heads=4)
REFUSED = {
    "gelu": (
        LLAMA,
        {"hidden_act": "gelu"},
        "`hidden_act` must be 'silu' in the models of the zoo, but got 'gelu'",
    ),
    "half a bias": (
        LLAMA,
        {"attention_bias": True},
        "biases everywhere or nowhere, but got attention_bias=True, mlp_bias=False",
    ),
    "stretched": (
        LLAMA,
        {"rope_parameters": {"rope_type": "llama3"}},
        "plain rotary positions, but got rope_type='llama3'",
    ),
    "stretched of old": (
        LLAMA,
        {"rope_parameters": None, "rope_scaling": {"type": "linear"}},
        "but got rope_type='linear'",
    ),
    "wide heads": (
        LLAMA,
        {"head_dim": 128},
        r"`heads \* head_dim == hidden_size` must hold in models of the zoo, but got 4 \* 128 and "
        r"256: nearest head_dim=64",
    ),
    "window": (
        MistralConfig(),
        {"sliding_window": 4096},
        "`sliding_window` must be None in the models of the zoo, but got 4096",
    ),
    "another type": (
        LLAMA,
        {"model_type": "lama"},
        r"`model_type` must be one of .* \(nearest: 'llama'\)",
    ),
    "a neighbour": (
        LLAMA,
        {"model_type": "qwen2"},
        "the zoo has no model of `model_type` 'qwen2': its queries, keys and values have biases",
    ),
    "quoted": (
        LLAMA,
        {"hidden_size": "256"},
        "`hidden_size` must be a whole number above 0, but got '256'",
    ),
    "no heads": (
        LLAMA,
        {"num_key_value_heads": 0},
        "`num_key_value_heads` must be a whole number above 0, but got 0",
    ),
    "no table": (LLAMA, {"rope_parameters": "x"}, "`rope_parameters` must be a table, but got 'x'"),
    "no width": (LLAMA, {"hidden_size": None}, "`hidden_size` must be given"),
    "scaled by layer": (
        GPT2Config(),
        {"scale_attn_by_inverse_layer_idx": True},
        "`scale_attn_by_inverse_layer_idx` must be False in the models of the zoo, but got True",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_values_are_refused_with_one_sentence(tmp_path, name):
    config, changed, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence) as error:
        huggingface.read(write_config(tmp_path, config, **changed))
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", None])
def test_other_files_are_refused_with_one_sentence(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"`model\.hf` must"):
        huggingface.read(tmp_path)


TARGET = """[model]
hf = "{hf}"
{own}
[parametrization]
base_width = 64
[budget]
tokens = 8192
batch_tokens = 256
"""


def test_a_recipe_takes_its_model_from_a_config_beside_it(tmp_path):
    write_config(tmp_path, LLAMA, num_hidden_layers=3, intermediate_size=640, vocab_size=500)
    path = tmp_path / "target.toml"
    path.write_text(TARGET.format(hf="config.json", own="depth = 5"))
    target = recipe.load(path)
    assert (
        target.model.width,
        target.model.depth,
        target.model.ffn_width,
        target.data.vocab_size,
    ) == (
        256,
        5,
        640,
        500,
    )
    assert (
        target.evidence["architecture"][-1]
        == "`model.depth` 5 is set in the target and replaces the config's"
    )
    path.write_text(TARGET.format(hf="elsewhere", own=""))
    with pytest.raises(
        UserError,
        match=r"`model\.hf` must name a config\.json or its folder on disk, but got `elsewhere`",
    ):
        recipe.load(path)
    path.write_text(
        TARGET.format(hf="config.json", own="").replace("base_width = 64", "base_width = 32")
    )
    with pytest.raises(
        UserError,
        match="`base_width % head_dim == 0` must hold, but got base_width=32, head_dim=64",
    ):
        recipe.load(path)
    path.write_text(TARGET.format(hf="config.json", own="").replace('"config.json"', "3"))
    with pytest.raises(
        UserError, match=r"`model\.hf` must be the path of a config\.json, but got 3"
    ):
        recipe.load(path)
