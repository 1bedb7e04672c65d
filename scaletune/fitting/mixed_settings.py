"""Finds settings that differ between runs which a fit takes for repeats of one run."""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np
import pandas as pd

SETTINGS = frozenset(
    [
        *("batch_size", "global_batch_size", "train_batch_size", "global_train_batch_size"),
        *("per_device_train_batch_size", "micro_batch_size", "batch_seqs", "batch", "bs"),
        *("device_batch_size", "gradient_accumulation_steps", "grad_accum_steps"),
        *("optimizer", "optim", "optimizer_name", "optimizer_type", "beta1", "beta2"),
        *("adam_beta1", "adam_beta2", "beta_1", "beta_2", "eps", "adam_epsilon", "momentum"),
        *("warmup", "warmup_steps", "warmup_ratio", "warmup_iters", "schedule", "lr_schedule"),
        *("scheduler", "lr_scheduler", "lr_scheduler_type", "lr_decay_style", "decay"),
        *("dataset", "data", "train_dataset", "dataset_name", "corpus", "tokenizer"),
        *("tokenizer_name", "seq_len", "sequence_length", "block_size", "max_seq_len"),
        *("weight_decay", "wd", "dropout", "init_std", "initializer_range", "z_loss"),
        *("grad_clip", "max_grad_norm", "clip_grad", "clip", "arch", "architecture"),
        *("activation", "tie_word_embeddings", "tied", "parametrization", "mup", "use_mup"),
    ]
)
"""Names of settings, without the name of the table that they stand in."""
BATCHES = ("batch", "bs", "accum")  # part of the names of settings of the batch size
RESULT = re.compile(
    r"loss|ppl|perplexity|acc|score|bpb|eval|val[/_.]|test[/_.]|metric|err|grad_?norm|time|second"
    r"|runtime|duration|flop|mfu|memory|mem_|tok.*_per|per_s|throughput|step|iter|epoch|date"
    r"|created|updated|^id$|_id$|name$|url|path|dir$|host|user|notes|tags?$|group|state|status"
    r"|seed|rank|gap|row|index|unnamed|diverged|split|kind|min_lr|final|last|outlier|reason|flag"
    r"|comment|source|budget|width|depth|heads|layer|hidden|embd|ffn|model|dim|node|gpu|device"
    r"|worker|param"
)
MAX_VALUES = 12  # more different values are a result rather than a setting
EXPLAINED = 0.8  # share of repeated rows that a setting must tell apart
SPREAD = 0.005  # median spread of repeated losses that seeds alone hardly reach


def mixed_setting_doubts(runs: pd.DataFrame, stated: Collection[str] = ()) -> list[str]:
    """A sentence if runs of one setting differ in a column that the law does not have.

    Args:
        runs: Finished runs with `cell` (a number per setting), `loss`, and perhaps `lr`,
            `batch_tokens` and `seed`.
        stated: Columns about which the fit has sentences of its own.
    """
    setting = [
        name for name in ("cell", "batch_tokens") if name in runs and runs[name].notna().any()
    ]
    one_run = [*setting, *(name for name in ("lr", *stated) if name in runs)]
    one_run += [name for name in ("seed",) if name in runs and runs[name].notna().all()]
    repeats = _repeated(runs, one_run)
    columns = [
        name
        for name in map(str, runs.columns)
        if name not in (*one_run, *stated, "n_params", "tokens", "loss", "lr")
        and (
            _differs_within(runs, name, setting)
            if last_part(name) in SETTINGS
            else _tells_apart(runs, name, one_run, repeats)
        )
    ]
    columns = _different_columns(runs, columns)
    if columns:
        return [_setting_sentence(runs, columns, "batch_tokens" in setting)]
    return _repeat_doubt(runs, one_run, repeats, "batch_tokens" in setting)


def last_part(name: str) -> str:
    """`train.batch-size` -> `batch_size`."""
    return re.split(r"[./:]", re.sub(r"[ -]", "_", name.lower()))[-1]


def _repeated(runs: pd.DataFrame, keys: list[str]) -> pd.Series:
    """Which rows share `keys` with a row of another loss."""
    groups = runs.groupby(keys, dropna=False)["loss"]
    return groups.transform("max") > groups.transform("min") * (1 + 1e-9)


def _comparable(values: pd.Series) -> pd.Series:
    """Numbers as they are, anything else as text, so that lists can be compared too."""
    if pd.api.types.is_numeric_dtype(values):
        return values
    return values.astype(str).where(values.notna())


def _differs_within(runs: pd.DataFrame, name: str, keys: list[str]) -> bool:
    values = _comparable(runs[name])
    return values.nunique() > 1 and bool(
        (values.groupby([runs[key] for key in keys], dropna=False).nunique() > 1).any()
    )


def _tells_apart(runs: pd.DataFrame, name: str, keys: list[str], repeats: pd.Series) -> bool:
    """Whether a column that is no result has few values and is another one in each repeat."""
    if not repeats.any() or RESULT.search(name.lower()):
        return False
    values = _comparable(runs[name])
    if not 2 <= values.nunique() <= min(MAX_VALUES, len(runs) // 3):
        return False
    still = _repeated(runs.assign(**{name: values}), [*keys, name])
    return still.sum() <= (1 - EXPLAINED) * repeats.sum()


def _different_columns(runs: pd.DataFrame, columns: list[str]) -> list[str]:
    """Columns that sort the rows differently; of those that sort alike, the batch size stays."""
    columns = sorted(columns, key=lambda name: not any(part in name.lower() for part in BATCHES))
    codes: dict[bytes, str] = {}
    for name in columns:
        codes.setdefault(pd.factorize(_comparable(runs[name]))[0].tobytes(), name)
    return list(codes.values())


def _setting_sentence(runs: pd.DataFrame, columns: list[str], has_batch: bool) -> str:
    shown = [f"`{name}` ({_values(runs[name])})" for name in columns[:3]]
    more = f" and {len(columns) - 3} more columns" if len(columns) > 3 else ""
    first = columns[0]
    value = runs[first].dropna().mode().iloc[0]
    name = first if first.isidentifier() else f"`{first}`"
    one = f'"{value}"' if isinstance(value, str) else f"{value:g}"
    is_batch = any(part in first.lower() for part in BATCHES) and not has_batch
    return (
        f"{' and '.join(shown)}{more} {'differs' if len(columns) == 1 else 'differ'} between runs "
        "of one setting, so their losses are mixed: fit each value separately with "
        f"--where '{name} == {one}'" + (", or give batch_tokens" if is_batch else "")
    )


def _values(column: pd.Series) -> str:
    values = sorted(column.dropna().unique(), key=lambda v: (isinstance(v, str), v))
    shown = [v if isinstance(v, str) else f"{v:g}" for v in values[:4]]
    return ", ".join(shown) + (", ..." if len(values) > 4 else "")


def _repeat_doubt(
    runs: pd.DataFrame, keys: list[str], repeats: pd.Series, has_batch: bool
) -> list[str]:
    if has_batch or "seed" in keys or not repeats.any():
        return []
    groups = runs[repeats].groupby(keys, dropna=False)["loss"]
    spread = groups.max() / groups.min() - 1
    if float(spread.median()) < SPREAD:
        return []
    named = ", ".join(["n_params", "tokens", *(["lr"] if "lr" in keys else [])])
    return [
        f"{int(repeats.sum())} rows repeat the ({named}) of another row, with losses that differ "
        f"by {np.median(spread):.1%} in the middle and up to {spread.max():.1%}: if they are runs "
        "of several batch sizes, give batch_tokens; if they are repeats, give seed"
    ]
