"""Applies the rows of a plan to a model: forward hooks, initialisation and param groups.

A multiplier is a forward hook on the module that owns the tensor. The hook multiplies the output of
an embedding and the input of any other module, so that a bias keeps its scale. The factor of a
residual branch multiplies the branch's output. Hooks survive `copy.deepcopy` and add no key to the
`state_dict`; nothing is stored on tensors.

Limits: code that uses a weight without calling its module (`F.linear(x, self.head.weight)`) is not
multiplied. Attach the hooks before a compiled model runs for the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from scaletune.errors import UserError
from scaletune.models import ZOO, layers
from scaletune.models.build import applied_multipliers, generator
from scaletune.parametrizing.attention import QueryMultiplier
from scaletune.parametrizing.row import Row, multipliers
from scaletune.parametrizing.shapes import TensorUse, named_modules, named_tensors, unwrap

MARK = "_scaletune_initialised"
"""Attribute of the user's module: the digest of the plan that rescaled its initial values."""


class Multiply:
    """A hook that multiplies the first input, or the first output, of a module by `factor`."""

    def __init__(self, factor: float):
        self.factor = factor

    def _times(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return (self._times(value[0]), *value[1:])
        return value if self.factor == 1 else value * self.factor


class MultiplyInput(Multiply):
    """Multiplies the first input, positional or by keyword."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return self._times(args), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: self._times(kwargs[first])}


class MultiplyOutput(Multiply):
    """Multiplies the first output."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._times(output)


class MultiplyFirst(MultiplyOutput):
    """Multiplies the first `share` of the last dimension: the queries of a fused projection."""

    def __init__(self, factor: float, share: float):
        super().__init__(factor)
        self.share = share

    def _times(self, value: Any) -> Any:
        if self.factor == 1:
            return value
        cut = round(self.share * value.shape[-1])
        return torch.cat([value[..., :cut] * self.factor, value[..., cut:]], -1)


TORCH_LAYERS = (nn.Linear, nn.Embedding, _ConvNd)
ZOO_LAYERS = (layers.Linear, layers.Embedding, layers.Conv, layers.ExpertLinear)
LAYERS = (*TORCH_LAYERS, *ZOO_LAYERS)


def takes_multiplier(use: TensorUse) -> bool:
    """Whether a hook on the tensor's module multiplies this tensor and nothing else."""
    module = use.module
    if not use.name.endswith("weight"):
        return False
    if type(module).__name__ == "Conv1D":  # a linear layer of transformers
        return True
    # nn.MultiheadAttention never calls its NonDynamicallyQuantizableLinear
    return isinstance(module, LAYERS) and not isinstance(module, NonDynamicallyQuantizableLinear)


def readout_multiplier(use: TensorUse) -> float:
    """`output_mult` of mup's MuReadout, which `attach` turns into an `nn.Linear`; else 1."""
    if _is_mu_readout(use.module) and use.name.endswith("weight"):
        return float(getattr(use.module, "output_mult", 1.0))
    return 1.0


def _is_mu_readout(module: nn.Module) -> bool:
    return any(kind.__module__ == "mup.layer" for kind in type(module).__mro__)


def convert_from_mup(model: nn.Module) -> None:
    """Removes what the mup package added: MuReadout becomes `nn.Linear`, and infshapes go.

    The plan's multiplier replaces the one of MuReadout.
    """
    for module in named_modules(model).values():
        if _is_mu_readout(module):
            module.__class__ = nn.Linear
    for parameter in unwrap(model).parameters():
        parameter.__dict__.pop("infshape", None)


# --- hooks ----------------------------------------------------------------------------------------


def attach(
    model: nn.Module,
    rows: Sequence[Row],
    branches: Collection[str],
    queries: Collection[QueryMultiplier],
) -> None:
    """Hooks every multiplier to its module. A second call sets the same hooks again.

    `branches`: patterns of the modules whose output is a residual branch.
    """
    inner = unwrap(model)
    if isinstance(inner, ZOO):
        return _check_zoo_model(inner, rows, queries)
    convert_from_mup(model)
    owners = named_modules(model)
    for hook in _hooks(owners):
        hook.factor = 1.0
    for module, factor in _module_factors(rows, owners):
        _hook_tensor(module, factor)
    for name, factor in branch_factors(model, rows, branches).items():
        _hook_output(owners[name], factor)
    for query in queries:
        _hook_queries(owners[query.module], query)


def _module_factors(
    rows: Sequence[Row], owners: Mapping[str, nn.Module]
) -> Iterator[tuple[nn.Module, float]]:
    """The owner and the multiplier of each tensor, once for a module that has several names."""
    seen = set()
    for name, factor in multipliers(rows).items():
        where, _, tensor = name.rpartition(".")
        if (place := (id(owners[where]), tensor)) not in seen:
            seen.add(place)
            yield owners[where], factor


def module_multipliers(
    model: nn.Module,
    rows: Sequence[Row],
    branches: Collection[str],
    queries: Collection[QueryMultiplier],
) -> list[dict[str, Any]]:
    """What `attach` hooks to the modules of a model, as plain values.

    {"module", "where": "input" or "output", "factor", "share"}, without factors of 1.
    """
    owners = named_modules(model)
    first = {id(module): name for name, module in reversed(owners.items())}
    factors = [
        (first[id(module)], "output" if _is_table(module) else "input", factor, 1.0)
        for module, factor in _module_factors(rows, owners)
    ]
    factors += [
        (name, "output", factor, 1.0)
        for name, factor in branch_factors(model, rows, branches).items()
    ]
    factors += [(query.module, "output", query.factor, query.share) for query in queries]
    names = ("module", "where", "factor", "share")
    return [dict(zip(names, each, strict=True)) for each in factors if each[2] != 1]


def _is_table(module: nn.Module) -> bool:
    """Whether its input is indices, so that only its output can be multiplied."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag, layers.Embedding))


def _hooks(owners: Mapping[str, nn.Module]) -> Iterator[Multiply]:
    for module in owners.values():
        yield from multiply_hooks(module)


def multiply_hooks(module: nn.Module) -> Iterator[Multiply]:
    """The hooks of multipliers on a module."""
    for registered in (module._forward_pre_hooks, module._forward_hooks):
        hooks: list[Any] = list(registered.values())
        yield from (hook for hook in hooks if isinstance(hook, Multiply))


def _first_hook(registered: Mapping[int, Any], matches: Callable[[Any], bool]) -> Any:
    """The first hook for which `matches` holds, or None."""
    return next((hook for hook in registered.values() if matches(hook)), None)


def _hook_tensor(module: nn.Module, factor: float) -> None:
    """Multiplies the tensor that a module owns: output of an embedding, input of other modules."""
    if _is_table(module):
        return _hook_output(module, factor)
    own = _first_hook(module._forward_pre_hooks, lambda hook: isinstance(hook, MultiplyInput))
    if own is not None:
        own.factor *= factor
    elif factor != 1:
        module.register_forward_pre_hook(MultiplyInput(factor), with_kwargs=True)


def _hook_output(module: nn.Module, factor: float) -> None:
    own = _first_hook(module._forward_hooks, lambda hook: type(hook) is MultiplyOutput)
    if own is not None:
        own.factor *= factor
    elif factor != 1:
        module.register_forward_hook(MultiplyOutput(factor))


def _hook_queries(module: nn.Module, query: QueryMultiplier) -> None:
    own = _first_hook(module._forward_hooks, lambda hook: isinstance(hook, MultiplyFirst))
    if own is not None:
        own.factor, own.share = query.factor, query.share
    else:
        module.register_forward_hook(MultiplyFirst(query.factor, query.share))


def branch_factors(
    model: nn.Module, rows: Sequence[Row], branches: Collection[str]
) -> dict[str, float]:
    """Factor on the output of each module that ends a residual branch: m_depth**-alpha.

    Sources: arXiv:2310.02244, arXiv:2505.01618.
    """
    factors = {}
    for name in named_modules(model):
        if any(fnmatchcase(name, pattern) for pattern in branches):
            inside = {row.branch for row in rows if row.name.startswith(f"{name}.")}
            if len(inside) == 1:
                factors[name] = inside.pop()
    return factors


# --- models of the zoo ----------------------------------------------------------------------------


def _check_zoo_model(
    model: nn.Module, rows: Sequence[Row], queries: Collection[QueryMultiplier]
) -> None:
    """UserError unless a zoo model, which multiplies by itself, uses the factors of the plan."""
    if queries:
        raise UserError(
            "a model of the zoo scales its own softmax, so its head size must not grow: keep"
            " `head_dim` as in the base model and use more heads"
        )
    owners, own = named_modules(model), applied_multipliers(model)
    for name, factor in multipliers(rows).items():
        actual = own.get(name, 1.0)
        if abs(actual / factor - 1) > 1e-12:
            raise UserError(
                f"a model of the zoo applies the multipliers of its recipe, but `{name}` is"
                f" multiplied by {actual:g} and the plan needs {factor:g}: use the recipe's form"
            )
    for row in rows:
        residual = _residual_factor(row.name, owners)
        if row.branch != 1 and (residual is None or abs(residual / row.branch - 1) > 1e-12):
            raise UserError(
                "a model of the zoo multiplies its residual branches by the factor of its recipe,"
                f" but the plan needs {row.branch:g}: use the recipe's `depth_alpha`"
            )


def _residual_factor(tensor: str, owners: Mapping[str, nn.Module]) -> float | None:
    """The branch factor of the innermost block that contains the tensor; None outside blocks."""
    parts = tensor.split(".")
    around = (owners[".".join(parts[:n])] for n in range(len(parts) - 1, 0, -1))
    block = next((module for module in around if hasattr(module, "residual")), None)
    return None if block is None else float(block.residual)  # type: ignore[arg-type]


# --- initialisation -------------------------------------------------------------------------------


@torch.no_grad()
def initialise(model: nn.Module, rows: Sequence[Row], seed: int, digest: str) -> None:
    """Fills every tensor as its row says; each tensor has a generator seeded by `seed` and name."""
    inner, parameters = unwrap(model), named_tensors(model)
    _check_can_initialise(inner, parameters, rows)
    padding = padding_rows(model)
    for row in rows:
        _fill(row, parameters[row.name], seed, padding[row.name])
    if _rescales(rows):
        setattr(inner, MARK, digest)


def padding_rows(model: nn.Module) -> dict[str, int | None]:
    """Tensor name -> the row of an embedding that is never trained and stays zero, or None."""
    owners = named_modules(model)
    return {
        name: getattr(owners[name.rpartition(".")[0]], "padding_idx", None)
        for name in named_tensors(model)
    }


def _rescales(rows: Sequence[Row]) -> bool:
    """Whether initialising multiplies values that the model itself drew."""
    return any(row.init_scale not in (None, 1) for row in rows)


def _check_can_initialise(
    inner: nn.Module, parameters: Mapping[str, Tensor], rows: Sequence[Row]
) -> None:
    if meta := next((name for name, parameter in parameters.items() if parameter.is_meta), None):
        raise UserError(
            f"`{meta}` is on the meta device: a model must be materialised before it is"
            " initialised, for example with `model.to_empty(device=...)`"
        )
    unset = (None, None, None)
    for row in rows:
        if (row.init_value, row.init_std, row.init_scale) == unset:
            raise UserError(
                f"`{row.name}` has no initialisation, because the plan was made from a model on the"
                " meta device: give `init_std` to `parametrize`, or an override with `init_std`"
            )
    if _rescales(rows) and hasattr(inner, MARK):
        raise UserError(
            "this model has been rescaled already: a plan without `init_std` rescales the model's"
            " own initial values, so it works once, on a fresh model"
        )


def _fill(row: Row, parameter: Tensor, seed: int, padding: int | None) -> None:
    if row.init_value is not None:
        parameter.fill_(row.init_value)
    elif row.init_std is not None:
        parameter.copy_(_draw_normal(parameter, seed, row.name, padding) * row.init_std)
    elif row.init_scale is not None:
        parameter.mul_(row.init_scale)


def _draw_normal(parameter: Tensor, seed: int, name: str, padding: int | None) -> Tensor:
    """Standard normal values. A sharded tensor gets its part of the same draw on any mesh."""
    values = torch.empty(parameter.shape, dtype=torch.float32).normal_(
        generator=generator(seed, name)
    )
    if padding is not None:
        values[padding] = 0  # this row of an embedding is never trained
    values = values.to(device=parameter.device, dtype=parameter.dtype)
    if "DTensor" in type(parameter).__name__ + type(parameter.data).__name__:
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter.data, DTensor)
        return distribute_tensor(
            values, parameter.data.device_mesh, parameter.data.placements, src_data_rank=None
        )
    return values


# --- param groups ---------------------------------------------------------------------------------


def param_groups(
    model: nn.Module, rows: Sequence[Row], extra: Callable[[Row], dict[str, Any]]
) -> list[dict[str, Any]]:
    """One group {params, lr, initial_lr, weight_decay, ...} for each distinct setting, in order.

    `extra` gives further settings of a row's group.
    """
    parameters = named_tensors(model)
    groups: dict[tuple[float, ...], dict[str, Any]] = {}
    for row in rows:
        rates = {"lr": row.lr, "initial_lr": row.lr, "weight_decay": row.weight_decay}
        settings = rates | extra(row)
        group = groups.setdefault(tuple(settings.values()), {"params": [], **settings})
        group["params"].append(parameters[row.name])
    return list(groups.values())
