"""`scaletune transfer` with invalid input: exit code 2 and a one-line error on stderr."""

import json

import pytest
from conftest import WIDE
from test_transferring import make_fit

from scaletune import cli
from scaletune.transferring import FORMATS
from scaletune.transferring.formats.recipe import toml


@pytest.fixture
def run_transfer(tiny, tmp_path, capsys, monkeypatch):
    """Returns a function that runs `scaletune transfer` -> (exit code, stdout, stderr).

    Its arguments are those of the command and changes to the fit and the target.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments, fit=(), ranges=None, target=(), solution=()):
        fit_record = make_fit(tiny)
        for path, value in dict(fit).items():
            section, key = path.split(".")
            fit_record.provenance["setting"][section][key] = value
        fit_record.solution.update(solution)
        fit_record.ranges.update(ranges or {})
        fit_record.write(tmp_path / "fit.json")
        point = tiny(WIDE | dict(target)).point()
        (tmp_path / "target.toml").write_text(toml({"name": "target"} | point))
        code = cli.main(["transfer", "fit.json", "target.toml", "--out", "out", *arguments])
        return code, *capsys.readouterr()

    return run


T3 = {"fit": {"parametrization.form": "mup_t3"}, "target": {"form": "mup_t3"}}
DEEP = {"parametrization.depth_alpha": 1.0, "parametrization.base_depth": 1}
MISTAKES = [  # (arguments, changes to fit and target, part of the error)
    (
        "--to granite --set model.tied=true",
        T3,
        "a tied head needs a form whose embedding and readout share std and lr (mup_t8, mup_t9), "
        "but got form='mup_t3'",
    ),
    (
        "--to llama --set model.tied=true",
        {},
        "format 'llama' has no logits multiplier, but the tied head needs one of 0.25: set "
        "model.tied = false",
    ),
    (
        "--to torchtitan --set model.tied=true --set parametrization.embedding_multiplier=1",
        {},
        "set model.tied = false, or emit 'granite'",
    ),
    ("--set width=100", {}, "`width % head_dim == 0` must hold, but got width=100, head_dim=16"),
    (
        "--set model.kv_heads=3",
        {},
        "`heads % kv_heads == 0` must hold, but got heads=8 (width / head_dim), kv_heads=3",
    ),
    (
        "--set form=mup_t9",
        {},
        "a target must have the proxies' parametrization, but `parametrization.form` is 'mup_t9' "
        "and the proxies had 'mup'",
    ),
    (
        "",
        {"fit": {"parametrization.base_width": 64}},
        "`parametrization.base_width` is 32 and the proxies had 64",
    ),
    (
        "--set optimizer.family=muon",
        {},
        "a target must have the proxies' optimizer, but `optimizer.family` is 'muon' and the "
        "proxies had 'adamw'",
    ),
    (
        "--set optimizer.decay=independent",
        {},
        "a target must have the proxies' optimizer, but `optimizer.decay` is 'independent' and "
        "the proxies had 'torch'",
    ),
    (
        "",
        {"ranges": {"tokens": [30, 60]}},
        "a target must be at most 30x outside the fitted range, but tokens 2,048 is 34.1x outside "
        "the fitted range (30 to 60): train larger proxies, or transfer anyway with --force",
    ),
    (
        "",
        {"solution": {"quantile": 1e9}},
        "a transfer needs a bounded interval of lr, but the fit's interval at this target is [",
    ),
    (
        "--to granite@4.0",
        {},
        f"format `granite` supports version {FORMATS['granite']} of its stack, but got '4.0'",
    ),
    (
        "--to litgpt",
        {},
        "format `litgpt` is not supported: 0.5.13 writes one computed lr into every param group "
        "at each step; emit 'pytorch'",
    ),
    (
        "--to minicpm3",
        {},
        "format `minicpm3` has multi-head latent attention, which no proxy can test: emit it "
        "anyway with --force, or emit 'granite'",
    ),
    ("--to granitemoe", {}, "GraniteMoe needs `model.family` 'moe', but got 'transformer'"),
    (
        "--to granite --set schedule.kind=one_cycle",
        {},
        "format 'granite' supports `schedule.kind` 'constant', 'linear', 'cosine', 'wsd', but got "
        "'one_cycle'",
    ),
    (
        "--to pytorch",
        {"fit": {"optimizer.family": "soap"}, "target": {"optimizer.family": "soap"}},
        "format 'pytorch' supports `optimizer.family` 'adamw', 'sgd', 'adafactor', 'muon', "
        "'lion', but got 'soap' (torch has no class for it)",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "changed", "message"), MISTAKES, ids=[message[:40] for *_, message in MISTAKES]
)
def test_each_mistake_is_one_line(run_transfer, tmp_path, arguments, changed, message):
    code, out, err = run_transfer(*arguments.split(), **changed)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.*"))


def test_a_forced_distance_is_written_into_every_file(run_transfer, tmp_path):
    to = [
        word for name in ("granite", "recipe", "torchtitan", "deepspeed") for word in ("--to", name)
    ]
    code, *_ = run_transfer(*to, "--force", ranges={"tokens": [30, 60]})
    assumption = "forced: tokens 2,048 is 34.1x outside the fitted range (30 to 60)"
    assert code == 0
    for name in (
        "granite/param_groups.json",
        "torchtitan/param_groups.json",
        "deepspeed/param_groups.json",
        "recipe/plan.json",
    ):
        assert (
            assumption
            in json.loads((tmp_path / "out" / name).read_text())["evidence"]["assumptions"]
        ), name
    assert assumption in (tmp_path / "out/recipe/target.toml").read_text()


def test_a_depth_rule_reaches_a_stack_without_residual_multipliers(run_transfer, tmp_path):
    """torchtitan has none, so 4 ** -1 is folded into the last matrix of each residual branch."""
    depth = {f"parametrization.{key.rpartition('.')[2]}": value for key, value in DEEP.items()}
    code, *_ = run_transfer("--to", "torchtitan", fit=depth, target=DEEP | {"model.depth": 4})
    groups = json.loads((tmp_path / "out/torchtitan/param_groups.json").read_text())
    std = {
        kind: group["init_std"]
        for group in groups["groups"]
        for kind in ("k_proj", "o_proj")
        if any(kind in p for p in group["patterns"])
    }
    assert code == 0 and std["o_proj"] == pytest.approx(std["k_proj"] / 4)
    assert any("forward multipliers: folded into the weights" in line for line in groups["cannot"])
