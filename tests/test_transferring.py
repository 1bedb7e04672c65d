"""Emitted Granite configs and recipes: loaded by transformers, they train as our own models do."""

import dataclasses
import importlib.util
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import EVIDENCE, VOCAB, WIDE
from torch.nn import functional as F
from transformers import GraniteConfig, GraniteForCausalLM

from scaletune import counting, models, optim, recipe
from scaletune.errors import UserError
from scaletune.records import Fit
from scaletune.rules import FORMS, caveats
from scaletune.transferring import one_std, prepare, transfer
from scaletune.transferring.fold_multipliers import fold
from scaletune.transferring.formats import granite
from scaletune.transferring.formats import recipe as recipe_module

EVERYTHING = {  # every multiplier differs from one
    "parametrization.embedding_multiplier": 3.0,
    "parametrization.logits_multiplier": 0.7,
    "parametrization.depth_alpha": 0.5,
    "parametrization.base_depth": 1,
}


def config_of(prepared):
    rows, multipliers = one_std(prepared)
    return granite.config(prepared, rows, multipliers)


def load_pair(prepared, **changed):
    """Returns (transformers' model of the emitted config, our model), with the same function.

    The weights of the first are ours, rescaled for one init std.
    """
    theirs = GraniteForCausalLM(GraniteConfig(**config_of(prepared) | changed)).eval()
    ours = models.build(prepared.target, VOCAB)
    rows, _ = one_std(prepared)
    theta = {
        row.name: new.multiplier / row.multiplier
        for row, new in zip(prepared.plan, rows, strict=True)
    }
    state = theirs.load_state_dict(
        {name: w / theta[name] for name, w in models.plain_state(ours).items()}, strict=False
    )
    tied = prepared.target.model.tied
    assert not state.unexpected_keys and state.missing_keys == (["lm_head.weight"] if tied else [])
    return theirs, ours


def draw_tokens(seed=0):
    return torch.randint(VOCAB, (4, 16), generator=torch.Generator().manual_seed(seed))


def import_loader(folder):
    """The emitted loader.py, imported as a user would."""
    spec = importlib.util.spec_from_file_location("loader", folder / "loader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, EVERYTHING, {"model.tied": True}, {"form": "sp", "seq_len": 64}]
)
def test_every_key_is_declared(transferred, settings):
    """transformers accepts unknown keys without a message, so a misspelt key would pass."""
    emitted = config_of(transferred(settings))
    declared = {field.name for field in dataclasses.fields(GraniteConfig)} | {"model_type"}
    assert emitted.keys() <= declared
    config = GraniteConfig(**emitted)
    assert emitted == {key: getattr(config, key) for key in emitted}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_logits_are_ours(transferred, form):
    theirs, ours = load_pair(transferred(EVERYTHING | {"form": form}))
    with torch.no_grad():
        expected = ours(draw_tokens())[0]
        assert torch.allclose(
            theirs(draw_tokens()).logits, expected, rtol=0, atol=1e-5 * float(expected.std()) + 1e-6
        )


@pytest.mark.parametrize("form", ["mup_t8", "mup_t9", "mean_field"])
def test_logits_are_ours_when_tied(transferred, form):
    theirs, ours = load_pair(transferred(EVERYTHING | {"form": form, "model.tied": True}))
    with torch.no_grad():
        assert torch.allclose(
            theirs(draw_tokens()).logits, ours(draw_tokens())[0], rtol=0, atol=1e-5
        )


def test_logits_are_ours_with_what_else_a_granite_has(transferred):
    """With grouped-query attention, biases, and attention and residual multipliers."""
    options = {
        "model.kv_heads": 2,
        "model.biases": True,
        "parametrization.attention_multiplier": 2.0,
        "parametrization.residual_multiplier": 0.3,
    }
    theirs, ours = load_pair(transferred(EVERYTHING | options))
    with torch.no_grad():
        assert torch.allclose(
            theirs(draw_tokens()).logits, ours(draw_tokens())[0], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model.norm": "layer"}, "Granite needs `model.norm` 'rms', but the target has 'layer'"),
        ({"model.mlp": "gelu"}, "Granite needs `model.mlp` 'swiglu', but the target has 'gelu'"),
        (
            {"model.positions": "learned"},
            "Granite needs `model.positions` 'rotary', but the target has 'learned'",
        ),
        ({"model.qk_norm": True}, "Granite needs `model.qk_norm` False, but the target has True"),
        (
            {"model.family": "moe", "model.ffn_ratio": 1.0},
            "Granite needs `model.family` 'transformer', but got 'moe': emit 'granitemoe'",
        ),
        (
            {"model": {"family": "mlp", "width": 128}, "seq_len": 1},
            "Granite needs `model.family` 'transformer', but got 'mlp'",
        ),
    ],
)
def test_unsupported_settings_are_refused(transferred, tmp_path, settings, sentence):
    with pytest.raises(UserError) as caught:
        granite.emit(transferred(settings), tmp_path)
    assert str(caught.value) == sentence and not list(tmp_path.iterdir())


NEUTRAL = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


@pytest.mark.parametrize("key", NEUTRAL)
def test_each_multiplier_changes_the_logits(transferred, key):
    """The logits change without the key, so transformers does not ignore it."""
    theirs, ours = load_pair(transferred(EVERYTHING))
    without, _ = load_pair(transferred(EVERYTHING), **{key: NEUTRAL[key]})
    with torch.no_grad():
        expected = ours(draw_tokens())[0]
        assert (theirs(draw_tokens()).logits - expected).abs().max() < 1e-5
        assert (without(draw_tokens()).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_own_init_has_the_planned_std(transferred, tied):
    torch.manual_seed(0)
    prepared = transferred({"model.tied": tied})
    config = config_of(prepared)
    rows = {row.name: row for row in one_std(prepared)[0]}
    for name, parameter in GraniteForCausalLM(GraniteConfig(**config)).named_parameters():
        expected, values = rows[name].init_std, parameter.detach()
        assert expected == (
            0 if rows[name].role == "vec" else pytest.approx(config["initializer_range"], rel=1e-12)
        )
        assert float(values.std()) == pytest.approx(
            expected, rel=5 / math.sqrt(2 * values.numel())
        ), name


@pytest.mark.parametrize("form", sorted(FORMS))
def test_at_the_base_size_it_is_the_ordinary_config(transferred, form):
    emitted = config_of(transferred({"form": form, "width": 32, "model.depth": 2}))
    assert {key: emitted[key] for key in NEUTRAL} == pytest.approx(
        NEUTRAL | {"attention_multiplier": 16**-0.5}
    )
    assert emitted["initializer_range"] == 0.2


def test_unreachable_by_one_std_is_refused(transferred):
    rows = transferred().plan
    odd = [
        dataclasses.replace(row, init_std=0.3) if "down_proj" in row.name else row for row in rows
    ]
    with pytest.raises(
        UserError,
        match="a config with one init std needs the same init std times multiplier in all hidden "
        "matrices",
    ):
        one_std(dataclasses.replace(transferred(), plan=odd))


# --- training -------------------------------------------------------------------------------------


class RotaryInFloat64(torch.nn.Module):
    """Our rotary positions in float64; transformers computes its own in float32."""

    def __init__(self, cos, sin):
        super().__init__()
        self.cos, self.sin = cos, sin

    def forward(self, x, position_ids):
        return self.cos[position_ids], self.sin[position_ids]


def in_float64(theirs, ours):
    """Converts both models to float64, and the rotary positions and norms of transformers too."""
    theirs, ours = theirs.double(), ours.double()
    theirs.model.rotary_emb = RotaryInFloat64(ours.model.cos, ours.model.sin)
    for module in theirs.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: F.rms_norm(
                x, x.shape[-1:], m.weight, m.variance_epsilon
            )
    return theirs, ours


def train(loss_of, opt, scheduler, steps=8):
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = loss_of()
        loss.backward()
        opt.step()
        scheduler()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize(
    "settings", [{}, {"model.tied": True}, {"form": "mup_t3"}, {"form": "sp_per_layer"}, EVERYTHING]
)
def test_it_trains_as_ours(transferred, tmp_path, settings):
    """Losses agree at every step.

    transformers' model has the groups and schedule of loader.py, our model has our own.
    """
    prepared = transferred({"optimizer.eps": 1e-4, "lr": 2e-2} | settings)
    granite.emit(prepared, tmp_path)
    theirs, ours = in_float64(*load_pair(prepared))
    attach = import_loader(tmp_path)
    tokens, targets = draw_tokens(), draw_tokens(1)
    settings, schedule = prepared.target.optimizer, prepared.target.schedule

    opt = attach.make_optimizer(theirs)
    losses = train(
        lambda: F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()),
        opt,
        attach.make_scheduler(opt).step,
    )
    own_opt = torch.optim.AdamW(
        optim.groups(ours, prepared.plan), betas=(settings.beta1, settings.beta2)
    )
    shares = iter([(step + 0.5) / 8 for step in range(1, 9)])
    optim.set_learning_rates(own_opt, schedule, 0.5 / 8)
    expected = train(
        lambda: ours(tokens, targets).sum(),
        own_opt,
        lambda: optim.set_learning_rates(own_opt, schedule, next(shares)),
    )

    assert losses == pytest.approx(expected, rel=1e-12)
    assert expected[-1] < expected[0] - 0.1


# --- loader.py ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emitted(transferred, tmp_path_factory):
    folder = tmp_path_factory.mktemp("granite")
    granite.emit(transferred(), folder)
    return folder


@pytest.fixture
def hf(transferred):
    return GraniteForCausalLM(GraniteConfig(**config_of(transferred())))


def test_loader_is_short_and_needs_torch_alone(emitted):
    lines = (emitted / "loader.py").read_text().split('"""', 2)[2].splitlines()
    assert sum(bool(line.strip()) for line in lines) < 60
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"json", "math", "re", "pathlib", "torch"}


def test_loader_gives_each_tensor_its_numbers(transferred, emitted, hf):
    rows = {row.name: row for row in one_std(transferred())[0]}
    names = {id(parameter): name for name, parameter in hf.named_parameters()}
    groups = import_loader(emitted).make_groups(hf)
    settings = {
        names[id(p)]: (group["lr"], group["weight_decay"], group["eps"])
        for group in groups
        for p in group["params"]
    }
    assert settings == {name: (row.lr, row.weight_decay, row.eps) for name, row in rows.items()}


def test_loader_knows_tensors_under_a_wrapper(emitted, hf):
    plain = import_loader(emitted).make_groups(hf)
    wrapped = torch.nn.ModuleDict({"module": torch.compile(hf, backend="eager")})
    assert {name.split(".")[1] for name, _ in wrapped.named_parameters()} == {"_orig_mod"}
    assert [len(group["params"]) for group in import_loader(emitted).make_groups(wrapped)] == [
        len(group["params"]) for group in plain
    ]


def test_loader_refuses_a_parameter_without_a_pattern(emitted, hf):
    hf.model.layers[0].self_attn.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(
        ValueError,
        match=r"every parameter must match a pattern, but model.layers.0.self_attn.scale "
        r"matches none",
    ):
        import_loader(emitted).make_groups(hf)


def test_loader_refuses_a_pattern_that_matches_nothing(emitted, hf):
    hf.lm_head = torch.nn.Identity()
    with pytest.raises(
        ValueError, match=r"every pattern must match a parameter, but not these: .*lm_head"
    ):
        import_loader(emitted).make_groups(hf)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_loaders_schedule_is_ours(transferred, tmp_path, kind, warmup):
    prepared = transferred(
        {"schedule.kind": kind, "schedule.warmup": warmup, "schedule.floor": 0.1}
    )
    granite.emit(prepared, tmp_path)
    attach = import_loader(tmp_path)
    opt = torch.optim.AdamW(
        [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.5, 2.0)]
    )
    scheduler = attach.make_scheduler(opt)
    for step in range(prepared.target.budget.steps):
        now = optim.multiplier(
            prepared.target.schedule, (step + 0.5) / prepared.target.budget.steps
        )
        assert [group["lr"] for group in opt.param_groups] == pytest.approx(
            [0.5 * now, 2.0 * now], abs=1e-12
        )
        opt.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"optimizer.family": "prodigy", "optimizer.lr": 1.0},
            "`optimizer.family` 'adamw', 'sgd', 'adafactor', 'muon', 'lion', but got 'prodigy'"
            r" \(it estimates one lr for all tensors, but the plan has one per tensor\)",
        ),
        (
            {"schedule.kind": "one_cycle"},
            "`schedule.kind` 'constant', 'linear', 'cosine', 'wsd', but got 'one_cycle'",
        ),
        (
            {"schedule.decay_shape": "1-sqrt"},
            "`schedule.decay_shape` 'linear', but got '1-sqrt'",
        ),
        ({"schedule.ema_half_life": 512}, "`schedule.ema_half_life` None, but got 512"),
    ],
)
def test_what_the_loader_cannot_build_is_refused(transferred, tmp_path, settings, sentence):
    with pytest.raises(UserError, match=f"^format 'granite' supports {sentence}$"):
        granite.emit(transferred(settings), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_warmup_in_tokens_reaches_the_loader_as_a_share(transferred, tmp_path):
    granite.emit(transferred({"schedule.warmup_tokens": 512}), tmp_path)
    assert json.loads((tmp_path / "param_groups.json").read_text())["schedule"]["warmup"] == 0.25


def test_param_groups_list_what_the_config_cannot_hold(emitted):
    groups = json.loads((emitted / "param_groups.json").read_text())
    assert groups["evidence"] == EVIDENCE
    assert [
        any(word in line for line in groups["cannot"])
        for word in ("learning rate", "schedule", "clipping")
    ] == [True] * 3
    assert groups["optimizer"]["max_grad_norm"] == 1.0 and groups["budget"]["steps"] == 8


# --- our own recipe -------------------------------------------------------------------------------


def without_none(value):
    return (
        {key: without_none(v) for key, v in value.items() if v is not None}
        if isinstance(value, dict)
        else value
    )


@pytest.mark.parametrize(
    "settings",
    [{}, EVERYTHING, {"model.tied": True, "optimizer.eps": 1e-12, "budget.tokens": 256 * 10**12}],
)
def test_the_emitted_recipe_is_the_target(transferred, tmp_path, settings):
    prepared = transferred(settings)
    path, _ = recipe_module.emit(prepared, tmp_path)
    read = recipe.load(path)
    expected = prepared.target
    assert read == expected.model_copy(update={"evidence": without_none(expected.evidence)})


def test_the_neutral_plan_holds_every_tensor(transferred, tmp_path):
    prepared = transferred(EVERYTHING)
    plan = json.loads(recipe_module.emit(prepared, tmp_path)[1].read_text())
    assert plan["schema"] == "scaletune.plan/1" and plan["base"] == {"width": 32, "depth": 1}
    assert [row["name"] for row in plan["tensors"]] == [
        t.name for t in counting.tensors(prepared.target.model, VOCAB)
    ]
    assert plan["multipliers"] == prepared.multipliers


# --- from a fit -----------------------------------------------------------------------------------


def make_fit(tiny, lr=0.012345678, batch_tokens=256.0):
    """A fit that predicts `lr` at every scale, from proxies of the tiny recipe at base width 32."""
    proxy = tiny(WIDE | {"width": 32}).model_dump()
    setting = {section: proxy[section] for section in ("parametrization", "schedule", "data")}
    setting["data"] = setting["data"] | {"vocab_size": VOCAB}
    setting["optimizer"] = {key: value for key, value in proxy["optimizer"].items() if key != "lr"}
    solution = {
        "columns": [],
        "vector": [math.log(lr)],
        "covariance": [[0.01]],
        "centre": [],
        "quantile": 2.0,
        "scatter": 0.0,
    }
    solution |= {"half_width": [0.2, 0.3], "batch_tokens": [batch_tokens] if batch_tokens else []}
    return Fit(
        law="lr_nd",
        params={},
        solution=solution,
        objective=0.0,
        ranges={"depth": [2, 2]},
        assumptions=["same data"],
        provenance={"setting": setting},
    )


def test_the_predicted_lr_goes_into_the_target_and_every_tensor(tiny):
    fit, target = make_fit(tiny), tiny(WIDE)
    prepared = prepare(fit, target)
    assert prepared.target.optimizer.lr == 0.01235 and prepared.vocab_size == VOCAB
    lr = {row.name: row.lr for row in prepared.plan}
    assert lr["model.norm.weight"] == 0.01235
    assert lr["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.01235 / 4)
    evidence = prepared.evidence
    assert evidence["lr"] == evidence["lr_at_fitted_batch"] == pytest.approx(0.012345678)
    assert evidence["fit"] == fit.digest
    assert evidence["n_params"] == counting.params(target.model, VOCAB)["n_params"]
    assert evidence["interval"]["lr"] == pytest.approx(
        [0.012345678 * math.exp(0.2 * sign) for sign in (-1, 1)]
    )


@pytest.mark.parametrize(
    ("settings", "factor", "sentence"),
    [
        ({}, 1.0, "batch size 256 tokens, as in the proxies"),
        (
            {"batch_tokens": 1024},
            2.0,
            "batch size 256 -> 1024 tokens: lr times 2 by the square-root rule",
        ),
        (
            {"batch_tokens": 4096, "tokens": 8192},
            4.0,
            "the rule is not valid here: 16 * (1 - beta1) >= 1",
        ),
        ({"model.depth": 4}, 1.0, "depth 2 -> 4, no depth rule: no proxy tested another depth"),
        (
            {"optimizer.beta2": 0.99},
            1.0,
            "`optimizer.beta2` is 0.99, every proxy had 0.95: assumed not to move the optimum",
        ),
        (
            {"schedule.kind": "cosine"},
            1.0,
            "`schedule.kind` is 'cosine', every proxy had 'wsd'",
        ),
    ],
)
def test_what_no_proxy_tested_is_an_assumption(tiny, settings, factor, sentence):
    evidence = prepare(make_fit(tiny), tiny(WIDE | settings)).evidence
    assert evidence["lr"] == pytest.approx(evidence["lr_at_fitted_batch"] * factor)
    for name in ("interval", "band"):  # scaled with the lr
        plain = getattr(make_fit(tiny).predict(n_params=1e4, tokens=2048), name)["lr"]
        assert evidence[name]["lr"] == pytest.approx([value * factor for value in plain])
    assert any(sentence in assumption for assumption in evidence["assumptions"])
    assert "same data" in evidence["assumptions"]


def test_caveats_of_the_scaling_rules_are_assumptions(tiny):
    fit = make_fit(tiny)
    fit.provenance["setting"]["parametrization"]["form"] = "mup_t3"
    evidence = prepare(fit, tiny(WIDE | {"form": "mup_t3"})).evidence
    assert [
        f"caveat of the scaling rules: {caveat}" for caveat in caveats("mup_t3", "adamw")
    ] == evidence["assumptions"][-1:]


def test_a_fit_without_one_batch_size_gives_an_unadjusted_lr(tiny):
    evidence = prepare(make_fit(tiny, batch_tokens=None), tiny(WIDE)).evidence
    assert (
        "batch of 256 tokens: lr is not adjusted to it, because the fitted runs do not share one "
        "batch size" in evidence["assumptions"]
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("form", "mup_t3"), ("parametrization.base_width", 64), ("parametrization.init_std", 0.1)],
)
def test_a_target_parametrized_unlike_the_proxies_is_refused(tiny, setting, value):
    with pytest.raises(
        UserError, match="a target must have the proxies' parametrization, but `parametrization"
    ):
        prepare(make_fit(tiny), tiny(WIDE | {setting: value}))


def test_a_law_without_a_learning_rate_is_refused(tiny):
    solution = {"vector": [1.0, 1.0, 1.0, 0.3, 0.3], "draws": ["1 1 1 .3 .3"], "scatter": 0.01}
    fit = Fit(law="loss_nd", params={}, solution=solution, objective=0.0)
    with pytest.raises(
        UserError,
        match="a transfer needs a law that gives a learning rate, but `loss_nd` gives none",
    ):
        prepare(fit, tiny(WIDE))


def test_every_format_is_written_under_its_name(tiny, tmp_path):
    answer = transfer(make_fit(tiny), tiny(WIDE), ["granite", "recipe"], tmp_path)
    names = [
        "granite/config.json",
        "granite/param_groups.json",
        "granite/loader.py",
        "recipe/target.toml",
        "recipe/plan.json",
    ]
    names += ["answer.json", "ANSWER.md"]
    assert answer["files"] == [str(tmp_path / name) for name in names]
    assert all((tmp_path / name).stat().st_size for name in names)
    assert recipe.load(tmp_path / "recipe/target.toml").optimizer.lr == 0.01235


def test_an_unknown_format_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(UserError, match=r"unknown format `granit` \(nearest: 'granite'\)"):
        transfer(make_fit(tiny), tiny(WIDE), ["recipe", "granit"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensors_that_act_alike_keep_alike_settings_where_multipliers_are_written_into_weights(
    transferred,
):
    """32**-0.5 * 32**0.5 is 1 + 2e-16, which must not separate queries from keys.

    Megatron keeps both in one tensor.
    """
    prepared = transferred()
    model = prepared.target.model.model_copy(update={"head_dim": 32})
    rows, _ = fold(prepared.plan, prepared.multipliers | {"attention": 32**-0.5}, model)
    alike = {
        (row.lr, row.weight_decay, row.eps, row.init_std)
        for row in rows
        if re.search("layers.0.*[qkv]_proj", row.name)
    }
    assert 32**-0.5 * 32**0.5 != 1 and len(alike) == 1


def test_records_without_a_parametrization_give_a_warning(tiny):
    """The lr of runs in standard parametrization holds for every tensor.

    A base width below the target's width would divide it.
    """
    fit = dataclasses.replace(make_fit(tiny), provenance={})
    assert any(
        "set parametrization.base_width to" in sentence
        for sentence in prepare(fit, tiny(WIDE), VOCAB).evidence["status"]
    )
    standard = tiny(WIDE | {"parametrization.form": "sp"})
    assert prepare(fit, standard, VOCAB).evidence["status"] == ["ok"]
    assert prepare(make_fit(tiny), tiny(WIDE), VOCAB).evidence["status"] == ["ok"]
