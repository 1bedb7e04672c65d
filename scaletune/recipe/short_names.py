"""The column names that stand for settings of a recipe."""

SHORT_NAMES = {
    "width": "model.width",
    "depth": "model.depth",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "tokens": "budget.tokens",
    "batch_tokens": "budget.batch_tokens",
    "seq_len": "data.seq_len",
    "seed": "seed",
    "form": "parametrization.form",
}
"""Column name -> its dotted path in a recipe."""
