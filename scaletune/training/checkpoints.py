"""Checkpoints: tensors and plain values, replaced atomically, the one before kept. Read with `weights_only=True`."""

from __future__ import annotations

import os
import sys
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scaletune.errors import UserError
from scaletune.training.gradient_noise import Noise

if TYPE_CHECKING:
    from scaletune.training.loop import Run


def folder(run: Run) -> Path:
    """Where a trial's own files lie; made when missing, before anything is trained."""
    path = Path(run.recipe.engine.runs) / run.id
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"`engine.runs` must be a folder to write to, but {error}") from error
    return path


def _paths(run: Run) -> tuple[Path, Path]:
    where = folder(run)
    return where / "checkpoint.pt", where / "previous.pt"


def content(run: Run) -> dict[str, Any]:
    """All that `put_back` needs to go on: tensors, which are the run's own, and plain values."""
    return {
        "trial": run.id,
        "model": run.net.state_dict(),
        "optimizer": run.opt.state_dict(),
        "ema": run.ema.state_dict() if run.ema else None,
        "noise": asdict(run.outcome.noise),
        "curve": torch.tensor(run.outcome.curve, dtype=torch.float64),
        "held_out": run.outcome.held_out,
        "seconds": run.outcome.seconds,
        "spent": run.outcome.spent,
        "trunk": run.outcome.trunk,
    }


def apart(value: Any) -> Any:
    """With tensors of their own: one that is a row of a stack would be written with the whole stack."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: apart(inner) for key, inner in value.items()}
    return [apart(inner) for inner in value] if isinstance(value, list) else value


def save(run: Run) -> None:
    """Put the run as it is in place of its last checkpoint, which becomes the previous one. Call when no loss is unread."""
    assert not run.unread
    if not run.acc.is_main_process:
        return
    path, previous = _paths(run)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        for left in path.parent.glob("*.part"):  # by a writer that was killed
            left.unlink(missing_ok=True)
        with part.open("wb") as file:
            torch.save(apart(content(run)), file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            part.unlink()
        raise UserError(f"`{path}` must be writable, but {error}") from error


def restore(run: Run) -> None:
    """Go on from the run's last readable checkpoint, if it keeps any. An unreadable one is said, and left where it is."""
    if not run.recipe.engine.checkpoint_every:
        return
    present = [path for path in _paths(run) if path.exists()]
    for path in present:
        found = _read(path)
        if found is not None:
            if found["trial"] != run.id:
                raise UserError(
                    f"a checkpoint must be of the trial it lies with, {run.id}, but `{path}` is of {found['trial']}"
                )
            put_back(run, found)
            break
    else:
        if present:
            raise UserError(
                f"a checkpoint must be one we wrote, whole, but `{present[0]}` is not: remove it to train from the start"
            )
    _require_same_step(run)


def _read(path: Path) -> dict[str, Any] | None:
    """A checkpoint's content; None, and a line to the user, when it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()  # torch.load checks no checksum
        found = torch.load(path, map_location="cpu", weights_only=True)
        if (
            torn is None
            and isinstance(found, dict)
            and found.keys() >= {"trial", "model", "optimizer", "curve"}
        ):
            return found
        reason = f"the checksum of {torn} is wrong" if torn else "it is something else"
    except (
        Exception
    ) as error:  # a damaged archive fails in many ways: zip's, the unpickler's, torch's
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
    print(f"checkpoint `{path}` cannot be read ({reason})", file=sys.stderr)
    return None


def put_back(run: Run, found: dict[str, Any]) -> None:
    """Make the run what another was. The optimizer keeps the tensors it is given."""
    run.net.load_state_dict(found["model"])
    run.opt.load_state_dict(found["optimizer"])
    if run.ema:
        run.ema.load_state_dict(found["ema"])
    run.outcome.noise = Noise(**found["noise"])
    run.outcome.curve = found["curve"].tolist()
    run.outcome.held_out, run.outcome.seconds = found["held_out"], found["seconds"]
    run.outcome.spent, run.outcome.trunk = (
        found.get("spent", float(run.step)),
        found.get("trunk", {}),
    )  # none before there were branches


def _require_same_step(run: Run) -> None:
    """UserError when the processes read different checkpoints: their folder must be one they share."""
    if run.acc.num_processes > 1:
        steps = run.acc.gather(torch.tensor([run.step], device=run.acc.device)).tolist()
        if len(set(steps)) > 1:
            raise UserError(
                f"`engine.runs` must be a folder that all processes share, but their checkpoints are of steps {steps}"
            )
