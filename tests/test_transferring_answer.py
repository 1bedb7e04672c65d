"""The answer of a transfer: sensitivity against closed forms, cost, and the source of each setting."""

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
    """Losses of minimum * (1 + p (lr / best - 1 - ln(lr / best))): a fall in ln lr plus a rise in lr."""
    rows = []
    for n_params in (1e5, 4e5, 1.6e6):
        for tokens in (1e7, 4e7):
            best, floor = 0.02 * (n_params / 1e5) ** -0.1, 2 + 50 / n_params**0.3 + 20 / tokens**0.3
            for lr in (best * 2**k for k in range(-3, 3)):
                x = lr / best
                rows.append(
                    {
                        "n_params": n_params,
                        "tokens": tokens,
                        "batch_tokens": 1e4,
                        "lr": lr,
                        "loss": floor * (1 + p * (x - 1 - math.log(x))),
                    }
                )
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def of_lr():
    return fitting.fit(trials())


def test_off_by_2x_in_lr_is_the_closed_form(of_lr):
    """p (ln 2 - 1/2) at half the best lr, p (1 - ln 2) at twice it."""
    found = loss_sensitivity(of_lr, SCALE, 3.0)
    assert found["lr"]["half"] == pytest.approx(0.04 * (math.log(2) - 0.5), rel=0.03)
    assert found["lr"]["double"] == pytest.approx(0.04 * (1 - math.log(2)), rel=0.03)
    assert (
        found["lr"]["half_nats"] == 3.0 * found["lr"]["half"]
        and "of 6 settings" in found["lr"]["source"]
    )
    low, high = found["lr"]["range"]["double"]
    assert low <= found["lr"]["double"] <= high


def test_what_no_fit_says_is_null_with_a_sentence(of_lr):
    found = loss_sensitivity(of_lr, SCALE, None)
    assert found["lr"]["half_nats"] is None
    for name, word in (
        ("batch_tokens", "batch sensitivity unknown"),
        ("weight_decay", "weight-decay sensitivity unknown"),
    ):
        assert (
            found[name]["half"] is found[name]["double"] is None and word in found[name]["source"]
        )
    bare = Fit(law="lr_nd", params={}, solution={}, objective=0.0)
    assert loss_sensitivity(bare, SCALE, None)["lr"] == {
        "half": None, "double": None, "range": None, "half_nats": None, "double_nats": None, "source": "learning-rate sensitivity unknown: the fit has no loss basin over lr",
    }  # fmt: skip


CURVATURES = {"lr": 0.05, "batch": 0.02, "ratio": 0.03, "wd": 0.01, "product": 0.015}


def surface(axes=("lr", "batch", "wd"), setting=None):
    """A joint fit that is a parabola in every direction: best lr 0.01, batch 2**13 and weight decay 0.3 at every scale, loss 3."""
    own = parameter_names(len(axes))
    value = dict.fromkeys(own, 0.0)
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
        "axes": list(axes), "names": own, "vector": [value[name] for name in own], "scatter": [0.05] * (len(axes) + 1), "centre": [math.log(1e6), math.log(1e8)],
        "covariance": [" ".join("1e-6" if i == j else "0" for j in range(len(own))) for i in range(len(own))], "quantile": 2.0, "band": 0.0025,
    }  # fmt: skip
    return Fit(
        law="joint",
        params={},
        solution=solution,
        objective=0.0,
        provenance={"setting": setting or {}},
    )


def test_off_by_2x_on_a_surface_is_the_closed_form():
    """Half the curvature of every direction the setting lies in, times (ln 2)**2."""
    found, c = loss_sensitivity(surface(), SCALE | {"batch_tokens": 2**13}, 3.0), CURVATURES
    expected = {
        "lr": c["lr"] + c["ratio"] + c["product"], "batch_tokens": c["batch"] + c["ratio"], "weight_decay": c["wd"] + c["product"],
    }  # fmt: skip
    for name, curvature in expected.items():
        for side in ("half", "double"):
            assert found[name][side] == pytest.approx(curvature * math.log(2) ** 2 / 2, rel=1e-4)
    assert loss_sensitivity(surface(("lr", "batch")), SCALE, 3.0)["weight_decay"]["half"] is None


def test_from_a_batch_that_is_off_the_best_lies_below():
    found = loss_sensitivity(surface(("lr", "batch")), SCALE | {"batch_tokens": 2**15}, 3.0)[
        "batch_tokens"
    ]
    assert (
        found["half"] < 0 < found["double"]
        and "the fit's optimum lies on that side" in found["source"]
    )


def test_a_surface_over_weight_decay_sets_it(tiny):
    made = prepare(surface(), tiny(WIDE), VOCAB)
    told = build_answer(surface(), made)["settings"]
    assert made.target.optimizer.weight_decay == told["weight_decay"]["value"] == 0.3 and told[
        "weight_decay"
    ]["source"].startswith("fitted")
    assert told["batch_tokens"]["value"] == 256 and told["batch_tokens"][
        "fitted_best"
    ] == pytest.approx(2**13)


# --- where settings come from ----------------------------------------------------------------------------------------


def learned(tiny, of_lr, **without):
    """The fit of `trials`, as if its runs had been the tiny recipe's at base width."""
    content = tiny({"width": 32}).model_dump()
    setting = {
        section: dict(content[section])
        for section in ("parametrization", "optimizer", "schedule", "data")
    }
    del setting["optimizer"]["lr"], setting["optimizer"]["eps"]
    return Fit.from_dict(
        of_lr.to_dict()
        | {
            "provenance": {"setting": setting},
            "ranges": {"n_params": [1e5, 1.6e6], "tokens": [1e3, 4e3]},
        }
    )


def test_every_setting_has_its_source(tiny, of_lr):
    fit = learned(tiny, of_lr)
    made = prepare(
        fit, tiny(WIDE | {"optimizer.beta2": 0.99, "schedule.warmup": 0.25}), VOCAB, force=True
    )
    told = build_answer(fit, made)["settings"]
    said = {name: row["source"] for name, row in told.items()}
    assert said["lr"].startswith("fitted: law lr_nd")
    assert said["batch_tokens"] == (
        "set by the target; lr adjusted by the square-root rule, not tested by your sweep"
    )
    assert said["weight_decay"] == said["beta1"] == said["init_std"] == "same as in the proxies"
    assert (
        said["beta2"] == "set by the target; every proxy had 0.95"
        and said["warmup"] == "set by the target; every proxy had 0.1"
    )
    assert said["eps"] == "set by the target; the proxies had different values"
    assert told["warmup"] | {"source": ""} == {
        "value": 0.25,
        "tokens": 512,
        "steps": 2,
        "source": "",
    }
    hidden = next(row.init_std for row in made.plan if row.role == "hid")
    assert told["init_std"]["by_role"]["hid"] == [hidden, hidden] and hidden == pytest.approx(
        0.05 / 2
    )
    unsaid = build_answer(of_lr, prepare(of_lr, tiny(WIDE), VOCAB, force=True))["settings"][
        "beta1"
    ]["source"]
    assert unsaid == "set by the target; the records do not contain the proxies' value"


def test_priors_are_said_and_not_applied(tiny, of_lr):
    """Against the runs' 1e4 tokens a step, a batch of 2e4: weight decay B / (lr D) (arXiv:2405.13698), eps B**(-1/2) (arXiv:2205.10287)."""
    fit = learned(tiny, of_lr)
    made = prepare(
        fit, tiny(WIDE | {"seq_len": 10, "batch_tokens": 20000, "tokens": 40000}), VOCAB, force=True
    )
    rules = {rule["rule"]: rule for rule in build_answer(fit, made)["priors"]}
    lr = made.target.optimizer.lr / fit.predict(n_params=1.6e6, tokens=4e3).lr
    assert rules["ema_timescale"]["values"]["weight_decay"] == pytest.approx(0.1 * 2 / (lr * 10))
    assert rules["square_root"]["values"] == pytest.approx(
        {"eps": 1e-8 / 2**0.5, "beta1": 0.8, "beta2": 0.9}
    )
    assert made.target.optimizer.weight_decay == 0.1 and made.target.optimizer.beta1 == 0.9


# --- the cost --------------------------------------------------------------------------------------------------------


def test_without_hardware_the_cost_is_null_and_says_so(tiny, of_lr):
    found = build_answer(of_lr, prepare(of_lr, tiny(WIDE), VOCAB, force=True))
    assert (
        found["time"] is found["split"] is found["hardware"] is found["fits"] is None
        and "no [hardware] table" in found["cost_notes"][0]
    )
    assert found["flops"]["total"] == counting.flops_per_token(tiny(WIDE).model, VOCAB, 32) * 2048


def test_hours_from_measured_steps(tiny, of_lr, tmp_path):
    """Records of a GPU that does 1e12 FLOP/s behind 1e9 bytes/s and 1 ms: seconds a step, and so the MFU, are those."""
    grid = [(b, f) for b in (1e6, 4e6, 1.6e7) for f in (1e8, 1e9, 1e10, 1e11)]
    steps = pd.DataFrame(
        {"bytes_moved": b, "flops_per_step": f, "seconds_per_step": 1e-3 + b / 1e9 + f / 1e12}
        for b, f in grid
    )
    path = fitting.fit(steps, "seconds_per_step").write(tmp_path / "steps.json")
    table = {"memory_gb": 1.0, "peak_flops": 1e13, "calibration": str(path)}
    target = tiny(WIDE | {"hardware": table})
    found = build_answer(of_lr, prepare(of_lr, target, VOCAB, force=True))["time"]
    flops, moved = (
        counting.flops_per_token(target.model, VOCAB, 32) * 256,
        counting.bytes_moved(target.model, VOCAB, 256),
    )
    assert found["gpu_hours"] * 3600 / 8 == pytest.approx(
        1e-3 + moved / 1e9 + flops / 1e12, rel=0.02
    )
    assert found["mfu_source"].startswith("measured: fit ")
    of_lr.write(tmp_path / "other.json")
    with pytest.raises(
        UserError,
        match=r"`hardware\.calibration` must be a fit of 'seconds_per_step', but .* is one of 'lr_nd'",
    ):
        build_answer(
            of_lr,
            prepare(
                of_lr,
                tiny(WIDE | {"hardware": table | {"calibration": str(tmp_path / "other.json")}}),
                VOCAB,
                force=True,
            ),
        )
    with pytest.raises(UserError, match="an MFU must be at most 1"):
        build_answer(
            of_lr,
            prepare(
                of_lr, tiny(WIDE | {"hardware": table | {"peak_flops": 1e6}}), VOCAB, force=True
            ),
        )


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
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
}  # fmt: skip


def test_the_command_line_answers_and_writes(tmp_path, of_lr, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "target.toml").write_text(TARGET)
    asked = [
        "transfer",
        str(of_lr.write(tmp_path / "fit.json")),
        str(tmp_path / "target.toml"),
        "--out",
        str(tmp_path / "out"),
        "--force",
    ]
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answer"] == json.loads((tmp_path / "out" / "answer.json").read_text())
    assert (
        told["answer"]["memory_bytes_a_gpu"]["total"] > 0
        and told["answer"]["split"]["dp"] == 8
        and told["answer"]["fits"] is True
    )
    assert (
        told["assumptions"][0] == f"the architecture is that of {tmp_path / 'config.json'} (llama)"
    )
    granite = json.loads((tmp_path / "out/granite/config.json").read_text())
    assert granite["vocab_size"] == 512 and granite["hidden_size"] == 128
    assert main(asked) == 0
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


def test_what_fits_nowhere_says_by_how_much(tiny, of_lr):
    crowded = tiny(WIDE | {"hardware": {"memory_gb": 1e-4, "peak_flops": 1e12}})
    found = build_answer(of_lr, prepare(of_lr, crowded, VOCAB, force=True))
    assert found["fits"] is False and "no split fits: the smallest needs" in found["cost_notes"][0]
    odd = build_answer(
        of_lr,
        prepare(of_lr, tiny(WIDE | {"hardware": {"gpu": "L40S", "gpus": 7}}), VOCAB, force=True),
    )
    assert odd["split"] is None and odd["cost_notes"][0].startswith(
        "7 GPUs do not divide a batch of 8 sequences"
    )
    assert recipe.points(crowded)[0].hardware == crowded.hardware


def test_the_target_in_configs_is_answered(of_lr):
    """LLaMA 2's 7B: 6,738,415,616 parameters, 184,320 A100-hours (arXiv:2307.09288, table 2)."""
    target = recipe.load(Path(__file__).parents[1] / "configs" / "targets" / "llama-2-7b.toml")
    found = build_answer(of_lr, prepare(of_lr, target, force=True))
    low, high = found["time"]["gpu_hours_range"]
    assert (
        low < 184_320 < high
        and found["fits"] is True
        and found["split"]["dp"] * found["split"]["tp"] * found["split"]["pp"] == 1024
    )
    assert counting.params(target.model, target.data.vocab_size)["n_params_total"] == 6_738_415_616
    assert "not read, because the parametrization sets them: initializer_range" in found["assumptions"]
