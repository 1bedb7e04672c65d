"""The answer of a transfer: sensitivity, cost, and the source of each setting."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from scaletune import counting, fitting, recipe
from scaletune.cli import main
from scaletune.errors import UserError
from scaletune.records import Fit
from scaletune.surface.model import parameter_names
from scaletune.transferring import prepare
from scaletune.transferring.answer.sensitivity import loss_sensitivity
from scaletune.transferring.answer.settings import build_answer

VOCAB, WIDE = 64, {"width": 128, "parametrization.base_width": 32}
SCALE = {"n_params": 1e6, "tokens": 1e8, "batch_tokens": 1e4}


def trials(p=0.04):
    """Trials with loss = minimum * (1 + p (lr / best - 1 - ln(lr / best)))."""
    rows = []
    for n_params in (1e5, 4e5, 1.6e6):
        for tokens in (1e7, 4e7):
            best = 0.02 * (n_params / 1e5) ** -0.1
            minimum = 2 + 50 / n_params**0.3 + 20 / tokens**0.3
            for lr in (best * 2**k for k in range(-3, 3)):
                x = lr / best
                rows.append(
                    {
                        "n_params": n_params,
                        "tokens": tokens,
                        "batch_tokens": 1e4,
                        "lr": lr,
                        "loss": minimum * (1 + p * (x - 1 - math.log(x))),
                    }
                )
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def lr_fit():
    return fitting.fit(trials())


def test_off_by_2x_in_lr_is_the_closed_form(lr_fit):
    """The loss rises by p (ln 2 - 1/2) at half the best lr and p (1 - ln 2) at twice it."""
    sensitivity = loss_sensitivity(lr_fit, SCALE, 3.0)
    assert sensitivity["lr"]["half"] == pytest.approx(0.04 * (math.log(2) - 0.5), rel=0.03)
    assert sensitivity["lr"]["double"] == pytest.approx(0.04 * (1 - math.log(2)), rel=0.03)
    assert sensitivity["lr"]["half_nats"] == 3.0 * sensitivity["lr"]["half"]
    assert "of 6 settings" in sensitivity["lr"]["source"]
    low, high = sensitivity["lr"]["range"]["double"]
    assert low <= sensitivity["lr"]["double"] <= high


def test_an_unknown_sensitivity_is_null_with_the_reason(lr_fit):
    sensitivity = loss_sensitivity(lr_fit, SCALE, None)
    assert sensitivity["lr"]["half_nats"] is None
    for name, word in (
        ("batch_tokens", "batch sensitivity unknown"),
        ("weight_decay", "weight-decay sensitivity unknown"),
    ):
        assert sensitivity[name]["half"] is sensitivity[name]["double"] is None
        assert word in sensitivity[name]["source"]
    bare = Fit(law="lr_nd", params={}, solution={}, objective=0.0)
    assert loss_sensitivity(bare, SCALE, None)["lr"] == {
        "half": None,
        "double": None,
        "range": None,
        "half_nats": None,
        "double_nats": None,
        "source": "learning-rate sensitivity unknown: the fit has no loss basin over lr",
    }


CURVATURES = {"lr": 0.05, "batch": 0.02, "ratio": 0.03, "wd": 0.01, "product": 0.015}


def joint_fit(axes=("lr", "batch", "wd"), setting=None):
    """A joint fit that is a parabola in every direction, with loss 3 at the optimum.

    The optimum is lr 0.01, batch 2**13 and weight decay 0.3 at every scale.
    """
    names = parameter_names(len(axes))
    value = dict.fromkeys(names, 0.0)
    centres = {"lr": math.log(0.01), "batch": math.log(2**13), "wd": math.log(0.3)}
    value |= {f"{axis}.c": centres[axis] for axis in axes} | {
        "loss.E": math.log(3),
        "loss.A": -50.0,
        "loss.B": -50.0,
        "reach.lr": 8.0,
    }
    value |= {
        f"curvature.{name}": math.log(c)
        for name, c in CURVATURES.items()
        if f"curvature.{name}" in value
    }
    solution = {
        "axes": list(axes),
        "names": names,
        "vector": [value[name] for name in names],
        "scatter": [0.05] * (len(axes) + 1),
        "centre": [math.log(1e6), math.log(1e8)],
        "covariance": [
            " ".join("1e-6" if i == j else "0" for j in range(len(names)))
            for i in range(len(names))
        ],
        "quantile": 2.0,
        "band": 0.0025,
    }
    return Fit(
        law="joint",
        params={},
        solution=solution,
        objective=0.0,
        provenance={"setting": setting or {}},
    )


def test_off_by_2x_on_a_surface_is_the_closed_form():
    """The loss rises by (ln 2)**2 / 2 times the curvatures of all directions that change."""
    sensitivity, c = loss_sensitivity(joint_fit(), SCALE | {"batch_tokens": 2**13}, 3.0), CURVATURES
    expected = {
        "lr": c["lr"] + c["ratio"] + c["product"],
        "batch_tokens": c["batch"] + c["ratio"],
        "weight_decay": c["wd"] + c["product"],
    }
    for name, curvature in expected.items():
        for side in ("half", "double"):
            assert sensitivity[name][side] == pytest.approx(
                curvature * math.log(2) ** 2 / 2, rel=1e-4
            )
    assert loss_sensitivity(joint_fit(("lr", "batch")), SCALE, 3.0)["weight_decay"]["half"] is None


def test_halving_a_batch_above_the_optimum_lowers_the_loss():
    sensitivity = loss_sensitivity(
        joint_fit(("lr", "batch")), SCALE | {"batch_tokens": 2**15}, 3.0
    )["batch_tokens"]
    assert sensitivity["half"] < 0 < sensitivity["double"]
    assert "the fit's optimum lies on that side" in sensitivity["source"]


def test_a_surface_over_weight_decay_sets_it(tiny):
    prepared = prepare(joint_fit(), tiny(WIDE), VOCAB)
    settings = build_answer(joint_fit(), prepared)["settings"]
    assert prepared.target.optimizer.weight_decay == settings["weight_decay"]["value"] == 0.3
    assert settings["weight_decay"]["source"].startswith("fitted")
    assert settings["batch_tokens"]["value"] == 256
    assert settings["batch_tokens"]["fitted_best"] == pytest.approx(2**13)


# --- sources of settings --------------------------------------------------------------------------


def fit_with_setting(tiny, lr_fit, **without):
    """The fit of `trials` with the settings of the tiny recipe at base width as provenance."""
    content = tiny({"width": 32}).model_dump()
    setting = {
        section: dict(content[section])
        for section in ("parametrization", "optimizer", "schedule", "data")
    }
    del setting["optimizer"]["lr"], setting["optimizer"]["eps"]
    return Fit.from_dict(
        lr_fit.to_dict()
        | {
            "provenance": {"setting": setting},
            "ranges": {"n_params": [1e5, 1.6e6], "tokens": [1e3, 4e3]},
        }
    )


def test_every_setting_has_its_source(tiny, lr_fit):
    fit = fit_with_setting(tiny, lr_fit)
    prepared = prepare(
        fit, tiny(WIDE | {"optimizer.beta2": 0.99, "schedule.warmup": 0.25}), VOCAB, force=True
    )
    settings = build_answer(fit, prepared)["settings"]
    sources = {name: row["source"] for name, row in settings.items()}
    assert sources["lr"].startswith("fitted: law lr_nd")
    assert sources["batch_tokens"] == (
        "set by the target; lr adjusted by the square-root rule, not tested by your sweep"
    )
    assert (
        sources["weight_decay"]
        == sources["beta1"]
        == sources["init_std"]
        == "same as in the proxies"
    )
    assert sources["beta2"] == "set by the target; every proxy had 0.95"
    assert sources["warmup"] == "set by the target; every proxy had 0.1"
    assert sources["eps"] == "set by the target; the proxies had different values"
    assert settings["warmup"] | {"source": ""} == {
        "value": 0.25,
        "tokens": 512,
        "steps": 2,
        "source": "",
    }
    hidden = next(row.init_std for row in prepared.plan if row.role == "hid")
    assert settings["init_std"]["by_role"]["hid"] == [hidden, hidden]
    assert hidden == pytest.approx(0.05 / 2)
    answer = build_answer(lr_fit, prepare(lr_fit, tiny(WIDE), VOCAB, force=True))
    unknown = answer["settings"]["beta1"]["source"]
    assert unknown == "set by the target; the records do not contain the proxies' value"


def test_priors_are_reported_and_not_applied(tiny, lr_fit):
    """The target's batch is 2e4 tokens, that of the runs 1e4.

    Weight decay follows B / (lr D) (arXiv:2405.13698) and eps B**(-1/2) (arXiv:2205.10287).
    """
    fit = fit_with_setting(tiny, lr_fit)
    prepared = prepare(
        fit, tiny(WIDE | {"seq_len": 10, "batch_tokens": 20000, "tokens": 40000}), VOCAB, force=True
    )
    rules = {rule["rule"]: rule for rule in build_answer(fit, prepared)["priors"]}
    lr = prepared.target.optimizer.lr / fit.predict(n_params=1.6e6, tokens=4e3).lr
    assert rules["ema_timescale"]["values"]["weight_decay"] == pytest.approx(0.1 * 2 / (lr * 10))
    assert rules["square_root"]["values"] == pytest.approx(
        {"eps": 1e-8 / 2**0.5, "beta1": 0.8, "beta2": 0.9}
    )
    assert prepared.target.optimizer.weight_decay == 0.1 and prepared.target.optimizer.beta1 == 0.9


# --- the cost -------------------------------------------------------------------------------------


def test_without_hardware_the_cost_is_null_with_the_reason(tiny, lr_fit):
    answer = build_answer(lr_fit, prepare(lr_fit, tiny(WIDE), VOCAB, force=True))
    assert answer["time"] is answer["split"] is answer["hardware"] is answer["fits"] is None
    assert "no [hardware] table" in answer["cost_notes"][0]
    assert answer["flops"]["total"] == counting.flops_per_token(tiny(WIDE).model, VOCAB, 32) * 2048


def test_hours_from_measured_steps(tiny, lr_fit, tmp_path):
    """Uses step times of a GPU with 1e12 FLOP/s, 1e9 bytes/s and 1 ms of overhead per step."""
    grid = [(b, f) for b in (1e6, 4e6, 1.6e7) for f in (1e8, 1e9, 1e10, 1e11)]
    steps = pd.DataFrame(
        {"bytes_moved": b, "flops_per_step": f, "seconds_per_step": 1e-3 + b / 1e9 + f / 1e12}
        for b, f in grid
    )
    path = fitting.fit(steps, "seconds_per_step").write(tmp_path / "steps.json")
    table = {"memory_gb": 1.0, "peak_flops": 1e13, "calibration": str(path)}
    target = tiny(WIDE | {"hardware": table})
    time = build_answer(lr_fit, prepare(lr_fit, target, VOCAB, force=True))["time"]
    flops = counting.flops_per_token(target.model, VOCAB, 32) * 256
    moved = counting.bytes_moved(target.model, VOCAB, 256)
    assert time["gpu_hours"] * 3600 / 8 == pytest.approx(
        1e-3 + moved / 1e9 + flops / 1e12, rel=0.02
    )
    assert time["mfu_source"].startswith("measured: fit ")
    lr_fit.write(tmp_path / "other.json")

    def answer_with(**hardware):
        target = tiny(WIDE | {"hardware": table | hardware})
        return build_answer(lr_fit, prepare(lr_fit, target, VOCAB, force=True))

    with pytest.raises(
        UserError,
        match=r"`hardware\.calibration` must be a fit of 'seconds_per_step', but .* is one "
        r"of 'lr_nd'",
    ):
        answer_with(calibration=str(tmp_path / "other.json"))
    with pytest.raises(UserError, match="an MFU must be at most 1"):
        answer_with(peak_flops=1e6)


TARGET = """
[model]
hf = "config.json"
[data]
seq_len = 128
[parametrization]
base_width = 64
[budget]
tokens = 16384
batch_tokens = 1024
[hardware]
gpu = "A100-80"
gpus = 8
"""
CONFIG = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def test_the_command_line_answers_and_writes(tmp_path, lr_fit, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "target.toml").write_text(TARGET)
    arguments = [
        "transfer",
        str(lr_fit.write(tmp_path / "fit.json")),
        str(tmp_path / "target.toml"),
        "--out",
        str(tmp_path / "out"),
        "--force",
    ]
    assert main([*arguments, "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["answer"] == json.loads((tmp_path / "out" / "answer.json").read_text())
    assert output["answer"]["memory_bytes_a_gpu"]["total"] > 0
    assert output["answer"]["split"]["dp"] == 8
    assert output["answer"]["fits"] is True
    assert (
        output["assumptions"][0]
        == f"the architecture is that of {tmp_path / 'config.json'} (llama)"
    )
    granite = json.loads((tmp_path / "out/granite/config.json").read_text())
    assert granite["vocab_size"] == 512 and granite["hidden_size"] == 128
    assert main(arguments) == 0
    lines = capsys.readouterr().out
    page = (tmp_path / "out" / "ANSWER.md").read_text()
    for words in (
        "learning rate: loss +",
        "batch sensitivity unknown",
        " GPU-hours, ",
        "data 8, tensor 1, pipeline 1",
        "GB per GPU, fits",
    ):
        assert words in lines and words in page


def test_a_target_that_fits_no_split_gets_the_reason(tiny, lr_fit):
    crowded = tiny(WIDE | {"hardware": {"memory_gb": 1e-4, "peak_flops": 1e12}})
    answer = build_answer(lr_fit, prepare(lr_fit, crowded, VOCAB, force=True))
    assert answer["fits"] is False
    assert "no split fits: the smallest needs" in answer["cost_notes"][0]
    odd = build_answer(
        lr_fit,
        prepare(lr_fit, tiny(WIDE | {"hardware": {"gpu": "L40S", "gpus": 7}}), VOCAB, force=True),
    )
    assert odd["split"] is None
    assert odd["cost_notes"][0].startswith("7 GPUs do not divide a batch of 8 sequences")
    assert recipe.points(crowded)[0].hardware == crowded.hardware


def test_the_target_in_configs_is_answered(lr_fit):
    """LLaMA 2 7B has 6,738,415,616 parameters and took 184,320 A100-hours (arXiv:2307.09288)."""
    target = recipe.load(Path(__file__).parents[1] / "configs" / "targets" / "llama-2-7b.toml")
    answer = build_answer(lr_fit, prepare(lr_fit, target, force=True))
    low, high = answer["time"]["gpu_hours_range"]
    assert low < 184_320 < high
    assert answer["fits"] is True
    assert answer["split"]["dp"] * answer["split"]["tp"] * answer["split"]["pp"] == 1024
    assert counting.params(target.model, target.data.vocab_size)["n_params_total"] == 6_738_415_616
    assert (
        "not read, because the parametrization sets them: initializer_range"
        in answer["assumptions"]
    )
