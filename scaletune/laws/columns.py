"""Inputs and outputs of laws by column name: unit, domain and command-line option."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaletune.errors import UserError, nearest
from scaletune.laws.schedules import lr_schedule


@dataclass(frozen=True)
class Column:
    """An input quantity of laws."""

    means: str
    """What it counts, with its unit."""

    example: Any
    """Value at which every law shows its worked example."""

    option: bool = False
    """Whether `scaletune predict` has an option of its own for it; if not: `--given NAME=VALUE`."""

    least: float | None = None
    """Smallest allowed value; None if every positive number is allowed."""

    below: float = math.inf
    """Upper bound, not allowed itself."""

    @property
    def domain(self) -> str:
        """The allowed values in words."""
        if self.least is None:
            return "a positive, finite number"
        upper = f" and below {self.below:g}" if self.below < math.inf else ""
        return f"a finite number of at least {self.least:g}{upper}"


COLUMNS: dict[str, Column] = {
    "n_params": Column("parameters without the embedding and the output head", 1e9, True),
    "n_params_total": Column(
        "all parameters, including both embeddings and all experts", 1e9, True
    ),
    "n_params_with_head": Column(
        "parameters with the output head (vocabulary x width, once), without the input embedding",
        1e9,
    ),
    "n_active": Column("active parameters per token, without embedding and head", 1e9, True),
    "n_active_total": Column("active parameters per token, including both embeddings", 1e9),
    "n_nonzero": Column("non-zero parameters of a sparse model", 1e9),
    "n_vocab_params": Column("parameters of one vocabulary matrix: vocabulary x width", 32e6),
    "tokens": Column("tokens trained on, repeats included", 2e10, True),
    "unique_tokens": Column("unique tokens among the tokens trained on", 5e9, True),
    "flops": Column("training FLOPs", 1.2e20, True),
    "batch_tokens": Column("tokens per optimizer step", 524288, True),
    "steps": Column("optimizer steps", 40000, True),
    "seconds": Column("seconds of training", 86400, True),
    "loss": Column("loss, nats per token", 3.0, True),
    "n_experts": Column("experts per layer; 1 is a dense model", 8, True, least=1),
    "granularity": Column("granularity of the experts, 4 * d_model / d_expert", 8),
    "sparsity": Column(
        "share of experts not chosen for a token, or share of weights that are zero",
        0.9,
        True,
        least=0,
        below=1,
    ),
    "streams": Column("parallel streams of one model", 4, True, least=1),
    "bits_weights": Column("bits per weight in training", 8, True),
    "bits_activations": Column("bits per activation in training", 8, True),
    "bits_kv": Column("bits per key or value in training", 8, True),
    "bits_after": Column("bits per weight after quantization", 4, True),
    "width": Column("width, d_model", 2048, True),
    "depth": Column("layers", 24, True),
    "seq_len": Column("tokens per sequence", 4096, True),
    "head_dim": Column("width of one attention head", 64),
    "lr": Column("peak lr in use", 0.001, True),
    "lr_schedule": Column(
        "SHAPE:STEPS:WARMUP:PEAK:END with SHAPE cosine or constant, or a list of one lr per step",
        "cosine:40000:2160:3e-4:3e-5",
        True,
    ),
    "lr_cap": Column("highest lr allowed", 0.02),
    "lr_at_noise": Column(
        "highest optimal lr over batch sizes: at infinite batch for SGD, "
        "at batch_tokens = noise_batch_tokens for Adam",
        0.001,
    ),
    "base_lr": Column("lr of the tuned run", 0.01),
    "base_weight_decay": Column("weight decay of the tuned run, PyTorch's lambda", 0.1),
    "base_tokens": Column("tokens of the tuned run", 1e9),
    "base_batch_tokens": Column("batch size of the tuned run, tokens", 524288),
    "base_beta1": Column("Adam's beta1 of the tuned run", 0.99, least=0, below=1),
    "base_beta2": Column("Adam's beta2 of the tuned run", 0.999, least=0, below=1),
    "base_width": Column("width of the tuned run", 256),
    "base_depth": Column("layers of the tuned run", 2),
    "base_eps": Column("Adam's epsilon of the tuned run", 1e-12),
    "base_variance": Column("initial variance of hidden weights in the tuned run", 0.02),
    "noise_batch_tokens": Column("gradient noise scale, tokens", 1e6),
    "critical_batch_tokens": Column("critical batch size at the given loss, tokens", 1e6),
    "steps_min": Column("steps to reach the loss at infinite batch size", 1000),
    "tokens_min": Column("tokens to reach the loss at the smallest batch size", 1e9),
    "memory_copies": Column(
        "bytes or tensors copied in memory per step, counted from the architecture", 1e11
    ),
    "timescale": Column("target timescale of weight averaging, as a share of the run", 0.1),
    "tokens_seen": Column("tokens trained on so far", 1e11),
    "inference_tokens": Column("tokens read and generated in use", 2e10),
    "days": Column("days since the reference model", 99.0210258, least=0),
    "base_density": Column("density at the start: effective over actual parameters", 1),
    "finetune_characters": Column("characters fine-tuned on", 1e7),
    "characters": Column("characters trained on", 8e10),
    "scale": Column(
        "independent variable of a form: parameters, tokens or FLOPs, in a unit of your choice",
        1,
    ),
    "error": Column("error that a form is fitted to", 0.6),
}

QUANTITIES: dict[str, str] = {  # output of laws -> unit
    "lr": "peak",
    "batch_tokens": "tokens per step",
    "loss": "nats per token",
    "lr_now": "lr at that point of the run",
    "lr_factor": "multiplies the tuned lr",
    "lr_hidden": "hidden matrices",
    "lr_embedding": "input embedding",
    "lr_readout": "output head",
    "lr_vectors": "norms and biases",
    "lr_ratio": "lr of the embedding over lr of hidden matrices",
    "weight_decay": "PyTorch's lambda, multiplied by lr",
    "weight_decay_hidden": "PyTorch's lambda, hidden matrices",
    "weight_decay_decoupled": "not multiplied by lr",
    "variance_hidden": "initial, hidden matrices",
    "logit_factor": "multiplies the output logits",
    "attention_scale": "multiplies the attention scores",
    "residual_factor": "multiplies each block's output",
    "eps_hidden": "Adam's epsilon, hidden matrices",
    "beta1": "Adam's, exact rule",
    "beta2": "Adam's, first order in 1 - beta2",
    "beta2_half_life": "Adam's, of equal half-life in tokens",
    "timescale": "share of the run",
    "critical_batch_tokens": "tokens per step",
    "steps": "optimizer steps",
    "tokens": "tokens",
    "n_params_opt": "parameters",
    "tokens_opt": "tokens",
    "tokens_per_param": "tokens per parameter",
    "flops": "FLOPs",
    "flops_per_token": "FLOPs per token",
    "n_params_total": "parameters, embeddings included",
    "exponent": "of the loss over compute",
    "elasticity_ratio": "elasticity of the parameter term over that of the data term",
    "loss_fixed_batch": "nats per token",
    "loss_per_char": "bits per character",
    "loss_over_unigram": "nats, relative to the unigram model",
    "loss_increase": "nats per token",
    "compute_ratio": "compute over reference compute at equal loss",
    "error": "share of wrong answers, 0 to 1",
    "pass_rate": "share of passing samples, 0 to 1",
    "density": "effective over actual parameters",
    "doubling_days": "days",
    "n_params_effective": "parameters of the reference model family",
    "transferred_characters": "characters",
    "value": "of the form",
    "power": "of the form",
    "shifted_power": "of the form",
    "saturating_power": "of the form",
    "sigmoid_left": "left side of the form",
    "sigmoid_right": "right side of the form",
}

SIGNED = {"loss_over_unigram", "value", "sigmoid_left"}  # outputs that may be zero or negative

N_HINT = (
    "n_params (without embedding and head), n_params_total (all) or "
    "n_active (active, for a mixture of experts)"
)
BATCH_HINT = "batch_tokens, in tokens: sequences * sequence length"
OTHER_UNITS = {  # common names with another unit -> the input to give instead
    "batch": BATCH_HINT,
    "batch_size": BATCH_HINT,
    "batch_seqs": BATCH_HINT,
    "pf_days": "flops = 8.64e19 * PF-days",
    "N": N_HINT,
    "D": "tokens",
    "C": "flops",
    "L": "loss",
    "params": N_HINT,
    "bits_per_byte": "loss in nats per token: bits per byte * ln 2 * bytes per token",
    "epochs": "unique_tokens = tokens / epochs",
}


def option(name: str) -> str:
    """Returns the command-line option of an input: `--n-active`, `--given width=VALUE`."""
    known = COLUMNS.get(name)
    return "--" + name.replace("_", "-") if known and known.option else f"--given {name}=VALUE"


def check_value(name: str, value: Any, column: str | None = None) -> Any:
    """Returns `value` as a float, or as a tuple for a schedule.

    Raises:
        UserError: The value is outside the domain of `column` (default: the column `name`).
    """
    if (column or name) == "lr_schedule":
        return lr_schedule(value)
    known = COLUMNS[column or name]
    number = to_float(value)
    inside = number > 0 if known.least is None else known.least <= number < known.below
    if not inside:
        raise UserError(f"`{name}` must be {known.domain}, but got {value!r}")
    return number


def to_float(value: Any) -> float:
    """Returns a float; nan for infinite values and for what is not a number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def check_given(given: Mapping[str, Any], free: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the given inputs, checked by name and value.

    Names in `free` are coefficients that the user gives; they are left out.
    """
    values = {}
    for name, value in given.items():
        if name in COLUMNS:
            values[name] = check_value(name, value)
        elif name not in free:
            hint = (
                f": give {OTHER_UNITS[name]}"
                if name in OTHER_UNITS
                else nearest(name, [*COLUMNS, *free])
            )
            raise UserError(f"`{name}` is not an input of laws{hint}")
    _check_consistency(values)
    return values


AT_MOST = (  # pairs of counts of which the first cannot be the larger, and the reason
    ("n_params", "n_params_total", "n_params leaves out the embeddings"),
    ("n_params", "n_params_with_head", "n_params leaves out the output head"),
    ("n_active", "n_params_total", "the active parameters are a part of all parameters"),
    ("unique_tokens", "tokens", "unique tokens are a part of the tokens trained on"),
    ("batch_tokens", "tokens", "one step is a part of the run"),
)


def _check_consistency(values: Mapping[str, Any]) -> None:
    """Raises UserError on counts that contradict each other, most often because of mixed units."""
    for part, whole, why in AT_MOST:
        if part in values and whole in values and values[part] > values[whole]:
            raise UserError(
                f"`{part} <= {whole}` must hold ({why}), "
                f"but got {values[part]:.6g} and {values[whole]:.6g}"
            )
    if {"flops", "n_params", "tokens"} <= set(values) and values["flops"] < values[
        "n_params"
    ] * values["tokens"] / 1e6:
        raise UserError(
            f"`flops` must be FLOPs of the whole training (1 PF-day is 8.64e19), "
            f"but got {values['flops']:.6g}, where 6 * n_params * tokens is "
            f"{6 * values['n_params'] * values['tokens']:.3g}"
        )
