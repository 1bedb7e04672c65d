"""GraniteMoe and GraniteMoeShared configs: transformers gives our function, init and training."""

import dataclasses
import json
import types

import pytest
import torch
import transformers
from conftest import VOCAB
from test_transferring import EVERYTHING, draw_tokens, import_loader, in_float64, train
from torch.nn import functional as F

from scaletune import models, optim
from scaletune.errors import UserError
from scaletune.linting.lint import lint
from scaletune.transferring import one_std
from scaletune.transferring.formats import granite, granitemoe, llama, pytorch, recipe
from scaletune.transferring.read_back import plan_settings, read

MOE = {"model.family": "moe", "model.ffn_ratio": 1.0, "model.n_experts": 4}
SHARED = {"model.n_shared_experts": 2, "model.kv_heads": 2}
KINDS = [{}, SHARED, {"model.router": "hid"}, {"model.tied": True}]


def build_model(folder, **changed):
    content = json.loads((folder / "config.json").read_text())
    cls = content["architectures"][0]
    config = getattr(transformers, cls.replace("ForCausalLM", "Config"))(**content | changed)
    config._experts_implementation = "eager"  # grouped products have no float64
    return getattr(transformers, cls)(config).eval()


def build_pair(prepared, folder):
    """Returns (transformers' model of the emitted config, ours): one function, in float64."""
    granitemoe.emit(prepared, folder)
    theirs, ours = build_model(folder), models.build(prepared.target, VOCAB)
    rows, _ = one_std(prepared)
    theta = {
        old.name: new.init_std / old.init_std if old.init_std else 1.0
        for old, new in zip(prepared.plan, rows, strict=True)
    }
    packed: dict[str, list[torch.Tensor]] = {}
    for name, w in models.plain_state(ours).items():
        packed.setdefault(granitemoe.hf_name(name), []).append(w.double() * theta[name])
    loaded = theirs.double().load_state_dict(
        {
            name: torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]
            for name, parts in packed.items()
        },
        strict=False,
    )
    assert not loaded.unexpected_keys
    assert loaded.missing_keys == (["lm_head.weight"] if prepared.target.model.tied else [])
    for module in theirs.modules():  # their router computes in float32
        if type(module).__name__.endswith("TopKRouter"):
            module.forward = types.MethodType(route_in_float64, module)
    return in_float64(theirs, ours)


def route_in_float64(self, x):
    logits = F.linear(x, self.weight)
    top, index = logits.topk(self.top_k, dim=-1)
    return logits, top.softmax(-1), index


@pytest.mark.parametrize("settings", KINDS)
def test_every_key_is_declared(transferred, tmp_path, settings):
    granitemoe.emit(transferred(MOE | EVERYTHING | settings), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    cls = getattr(transformers, content["architectures"][0].replace("ForCausalLM", "Config"))
    assert content.keys() <= {field.name for field in dataclasses.fields(cls)} | {"model_type"}
    assert content == {key: getattr(cls(**content), key) for key in content}


@pytest.mark.parametrize("form", ["mup_t3", "mup_t8", "ntk"])
@pytest.mark.parametrize("settings", [{}, SHARED, {"model.router": "hid"}])
def test_logits_are_ours(transferred, tmp_path, settings, form):
    theirs, ours = build_pair(transferred(MOE | EVERYTHING | settings | {"form": form}), tmp_path)
    with torch.no_grad():
        expected = ours(draw_tokens())[0]
        assert torch.allclose(
            theirs(draw_tokens()).logits, expected, rtol=0, atol=1e-9 * float(expected.std())
        )


@pytest.mark.parametrize("settings", KINDS)
def test_it_trains_as_ours(transferred, tmp_path, settings):
    """Eight AdamW steps in float64, with the load-balance loss, give the same loss per token."""
    prepared = transferred(MOE | EVERYTHING | settings | {"optimizer.eps": 1e-4, "lr": 2e-2})
    theirs, ours = build_pair(prepared, tmp_path)
    attach, tokens, targets, losses = import_loader(tmp_path), draw_tokens(), draw_tokens(1), []

    def loss():
        out = theirs(tokens, output_router_logits=True)
        nats = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        losses.append(nats.item())
        return nats + theirs.router_aux_loss_coef * out.aux_loss

    opt = attach.make_optimizer(theirs)
    train(loss, opt, attach.make_scheduler(opt).step)
    schedule, steps = prepared.target.schedule, iter([(step + 0.5) / 8 for step in range(1, 9)])
    own_opt = optim.optimizer(ours, prepared.plan, prepared.target.optimizer)
    optim.set_learning_rates(own_opt, schedule, 0.5 / 8)
    expected = train(
        lambda: ours(tokens, targets).sum(),
        own_opt,
        lambda: optim.set_learning_rates(own_opt, schedule, next(steps)),
    )
    assert theirs.router_aux_loss_coef == prepared.target.model.balance_coef
    assert losses == pytest.approx(expected, rel=1e-6) and expected[-1] < expected[0] - 0.1


@pytest.mark.parametrize("settings", KINDS)
def test_the_loader_draws_the_planned_std(transferred, tmp_path, settings):
    prepared = transferred(MOE | EVERYTHING | settings)
    granitemoe.emit(prepared, tmp_path)
    theirs = build_model(tmp_path)
    import_loader(tmp_path).initialize(theirs)
    expected = {row.name: row.init_std for row in granitemoe.rename_rows(one_std(prepared)[0])}
    assert expected.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        values = parameter.detach()
        assert float(values.std()) == pytest.approx(
            expected[name], rel=5 / (2 * values.numel()) ** 0.5
        ), name


@pytest.mark.parametrize(
    "key", ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"]
)
def test_each_multiplier_changes_the_logits(transferred, tmp_path, key):
    granitemoe.emit(transferred(MOE | EVERYTHING), tmp_path)
    theirs = build_model(tmp_path)
    other = build_model(
        tmp_path, **{key: 2 * json.loads((tmp_path / "config.json").read_text())[key]}
    )
    other.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        before, after = theirs(draw_tokens()).logits, other(draw_tokens()).logits
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize(
    "settings",
    [{}, EVERYTHING | SHARED, EVERYTHING | {"model.router": "hid"}, {"model.tied": True}],
)
def test_what_is_read_back_is_the_plan(transferred, tmp_path, settings):
    prepared = transferred(MOE | settings)
    for emitter in (
        (granitemoe, recipe) if prepared.target.model.tied else (granitemoe, recipe, pytorch)
    ):
        emitter.emit(prepared, tmp_path / emitter.__name__)
        settings_read = read(tmp_path / emitter.__name__, prepared.target.model)
        assert settings_read == {
            name: pytest.approx(values, rel=1e-12)
            for name, values in plan_settings(prepared).items()
        }
    assert lint(tmp_path / granitemoe.__name__)["findings"] == []


def test_at_the_base_size_it_is_the_ordinary_config(transferred, tmp_path):
    granitemoe.emit(transferred(MOE | {"width": 32}), tmp_path)
    content, groups = (
        json.loads((tmp_path / file).read_text()) for file in ("config.json", "param_groups.json")
    )
    neutral = {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
    assert {key: content[key] for key in neutral} == neutral and content["initializer_range"] == 0.2
    assert {(group["lr"], group["eps"]) for group in groups["groups"]} == {(0.005, 1e-8)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model.family": "transformer"},
            "^GraniteMoe needs `model.family` 'moe', but got 'transformer'$",
        ),
        (
            MOE | {"model.norm": "layer"},
            "^GraniteMoe needs `model.norm` 'rms', but the target has 'layer'$",
        ),
        (
            MOE | {"model.norm_top_k": False},
            "^GraniteMoe needs `model.norm_top_k` True, but the target has False$",
        ),
        (
            MOE | {"optimizer.family": "muon"},
            "^format 'granitemoe' uses torch.optim.Muon, which takes single matrices",
        ),
    ],
)
def test_unsupported_settings_are_refused(transferred, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        granitemoe.emit(transferred(settings), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("emitter", [granite, llama])
def test_a_dense_format_names_the_format_for_experts(transferred, tmp_path, emitter):
    with pytest.raises(UserError, match=r"but got 'moe': emit 'granitemoe'$"):
        emitter.emit(transferred(MOE), tmp_path)
