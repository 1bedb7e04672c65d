"""Checkpoints: a stopped trial continues bitwise.

If a checkpoint is damaged, the previous one is used.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from scaletune import training
from scaletune.errors import UserError
from scaletune.recipe import with_settings
from scaletune.training import checkpoints

EVERY = 3
# Step of the kill: before the first checkpoint, at a checkpoint, between two, at the end.
STOPS = [1, 3, 5, 6, 8]
KINDS = {
    "plain": {},
    "all": {
        "schedule.ema_half_life": 1024,
        "engine.accumulation": 2,
        "engine.noise_every": 2,
        "engine.evaluate_at": [0.4],
        "training.precision": "bf16",
    },
}
KILLED = """
import json, os, signal, sys
from scaletune import recipe, training

content, kinds, stops, folder = json.loads(sys.argv[1])

def run(settings, stop):
    point = recipe.with_settings(recipe.validate_recipe(content, "killed"), settings)
    taken = 0
    def progress(share):
        nonlocal taken
        taken += 1
        if taken == stop:
            os.kill(os.getpid(), signal.SIGKILL)
    training.run_trial(point, "main", training.accelerator(), progress)

for kind, settings in kinds.items():
    for stop in stops:
        if not os.fork():
            run({**settings, "engine.runs": f"{folder}/{kind}-{stop}"}, stop)
            os._exit(0)
        assert os.wait()[1] == signal.SIGKILL
"""


def checkpointed_recipe(tiny, folder, **settings):
    return tiny(
        {"width": 64, "engine.checkpoint_every": EVERY, "engine.runs": str(folder)} | settings
    )


def trained(recipe):
    trial, curve = training.run_trial(recipe, "main", training.accelerator())
    return {
        "id": trial.id,
        "loss": trial.loss,
        "curve": curve,
        "held_out": trial.metrics["held_out"],
        "noise": trial.metrics["noise"],
    }


def checkpoint_path(recipe, name="checkpoint.pt"):
    """The path of a checkpoint of the only trial in a folder of runs."""
    (trial,) = os.listdir(recipe.engine.runs)
    return f"{recipe.engine.runs}/{trial}/{name}"


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory):
    """Folders of runs that were killed with signal 9 after each of STOPS steps."""
    folder = tmp_path_factory.mktemp("killed")
    order = json.dumps([checkpointed_recipe(tiny, folder).model_dump(), KINDS, STOPS, str(folder)])
    subprocess.run([sys.executable, "-c", KILLED, order], check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tiny):
    return {kind: trained(tiny({"width": 64} | settings)) for kind, settings in KINDS.items()}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_trial_goes_on_to_the_same_bits(
    tiny, killed, undisturbed, kind, stop, monkeypatch
):
    recipe = checkpointed_recipe(tiny, killed / f"{kind}-{stop}", **KINDS[kind])
    assert os.path.exists(checkpoint_path(recipe)) == (stop >= EVERY)
    restored, put_back = [], checkpoints.load_state

    def watched(run, content):
        put_back(run, content)
        restored.append(run.step)

    monkeypatch.setattr(checkpoints, "load_state", watched)
    assert trained(recipe) == undisturbed[kind]
    assert restored == ([8 if stop == 8 else stop // EVERY * EVERY] if stop >= EVERY else [])


@pytest.fixture
def stopped(tiny, killed, tmp_path):
    """(recipe, last checkpoint, previous checkpoint) of a trial, in a copy of its folder."""
    shutil.copytree(killed / "plain-8", tmp_path / "runs")
    recipe = checkpointed_recipe(tiny, tmp_path / "runs")
    trained(recipe)
    return recipe, checkpoint_path(recipe), checkpoint_path(recipe, "previous.pt")


def truncated(path):
    os.truncate(path, os.path.getsize(path) // 2)


def emptied(path):
    os.truncate(path, 0)


def overwritten(path):
    with open(path, "wb") as file:
        file.write(b"no archive at all " * 100)


def flipped(path):
    """Flips one bit in the middle of the weights."""
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def another_thing(path):
    torch.save([1, 2, 3], path)


@pytest.mark.parametrize(
    "damage", [truncated, emptied, overwritten, flipped, another_thing, os.remove]
)
def test_the_checkpoint_before_a_damaged_one_is_taken(stopped, undisturbed, damage, capsys):
    recipe, path, _ = stopped
    damage(path)
    assert trained(recipe) == undisturbed["plain"]
    warning = capsys.readouterr().err
    assert (f"checkpoint `{path}` cannot be read (" in warning and warning.count("\n") == 1) or (
        damage is os.remove and not warning
    )


def test_with_both_damaged_nothing_is_overwritten(stopped):
    recipe, path, previous = stopped
    truncated(path)
    emptied(previous)
    sizes = os.path.getsize(path), os.path.getsize(previous)
    with pytest.raises(
        UserError,
        match=r"a checkpoint must be a complete file written by scaletune, but .* is not: "
        r"delete it to train from the start",
    ):
        trained(recipe)
    assert sizes == (os.path.getsize(path), os.path.getsize(previous))


def test_a_checkpoint_of_another_recipe_is_refused(stopped):
    recipe, path, _ = stopped
    other = with_settings(recipe, {"seed": 1})
    trained(other)
    (moved,) = set(os.listdir(recipe.engine.runs)) - {os.path.basename(os.path.dirname(path))}
    shutil.copy(path, f"{recipe.engine.runs}/{moved}/checkpoint.pt")
    with pytest.raises(
        UserError,
        match=r"a checkpoint in the folder of trial .* must be of that trial, but `.*` is of ",
    ):
        trained(other)


def test_a_crash_while_writing_leaves_the_last_checkpoint(tiny, tmp_path, monkeypatch, undisturbed):
    recipe, replace, calls = checkpointed_recipe(tiny, tmp_path), os.replace, []

    def crash(source, target):
        calls.append(source)
        # os.replace is called once for the first checkpoint and twice for the second.
        if len(calls) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        trained(recipe)
    monkeypatch.setattr(os, "replace", replace)
    assert trained(recipe) == undisturbed["plain"]


def test_a_checkpoint_holds_tensors_and_plain_values(stopped):
    """It loads with `weights_only=True`, and its weights are those of the trained model."""
    content = torch.load(stopped[1], weights_only=True)
    assert len(content["curve"]) == 8 and content["model"]["lm_head.weight"].shape == (1, 256, 64)


class Planted:
    """An object whose unpickling calls a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_would_run_code_is_left_unread(stopped, tmp_path, undisturbed, capsys):
    recipe, path, _ = stopped
    torch.save(
        {"trial": Planted(tmp_path / "ran"), "model": {}, "optimizer": {}, "curve": []}, path
    )
    assert trained(recipe) == undisturbed["plain"] and not (tmp_path / "ran").exists()
    assert f"checkpoint `{path}` cannot be read (" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_training(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"`engine\.runs` must be a writable folder, but "):
        trained(checkpointed_recipe(tiny, tmp_path / "file" / "runs"))
