"""Roles and ratios from shapes that grew, with declarations for what shapes cannot say; what nothing explains is refused, by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, get_args

from torch.nn.modules.conv import _ConvNd

from scaletune.errors import UserError, nearest
from scaletune.parametrizing.shapes import Axes, Dims, Use, skeleton
from scaletune.rules import Role


@dataclass(frozen=True)
class Declared:
    """What a user says of the tensors a pattern names; None: read it off the shapes, or take the plan's own setting."""

    role: Role | None = None
    fan_in: int | None = (
        None  # the axis of the true fan-in: experts (E, in, out) have fan_in 1, fan_out 2
    )
    fan_out: int | None = None
    m_in: float | None = None  # ratios to the base model, in place of the axes'
    m_out: float | None = None
    multiplier: float | None = None  # at the base size, as are all below
    init_std: float | None = None
    lr: float | None = None
    weight_decay: float | None = None
    eps: float | None = None


@dataclass(frozen=True)
class Read:
    """A tensor's role and ratios in one of its uses."""

    role: Role
    m_in: Fraction | float = Fraction(1)
    m_out: Fraction | float = Fraction(1)
    fans: tuple[int, int] = (1, 1)  # (fan-in, fan-out) of the target


MAY_BE_ZERO = ("fan_in", "fan_out", "init_std", "weight_decay")

# --- declarations ----------------------------------------------------------------------------------------------------


def declarations(overrides: Mapping[str, Any], names: Iterable[str]) -> dict[str, Declared]:
    """Tensor -> what the patterns that match it say, a later one over an earlier; UserError for a pattern that matches none."""
    names, found = list(names), dict.fromkeys(names, Declared())
    for pattern, said in overrides.items():
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise UserError(
                f"an override must name a tensor of the model, but `{pattern}` names none{nearest(pattern, names)}"
            )
        values = _said(pattern, said)
        found |= {name: replace(found[name], **values) for name in matching}
    return found


def _said(pattern: str, said: Any) -> dict[str, Any]:
    """A role alone, or a table of `Declared`'s fields."""
    values = {"role": said} if isinstance(said, str) else dict(said)
    known = [field.name for field in fields(Declared)]
    for key, value in values.items():
        if key not in known:
            raise UserError(
                f"unknown key `{key}` in the override of `{pattern}`{nearest(key, known)}"
            )
        if key == "role":
            if value not in get_args(Role):
                raise UserError(
                    f"`role` of `{pattern}` must be one we know, but got {value!r}{nearest(str(value), get_args(Role))}"
                )
        elif (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or value < 0
            or (value == 0 and key not in MAY_BE_ZERO)
        ):
            raise UserError(
                f"`{key}` of `{pattern}` must be a number {'of at least' if key in MAY_BE_ZERO else 'above'} 0, but got {value!r}"
            )
    return values


# --- roles -----------------------------------------------------------------------------------------------------------

CUSTOMARY: tuple[tuple[str, Role], ...] = (  # what names say where shapes cannot
    ("*k_proj.weight", "hid"), ("*v_proj.weight", "hid"),  # with a fixed number of key-value heads their fan-out does not grow
    ("*pos*", "emb"), ("*embed*", "emb"), ("*token*", "emb"),  # positions and class tokens that are bare parameters
)  # fmt: skip


def roles(
    shapes: Mapping[str, Dims], used: Mapping[str, list[Use]], declared: Mapping[str, Declared]
) -> dict[str, list[Read]]:
    """Each tensor's role and ratios, one for each use. UserError, naming the tensor, for a growth that nothing explains."""
    if not any(base is not None for shape in shapes.values() for base, _ in shape):
        raise UserError(
            "base and target must differ in width, but every shape is the same (`delta=`, a wider model, says which dimensions grow)"
        )
    found = {
        name: [_read(use, shapes[name], declared[name]) for use in used[name]] for name in shapes
    }
    _explained(found, shapes, used, declared)
    return found


def _growing(shape: Dims) -> dict[int, Fraction]:
    """Axis -> ratio of the dimensions that grow."""
    return {i: Fraction(size, base) for i, (base, size) in enumerate(shape) if base is not None}


def _read(use: Use, shape: Dims, said: Declared) -> Read:
    grows = _growing(shape)
    axes = (
        use.axes
        if said.fan_in is None and said.fan_out is None
        else _declared_axes(use, shape, said)
    )
    wide = [i for i, (_, size) in enumerate(shape) if size != 1 or i in grows]
    if axes is None and len(wide) < 2:
        axes = (None, wide[0] if wide else 0)  # (1, 1, width): a vector
    role = said.role or _inferred(use, shape, grows, axes)
    m_in, m_out = _ratios(use, shape, grows, axes, role)
    fans = (1, 1)
    if axes is not None and axes[0] is not None:
        fans = (shape[axes[0]][1] * _kernel(use, shape), shape[axes[1]][1] * _kernel(use, shape))
    return Read(role, said.m_in or m_in, said.m_out or m_out, fans)


def _ratios(
    use: Use, shape: Dims, grows: Mapping[int, Fraction], axes: Axes, role: Role
) -> tuple[Fraction, Fraction]:
    """(m_in, m_out). The finite side of a hidden matrix (key-value heads, experts) counts as its other side does."""
    if axes is None or axes[0] is None:
        if len(set(grows.values())) > 1:
            raise UserError(
                f"`{use.name}` {_written(shape)} grows by two ratios: declare its axes, `fan_in` and `fan_out`"
            )
        m = next(iter(grows.values()), Fraction(1))
        return (m if role in ("hid", "out") else Fraction(1)), (Fraction(1) if role == "out" else m)
    m_in, m_out = (grows.get(axis, Fraction(1)) for axis in axes if axis is not None)
    if role == "hid" and len(set(axes) & grows.keys()) == 1:
        return (m_in, m_in) if axes[0] in grows else (m_out, m_out)
    return m_in, m_out


def _kernel(use: Use, shape: Dims) -> int:
    """Taps of a convolution's kernel, 1 for any other module."""
    return math.prod(size for _, size in shape[2:]) if isinstance(use.module, _ConvNd) else 1


def _declared_axes(use: Use, shape: Dims, said: Declared) -> tuple[int, int]:
    """Both axes: declared, or from the module's layout where only one of them is."""
    fan_in, fan_out = use.axes or (None, None)
    fan_in, fan_out = (
        (fan_in if said.fan_in is None else said.fan_in),
        (fan_out if said.fan_out is None else said.fan_out),
    )
    if fan_in is None or fan_out is None or fan_in == fan_out or max(fan_in, fan_out) >= len(shape):
        raise UserError(
            f"`{use.name}` needs two different axes `fan_in` and `fan_out` below {len(shape)}, but got {fan_in} and {fan_out}"
        )
    return fan_in, fan_out


def _inferred(use: Use, shape: Dims, grows: Mapping[int, Fraction], axes: Axes) -> Role:
    """The role that shapes imply: which of fan-in and fan-out grow."""
    if not grows:
        return "fin"
    customary = next((role for pattern, role in CUSTOMARY if fnmatchcase(use.name, pattern)), None)
    if axes is None:
        return _bare(use, shape, grows, customary)
    if odd := sorted(grows.keys() - set(axes)):
        raise _unexplained(use.name, shape, f"dimension {odd[0]}")
    if use.looks_up and axes[0] in grows:
        raise _unexplained(use.name, shape, "its vocabulary")
    if axes[0] is None:
        return "vec"
    if axes[0] in grows:
        return "hid" if axes[1] in grows or customary == "hid" else "out"
    return "emb"


def _bare(use: Use, shape: Dims, grows: Mapping[int, Fraction], customary: Role | None) -> Role:
    """A tensor whose module's layout we do not know: hidden where both ratios agree, else what its name says, else refused."""
    if len(grows) > 2:
        raise UserError(
            f"`{use.name}` {_written(shape)} grows in {len(grows)} dimensions: declare its role, `fan_in` and `fan_out`"
        )
    if len(grows) == 2 and len(set(grows.values())) == 1:
        return "hid"
    if len(grows) == 1 and customary == "emb" and len(shape) - 1 in grows:
        return "emb"
    raise UserError(
        f"`{use.name}` {_written(shape)} belongs to a {type(use.module).__name__}, whose layout we do not know: declare its role"
    )


def _explained(
    found: Mapping[str, list[Read]],
    shapes: Mapping[str, Dims],
    used: Mapping[str, list[Use]],
    declared: Mapping[str, Declared],
) -> None:
    """Every undeclared growth must be met elsewhere: a fan-out that grows is some tensor's fan-in, and the other way round."""
    taken = {
        read.m_in for reads in found.values() for read in reads if read.role in ("hid", "out")
    } | {1}
    given = {
        read.m_out for reads in found.values() for read in reads if read.role in ("hid", "emb")
    } | {1}
    heads = _readouts(found)
    vocabularies = {
        shapes[name][use.axes[0] or 0]
        for name in found
        for use in used[name]
        if use.looks_up and use.axes
    }
    for name, reads in found.items():
        if declared[name].role or declared[name].fan_in is not None:
            continue
        for use, read in zip(used[name], reads, strict=True):
            if (
                read.role == "hid"
                and use.axes
                and (pair := shapes[name][use.axes[1]]) in vocabularies
                and pair[0] is not None
            ):
                raise _unexplained(use.name, shapes[name], "the vocabulary")
            if skeleton(use.name) in heads:
                raise UserError(
                    f"`{use.name}` {_written(shapes[name])} looks like a readout inside a block: declare its role, `out` or `hid`"
                )
            _met(use.name, read, shapes[name], given, taken)


def _met(name: str, read: Read, shape: Dims, given: set[Any], taken: set[Any]) -> None:
    """UserError unless the ratios of a tensor are found on the other side of another."""
    if read.role in ("hid", "emb") and read.m_out not in taken:
        raise _unexplained(
            name, shape, f"its fan-out (times {float(read.m_out):g}, which is no tensor's fan-in)"
        )
    if read.role in ("hid", "out") and read.m_in not in given:
        raise _unexplained(
            name, shape, f"its fan-in (times {float(read.m_in):g}, which is no tensor's fan-out)"
        )
    if read.role == "vec" and read.m_out not in given | taken:
        raise _unexplained(
            name, shape, f"its only dimension (times {float(read.m_out):g}, as no matrix does)"
        )


def _readouts(found: Mapping[str, list[Read]]) -> set[str]:
    """Names up to their numbers of which there are several, all of them readouts: no model has its head in every block."""
    kinds: dict[str, list[str]] = {}
    for name, reads in found.items():
        kinds.setdefault(skeleton(name), []).append(reads[0].role)
    return {
        skeleton
        for skeleton, all_roles in kinds.items()
        if len(all_roles) > 1 and set(all_roles) == {"out"}
    }


def _written(shape: Dims) -> str:
    """(32 -> 64, 10): base and target sizes."""
    return (
        "("
        + ", ".join(f"{base} -> {size}" if base is not None else f"{size}" for base, size in shape)
        + ")"
    )


def _unexplained(name: str, shape: Dims, where: str) -> UserError:
    return UserError(
        f"`{name}` {_written(shape)} grows in {where}, which nothing explains: mend the base, or declare its role"
    )
