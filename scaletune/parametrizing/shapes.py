"""A model's tensors by name, where each is used, and how its shape grew since the base model.

Growth is `mup`'s algebra (`InfShape`: per dimension a base size, or none where it does not grow; arXiv:2203.03466). Which dimension is the
fan-in is the owning module's layout. Names are those of the user's model, whatever wraps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from scaletune.errors import UserError
from scaletune.models import layers

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
Axes = tuple[int | None, int] | None
Dims = tuple[
    tuple[int | None, int], ...
]  # (base size or None: does not grow, size) of each dimension


@dataclass(frozen=True)
class Use:
    """One place where a tensor is used: its dotted name, the module that owns it, (fan-in axis, fan-out axis) or None where unknown."""

    name: str
    module: nn.Module
    axes: Axes

    @property
    def module_name(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def looks_up(self) -> bool:
        return isinstance(self.module, (nn.Embedding, nn.EmbeddingBag, layers.Embedding))


def plain(name: str) -> str:
    """A parameter's or module's name without what DDP, `torch.compile` and FSDP put around modules."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside DDP and its likes (their only child is `module`), `torch.compile` and FSDP."""
    while len(children := dict(model.named_children())) == 1 and not list(
        model.parameters(recurse=False)
    ):
        if (name := next(iter(children))) not in (*WRAPPERS, "module"):
            break
        model = children[name]
    return model


def named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by plain name, each tensor once."""
    return {plain(name): parameter for name, parameter in unwrapped(model).named_parameters()}


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by plain name; a wrapper inside the model gives way to what it wraps."""
    return {
        plain(name): module
        for name, module in unwrapped(model).named_modules(remove_duplicate=False)
    }


def uses(model: nn.Module) -> dict[str, list[Use]]:
    """Every tensor's uses, keyed by its first name: two for a tied head."""
    first = {id(parameter): name for name, parameter in named(model).items()}
    owners = modules(model)
    found: dict[str, list[Use]] = {name: [] for name in first.values()}
    for raw, parameter in unwrapped(model).named_parameters(remove_duplicate=False):
        name = plain(raw)
        owner = owners[name.rpartition(".")[0]]
        found[first[id(parameter)]].append(
            Use(name, owner, _axes(owner, name.rpartition(".")[2], parameter.ndim))
        )
    return found


def _axes(module: nn.Module, tensor: str, ndim: int) -> Axes:
    """(fan-in axis, fan-out axis) of a module's tensor with `ndim` dimensions; fan-in None: a vector; None: a layout we do not know."""
    zoo = {
        layers.Linear: (2, 1),
        layers.Embedding: (1, 2),
        layers.Conv: (2, 1),
        layers.ExpertLinear: (3, 2),
    }  # axis 0 is the trials'
    kind = next((kind for kind in zoo if isinstance(module, kind)), None)
    if kind or isinstance(module, (layers.RMSNorm, layers.LayerNorm, layers.GroupNorm)):
        return zoo[kind] if kind and ndim > 2 else (None, 1)
    if ndim < 2 or "weight" not in tensor:
        return (None, 0) if ndim == 1 else None
    transformers_conv1d = type(module).__name__ == "Conv1D"  # a linear layer
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag, _ConvTransposeNd)) or transformers_conv1d:
        return 0, 1
    return (
        (1, 0)
        if isinstance(
            module, (nn.Linear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
        )
        else None
    )


# --- growth ----------------------------------------------------------------------------------------------------------


def skeleton(name: str) -> str:
    """`layers.3.weight` -> `layers.*.weight`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def shapes_of(source: Any) -> dict[str, Any]:
    """name -> sizes, or mup's InfShape, of a model, a mapping of shapes or a base-shapes file."""
    if isinstance(source, nn.Module):
        return {name: tuple(parameter.shape) for name, parameter in named(source).items()}
    return dict(source) if isinstance(source, Mapping) else _base_shapes_file(Path(source))


def _base_shapes_file(path: Path) -> dict[str, Any]:
    """A `.bsh` file as the mup package writes it."""
    from mup.shape import load_base_shapes

    try:
        return load_base_shapes(str(path))
    except OSError:
        raise UserError(
            f"`base` must be a model, a callable, a config or a base-shapes file that exists, but got `{path}`"
        ) from None
    except Exception:  # yaml's own errors, and whatever a file that is no mapping of lists leads to
        raise UserError(
            f"`{path}` must be a base-shapes file as the mup package writes it"
        ) from None


def built(base: Any, model: nn.Module) -> Any:
    """`base` as given, but a callable called, and a config given to the model's own class, on the meta device."""
    if isinstance(base, (nn.Module, Mapping, str, Path)):
        return base
    with torch.device("meta"):
        base = base() if callable(base) else _of_config(type(unwrapped(model)), base)
    if not isinstance(base, nn.Module):
        raise UserError(f"`base` must build a model, but it built {type(base).__name__}")
    return base


def _of_config(kind: type, config: Any) -> Any:
    """A model of the target's class from its one argument."""
    try:
        return kind(config)
    except Exception as error:  # whatever a constructor says of what is no config of its
        raise UserError(
            f"`base` must build a model, but {kind.__name__}({config!r}) raised {type(error).__name__}"
        ) from error


def growth(model: nn.Module, base: Any, delta: Any = None) -> dict[str, Dims]:
    """(base size or None, size) of each dimension of each tensor; a layer that the base lacks is like the base's layers of that name."""
    from mup.infshape import zip_infshape

    target, known = shapes_of(model), shapes_of(base)
    if delta is not None:
        wider = shapes_of(delta)
        known = {
            name: zip_infshape(shape, _alike(name, wider, shape)) for name, shape in known.items()
        }
    found = {
        name: zip_infshape(_alike(name, known, shape), shape) for name, shape in target.items()
    }
    missing = {skeleton(name) for name in known} - {skeleton(name) for name in target}
    if missing:
        raise UserError(
            f"base and target must have the same tensors, but only the base has `{min(missing)}`"
        )
    return {name: tuple((dim.base_dim, dim.dim) for dim in shape) for name, shape in found.items()}


def prepared(model: nn.Module) -> dict[str, Dims]:
    """The same off a model that `mup.set_base_shapes` prepared; UserError when it, or its shapes, are not there (any more)."""
    found: dict[str, Dims] = {}
    for name, parameter in named(model).items():
        if (shape := getattr(parameter, "infshape", None)) is None:
            raise UserError(
                f'`base="mup"` needs a model that mup.set_base_shapes prepared, but `{name}` has no infshape'
            )
        if list(shape.shape()) != list(parameter.shape):
            raise UserError(
                f"`{name}` must have the shape its infshape says, {shape.shape()}, but has {list(parameter.shape)}"
            )
        found[name] = tuple((dim.base_dim, dim.dim) for dim in shape)
    return found


def _alike(name: str, known: Mapping[str, Any], shape: Any) -> Any:
    """The shape of that name, or of all the layers whose names differ in their numbers only."""
    others = (
        [known[name]]
        if name in known
        else [known[other] for other in known if skeleton(other) == skeleton(name)]
    )
    if not others:
        raise UserError(
            f"base and target must have the same tensors, but `{name}` is in the target alone"
        )
    if any(other != others[0] for other in others):
        raise UserError(
            f"`{name}` is in the target alone, and the base's tensors of like name differ in shape: declare a base of that depth"
        )
    if len(others[0]) != len(shape):
        raise UserError(
            f"`{name}` must have as many dimensions in the base and in the target, but got {len(others[0])} and {len(shape)}"
        )
    return others[0]


def depths(target: Iterable[str], base: Iterable[str]) -> dict[str, Fraction]:
    """Tensor -> how many times more blocks than in the base its numbered container has: 1 outside blocks."""
    counts = [_blocks(target), _blocks(base)]
    grown = {
        where: Fraction(len(found), len(counts[1][where]))
        for where, found in counts[0].items()
        if where in counts[1]
    }
    result = {}
    for name in target:
        ratios = [grown[where] for where, _ in _numbered(name) if grown.get(where, 1) != 1]
        if len(ratios) > 1:
            raise UserError(
                f"depth must grow in one list of blocks, but `{name}` lies in two that do"
            )
        result[name] = ratios[0] if ratios else Fraction(1)
    return result


def _numbered(name: str) -> Iterator[tuple[str, str]]:
    parts = name.split(".")
    return (
        (skeleton(".".join(parts[:i])), ".".join(parts[: i + 1]))
        for i, part in enumerate(parts)
        if part.isdigit()
    )


def _blocks(names: Iterable[str]) -> dict[str, set[str]]:
    """Container's skeleton -> its numbered children."""
    found: dict[str, set[str]] = {}
    for name in names:
        for where, child in _numbered(name):
            found.setdefault(where, set()).add(child)
    return found
