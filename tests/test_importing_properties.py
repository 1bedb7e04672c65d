"""For every reader: what cannot change the law does not change it, or the runs are refused.

Each writer stores the same runs in the files of one tool: 2 sizes, 2 token budgets, 6 learning
rates, with a logged learning rate that warms up and decays. The changes: other order, another name
for the column of runs, runs that were killed, runs that diverged.
"""

import csv
import json
import math
import random
from dataclasses import dataclass, replace

import pytest

import scaletune as st
from scaletune.errors import UserError

SIZES, BUDGETS = (4e6, 1.6e7), (1e8, 4e8)
LRS = [2.0**-k for k in range(4, 11)]
BATCH = 65536
TARGET = {"n_params": 1.6e7, "tokens": 4e8}
LOGS = 20


def best_lr(n_params, tokens):
    return 0.011 * (n_params / 4e6) ** -0.25 * (tokens / 1e8) ** -0.1


@dataclass(frozen=True)
class Run:
    """A run to store: what was planned, and how far it came."""

    name: str
    n_params: float
    tokens: float
    lr: float
    share: float = 1.0
    diverged: bool = False

    @property
    def plan(self):
        return round(self.tokens / BATCH)

    @property
    def logged(self):
        """(step, lr, loss) at evenly spaced steps, as far as the run came."""
        minimum = 1.8 + 20 / self.n_params**0.25 + 60 / self.tokens**0.25
        end = minimum + 0.06 * math.log(self.lr / best_lr(self.n_params, self.tokens)) ** 2
        points = []
        for k in range(1, round(LOGS * self.share) + 1):
            step, share = round(self.plan * k / LOGS), k / LOGS
            lr = self.lr * min(1.0, 5 * share) * (1 - 0.9 * max(0.0, share - 0.2) / 0.8)
            points.append((step, lr, end + 2 * (1 - share)))
        if self.diverged:
            points[-1] = (*points[-1][:2], math.nan)
        return points

    @property
    def finished(self):
        return self.share == 1.0

    @property
    def state(self):
        return "finished" if self.finished else "crashed"


def study():
    return [
        Run(f"run-{i:03d}", n, d, lr)
        for i, (n, d, lr) in enumerate((n, d, lr) for n in SIZES for d in BUDGETS for lr in LRS)
    ]


def write_csv(folder, runs, column="run"):
    """A table of finished and crashed runs, as people write it."""
    path = folder / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([column, "n_params", "tokens", "learning_rate", "lr", "loss", "state"])
        for run in runs:
            _, lr, loss = run.logged[-1]
            writer.writerow([run.name, run.n_params, run.tokens, run.lr, lr, loss, run.state])
    return path


def write_steps(folder, runs, column="run"):
    """One row per logged step; a killed run just ends."""
    path = folder / "steps.csv"
    rows = [
        [run.name, step, run.n_params, step * BATCH, lr, loss]
        for run in runs
        for step, lr, loss in run.logged
    ]
    random.Random(len(runs)).shuffle(rows)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([column, "step", "n_params", "tokens", "lr", "val_loss"])
        writer.writerows(rows)
    return path


def write_json_lines(folder, runs, column="run_id"):
    """One line per logged step."""
    path = folder / "steps.jsonl"
    lines = [
        {
            column: run.name,
            "iter": step,
            "config": {"n_params": run.n_params, "lr": run.lr},
            "lr": lr,
            "batch_tokens": BATCH,
            "val_loss": loss,
        }
        for run in runs
        for step, lr, loss in run.logged
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_wandb_runs(folder, runs, column="Name"):
    """The table of runs that W&B exports: settings first, then the last values."""
    path = folder / "wandb.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(
            [
                column,
                "State",
                "Runtime",
                "batch_tokens",
                "learning_rate",
                "n_params",
                "_step",
                "iter",
                "lr",
                "val/loss",
            ]
        )
        for run in runs:
            step, lr, loss = run.logged[-1]
            state = run.state.capitalize()
            text = "NaN" if math.isnan(loss) else loss
            writer.writerow(
                [run.name, state, 60, BATCH, run.lr, run.n_params, len(run.logged), step, lr, text]
            )
    return path


def write_trainer(folder, runs, column=None):
    root = folder / "trainer"
    for run in runs:
        width = {4e6: 128, 1.6e7: 256}[run.n_params]
        step = run.logged[-1][0]
        place = root / run.name / f"checkpoint-{step}"
        place.mkdir(parents=True)
        log = [
            {"step": step, "learning_rate": lr, "eval_loss": loss} for step, lr, loss in run.logged
        ]
        state = {
            "global_step": step,
            "max_steps": run.plan,
            "log_history": log,
            "num_input_tokens_seen": step * BATCH,
        }
        (place / "trainer_state.json").write_text(json.dumps(state))
        config = {
            "model_type": "llama",
            "hidden_size": width,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 3 * width,
            "vocab_size": 1000,
        }
        (place / "config.json").write_text(json.dumps(config))
    return root


def write_tensorboard(folder, runs, column=None):
    from tensorboardX import SummaryWriter

    root = folder / "events"
    for run in runs:
        with SummaryWriter(str(root / run.name)) as writer:
            for step, lr, loss in run.logged:
                writer.add_scalar("train/lr", lr, step)
                writer.add_scalar("val/loss", loss, step)
                writer.add_scalar("n_params", run.n_params, step)
                writer.add_scalar("tokens", step * BATCH, step)
    return root


def write_mlruns(folder, runs, column=None):
    root = folder / "mlruns" / "0"
    root.mkdir(parents=True)
    (root / "meta.yaml").write_text("experiment_id: '0'\nlifecycle_stage: active\nname: Default\n")
    for run in runs:
        place = root / run.name.replace("-", "").replace("%", "")
        (place / "params").mkdir(parents=True)
        (place / "metrics").mkdir()
        (place / "meta.yaml").write_text(
            f"experiment_id: '0'\nlifecycle_stage: active\nrun_id: {place.name}\n"
            f"run_name: {run.name}\nstatus: {3 if run.finished else 4}\n"
        )
        settings = {"learning_rate": run.lr, "n_params": run.n_params, "tokens": run.tokens}
        for key, value in settings.items():
            (place / "params" / key).write_text(str(value))
        for index, key in ((1, "lr"), (2, "val_loss")):
            lines = [f"1700000000000 {point[index]} {point[0]}\n" for point in run.logged]
            (place / "metrics" / key).write_text("".join(lines))
    return folder / "mlruns"


def write_lightning(folder, runs, column=None):
    root = folder / "lightning_logs"
    for i, run in enumerate(runs):
        place = root / f"version_{i}"
        place.mkdir(parents=True)
        settings = {"n_params": run.n_params, "max_steps": run.plan, "batch_tokens": BATCH}
        (place / "hparams.yaml").write_text("".join(f"{k}: {v}\n" for k, v in settings.items()))
        with (place / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", "lr-AdamW", "step", "val_loss"])
            for step, lr, loss in run.logged:
                writer.writerow([0, lr, step - 1, ""])
                writer.writerow([0, "", step - 1, loss])
    return root


def write_ray(folder, runs, column=None):
    root = folder / "ray"
    for run in runs:
        place = root / f"train_{run.name}"
        place.mkdir(parents=True)
        settings = {"lr": run.lr, "n_params": run.n_params}
        (place / "params.json").write_text(json.dumps(settings))
        lines = [
            {
                "training_iteration": k,
                "val_loss": loss,
                "lr": lr,
                "tokens": step * BATCH,
                "trial_id": run.name,
                "config": settings,
                "done": k == LOGS,
            }
            for k, (step, lr, loss) in enumerate(run.logged, 1)
        ]
        (place / "result.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if not run.finished:
            (place / "error.txt").write_text("ray.exceptions.RayTaskError\n")
    return root


def write_optuna(folder, runs, column=None):
    path = folder / "trials_dataframe.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "number",
                "value",
                "datetime_start",
                "datetime_complete",
                "duration",
                "params_lr",
                "user_attrs_n_params",
                "user_attrs_tokens",
                "state",
            ]
        )
        for i, run in enumerate(runs):
            loss = run.logged[-1][2]
            state = "COMPLETE" if run.finished and not run.diverged else "FAIL"
            writer.writerow(
                [
                    i,
                    "" if math.isnan(loss) else loss,
                    "2026-01-01",
                    "2026-01-02",
                    "1 day",
                    run.lr,
                    run.n_params,
                    run.tokens,
                    state,
                ]
            )
    return path


WRITERS = {
    "csv": write_csv,
    "steps": write_steps,
    "json lines": write_json_lines,
    "wandb runs": write_wandb_runs,
    "trainer": write_trainer,
    "tensorboard": write_tensorboard,
    "mlruns": write_mlruns,
    "lightning": write_lightning,
    "ray": write_ray,
    "optuna": write_optuna,
}
NAMED = {"csv": "run_name", "steps": "trial_id", "json lines": "name", "wandb runs": "Name"}


def shuffled(runs):
    return random.Random(1).sample(runs, len(runs))


def with_killed(runs):
    """Every second run next to the optimum was killed: at 40 % of its steps, and at 75 %."""
    killed = [
        replace(run, name=f"killed-{i:03d}-{share:.0%}", share=share, lr=run.lr * 1.2)
        for i, run in enumerate(runs)
        for share in (0.4, 0.75)
        if i % 2 and abs(math.log2(run.lr / 0.01)) < 1.2
    ]
    return runs + killed


def with_diverged(runs):
    """At a far too high lr, each setting has a run whose loss is not a number at the end."""
    high = [run for run in runs if run.lr == max(LRS)]
    return runs + [
        replace(run, name=f"high-{i:03d}", lr=4 * run.lr, diverged=True)
        for i, run in enumerate(high)
    ]


CHANGES = {"shuffled": shuffled, "killed": with_killed, "diverged": with_diverged}


def predict(path):
    prediction = st.fit(path).predict(**({} if "trainer" in str(path) else TARGET) or SIZE)
    return prediction.lr, prediction.interval["lr"]


SIZE = {"n_params": 1e6, "tokens": 4e8}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The prediction from each reader's files of the study as it is."""
    return {
        name: predict(write(tmp_path_factory.mktemp(name.replace(" ", "")), study()))
        for name, write in WRITERS.items()
    }


@pytest.mark.parametrize("name", WRITERS)
def test_the_law_is_that_of_the_runs(name, expected):
    lr, (low, high) = expected[name]
    if name != "trainer":  # its sizes are counted from config.json
        assert low < best_lr(**TARGET) < high
        assert lr == pytest.approx(best_lr(**TARGET), rel=0.06)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", WRITERS)
def test_what_cannot_change_the_law_does_not(name, change, expected, tmp_path):
    before, (low, high) = expected[name]
    after, _ = predict(WRITERS[name](tmp_path, CHANGES[change](study())))
    assert abs(math.log(after / before)) < 0.1 * math.log(high / low)


@pytest.mark.parametrize("name", NAMED)
def test_the_name_of_the_column_of_runs_does_not_matter(name, expected, tmp_path):
    after, _ = predict(WRITERS[name](tmp_path, study(), NAMED[name]))
    assert after == pytest.approx(expected[name][0], rel=1e-12)


def test_a_last_lr_alone_is_refused(tmp_path):
    path = tmp_path / "runs.csv"
    rows = [
        f"{run.n_params},{run.tokens},{run.lr / 10},{run.lr / 10},{run.logged[-1][2]}"
        for run in study()
    ]
    path.write_text("n_params,tokens,lr,min_lr,loss\n" + "\n".join(rows))
    with pytest.raises(UserError, match=r"`lr` must be the peak .* equals `min_lr`.*--map lr="):
        st.fit(path)
