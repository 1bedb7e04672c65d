"""Compares `parametrize` with the `mup` package, the zoo's plan, and training in float64.

Also tests Hugging Face models, distributed models and error messages.
"""

import copy
import json
import math

import mup
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import scaletune as st
from scaletune import UserError, counting, models, rules
from scaletune.parametrizing import Plan
from scaletune.parametrizing.apply import Multiply

DECAYED = {"*": {"weight_decay": 0.1}}  # mup also decays vectors


def mlp(width=64, inner=None, out=3, inputs=10, readout=nn.Linear):
    inner = inner or width
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, inner), nn.ReLU(), readout(inner, out)
    )


class Encoder(nn.Module):
    """A Transformer of torch modules."""

    def __init__(self, width=64, inner=None, readout=nn.Linear):
        super().__init__()
        self.embed, self.position = nn.Embedding(17, width), nn.Parameter(torch.randn(1, 8, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, inner or 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), readout(width, 17)

    def forward(self, tokens):
        hidden = self.norm(self.layers(self.embed(tokens) + self.position))
        return self.head(hidden).clone()  # FSDP warns about views


class Net(nn.Module):
    """A convolutional network with a depthwise and a grouped convolution and a 1x1 readout."""

    def __init__(self, width=64, inner=None, readout=None):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.depthwise, self.grouped = (
            nn.Conv2d(width, width, 3, groups=width),
            nn.Conv2d(width, width, 3, groups=4),
        )
        self.norm, self.wide = nn.BatchNorm2d(width), nn.Conv2d(width, inner or width, 1)
        self.score = nn.Conv2d(inner or width, 5, 1)

    def forward(self, x):
        x = self.norm(self.grouped(self.depthwise(self.stem(x))))
        return self.score(self.wide(F.relu(x)).mean((2, 3), keepdim=True))


ANY = {"mlp": mlp, "transformer": Encoder, "conv": Net}


def by_name(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


@pytest.fixture(params=sorted(ANY))
def make(request):
    return ANY[request.param]


# --- the mup package ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "theirs", "ours"),
    [("adamw", mup.MuAdamW, torch.optim.AdamW), ("sgd", mup.MuSGD, torch.optim.SGD)],
)
@pytest.mark.parametrize("inner", [128, 96])  # 4 and 3 times the base width
def test_groups_are_those_of_mup_tensor_by_tensor(make, optimizer, theirs, ours, inner):
    twin, model = make(128, inner, readout=mup.MuReadout), make(128, inner)
    mup.set_base_shapes(twin, make(32, 32, readout=mup.MuReadout))
    declared = DECLARED_READOUT if make is Net else {}
    plan = st.parametrize(
        model,
        base=make(32, 32),
        optimizer=optimizer,
        lr=1e-2,
        weight_decay=0.1,
        overrides=DECAYED | declared,
    )
    expected = by_name(twin, theirs(twin.parameters(), lr=1e-2, weight_decay=0.1).param_groups)
    groups = by_name(model, ours(plan.param_groups(model), lr=1.0).param_groups)
    assert groups.keys() == expected.keys()
    for name, values in expected.items():
        assert groups[name] == pytest.approx(values, rel=1e-12), name


DECLARED_READOUT = {"score.weight": "out"}


@pytest.mark.parametrize("on_meta", [False, True])
def test_initial_values_are_those_of_mup(on_meta):
    torch.manual_seed(0)
    twin = mlp(256, readout=mup.MuReadout)
    model = mlp(256)
    model.load_state_dict(twin.state_dict())
    mup.set_base_shapes(twin, mlp(64, readout=mup.MuReadout))
    st.parametrize(model, base=(lambda: mlp(64)) if on_meta else mlp(64))
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, dict(twin.named_parameters())[name], rtol=1e-6, atol=0), (
            name
        )
    x = torch.randn(4, 10)
    assert torch.allclose(model(x), twin(x), atol=1e-6)


def test_a_model_prepared_by_mup_is_converted():
    twin = mup.set_base_shapes(
        mlp(256, readout=lambda i, o: mup.MuReadout(i, o, output_mult=2.0)),
        mlp(64, readout=mup.MuReadout),
    )
    x = torch.randn(4, 10)
    before, expected = (
        twin(x),
        by_name(twin, mup.MuAdamW(twin.parameters(), lr=1e-2, weight_decay=0.1).param_groups),
    )
    plan = st.parametrize(twin, base="mup", lr=1e-2, weight_decay=0.1, overrides=DECAYED)
    assert type(twin[4]) is nn.Linear and not any(hasattr(p, "infshape") for p in twin.parameters())
    assert torch.allclose(twin(x), before, atol=1e-6)  # multiplied once
    assert torch.allclose(copy.deepcopy(twin)(x), before, atol=1e-6)
    assert plan["4.weight"].multiplier == 2 / 4
    groups = by_name(twin, plan.param_groups(twin))
    assert all(groups[name] == pytest.approx(values) for name, values in expected.items())


@pytest.mark.parametrize("form", ["mup_t3", "mup_t9", "mean_field"])
def test_a_prepared_model_converts_to_another_form_and_stays_the_same_function(form):
    twin = mup.set_base_shapes(mlp(256, readout=mup.MuReadout), mlp(64, readout=mup.MuReadout))
    x = torch.randn(4, 10)
    before = twin(x)
    st.parametrize(twin, base="mup", form=form)
    assert torch.allclose(twin(x), before, atol=1e-6)


def test_base_shapes_come_from_a_bsh_file(tmp_path, make):
    path = str(tmp_path / "base.bsh")
    mup.make_base_shapes(
        make(32, readout=mup.MuReadout), make(48, readout=mup.MuReadout), savefile=path
    )
    from_file, from_model = (
        st.parametrize(make(128), base=base, init_std=0.1) for base in (path, make(32))
    )
    assert from_file.rows == from_model.rows  # a file of shapes has no attention heads


# --- the zoo --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mup", "mup_t3", "mean_field", "sp"])
@pytest.mark.parametrize("depth", [2, 8])
def test_the_zoos_plan_is_the_one_counted_from_its_config(tiny, form, depth):
    settings = {
        "form": form,
        "optimizer.eps": 1e-6,
        "parametrization.base_depth": 2,
        "parametrization.depth_alpha": 1.0,
    }
    recipe, base = (
        tiny({**settings, "width": 128, "depth": depth}),
        tiny({**settings, "width": 32, "depth": 2}),
    )
    model, before = models.build(recipe, 64), models.build(recipe, 64)
    plan = st.parametrize(
        model,
        base=models.build(base, 64),
        form=form,
        lr=recipe.optimizer.lr,
        weight_decay=recipe.optimizer.weight_decay,
        eps=1e-6,
        init_std=recipe.parametrization.init_std,
        depth=(1.0, "*.self_attn", "*.mlp"),
    )
    for row in counting.plan_tensors(recipe, 64):
        planned = plan[row.name]
        assert planned.role == row.role
        for field in ("m_in", "m_out", "multiplier", "lr", "weight_decay", "eps"):
            assert getattr(planned, field) == pytest.approx(getattr(row, field), rel=1e-12), (
                row.name,
                field,
            )
        assert (planned.init_std or 0.0) == pytest.approx(row.init_std)
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # the same initial values


def test_a_zoo_model_with_other_multipliers_is_refused(tiny):
    model, base = (models.build(tiny({"form": "mup_t3", "width": width}), 64) for width in (64, 32))
    with pytest.raises(
        UserError, match=r"`lm_head.weight` is multiplied by 1 and the plan needs 0.5"
    ):
        st.parametrize(model, base=base, form="mup_t8", init_std=0.05)


# --- Hugging Face models --------------------------------------------------------------------------


def llama(width, tied=False, depth=2, vocab=61):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // 8,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def gpt2(width):
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61,
            n_positions=32,
            n_embd=width,
            n_layer=2,
            n_head=width // 8,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def vit(width):
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 8,
            image_size=16,
            patch_size=4,
        )
    )


ROLES = {  # the end of a name -> its role in arXiv:2203.03466
    llama: {
        "embed_tokens.weight": "emb",
        "proj.weight": "hid",
        "norm.weight": "vec",
        "lm_head.weight": "out",
    },
    gpt2: {
        "wte.weight": "emb",
        "wpe.weight": "emb",
        "c_attn.weight": "hid",
        "c_proj.weight": "hid",
        "c_fc.weight": "hid",
        "bias": "vec",
        "ln_1.weight": "vec",
        "ln_2.weight": "vec",
        "ln_f.weight": "vec",
    },
    vit: {
        "cls_token": "vec",
        "position_embeddings": "emb",
        "projection.weight": "emb",
        "_proj.weight": "hid",
        "fc1.weight": "hid",
        "fc2.weight": "hid",
        "classifier.weight": "out",
        "classifier.bias": "fin",
        "bias": "vec",
        "layernorm.weight": "vec",
        "layernorm_before.weight": "vec",
        "layernorm_after.weight": "vec",
    },
}


@pytest.mark.parametrize("build", [llama, gpt2, vit], ids=lambda build: build.__name__)
@pytest.mark.parametrize("form", ["mup", "mup_t9"])
def test_hugging_face_models_with_a_base_on_the_meta_device(build, form):
    model = build(64)
    plan = st.parametrize(model, base=lambda: build(32), form=form, init_std=0.02)
    for row in plan.rows:
        assert row.role == next(
            role for end, role in ROLES[build].items() if row.name.endswith(end)
        ), row.name
        assert {row.m_in, row.m_out} <= {1, 2}
    grouped = [
        id(p)
        for group in torch.optim.AdamW(plan.param_groups(model)).param_groups
        for p in group["params"]
    ]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    if build is gpt2:  # its weights are (in, out)
        assert plan["transformer.h.0.mlp.c_fc.weight"].m_in == 2


def test_a_config_is_a_base_too():
    assert st.parametrize(llama(64), base=llama(32).config, init_std=0.02) == st.parametrize(
        llama(64), base=llama(32), init_std=0.02
    )


@pytest.mark.parametrize(("form", "logits"), [("mup_t8", 0.5), ("mup_t9", 0.5)])
def test_a_tied_readout_has_its_own_multiplier(form, logits):
    """The readout uses 1/m of the effective embedding weights in both forms."""
    plain, model = llama(64, tied=True), llama(64, tied=True)
    plan = st.parametrize(model, base=lambda: llama(32, tied=True), form=form, init_std=0.02)
    tokens = torch.arange(12).view(2, 6)
    embedding = plan["model.embed_tokens.weight"]
    assert embedding.tied["lm_head.weight"] / embedding.multiplier == pytest.approx(logits)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain.model.embed_tokens.weight.mul_(embedding.multiplier)
        assert torch.allclose(model(tokens).logits, plain(tokens).logits * logits, atol=1e-6)


def test_residual_branches_are_multiplied_by_depth():
    shallow, deep = llama(32, depth=2), llama(64, depth=8)
    plan = st.parametrize(
        deep, base=shallow, init_std=0.02, depth=(1, "*.self_attn", "*.mlp"), eps=1e-6
    )
    inside = plan["model.layers.7.mlp.up_proj.weight"]
    # alpha = 1: lr has no depth factor
    expected = (1e-3 / 2, 1e-6 / 2 / 4, 1 / 4)
    assert (inside.lr, inside.eps, inside.branch) == pytest.approx(expected)
    assert plan["model.norm.weight"].branch == 1
    block, x, seen = deep.model.layers[3], torch.randn(1, 5, 64), []
    block.mlp.down_proj.register_forward_hook(lambda module, args, y: seen.append(y))
    assert torch.equal(block.mlp(x), seen[0] / 4)


# --- roles that shapes do not determine -----------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, width, inner=None, experts=4):
        super().__init__()
        self.embed, self.router = nn.Embedding(11, width), nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, inner or 2 * width))
        self.down = nn.Parameter(torch.randn(experts, inner or 2 * width, width))
        self.qkv, self.head = (
            nn.Linear(width, width + 16, bias=False),
            nn.Linear(width, 11, bias=False),
        )


def test_stacked_experts_routers_and_fused_projections():
    overrides = {
        "qkv.weight": "hid",
        "router.weight": "hid",
        "up": {"fan_in": 1, "fan_out": 2},
        "down": {"fan_in": 1, "fan_out": 2},
    }
    plan = st.parametrize(
        Experts(128, 96), base=Experts(32, 32), lr=1.0, overrides=overrides, init_std=1.0
    )
    assert {row.name: (row.role, row.m_in) for row in plan.rows} == {
        "embed.weight": ("emb", 1),
        "router.weight": ("hid", 4),
        "up": ("hid", 4),
        "down": ("hid", 3),
        "qkv.weight": ("hid", 4),
        "head.weight": ("out", 4),
    }
    assert plan["router.weight"].lr == 1 / 4 and plan["down"].lr == pytest.approx(1 / 3)


def test_more_experts_do_not_count_as_width():
    """At four times the width, twice as many experts get the same values as equally many."""
    overrides = {
        "qkv.weight": {"role": "hid", "m_out": 4},
        "router.weight": "out",
        "[ud]*": {"role": "hid", "fan_in": 1, "fan_out": 2},
    }
    more, same = (
        st.parametrize(Experts(128, experts=n), base=Experts(32), overrides=overrides, init_std=0.1)
        for n in (8, 4)
    )
    assert [(row.m_in, row.m_out, row.lr) for row in more.rows if row.role == "hid"] == [
        (4, 4, 1e-3 / 4)
    ] * 3
    assert [(row.lr, row.multiplier, row.init_std) for row in more.rows] == [
        (row.lr, row.multiplier, row.init_std) for row in same.rows
    ]


def test_a_padded_vocabulary_does_not_count_as_width():
    overrides = {"model.embed_tokens.weight": "emb", "lm_head.weight": "out"}
    padded, plain = (
        st.parametrize(llama(64, vocab=v), base=llama(32), overrides=overrides, init_std=0.02)
        for v in (64, 61)
    )
    for name in overrides:
        assert (padded[name].lr, padded[name].multiplier) == (
            plain[name].lr,
            plain[name].multiplier,
        )
    with pytest.raises(
        UserError, match=r"`model.embed_tokens.weight` \(61 -> 64, 32 -> 64\): its vocabulary grows"
    ):
        st.parametrize(llama(64, vocab=64), base=llama(32))
    # width and vocabulary both grow by two
    with pytest.raises(UserError, match=r"`lm_head.weight` .*: the vocabulary grows"):
        st.parametrize(
            llama(64, vocab=122), base=llama(32), overrides={"model.embed_tokens.weight": "emb"}
        )


def test_overrides_are_values_at_the_base_width():
    plan = st.parametrize(
        mlp(256),
        base=mlp(64),
        lr=1e-2,
        overrides={"*": {"lr": 1e-3}, "4.*": {"lr": 1.0, "multiplier": 8.0}},
        init_std=0.1,
    )
    assert plan["2.weight"].lr == 1e-3 / 4
    assert plan["4.weight"].lr == 1.0
    assert plan["4.weight"].multiplier == 8 / 4


def test_two_optimizers_share_a_model():
    model = llama(64)
    plan = st.parametrize(
        model, base=llama(32), optimizer="muon_spectral", init_std=0.02, lr=0.1, weight_decay=0.1
    )
    muon = torch.optim.Muon(plan.param_groups(model, roles=("hid",)))
    adamw = torch.optim.AdamW(plan.param_groups(model, roles=("emb", "out", "vec", "fin")))
    grouped = [
        id(p) for opt in (muon, adamw) for group in opt.param_groups for p in group["params"]
    ]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    for group in muon.param_groups:
        # with the factor sqrt(out / in), lr does not depend on width (arXiv:2310.17813)
        assert group["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("seed", range(3))
def test_the_models_init_rule_is_inferred_by_comparison_with_the_base(seed):
    """Hidden matrices get m**-1/2 of the base's std, whatever rule the model uses.

    GPT-2 draws every matrix with one std, PyTorch convolutions with fan_in**-1/2.
    """
    torch.manual_seed(seed)
    plan = st.parametrize(gpt2(128), base=gpt2(32))
    assert {row.init_scale for row in plan.rows if row.role == "hid"} == {0.5}
    assert {row.init_scale for row in plan.rows if row.role == "emb"} == {1.0}
    plan = st.parametrize(Net(256), base=Net(64))
    scales = {row.name: row.init_scale for row in plan.rows if row.name.endswith("weight")}
    assert scales == {
        "stem.weight": 1,
        "depthwise.weight": 1,
        "grouped.weight": 1,
        "wide.weight": 1,
        "score.weight": 2,
        "norm.weight": None,
    }


def test_the_models_init_rule_is_read_from_the_config_if_the_base_is_on_meta():
    plan = st.parametrize(llama(128), base=lambda: llama(32))
    # Llama draws every matrix with one std, so hidden matrices are scaled with m**-1/2
    assert {row.init_scale for row in plan.rows if row.role == "hid"} == {0.5}


class Shared(nn.Module):
    """One module under two names, and a tied readout."""

    def __init__(self, width):
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Embedding(11, width),
            nn.Linear(width, width),
            nn.Linear(width, 11, bias=False),
        )
        self.again, self.head.weight = self.embed, self.embed.weight


@pytest.mark.parametrize("width", [64, 96])
def test_a_module_with_two_names_is_multiplied_once(width):
    model = Shared(width)
    plan = st.parametrize(model, base=Shared(32), form="mup_t9", init_std=0.1)
    assert plan["embed.weight"].tied.keys() == {"again.weight", "head.weight"}
    token, x = torch.tensor([4]), torch.randn(1, width)
    assert torch.allclose(model.again(token), model.embed.weight[token] * math.sqrt(width / 32))
    assert torch.allclose(
        model.head(x), x @ model.embed.weight.T / math.sqrt(width / 32), atol=1e-5
    )


def test_the_padding_row_stays_zero():
    def build(width):
        return nn.Sequential(nn.Embedding(11, width, padding_idx=3), nn.Linear(width, width))

    model = build(64)
    st.parametrize(model, base=build(32), init_std=0.1)
    assert not model[0].weight[3].any() and model[0].weight[2].any()


# --- copies, the meta device, compiled and distributed models -------------------------------------


@pytest.mark.parametrize("form", ["mup", "mup_t3", "mup_t9", "mean_field", "ntk", "sp"])
def test_at_the_base_width_nothing_changes(form):
    torch.manual_seed(0)
    base = mlp(64)
    model = copy.deepcopy(base)
    plan = st.parametrize(
        model, base=base, delta=mlp(128), form=form, lr=1e-2, weight_decay=0.1, overrides=DECAYED
    )
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)
    )
    assert not [
        module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks
    ]
    assert [(g["lr"], g["weight_decay"], g["eps"]) for g in plan.param_groups(model)] == [
        (1e-2, 0.1, 1e-8)
    ]
    assert {row.role for row in plan.rows} == {"emb", "vec", "hid", "out", "fin"}


def test_a_plan_is_read_back_as_it_was(tmp_path, make):
    plan = st.parametrize(make(128), base=make(32), form="mup_t9", weight_decay=0.1, init_std=0.1)
    plan.save(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["digest"] == plan.digest


def test_the_table_has_a_line_for_each_kind_of_tensor():
    lines = str(
        st.parametrize(llama(64, depth=3), base=llama(32, depth=3), init_std=0.02)
    ).splitlines()
    assert [line.split()[-1] for line in lines if "q_proj" in line] == ["3"]
    assert len(lines) == 2 + 1 + 9 + 2
    assert "0.01414" in next(line for line in lines if "up_proj" in line)


def test_attaching_again_is_the_same_and_adds_no_state():
    model, plain = Encoder(64).eval(), Encoder(64).eval()
    plan = st.parametrize(model, base=Encoder(32), form="mean_field", init_std=0.1)
    assert model.state_dict().keys() == plain.state_dict().keys()
    tokens = torch.arange(16).view(2, 8)
    once = model(tokens)
    assert torch.equal(plan.attach(plan.attach(model))(tokens), once)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plan.attach(plain)(tokens), once)
    assert torch.equal(copy.deepcopy(model)(tokens), once)
    hooks = [
        hook
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, Multiply)
    ]
    # two linears in each of two layers, and the head; attention projections need no multiplier
    assert len(hooks) == 5


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_the_same_function(backend):
    model = Encoder(64)
    plan = st.parametrize(model, base=Encoder(32), init_std=0.1, lr=1e-2)
    tokens = torch.arange(16).view(2, 8)
    compiled = torch.compile(model, backend=backend)
    assert torch.allclose(compiled(tokens), model(tokens), atol=1e-6)
    assert by_name(model, plan.param_groups(compiled)) == by_name(model, plan.param_groups(model))
    assert torch.equal(
        plan.attach(torch.compile(copy.deepcopy(model), backend=backend))(tokens), compiled(tokens)
    )


def test_a_model_from_the_meta_device_starts_like_a_real_one():
    with torch.device("meta"):
        model, base = llama(64), llama(32)
    plan = st.parametrize(model, base=base, init_std=0.02)
    with pytest.raises(UserError, match="must be materialised"):
        plan.initialise(model)
    state = plan.initialise(model.to_empty(device="cpu"), seed=3).state_dict()
    real = llama(64)
    st.parametrize(real, base=base, init_std=0.02, seed=3)
    assert all(torch.equal(state[name], value) for name, value in real.state_dict().items())
    for row in plan.rows:
        if row.init_std:
            n = state[row.name].numel()
            assert float(state[row.name].std()) == pytest.approx(
                row.init_std, rel=5 / math.sqrt(2 * n)
            ), row.name


def test_wrappers_inside_a_model_are_ignored():
    model, tokens = Encoder(64), torch.arange(16).view(2, 8)
    plan, before = st.parametrize(model, base=Encoder(32), init_std=0.1), model(tokens)
    expected = [len(group["params"]) for group in plan.param_groups(model)]
    model.layers.layers[1] = torch.compile(model.layers.layers[1], backend="eager")
    whole = torch.compile(model, backend="eager")
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert [len(group["params"]) for group in plan.param_groups(whole)] == expected
    assert torch.allclose(plan.attach(whole)(tokens), before, atol=1e-6)


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def step(model, groups, tokens):
    opt = torch.optim.AdamW(groups)
    for _ in range(2):
        opt.zero_grad()
        model(tokens).square().mean().backward()
        opt.step()
    return model(tokens).detach()


# FullyShardedDataParallel warns that it runs in one process and that it is deprecated
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_distributed_models_train_like_a_single_one(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model, tokens = Encoder(64), torch.arange(16).view(2, 8)
    plan = st.parametrize(model, base=Encoder(32), init_std=0.1, lr=1e-2, seed=5)
    first = FullyShardedDataParallel(
        copy.deepcopy(model), use_orig_params=True, device_id=torch.device("cpu")
    )
    replicated, sharded = (
        nn.parallel.DistributedDataParallel(copy.deepcopy(model)),
        copy.deepcopy(model),
    )
    for module in (*sharded.layers.layers, sharded):
        fully_shard(module, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    alone = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan.initialise(sharded, seed=5)  # each rank keeps its shard of the same values
    assert all(torch.equal(p.full_tensor(), alone[name]) for name, p in sharded.named_parameters())
    expected = step(model, plan.param_groups(model), tokens)
    for wrapped in (replicated, sharded, first):
        assert torch.allclose(
            step(wrapped, plan.param_groups(wrapped), tokens), expected, atol=1e-6
        )


# --- training -------------------------------------------------------------------------------------


def losses(form, convert_eps=True, optimizer="adamw", steps=8):
    """Losses of a float64 MLP at four times the base width.

    Every form starts from the effective weights of Table 8.
    """
    torch.manual_seed(1)
    model, kind = mlp(64).double(), {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    plan = st.parametrize(
        model,
        base=mlp(16),
        form=form,
        optimizer=optimizer,
        lr=2e-2,
        weight_decay=0.1,
        eps=1e-3,
        init_std=0.3,
    )
    groups = plan.param_groups(model)
    for group in groups:
        group.update({} if convert_eps else {"eps": 1e-3})
    opt, x, y = kind(groups), torch.randn(32, 10, dtype=torch.float64), torch.randint(3, (32,))
    history = []
    for _ in range(steps):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        history.append(loss.item())
    return history


@pytest.mark.parametrize("form", ["mup_t3", "mup_t9", "mean_field"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_forms_of_mup_train_identically(form, optimizer):
    assert losses(form, optimizer=optimizer) == pytest.approx(
        losses("mup_t8", optimizer=optimizer), rel=1e-12
    )


def test_forms_of_mup_differ_when_eps_is_not_converted():
    one, other = losses("mup_t3", convert_eps=False), losses("mup_t8", convert_eps=False)
    assert one[0] == pytest.approx(other[0], rel=1e-12) and abs(one[-1] / other[-1] - 1) > 1e-4


# --- bad input ------------------------------------------------------------------------------------


class Cube(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight, self.lin = nn.Parameter(torch.ones(n, n, n)), nn.Linear(n, n)


class Bare(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight, self.lin = nn.Parameter(torch.ones(n, 7)), nn.Linear(n, n)


class Routed(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.lin = nn.Linear(n, n)
        self.blocks = nn.ModuleList(nn.Linear(n, 4) for _ in range(2))


BAD = {
    "coupled L2": (
        mlp,
        {"optimizer": "adam", "weight_decay": 0.1},
        r'no setting transfers: use optimizer="adamw"',
    ),
    "coupled L2 of one": (
        mlp,
        {"optimizer": "adam", "overrides": {"2.*": {"weight_decay": 0.1}}},
        r"Adam with weight_decay=0.1 adds an L2",
    ),
    "form": (mlp, {"form": "mup_t7"}, r"`form` must be a known form, but got 'mup_t7' \(nearest"),
    "family": (mlp, {"optimizer": "adamx"}, r"must be a known family, but got 'adamx' \(nearest"),
    "lr": (mlp, {"lr": -1.0}, r"`lr` must be greater than 0 and finite, but got -1.0"),
    "classes": (
        mlp,
        {"target": mlp(64, out=9)},
        (
            r"`4.weight` \(3 -> 9, 32 -> 64\): its fan-out grows by 3, but no tensor's fan-in "
            r"grows by 3\. Correct the base"
        ),
    ),
    "inputs": (
        mlp,
        {"target": mlp(64, inputs=30)},
        r"`0.weight` \(32 -> 64, 10 -> 30\): its fan-in grows by 3",
    ),
    "kernel": (
        Net,
        {"base": nn.Sequential(nn.Conv2d(3, 32, 3)), "target": nn.Sequential(nn.Conv2d(3, 64, 5))},
        r"`0.weight` .*3 -> 5.*: its dimension 2 grows\. Correct the base",
    ),
    "equal": (mlp, {"base": mlp(64)}, r"must differ in width, but all their shapes are equal"),
    "three": (
        Cube,
        {},
        r"`weight` \(32 -> 64, 32 -> 64, 32 -> 64\) grows in 3 dimensions: declare its role",
    ),
    "bare": (
        Bare,
        {},
        r"`weight` \(32 -> 64, 7\) belongs to a Bare, whose layout is not known: declare its role",
    ),
    "routers": (
        Routed,
        {},
        (
            r"`blocks.0.weight` \(4, 32 -> 64\) looks like a readout inside a block: declare "
            r"its role, `out` or `hid`"
        ),
    ),
    "dimensions": (
        mlp,
        {"base": {n: (1, *p.shape) for n, p in mlp(32).named_parameters()}},
        r"`0.weight` must have the same number of dimensions",
    ),
    "names": (mlp, {"base": nn.Sequential(*mlp(32)[:3])}, r"only the model has `4.weight`"),
    "pattern": (
        mlp,
        {"overrides": {"head.weight": "out"}},
        r"an override must name a tensor of the model, but `head.weight` matches none",
    ),
    "role": (
        mlp,
        {"overrides": {"4.weight": "readout"}},
        r"`role` of `4.weight` must be one of emb, .*, but got 'readout'",
    ),
    "key": (
        mlp,
        {"overrides": {"4.weight": {"lrr": 1.0}}},
        r"unknown key `lrr` in the override of `4.weight` \(nearest: 'lr'\)",
    ),
    "number": (
        mlp,
        {"overrides": {"4.weight": {"lr": "1"}}},
        r"`lr` of `4.weight` must be a number above 0, but got '1'",
    ),
    "axes": (
        mlp,
        {"overrides": {"4.weight": {"fan_in": 5}}},
        r"needs two different axes `fan_in` and `fan_out` below 2, but got 5 and 0",
    ),
    "no bsh": (mlp, {"base": "nowhere.bsh"}, r"existing base-shapes file, but got `nowhere.bsh`"),
    "unprepared": (
        mlp,
        {"base": "mup"},
        r"mup.set_base_shapes was called, but `0.weight` has no infshape",
    ),
    "no builder": (mlp, {"base": lambda: 3}, r"`base` must build a model, but it built int"),
    "no config": (mlp, {"base": 3}, r"`base` must build a model, but "),
    "tied": (
        lambda n: llama(n, tied=True),
        {"form": "mup_t3"},
        (
            r"a tied tensor needs a form .*mup_t8, mup_t9.*, but form='mup_t3' "
            r".*`lm_head.weight` \(out\)"
        ),
    ),
    "branches": (
        llama,
        {"target": llama(64, depth=4), "depth": (1,)},
        r"names no module that ends one: name them, as in depth=\(1, ",
    ),
    "no branch": (
        llama,
        {"target": llama(64, depth=4), "depth": (1, "*.attention")},
        r"`\*.attention` matches none",
    ),
    "alpha": (llama, {"depth": (0.7, "*.mlp")}, r"must be 0, 0.5 or 1, but got 0.7"),
    "unknown init rule": (
        gpt2,
        {"base": lambda: gpt2(32), "init_std": None},
        r"`init_std` must be given .* `transformer.h.0.attn.c_proj.weight` has std",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case):
    build, arguments, sentence = BAD[case]
    arguments = {"init_std": 0.02, "base": None} | arguments
    arguments["base"] = build(32) if arguments["base"] is None else arguments["base"]
    with pytest.raises(UserError, match=sentence) as error:
        st.parametrize(arguments.pop("target", None) or build(64), **arguments)
    assert "\n" not in str(error.value)


def test_a_plan_is_refused_for_other_shapes(tmp_path):
    plan = st.parametrize(mlp(64), base=mlp(32), init_std=0.1)
    for use in (plan.attach, plan.initialise, plan.param_groups):
        with pytest.raises(
            UserError,
            match=r"`0.weight` has shape \(128, 10\) in the model and \(64, 10\) in the plan",
        ):
            use(mlp(128))
        with pytest.raises(UserError, match=r"`5.bias` is only in the model"):
            use(nn.Sequential(*mlp(64), nn.Linear(3, 3)))
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    for altered in (
        text.replace("32", "33"),
        text.replace('"emb"', '"emb", "more": 1'),
        text.replace("parametrization/1", "parametrization/9"),
        "{",
    ):
        (tmp_path / "other.json").write_text(altered)
        with pytest.raises(UserError, match=r"other.json` must "):
            Plan.read(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"nowhere.json` must be a plan"):
        Plan.read("nowhere.json")


def test_a_model_is_rescaled_once():
    model = mlp(64)
    plan = st.parametrize(model, base=mlp(32))
    with pytest.raises(UserError, match="has been rescaled already"):
        st.parametrize(model, base=mlp(32))
    with pytest.raises(UserError, match="has been rescaled already"):
        plan.initialise(copy.deepcopy(model))
    assert all(torch.isfinite(p).all() for p in model.parameters())


# --- growing head sizes, two optimizers, damping --------------------------------------------------


def wide_llama(width, head_dim, scale=None):
    model = llama(width)
    config = model.config
    config.num_attention_heads, config.head_dim = width // head_dim, head_dim
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.scaling = scale or layer.self_attn.scaling
    return model


def wide_gpt2(width, heads):
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61,
            n_positions=32,
            n_embd=width,
            n_layer=2,
            n_head=heads,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def test_logits_scale_as_one_over_a_growing_head_size():
    """Equals a model with attention scale sqrt(base head) / head (arXiv:2203.03466, App. B.1)."""
    model, tokens = wide_llama(64, 16), torch.arange(12).view(2, 6)
    plan = st.parametrize(model, base=lambda: wide_llama(32, 8), form="mup_t3", init_std=0.05)
    other = wide_llama(64, 16, scale=8**0.5 / 16)
    other.load_state_dict(model.state_dict())
    assert torch.allclose(model(tokens).logits, other(tokens).logits, atol=1e-6)
    assert [query.factor for query in plan.queries] == [pytest.approx(2**-0.5)] * 2
    assert (
        "queries of 2 attention modules are multiplied by 0.7071, so that attention logits scale"
        in str(plan)
    )


def test_the_queries_of_a_fused_projection_are_its_first_third():
    model, tokens = wide_gpt2(64, 4), torch.arange(12).view(2, 6)
    st.parametrize(model, base=wide_gpt2(32, 4), form="mup_t9", init_std=0.05)
    other = copy.deepcopy(model.eval())
    for block in other.transformer.h:
        block.attn.scaling = 8**0.5 / 16
        block.attn.c_attn._forward_hooks.clear()
    assert torch.allclose(model(tokens).logits, other(tokens).logits, atol=1e-6)


def test_more_heads_of_the_same_size_need_no_query_multiplier(tmp_path):
    assert st.parametrize(llama(64), base=llama(32), init_std=0.02).queries == ()
    model, base = wide_llama(64, 16), wide_llama(32, 8)  # standard parametrization needs none
    assert st.parametrize(model, base=base, form="sp", init_std=0.02).queries == ()
    plan = st.parametrize(wide_llama(64, 16), base=wide_llama(32, 8), init_std=0.02)
    plan.save(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


def test_a_growing_head_size_without_a_known_query_module_is_noted():
    layer = nn.TransformerEncoderLayer
    plan = st.parametrize(layer(64, 4), base=layer(32, 4), init_std=0.02)
    assert "(first: `self_attn`), but their logits are NOT scaled as 1 / d_head" in str(plan)
    assert plan.queries == ()
    assert st.parametrize(layer(64, 4), base=layer(32, 2), init_std=0.02).notes == ()
    with pytest.raises(
        UserError, match=r"`queries` must name modules of the model, but `\*.query` matches none"
    ):
        st.parametrize(llama(64), base=llama(32), init_std=0.02, queries=("*.query",))


def test_tensors_that_muon_leaves_to_adamw_have_their_own_lr():
    plan = st.parametrize(
        llama(64),
        base=llama(32),
        optimizer="muon_spectral",
        lr=0.02,
        rest_lr=3e-3,
        init_std=0.02,
        apply=False,
    )
    alone = st.parametrize(
        llama(64), base=llama(32), optimizer="adamw", lr=3e-3, init_std=0.02, apply=False
    )
    assert [row.lr for row in plan.rows if row.role == "hid"] == [pytest.approx(0.02)] * 14
    assert all(row.lr == alone[row.name].lr for row in plan.rows if row.role != "hid")


@pytest.mark.parametrize("optimizer", ["kfac", "shampoo_half"])
def test_a_plan_scales_damping(optimizer):
    plan = st.parametrize(mlp(64), base=mlp(16), optimizer=optimizer, init_std=0.1, apply=False)
    for row in plan.rows:
        expected = rules.scale("mup", row.role, row.m_in, row.m_out, family=optimizer).damping
        assert row.damping == pytest.approx(expected), row.name
    assert {len(set(group["damping"])) for group in plan.param_groups(mlp(64))} <= {1, 2}
    assert any(row.damping != (1, 1) for row in plan.rows)
