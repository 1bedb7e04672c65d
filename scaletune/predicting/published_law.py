"""Predicts from the published laws of the catalogue, one or several side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from scaletune import laws
from scaletune.predicting.prediction import QUANTITIES, Prediction


def from_law(law_id: str, **given: Any) -> Prediction:
    """The prediction of one published law.

    Args:
        law_id: Id of the law: see `scaletune laws`.
        **given: Inputs by the names of `laws.COLUMNS`. `n_params` is non-embedding. `flops` are
            the training FLOPs as the law counts them; default 6 * n_params * tokens.

    Returns:
        The prediction. `interval` holds None: the catalogue has intervals of coefficients but not
        their covariance. `band` is there where one was measured. `warnings` names every input
        that differs from the runs behind the law.

    Raises:
        UserError: The law is unknown or an input is missing.
    """
    published = laws.law(law_id)
    values, warnings = laws.evaluate(published, **given)
    points = {name: values.get(name) for name in QUANTITIES}
    bands: dict[str, list[float] | None] = dict.fromkeys(QUANTITIES)
    for name, width in published.band.items():
        point = points[name]
        bands[name] = (
            None if point is None else [point / math.sqrt(width), point * math.sqrt(width)]
        )
    others = {name: value for name, value in values.items() if name not in QUANTITIES}
    return Prediction(
        law=law_id,
        **points,
        interval=dict.fromkeys(QUANTITIES),
        band=bands,
        warnings=warnings,
        values=others,
        units={name: laws.UNITS[name] for name in others},
    )


def from_laws(law_ids: Iterable[str] | None = None, **given: Any) -> list[Prediction]:
    """`from_law` for several laws; default: every law that gives an lr for these inputs."""
    known = {name: value for name, value in given.items() if value is not None}
    if law_ids is None:
        entries = [
            entry
            for entry in laws.CATALOGUE.values()
            if "lr" in entry.gives and laws.can_evaluate(entry, **known)
        ]
    else:
        entries = [laws.law(law_id) for law_id in law_ids]
    unknowns = {name for entry in entries for name in entry.unknown}
    predictions = []
    for entry in entries:
        inputs = {
            name: value
            for name, value in known.items()
            if name in entry.unknown or name not in unknowns
        }
        prediction = from_law(entry.id, **inputs)
        warnings = [*laws.pairing_warnings(entry, entries), *prediction.warnings]
        predictions.append(replace(prediction, warnings=warnings))
    return predictions


def describe_batch(prediction: Prediction) -> str:
    """The batch size that the lr of a published law is valid at; empty for a fit."""
    if prediction.law not in laws.CATALOGUE:
        return ""
    return laws.batch_of(laws.law(prediction.law), {"batch_tokens": prediction.batch_tokens})
