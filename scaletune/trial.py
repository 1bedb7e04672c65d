"""What a user's own trainer imports to report to scaletune. Standard library only.

A script that `scaletune sweep` started reports its losses with two lines:

    import scaletune.trial
    scaletune.trial.report(tokens=seen, loss=val_loss)

Started by hand, the same script runs as before: `report` does nothing and `should_stop` is False.
A program in another language appends the same lines of JSON to the file `$SCALETUNE_RESULTS`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

RESULTS = "SCALETUNE_RESULTS"
"""Environment variable: path of the JSON lines file for reports."""
TRIAL = "SCALETUNE_TRIAL"
"""Environment variable: path of `trial.json`, the trial's settings and paths."""


PLANNED = ("lr", "weight_decay", "eps")


class CurrentTrial:
    """The trial that a trainer trains: its settings, its folder, and where it reports.

    Args:
        path: Path of `trial.json`. None: no sweep has started this program.
        results: Path of the file for reports.
        settings: Name -> value of settings, to call a function by hand:
            `train(CurrentTrial(settings={"lr": 0.01}))`.
    """

    def __init__(
        self,
        path: str | None = None,
        results: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self._content: dict[str, Any] = {"settings": dict(settings or {})}
        if path:
            self._content = json.loads(Path(path).read_text("utf-8"))
        self._results = results or self._content.get("results")

    def __getitem__(self, name: str) -> Any:
        """The value of a setting: `trial["lr"]`, `trial["model.width"]`, `trial["my.dropout"]`."""
        try:
            return self.settings[name]
        except KeyError:
            raise KeyError(f"{name} is no setting of this trial; see `trial.settings`") from None

    @property
    def settings(self) -> dict[str, Any]:
        """Name -> value of every setting: "lr", "width", "tokens", "model.width", "my.dropout"."""
        return dict(self._content.get("settings", {}))

    @property
    def id(self) -> str:
        """The trial's id; empty without a sweep."""
        return str(self._content.get("id", ""))

    @property
    def seed(self) -> int:
        """The trial's seed."""
        return int(self.settings.get("seed", 0))

    @property
    def run_dir(self) -> Path:
        """The trial's folder. It is kept between tries. Without a sweep: the working folder."""
        return Path(self._content.get("run_dir", "."))

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint that an earlier, interrupted try reported and that still exists."""
        path = self._content.get("resume_from")
        return Path(path) if path else None

    @property
    def plan(self) -> dict[str, dict[str, Any]]:
        """Parameter name -> multiplier, init_std, lr, weight_decay, eps. Empty without a plan."""
        return {row["name"]: row for row in self._plan_file().get("tensors", [])}

    def _plan_file(self) -> dict[str, Any]:
        path = self._content.get("plan")
        return json.loads(Path(path).read_text("utf-8")) if path else {}

    @property
    def should_stop(self) -> bool:
        """Whether the trial is to end now, because it cannot become the best or has diverged."""
        path = self._content.get("stop")
        return path is not None and os.path.exists(path)

    def report(
        self,
        *,
        loss: float | None = None,
        tokens: float | None = None,
        train_loss: float | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        **more: Any,
    ) -> None:
        """Reports a measurement. The last loss that is reported is the trial's result.

        Args:
            loss: Held-out loss in nats per token, or the one number to minimise.
            tokens: Training tokens so far. Not given: the end of the training.
            train_loss: Training loss of the latest step.
            checkpoint: A checkpoint from which this trial can continue: a later try finds it as
                `resume_from`.
            more: `n_params`, `n_params_total`, `batch_tokens`, `flops` of the trial, and own
                numbers, which are kept in the record.

        Raises:
            TypeError: A value is no number.
        """
        measures = {"loss": loss, "tokens": tokens, "train_loss": train_loss}
        for name, value in measures.items():
            if isinstance(value, str | bool):
                raise TypeError(f"`{name}` of a report must be a number, but got {value!r}")
        row = {**measures, **more}
        row = {name: _number(name, value) for name, value in row.items() if value is not None}
        if checkpoint is not None:
            row["checkpoint"] = os.path.abspath(os.fspath(checkpoint))
        self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row to the results, whole: other processes may append too."""
        if self._results:
            line = (json.dumps(row) + "\n").encode()
            os.makedirs(os.path.dirname(self._results), exist_ok=True)  # the trainer may delete it
            file = os.open(self._results, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(file, line)
            finally:
                os.close(file)

    def param_groups(self, model: Any) -> list[dict[str, Any]]:
        """One optimizer group per combination of lr, weight decay and eps of the plan.

        Args:
            model: The `nn.Module` whose parameters have the names of the plan.

        Returns:
            Groups for `torch.optim.AdamW` and others. Without a plan, one group of all parameters.

        Raises:
            ValueError: The plan and the model have different parameters.
        """
        named = {_plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        if not self.plan:
            return [{"params": list(named.values())}]
        return _groups(named, self.plan)

    def apply_plan(self, model: Any, *, initialise: bool = True) -> Any:
        """Hooks the plan's multipliers to the modules of a model and initialises its tensors.

        Call it once, on the model before it is compiled or distributed. A hook multiplies the
        output of an embedding and the input of any other module, so that a bias keeps its scale.
        Each tensor is drawn from a random stream of its own, given by the trial's seed and the
        tensor's name; `init_scale` multiplies the values that the model has drawn itself.

        Args:
            model: The `nn.Module` that `model.build` of the recipe builds at this width.
            initialise: False: keep the values, for a model whose weights were loaded.

        Returns:
            The model. Without a plan, unchanged.

        Raises:
            ValueError: The plan and the model have different parameters or shapes.
        """
        plan = self._plan_file()
        if not plan or hasattr(model, APPLIED):
            return model
        named = {_plain_name(name): p for name, p in model.named_parameters()}
        _check_shapes(named, self.plan)
        modules = {
            _plain_name(name): module
            for name, module in model.named_modules(remove_duplicate=False)
        }
        for row in plan.get("multipliers", []):
            _multiply(modules[row["module"]], row)
        if initialise:
            for name, p in named.items():
                _initialise(p, self.plan[name], self.seed)
        setattr(model, APPLIED, True)
        return model


APPLIED = "_scaletune_plan"
"""Attribute of a model to which the plan has been applied."""


class PlannedInput:
    """A hook that multiplies the first input of a module."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] * self.factor, *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: kwargs[first] * self.factor}


class PlannedOutput:
    """A hook that multiplies the first output of a module, or a part of its last dimension."""

    def __init__(self, factor: float, share: float):
        self.factor, self.share = factor, share

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._times(output[0]), *output[1:])
        return self._times(output)

    def _times(self, value: Any) -> Any:
        if self.share == 1:
            return value * self.factor
        import torch

        cut = round(self.share * value.shape[-1])
        return torch.cat([value[..., :cut] * self.factor, value[..., cut:]], -1)


def _multiply(module: Any, row: Mapping[str, Any]) -> None:
    if row["where"] == "input":
        module.register_forward_pre_hook(PlannedInput(row["factor"]), with_kwargs=True)
    else:
        module.register_forward_hook(PlannedOutput(row["factor"], row["share"]))


def _initialise(p: Any, row: Mapping[str, Any], seed: int) -> None:
    import torch

    with torch.no_grad():
        if row["init_value"] is not None:
            p.fill_(row["init_value"])
        elif row["init_std"] is not None:
            key = hashlib.sha256(f"{seed}/{row['name']}".encode()).digest()[:7]
            stream = torch.Generator().manual_seed(int.from_bytes(key, "big"))
            values = torch.empty(p.shape, dtype=torch.float32).normal_(generator=stream)
            if row["padding"] is not None:
                values[row["padding"]] = 0
            p.copy_(values.to(device=p.device, dtype=p.dtype) * row["init_std"])
        elif row["init_scale"] is not None:
            p.mul_(row["init_scale"])


def _check_shapes(named: Mapping[str, Any], plan: Mapping[str, Mapping[str, Any]]) -> None:
    if odd := sorted(named.keys() ^ plan.keys()):
        side = "model" if odd[0] in named else "plan"
        raise ValueError(
            f"plan and model must have the same parameters, but only the {side} has {odd[0]!r}: the"
            " trainer must build the same model as `model.build`"
        )
    for name, p in named.items():
        if list(p.shape) != plan[name]["shape"]:
            raise ValueError(
                f"plan and model must have the same shapes, but {name!r} has {list(p.shape)} in the"
                f" model and {plan[name]['shape']} in the plan: the trainer must build the model at"
                " the trial's width"
            )


def _plain_name(name: str) -> str:
    """A parameter's name without the prefixes of DDP, FSDP and torch.compile."""
    name = name.removeprefix("module.")
    for part in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name


def _groups(
    named: Mapping[str, Any], plan: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    if missing := sorted(named.keys() - plan.keys()):
        raise ValueError(
            f"the plan must have every parameter of the model, but it lacks {missing[0]!r}: the"
            " trainer must build the same model as `model.build`"
        )
    groups: dict[tuple[float, ...], dict[str, Any]] = {}
    for name, p in named.items():
        row = plan[name]
        values = {
            key: row[key] for key in ("lr", "weight_decay", "eps") if row.get(key) is not None
        }
        groups.setdefault(tuple(values.values()), {"params": [], **values})["params"].append(p)
    return list(groups.values())


def _number(name: str, value: Any) -> Any:
    """A number as plain Python; also of a tensor or array of one element."""
    if isinstance(value, str | bool | int | float):
        return value
    try:
        return value.item() if hasattr(value, "item") else float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` of a report must be a number, but got {value!r}") from error


def current() -> CurrentTrial:
    """The trial of this process, from its environment."""
    return CurrentTrial(os.environ.get(TRIAL), os.environ.get(RESULTS))


def report(**values: Any) -> None:
    """Reports a measurement of the trial of this process: see `CurrentTrial.report`."""
    current().report(**values)


def param_groups(model: Any) -> list[dict[str, Any]]:
    """Optimizer groups by the trial's plan: see `CurrentTrial.param_groups`."""
    return current().param_groups(model)


def apply_plan(model: Any, *, initialise: bool = True) -> Any:
    """Applies the trial's plan to a model: see `CurrentTrial.apply_plan`."""
    return current().apply_plan(model, initialise=initialise)


PROPERTIES = ("settings", "id", "seed", "run_dir", "resume_from", "plan", "should_stop")


def __getattr__(name: str) -> Any:
    if name in PROPERTIES:
        return getattr(current(), name)
    raise AttributeError(f"module 'scaletune.trial' has no attribute {name!r}")


def call(function: Callable[..., Any], trial: CurrentTrial) -> int:
    """Calls a user's `fn(trial)` and reports what it returns; the exit status of the process.

    The error of a function that raises one is written to the results too, as one sentence.
    """
    try:
        trial.write({"result": returned(function(trial))})
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (0, None):
            return 0
        traceback.print_exc()
        trial.write({"error": describe_error(error)})
        return 1
    return 0


def returned(value: Any) -> dict[str, Any]:
    """What a function returned, as a row: a loss, a dict with `loss`, or None."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {str(name): _number(str(name), v) for name, v in value.items() if v is not None}
    return {"loss": _number("loss", value)}


def describe_error(error: BaseException) -> str:
    """`ValueError: message (train.py:31)`, of the user's line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame[0]]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}{where}"[:500]


def load_function(name: str) -> Callable[..., Any]:
    """The function of `package.module:function`.

    Raises:
        ImportError: There is no such module or function.
    """
    module, _, path = name.partition(":")
    value: Any = import_module(module)
    for part in path.split("."):
        if not hasattr(value, part):
            raise ImportError(f"module {module!r} has no function {path!r}")
        value = getattr(value, part)
    if not callable(value):
        raise ImportError(f"`{name}` is not a function")
    return value


def main(arguments: Iterable[str]) -> int:
    """`python -m scaletune.trial package.module:function`: trains the trial of this process."""
    trial, (name,) = current(), arguments
    try:
        function = load_function(name)
    # whatever the user's module raises while it is imported
    except BaseException as error:
        traceback.print_exc()
        trial.write({"error": describe_error(error)})
        return 1
    return call(function, trial)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
