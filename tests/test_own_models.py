"""`model.build`: a user's module trains as the zoo's model of the same architecture does."""

import json
import sys

import plain_models
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import scaletune as st
from scaletune import data, optim, training
from scaletune import trial as user
from scaletune.counting import branches, stacks
from scaletune.errors import UserError
from scaletune.parametrizing.recipe_model import build_planned
from scaletune.recipe import trial_id, validate_recipe, with_settings
from scaletune.sweeping.trainers.own_plan import own_plan
from scaletune.training import loop
from scaletune.training.own_stack import no_own_stack_reason

SIZES = ("n_params", "n_params_total", "depth", "flops", "width")


@pytest.fixture(scope="module")
def acc():
    return training.accelerator()


@pytest.fixture
def own(tiny):
    """settings -> a recipe of `plain_models`, without other keys of a model."""

    def make(build, settings=(), **model):
        content = dict(tiny()) | {"model": {"build": f"plain_models:{build}", "width": 32, **model}}
        return with_settings(validate_recipe(content, "own"), dict(settings))

    return make


def losses(recipe, acc):
    trial, curve = training.run_trial(recipe, "main", acc)
    assert trial.status == "done", trial.message
    return trial, [*curve, trial.loss]


ALL = {
    "parametrization.init_gain": 1.5,
    "parametrization.embedding_multiplier": 4.0,
    "parametrization.logits_multiplier": 0.5,
    "parametrization.residual_multiplier": 0.7,
    "parametrization.base_depth": 1,
    "parametrization.depth_alpha": 0.5,
    "optimizer.decay": "independent",
    "optimizer.weight_decay": 1e-3,
}


@pytest.mark.parametrize(
    ("width", "settings"),
    [
        (32, {}),
        (48, {"parametrization.form": "sp", "lr": 2e-3}),
        (64, {"engine.accumulation": 2}),
        (64, {"parametrization.form": "mup_t3", "training.precision": "bf16"}),
        (64, ALL),
        (64, {"optimizer.family": "muon", "optimizer.rest_ratio": 0.3}),
    ],
    ids=["base", "sp", "accumulation", "mup_t3", "all", "muon"],
)
def test_a_transformer_trains_as_the_zoos(tiny, acc, width, settings):
    recipe = tiny(settings, width=width)
    zoo, expected = losses(recipe, acc)
    built, actual = losses(with_settings(recipe, {"model.build": "plain_models:llama"}), acc)
    rel = 3e-3 if recipe.training.precision == "bf16" else 2e-5
    assert actual == pytest.approx(expected, rel=rel)
    assert [getattr(built, name) for name in SIZES] == [getattr(zoo, name) for name in SIZES]
    assert built.metrics["flops_from"] == "model"


@pytest.mark.parametrize("source", ["digits", "power-law"])
def test_an_mlp_trains_as_the_zoos(acc, source):
    content = {
        "parametrization": {"base_width": 16, "init_std": 0.2},
        "data": {"source": source, "seq_len": 1, "power_law": {"inputs": 64, "examples": 2048}},
        "budget": {"tokens": 640, "batch_tokens": 64, "eval_tokens": 200},
    }
    loss = {} if source == "digits" else {"loss": "mse"}
    models = {
        "zoo": {"family": "mlp", "width": 32, "depth": 2, **loss},
        "own": {"build": "plain_models:mlp", "width": 32, "depth": 2},
    }
    zoo, own = (losses(validate_recipe(content | {"model": m}, "m"), acc) for m in models.values())
    assert own[1] == pytest.approx(zoo[1], rel=1e-5)
    assert [getattr(own[0], name) for name in SIZES] == [getattr(zoo[0], name) for name in SIZES]


def test_initial_weights_are_the_zoos_bit_by_bit(tiny):
    recipe = tiny(width=64, seed=3)
    zoo = dict(build_planned(recipe, 256).net.named_parameters())
    built = build_planned(with_settings(recipe, {"model.build": "plain_models:llama"}), 256).net
    for name, parameter in built.module.named_parameters():
        assert torch.equal(parameter, zoo[name][0])


@pytest.mark.parametrize("output", ["dict", "tuple", "nano"])
def test_what_a_forward_returns_does_not_change_the_loss(own, acc, output):
    expected = losses(own("net", width=64), acc)[1]
    assert losses(own("net", width=64, output=output), acc)[1] == expected


def test_a_module_keeps_the_values_it_draws_unless_init_std_is_stated(own):
    unstated = {"parametrization": {"base_width": 32}}
    recipe = own("net", unstated, width=128)
    sp = own("net", {"parametrization": {"base_width": 32, "form": "sp"}}, width=128)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        raw = plain_models.net(128, 256)
    kept, scaled, drawn = (
        build_planned(each, 256).net.module for each in (sp, recipe, own("net", width=128))
    )
    assert torch.equal(kept.hidden.weight, raw.hidden.weight)
    assert torch.equal(kept.hidden.bias, raw.hidden.bias)
    # std 0.05 at every width; muP: the std of hidden matrices falls with fan-in**-1/2
    torch.testing.assert_close(scaled.hidden.weight, raw.hidden.weight / 2)
    torch.testing.assert_close(scaled.embed.weight, raw.embed.weight)
    assert drawn.hidden.weight.std().item() == pytest.approx(0.05 / 2, rel=0.02)
    stated = own("net", {"parametrization": {"base_width": 32, "init_std": 0.02}}, width=128)
    assert trial_id(recipe, "d") != trial_id(stated, "d")
    assert "init_std" not in recipe.point()["parametrization"]
    again = validate_recipe(json.loads(json.dumps(recipe.dump())), recipe.name)
    assert trial_id(again, "d") == trial_id(recipe, "d")


def test_dropout_is_drawn_from_the_trials_seed_and_continues_from_a_checkpoint(own, acc, tmp_path):
    recipe = own("net", {"my": {"dropout": 0.3}, "engine.runs": str(tmp_path)})
    state = torch.get_rng_state()
    expected = losses(recipe, acc)[1]
    torch.manual_seed(99)  # what else draws in the process changes nothing
    assert losses(recipe, acc)[1] == expected
    assert losses(own("net", {"my": {"dropout": 0.0}}), acc)[1] != expected
    assert losses(with_settings(recipe, {"seed": 1}), acc)[1] != expected
    torch.set_rng_state(state)
    assert _interrupted(recipe, acc) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_running_statistics_continue_from_a_checkpoint(acc, tmp_path):
    content = {
        "model": {"build": "plain_models:normed", "width": 32},
        "parametrization": {"base_width": 16},
        "data": {"source": "digits", "seq_len": 1},
        "budget": {"tokens": 512, "batch_tokens": 64, "eval_tokens": 100},
        "engine": {"runs": str(tmp_path)},
    }
    recipe = validate_recipe(content, "normed")
    assert _interrupted(recipe, acc) == losses(recipe, acc)[1]


def _interrupted(recipe, acc):
    """The losses of a trial that stops after three steps and is trained again."""
    recipe = with_settings(recipe, {"engine.checkpoint_every": 3})
    run = loop.start_run(recipe, data.load(recipe.data), acc)
    loop.begin(run, lambda *_: None)
    for _ in range(4):
        loop.update(run)
        loop.finish_step(run, lambda *_: None)
    return losses(recipe, acc)[1]


@pytest.mark.parametrize(
    ("build", "keys", "message"),
    [
        ("failing", {}, "raised ValueError: no such size \\(plain_models.py"),
        ("number", {}, "must return an nn.Module, but it returned int"),
        ("short", {}, r"must return logits of shape \[batch, positions, 256\]"),
        ("constant", {}, "must have a parameter `width`"),
        ("needs", {}, "needs a value for its parameter `heads`"),
        ("net", {"dropuot": 0.1}, r"no parameter `dropuot` \(nearest: 'dropout'\)"),
        ("nett", {}, r"has no `nett` \(nearest: 'net'\)"),
        ("unhooked", {}, "multiplies `head`, but the forward of Unhooked does not call that"),
    ],
)
def test_a_module_that_cannot_be_trained_is_refused_in_one_sentence(own, acc, build, keys, message):
    with pytest.raises(UserError, match=message) as error:
        losses(own(build, {}, **keys, width=64), acc)
    assert "\n" not in str(error.value)


def test_settings_that_only_the_zoo_has_are_refused(own, acc):
    for settings, words in [
        ({"training.z_loss": 1e-4}, "`training.z_loss` needs a language model of the zoo"),
        ({"parametrization.attention_multiplier": 2.0}, "must be 1 for `model.build`"),
        ({"parametrization.residual_multiplier": 2.0}, "must name them in an attribute"),
        ({"my": {"dropuot": 0.1}}, "`my.dropuot` would change nothing"),
    ]:
        with pytest.raises(UserError, match=words):
            losses(own("net", settings), acc)


def test_a_depth_that_is_not_stated_is_the_functions_default(own, acc):
    trial, _ = training.run_trial(own("net"), "main", acc)
    assert trial.depth == 3
    stated = own("net", depth=1)
    assert training.run_trial(stated, "main", acc)[0].depth == 1
    assert trial_id(stated, "d") != trial_id(own("net"), "d")


def test_stacks_by_vmap_and_why_not(own, tiny, acc):
    recipe = with_settings(tiny(), {"model.build": "plain_models:llama", "engine.stack": 2})
    points = [with_settings(recipe, {"lr": lr}) for lr in (2e-3, 8e-3)]
    assert no_own_stack_reason(recipe) == ""
    stacked = {trial.id: trial for trial, _ in training.train_stack(points, ["main"] * 2, acc)}
    for point in points:
        alone = losses(point, acc)[0]
        assert stacked[alone.id].provenance["stack"] == 2
        assert stacked[alone.id].loss == pytest.approx(alone.loss, rel=1e-5)
    dropout = own("net", {"my": {"dropout": 0.3}, "engine.stack": 2})
    assert "Net draws random numbers" in no_own_stack_reason(dropout)
    content = {"source": "digits", "seq_len": 1}
    normed = own("normed", {"data": content, "budget.batch_tokens": 64, "engine.stack": 2})
    assert "Normed changes its buffers" in no_own_stack_reason(normed)
    with pytest.raises(UserError, match="must train alone, because Net draws"):
        list(training.train_stack([dropout, with_settings(dropout, {"lr": 1e-3})], ["m"] * 2, acc))


def test_own_settings_keep_trials_apart(own):
    one, other = (own("net", {"my": {"dropout": p}}) for p in (0.0, 0.1))
    assert stacks.differing_settings(one, other) == ["my.dropout"]
    settings = {"schedule.kind": "constant", "schedule.warmup": 0.0}
    keys = {branches.trunk_key(with_settings(each, settings)) for each in (one, other)}
    assert len(keys) == 2 and "" not in keys


def test_modules_come_from_the_recipes_folder_and_are_read_again(tmp_path, monkeypatch):
    body = "def build(width, vocab_size):\n    return Net(width, vocab_size, 0.0, '{}')\n"
    head = "from plain_models import Net\n"
    recipe = {
        "model": '{ build = "my_module:build", width = 32 }',
        "parametrization": "{ base_width = 16 }",
        "budget": "{ tokens = 256, batch_tokens = 256 }",
    }
    text = "".join(f"{name} = {value}\n" for name, value in recipe.items())
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_module.py").write_text(head + body.format(folder))
        (tmp_path / folder / "study.toml").write_text(text)
    monkeypatch.chdir(tmp_path / "two")
    path = list(sys.path)

    def built(folder):
        point = st.Recipe.model_validate(dict(recipes.load(tmp_path / folder / "study.toml")))
        return build_planned(point, 256).net.module.output

    from scaletune import recipe as recipes

    assert [built("one"), built("two"), built("one")] == ["one", "two", "one"]
    assert sys.path == path
    (tmp_path / "one" / "my_module.py").write_text(head + body.format("changed"))
    assert built("one") == "changed"


@pytest.mark.parametrize("init", [{}, {"init_std": 0.05}], ids=["rescaled", "drawn"])
def test_a_plain_loop_with_a_plan_trains_as_scaletunes_loop(own, acc, tmp_path, init):
    table = {"base_width": 32, "form": "mup", **init}
    recipe = own("net", {"parametrization": table, "optimizer.weight_decay": 0.2}, width=64)
    expected = losses(recipe, acc)[1]
    content = dict(recipe.dump()) | {"trainer": {"function": "plain_models:net"}}
    content["model"] = {**content["model"], "vocab_size": 256}  # its data are not read
    foreign = validate_recipe(content, "foreign")
    plan, path = tmp_path / "plan.json", tmp_path / "trial.json"
    plan.write_text(json.dumps(own_plan(foreign)))
    path.write_text(json.dumps({"plan": str(plan), "settings": {"seed": recipe.seed}}))
    trial = user.CurrentTrial(str(path))
    torch.manual_seed(recipe.seed)
    model = trial.apply_plan(plain_models.net(64, 256))
    assert trial.apply_plan(model) is model  # once
    groups = trial.param_groups(model)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = optim.resolve_schedule(recipe.schedule, recipe.budget)
    lrs, curve = [group["lr"] for group in groups], []
    corpus, steps = data.load(recipe.data), recipe.budget.steps
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * optim.multiplier(schedule, (step + 0.5) / steps)
        x, y = map(torch.from_numpy, corpus.batch(recipe.seed, step, 8, 32))
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        optimizer.step()
        curve.append(loss.item())
    assert curve == pytest.approx(expected[:-1], rel=1e-5)
    with pytest.raises(ValueError, match="must have the same shapes"):
        user.CurrentTrial(str(path)).apply_plan(plain_models.net(32, 256))


def test_a_hugging_face_config_trains_as_the_zoos_model(tiny, acc, tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 999,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = tiny(width=48)
    built = with_settings(
        validate_recipe({**dict(recipe), "model": {"build": f"hf:{tmp_path}", "width": 48}}, "hf"),
        {},
    )
    zoo, expected = losses(recipe, acc)
    trial, actual = losses(built, acc)
    assert actual == pytest.approx(expected, rel=2e-5)
    assert [getattr(trial, name) for name in SIZES[:3]] == [getattr(zoo, n) for n in SIZES[:3]]
    for keys, words in [
        ({"width": 40}, "must be whole, but got 4 \\* 40 / 64"),
        ({"width": 48, "atention_bias": True}, "nearest: 'attention_bias'"),
    ]:
        model = {"build": f"hf:{tmp_path}", **keys}
        with pytest.raises(UserError, match=words):
            losses(validate_recipe({**dict(recipe), "model": model}, "hf"), acc)


def test_count_and_check_read_the_same_build(tiny, acc):
    recipe = with_settings(tiny(width=64), {"model.build": "plain_models:llama"})
    row, zoo = st.count(recipe), st.count(tiny(width=64))
    assert (row["flops"], row["seconds"]) == (zoo["flops"], zoo["seconds"])
    for name in ("n_params", "n_params_total"):
        assert row["params"][name] == zoo["params"][name]
    widths = (32, 64, 128)
    for form, verdict in (("mup", "pass"), ("sp", "fail")):
        settings = {"parametrization.form": form, "model.depth": 1, "lr": 0.02}
        result = st.check(with_settings(recipe, settings), widths, (0,))
        assert result["verdict"] == verdict


def test_a_sweep_with_a_function_that_builds(own, tmp_path):
    recipe = with_settings(own("failing", {"my": {"dropout": 0.1}}), {"axes": {"lr": [1e-3, 4e-3]}})
    trials = st.sweep(recipe, out=tmp_path, build=plain_models.net, settings=["engine.workers=1"])
    assert trials["status"].tolist() == ["done", "done"]
    assert trials["n_params"].nunique() == 1
    with pytest.raises(UserError, match="at the top level"):
        st.sweep(recipe, out=tmp_path, build=lambda width: None)


def test_a_module_reads_images_without_stating_their_shape(own, tmp_path):
    """Only the forward of a module knows what it accepts; own keys called like ours say nothing."""
    data = {"source": "digits", "seq_len": 1, "epochs": 2}
    recipe = own("pixels", {"data": data, "tokens": 256, "batch_tokens": 64})
    trials = st.sweep(recipe, out=tmp_path, build=plain_models.pixels)
    assert trials["status"].tolist() == ["done"]
