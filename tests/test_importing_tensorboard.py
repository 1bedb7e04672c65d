"""TensorBoard event files, written by tensorboardX."""

import math
import random
import time

import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto import event_pb2, plugin_hparams_pb2, summary_pb2
from tensorboardX.proto.tensor_pb2 import TensorProto

from scaletune import importing
from scaletune.errors import UserError
from scaletune.importing import event_file, tensorboard
from scaletune.importing.run import CALLS, STEPS, to_table


def log(folder, losses, first=0, lr=1e-3, close=True):
    """A run that logs the loss and a learning rate that warms up and decays."""
    writer = SummaryWriter(str(folder))
    for k, loss in enumerate(losses):
        step = first + 100 * k
        writer.add_scalar("val/loss", loss, step)
        writer.add_scalar("train/lr", lr * (0.1 if k == 0 and not first else 1 / (1 + k)), step)
    if close:
        writer.close()
    return writer


def rows(path):
    return {row["id"]: row for row in to_table(tensorboard.read(path)).table.to_dict("records")}


def rename(folder, number):
    """Gives the newest event file a name of its own: names have one second's resolution."""
    file = max(folder.glob("*tfevents*"), key=lambda path: path.stat().st_mtime_ns)
    return file.rename(folder / f"events.out.tfevents.{1000 + number}.host")


def test_a_resumed_run_is_one_run(tmp_path):
    """The second file starts again at step 200 and supersedes what came after it."""
    log(tmp_path / "run", [4.0, 3.5, 3.4, math.nan])
    rename(tmp_path / "run", 1)
    log(tmp_path / "run", [3.3, 3.0], first=200, lr=1e-4)
    rename(tmp_path / "run", 2)
    (row,) = rows(tmp_path).values()
    assert row["val/loss"] == pytest.approx(3.0) and row["status"] == "done"
    assert row["train/lr"] == pytest.approx(5e-4) and row[STEPS] == 300


def test_a_curve_that_ends_in_nan_has_diverged(tmp_path):
    log(tmp_path / "run", [4.0, 3.5, math.nan])
    (row,) = rows(tmp_path).values()
    assert row["status"] == "diverged"


def test_settings_of_add_hparams_belong_to_the_run_of_the_folder(tmp_path):
    """`add_hparams` writes a folder of its own, with end metrics at step 0."""
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        writer = log(tmp_path / name, [4.0, 3.5, 3.0], close=False)
        settings = {"lr": lr, "optimizer": "adamw", "tied": True, "n_params": "1e6"}
        writer.add_hparams(settings, {"hparam/loss": 3.1, "val/loss": 99.0})
        writer.close()
    for name, row in rows(tmp_path).items():
        assert row["lr"] == {"a": 1e-3, "b": 2e-3}[name] and row["optimizer"] == "adamw"
        assert row["n_params"] == 1e6 and row["hparam/loss"] == pytest.approx(3.1)
        assert row["val/loss"] == pytest.approx(3.0) and row[STEPS] == 200


def test_trials_of_one_writer_are_runs_of_their_own(tmp_path):
    """A study that calls `add_hparams` once per trial."""
    writer = log(tmp_path, [4.0], close=False)
    for k in range(3):
        writer.add_hparams({"lr": 2.0**-k}, {"loss": 3.0 + k}, name=f"trial{k}")
    writer.close()
    table = {name: row for name, row in rows(tmp_path).items() if name.startswith("trial")}
    assert {name: row["lr"] for name, row in table.items()} == {
        "trial0": 1.0,
        "trial1": 0.5,
        "trial2": 0.25,
    }


@pytest.mark.parametrize(
    ("status", "expected"),
    [("STATUS_SUCCESS", "done"), ("STATUS_FAILURE", "failed"), ("STATUS_RUNNING", "failed")],
)
def test_the_end_of_a_session(tmp_path, status, expected):
    """As the hparams API of TensorBoard stores it in the run's own file."""
    writer = log(tmp_path / "run", [4.0, 3.0], close=False)
    number = {"STATUS_SUCCESS": 1, "STATUS_FAILURE": 2, "STATUS_RUNNING": 3}[status]
    end = plugin_hparams_pb2.SessionEndInfo(status=number)
    content = plugin_hparams_pb2.HParamsPluginData(session_end_info=end).SerializeToString()
    plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="hparams", content=content)
    metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
    value = summary_pb2.Summary.Value(tag="_hparams_/session_end_info", metadata=metadata)
    writer.file_writer.add_summary(summary_pb2.Summary(value=[value]))
    writer.close()
    (row,) = rows(tmp_path).values()
    assert row["status"] == expected


def test_curves_of_add_scalars_are_metrics_of_the_run(tmp_path):
    writer = log(tmp_path / "run", [4.0, 3.0], close=False)
    for step in range(3):
        writer.add_scalars("loss", {"train": 3.0 - step, "val": 3.5 - step}, step)
    writer.close()
    with SummaryWriter(str(tmp_path / "torch")) as other:  # PyTorch names folders TAG_CURVE
        other.add_scalar("val/loss", 3.0, 10)
    with SummaryWriter(str(tmp_path / "torch" / "ce_loss_val")) as other:
        other.add_scalar("ce/loss", 2.0, 10)
    table = rows(tmp_path)
    assert set(table) == {"run", "torch"}
    assert table["run"]["loss/val"] == 1.5 and table["run"]["loss/train"] == 1.0
    assert table["torch"]["ce/loss/val"] == 2.0


def test_the_splits_of_keras_are_one_run(tmp_path):
    """Its steps are epochs, which are not iterations."""
    for name in ("a", "b"):
        for split, loss in (("train", 3.0), ("validation", 3.5)):
            with SummaryWriter(str(tmp_path / name / split)) as writer:
                for epoch in range(1, 4):
                    writer.add_scalar("epoch_loss", loss - 0.1 * epoch, epoch)
    table = rows(tmp_path)
    assert set(table) == {"a", "b"} and table["a"]["validation/loss"] == pytest.approx(3.2)
    assert table["a"][CALLS] == 3 and STEPS not in table["a"]


def test_ids_are_folders_so_that_equal_names_stay_apart(tmp_path):
    """Lightning names the folder of every run `version_0`."""
    for name in ("lr1", "lr2"):
        log(tmp_path / name / "version_0", [4.0, 3.0])
        (tmp_path / name / "version_0" / "hparams.yaml").write_text(
            "lr: 3e-4\nmodel:\n  width: 8\n"
        )
    table = rows(tmp_path)
    assert set(table) == {"lr1/version_0", "lr2/version_0"}
    assert {row["lr"] for row in table.values()} == {3e-4}
    assert {row["model.width"] for row in table.values()} == {8}


def test_a_setting_has_priority_over_a_decayed_history(tmp_path):
    for k, lr in enumerate((1e-3, 2e-3, 4e-3)):
        writer = log(tmp_path / f"run{k}", [4.0, 3.0 + k], lr=lr, close=False)
        writer.add_hparams({"learning_rate": 10 * lr, "n_params": 1e6, "tokens": 1e7}, {})
        writer.close()
    table, _ = importing.trials(tmp_path)
    assert sorted(table["lr"]) == pytest.approx([1e-2, 2e-2, 4e-2])


def test_text_and_images_are_no_scalars(tmp_path):
    with SummaryWriter(str(tmp_path / "run")) as writer:
        writer.add_text("note", "abcd", 1)
        writer.add_histogram("weights", [1.0, 2.0], 1)
        writer.add_scalar("val/loss", 3.0, 1)
        writer.add_text("args", '{"learning_rate": 0.001, "nested": {"a": 1}}', 0)
    (run,) = tensorboard.read(tmp_path)
    assert set(run.history) == {"val/loss"}
    assert run.config == {"learning_rate": 0.001, "nested.a": 1}


def test_the_fast_path_reads_what_the_protos_hold(tmp_path):
    """Random events, of which most have one simple value, against the parser of protobuf."""
    rng, events = random.Random(0), []
    for _ in range(500):
        kind = rng.choice(["simple", "simple", "long", "two", "tensor", "int", "empty", "minus"])
        step = rng.choice([0, 1, 127, 128, 10**9])
        number = rng.uniform(-5, 5)
        value = summary_pb2.Summary.Value(
            tag="x" * (rng.choice([1, 90, 150]) if kind == "long" else 3)
        )
        if kind == "tensor":
            value.tensor.CopyFrom(TensorProto(dtype=2, double_val=[number]))
        elif kind == "int":
            value.tensor.CopyFrom(TensorProto(dtype=9, int64_val=[-7]))
        elif kind != "empty":
            value.simple_value = number
        values = [value] * (2 if kind == "two" else 1)
        events.append(
            event_pb2.Event(
                wall_time=rng.uniform(1, 9),
                step=-3 if kind == "minus" else step,
                summary=summary_pb2.Summary(value=values),
            )
        )
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(b"".join(frame(event.SerializeToString()) for event in events))
    expected = {}
    for event in events:
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            number = value.simple_value
            if kind == "tensor":
                number = (list(value.tensor.double_val) or [float(value.tensor.int64_val[0])])[0]
            if kind:
                expected.setdefault(value.tag, []).append((event.step, number))
    assert event_file.read_file(path, "x").run.history == expected


def frame(payload):
    return len(payload).to_bytes(8, "little") + b"\0" * 4 + payload + b"\0" * 4


def test_a_damaged_file_is_one_clear_line(tmp_path):
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(frame(b"\xff\xff\xff\xff\xff"))
    with pytest.raises(
        UserError, match=r"must be a TensorBoard event file, but .*: if it is damaged"
    ):
        tensorboard.read(tmp_path)


def test_a_run_that_logged_nothing_is_unfinished(tmp_path):
    log(tmp_path / "good", [3.0, 2.0])
    SummaryWriter(str(tmp_path / "empty")).close()
    ends = {run.id: run.status for run in tensorboard.read(tmp_path)}
    assert ends == {"good": "done", "empty": "failed"}


def test_many_event_files_are_read_in_little_time_and_memory(tmp_path):
    """No step takes time that grows with the square of the number of files."""
    log(tmp_path / "runs" / "run", [4.0, 3.0, *[2.5] * 20])
    (file,) = (tmp_path / "runs" / "run").iterdir()
    for k in range(2000):
        (tmp_path / "runs" / f"run{k}").mkdir()
        (tmp_path / "runs" / f"run{k}" / file.name).write_bytes(file.read_bytes())
    start = time.perf_counter()
    runs = tensorboard.read(tmp_path / "runs")
    assert len(runs) == 2001 and time.perf_counter() - start < 20
    assert all(len(points) <= 5 for run in runs for points in run.history.values())
