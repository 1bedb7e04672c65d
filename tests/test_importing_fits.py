"""`scaletune fit` on one sweep in eight tracker formats gives the law of the plain table."""

import csv
import json
import math
from pathlib import Path

import pandas as pd
import pytest

from scaletune import importing
from scaletune.cli import main
from scaletune.errors import UserError

# Written by tests/fixtures/make.py; BEST holds the best lr of note size.
SWEEP = Path(__file__).parent / "fixtures" / "sweep"
BEST = {1e5: 0.01, 4e5: 0.008}


def expected():
    """The sweep as a table, from its closed form."""
    rows = []
    for n_params, best in BEST.items():
        for lr in (best * 2.0**k for k in (-2, -1, 0, 1)):
            loss = (2 + 50 / n_params**0.3) * (1 + 0.04 * (lr / best - 1 - math.log(lr / best)))
            rows.append(
                {
                    "n_params": n_params,
                    "tokens": 204800,
                    "batch_tokens": 1024,
                    "lr": lr,
                    "loss": loss,
                }
            )
    return pd.DataFrame(rows)


def foreign(path):
    """JSON lines of another tool: nested settings, other names."""
    rows = expected().to_dict("records")
    lines = [
        {
            "run": str(i),
            "optim": {"peak": row["lr"]},
            "size": row["n_params"],
            "D": row["tokens"],
            "ce": row["loss"],
        }
        for i, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def parquet(path):
    pytest.importorskip("pyarrow")
    expected().rename(columns={"lr": "learning_rate", "loss": "eval_loss"}).to_parquet(path)
    return path


def settings_alone(path):
    """The table of runs without a column for the metric."""
    pd.read_csv(SWEEP / "runs.csv").drop(columns=["eval/loss"]).iloc[:8].to_csv(
        path, index=False, quoting=csv.QUOTE_ALL
    )
    return path


SOURCES = {
    "offline wandb": lambda tmp: ([SWEEP / "wandb"], []),
    "table of runs": lambda tmp: ([SWEEP / "runs.csv"], []),
    "table of runs, mapped": lambda tmp: (
        [SWEEP / "runs.csv"],
        [
            "lr=learning_rate",
            "loss=eval/loss",
            "n_params=non_embedding_params",
            "tokens=train/tokens",
        ],
    ),
    "runs and a chart": lambda tmp: (
        [settings_alone(tmp / "runs.csv"), SWEEP / "chart.csv"],
        ["loss=eval/loss"],
    ),
    "tensorboard": lambda tmp: ([SWEEP / "events"], ["n_params=non_embedding_params"]),
    "mlflow": lambda tmp: ([SWEEP / "mlflow.sqlite"], []),
    "parquet": lambda tmp: ([parquet(tmp / "runs.parquet")], []),
    "json lines": lambda tmp: (
        [foreign(tmp / "runs.jsonl")],
        ["lr=optim.peak", "n_params=size", "tokens=D", "loss=ce"],
    ),
}


def fitted(sources, maps, capsys, *more):
    options = ["--law", "lr_nd", "--json", *(part for m in maps for part in ("--map", m)), *more]
    assert main(["fit", *map(str, sources), *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def plain(tmp_path, capsys):
    expected().to_csv(tmp_path / "plain.csv", index=False)
    return fitted([tmp_path / "plain.csv"], [], capsys)


@pytest.mark.parametrize("name", SOURCES)
def test_every_tracker_gives_the_law_of_the_plain_table(name, tmp_path, capsys, plain):
    answer = fitted(*SOURCES[name](tmp_path), capsys)
    assert answer["n_used"] == plain["n_used"] == 8
    assert answer["n_dropped"] == (1 if name.startswith("table") else 0)
    for param, row in plain["params"].items():
        assert answer["params"][param]["value"] == pytest.approx(row["value"], rel=1e-4, abs=1e-9)
    # From the two best lrs.
    assert answer["params"]["a"]["value"] == pytest.approx(math.log(0.8) / math.log(4), abs=0.02)


def test_a_trainers_checkpoints_give_size_tokens_and_the_peak_that_was_logged(capsys, tmp_path):
    """Only the last checkpoint of each run is read.

    The size comes from its config.json and equals the count of transformers.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    table, guessed = importing.trials(SWEEP / "trainer")
    assert sorted(table["id"]) == sorted(path.name for path in (SWEEP / "trainer").iterdir())
    assert set(table["steps"]) == {40}
    assert any("`lr` is read from the peak of the logged `learning_rate`" in n for n in guessed)
    assert any("up to 1.3 times the largest" in line for line in table.attrs["warnings"])
    # The first logged lr after warmup: 31 of 35 steps of the decay remain.
    assert set((table["lr"] / [float(name.split("lr")[1]) for name in table["id"]]).round(4)) == {
        0.8857
    }
    model = LlamaForCausalLM(
        LlamaConfig.from_json_file(SWEEP / "trainer/w16-lr1/checkpoint-40/config.json")
    )
    inside = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "embed" not in name and "head" not in name
    )
    assert set(table.loc[table["width"] == 16, "n_params"]) == {inside}
    answer = fitted([SWEEP / "trainer"], [], capsys, "--out", str(tmp_path / "fit.json"))
    assert answer["n_used"] > 5
    assert 0.02 < json.loads((tmp_path / "fit.json").read_text())["cells"][0]["lr"] < 0.4


def test_the_history_of_one_run_is_one_row(tmp_path):
    """As `run.history()` of W&B writes it."""
    table = pd.DataFrame(
        {
            "_step": [0, 10, 20],
            "_runtime": [1.0, 2.0, 3.0],
            "eval/loss": [4.0, 3.0, None],
            "lr": [0.01] * 3,
        }
    )
    table.to_csv(tmp_path / "one.csv", index=False)
    (row,) = importing.trials(tmp_path / "one.csv")[0].to_dict("records")
    assert row == {
        **{"id": "one", "steps": 20, "eval/loss": 3.0, "lr": 0.01, "loss": 3.0},
        "status": "done",
    }


def test_runs_with_the_same_name_get_different_ids(tmp_path):
    pd.DataFrame({"Name": ["a", "a"], "State": ["finished", "running"], "lr": [1.0, 2.0]}).to_csv(
        tmp_path / "runs.csv", index=False
    )
    table = importing.trials(tmp_path / "runs.csv")[0]
    assert list(table["id"]) == ["a", "a#2"] and list(table["status"]) == ["done", "failed"]


def test_bad_exports_are_one_clear_line(tmp_path):
    pd.DataFrame({"Name": ["a"], "State": ["resting"]}).to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(
        UserError, match=r"state of a run must be .* finished, .* but got 'resting'"
    ):
        importing.trials(tmp_path / "runs.csv")
    pd.DataFrame({"Name": ["a"], "State": ["finished"]}).to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(
        UserError,
        match=r"every run of a W&B chart must be in the table of runs, "
        r"but 'n100000-lr0.0025' of `chart.csv` is not",
    ):
        importing.trials([tmp_path / "runs.csv", SWEEP / "chart.csv"])
    (tmp_path / "runs.jsonl").write_text('{"lr": 1}\n[2]\n')
    with pytest.raises(UserError, match=r"every line of .* must be an object, but got '\[2\]'"):
        importing.trials(tmp_path / "runs.jsonl")
