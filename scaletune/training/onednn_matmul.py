"""float32 matrix products by oneDNN, on processors where torch's own library leaves half of the arithmetic units idle.

torch multiplies float32 matrices with MKL, which runs its 256-bit kernels on AMD processors that have 512-bit units; oneDNN, which torch
ships as well, is asked only where bfloat16 would be allowed ("medium" matmul precision). Without matrix tiles (AMX) it has no bfloat16
kernel for float32 input and computes in float32. `torch.nn.attention`'s tiled kernel would then call it once a tile, so attention is two
whole products, quadratic in memory: sequences are short where this applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scaletune import zoo
from scaletune.recipe import Recipe

POSITIONS = 128  # longest sequence whose attention is two whole products
PAYS = (
    2**14
)  # rows of a product times the width from which on it is quicker: below, oneDNN's start of each call outweighs its kernel
ROUNDING = 1e-5  # of the largest entry: float32 errs by 1e-6 here, bfloat16 by 4e-3
CPUINFO = Path("/proc/cpuinfo")


@contextmanager
def quick(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Multiply by oneDNN in the block, where that is quicker and still float32; torch's settings are as they were afterwards."""
    if not applies(recipe, device):
        yield
        return
    with _by_onednn(), sdpa_kernel(SDPBackend.MATH), _own_graphs():
        yield


@contextmanager
def _by_onednn() -> Iterator[None]:
    """Ask for oneDNN in the block, where torch's precision is as it comes."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _own_graphs() -> AbstractContextManager:
    """The compiler's cache knows a model's code, not which attention it was compiled with: a key of our own beside the user's."""
    config: Any = getattr(torch.compiler, "config", None)  # not in every version
    return (
        config.patch(cache_key_tag=f"{config.cache_key_tag}whole")
        if hasattr(config, "cache_key_tag")
        else nullcontext()
    )


def applies(recipe: Recipe, device: torch.device) -> bool:
    """Whether the recipe trains quicker so on this processor, and torch's precision is as it comes. Whatever the stack: the same bits."""
    if device.type != "cpu" or recipe.training.precision != "float32" or not _pays(recipe):
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest" and _able()
    except RuntimeError:  # set by backend, which this one call cannot express
        return False


def _pays(recipe: Recipe) -> bool:
    """Dense blocks of attention, large enough (`benchmarks/stacked_steps.py`); MLPs, experts and convolutions gain nothing."""
    model, parts = recipe.model, recipe.engine.accumulation * recipe.engine.processes
    if isinstance(model, zoo.Transformer):
        rows, positions = recipe.budget.batch_tokens // parts, recipe.data.seq_len
    elif isinstance(model, zoo.ViT):
        rows, positions = recipe.budget.batch_tokens // parts * model.tokens, model.tokens
    else:
        return False
    return positions <= POSITIONS and rows * model.width >= PAYS


@cache
def _able() -> bool:
    """A 512-bit AMD processor, whose products under "medium" are float32's."""
    if (
        torch.backends.cpu.get_cpu_capability() != "AVX512"
        or not CPUINFO.exists()
        or "AuthenticAMD" not in CPUINFO.read_text()
    ):
        return False
    with _by_onednn():
        return exact(lambda a, b: torch.bmm(a[None], b[None])[0])


def exact(product: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether the product of float32 matrices is float32's, not rounded to bfloat16 on the way."""
    a, b = (torch.linspace(-rate, rate, 256 * 256).sin().view(256, 256) for rate in (1e3, 7e3))
    true = a.double() @ b.double()
    return bool((product(a, b) - true).abs().max() < ROUNDING * true.abs().max())
