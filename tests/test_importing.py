"""Runs of other trackers, read from files of the real libraries (tests/fixtures/make.py)."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from scaletune import importing
from scaletune.errors import UserError
from scaletune.importing import tensorboard, wandb
from scaletune.importing.run import STEPS, to_table
from scaletune.importing.sources import find_reader

FILES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize(
    ("name", "steps", "lr"), [("run-lr0.001.wandb", 5, 1e-3), ("run-lr0.003.wandb", 95, 3e-3)]
)
def test_offline_runs_of_wandb(name, steps, lr):
    """The longer one crosses a block boundary of its log."""
    run = wandb.read_log(FILES / name).run
    assert run.config == {
        "learning_rate": lr,
        "model.d_model": 64,
        "model.n_layers": 2,
        "batch_size_tokens": 4096,
        "note": "é",
    }
    assert run.history["train/loss"] == [
        (step, pytest.approx(5 - lr * step)) for step in range(0, 10 * steps, 10)
    ]
    assert [value for _, value in run.history["nested.a"]] == list(range(0, 10 * steps, 10))


def test_tensorboard_scalars_in_both_encodings():
    runs = {run.name: run for run in tensorboard.read(FILES / "events")}
    expected = [(step, pytest.approx(4.0 - 0.1 * step)) for step in range(5)]
    assert runs["simple"].history["eval/loss"] == expected
    assert runs["tensors"].history["eval/loss"] == expected
    assert runs["simple"].row()["learning_rate"] == pytest.approx(1e-3)


def test_the_state_of_a_trainer():
    table, guessed = importing.trials(FILES / "trainer_state.json")
    (row,) = table.to_dict("records")
    assert (row["lr"], row["steps"], row["tokens"]) == (1e-3, 10, 640)
    assert row["loss"] == row["eval_loss"] != row["train/loss"]
    assert any(
        "`tokens` is read from the column `num_input_tokens_seen`" in note for note in guessed
    )


def test_an_mlflow_database():
    table, guessed = importing.trials(FILES / "mlflow.sqlite")
    assert sorted(table["lr"]) == [1e-3, 3e-3]
    assert list(table["width"]) == [64, 64]
    assert set(table["optimizer"]) == {"adamw"}
    # A NaN is logged after a loss of 3.6.
    assert set(table["status"]) == {"diverged"} and table["loss"].isna().all()
    assert list(table["steps"]) == [60, 60]
    assert guessed == [
        "`loss` is read from the column `val_loss` (--map loss=NAME reads another one)"
    ]


def test_a_folder_of_runs_becomes_one_table(tmp_path):
    for file in FILES.glob("*.wandb"):
        shutil.copy(file, tmp_path)
    table, guessed = importing.trials(tmp_path)
    assert list(table["lr"]) == [1e-3, 3e-3]
    assert list(table["loss"]) == pytest.approx([4.46, 4.5 - 3e-3 * 940])
    assert list(table["tokens"]) == [40 * 4096, 940 * 4096] and list(table["width"]) == [64, 64]
    assert len(guessed) == 6


def test_a_given_column_has_priority_over_usual_names(tmp_path):
    pd.DataFrame({"a": [1.0, 2.0], "val_loss": [3.0, 4.0], "x": [5.0, 6.0]}).to_csv(
        tmp_path / "runs.csv", index=False
    )
    table, guessed = importing.trials(tmp_path / "runs.csv", {"loss": "a", "lr": "x"})
    assert list(table["loss"]) == [1.0, 2.0] and list(table["lr"]) == [5.0, 6.0] and guessed == []
    message = r"`loss=val_los` must name a column of the table, .* \(nearest: 'val_loss'\)"
    with pytest.raises(UserError, match=message):
        importing.trials(tmp_path / "runs.csv", {"loss": "val_los"})


def test_a_parquet_table(tmp_path):
    pytest.importorskip("pyarrow")
    pd.DataFrame({"learning_rate": [1e-3], "loss": [3.0]}).to_parquet(tmp_path / "runs.parquet")
    assert list(importing.trials(tmp_path / "runs.parquet")[0]["lr"]) == [1e-3]


@pytest.mark.parametrize("name", ["run-lr0.003.wandb", "events/simple/events.out.tfevents.1.host"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_file_cut_off_by_a_crash_is_read_up_to_the_cut(tmp_path, name, share):
    content, cut = (FILES / name).read_bytes(), tmp_path / Path(name).name
    cut.write_bytes(content[: int(share * len(content))])
    (whole,), (part,) = (
        to_table(find_reader(path)(path)).table.to_dict("records") for path in (FILES / name, cut)
    )
    assert part.get(STEPS, 0) < whole[STEPS] and set(part) <= set(whole)
    assert whole["status"] == "done"
    assert part["status"] == ("failed" if cut.suffix == ".wandb" else "done")


BAD = {
    "nothing": (None, "the records must exist"),
    "runs.txt": (b"hello", "must be a log of nanoGPT"),
    "run.wandb": (b"hello there", "does not begin with `:W&B`"),
    "trainer_state.json": (b"{}", "must be a Trainer's state with a `log_history`"),
    "events.out.tfevents.1": (
        b"\x05" + b"\0" * 11 + b"\xff\xff\xff\xff\xff" + b"\0" * 4,
        "must be a TensorBoard event file",
    ),
    "x.sqlite": (b"hello", "must be an SQLite database"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(tmp_path, name):
    content, sentence = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        importing.trials(tmp_path / name)
    assert "\n" not in str(error.value)
