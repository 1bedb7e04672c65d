"""Faster float32 matrix products on AMD CPUs, with oneDNN instead of MKL.

On AMD processors with 512-bit units MKL runs its 256-bit kernels, which use half of the arithmetic
units. torch also ships oneDNN, but calls it only where bfloat16 is allowed ("medium" matmul
precision). On a CPU without matrix tiles (AMX) oneDNN has no bfloat16 kernel for float32 input, so
it computes in float32.

torch's tiled attention kernel would call oneDNN once per tile. Attention therefore uses two whole
products, whose memory is quadratic in the sequence length; sequences are short where this applies.
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

MAX_POSITIONS = 128
"""Longest sequence for attention by two whole products."""

MIN_ROWS_TIMES_WIDTH = 2**14
"""Rows of a product times the width. Below, the start of each oneDNN call costs more than its
faster kernel saves (`benchmarks/stacked_steps.py`)."""

TOLERANCE = 1e-5
"""Maximum error relative to the largest entry: float32 has 1e-6 here, bfloat16 4e-3."""

CPUINFO = Path("/proc/cpuinfo")


@contextmanager
def use_onednn(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Inside this context float32 products use oneDNN, if `applies`; settings are then restored."""
    if not applies(recipe, device):
        yield
        return
    with _medium_precision(), sdpa_kernel(SDPBackend.MATH), _separate_compile_cache():
        yield


@contextmanager
def _medium_precision() -> Iterator[None]:
    """Selects oneDNN; requires that torch has its default precision."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _separate_compile_cache() -> AbstractContextManager:
    """A cache key of our own: the cache of torch.compile ignores which attention was compiled."""
    config: Any = getattr(torch.compiler, "config", None)  # not in every version
    return (
        config.patch(cache_key_tag=f"{config.cache_key_tag}whole")
        if hasattr(config, "cache_key_tag")
        else nullcontext()
    )


def applies(recipe: Recipe, device: torch.device) -> bool:
    """Whether oneDNN is faster for this recipe and processor, and still float32.

    False if the user has changed torch's precision. The answer does not depend on the stack, so a
    trial has the same bits in any stack.
    """
    if device.type != "cpu" or recipe.training.precision != "float32":
        return False
    if not _is_large_enough(recipe):
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest" and _supports_onednn()
    except RuntimeError:  # precision was set per backend, which this function cannot express
        return False


def _is_large_enough(recipe: Recipe) -> bool:
    """Dense attention blocks that are large enough. MLPs, experts and convolutions gain nothing."""
    model, parts = recipe.model, recipe.engine.accumulation * recipe.engine.processes
    if isinstance(model, zoo.TransformerConfig):
        rows, positions = recipe.budget.batch_tokens // parts, recipe.data.seq_len
    elif isinstance(model, zoo.ViTConfig):
        rows, positions = recipe.budget.batch_tokens // parts * model.tokens, model.tokens
    else:
        return False
    return positions <= MAX_POSITIONS and rows * model.width >= MIN_ROWS_TIMES_WIDTH


@cache
def _supports_onednn() -> bool:
    """Whether this is an AMD processor with AVX-512 whose "medium" products are float32."""
    if (
        torch.backends.cpu.get_cpu_capability() != "AVX512"
        or not CPUINFO.exists()
        or "AuthenticAMD" not in CPUINFO.read_text()
    ):
        return False
    with _medium_precision():
        return is_float32_product(lambda a, b: torch.bmm(a[None], b[None])[0])


def is_float32_product(product: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether a product of float32 matrices has the accuracy of float32, not of bfloat16."""
    a, b = (torch.linspace(-rate, rate, 256 * 256).sin().view(256, 256) for rate in (1e3, 7e3))
    exact = a.double() @ b.double()
    return bool((product(a, b) - exact).abs().max() < TOLERANCE * exact.abs().max())
