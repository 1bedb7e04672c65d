"""A plan put on a model: forward hooks that multiply, initialisation tensor by tensor, plain param groups.

Nothing is stored on tensors. A multiplier is a hook on the module that owns the tensor: an embedding's output, any other's input
(so that a bias is left alone); a residual branch's output. Hooks travel with deepcopy and add no state_dict key. What uses
a tensor without calling its module (`F.linear(x, self.head.weight)`) is not seen; attach before a compiled model first runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from scaletune.errors import UserError
from scaletune.models import ZOO, layers
from scaletune.models.build import acting, generator
from scaletune.parametrizing.shapes import Use, modules, named, unwrapped

if TYPE_CHECKING:
    from scaletune.parametrizing.attention import Queries
    from scaletune.parametrizing.plan import Plan, Row

MARK = (
    "_scaletune_initialised"  # on the model's own module: the digest of the plan that rescaled it
)


class Multiply:
    """A hook: `factor` times the first input, or the first output, of a module."""

    def __init__(self, factor: float):
        self.factor = factor

    def _times(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return (self._times(value[0]), *value[1:])
        return value if self.factor == 1 else value * self.factor


class MultiplyInput(Multiply):
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return self._times(args), kwargs
        first = next(iter(kwargs))  # a layer called by keyword
        return args, {**kwargs, first: self._times(kwargs[first])}


class MultiplyOutput(Multiply):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._times(output)


class MultiplyFirst(MultiplyOutput):
    """The first `share` of the last dimension alone: the queries of a fused projection."""

    def __init__(self, factor: float, share: float):
        super().__init__(factor)
        self.share = share

    def _times(self, value: Any) -> Any:
        cut = round(self.share * value.shape[-1])
        return (
            value
            if self.factor == 1
            else torch.cat([value[..., :cut] * self.factor, value[..., cut:]], -1)
        )


def takes_multiplier(use: Use) -> bool:
    """Whether a hook on the tensor's module multiplies that tensor and nothing else."""
    known = (
        nn.Linear,
        nn.Embedding,
        _ConvNd,
        layers.Linear,
        layers.Embedding,
        layers.Conv,
        layers.ExpertLinear,
    )
    called = isinstance(use.module, known) and not isinstance(
        use.module, NonDynamicallyQuantizableLinear
    )  # which attention never calls
    return use.name.endswith("weight") and (called or type(use.module).__name__ == "Conv1D")


def own_multiplier(use: Use) -> float:
    """`output_mult` of mup's MuReadout, at the base size: attaching a plan turns the readout into a plain `nn.Linear`."""
    return (
        float(getattr(use.module, "output_mult", 1.0))
        if _is_mu_readout(use.module) and use.name.endswith("weight")
        else 1.0
    )


def _is_mu_readout(module: nn.Module) -> bool:
    return any(kind.__module__ == "mup.layer" for kind in type(module).__mro__)


def convert(model: nn.Module) -> None:
    """Make a model that mup prepared an ordinary one: its readouts plain linears, whose multiplier is the plan's, no infshapes."""
    for module in modules(model).values():
        if _is_mu_readout(module):
            module.__class__ = nn.Linear
    for parameter in unwrapped(model).parameters():
        parameter.__dict__.pop("infshape", None)


def attach(plan: Plan, model: nn.Module) -> None:
    """Hook every multiplier to its module, once: attaching again sets the same hooks."""
    plan.check(model)
    inner = unwrapped(model)
    if isinstance(inner, ZOO):
        return _agree(plan, inner)
    convert(model)
    owners = modules(model)
    for hook in _hooks(owners):
        hook.factor = 1.0
    for module, factor in _factors(plan, owners):
        _hook(module, factor)
    for name, factor in branches(plan, model).items():
        _hook_output(owners[name], factor)
    for found in plan.queries:
        _hook_queries(owners[found.module], found)


def _factors(plan: Plan, owners: Mapping[str, nn.Module]) -> Iterator[tuple[nn.Module, float]]:
    """Each tensor's owner and multiplier, once where several names lead to one module."""
    seen = set()
    for name, factor in plan.multipliers().items():
        where, _, tensor = name.rpartition(".")
        if (place := (id(owners[where]), tensor)) not in seen:
            seen.add(place)
            yield owners[where], factor


def _hooks(owners: Mapping[str, nn.Module]) -> Iterator[Multiply]:
    for module in owners.values():
        for registered in (module._forward_pre_hooks, module._forward_hooks):
            yield from (hook for hook in _values(registered) if isinstance(hook, Multiply))


def _values(registered: Mapping[int, Any]) -> list[Any]:
    return list(registered.values())


def _hook(module: nn.Module, factor: float) -> None:
    """Multiply the tensor a module owns: the output of a table, the input of anything else."""
    if isinstance(module, (nn.Embedding, layers.Embedding)):
        return _hook_output(module, factor)
    mine = next(
        (hook for hook in _values(module._forward_pre_hooks) if isinstance(hook, MultiplyInput)),
        None,
    )
    if mine is not None:
        mine.factor *= factor
    elif factor != 1:
        module.register_forward_pre_hook(MultiplyInput(factor), with_kwargs=True)


def _hook_output(module: nn.Module, factor: float) -> None:
    mine = next(
        (hook for hook in _values(module._forward_hooks) if type(hook) is MultiplyOutput), None
    )
    if mine is not None:
        mine.factor *= factor
    elif factor != 1:
        module.register_forward_hook(MultiplyOutput(factor))


def _hook_queries(module: nn.Module, found: Queries) -> None:
    mine = next(
        (hook for hook in _values(module._forward_hooks) if isinstance(hook, MultiplyFirst)), None
    )
    if mine is not None:
        mine.factor, mine.share = found.factor, found.share
    else:
        module.register_forward_hook(MultiplyFirst(found.factor, found.share))


def branches(plan: Plan, model: nn.Module) -> dict[str, float]:
    """Module -> the factor on the residual branch it ends: m_depth**-alpha (arXiv:2310.02244, arXiv:2505.01618)."""
    found = {}
    for name in modules(model):
        if any(fnmatchcase(name, pattern) for pattern in plan.branches):
            inside = {row.branch for row in plan.rows if row.name.startswith(f"{name}.")}
            if len(inside) == 1:
                found[name] = inside.pop()
    return found


def _agree(plan: Plan, model: nn.Module) -> None:
    """A model of the zoo multiplies by itself, as built from its recipe: refused unless by the plan's factors."""
    if plan.queries:
        raise UserError(
            "a zoo model scales its own softmax: keep `head_dim` as it is in the base, and have more heads"
        )
    owners, own = modules(model), acting(model)
    for name, factor in plan.multipliers().items():
        mine = own.get(name, 1.0)
        if abs(mine / factor - 1) > 1e-12:
            raise UserError(
                f"a zoo model multiplies by its recipe's own factors, but `{name}` by {mine:g} where the plan says {factor:g}"
            )
    for row in plan.rows:
        parts = row.name.split(".")
        around = (owners[".".join(parts[:n])] for n in range(len(parts) - 1, 0, -1))
        block = next((module for module in around if hasattr(module, "residual")), None)
        factor = None if block is None else float(block.residual)  # type: ignore[arg-type, assignment]
        if row.branch != 1 and (factor is None or abs(factor / row.branch - 1) > 1e-12):
            raise UserError(
                f"a zoo model multiplies its branches by its recipe's own factor, but the plan says {row.branch:g}"
            )


# --- initialisation --------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialise(plan: Plan, model: nn.Module, seed: int) -> None:
    """Draw each tensor N(0, init_std**2) from a generator seeded by its name, or multiply what the model drew; constants are put back."""
    plan.check(model)
    inner = unwrapped(model)
    parameters = named(model)
    if meta := next((name for name, parameter in parameters.items() if parameter.is_meta), None):
        raise UserError(
            f"a model must be materialised (`model.to_empty(device=...)`) before it is initialised, but `{meta}` is on meta"
        )
    if odd := next(
        (
            row.name
            for row in plan.rows
            if (row.init_value, row.init_std, row.init_scale) == (None, None, None)
        ),
        None,
    ):
        raise UserError(
            f"`{odd}` has no initialisation: the plan was made of models on the meta device, give `init_std` or an override"
        )
    rescales = any(row.init_scale not in (None, 1) for row in plan.rows)
    if rescales and hasattr(inner, MARK):
        raise UserError(
            "a plan without `init_std` rescales the model's own initialisation once, but this model has been rescaled already"
        )
    owners = modules(model)
    for row in plan.rows:
        padding = getattr(owners[row.name.rpartition(".")[0]], "padding_idx", None)
        _fill(row, parameters[row.name], seed, padding)
    if rescales:
        setattr(inner, MARK, plan.digest)


def _fill(row: Row, parameter: Tensor, seed: int, padding: int | None) -> None:
    if row.init_value is not None:
        parameter.fill_(row.init_value)
    elif row.init_std is not None:
        parameter.copy_(_drawn(parameter, seed, row.name, padding) * row.init_std)
    elif row.init_scale is not None:
        parameter.mul_(row.init_scale)


def _drawn(parameter: Tensor, seed: int, name: str, padding: int | None) -> Tensor:
    """Standard normal values of the whole tensor, of which a sharded one keeps its part: the same on any mesh."""
    values = torch.empty(parameter.shape, dtype=torch.float32).normal_(
        generator=generator(seed, name)
    )
    if padding is not None:
        values[padding] = 0  # an embedding's row that is never trained
    values = values.to(device=parameter.device, dtype=parameter.dtype)
    if "DTensor" in type(parameter).__name__ + type(parameter.data).__name__:
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter.data, DTensor)
        return distribute_tensor(
            values, parameter.data.device_mesh, parameter.data.placements, src_data_rank=None
        )
    return values


# --- param groups ----------------------------------------------------------------------------------------------------


def param_groups(plan: Plan, model: nn.Module, roles: Collection[str]) -> list[dict[str, Any]]:
    """{params, lr, initial_lr, weight_decay, eps}: one for each distinct setting, in the plan's order. A schedule multiplies `initial_lr`."""
    plan.check(model)
    parameters = named(model)
    made: dict[tuple[float, ...], dict[str, Any]] = {}
    for row in (row for row in plan.rows if row.role in roles):
        settings = {
            "lr": row.lr,
            "initial_lr": row.lr,
            "weight_decay": row.weight_decay,
        } | plan.extra(row)
        made.setdefault(tuple(settings.values()), {"params": [], **settings})["params"].append(
            parameters[row.name]
        )
    return list(made.values())
