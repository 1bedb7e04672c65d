"""Source columns whose name says that they hold another quantity or unit than scaletune needs."""

from __future__ import annotations

import re

_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "n_params": (
        (
            r"total_(num_)?(model_)?param(eter)?s|(n_|num_)?params_total|(num_|n_)?param(eter)?s(_count)?"
            r"|(num_|n_)?total_param(eter)?s|param(eter)?_count|model_size|trainable_param(eter)?s",
            "it usually counts all parameters, but n_params is without embedding and readout: "
            "subtract vocab_size * width once (tied) or twice",
        ),
        (
            r".*active.*",
            "it counts the active parameters of a mixture of experts, embeddings perhaps included",
        ),
        (
            r".*(_m|_b|_mm|_millions?|_billions?|millions|billions|_in_[mb])",
            "its name says millions or billions, but n_params is a count: "
            "--map 'n_params=1e6*NAME' or 1e9*NAME",
        ),
    ),
    "tokens": (
        (
            r"(num_|n_|train_|max_|current_)?epochs?",
            "it counts epochs: multiply it by the tokens of an epoch",
        ),
        (
            r".*(samples?|sequences|seqs|examples)(_seen|_trained|_consumed)?",
            "it counts sequences: multiply it by seq_len",
        ),
        (
            r"(.*_)?(steps?|iters?|iterations?|updates)(_num|_count)?|max_(steps|iters)",
            "it counts optimizer steps: multiply it by batch_tokens",
        ),
        (
            r".*(_m|_b|_t|_(m|b|tr)illions?|_in_[mbt])|(tokens|data)_?(m|b|t)",
            "its name says millions, billions or trillions, but tokens is a count: "
            "--map 'tokens=1e9*NAME'",
        ),
    ),
    "batch_tokens": (
        (
            r"(?!.*token)((.*_)?(batch_size|bs|bsz|batch|micro_?batch(_size)?)|batch_seqs"
            r"|.*batch_size_per_gpu)",
            "it usually counts sequences, but batch_tokens counts tokens: multiply it by seq_len",
        ),
    ),
    "loss": (
        (
            r"(.*_)?(bpb|bits_?per_?byte|byte_bits)",
            "it is in bits per byte, not nats per token: the law holds in bits per byte only",
        ),
        (
            r"(.*_)?(bpc|bits_?per_?char(acter)?s?)",
            "it is in bits per character, not nats per token: the law holds in that unit only",
        ),
        (
            r"(.*_)?bits_?per_?token|(.*_)?(loss|ce|cross_entropy)_(in_)?bits|(.*_)?log2_?loss",
            "it is in bits per token, not nats: multiply it by 0.693147",
        ),
        (
            r"(.*_)?(ppl|perplexity)",
            "it is a perplexity, but loss is in nats per token: its logarithm",
        ),
        (
            r"(.*_)?(acc|accuracy|top_?1|top_?5|f1|score|exact_match|em|acc_norm|reward)",
            "it is a score that rises as the model improves, not a loss",
        ),
        (
            r"(.*_)?(err|error|error_rate|top_?1_err(or)?)",
            "it is an error rate, not a loss in nats per token",
        ),
        (
            r"(.*_)?(best|lowest)_(.*_)?(loss|ce|nll|cross_entropy)|(.*_)?(min|minimum)_(val|eval|valid"
            r"|validation|test|train)_loss|(.*_)?loss_(min|minimum|best|lowest)",
            "it is the lowest loss of a run, and the law is that of the last one: they differ where"
            " a run became worse or was stopped",
        ),
        (
            r"train(ing)?_?loss|train_(lm_loss|ce|cross_entropy)|smooth_loss",
            "it is a training loss: where data repeat, it is lower than the loss on held-out text, "
            "and the last value is one batch",
        ),
    ),
    "lr": (
        (
            r"(.*_)?(min|final|last|end|lowest|minimum)_?(lr|learning_rate)"
            r"|(.*_)?(lr|learning_rate)_?(min|final|last|end|minimum)",
            "it is the lr at the end of the schedule, but lr is the peak after warmup",
        ),
        (
            r"(.*_)?(current|logged)_?(lr|learning_rate)|lr_(group|param_group)s?_?\d*",
            "it is the lr of one step, but lr is the peak after warmup",
        ),
        (
            r"(.*_)?(log|log10|log2|ln)_?(lr|learning_rate)",
            "it is a logarithm, but lr is the learning rate itself",
        ),
    ),
}


def doubtful_source(column: str, source_name: str) -> str | None:
    """A sentence if the name of a source column says that it is not what `column` must hold.

    Args:
        column: A column of scaletune: `n_params`, `tokens`, `batch_tokens`, `loss` or `lr`.
        source_name: The name of the column that it is read from.

    Returns:
        The sentence, or None if the name raises no doubt.

    Example:
        >>> doubtful_source("lr", "optimizer/min_lr")
        '`lr` is read from `optimizer/min_lr`: it is the lr at the end of the schedule, but lr is \
the peak after warmup'
        >>> doubtful_source("lr", "learning_rate") is None
        True
    """
    words = re.sub(r"[ -]+", "_", re.sub(r"[()\[\]]", "", source_name.strip().lower()))
    name, last = re.sub(r"[./:]+", "_", words), re.split(r"[./:]", words)[-1]
    if last == column and not re.fullmatch(r"train(ing)?", name.removesuffix(f"_{column}")):
        return None
    for pattern, reason in _WORDS.get(column, ()):
        if re.fullmatch(pattern, name) or re.fullmatch(pattern, last):
            term = source_name if source_name.isidentifier() else f"`{source_name}`"
            reason = reason.replace("NAME", term)
            return f"`{column}` is read from `{source_name}`: {reason}"
    return None
