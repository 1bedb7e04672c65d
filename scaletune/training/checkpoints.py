"""Saves and restores the state of a run as a checkpoint of tensors and plain values.

A new checkpoint replaces the last one atomically, and the last one is kept as `previous.pt`.
Checkpoints are loaded with `weights_only=True`.
"""

from __future__ import annotations

import os
import sys
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scaletune.errors import UserError
from scaletune.training import sharding
from scaletune.training.gradient_noise import GradientNoise
from scaletune.training.run import TrainingRun

REQUIRED_KEYS = {"trial", "model", "optimizer", "curve"}


def run_folder(run: TrainingRun) -> Path:
    """The folder of a trial's files in `engine.runs`; created if it does not exist."""
    path = Path(run.recipe.engine.runs) / run.id
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"`engine.runs` must be a writable folder, but {error}") from error
    return path


def _paths(run: TrainingRun) -> tuple[Path, Path]:
    folder = run_folder(run)
    return folder / "checkpoint.pt", folder / "previous.pt"


def run_state(run: TrainingRun) -> dict[str, Any]:
    """All that `load_state` needs to continue: the run's tensors (not copied) and plain values."""
    return {
        "trial": run.id,
        "model": run.net.state_dict(),
        "optimizer": run.opt.state_dict(),
        "ema": run.ema.state_dict() if run.ema else None,
        "noise": asdict(run.outcome.noise),
        "curve": torch.tensor(run.outcome.curve, dtype=torch.float64),
        "held_out": run.outcome.held_out,
        "seconds": run.outcome.seconds,
        "spent": run.outcome.steps_spent,
        "trunk": run.outcome.trunk,
    }


def clone_tensors(value: Any) -> Any:
    """A copy with cloned tensors. `torch.save` of a row of a stack would write the whole stack."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: clone_tensors(inner) for key, inner in value.items()}
    return [clone_tensors(inner) for inner in value] if isinstance(value, list) else value


def save(run: TrainingRun) -> None:
    """Saves the run; its last checkpoint becomes the previous one. All losses must be read."""
    assert not run.unread_losses
    state = run_state(run)
    if sharding.is_sharded(run.net):
        state = sharding.gather_tensors(state, keep=run.acc.is_main_process)
    if not run.acc.is_main_process:
        return
    path, previous = _paths(run)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        for orphan in path.parent.glob("*.part"):  # of a process that was killed while it wrote
            orphan.unlink(missing_ok=True)
        with part.open("wb") as file:
            torch.save(clone_tensors(state), file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            part.unlink()
        raise UserError(f"`{path}` must be writable, but {error}") from error


def restore(run: TrainingRun) -> None:
    """Continues from the last readable checkpoint, if `engine.checkpoint_every` is set.

    A file that cannot be read is reported on stderr and not deleted.
    """
    if not run.recipe.engine.checkpoint_every:
        return
    present = [path for path in _paths(run) if path.exists()]
    for path in present:
        state = _read(path)
        if state is not None:
            if state["trial"] != run.id:
                raise UserError(
                    f"a checkpoint in the folder of trial {run.id} must be of that trial,"
                    f" but `{path}` is of {state['trial']}"
                )
            load_state(run, state)
            break
    else:
        if present:
            raise UserError(
                "a checkpoint must be a complete file written by scaletune,"
                f" but `{present[0]}` is not: delete it to train from the start"
            )
    _require_same_step(run)


def _read(path: Path) -> dict[str, Any] | None:
    """The state in a checkpoint file. None, and a message on stderr, if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            corrupt = archive.testzip()  # torch.load does not verify checksums
        state = torch.load(path, map_location="cpu", weights_only=True)
        if corrupt is None and isinstance(state, dict) and state.keys() >= REQUIRED_KEYS:
            return state
        reason = f"the checksum of {corrupt} is wrong" if corrupt else "not a scaletune checkpoint"
    # zipfile, the unpickler and torch raise many different errors for a damaged archive.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
    print(f"checkpoint `{path}` cannot be read ({reason})", file=sys.stderr)
    return None


def load_state(run: TrainingRun, state: dict[str, Any]) -> None:
    """Sets the run to a state of `run_state`. The optimizer keeps the tensors of `state`."""
    model, optimizer = state["model"], state["optimizer"]
    if sharding.is_sharded(run.net):
        model = sharding.shard_model_state(run.net, model)
        optimizer = sharding.shard_optimizer_state(run.opt, optimizer)
    run.net.load_state_dict(model)
    run.opt.load_state_dict(optimizer)
    if run.ema:
        run.ema.load_state_dict(state["ema"])
    run.outcome.noise = GradientNoise(**state["noise"])
    run.outcome.curve = state["curve"].tolist()
    run.outcome.held_out, run.outcome.seconds = state["held_out"], state["seconds"]
    # Checkpoints from before branched training lack these two keys.
    run.outcome.steps_spent = state.get("spent", float(run.step))
    run.outcome.trunk = state.get("trunk", {})


def _require_same_step(run: TrainingRun) -> None:
    """UserError if processes read different checkpoints, because their folder is not shared."""
    if run.acc.num_processes > 1:
        steps = run.acc.gather(torch.tensor([run.step], device=run.acc.device)).tolist()
        if len(set(steps)) > 1:
            raise UserError(
                "`engine.runs` must be a folder that all processes share,"
                f" but their checkpoints are of steps {steps}"
            )
