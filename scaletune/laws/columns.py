"""What laws may be asked by and what they answer, in the contract's names: the unit of each, its domain, the option that gives it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaletune.errors import UserError, nearest
from scaletune.laws.schedules import lr_schedule


@dataclass(frozen=True)
class Column:
    """A quantity that laws are asked by. `example` is where every law shows its worked number."""

    means: str
    example: Any
    option: bool = False  # common: `scaletune predict --its-name`; the others are given as `--given its_name=VALUE`
    least: float | None = None  # allowed itself, where not every positive number is
    below: float = math.inf

    @property
    def domain(self) -> str:
        if self.least is None:
            return "a positive, finite number"
        return f"a finite number of at least {self.least:g}" + (
            f" and below {self.below:g}" if self.below < math.inf else ""
        )


COLUMNS: dict[str, Column] = {
    "n_params": Column("parameters, the embedding and the output head left out", 1e9, True),
    "n_params_total": Column("all parameters, both embeddings and all experts included", 1e9, True),
    "n_params_with_head": Column(
        "parameters with the output head (vocabulary x width, once), without the input embedding",
        1e9,
    ),
    "n_active": Column("parameters a token passes through, embedding and head left out", 1e9, True),
    "n_active_total": Column("parameters a token passes through, both embeddings included", 1e9),
    "n_nonzero": Column("non-zero parameters of a sparse model", 1e9),
    "n_vocab_params": Column("parameters of one vocabulary matrix: vocabulary x width", 32e6),
    "tokens": Column("tokens trained on, repeats included", 2e10, True),
    "unique_tokens": Column("unique tokens among those", 5e9, True),
    "flops": Column("FLOPs of the training", 1.2e20, True),
    "batch_tokens": Column("tokens an optimizer step", 524288, True),
    "steps": Column("optimizer steps", 40000, True),
    "seconds": Column("seconds of training", 86400, True),
    "loss": Column("loss, nats per token", 3.0, True),
    "n_experts": Column("experts a layer, 1 for a dense model", 8, True, least=1),
    "granularity": Column("granularity of the experts, 4 * d_model / d_expert", 8),
    "sparsity": Column(
        "share that is off: of experts not chosen for a token, or of weights that are zero",
        0.9,
        True,
        least=0,
        below=1,
    ),
    "streams": Column("parallel streams of one model", 4, True, least=1),
    "bits_weights": Column("bits a weight in training", 8, True),
    "bits_activations": Column("bits an activation in training", 8, True),
    "bits_kv": Column("bits a key or value in training", 8, True),
    "bits_after": Column("bits a weight when quantized after training", 4, True),
    "width": Column("width, d_model", 2048, True),
    "depth": Column("layers", 24, True),
    "seq_len": Column("tokens a sequence", 4096, True),
    "head_dim": Column("width of one attention head", 64),
    "lr": Column("peak lr in use", 0.001, True),
    "lr_schedule": Column(
        "SHAPE:STEPS:WARMUP:PEAK:END, SHAPE cosine or constant; or one lr a step",
        "cosine:40000:2160:3e-4:3e-5",
        True,
    ),
    "lr_cap": Column("highest lr allowed", 0.02),
    "lr_at_noise": Column(
        "highest lr over batches: at infinite batch for SGD, at batch_tokens = noise_batch_tokens for Adam",
        0.001,
    ),
    "base_lr": Column("lr of the tuned run", 0.01),
    "base_weight_decay": Column("weight decay of the tuned run, PyTorch's lambda", 0.1),
    "base_tokens": Column("tokens of the tuned run", 1e9),
    "base_batch_tokens": Column("batch of the tuned run, tokens", 524288),
    "base_beta1": Column("Adam's beta1 of the tuned run", 0.99, least=0, below=1),
    "base_beta2": Column("Adam's beta2 of the tuned run", 0.999, least=0, below=1),
    "base_width": Column("width of the tuned run", 256),
    "base_depth": Column("layers of the tuned run", 2),
    "base_eps": Column("Adam's epsilon of the tuned run", 1e-12),
    "base_variance": Column("initial variance of a hidden weight in the tuned run", 0.02),
    "noise_batch_tokens": Column("gradient noise scale, tokens", 1e6),
    "critical_batch_tokens": Column("critical batch at the loss in question, tokens", 1e6),
    "steps_min": Column("steps that the loss takes at infinite batch", 1000),
    "tokens_min": Column("tokens that the loss takes at the smallest batch", 1e9),
    "memory_copies": Column(
        "bytes or tensors copied in memory a step, as the architecture has it", 1e11
    ),
    "timescale": Column("timescale of the averaging of weights wanted, as a share of the run", 0.1),
    "tokens_seen": Column("tokens trained on so far", 1e11),
    "inference_tokens": Column("tokens to be generated and read in use", 2e10),
    "days": Column("days between two models", 99.0210258, least=0),
    "base_density": Column("density at the start: effective over actual parameters", 1),
    "finetune_characters": Column("characters fine-tuned on", 1e7),
    "characters": Column("characters trained on", 8e10),
    "scale": Column(
        "what a form is fitted over: parameters, tokens or FLOPs, in one unit of the user's choice",
        1,
    ),
    "error": Column("the error a form is fitted to", 0.6),
}

QUANTITIES: dict[str, str] = {  # what laws answer -> unit
    "lr": "peak",
    "batch_tokens": "tokens a step",
    "loss": "nats per token",
    "lr_now": "lr at that point of the run",
    "lr_factor": "times the tuned lr",
    "lr_hidden": "hidden matrices",
    "lr_embedding": "input embedding",
    "lr_readout": "output head",
    "lr_vectors": "norms and biases",
    "lr_ratio": "lr of the embedding over lr of hidden matrices",
    "weight_decay": "PyTorch's lambda, multiplied by lr",
    "weight_decay_hidden": "PyTorch's lambda, hidden matrices",
    "weight_decay_decoupled": "not multiplied by lr",
    "variance_hidden": "initial, hidden matrices",
    "logit_factor": "on the output",
    "attention_scale": "on the scores",
    "residual_factor": "on each block's output",
    "eps_hidden": "Adam's epsilon, hidden matrices",
    "beta1": "Adam's, exact rule",
    "beta2": "Adam's, first order in 1 - beta2",
    "beta2_half_life": "Adam's, of equal half-life in tokens",
    "timescale": "share of the run",
    "critical_batch_tokens": "tokens a step",
    "steps": "optimizer steps",
    "tokens": "tokens",
    "n_params_opt": "parameters",
    "tokens_opt": "tokens",
    "tokens_per_param": "tokens per parameter",
    "flops": "FLOPs",
    "flops_per_token": "FLOPs per token",
    "n_params_total": "parameters, embeddings included",
    "exponent": "of loss in compute",
    "elasticity_ratio": "parameter term's over data term's, elasticities",
    "loss_fixed_batch": "nats per token",
    "loss_per_char": "bits per character",
    "loss_over_unigram": "nats, less the unigram model's",
    "loss_increase": "nats per token",
    "compute_ratio": "of compute at equal loss",
    "error": "share of answers wrong, 0 to 1",
    "pass_rate": "share of samples passing, 0 to 1",
    "density": "effective over actual parameters",
    "doubling_days": "days",
    "n_params_effective": "parameters of the reference family",
    "transferred_characters": "characters",
    "value": "of the form",
    "power": "of the form",
    "shifted_power": "of the form",
    "saturating_power": "of the form",
    "sigmoid_left": "left side of the form",
    "sigmoid_right": "right side of the form",
}

SIGNED = {"loss_over_unigram", "value", "sigmoid_left"}  # answers that may be 0 or less

OTHER_UNITS = {  # names people give, and what to give instead: one name is one unit here
    "batch": "batch_tokens, which is tokens: sequences * their length",
    "batch_size": "batch_tokens, which is tokens: sequences * their length",
    "batch_seqs": "batch_tokens, which is tokens: sequences * their length",
    "pf_days": "flops = 8.64e19 * PF-days",
    "N": "n_params (no embedding, no head), n_params_total (all) or n_active (of a mixture of experts)",
    "D": "tokens",
    "C": "flops",
    "L": "loss",
    "params": "n_params (no embedding, no head), n_params_total (all) or n_active (of a mixture of experts)",
    "bits_per_byte": "loss in nats per token: bits per byte * ln 2 * bytes per token",
    "epochs": "unique_tokens = tokens / epochs",
}


def option(name: str) -> str:
    """How the command line is given this quantity: `--n-active`, `--given width=`."""
    known = COLUMNS.get(name)
    return "--" + name.replace("_", "-") if known and known.option else f"--given {name}=VALUE"


def checked(name: str, value: Any, column: str | None = None) -> Any:
    """`value` of `name` as the column has it, a float but for a schedule; UserError outside of the column's domain."""
    if (column or name) == "lr_schedule":
        return lr_schedule(value)
    known = COLUMNS[column or name]
    number = finite(value)
    inside = number > 0 if known.least is None else known.least <= number < known.below
    if not inside:
        raise UserError(f"`{name}` must be {known.domain}, but got {value!r}")
    return number


def finite(value: Any) -> float:
    """A float, nan for what is none or has no end."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def asked(given: Mapping[str, Any], free: Sequence[str] = ()) -> dict[str, Any]:
    """What was given, checked by name and value; names in `free` are coefficients of the user's own."""
    found = {}
    for name, value in given.items():
        if name in COLUMNS:
            found[name] = checked(name, value)
        elif name not in free:
            instead = (
                f": give {OTHER_UNITS[name]}"
                if name in OTHER_UNITS
                else nearest(name, [*COLUMNS, *free])
            )
            raise UserError(f"`{name}` is no quantity that laws are asked by{instead}")
    _together(found)
    return found


AT_MOST = (  # of two counts, which cannot be the larger
    ("n_params", "n_params_total", "leaves out the embeddings that n_params_total counts"),
    ("n_params", "n_params_with_head", "leaves out the head that n_params_with_head counts"),
    ("n_active", "n_params_total", "is the part of all parameters that a token passes through"),
    ("unique_tokens", "tokens", "is how many of the tokens trained on are new"),
    ("batch_tokens", "tokens", "is what one step takes of them"),
)


def _together(found: Mapping[str, Any]) -> None:
    """UserError on counts that contradict each other: most often units mixed up."""
    for part, whole, why in AT_MOST:
        if part in found and whole in found and found[part] > found[whole]:
            raise UserError(
                f"`{part} <= {whole}` must hold, for {part} {why}, but got {found[part]:.6g} and {found[whole]:.6g}"
            )
    if {"flops", "n_params", "tokens"} <= set(found) and found["flops"] < found["n_params"] * found[
        "tokens"
    ] / 1e6:
        raise UserError(
            f"`flops` must be FLOPs of the whole training (1 PF-day is 8.64e19), but got {found['flops']:.6g}, "
            f"where 6 * n_params * tokens is {6 * found['n_params'] * found['tokens']:.3g}"
        )
