"""Recipes: error messages with the rule and the value, settings, points and trial ids."""

import copy
import functools
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletune import data
from scaletune.errors import UserError
from scaletune.recipe import (
    DATA_SOURCE_KEYS,
    SHORT_NAMES,
    comparison_recipe,
    load,
    parse_setting,
    points,
    trial_id,
    validate_recipe,
    with_settings,
)
from scaletune.recipe.points import set_path
from scaletune.zoo import FAMILIES

GOOD = {
    "model": {"width": 64},
    "parametrization": {"base_width": 32},
    "budget": {"tokens": 1024, "batch_tokens": 256},
}
FILE = """
model = { width = 64 }
parametrization = { base_width = 32 }
budget = { tokens = 1_024, batch_tokens = 256 }
"""


def recipe_with(path, value):
    """GOOD with one dotted path changed."""
    content = copy.deepcopy(GOOD)
    set_path(content, path, value)
    return validate_recipe(content, "good")


MISTAKES = [  # path, value, the sentence
    ("modle", {}, "unknown key `modle` (nearest: 'model')"),
    ("model.widht", 3, "unknown key `model.widht` (nearest: 'width')"),
    ("holdout.lrs", [1.0], "unknown key `holdout.lrs` (nearest: 'lr')"),
    ("compare", [{"nam": "sp", "set": {}}], "unknown key `compare.0.nam` (nearest: 'name')"),
    ("lr", 1e-3, "unknown key `lr` (nearest: 'optimizer.lr')"),
    ("model.lr", 1e-3, "unknown key `model.lr` (nearest: 'optimizer.lr')"),
    (
        "optimizer.lr",
        "3e-4",
        "`optimizer.lr` must be a valid number, but got '3e-4'; write the number without quotes",
    ),
    (
        "model.width",
        "64",
        "`model.width` must be a valid integer, but got '64'; write the number without quotes",
    ),
    ("model.width", 1.5, "`model.width` must be a valid integer, but got 1.5"),
    ("model.width", True, "`model.width` must be a valid integer, but got True"),
    ("model.width", float("nan"), "`model.width` must be a valid integer, but got nan"),
    ("model.width", -64, "`model.width` must be greater than 0, but got -64"),
    ("model.width", 0, "`model.width` must be greater than 0, but got 0"),
    ("model.width", 65, "`width % head_dim == 0` must hold, but got width=65, head_dim=32"),
    ("model.head_dim", 48, "`width % head_dim == 0` must hold, but got width=64, head_dim=48"),
    (
        "model.head_dim",
        1,
        "`head_dim % 2 == 0` must hold (rotary positions rotate pairs), but got head_dim=1",
    ),
    (
        "model.ffn_ratio",
        2.51,
        "`ffn_ratio * width` must be whole, but got ffn_ratio=2.51, width=64",
    ),
    ("model.tied", 1, "`model.tied` must be a valid boolean, but got 1"),
    (
        "model.family",
        "mamba",
        "`model.family` must be a known family, but got 'mamba' (known: mlp, moe, own, "
        "resnet, transformer, vit)",
    ),
    (
        "model.family",
        "restnet",
        "`model.family` must be a known family, but got 'restnet' (nearest: 'resnet')",
    ),
    (
        "model.family",
        3,
        "`model.family` must be a known family, but got 3 (known: mlp, moe, own, "
        "resnet, transformer, vit)",
    ),
    (
        "model",
        {"family": "moe", "width": 64, "topk": 3},
        "unknown key `model.topk` (nearest: 'top_k')",
    ),
    (
        "model",
        {"family": "vit", "width": 64, "pach": 3},
        "unknown key `model.pach` (nearest: 'patch')",
    ),
    (
        "model",
        {"width": 96, "ffn_ratio": 8 / 3},
        f"`ffn_ratio * base_width` must be whole, but got ffn_ratio={8 / 3}, base_width=32",
    ),
    (
        "model.kv_heads",
        3,
        "`heads % kv_heads == 0` must hold, but got heads=2 (width / head_dim), kv_heads=3",
    ),
    ("model.norm", "batch", "`model.norm` must be 'rms' or 'layer', but got 'batch'"),
    (
        "model",
        {"width": 64, "positions": "learned", "max_positions": 32},
        "`seq_len <= max_positions` must hold for learned positions, but got seq_len=64, "
        "max_positions=32",
    ),
    (
        "model",
        {"family": "moe", "width": 64, "top_k": 9},
        "`top_k <= n_experts` must hold, but got top_k=9, n_experts=8",
    ),
    (
        "model",
        {"family": "moe", "width": 64, "top_k": 1},
        "`norm_top_k` must be false for top_k=1: a single weight of 1 gives the router no gradient",
    ),
    (
        "model",
        {"family": "moe", "width": 64, "biases": True},
        "`biases` must be false for `model.family` 'moe', whose experts have none, but got True",
    ),
    (
        "model",
        {"family": "moe", "width": 64, "mlp": "gelu"},
        "`model.mlp` must be 'swiglu', but got 'gelu'",
    ),
    (
        "model",
        {"family": "vit", "width": 64, "patch": 5},
        "`image_size % patch == 0` must hold, but got image_size=32, patch=5",
    ),
    (
        "model",
        {"family": "resnet", "width": 60},
        "`width % groups == 0` must hold, but got width=60, groups=8",
    ),
    (
        "model",
        {"family": "resnet", "width": 64, "image_size": 10},
        "`image_size % 2**(stages - 1) == 0` must hold, but got image_size=10, stages=3",
    ),
    (
        "model",
        {"family": "mlp", "width": 64},
        "`data.seq_len` must be 1 for `model.family` 'mlp', which counts an example as one token, "
        "but got 64",
    ),
    (
        "parametrization.form",
        "mup_t7",
        "`form` must be a known form, but got 'mup_t7' (nearest: 'mup_t9')",
    ),
    (
        "parametrization.depth_alpha",
        0.5,
        "`depth_alpha > 0` needs `base_depth`, but got depth_alpha=0.5 and none",
    ),
    ("parametrization.depth_alpha", 0.3, "`depth_alpha` must be 0, 0.5 or 1, but got 0.3"),
    ("optimizer.lr", float("inf"), "`optimizer.lr` must be a finite number, but got inf"),
    ("optimizer.lr", 0, "`optimizer.lr` must be greater than 0, but got 0"),
    ("optimizer.beta1", 1.0, "`optimizer.beta1` must be less than 1, but got 1.0"),
    (
        "optimizer.weight_decay",
        -0.1,
        "`optimizer.weight_decay` must be greater than or equal to 0, but got -0.1",
    ),
    (
        "schedule.kind",
        "cosin",
        "`schedule.kind` must be 'constant', 'linear', 'cosine', 'wsd', 'power', 'one_cycle' or "
        "'table', but got 'cosin'",
    ),
    (
        "optimizer.family",
        "adamww",
        "`optimizer.family` must be a known family, but got 'adamww' (nearest: 'adamw')",
    ),
    (
        "optimizer.decay",
        "independant",
        "`optimizer.decay` must be 'torch' or 'independent', but got 'independant'",
    ),
    (
        "optimizer.decay",
        "l2",
        "`optimizer.decay` must be 'torch' or 'independent', but got 'l2': L2 in the gradient does"
        " not scale with width like the gradient of the loss, and a coordinate check does not"
        " detect it",
    ),
    (
        "optimizer",
        {"family": "lamb", "decay": "independent"},
        "family 'lamb' does not read `decay`, but got 'independent'",
    ),
    (
        "optimizer",
        {"family": "lion", "eps": 1e-6},
        "family 'lion' does not read `eps`, but got 1e-06",
    ),
    (
        "optimizer.momentum",
        0.8,
        "family 'adamw' does not read `momentum`, but got 0.8 (read by: sgd, muon)",
    ),
    (
        "optimizer",
        {"family": "sgd", "momentum": 0.0},
        "`nesterov` needs `momentum > 0`, but got momentum=0; write nesterov = false",
    ),
    (
        "optimizer.family",
        "prodigy",
        "`optimizer.lr` must be 1.0 for family 'prodigy', which finds its own learning rate, but "
        "got 0.01",
    ),
    (
        "optimizer",
        {"family": "schedulefree_adamw", "beta1": 0.0},
        "`beta1` must be above 0 for family 'schedulefree_adamw'",
    ),
    (
        "optimizer.family",
        "schedulefree_adamw",
        "family 'schedulefree_adamw' needs `schedule.kind = 'constant'`, but got 'wsd'",
    ),
    (
        "schedule",
        {"kind": "power"},
        "schedule 'power' needs either `knee` or `knee_tokens`, where the lr starts to fall",
    ),
    (
        "schedule",
        {"kind": "power", "knee": 0.1, "knee_tokens": 64},
        "schedule 'power' needs either `knee` or `knee_tokens`",
    ),
    ("schedule.start", 0.1, "`schedule.start` is read only by one_cycle, but got kind='wsd'"),
    (
        "schedule",
        {"kind": "cosine", "decay_shape": "1-sqrt"},
        "`schedule.decay_shape` is read only by wsd and power, but got kind='cosine'",
    ),
    (
        "schedule.warmup_tokens",
        800,
        "`warmup_tokens / tokens + decay <= 1` must hold, but got warmup_tokens=800, tokens=1024, "
        "decay=0.3",
    ),
    (
        "schedule",
        {"kind": "cosine", "warmup_tokens": 2048},
        "`warmup_tokens / tokens + decay <= 1` must hold, but got warmup_tokens=2048",
    ),
    ("schedule.warmup", 0.8, "`warmup + decay <= 1` must hold, but got warmup=0.8, decay=0.3"),
    (
        "budget.tokens",
        1000,
        "`tokens % batch_tokens == 0` must hold, but got tokens=1000, batch_tokens=256",
    ),
    (
        "data.seq_len",
        100,
        "`batch_tokens % seq_len == 0` must hold, but got batch_tokens=256, seq_len=100",
    ),
    ("data.held_out", 1.0, "`data.held_out` must be less than 1, but got 1.0"),
    ("seed", -1, "`seed` must be greater than or equal to 0, but got -1"),
    ("engine.workers", 0, "`engine.workers` must be 'auto' or greater than 0, but got 0"),
    (
        "engine.workers",
        "many",
        "`engine.workers` must be 'auto' or a valid integer, but got 'many'",
    ),
    ("axes.lr", [], "`axes.lr` must be a list of at least 1, but got []"),
    ("axes.lr", 1e-3, "`axes.lr` must be a valid list, but got 0.001"),
    (
        "holdout",
        {"set": {}, "lr": [1e-3, 2e-3]},
        "`holdout.lr` must be a list of at least 3, but got [0.001, 0.002]",
    ),
]


@pytest.mark.parametrize(("path", "value", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence(path, value, sentence):
    with pytest.raises(UserError) as caught:
        recipe_with(path, value)
    assert (
        str(caught.value).startswith(sentence)
        if isinstance(value, dict)
        else str(caught.value) == sentence
    )


@pytest.mark.parametrize("missing", GOOD)
def test_a_missing_table_is_named(missing):
    with pytest.raises(UserError, match=f"^`{missing}` must be given$"):
        validate_recipe({key: value for key, value in GOOD.items() if key != missing}, "good")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (
            "widht",
            "unknown setting `widht` (nearest: 'width'); any setting can be named by its dotted "
            "path, such as `optimizer.beta2`",
        ),
        ("optimizer.beta3", "unknown key `optimizer.beta3` (nearest: 'beta2')"),
        ("seed.deep", "`seed.deep` cannot be set, because `seed` is not a table"),
    ],
)
def test_an_unknown_axis_is_named(path, sentence):
    with pytest.raises(UserError) as caught:
        points(recipe_with("axes", {path: [1]}))
    assert str(caught.value) == sentence


@given(st.integers(1, 10**15))
def test_a_whole_float_is_a_count(n):
    tokens = 256 * n
    assert recipe_with("budget.tokens", float(tokens)).budget.steps == tokens // 256


def test_counts_of_toml_are_whole():
    assert (
        recipe_with("budget", {"tokens": 2.56e6, "batch_tokens": 256.0}).budget.model_dump()[
            "tokens"
        ]
        == 2560000
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "gpt-1.5b.toml"
    path.write_text(FILE)
    return path


def test_load_reads_a_file_and_names_the_recipe_after_it(file):
    assert load(file) == validate_recipe(GOOD, "gpt-1.5b")


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("model = ", "must be TOML, but "),
        ("[model]\nwidth = 64\nwidth = 64", "must be TOML, but "),
        (
            FILE + "[axes]\nwidth = [64, 65]",
            "`width % head_dim == 0` must hold, but got width=65, head_dim=32",
        ),
        (
            FILE + "[[compare]]\nname = 'sp'\nset = { form = 'mup8' }",
            "`form` must be a known form, but got 'mup8' (nearest: 'mup",
        ),
        (
            FILE + "[holdout]\nset = { wdth = 128 }\nlr = [1e-3, 2e-3, 4e-3]",
            "unknown setting `wdth` (nearest: 'width')",
        ),
    ],
)
def test_an_invalid_file_is_named_with_the_reason(file, text, end):
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load(file)
    assert str(caught.value).startswith(f"`{file}`" if "TOML" in end else f"{file}: ")
    assert end in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text_are_refused(file):
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="must be TOML"):
        load(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"the recipe file must exist, but got `.*none.toml`"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("optimizer.lr=3e-4", ("optimizer.lr", 3e-4)),
        ("width=1e2", ("width", 100.0)),
        ("data.source=some/file.txt", ("data.source", "some/file.txt")),
        ('name="a b"', ("name", "a b")),
        ("axes.lr=[1e-3, 2e-3]", ("axes.lr", [1e-3, 2e-3])),
        ("model.tied=true", ("model.tied", True)),
        ("data.source=a=b", ("data.source", "a=b")),
    ],
)
def test_set_is_toml_or_a_bare_word(text, parsed):
    assert parse_setting(text) == parsed


@pytest.mark.parametrize("text", ["width", "=3", ""])
def test_set_without_a_name_or_a_value_is_refused(text):
    with pytest.raises(UserError, match=r"`--set` must look like a.b=c, but got "):
        parse_setting(text)


def test_a_setting_overrides_the_file_and_the_file_the_default(file):
    file.write_text(FILE + "[optimizer]\nlr = 0.5\nbeta2 = 0.5\n")
    # The later setting wins, in its short and in its dotted form.
    optimizer = load(file, ["optimizer.lr=0.25", "lr=0.125"]).optimizer
    assert (optimizer.lr, optimizer.beta2, optimizer.beta1) == (0.125, 0.5, 0.9)


def test_a_misspelt_setting_is_refused(file):
    with pytest.raises(UserError, match=r"unknown setting `lrr` \(nearest: 'lr'\)"):
        load(file, ["lrr=0.1"])


def test_a_source_is_relative_to_the_recipe_that_names_it(file):
    (file.parent / "text.txt").write_text("text")
    assert load(file, ["data.source=text.txt"]).data.source == str(file.parent / "text.txt")
    assert load(file, ["data.source=absent.txt"]).data.source == "absent.txt"


def test_sources_in_axes_comparisons_and_the_held_out_cell_are_beside_the_recipe_too(file):
    for name in ("a.txt", "b.txt", "words.json"):
        (file.parent / name).write_text("text")
    file.write_text(
        FILE
        + """
data = { source = "a.txt", tokenizer = "words.json" }
axes = { "data.source" = ["a.txt", "absent.txt", "digits"], "data.seq_len" = [1] }
compare = [
  { name = "b", set = { "data.source" = "b.txt" } },
  { name = "c", set = { data = { source = "b.txt" } }, axes = { "data.source" = ["b.txt"] } },
]
holdout = { set = { "data.source" = "b.txt" }, lr = [1e-3, 2e-3, 3e-3] }
evidence = { source = "a.txt" }
"""
    )
    recipe = load(file)
    paths = {name: str(file.parent / name) for name in ("a.txt", "b.txt", "words.json")}
    assert (recipe.data.source, recipe.data.tokenizer, recipe.evidence["source"]) == (
        paths["a.txt"],
        paths["words.json"],
        "a.txt",
    )
    assert [point.data.source for point in points(recipe)] == [
        paths["a.txt"],
        "absent.txt",
        "digits",
    ]
    compared = [points(comparison_recipe(recipe, other)) for other in recipe.compare]
    sources = [set(point.data.source for point in swept) for swept in compared]
    assert sources == [{paths["a.txt"], "absent.txt", "digits"}, {paths["b.txt"]}]
    assert recipe.compare[0].set == {"data.source": paths["b.txt"]} == recipe.holdout.set


@pytest.mark.parametrize(
    "path", ["axes.optimizer.beta2", 'axes."optimizer.beta2"', "axes.'optimizer.beta2'"]
)
def test_a_setting_overrides_a_dotted_axis_of_the_file(file, path):
    file.write_text(FILE)
    assert load(file, [f"{path}=[0.9, 0.95]"]).axes == {"optimizer.beta2": [0.9, 0.95]}


@pytest.mark.parametrize(
    "axes",
    [
        '"model.width" = [32, 64]\n"data.power_law.dim" = [1]',
        "model.width = [32, 64]\ndata.power_law.dim = [1]",
    ],
)
def test_an_axis_needs_no_quotes(axes):
    """TOML reads `model.width` without quotes as a table; both spellings are the same axis."""
    recipe = validate_recipe(tomllib.loads(f"{FILE}[axes]\nlr = [1e-3]\n{axes}"), "r")
    assert recipe.axes == {"lr": [1e-3], "model.width": [32, 64], "data.power_law.dim": [1]}


def test_a_setting_of_a_cell_needs_no_quotes():
    """`model.width` without quotes replaces the width, not the whole table `model`."""
    cells = "[[cells]]\nmodel.width = 64\n[[compare]]\nname = 'wide'\nset.model.width = 96\n"
    held_out = "[holdout]\nset.model.width = 128\nlr = [1e-3, 2e-3, 4e-3]\n"
    recipe = validate_recipe(tomllib.loads(FILE + cells + held_out), "r")
    assert recipe.compare[0].set == {"model.width": 96}
    assert recipe.holdout.set == {"model.width": 128}
    assert [point.model for point in points(recipe)] == [
        recipe.model.model_copy(update={"width": 64})
    ]


def test_a_setting_overrides_an_axis_without_quotes(file):
    file.write_text(file.read_text() + "[axes]\nmodel.width = [32, 64]\n")
    assert load(file, ["axes.model.width=[96]"]).axes == {"model.width": [96]}


def test_points_are_the_product_of_the_axes():
    swept = points(recipe_with("axes", {"width": [32, 64], "optimizer.beta2": [0.9, 0.95, 0.99]}))
    assert [(p.model.width, p.optimizer.beta2) for p in swept] == [
        (w, b) for w in (32, 64) for b in (0.9, 0.95, 0.99)
    ]
    assert not any(p.axes for p in swept)


def test_a_recipe_without_axes_is_its_own_point():
    assert points(validate_recipe(GOOD, "good")) == [validate_recipe(GOOD, "good")]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"name": "sp", "set": {"form": "sp"}}, {("sp", 1e-3), ("sp", 2e-3)}),
        ({"name": "sp", "set": {"form": "sp"}, "axes": {"lr": [5e-3]}}, {("sp", 5e-3)}),
        ({"name": "wide", "set": {}, "axes": {"lr": [5e-3]}}, {("mup", 5e-3)}),
    ],
)
def test_a_comparison_is_the_same_sweep_under_other_settings(other, expected):
    recipe = validate_recipe(GOOD | {"axes": {"lr": [1e-3, 2e-3]}, "compare": [other]}, "good")
    assert {
        (p.parametrization.form, p.optimizer.lr)
        for p in points(comparison_recipe(recipe, recipe.compare[0]))
    } == expected


def leaves(content, path=()):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


OTHER = {  # a different valid value of everything that identifies a trial
    "model.width": 96,
    "model.depth": 3,
    "model.head_dim": 16,
    "model.ffn_ratio": 2.0,
    "model.tied": True,
    "model.rope_theta": 5e5,
    "model.norm_eps": 1e-6,
    "parametrization.form": "sp",
    "parametrization.base_width": 64,
    "parametrization.base_depth": 2,
    "parametrization.depth_alpha": 1.0,
    "parametrization.init_std": 0.1,
    "parametrization.embedding_multiplier": 2.0,
    "parametrization.logits_multiplier": 2.0,
    "parametrization.attention_multiplier": 2.0,
    "parametrization.residual_multiplier": 0.5,
    "parametrization.init_gain": 1.0,
    "model.norm": "layer",
    "model.mlp": "gelu",
    "model.kv_heads": 1,
    "model.qk_norm": True,
    "model.biases": True,
    "model.positions": "learned",
    "model.max_positions": 64,
    "optimizer.lr": 0.1,
    "optimizer.weight_decay": 0.0,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.99,
    "optimizer.eps": 1e-6,
    "optimizer.clip": 2.0,
    "optimizer.family": "muon",
    "optimizer.decay": "independent",
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": False,
    "optimizer.shape_factor": "spectral",
    "optimizer.rest_ratio": 0.5,
    "optimizer.precondition_every": 5,
    "schedule.kind": "cosine",
    "schedule.warmup": 0.2,
    "schedule.warmup_tokens": 256,
    "schedule.decay": 0.1,
    "schedule.decay_shape": "1-sqrt",
    "schedule.floor": 0.1,
    "schedule.start": 0.1,
    "schedule.knee": 0.25,
    "schedule.shares": [0.0, 0.25],
    "schedule.multipliers": [1.0, 0.25],
    "schedule.knee_tokens": 128,
    "schedule.power": 0.3,
    "schedule.ema_half_life": 512,
    "training.precision": "bf16",
    "training.z_loss": 1e-4,
    "data.seq_len": 32,
    "data.held_out": 0.1,
    "data.order": "shuffle",
    "data.vocab_size": 300,
    "budget.tokens": 2048,
    "budget.batch_tokens": 128,
    "budget.eval_tokens": 1024,
    "seed": 7,
}
ONLY_ONE = {"model.family"}  # another test covers the families
READ_BY = {  # a setting -> the settings under which it is read
    **{
        f"optimizer.{name}": {"optimizer.family": "muon"}
        for name in ("momentum", "nesterov", "shape_factor", "rest_ratio")
    },
    "optimizer.precondition_every": {"optimizer.family": "soap"},
    "schedule.start": {"schedule.kind": "one_cycle"},
    "schedule.power": {"schedule": {"kind": "power", "knee": 0.5}},
    "schedule.knee": {"schedule": {"kind": "power", "knee": 0.5}},
    "schedule.knee_tokens": {"schedule": {"kind": "power", "knee_tokens": 64}},
    **{
        f"schedule.{name}": {
            "schedule": {"kind": "table", "shares": [0.0, 0.5], "multipliers": [1.0, 2.0]}
        }
        for name in ("shares", "multipliers")
    },
}


def id_of(recipe, content="digest of the data"):
    return trial_id(recipe, content)


def test_every_setting_of_a_point_is_in_the_table():
    paths = {path for path, _ in leaves(validate_recipe(GOOD, "good").point())}
    assert set(OTHER) | ONLY_ONE == {
        path
        for path in paths
        if path.split(".")[:2] not in [["data", name] for name in DATA_SOURCE_KEYS]
    }


@pytest.mark.parametrize("path", OTHER)
def test_identity_depends_on_every_setting(path):
    # A depth rule needs a base depth.
    base = with_settings(recipe_with("parametrization.base_depth", 1), READ_BY.get(path, {}))
    assert id_of(with_settings(base, {path: OTHER[path]})) != id_of(base)


def test_identity_depends_on_the_content_of_the_data_and_not_on_its_path(tmp_path):
    ids = []
    for name, text in (("a.txt", "one " * 500), ("b.txt", "one " * 500), ("c.txt", "two " * 500)):
        (tmp_path / name).write_text(text)
        recipe = recipe_with("data.source", str(tmp_path / name))
        ids.append(id_of(recipe, data.load(recipe.data).digest))
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"engine.workers": 3},
        {"name": "x"},
        {"fit.law": "loss_nd"},
        {"to": []},
        {"axes": {"lr": [1.0]}},
        {"evidence": {"a": 1}},
    ],
)
def test_identity_ignores_where_and_why_it_is_trained(settings):
    recipe = validate_recipe(GOOD, "good")
    assert id_of(with_settings(recipe, settings)) == id_of(recipe)


def least(family):
    """The least table of a family: only an own model has more to say than its width."""
    return {"family": family, "width": 64} | ({"build": "a:b"} if family == "own" else {})


def test_identity_depends_on_the_family():
    """Holds even if all other options are equal and the family name is a default of its section."""
    ids = {
        id_of(validate_recipe(GOOD | {"model": least(family), "data": {"seq_len": 1}}, "good"))
        for family in FAMILIES
    }
    assert len(ids) == len(FAMILIES)


def test_new_families_and_options_do_not_change_recorded_ids():
    # The id from the time when the zoo had one family.
    assert id_of(validate_recipe(GOOD, "good")) == "d669a8d97a4c9c8a"


def test_a_family_has_the_options_of_its_table():
    for family, kind in FAMILIES.items():
        recipe = validate_recipe(GOOD | {"model": least(family), "data": {"seq_len": 1}}, "good")
        assert type(recipe.model) is kind
        assert validate_recipe(recipe.model_dump(), "again") == recipe
    assert type(validate_recipe(GOOD, "good").model) is FAMILIES["transformer"]


def test_settings_do_not_change_the_callers_tables():
    table = {"width": 64}
    assert (
        with_settings(validate_recipe(GOOD, "good"), {"model": table, "width": 128}).model.width
        == 128
    )
    assert table == {"width": 64}


SETTINGS = [
    {"lr": 0.5},
    {"width": 128, "seed": 3},
    {"batch_tokens": 512, "schedule.warmup_tokens": 64},
    {"axes.lr": [1.0]},
    {"axes": {"lr": [2.0]}},
    {"model": {"width": 96}, "model.depth": 3},
    {"data": {"seq_len": 32}, "batch_tokens": 32},
    {"holdout": {"set": {"width": 128}, "lr": [1.0, 2.0, 3.0]}, "holdout.set.depth": 2},
    {"engine.accumulation": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_equal_a_recipe_validated_from_plain_values(settings):
    """Sections without a new setting are the same objects; the given recipe does not change."""
    recipe = validate_recipe(GOOD | {"axes": {"lr": [1e-3]}}, "good")
    before, content = recipe.model_dump(), recipe.model_dump()
    for path, value in copy.deepcopy(settings).items():
        *tables, key = SHORT_NAMES.get(path, path).split(".")
        functools.reduce(dict.__getitem__, tables, content)[key] = value
    changed = with_settings(recipe, settings)
    assert changed == validate_recipe(content, "good")
    assert recipe.model_dump() == before
    assert changed.evidence is not recipe.evidence
    touched = {SHORT_NAMES.get(path, path).split(".")[0] for path in settings}
    assert all(
        getattr(changed, name) is getattr(recipe, name)
        for name in {"model", "optimizer", "data", "engine", "budget"} - touched
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"width": 65}, "width % head_dim"),
        ({"seq_len": 96}, "batch_tokens % seq_len"),
        ({"engine.processes": 3}, "accumulation"),
        ({"modle.width": 3}, "unknown key `modle` .nearest: 'model'"),
        ({"target.x": 1}, "`target` is not a table"),
        ({"optimizer.lr": "1"}, "without quotes"),
        ({"tokens": 1000}, "tokens % batch_tokens"),
    ],
)
def test_rules_between_sections_are_checked_again(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        with_settings(validate_recipe(GOOD, "good"), settings)


def test_an_axis_may_be_the_family():
    """Common keys are kept; options of the previous family are not."""
    recipe = validate_recipe(
        GOOD
        | {"model": {"width": 64, "depth": 3}, "axes": {"model.family": ["transformer", "moe"]}},
        "good",
    )
    assert [(p.model.family, p.model.depth, p.model.ffn_ratio) for p in points(recipe)] == [
        ("transformer", 3, 3.0),
        ("moe", 3, 1.0),
    ]


def test_a_depth_rule_needs_residual_branches():
    content = {"model": {"family": "mlp", "width": 64}, "data": {"seq_len": 1}}
    rule = {"parametrization": {"base_width": 32, "base_depth": 2, "depth_alpha": 1.0}}
    with pytest.raises(
        UserError,
        match=r"`depth_alpha` must be 0 for `model.family` 'mlp', which has no residual branches, "
        r"but got 1.0",
    ):
        validate_recipe(GOOD | content | rule, "good")


def test_short_names_lead_to_settings():
    known = {path for path, _ in leaves(validate_recipe(GOOD, "good").point())}
    assert set(SHORT_NAMES.values()) <= known


def test_an_option_at_its_default_is_no_part_of_an_identity():
    """Recorded trials keep their ids when an option is added: an explicit default is no change."""
    explicit = {
        **GOOD,
        "schedule": {"kind": "wsd", "warmup": 0.1, "decay": 0.3, "floor": 0.0},
        "seed": 0,
    }
    assert id_of(validate_recipe(explicit, "explicit")) == id_of(validate_recipe(GOOD, "good"))
