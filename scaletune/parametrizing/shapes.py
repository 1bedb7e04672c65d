"""Tensors of a model by name, where each is used, and how its shape grew from the base model.

Growth uses the algebra of the mup package (`InfShape`: per dimension a base size, or None where it
does not grow; arXiv:2203.03466). The module that owns a tensor says which dimension is the fan-in.
Names are those of the user's model without the prefixes that wrappers add.
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
Dims = tuple[tuple[int | None, int], ...]
"""(size in the base, size) of each dimension; the base size is None where it does not grow."""


@dataclass(frozen=True)
class TensorUse:
    """One use of a tensor. A tied tensor has several."""

    name: str
    """Dotted name of the tensor in this use."""

    module: nn.Module
    """The module that owns it."""

    axes: Axes
    """(fan-in axis, fan-out axis); fan-in None for a vector; None if the layout is not known."""

    @property
    def module_name(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.module, (nn.Embedding, nn.EmbeddingBag, layers.Embedding))


def strip_wrappers(name: str) -> str:
    """A dotted name without the parts that `torch.compile` and FSDP insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DDP and similar wrappers, `torch.compile` and FSDP.

    The only child of such a wrapper is called `module` or has one of the names in WRAPPERS.
    """
    while len(children := dict(model.named_children())) == 1 and not list(
        model.parameters(recurse=False)
    ):
        if (name := next(iter(children))) not in (*WRAPPERS, "module"):
            break
        model = children[name]
    return model


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name without wrappers. A tied tensor appears once."""
    parameters = unwrap(model).named_parameters()
    return {strip_wrappers(name): parameter for name, parameter in parameters}


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name without wrappers. A wrapper inside the model is replaced by its content."""
    modules = unwrap(model).named_modules(remove_duplicate=False)
    return {strip_wrappers(name): module for name, module in modules}


def tensor_uses(model: nn.Module) -> dict[str, list[TensorUse]]:
    """All uses of each tensor, keyed by its first name: two for a tied readout."""
    first = {id(parameter): name for name, parameter in named_tensors(model).items()}
    owners = named_modules(model)
    uses: dict[str, list[TensorUse]] = {name: [] for name in first.values()}
    for raw, parameter in unwrap(model).named_parameters(remove_duplicate=False):
        name = strip_wrappers(raw)
        where, _, tensor = name.rpartition(".")
        axes = _axes(owners[where], tensor, parameter.ndim)
        uses[first[id(parameter)]].append(TensorUse(name, owners[where], axes))
    return uses


ZOO_AXES = {
    layers.Linear: (2, 1),
    layers.Embedding: (1, 2),
    layers.Conv: (2, 1),
    layers.ExpertLinear: (3, 2),
}
"""(fan-in axis, fan-out axis) in the layers of the zoo, whose axis 0 is the trials of a stack."""
NORMS = (layers.RMSNorm, layers.LayerNorm, layers.GroupNorm)
OUT_IN = (nn.Linear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
IN_OUT = (nn.Embedding, nn.EmbeddingBag, _ConvTransposeNd)


def _axes(module: nn.Module, tensor: str, ndim: int) -> Axes:
    """The axes of a module's tensor with `ndim` dimensions, as in `TensorUse.axes`."""
    kind = next((kind for kind in ZOO_AXES if isinstance(module, kind)), None)
    if kind or isinstance(module, NORMS):
        return ZOO_AXES[kind] if kind and ndim > 2 else (None, 1)
    if ndim < 2 or "weight" not in tensor:
        return (None, 0) if ndim == 1 else None
    if isinstance(module, IN_OUT) or type(module).__name__ == "Conv1D":  # linear of transformers
        return 0, 1
    return (1, 0) if isinstance(module, OUT_IN) else None


# --- growth ---------------------------------------------------------------------------------------


def name_pattern(name: str) -> str:
    """The name with `*` in place of numbers: `layers.3.weight` -> `layers.*.weight`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def shapes_of(source: Any) -> dict[str, Any]:
    """Sizes by tensor name (or mup's InfShape) of a model, a mapping or a base-shapes file."""
    if isinstance(source, nn.Module):
        return {name: tuple(parameter.shape) for name, parameter in named_tensors(source).items()}
    return dict(source) if isinstance(source, Mapping) else _read_base_shapes(Path(source))


def _read_base_shapes(path: Path) -> dict[str, Any]:
    """A `.bsh` file of the mup package."""
    from mup.shape import load_base_shapes

    try:
        return load_base_shapes(str(path))
    except OSError:
        raise UserError(
            "`base` must be a model, a callable, a config or an existing base-shapes file, but got"
            f" `{path}`"
        ) from None
    except Exception:  # errors of yaml, and of a file that is not a mapping of lists
        raise UserError(
            f"`{path}` must be a base-shapes file as the mup package writes it"
        ) from None


def build_base(base: Any, model: nn.Module) -> Any:
    """The base: a model, shapes or a path as given; else built on the meta device.

    A callable is called; any other object is the argument of the model's class (a config).
    """
    if isinstance(base, (nn.Module, Mapping, str, Path)):
        return base
    with torch.device("meta"):
        base = base() if callable(base) else _build_from_config(type(unwrap(model)), base)
    if not isinstance(base, nn.Module):
        raise UserError(f"`base` must build a model, but it built {type(base).__name__}")
    return base


def _build_from_config(kind: type, config: Any) -> Any:
    try:
        return kind(config)
    except Exception as error:  # a constructor may raise anything for a wrong argument
        raise UserError(
            f"`base` must build a model, but {kind.__name__}({config!r}) raised"
            f" {type(error).__name__}"
        ) from error


def shape_growth(model: nn.Module, base: Any, delta: Any = None) -> dict[str, Dims]:
    """Base size and size of each dimension of each tensor.

    A layer that the base lacks has the shape of the base's layers with the same name pattern.
    `delta`: a wider base, as in mup; then the model may have the size of the base.
    """
    from mup.infshape import zip_infshape

    target, known = shapes_of(model), shapes_of(base)
    if delta is not None:
        wider = shapes_of(delta)
        known = {
            name: zip_infshape(shape, _base_shape(name, wider, shape))
            for name, shape in known.items()
        }
    shapes = {
        name: zip_infshape(_base_shape(name, known, shape), shape) for name, shape in target.items()
    }
    if missing := {name_pattern(name) for name in known} - {name_pattern(name) for name in target}:
        raise UserError(
            "base and model must have the same tensors, but only the base has"
            f" `{min(missing)}`: build both with the same code"
        )
    return {name: tuple((dim.base_dim, dim.dim) for dim in shape) for name, shape in shapes.items()}


def read_infshapes(model: nn.Module) -> dict[str, Dims]:
    """The growth stored by `mup.set_base_shapes`. UserError if it is missing or out of date."""
    shapes: dict[str, Dims] = {}
    for name, parameter in named_tensors(model).items():
        if (shape := getattr(parameter, "infshape", None)) is None:
            raise UserError(
                '`base="mup"` needs a model on which mup.set_base_shapes was called, but'
                f" `{name}` has no infshape"
            )
        if list(shape.shape()) != list(parameter.shape):
            raise UserError(
                f"`{name}` must have the shape of its infshape, {shape.shape()}, but has"
                f" {list(parameter.shape)}: call mup.set_base_shapes again"
            )
        shapes[name] = tuple((dim.base_dim, dim.dim) for dim in shape)
    return shapes


def _base_shape(name: str, known: Mapping[str, Any], shape: Any) -> Any:
    """The base shape of this name, or of all names that differ only in layer numbers."""
    pattern = name_pattern(name)
    names = [name] if name in known else [each for each in known if name_pattern(each) == pattern]
    if not names:
        raise UserError(
            f"base and model must have the same tensors, but only the model has `{name}`: build"
            " both with the same code"
        )
    first, *others = (known[each] for each in names)
    if any(other != first for other in others):
        raise UserError(
            f"only the model has `{name}`, and the base's tensors `{pattern}` have several shapes:"
            " use a base with the same number of layers"
        )
    if len(first) != len(shape):
        raise UserError(
            f"`{name}` must have the same number of dimensions in base and model, but got"
            f" {len(first)} and {len(shape)}"
        )
    return first


def depth_ratios(target: Iterable[str], base: Iterable[str]) -> dict[str, Fraction]:
    """For each tensor, the number of blocks around it divided by that number in the base.

    It is 1 for tensors outside blocks. A block is a numbered child, as in `layers.3`.
    """
    target = list(target)
    counts, base_counts = _count_blocks(target), _count_blocks(base)
    growth = {
        where: Fraction(count, base_counts[where])
        for where, count in counts.items()
        if where in base_counts
    }
    result = {}
    for name in target:
        ratios = [growth[where] for where, _ in _blocks_around(name) if growth.get(where, 1) != 1]
        if len(ratios) > 1:
            raise UserError(
                f"depth must grow in one list of blocks, but `{name}` is inside two lists that grow"
            )
        result[name] = ratios[0] if ratios else Fraction(1)
    return result


def _blocks_around(name: str) -> Iterator[tuple[str, str]]:
    """(pattern of the list, name of the block) for each block that contains the tensor."""
    parts = name.split(".")
    return (
        (name_pattern(".".join(parts[:i])), ".".join(parts[: i + 1]))
        for i, part in enumerate(parts)
        if part.isdigit()
    )


def _count_blocks(names: Iterable[str]) -> dict[str, int]:
    """Number of blocks in each list, by the list's name pattern."""
    blocks: dict[str, set[str]] = {}
    for name in names:
        for where, block in _blocks_around(name):
            blocks.setdefault(where, set()).add(block)
    return {where: len(children) for where, children in blocks.items()}
