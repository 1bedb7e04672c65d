"""Full disks: a clear error, and no recorded trial is lost.

The disk is a small tmpfs; tests are skipped where mounting is not allowed.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_chaos import chaos, losses, planted_losses, worker  # noqa: F401

from scaletune import sweeping, training
from scaletune.errors import UserError
from scaletune.records import Fit, Store, read_jsonl
from scaletune.training import checkpoints

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={MIB}", "tmpfs", folder],
        capture_output=True,
        check=False,
    )
    if not mount or mount.returncode:
        pytest.skip("this process may not mount a disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Fills the disk; returns the file to delete for space."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return filler
    raise AssertionError("the disk has no end")


def test_a_full_disk_under_the_store_costs_one_trial(worker, tmp_path, disk):  # noqa: F811
    tasks, stem = worker(40), disk / "sweeps/chaos"
    store = Store(stem)
    kept = []
    with pytest.raises(
        UserError,
        match=r"^`.*chaos.db` must be a writable SQLite file, "
        r"but (database or disk is full|disk I/O error)",
    ):
        for task in tasks:
            store.put(chaos.planted_trial(task), [i / 7 for i in range(20_000)])
            kept.append(task.id)
    assert 2 <= len(kept) < len(tasks) and [trial.id for trial in store.trials()] == sorted(kept)
    store.close()
    # The database can be read while the disk is full.
    assert sweeping.status(stem.with_suffix(".db"))["done"] == len(kept)
    subprocess.run(["mount", "-o", f"remount,size={8 * MIB}", disk], check=True)  # free space
    assert losses(sweeping.train_all(tasks, stem, 2)) == planted_losses(tasks)
    # Recorded trials were not trained again.
    assert not set(kept) & set((tmp_path / "started").read_text().split())


def test_a_full_disk_leaves_the_record_as_it_was(worker, disk):  # noqa: F811
    tasks, stem = worker(3), disk / "sweeps/chaos"
    sweeping.train_all(tasks[:2], stem, 1)
    before, filler = (disk / "sweeps/chaos.jsonl").read_bytes(), None
    store = Store(stem)
    store.put(chaos.planted_trial(tasks[2]))
    filler = fill(disk)
    with pytest.raises(
        UserError, match=r"^`.*chaos.(jsonl|db)` must be (writable|a writable SQLite file), but "
    ):
        store.export()
    store.close()
    assert (disk / "sweeps/chaos.jsonl").read_bytes() == before
    assert not list((disk / "sweeps").glob(".*"))
    filler.unlink()
    assert sweeping.export(disk / "sweeps/chaos.db")
    assert len(read_jsonl(disk / "sweeps/chaos.jsonl")) == 3


def test_a_sweep_does_not_begin_on_a_full_disk(worker, tmp_path, disk):  # noqa: F811
    tasks = worker(2)
    (disk / "sweeps").mkdir()
    filler = fill(disk)
    with pytest.raises(UserError, match=r"^`.*chaos.(lock|db)` must be "):
        sweeping.train_all(tasks, disk / "sweeps/chaos", 1)
    assert not (tmp_path / "started").read_text() and not list((disk / "sweeps").glob("*.lock"))
    filler.unlink()
    assert losses(sweeping.train_all(tasks, disk / "sweeps/chaos", 1)) == planted_losses(tasks)


def test_a_checkpoint_on_a_full_disk_keeps_the_previous_one(tiny, disk, monkeypatch):
    settings = {"engine.checkpoint_every": 2, "engine.runs": str(disk / "runs")}
    recipe, saved, save = tiny(settings), [], checkpoints.save

    def filled(run):
        if run.step == 6:
            saved.append(fill(disk))
        save(run)

    monkeypatch.setattr(checkpoints, "save", filled)
    with pytest.raises(UserError, match=r"^`.*checkpoint.pt` must be writable, but "):
        training.run_trial(recipe, "main", training.accelerator())
    (folder,) = (disk / "runs").iterdir()
    # Checkpoints of steps 4 and 2.
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "previous.pt"}
    saved[0].unlink()
    subprocess.run(["mount", "-o", f"remount,size={8 * MIB}", disk], check=True)
    monkeypatch.setattr(checkpoints, "save", save)
    again, alone = (
        training.run_trial(recipe, "main", training.accelerator())[0],
        training.run_trial(tiny(), "main", training.accelerator())[0],
    )
    assert (again.id, again.loss) == (alone.id, alone.loss)


def test_a_fit_on_a_full_disk_keeps_the_previous_one(disk):
    fit = Fit(law="lr_nd", params={}, solution={}, objective=0.0)
    path = fit.write(disk / "fits/name.json")
    fill(disk)
    with pytest.raises(
        UserError, match=r"^`.*name.json` must be writable, but No space left on device$"
    ):
        Fit(law="lr_nd", params={}, solution={"long": "x" * 10_000}, objective=0.0).write(path)
    assert Fit.read(path) == fit and os.listdir(path.parent) == ["name.json"]
