"""Models: every family passes the coordinate check; examples work from recipe to report."""

import json
import runpy
from pathlib import Path

import pytest
from test_sweeping import InProcess

from scaletune import cli, data, models, recipe
from scaletune.records import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "configs" / "examples").glob("*.toml"))
ZOO = runpy.run_path(str(ROOT / "benchmarks" / "zoo_check.py"))
# Variants of these models are checked over width with one optimizer.
VARIANTS = {"MoE, router a matrix", "ResNet, conv readout"}
OVER_WIDTH = [
    (name, family)
    for name in ZOO["RECIPES"]
    for family in ("adamw", "muon")
    if (name, family) not in {(v, "muon") for v in VARIANTS}
]
RESIDUAL = [name for name in ZOO["RECIPES"] if not name.startswith("MLP") and name not in VARIANTS]


@pytest.fixture(scope="module")
def checked(words):
    """The check of a row of benchmarks/zoo_check.py with three sizes, fewer seeds, small data."""

    def check(name, family, over, **settings):
        point = ZOO["row_recipe"](name, family, over, **settings)
        if point.data.seq_len > 1:
            point = recipe.with_settings(point, {"data.source": str(words)})
        # Narrow ReLU nets fluctuate too much.
        widths = (64, 128, 256) if name.startswith("MLP") else (32, 64, 128)
        seeds = (0, 1) if over == "width" and name.startswith(("MLP", "ViT")) else (0,)
        return ZOO["checking"].check(point, widths, seeds, over=over, depths=(2, 4, 8))

    return check


@pytest.mark.parametrize(("name", "family"), OVER_WIDTH)
def test_every_model_holds_over_width_in_mup_alone(checked, name, family):
    sound, standard = (
        checked(name, family, "width", form="mup"),
        checked(name, family, "width", form="sp"),
    )
    assert sound["verdict"] == "pass" and sound["diagnosis"] == [], sound["slopes"]
    assert standard["verdict"] == "fail", standard["slopes"]
    bugs = ["output multiplier missing"]  # Muon's own factor scales hidden matrices
    # The balance loss trains layers below the zeroed head at once, which hides the readout bug.
    if family == "adamw":
        bugs = [
            "standard parametrization with one global lr"
            if "MoE" not in name
            else "hidden lr not scaled"
        ]
    assert [sentence.split(":")[0] for sentence in standard["diagnosis"]] == bugs


@pytest.mark.parametrize("family", ["adamw", "muon"])
@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_models_hold_over_depth_by_a_depth_rule_alone(checked, name, family):
    sound, without = (
        checked(name, family, "depth", **{"parametrization.depth_alpha": alpha})
        for alpha in (1.0, 0.0)
    )
    assert sound["verdict"] == "pass" and sound["diagnosis"] == [], sound["slopes"]
    assert without["verdict"] == "fail"
    assert [sentence.split(":")[0] for sentence in without["diagnosis"]] == ["depth rule missing"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_counted_as_what_is_built(path, capsys):
    assert cli.main(["count", str(path), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    point = recipe.points(recipe.load(path))[-1]
    corpus = data.load(point.data)
    data.check_recipe(point, corpus)
    model = models.build(point, corpus.vocab_size)
    assert counted["points"][-1]["params"]["n_params_total"] == sum(
        p.numel() for p in model.parameters()
    )
    assert counted["points"][-1]["vocab_size"] == corpus.vocab_size
    assert counted["total"]["trials"] >= 30


SMALL = {
    "resnet-digits": ["axes.width=[8]", "axes.tokens=[800]", "axes.lr=[0.002, 0.008, 0.03, 0.5]"],
    "mlp-power-law": ["axes.width=[16]", "axes.tokens=[3200]", "axes.lr=[0.002, 0.03, 0.06, 2.0]"],
    "moe-text": [
        "axes.width=[32]",
        "axes.tokens=[10240]",
        "axes.lr=[0.004, 0.016, 0.064, 0.5]",
        "data.source={words}",
    ],
}


@pytest.mark.parametrize("name", SMALL)
def test_a_family_goes_from_recipe_to_report(name, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", InProcess)
    monkeypatch.chdir(tmp_path)
    settings = [part for setting in SMALL[name] for part in ("--set", setting.format(words=words))]
    path, record = ROOT / "configs" / "examples" / f"{name}.toml", Path("sweeps") / f"{name}.jsonl"
    assert cli.main(["sweep", str(path), *settings, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["done"] + summary["diverged"], summary["failed"]) == (4, 0)
    assert summary["done"] >= 3
    example = recipe.load(path)
    for trial in read_jsonl(record):
        assert trial.tokens % example.budget.batch_tokens == 0
        assert trial.seq_len == example.data.seq_len
        assert trial.metrics["data"]["unique_tokens"] <= trial.tokens
    assert cli.main(["fit", str(record), "--out", "fit.json", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["n_used"] >= 3 and example.axes["lr"][0] / 8 < answer["params"]["c"]["value"] < 1
    for command in (
        ["report", "fit.json", "--out", "report.html"],
        ["plot", "fit.json", "--out", "plots"],
        ["plot", str(record), "--out", "plots"],
    ):
        assert cli.main(command) == 0
    text = Path("fit.json").read_text()
    assert ("examples that count as one token each" in text) == (example.data.seq_len == 1)
