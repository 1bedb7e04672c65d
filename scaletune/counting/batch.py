"""The batch size in tokens, from the settings that training codes store."""

from __future__ import annotations

from collections.abc import Mapping

GLOBAL = ("global_batch_size", "global_train_batch_size", "effective_batch_size", "batch_seqs")
"""Sequences per optimizer step over all devices."""
PER_DEVICE = (
    *("per_device_train_batch_size", "micro_batch_size", "train_micro_batch_size_per_gpu"),
    *("device_batch_size", "device_train_microbatch_size", "local_batch_size", "micro_batch"),
)
"""Sequences per device and forward pass."""
PLAIN = ("batch_size",)
"""Sequences per step, or per forward pass if the settings have an accumulation."""
ACCUMULATION = ("gradient_accumulation_steps", "grad_accum_steps", "accumulate_grad_batches")
DEVICES = ("world_size", "num_devices", "n_devices", "num_gpus", "n_gpus", "data_parallel_size")
MAX_BATCH_TOKENS = 2e8
"""No published run has a batch of more tokens."""
MANY_SEQUENCES = 8192
"""A batch this large that is a multiple of the sequence length may count tokens."""


def batch_tokens(settings: Mapping[str, float], seq_len: float) -> tuple[float, str] | None:
    """Tokens per optimizer step, and the formula; None if the settings leave it open.

    A batch per device needs the accumulation and the number of devices. A plain `batch_size` is the
    whole batch, times the accumulation if there is one; with an accumulation and several devices it
    is open whether the accumulation is already divided by them. A large multiple of `seq_len` may
    count tokens (OLMo-core's `global_batch_size` does), so it is read only where one of the two
    readings is impossible.

    Args:
        settings: Numbers by name, such as `batch_size`. Of dotted names the last part counts.
        seq_len: Tokens per sequence.

    Example:
        >>> batch_tokens({"batch_size": 12, "gradient_accumulation_steps": 40}, seq_len=1024)
        (491520.0, 'batch_size * gradient_accumulation_steps * seq_len')
        >>> batch_tokens({"per_device_train_batch_size": 8}, seq_len=1024) is None
        True
    """
    numbers = {
        str(name).lower().replace("/", ".").split(".")[-1]: v for name, v in settings.items()
    }
    factors = _factors(numbers)
    if factors is None:
        return None
    product = 1.0
    for name in factors:
        product *= float(numbers[name])
    if product >= MANY_SEQUENCES and product % seq_len == 0:
        counts_tokens = product * seq_len > MAX_BATCH_TOKENS
        return (product, " * ".join(factors)) if counts_tokens else None
    return product * float(seq_len), " * ".join([*factors, "seq_len"])


def _factors(numbers: Mapping[str, float]) -> list[str] | None:
    """Names of the settings whose product is the number of sequences per step."""
    accumulation, devices = (
        next((name for name in names if name in numbers), None) for names in (ACCUMULATION, DEVICES)
    )
    for names in (GLOBAL, PER_DEVICE, PLAIN):
        size = next((name for name in names if name in numbers), None)
        if size is None:
            continue
        if names == GLOBAL:
            return [size]
        if names == PER_DEVICE:
            return [size, accumulation, devices] if accumulation and devices else None
        if not accumulation:
            return [size] if not devices or numbers[devices] == 1 else None
        return [size, accumulation] if not devices or numbers[devices] == 1 else None
    return None
