"""Pictures of records and fits.

`..._curve(s)`, `..._points` and `..._contour` give arrays, `draw_...` puts them on an axis,
`..._figure` makes a figure, and `plot` writes the files.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.own_records import complete_own, own_rows, require_counts
from scaletune.fitting.relations import RELATIONS
from scaletune.fitting.table import main_sweep, select_runs, tabulate
from scaletune.importing import trials as read_records
from scaletune.plotting.basins import basin_curves, basins_figure, draw_basins
from scaletune.plotting.law import (
    Contour,
    basin_contour,
    cell_points,
    draw_contour,
    draw_law,
    held_points,
    horizons_of,
    law_curve,
    law_figure,
)
from scaletune.plotting.shared import COLORS, Curve, Points, plain_ticks, save, tokens_label
from scaletune.predicting import LOSS_LAWS
from scaletune.records import Fit

__all__ = [
    "COLORS",
    "Contour",
    "Curve",
    "Points",
    "basin_contour",
    "basin_curves",
    "basins_figure",
    "cell_points",
    "draw_basins",
    "draw_contour",
    "draw_law",
    "held_points",
    "horizons_of",
    "law_curve",
    "law_figure",
    "plain_ticks",
    "plot",
    "save",
    "tokens_label",
]


def plot(
    source: Fit | pd.DataFrame | str | Path, out: str | Path = "plots", *, where: str | None = None
) -> list[Path]:
    """Writes pictures of a fit (`law.png`) or of records (`basins.png`).

    Args:
        source: A Fit, a table of trials with columns n_params, tokens, lr and loss, or the path of
            a fit (`.json`) or of records (`.jsonl`, `.csv`, ...).
        out: Folder for the pictures; it is created if it does not exist.
        where: Rows of the records to draw, as in `scaletune.fit`.

    Returns:
        The paths of the pictures.

    Raises:
        UserError: The fit or the records contain nothing that can be drawn.

    Example:
        >>> import tempfile
        >>> import pandas as pd
        >>> import scaletune as st
        >>> trials = pd.DataFrame({"n_params": 1e6, "tokens": 2e7, "lr": [0.001, 0.002, 0.004],
        ...                        "loss": [3.2, 3.1, 3.3]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print([path.name for path in st.plot(trials, folder)])
        ['basins.png']
    """
    if isinstance(source, str | Path):
        source = Fit.read(source) if Path(source).suffix == ".json" else read_records(source)[0]
    if isinstance(source, Fit):
        if where:
            raise UserError(f"`where` selects rows of records, but got a fit and {where!r}")
        return [_plot_fit(source, Path(out) / "law.png")]
    source = complete_own(source).trials
    source = _fill_unknown(select_runs(source, where) if where else source)
    table = tabulate(source, ["n_params", "tokens", "lr", "loss"])
    table["loss"] = table["loss"].where(table["status"] == "done")
    main, _ = main_sweep(table)
    if not (main["status"] == "done").any():
        raise UserError(
            f"records must contain at least one finished trial to be drawn, but none of "
            f"{len(main)} is done"
        )
    return [save(basins_figure(_panels(main)), Path(out) / "basins.png")]


UNKNOWN_TOKENS = 1.0  # a picture needs only to tell token budgets apart


def _fill_unknown(trials: pd.DataFrame) -> pd.DataFrame:
    """Own trials that lack what a fit needs, with values that tell their settings apart."""
    own = own_rows(trials)
    if not own.any():
        return trials
    require_counts(trials, ["lr"], "a plot")
    known = pd.DataFrame(index=trials.index, columns=["n_params", "tokens"], dtype=float)
    known.update(trials)
    return trials.assign(
        n_params=known["n_params"].where(known["n_params"].notna() | ~own, trials["width"]),
        tokens=known["tokens"].where(known["tokens"].notna() | ~own, UNKNOWN_TOKENS),
    )


def _plot_fit(fit: Fit, path: Path) -> Path:
    """Writes the picture of a fit of any kind."""
    if fit.law in RELATIONS or "points" in fit.solution:
        from scaletune.plotting import fitted

        panels = fitted.relation_panels(fit) if fit.law in RELATIONS else fitted.loss_panels(fit)
        return save(fitted.figure(panels), path)
    if fit.law in LOSS_LAWS:
        raise UserError(
            f"this fit of {fit.law!r} to the minimum losses of settings has no runs of its own to "
            "draw: draw its records instead, or fit 'lr_nd'"
        )
    if not fit.cells:
        raise UserError(
            f"a fit must contain its settings (`cells`) to be drawn, but this fit of {fit.law!r} "
            "has none"
        )
    return save(law_figure(fit), path)


def _panels(trials: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The trials of each token budget, by the panel's title."""
    return {
        _panel_title(tokens): trials[trials["tokens"] == tokens]
        for tokens in sorted(trials["tokens"].unique())
    }


def _panel_title(tokens: float) -> str:
    return "tokens unknown" if tokens == UNKNOWN_TOKENS else tokens_label(tokens)
