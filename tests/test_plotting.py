"""Figures: arrays equal closed forms and small tables; drawings show those arrays."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from test_fitting import study

from scaletune import plotting
from scaletune.errors import UserError
from scaletune.fitting import fit
from scaletune.plotting import (
    Curve,
    Points,
    basin_curves,
    cell_points,
    draw_basins,
    draw_law,
    held_points,
    law_curve,
    tokens_label,
)

CELL = {  # a setting that was predicted and then trained
    "n_params": 8e6,
    "tokens": 1.2e8,
    "predicted_lr": 2e-3,
    "measured_lr": 3e-3,
    "predicted_loss": 1.9,
    "measured_loss": 1.8,
    "interval": {"lr": [1e-3, 4e-3], "loss": [1.7, 2.1]},
}


@pytest.fixture(scope="module")
def trials():
    return study()


@pytest.fixture(scope="module")
def fitted(trials):
    return fit(trials)


@pytest.fixture(scope="module")
def validated(fitted):
    return replace(fitted, held_out={"kind": "validation", "cells": [CELL]})


@pytest.fixture
def ax():
    return Figure().subplots()


def values(fitted, *names):
    return [fitted.params[name]["value"] for name in names]


def ends(bars):
    """x, low and high of the vertical bars that `errorbar` put on an axis."""
    return (
        np.array([[x, low, high] for (x, low), (_, high) in bars.get_segments()]).reshape(-1, 3).T
    )


# --- data -----------------------------------------------------------------------------------------


def test_the_lr_curve_is_the_power_law(fitted):
    c, a, b = values(fitted, "c", "a", "b")
    curve = law_curve(fitted, 5e7)
    assert curve.y == pytest.approx(c * curve.x**a * 5e7**b, rel=1e-9)
    assert (curve.low < curve.y).all() and (curve.y < curve.high).all()
    assert (curve.near[:, 0] < curve.y).all() and (curve.y < curve.near[:, 1]).all()


def test_the_loss_curve_is_the_loss_law(fitted):
    e, a, b, alpha, beta = values(fitted.loss_law, "E", "A", "B", "alpha", "beta")
    curve = law_curve(fitted, 5e7, "loss")
    assert curve.y == pytest.approx(e + a / curve.x**alpha + b / 5e7**beta, rel=1e-9)
    assert (curve.low < curve.y).all() and (curve.y < curve.high).all() and curve.near is None


def test_the_interval_widens_away_from_the_proxies(fitted):
    curve = law_curve(fitted, 3e7, n_params=[1e9])
    width = np.log(curve.high / curve.low)
    middle = int(np.abs(np.log(curve.x / 1e6)).argmin())
    assert width[-1] > 2 * width[middle] and (np.diff(width[middle + 5 :]) > 0).all()


@pytest.mark.parametrize(("n_params", "end"), [([], 4e6), ([1e6], 4e6), ([5e7], 5e7)])
def test_a_curve_reaches_from_the_smallest_proxy_past_the_largest_requested_size(
    fitted, n_params, end
):
    x = law_curve(fitted, 3e7, n_params=n_params).x
    assert x[0] < 3e5 and end < x[-1] < 1.5 * end
    assert np.diff(np.log(x)) == pytest.approx(
        np.full(len(x) - 1, np.log(x[-1] / x[0]) / (len(x) - 1))
    )


def test_basins_are_means_over_seeds_between_their_extremes():
    rows = [
        (32, 0.1, 3.0),
        (32, 0.1, 5.0),
        (32, 0.2, 2.0),
        (32, 0.2, None),
        (64, 0.4, 7.0),
        (64, 0.1, None),
    ]
    curves = basin_curves(pd.DataFrame(rows, columns=["width", "lr", "loss"]))
    assert [curve.label for curve in curves] == ["width 32", "width 64"]
    assert [curve.x.tolist() for curve in curves] == [[0.1, 0.2], [0.4]]
    assert [curve.y.tolist() for curve in curves] == [[4.0, 2.0], [7.0]]
    assert [curve.low.tolist() for curve in curves] == [[3.0, 2.0], [7.0]]
    assert [curve.high.tolist() for curve in curves] == [[5.0, 2.0], [7.0]]


def test_records_without_widths_are_told_apart_by_parameters():
    curves = basin_curves(
        pd.DataFrame({"n_params": [1e6, 1e6, 2e6], "lr": [0.2, 0.1, 0.1], "loss": [1.0, 2.0, 3.0]})
    )
    assert [(curve.label, curve.x.tolist(), curve.y.tolist()) for curve in curves] == [
        ("parameters 1e+06", [0.1, 0.2], [2.0, 1.0]),
        ("parameters 2e+06", [0.1], [3.0]),
    ]


def test_cells_are_points_with_intervals_of_their_standard_errors():
    cells = [
        {
            "n_params": 2e6,
            "tokens": 1e8,
            "lr": 3e-3,
            "se": 0.1,
            "floor": 2.0,
            "floor_se": 0.02,
            "status": "ok",
        },
        {
            "n_params": 1e6,
            "tokens": 5e7,
            "lr": 4e-3,
            "se": 0.2,
            "floor": 2.5,
            "floor_se": 0.05,
            "status": "ok",
        },
        {
            "n_params": 4e6,
            "tokens": 1e8,
            "lr": 9e-3,
            "se": 9.0,
            "floor": 1.0,
            "floor_se": 1.00,
            "status": "on the edge of its grid",
        },
    ]
    short, long = cell_points(cells)
    assert (short.label, short.x, short.y) == ("50.0M tokens", [1e6], [4e-3])
    assert (long.label, long.x, long.y) == ("100M tokens", [2e6], [3e-3])
    assert long.low == pytest.approx([3e-3 * math.exp(-0.196)])
    assert long.high == pytest.approx([3e-3 * math.exp(0.196)])
    assert [points.y for points in cell_points(cells, "loss")] == [[2.5], [2.0]]
    assert cell_points(cells, "loss")[1].high == pytest.approx([2.0 * math.exp(0.0196)])


def test_held_out_cells_are_the_prediction_and_the_measurement(fitted, validated):
    (_, _, predicted), (_, _, measured) = held_points(validated, "lr")
    assert (predicted.x, predicted.y, predicted.low, predicted.high) == (
        [8e6],
        [2e-3],
        [1e-3],
        [4e-3],
    )
    assert (measured.x, measured.y, measured.low, measured.high) == ([8e6], [3e-3], [], [])
    assert [points.y for _, _, points in held_points(validated, "loss")] == [[1.9], [1.8]]
    assert fitted.held_out["kind"] == "leave-one-cell-out" and held_points(fitted, "lr") == []


def test_a_held_out_cell_that_could_not_be_measured_is_its_prediction(fitted):
    """A setting with too few learning rates has no minimum loss either."""
    cell = {key: value for key, value in CELL.items() if not key.endswith("_loss")} | {
        "measured_lr": None
    }
    unmeasured = replace(fitted, held_out={"kind": "validation", "cells": [cell]})
    assert [points.y for _, _, points in held_points(unmeasured, "lr")] == [[2e-3]]
    assert held_points(unmeasured, "loss") == []


@pytest.mark.parametrize(
    ("tokens", "label"),
    [
        (512, "512 tokens"),
        (102400, "102k tokens"),
        (999_960, "1.0M tokens"),
        (1.4e12, "1.4T tokens"),
        (2e9, "2.0B tokens"),
        (1e6, "1.0M tokens"),
    ],
)
def test_token_budgets_are_labeled_with_suffixes(tokens, label):
    assert tokens_label(tokens) == label


# --- drawing --------------------------------------------------------------------------------------


def test_basins_are_drawn_as_they_are(ax):
    x, y = np.array([0.1, 0.2, 0.4]), np.array([3.0, 2.0, 4.0])
    assert draw_basins([Curve("width 32", x, y, y - 1, y + 1)], ax, "mup") is ax
    line, lowest = ax.get_lines()
    assert line.get_xdata().tolist() == x.tolist() and line.get_ydata().tolist() == y.tolist()
    assert (lowest.get_xdata(), lowest.get_ydata()) == ([0.2], [2.0])
    shade = ax.collections[0].get_paths()[0].vertices
    assert (shade[:, 1].min(), shade[:, 1].max()) == (1.0, 5.0)
    assert ax.get_title() == "mup"
    assert ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.legend().get_texts()] == ["width 32"]


def test_the_law_is_drawn_with_its_cells_and_what_was_held_out(validated, ax):
    curves = [law_curve(validated, tokens, "lr", [8e6]) for tokens in (2e7, 6e7, 1.2e8)]
    cells, held = cell_points(validated.cells), held_points(validated, "lr")
    assert draw_law(curves, cells, held, ax) is ax
    solid = [line for line in ax.get_lines() if len(line.get_xdata()) == 60]
    for curve, line in zip(curves, solid, strict=True):
        assert (line.get_xdata() == curve.x).all() and (line.get_ydata() == curve.y).all()
    # The last horizon is that of the held-out setting.
    assert [line.get_linestyle() for line in solid] == ["-", "-", "--"]
    bars = {box.get_label(): box for box in ax.containers}
    for points in (*cells, *(marked for _, _, marked in held)):
        line, _, spans = bars[points.label]
        assert line.get_ydata().tolist() == points.y
        # points are shifted so that they do not overlap
        assert line.get_xdata() == pytest.approx(points.x, rel=0.15)
        if points.low:
            _, low, high = ends(spans[0])
            assert low == pytest.approx(points.low) and high == pytest.approx(points.high)
    assert len(cells) == 2 and len(held) == 2
    interval = (
        next(shade for shade in ax.collections if shade.get_label() == "interval at 120M tokens")
        .get_paths()[0]
        .vertices
    )
    assert interval[:, 1].min() == pytest.approx(curves[-1].low.min())
    assert interval[:, 1].max() == pytest.approx(curves[-1].high.max())
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_every_horizon_is_drawn_however_many(fitted, ax):
    horizons = [2e7 * 2**i for i in range(9)]
    cells = [
        {
            "n_params": 1e6,
            "tokens": t,
            "lr": 1e-3,
            "se": 0.1,
            "floor": 2.0,
            "floor_se": 0.1,
            "status": "ok",
        }
        for t in horizons[:-1]
    ]
    draw_law([law_curve(fitted, tokens) for tokens in horizons], cell_points(cells), [], ax)
    solid = [line for line in ax.get_lines() if len(line.get_xdata()) == 60]
    assert len(solid) == 9 and [line.get_linestyle() for line in solid] == 8 * ["-"] + ["--"]
    assert len(ax.containers) == 8


def test_a_horizon_without_a_measured_optimum_has_its_curve_alone(fitted, ax):
    draw_law([law_curve(fitted, 2e7)], [Points("20.0M tokens", [], [])], [], ax)
    assert [len(line.get_xdata()) for line in ax.get_lines() if len(line.get_xdata())] == [60]


def test_one_panel_per_name_on_one_loss_axis(trials):
    short = trials[trials["tokens"] == 2e7]
    figure = plotting.basins_figure({"a": short, "b": trials[trials["tokens"] == 6e7]})
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    low, high = figure.axes[0].get_ylim()
    assert low < trials["loss"].min() < high
    assert figure.axes[1].get_legend() and not figure.axes[0].get_legend()
    expected = short[short["n_params"] == 3e5].groupby("lr")["loss"].mean()
    assert figure.axes[0].get_lines()[0].get_ydata() == pytest.approx(expected.to_numpy())


@pytest.mark.parametrize("diverged", [["b"], ["a"], ["a", "b"]])
def test_a_panel_of_diverged_trials_is_empty(trials, diverged):
    """Every trial of a horizon or a comparison may diverge: its panel is empty, nothing fails."""
    lost = trials.assign(loss=float("nan"))
    figure = plotting.basins_figure({name: lost if name in diverged else trials for name in "ab"})
    assert [len(ax.get_lines()) for ax in figure.axes] == [
        0 if name in diverged else 6 for name in "ab"
    ]
    assert [ax.get_title() for ax in figure.axes if ax.get_legend()] == [
        name for name in "ba" if name not in diverged
    ][:1]


def test_the_law_figure_shows_lr_and_loss(validated):
    lr, loss = plotting.law_figure(validated).axes
    assert (lr.get_ylabel(), loss.get_ylabel()) == (
        "optimal learning rate",
        "loss at the optimum, nats per token",
    )
    assert {box.get_label() for box in lr.containers} == {
        "20.0M tokens",
        "60.0M tokens",
        "held out, 120M tokens: predicted",
        "held out, 120M tokens: measured",
    }
    alone = plotting.law_figure(replace(validated, loss_law=None)).axes
    assert [ax.get_ylabel() for ax in alone] == ["optimal learning rate"]


# --- files ----------------------------------------------------------------------------------------


def is_picture(path):
    """Is this a PNG with more than one colour?"""
    return path.read_bytes().startswith(b"\x89PNG\r\n") and np.ptp(imread(path)) > 0.5


def test_plot_writes_a_picture_of_a_fit(fitted, tmp_path):
    assert plotting.plot(fitted, tmp_path / "new" / "folder") == [tmp_path / "new/folder/law.png"]
    path = fitted.write(tmp_path / "fit.json")
    assert plotting.plot(path, tmp_path) == [tmp_path / "law.png"]
    assert is_picture(tmp_path / "law.png")
    assert (tmp_path / "law.png").read_bytes() == (tmp_path / "new/folder/law.png").read_bytes()


def test_plot_writes_a_picture_of_records(trials, tmp_path):
    trials.to_csv(tmp_path / "runs.csv")
    for source in (trials, str(tmp_path / "runs.csv")):
        (path,) = plotting.plot(source, tmp_path / "plots")
        assert path == tmp_path / "plots/basins.png" and is_picture(path)


def drawn_from(trials, monkeypatch, out):
    """The panels that `plot` draws."""
    seen = []
    monkeypatch.setattr(plotting, "basins_figure", lambda panels: seen.append(panels) or Figure())
    plotting.plot(trials, out)
    return seen[0]


def test_plot_draws_one_panel_per_horizon_from_the_main_sweep(trials, monkeypatch, tmp_path):
    others = trials.assign(sweep="sp", loss=99.0, id=trials["id"] + "sp")
    panels = drawn_from(pd.concat([trials.assign(sweep="main"), others]), monkeypatch, tmp_path)
    assert list(panels) == ["20.0M tokens", "60.0M tokens"]
    assert all((rows["sweep"] == "main").all() and len(rows) == 42 for rows in panels.values())
    assert [len(rows) for rows in drawn_from(others, monkeypatch, tmp_path).values()] == [42, 42]


def test_plot_leaves_out_what_did_not_finish(trials, monkeypatch, tmp_path):
    lost = trials["lr"] == trials["lr"].max()
    marked = trials.assign(
        status=trials["status"].where(~lost, "diverged"), loss=trials["loss"].where(~lost, np.inf)
    )
    for panel in drawn_from(marked, monkeypatch, tmp_path).values():
        assert all(
            curve.x.max() < trials["lr"].max() and np.isfinite(curve.y).all()
            for curve in basin_curves(panel)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "fast"}, "`lr` must be a number above 0 in every trial, but row 0 has 'fast'"),
        ({"lr": -1.0}, "`lr` must be a number above 0 in every trial, but row 0 has -1"),
        (
            {"n_params": None},
            "`n_params` must be a number above 0 in every trial, but row 0 has nan",
        ),
        (
            {"loss": None},
            "records must contain at least one finished trial to be drawn, but none of 84 is done",
        ),
        (
            {"status": "diverged"},
            "records must contain at least one finished trial to be drawn, but none of 84 is done",
        ),
    ],
)
def test_records_that_cannot_be_drawn_are_refused(trials, tmp_path, change, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        plotting.plot(trials.assign(**change), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_records_without_a_column_are_refused(trials, tmp_path):
    with pytest.raises(UserError, match="needs the column `tokens`"):
        plotting.plot(trials.drop(columns="tokens"), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"law": "loss_nd"}, "no runs of its own to draw"),
        ({"cells": []}, "must contain its settings"),
    ],
)
def test_a_fit_that_cannot_be_drawn_is_refused(fitted, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        plotting.plot(replace(fitted, **change), tmp_path)


def test_no_global_state(fitted, trials, tmp_path):
    """No pyplot, which keeps every figure and chooses a backend; no change of rcParams."""
    before = dict(matplotlib.rcParams)
    plotting.plot(fitted, tmp_path)
    plotting.plot(trials, tmp_path)
    assert dict(matplotlib.rcParams) == before
    for path in sorted((Path(plotting.__file__).parent).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = [
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        ]
        imported += [
            f"{node.module}.{alias.name}"
            for node in nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        assert not [
            name for name in imported if "pyplot" in name or "pylab" in name or "rcParams" in name
        ], path


def test_horizons_a_rounding_apart_are_one_set():
    """steps * batch_tokens rounds differently at each batch size.

    4.000e9 and 3.999e9 tokens are one horizon of the figure.
    """
    cells = [
        {"tokens": tokens, "n_params": 1e8, "status": "ok", "lr": 1e-3, "se": 0.1}
        for tokens in (4.0e9, 3.999e9, 8e9)
    ]
    assert [points.label for points in plotting.cell_points(cells)] == [
        "4.0B tokens",
        "8.0B tokens",
    ]
