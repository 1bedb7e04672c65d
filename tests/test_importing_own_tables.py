"""Tables that people write themselves: flags, shares, other layouts, several files, odd cells.

The sweep has a known optimum: the loss is lowest at `best(n_params, tokens)`.
"""

import math

import numpy as np
import pandas as pd
import pytest

from scaletune import fitting, importing
from scaletune.errors import UserError
from scaletune.importing.states import read_state

STEPS = 1000


def best(n_params, tokens):
    return 0.02 * (n_params / 1e6) ** -0.3 * (tokens / 1e8) ** 0.1


def sweep():
    """One row per run; the runs 3, 10, 17, ... are worse than they would be at their end."""
    rows = []
    for n_params in (1e6, 3e6, 1e7):
        for tokens in (5e7, 2e8):
            for lr in 0.02 * 2.0 ** np.arange(-4, 3):
                end = 1.8 + 20 / n_params**0.25 + 60 / tokens**0.25
                loss = end + 0.08 * math.log(lr / best(n_params, tokens)) ** 2
                rows.append({"n_params": n_params, "tokens": tokens, "lr": lr, "loss": loss})
    table = pd.DataFrame(rows)
    table.insert(0, "run", [f"r{i}" for i in range(len(table))])
    return table


def read(tmp_path, *tables, **options):
    paths = [tmp_path / f"t{i}.csv" for i in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        table.to_csv(path, index=False)
    return importing.trials(paths, **options)


def optimum(table):
    return fitting.fit(table).predict(n_params=1e7, tokens=2e8).lr


SHORT = sweep().index % 7 == 3
SIGNS = {
    "finished": (False, True),
    "completed": ("no", "yes"),
    "crashed": (1, 0),
    "early_stopped": (True, False),
    "diverged": (True, False),
    "exit_code": (137, 0),
    "progress": (0.4, 1.0),
    "percent_done": ("40%", "100%"),
    "last_step": (400, 1000),
    "status": (False, True),
    "State": ("CANCELLED by 1001", "COMPLETED"),
}


class TestCompletion:
    @pytest.mark.parametrize("column", SIGNS)
    def test_a_run_that_a_column_says_did_not_finish_is_not_done(self, tmp_path, column):
        short, whole = SIGNS[column]
        table = sweep().assign(**{column: [short if is_short else whole for is_short in SHORT]})
        table.loc[SHORT, "loss"] += 0.6
        runs = read(tmp_path, table)[0]
        assert ((runs["status"] != "done") == SHORT).all()
        assert (runs.loc[SHORT, "message"] != "").all()

    def test_epochs_and_tokens_are_compared_with_their_plan(self, tmp_path):
        share = np.where(SHORT, 0.4, 1.0)
        epochs = sweep().assign(epoch=share, num_train_epochs=1)
        seen = sweep().assign(tokens_seen=lambda table: table["tokens"] * share)
        for table in (epochs, seen):
            assert ((read(tmp_path, table)[0]["status"] == "failed") == SHORT).all()

    def test_epochs_that_count_from_0_are_complete(self, tmp_path):
        table = sweep().assign(epoch=2, max_epochs=3, done=True, exit_code=0, progress=100)
        runs = read(tmp_path, table)[0]
        assert (runs.get("status", "done") == "done").all()

    def test_a_flag_of_something_else_is_not_read(self, tmp_path):
        """`done` of Ray Tune is that of a report, and text or counts are no flags."""
        table = sweep().assign(training_iteration=5, done=False, failed="see notes", completion=7)
        runs = read(tmp_path, table)[0]
        assert (runs.get("status", "done") == "done").all()

    def test_words_of_slurm(self):
        assert read_state("CANCELLED by 1001")[0] == read_state("CANCELLED+")[0] == "failed"
        assert read_state("COMPLETED")[0] == read_state("ok")[0] == "done"

    @pytest.mark.parametrize("loss", [-1, 0])
    def test_a_loss_that_is_not_positive_is_a_run_that_diverged(self, loss):
        table = sweep().drop(columns="run")
        table.loc[table.index % 7 == 6, "loss"] = loss
        assert optimum(table) == pytest.approx(best(1e7, 2e8), rel=0.06)

    def test_losses_without_a_minimum_are_no_optimum(self):
        """Runs in the middle of the grid that were killed leave two ends that are lower."""
        table = sweep().drop(columns="run")
        place = table.index % 7 / 3 - 1
        minimum = table.groupby(["n_params", "tokens"])["loss"].transform("min")
        table["loss"] = minimum * (1.03 - 0.03 * place**2)
        with pytest.raises(UserError, match="no minimum along the learning rate"):
            fitting.fit(table)


def histories():
    """One row per logged step, the checkpoints at powers of two."""
    ends = sweep()
    parts = [
        ends.assign(
            step=round(STEPS * share),
            tokens=(ends["tokens"] * share).round(),
            loss=ends["loss"] + 1 - share,
        )
        for share in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
    ]
    return pd.concat(parts, ignore_index=True)


class TestLayouts:
    def test_one_row_per_value(self, tmp_path):
        table = histories().melt(["run", "n_params", "lr", "step"], ["tokens", "loss"], "metric")
        runs, _ = read(tmp_path, table.rename(columns={"run": "run_id"}))
        assert len(runs) == 42 and optimum(runs) == pytest.approx(best(1e7, 2e8), rel=0.06)

    def test_a_counter_of_checkpoints(self, tmp_path):
        table = histories().rename(columns={"step": "checkpoint", "run": "model"})
        assert len(read(tmp_path, table)[0]) == 42

    def test_rows_that_may_be_steps_are_doubted(self, tmp_path):
        runs, _ = read(tmp_path, histories().rename(columns={"run": "name"}))
        assert len(runs) == 6 * 42 and "name the column `run_id`" in runs.attrs["warnings"][0]

    def test_steps_of_runs_that_nothing_tells_apart(self, tmp_path):
        steps = pd.DataFrame({"step": np.arange(100, 1001, 100)})
        table = sweep().drop(columns=["run", "tokens"]).merge(steps, how="cross")
        other = table.assign(step=table["step"] * 4)
        both = pd.concat([table, other]).reset_index(drop=True)
        with pytest.raises(UserError, match="add a column `run_id`"):
            read(tmp_path, both)

    @pytest.mark.parametrize("above", ["# sweep", "sep=,", "Sweep of January,,,,\n,,,,"])
    def test_lines_above_the_header(self, tmp_path, above):
        path = tmp_path / "runs.csv"
        path.write_text(f"{above}\n{sweep().to_csv(index=False)}")
        with pytest.raises(UserError, match=r"the first line .* line . does: run, n_params"):
            importing.trials(path)


class TestSeveralFiles:
    def test_a_folder_of_tables(self, tmp_path):
        for name, rows in histories().drop(columns="run").groupby(histories()["run"]):
            (tmp_path / name).mkdir()
            rows = pd.concat([rows.assign(step=range(len(rows)))])
            rows.to_json(tmp_path / name / "log.jsonl", orient="records", lines=True)
        runs, _ = importing.trials(tmp_path)
        assert sorted(runs["id"]) == sorted(sweep()["run"])

    def test_settings_and_losses_are_joined(self, tmp_path):
        table = sweep()
        runs, notes = read(tmp_path, table.drop(columns="loss"), table[["run", "loss"]][:-1])
        assert "joined by `id`" in notes[-1]
        assert (runs["status"] != "done").tolist() == [False] * 41 + [True]
        assert runs["loss"][:-1].tolist() == table["loss"][:-1].tolist()

    def test_a_run_in_two_files_is_counted_once(self, tmp_path):
        runs, notes = read(tmp_path, sweep(), sweep())
        assert len(runs) == 42 and "counted once" in notes[-1]

    def test_runs_that_share_an_id_but_not_their_settings(self, tmp_path):
        other = sweep().assign(lr=lambda table: table["lr"] * 1.5)
        runs, notes = read(tmp_path, sweep(), other)
        assert len(runs) == 84 and runs["id"].is_unique and "share an id" in notes[-1]

    def test_seeds_that_share_an_id(self):
        table = pd.concat([sweep().assign(seed=seed) for seed in (0, 1)], ignore_index=True)
        rows = fitting.fit(table.rename(columns={"run": "id"}))
        assert rows.predict(n_params=1e7, tokens=2e8).lr == pytest.approx(best(1e7, 2e8), rel=0.06)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "doubt"),
        [
            ("train/loss", "training loss"),
            ("best_val_loss", "lowest loss"),
            ("val/loss.min", "lowest loss"),
        ],
    )
    def test_losses_that_are_doubted(self, tmp_path, name, doubt):
        runs, _ = read(tmp_path, sweep().rename(columns={"loss": name}))
        assert doubt in runs.attrs["warnings"][0]

    def test_the_only_loss_on_held_out_text(self, tmp_path):
        name = "eval/c4_en-validation/CrossEntropyLoss"
        table = sweep().rename(columns={"loss": name}).assign(**{"train/CrossEntropyLoss": 3.0})
        runs, _ = read(tmp_path, table)
        assert runs["loss"].tolist() == sweep()["loss"].tolist()

    def test_two_columns_with_one_name_are_refused(self, tmp_path):
        path = tmp_path / "runs.csv"
        path.write_text("n_params,tokens,lr,loss,loss\n1e6,1e8,1e-3,3.1,3.0\n")
        with pytest.raises(UserError, match="2 are named `loss`: rename or delete the others"):
            importing.trials(path)

    @pytest.mark.parametrize(
        ("table", "remedy"),
        [
            (sweep().assign(tpp=20).drop(columns="tokens"), r"'tokens=tpp\*n_params'"),
            (sweep().assign(flops=1e18).drop(columns="tokens"), r"'tokens=flops/\(6\*n_params\)'"),
            (
                sweep().assign(a_loss=1, b_loss=2).drop(columns="loss"),
                "loss=a_loss",
            ),
        ],
    )
    def test_the_remedy_for_a_missing_column(self, tmp_path, table, remedy):
        with pytest.raises(UserError, match=remedy) as error:
            fitting.fit(read(tmp_path, table)[0])
        assert "no column counts tokens" not in str(error.value)


def test_a_seed_per_run_in_a_large_table():
    """A fit of 20,000 runs with a seed each needs no matrix of runs * runs."""
    table = pd.concat([sweep()] * 480, ignore_index=True).drop(columns="run")
    table["loss"] += np.random.default_rng(0).normal(0, 1e-3, len(table))
    table["seed"] = range(len(table))
    assert optimum(table) == pytest.approx(best(1e7, 2e8), rel=0.06)
