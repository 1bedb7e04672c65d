"""What is judged once for all readers: peak lr, tokens, finished runs, rows or runs."""

import math
from types import MappingProxyType

import pandas as pd
import pytest

from scaletune import importing
from scaletune.errors import UserError
from scaletune.importing.columns import name_columns
from scaletune.importing.completeness import judge_by_plan, judge_by_siblings
from scaletune.importing.names import canonical, is_loss, is_lr
from scaletune.importing.peak_lr import find_peak_lr
from scaletune.importing.run import ImportedRun, RunTable, to_table
from scaletune.importing.states import read_state
from scaletune.importing.steps_table import reduce_to_runs


def run(id="a", config=(), history=(), **fields):
    points = {key: list(enumerate(values, 1)) for key, values in dict(history).items()}
    return ImportedRun(id=id, config=dict(config), history=points, **fields)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("lr", True), ("train/learning_rate", True), ("lr-AdamW/pg1", True)),
        *(("optim/LR (group 0)", True), ("learning-rate", True), ("config/max_lr", True)),
        *(("min_lr", False), ("lr_scheduler_type", False), ("lr_decay_iters", False)),
        *(("warmup_lr", False), ("lr_mult", False), ("final_lr", False), ("embed_lr", False)),
    ],
)
def test_names_of_learning_rates(name, expected):
    assert is_lr(name) is expected


def test_names_of_losses_and_prefixes():
    assert is_loss("lm loss") and is_loss("eval/ce") and not is_loss("loss_scale")
    names = ["config/train_loop_config/lr", "params.lr", " Learning Rate", "user_attrs_lr"]
    assert [canonical(name) for name in names] == ["lr", "lr", "learning_rate", "lr"]


class TestPeakLr:
    def test_a_setting_has_priority_over_its_decayed_history(self):
        runs = [run(str(i), {"lr": lr}, {"lr": [lr, lr / 10]}) for i, lr in enumerate((1e-3, 2e-3))]
        assert find_peak_lr(to_table(runs)).values.tolist() == [1e-3, 2e-3]

    def test_of_a_history_the_peak_after_warmup_is_taken(self):
        runs = [
            run(str(i), {}, {"lr-AdamW": [lr / 10, lr, lr / 2, 0.0]})
            for i, lr in enumerate((1e-3, 2e-3))
        ]
        peak = find_peak_lr(to_table(runs))
        assert peak.values.tolist() == [1e-3, 2e-3]
        assert "the peak of the logged `lr-AdamW`" in peak.notes[0]

    def test_a_default_that_no_run_changed_is_not_the_lr(self):
        runs = [
            run(str(i), {"learning_rate": 5e-5}, {"train/lr": [lr, 0.0]})
            for i, lr in enumerate((1e-3, 2e-3))
        ]
        peak = find_peak_lr(to_table(runs))
        assert peak.values.tolist() == [1e-3, 2e-3]
        assert "`learning_rate` differs in 2 of 2 runs" in peak.warnings[0]

    def test_a_history_above_its_setting_is_doubtful(self):
        runs = [
            run(str(i), {"lr": lr}, {"train/lr": [3 * lr]}) for i, lr in enumerate((1e-3, 2e-3))
        ]
        peak = find_peak_lr(to_table(runs))
        assert peak.values.tolist() == [1e-3, 2e-3]
        assert "check which one is the peak lr" in peak.warnings[0]

    @pytest.mark.parametrize("last", [[1e-4, 2e-4], [6e-5, 6e-5], [0.0, 0.0]])
    def test_of_a_plain_table_the_higher_column_is_the_peak(self, last):
        table = pd.DataFrame({"lr": last, "learning_rate": [1e-3, 2e-3]})
        peak = find_peak_lr(RunTable(table))
        assert peak.values.tolist() == [1e-3, 2e-3]
        assert "not from `lr`" in peak.notes[0]

    def test_columns_that_cross_are_doubtful(self):
        table = pd.DataFrame({"lr": [1e-3, 2e-3, 3e-3], "optimizer.lr": [2e-3, 1e-3, 3e-3]})
        peak = find_peak_lr(RunTable(table))
        assert peak.values.tolist() == [1e-3, 2e-3, 3e-3]
        assert "`optimizer.lr` differs in 2 of 3 runs (0.001 and 0.002" in peak.warnings[0]

    @pytest.mark.parametrize(
        ("columns", "reason"),
        [
            ({"lr": [1e-4, 2e-4], "min_lr": [1e-4, 2e-4]}, "equals `min_lr` in every run"),
            ({"lr": [0.0, 0.0]}, "is 0 in 2 runs"),
            ({"train/lr": [1e-4, 2e-4]}, "is the last logged value"),
        ],
    )
    def test_last_values_alone_are_refused(self, columns, reason):
        with pytest.raises(UserError, match=f"{reason}.*--map lr=NAME"):
            find_peak_lr(RunTable(pd.DataFrame(columns)))

    def test_a_named_column_is_taken_as_it_is(self):
        table = pd.DataFrame({"lr": [1e-4, 2e-4], "min_lr": [1e-4, 2e-4]})
        assert name_columns(RunTable(table), {"lr": "lr"}).table["lr"].tolist() == [1e-4, 2e-4]


class TestTokens:
    def tokens(self, runs, **how):
        named = name_columns(runs if isinstance(runs, RunTable) else to_table(runs), **how)
        return named.table.get("tokens", pd.Series(dtype=float)).tolist(), named

    def test_a_logged_iteration_has_priority_over_the_counter_of_log_calls(self):
        history = {"iter": [0, 500, 1000], "val/loss": [5, 4, 3]}
        runs = [run("a", {"batch_tokens": 4096}, history, counts_calls=True)]
        tokens, named = self.tokens(runs)
        assert tokens == [4096_000]
        assert "steps are from `iter`" in named.notes[-1]

    def test_log_calls_are_no_steps(self):
        runs = [run("a", {"batch_tokens": 4096}, {"val/loss": [5, 4, 3]}, counts_calls=True)]
        tokens, named = self.tokens(runs)
        assert tokens == [] and "counts log calls" in named.absent["tokens"]

    def test_log_calls_count_as_steps_only_if_the_user_gives_their_tokens(self):
        runs = [run("a", {}, {"val/loss": [5, 4, 3]}, counts_calls=True)]
        tokens, named = self.tokens(runs, tokens_per_step=100)
        assert tokens == [400] and "number of log calls" in named.warnings[0]

    @pytest.mark.parametrize("plan", [3, 1000])
    def test_without_an_iteration_the_plan_of_a_finished_run_counts(self, plan):
        config = {"batch_tokens": 4096, "max_iters": plan}
        runs = [run("a", config, {"val/loss": [5, 4, 3]}, counts_calls=True)]
        assert self.tokens(runs)[0] == [plan * 4096]

    def test_a_zero_is_absent_and_the_field_is_named(self):
        runs = [run("a", {}, {"num_input_tokens_seen": [0, 0], "eval_loss": [4, 3]})]
        tokens, named = self.tokens(runs)
        assert tokens == []
        assert "`num_input_tokens_seen` is 0 in every run" in named.absent["tokens"]
        assert "--tokens-per-step" in named.absent["tokens"]

    def test_tokens_per_step(self):
        runs = [run("a", {"max_steps": 2}, {"num_input_tokens_seen": [0, 0], "eval_loss": [4, 3]})]
        tokens, named = self.tokens(runs, tokens_per_step=1e5)
        assert tokens == [2e5] and named.table["batch_tokens"].tolist() == [1e5]

    def test_sequences_and_their_length(self):
        runs = [run("a", {"seq_length": 2048}, {"consumed_samples": [10, 20], "lm loss": [4, 3]})]
        assert self.tokens(runs)[0] == [20 * 2048]

    def test_the_plan_replaces_a_counter_that_starts_at_0(self):
        config = {"max_steps": 1000, "batch_tokens": 10}
        runs = [ImportedRun("a", config=config, history={"loss": [(0, 5.0), (999, 3.0)]})]
        assert self.tokens(runs)[0] == [10_000]

    def test_text_is_left_to_the_check_of_the_table(self):
        table = RunTable(pd.DataFrame({"tokens": ["50M", "100M"], "loss": [4, 3]}))
        assert self.tokens(table)[0] == ["50M", "100M"]


class TestFinished:
    def judged(self, runs):
        table = judge_by_plan(name_columns(to_table(runs))).table
        return table["status"].tolist(), table["message"].tolist()

    def test_a_run_below_its_planned_steps_did_not_finish(self):
        runs = [
            run(name, {"max_steps": 10}, {"loss": [3.0] * n}) for name, n in (("a", 4), ("b", 10))
        ]
        status, message = self.judged(runs)
        assert status == ["failed", "done"] and message[0] == "unfinished: 4 of 10 steps"

    def test_a_run_below_its_planned_tokens_did_not_finish(self):
        history = {"tokens": [4e8], "loss": [3.0]}
        status, message = self.judged([run("a", {"tokens": 1e9}, history)])
        assert status == ["failed"] and message == ["unfinished: 400M of 1.0B tokens"]

    @pytest.mark.parametrize(
        "ended", [{"lr_decay_iters": 4}, {"lr_scheduler_type": "constant"}, {"decay_lr": "False"}]
    )
    def test_a_run_whose_schedule_had_ended_is_kept(self, ended):
        runs = [run("a", {"max_iters": 10, **ended}, {"loss": [3.0] * 4})]
        assert self.judged(runs)[0] == ["done"]

    def test_a_run_that_reached_its_plan_is_finished_whatever_its_state(self):
        runs = [run("a", {"max_steps": 10}, {"loss": [3.0] * 10}, status="failed", message="x")]
        assert self.judged(runs) == (["done"], [""])

    @pytest.mark.parametrize("loss", [math.nan, math.inf])
    def test_a_loss_that_ends_in_nan_has_diverged(self, loss):
        runs = [run("a", {"max_steps": 10}, {"loss": [3.0, loss], "eval_loss": [3.0]})]
        assert self.judged(runs)[0] == ["diverged"]

    def test_a_loss_evaluated_before_the_end_is_a_warning(self):
        history = {"train/loss": [4.0] * 10, "val/loss": [4.0] * 8}
        judged = judge_by_plan(name_columns(to_table([run("a", {}, history)])))
        assert "1 of 1 runs was last evaluated at 80% of their steps" in judged.warnings[0]

    def test_runs_shorter_than_their_siblings(self):
        table = pd.DataFrame(
            {"n_params": [1e6] * 4, "tokens": [1e8] * 4, "_step": [1000, 1000, 400, 999]}
        )
        assert judge_by_siblings(table)["status"].tolist() == ["done", "done", "failed", "done"]

    def test_another_batch_size_is_not_a_shorter_run(self):
        table = pd.DataFrame(
            {"n_params": 1e6, "tokens": 1e8, "batch_size": [8, 8, 16], "step": [1000, 1000, 500]}
        )
        assert set(judge_by_siblings(table)["status"]) == {"done"}

    def test_a_hole_in_the_grid_is_a_killed_run(self):
        lrs = [1e-3, 2e-3, 4e-3, 8e-3]
        table = pd.DataFrame(
            {"n_params": 1e6, "lr": [*lrs, 16e-3], "tokens": [1e9, 1e9, 4e8, 1e9, 1e9]}
            | {"loss": 3.0},
            index=range(5),
        ).assign(lr=[*lrs, 16e-3])
        judged = judge_by_siblings(table)
        assert judged["status"].tolist() == ["done", "done", "failed", "done", "done"]
        assert "40% of those of the other learning rates" in judged["message"][2]

    def test_every_second_lr_killed_at_one_time_is_no_budget_of_its_own(self):
        lrs = [1e-3 * 2**k for k in range(7)]
        table = pd.DataFrame({"n_params": 1e6, "lr": lrs, "tokens": [1e9, 4e8] * 3 + [1e9]})
        judged = judge_by_siblings(table)
        assert judged["status"].tolist() == ["done", "failed"] * 3 + ["done"]

    def test_two_budgets_with_one_grid_are_both_kept(self):
        lrs = [1e-3 * 2**k for k in range(5)]
        table = pd.DataFrame({"n_params": 1e6, "lr": lrs * 2, "tokens": [1e9] * 5 + [4e8] * 5})
        assert set(judge_by_siblings(table)["status"]) == {"done"}

    @pytest.mark.parametrize(
        ("word", "status"),
        [
            *(("Finished", "done"), ("TrialState.COMPLETE", "done"), ("TERMINATED", "done")),
            *(("Crashed", "failed"), ("PRUNED", "failed"), ("TIMEOUT", "failed")),
            *(("preempted", "failed"), ("out of memory", "failed"), ("diverged", "diverged")),
        ],
    )
    def test_words_for_the_state_of_a_run(self, word, status):
        assert read_state(word)[0] == status

    def test_an_unknown_word_is_refused(self):
        with pytest.raises(UserError, match=r"'finishd'.*nearest: 'finished'"):
            read_state("finishd")


class TestResumed:
    def test_runs_with_one_id_are_one_run(self):
        first = ImportedRun("a", history={"loss": [(1, 5.0), (2, 4.0), (3, 9.0)]}, status="failed")
        later = ImportedRun("a", history={"loss": [(3, 3.5), (4, 3.0)]})
        runs = to_table([first, later])
        assert runs.table[["loss", "status", "_last_step"]].values.tolist() == [[3.0, "done", 4]]
        assert runs.notes == ["2 logs with the same run id are joined to 1 runs"]

    def test_rows_with_one_id_are_one_run(self):
        table = pd.DataFrame(
            {"run_id": ["a", "b", "a"], "step": [400, 1000, 1000], "loss": [4.0, 3.0, 2.9]}
            | {"state": ["crashed", "finished", "finished"]}
        )
        reduced = reduce_to_runs(table, "x")
        assert sorted(reduced.table["loss"]) == [2.9, 3.0]
        assert set(reduced.table["state"]) == {"finished"}


def steps(n_runs=3, n=10, **columns):
    rows = [
        {"run": f"r{i}", "step": 100 * k, "lr": 1e-3 * 2**i * k / n, "loss": 5 - k / n - i}
        for i in range(n_runs)
        for k in range(1, n + 1)
    ]
    return pd.DataFrame(rows).assign(**columns)


class TestRowsOrRuns:
    def test_logged_steps_are_reduced_to_runs(self):
        reduced = reduce_to_runs(steps().sample(frac=1, random_state=0), "x")
        table = reduced.table.sort_values("id")
        assert table["loss"].tolist() == [4.0, 3.0, 2.0]
        assert table["lr"].tolist() == pytest.approx([1e-3, 2e-3, 4e-3])
        assert "30 rows are 3 runs, told apart by `run`" in reduced.notes[0]

    def test_one_run_without_a_name(self):
        reduced = reduce_to_runs(steps(1).drop(columns="run"), "mine")
        assert reduced.table[["id", "loss"]].values.tolist() == [["mine", 4.0]]

    def test_runs_without_names_are_told_apart_by_their_settings(self):
        table = steps().assign(n_params=[1e6] * 10 + [2e6] * 10 + [4e6] * 10)
        assert len(reduce_to_runs(table.drop(columns="run"), "x").table) == 3

    def test_runs_that_nothing_tells_apart_are_refused(self):
        with pytest.raises(UserError, match="no column tells them apart: add a column `run_id`"):
            reduce_to_runs(steps().drop(columns="run").assign(n_params=1e6), "x")

    @pytest.mark.parametrize(
        "table",
        [
            pd.DataFrame({"Name": ["a", "b", "c"], "_step": [10, 10, 20], "loss": [3, 2, 1]}),
            pd.DataFrame({"run": ["a", "a", "a"], "lr": [1, 2, 3], "step": 10, "loss": [3, 2, 1]}),
            pd.DataFrame({"name": ["m"] * 3, "tokens": [1e9, 4e9, 2e10], "loss": [3, 2, 1]}),
            pd.DataFrame({"lr": [1, 2, 4] * 2, "steps": [10] * 3 + [40] * 3, "loss": range(6)}),
            pd.DataFrame({"lr": [1, 2, 4], "loss": [3, 2, 1]}),
        ],
        ids=[
            "last step",
            "one name for a sweep",
            "budgets of a model",
            "two budgets",
            "no counter",
        ],
    )
    def test_a_table_of_runs_is_left_alone(self, table):
        assert reduce_to_runs(table, "x") is None

    def test_a_missing_last_loss_is_nan_only_where_the_others_are_there(self):
        table = steps(2)
        table.loc[(table["run"] == "r1") & (table["step"] == 1000), "loss"] = None
        assert reduce_to_runs(table, "x").table["status"].tolist() == ["done", "diverged"]
        sparse = table.assign(loss=table["loss"].where(table["step"] % 500 == 0))
        assert set(reduce_to_runs(sparse, "x").table["status"]) == {"done"}

    def test_a_row_of_a_final_evaluation_is_no_nan(self):
        final = pd.DataFrame({"run": ["r0"], "step": [1001], "test/accuracy": [0.5]})
        table = pd.concat([steps(2), final], ignore_index=True)
        assert set(reduce_to_runs(table, "x").table["status"]) == {"done"}


class TestBatch:
    def test_sequences_times_their_length_are_tokens(self):
        table = pd.DataFrame({"batch_size": [8, 16], "block_size": 512, "max_iters": 100})
        named = name_columns(RunTable(table.assign(iter=[99, 99]))).table
        assert named["batch_tokens"].tolist() == [4096, 8192]
        assert named["tokens"].tolist() == [409_600, 819_200]

    def test_a_batch_per_device_without_the_number_of_devices_is_open(self):
        table = pd.DataFrame({"per_device_train_batch_size": [8, 16], "block_size": 512})
        assert "batch_tokens" not in name_columns(RunTable(table)).table


class TestNamedByTheUser:
    """What `--map` names is known before rows are told from runs, and an lr is still the peak."""

    def table(self):
        rows = [
            {"exp": f"e{i}", "it": k, "eta": lr * min(1, k / 2) * (1 - k / 20), "L": 5 - k / 9}
            for i, lr in enumerate((1e-3, 2e-3))
            for k in range(1, 11)
        ]
        return pd.DataFrame(rows).assign(N=1.0, D=8.0)

    names = MappingProxyType(
        {"run_id": "exp", "step": "it", "lr": "eta", "loss": "L", "n_params": "1e6 * N"}
    )

    def test_rows_with_names_of_their_own_are_reduced(self, tmp_path):
        self.table().to_csv(tmp_path / "x.csv", index=False)
        table, notes = importing.trials(tmp_path / "x.csv", self.names)
        assert table["lr"].tolist() == pytest.approx([0.9e-3, 1.8e-3])
        assert table["n_params"].tolist() == [1e6, 1e6]
        assert any("20 rows are 2 runs" in note for note in notes)

    def test_an_expression_is_computed_once(self, tmp_path):
        pd.DataFrame({"n_params": [1.0, 2.0], "lr": 1e-3, "loss": 3.0}).to_csv(
            tmp_path / "x.csv", index=False
        )
        table, _ = importing.trials(tmp_path / "x.csv", {"n_params": "1e6 * n_params"})
        assert table["n_params"].tolist() == [1e6, 2e6]

    def test_a_history_named_as_the_lr_gives_its_peak(self):
        runs = [run("a", {}, {"eta": [1e-4, 1e-3, 1e-5], "loss": [5, 4, 3]})]
        named = name_columns(to_table(runs, "eta"), {"lr": "eta"})
        assert named.table["lr"].tolist() == [1e-3]


def test_a_run_without_a_vocabulary_has_no_count_of_its_own():
    table = pd.DataFrame({"num_params": [1e6, 1e6], "vocab_size": [1e3, None], "d_model": 64})
    counts = name_columns(RunTable(table)).table["n_params"]
    assert counts[0] == 1e6 - 2 * 64e3 and math.isnan(counts[1])
