"""Usual names of the columns that scaletune uses, in other tools: pure functions of strings."""

from __future__ import annotations

import re
from collections.abc import Iterable

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "lr": (
        *("lr", "learning_rate", "peak_lr", "max_lr", "peak_learning_rate", "max_learning_rate"),
        *("base_lr", "optimizer.lr", "optimizer.learning_rate", "optim.lr", "optim.learning_rate"),
        *("optimizer.params.lr", "scheduler.peak_lr", "adam_lr"),
    ),
    "loss": (
        *("val_loss", "eval_loss", "eval/loss", "val/loss", "validation/loss", "validation_loss"),
        *("valid_loss", "valid/loss", "test_loss", "eval/cross_entropy", "val/cross_entropy"),
        *("final_val_loss", "loss/val", "loss/validation", "loss/eval", "eval/lm_loss"),
        *("lm_loss_validation", "val_ce", "eval/ce", "eval/ce_loss", "validation_loss/lm_loss"),
        "validation_metrics/loss",
    ),
    "n_params": (
        *("non_embedding_params", "num_params_non_embedding", "n_params_nonembed"),
        *("params_no_embed", "n_params_non_embedding", "non_embedding_parameters"),
        *("num_non_embedding_params", "num_params_no_embed", "nonembedding_params"),
        *("model.n_params", "model/non_embedding_params", "params_non_embedding"),
    ),
    "tokens": (
        *("tokens", "n_tokens", "num_tokens", "total_tokens", "tokens_seen"),
        "num_input_tokens_seen",
        *("train/num_input_tokens_seen", "train/tokens", "token_num", "train_tokens"),
        *("tokens_trained", "train/tokens_seen", "throughput/total_tokens", "consumed_tokens"),
        *("n_tokens_seen", "trained_tokens", "token_budget", "train_num_tokens"),
    ),
    "batch_tokens": (
        *("batch_size_tokens", "tokens_per_step", "global_batch_tokens", "tokens_per_batch"),
        *("tokens_per_iter", "global_batch_size_tokens", "batch_size_in_tokens"),
        *("tokens_per_iteration", "total_batch_size_tokens"),
    ),
    "weight_decay": ("wd", "optimizer.weight_decay", "optim.weight_decay"),
    "width": (
        *("hidden_size", "d_model", "n_embd", "model.hidden_size", "model.d_model"),
        *("hidden_dim", "embed_dim", "model.n_embd", "dim"),
    ),
    "depth": (
        *("n_layer", "n_layers", "num_layers", "num_hidden_layers", "model.n_layers"),
        *("model.num_hidden_layers", "model.n_layer"),
    ),
    "seq_len": (
        *("sequence_length", "context_length", "block_size", "max_seq_len", "seq_length"),
        *("data.seq_len", "max_sequence_length", "training.seq_len"),
        *("max_seq_length", "n_ctx", "ctx_len", "context_len", "seqlen", "model_max_length"),
    ),
    "flops": ("total_flops", "total_flos", "train_flops", "compute", "throughput/total_flops"),
    "seed": ("random_seed", "config.seed"),
}
"""Usual names of each column in other tools. An earlier name has priority."""

TOTAL_NAMES = (
    *("n_params_total", "total_params", "num_params", "num_parameters", "total_parameters"),
    *("n_parameters", "model.num_params", "parameter_count", "param_count", "model/total_params"),
    *("num_total_params", "total_num_params", "model/num_parameters"),
)
"""Names of all parameters of a model, embeddings included."""

VOCABULARY_NAMES = (
    *("padded_vocab_size", "vocab_size", "n_vocab", "vocabulary_size", "vocabulary"),
    *("model.vocab_size", "model.padded_vocab_size"),
)
"""Names of the rows of the embedding. A count with padding comes first: it is what is stored."""

REACHED_NAMES = (
    *("iter", "iteration", "iterations", "global_step", "train/global_step", "train/iter"),
    *("trainer/global_step", "train/step", "optimizer_step", "train_step", "step", "steps"),
    *(
        "num_steps_done",
        "num_updates",
        "update",
        "global_steps",
        "train/iteration",
        "current_steps",
    ),
    *("last_step", "final_step", "steps_done", "steps_completed", "completed_steps", "last_iter"),
    *("current_step", "final_iter", "last_iteration"),
)
"""Names of the number of optimizer steps that a run made. W&B's own `_step` is not one."""

PLAN_NAMES = (
    *("max_steps", "max_iters", "train_iters", "num_train_steps", "total_steps", "max_train_steps"),
    *("num_training_steps", "train_steps", "trainer.max_steps", "training.steps", "num_iterations"),
    *("trainer.num_train_steps", "max_iterations", "total_iterations", "max_update", "n_steps"),
)
"""Names of the number of optimizer steps that a run was to make."""

TOKEN_PLAN_NAMES = (
    *("token_budget", "max_tokens", "train_tokens", "num_train_tokens", "max_train_tokens"),
    *("total_train_tokens", "target_tokens", "planned_tokens", "tokens_planned"),
)
"""Names of the number of tokens that a run was to see."""

SCHEDULE_END_NAMES = ("lr_decay_iters", "lr_decay_steps", "decay_steps", "decay_iters")
"""Names of the step at which the learning rate has decayed."""

SAMPLES_NAMES = ("consumed_samples", "consumed_train_samples", "samples_seen", "train/samples")
"""Names of the number of sequences that a run saw."""

_PREFIX = re.compile(
    r"^(config|cfg|hparams|hparam|hyperparameters|user_attrs|metrics|params|summary|args|arguments"
    r"|train_loop_config|train_config|attributes|experiment|exp|main)[./_:]+"
)
_RATE = r"(lr|learning[ _-]?rate)s?"
_LR = re.compile(
    rf"((peak|max|base|top|adamw?|muon|sgd|lion|optim(izer)?|train|current|actual)[ _-])?{_RATE}"
    r"([ _-]?\(?(group|pg)?[ _-]?\d+\)?|-(?!decay|warm|min|end|final|sched)[a-z]\w*)?"
)
_LOSS = re.compile(
    r"loss|perplexity|cross[ _-]?entropy|bits[ _]per[ _]byte"
    r"|(^|[/._ -])(nll|ppl|bpb|ce)($|[/._ (-])"
)
_NOT_LOSS = re.compile(r"scale|loss_fn|weight|coef|type|_at|smooth|target|split|kind|name|std|_se")


def canonical(name: object) -> str:
    """A column name in lower case with underscores, without the prefix of a tracker."""
    text = re.sub(r"[ -]+", "_", str(name).strip().lower())
    for _ in range(3):
        text = _PREFIX.sub("", text) or text
    return text


def is_lr(name: object) -> bool:
    """Whether a column holds the learning rate: `lr`, `train/learning_rate`, `lr-AdamW`, ..."""
    forms = (str(name).strip().lower(), canonical(name))
    last = (re.split(r"[/.:]", re.sub(r"/pg\d+$", "", form))[-1] for form in forms)
    return any(_LR.fullmatch(part) for part in last)


def is_loss(name: object) -> bool:
    """Whether a column holds a loss."""
    text = str(name).strip().lower()
    return bool(_LOSS.search(text)) and not _NOT_LOSS.search(text)


def find_names(columns: Iterable[object], names: Iterable[str]) -> list[str]:
    """The columns with one of the names, in the order of the names; an exact match comes first."""
    given = [str(column) for column in columns]
    by_form: dict[str, list[str]] = {}
    for column in given:
        by_form.setdefault(canonical(column), []).append(column)
    matches: dict[str, None] = {}
    for name in names:
        if name in given:
            matches[name] = None
        matches |= dict.fromkeys(by_form.get(canonical(name), ()))
    return list(matches)
