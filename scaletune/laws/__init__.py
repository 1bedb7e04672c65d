"""The catalogue of published scaling laws and hyperparameter rules.

To add a law, write an entry in the module of its kind and a row in tests/test_laws_numbers.py.

Example:
    >>> from scaletune import laws
    >>> values, warnings = laws.evaluate(laws.law("besiroglu"), n_params_total=1e9, tokens=2e10)
    >>> round(values["loss"], 4), warnings
    (2.5301, [])
"""

from __future__ import annotations

from scaletune.errors import UserError, nearest
from scaletune.laws import (
    allocation,
    allocation_loss,
    batch,
    compute,
    critical_batch,
    downstream,
    forms,
    learning_rate,
    learning_rate_moe,
    loss,
    loss_compute,
    loss_overtrained,
    loss_size,
    loss_steps,
    loss_wide,
    moe,
    parametrization,
    precision,
    repetition,
    schedule,
    text,
    transfer,
    weight_decay,
)
from scaletune.laws.columns import COLUMNS
from scaletune.laws.columns import QUANTITIES as UNITS
from scaletune.laws.entry import Input, Law
from scaletune.laws.query import batch_of, can_evaluate, evaluate, pairing_warnings
from scaletune.laws.text import describe, sections

__all__ = [
    "CATALOGUE",
    "COLUMNS",
    "KINDS",
    "KIND_TITLES",
    "UNITS",
    "Input",
    "Law",
    "batch_of",
    "can_evaluate",
    "describe",
    "evaluate",
    "law",
    "listing",
    "pairing_warnings",
    "sections",
    "select",
]

FILES = (
    learning_rate,
    learning_rate_moe,
    batch,
    transfer,
    parametrization,
    critical_batch,
    weight_decay,
    compute,
    allocation,
    allocation_loss,
    loss,
    loss_wide,
    loss_overtrained,
    loss_size,
    loss_compute,
    loss_steps,
    repetition,
    moe,
    precision,
    downstream,
    schedule,
    forms,
)
CATALOGUE: dict[str, Law] = {entry.id: entry for file in FILES for entry in file.LAWS}
KIND_TITLES = {  # kind -> what its laws are about
    "learning_rate": "Optimal learning rate, with or without the batch size",
    "batch": "Optimal batch size",
    "transfer": "Hyperparameter transfer to another batch size or token horizon",
    "parametrization": "Hyperparameter transfer over width and depth",
    "critical_batch": "Critical batch size",
    "weight_decay": "Weight decay and averaging timescale",
    "counting": "Counting parameters and FLOPs",
    "allocation": "Compute-optimal allocation to parameters and tokens",
    "loss": "Loss over parameters and tokens",
    "loss_size": "Loss over parameters or tokens alone",
    "loss_compute": "Loss over compute",
    "loss_steps": "Loss over training steps",
    "loss_time": "Loss over training time",
    "repetition": "Repeated data and transfer between data sets",
    "moe": "Loss of mixtures of experts",
    "precision": "Low precision and quantization",
    "sparsity": "Pruned models",
    "downstream": "Downstream task performance",
    "density": "Capability density over time",
    "schedule": "Learning-rate schedules",
    "form": "Functional forms to fit",
}
KINDS = tuple(dict.fromkeys(entry.kind for entry in CATALOGUE.values()))


def law(law_id: str) -> Law:
    """Returns the published law with this id.

    Args:
        law_id: A key of `CATALOGUE`, for example "steplaw_lr_bs".

    Returns:
        The law, which is called with its symbols.

    Raises:
        UserError: No law has this id; the message names the nearest id.

    Example:
        >>> from scaletune import laws
        >>> laws.law("kaplan_lr").formula
        'lr = c0 + c1 * log(N)'
    """
    if law_id not in CATALOGUE:
        raise UserError(f"there is no law {law_id!r}{nearest(law_id, CATALOGUE)}")
    return CATALOGUE[law_id]


def select(
    *,
    kind: str | None = None,
    gives: str | None = None,
    text: str | None = None,
    confirmed: bool = False,
) -> list[Law]:
    """Returns the laws that match every filter.

    Args:
        kind: One of `KINDS`; `loss` includes `loss_size`, `loss_compute` and so on.
        gives: An output quantity, a key of `UNITS`.
        text: A text that occurs anywhere in the law's description, in any case.
        confirmed: Only laws whose coefficients are all confirmed.

    Returns:
        The matching laws in the order of the catalogue.

    Raises:
        UserError: No law has this kind or output.

    Example:
        >>> from scaletune import laws
        >>> [law.id for law in laws.select(kind="batch", confirmed=True)]
        ['minicpm_bs']
    """
    outputs = dict.fromkeys(name for entry in CATALOGUE.values() for name in entry.gives)
    for name, value, known in (("kind", kind, KINDS), ("gives", gives, outputs)):
        if value is not None and value not in known:
            raise UserError(
                f"`{name}` must be one that a law has, but got {value!r}{nearest(value, known)}"
            )
    return [
        entry
        for entry in CATALOGUE.values()
        if (kind is None or f"{entry.kind}_".startswith(f"{kind}_"))
        and (gives is None or gives in entry.gives)
        and (text is None or text.lower() in f"{entry.id} {describe(entry)}".lower())
        and not (confirmed and not entry.confirmed)
    ]


def listing(entries: list[Law] | None = None) -> str:
    """Returns a table of these laws (default: all), one line per law."""
    return text.listing(CATALOGUE.values() if entries is None else entries)
