"""Predicts the optimum at a target scale, from published laws or from a fit.

`fitted_law` predicts from a fit, `published_law` from the catalogue. Both return a `Prediction`:
the point, its interval and the near-optimal band. `predict` reads fit files and combines the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scaletune.errors import UserError, nearest
from scaletune.predicting.fitted_law import FAR as FAR
from scaletune.predicting.fitted_law import FITTED as FITTED
from scaletune.predicting.fitted_law import LOSS_LAWS as LOSS_LAWS
from scaletune.predicting.fitted_law import allocation as allocation
from scaletune.predicting.fitted_law import extrapolation_warnings as extrapolation_warnings
from scaletune.predicting.fitted_law import from_fit as from_fit
from scaletune.predicting.fitted_law import loss_at as loss_at
from scaletune.predicting.prediction import POINTS as POINTS
from scaletune.predicting.prediction import QUANTITIES as QUANTITIES
from scaletune.predicting.prediction import Prediction as Prediction
from scaletune.predicting.published_law import describe_batch as describe_batch
from scaletune.predicting.published_law import from_law as from_law
from scaletune.predicting.published_law import from_laws as from_laws
from scaletune.records import Fit

FIT_COLUMNS = ("n_params", "tokens", "batch_tokens")
"""The inputs of a fit."""


def predict(
    *, law: str | Iterable[str] | None = None, fit: Fit | str | Path | None = None, **given: Any
) -> list[Prediction]:
    """Predicts learning rate, batch size and loss at a target scale.

    Args:
        law: Id of a published law, or several. Default: without `fit`, every published law that
            gives an lr for these inputs.
        fit: A `Fit` or the path of its file.
        **given: The scale: `n_params` (non-embedding), `tokens`, `batch_tokens` (tokens per step)
            and the other names of `laws.COLUMNS`.

    Returns:
        One prediction per law; the fit comes first.

    Raises:
        UserError: A law is unknown, an input is missing or has no meaning for the fit.

    Example:
        >>> import scaletune as st
        >>> [prediction] = st.predict(law="steplaw_lr_bs", n_params=1e9, tokens=1e11)
        >>> f"{prediction.lr:.2e}", f"{prediction.batch_tokens:.2e}"
        ('1.63e-03', '1.11e+06')
    """
    predictions = []
    if fit is not None:
        record = fit if isinstance(fit, Fit) else Fit.read(fit)
        predictions.append(from_fit(record, **_fit_inputs(given, only_fit=law is None)))
    if law is None and predictions:
        return predictions
    law_ids = [law] if isinstance(law, str) else law
    return predictions + from_laws(law_ids, **given)


def _fit_inputs(given: Mapping[str, Any], *, only_fit: bool) -> dict[str, Any]:
    """The inputs of a fit; with `only_fit` UserError on an input that a fit does not take."""
    known = {name: value for name, value in given.items() if value is not None}
    missing = [name for name in ("n_params", "tokens") if name not in known]
    if missing:
        raise UserError(
            f"a fit needs n_params and tokens, but {' and '.join(missing)} was not given"
        )
    other = next((name for name in known if name not in FIT_COLUMNS), None)
    if only_fit and other:
        raise UserError(
            f"a fit takes only {', '.join(FIT_COLUMNS)}, but got {other}"
            f"{nearest(other, FIT_COLUMNS)}"
        )
    return {name: given.get(name) for name in FIT_COLUMNS}
