"""Reports: text lines and the HTML page of small examples, read by an HTML parser."""

import base64
import math
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
from test_fitting import study

from scaletune.fitting import RELATIONS, fit
from scaletune.fitting.relations import fit_relation
from scaletune.records import Fit
from scaletune.reporting import (
    answer_lines,
    fit_lines,
    held_out_lines,
    report,
    shift_lines,
    shifts,
    transfer_lines,
    validation_lines,
)
from scaletune.transferring.answer import text as answer_text
from scaletune.units import human

CELL = {
    "n_params": 1234567.0,
    "tokens": 2e8,
    "status": "ok",
    "predicted_lr": 2e-3,
    "measured_lr": 4e-3,
    "ratio": 0.5,
    "covered": True,
    "interval": {"lr": [1e-3, 5e-3], "loss": [2.5, 2.7]},
    "predicted_loss": 2.6,
    "measured_loss": 2.55,
    "loss_covered": True,
    "loss_at_predicted": 2.6,
    "best_loss": 2.5,
    "best_lr": 3.9e-3,
    "loss_excess": 0.04,
}
ANSWER = {  # as `scaletune.transferring.answer.settings.build_answer` returns it
    "level": 0.95,
    "settings": {
        "lr": {
            "value": 1.5e-3,
            "interval": [1e-3, 2e-3],
            "band": [1.1e-3, 1.9e-3],
            "source": "fitted",
        },
        "batch_tokens": {"value": 512, "source": "set by the target"},
    },
    "loss": {
        "value": 2.2,
        "interval": [2.0, 2.4],
        "unit": "nats per token",
        "source": "fitted: law loss_nd",
    },
    "off_by_2x": {
        "lr": {"half": 0.01, "double": 0.02, "range": None, "source": "one setting"},
        "batch_tokens": {"half": None, "source": "batch sensitivity unknown"},
    },
    "flops": {"total": 3e16, "exact_a_token": 3e7},
    "time": None,
    "split": None,
    "memory_bytes_a_gpu": None,
    "fits": None,
    "cost_notes": ["no GPUs"],
    "priors": [{"says": "weight decay times 2", "values": {"weight_decay": 0.2}}],
}
TRANSFER = {
    "n_params": 5e6,
    "tokens": 1e9,
    "lr": 1.5e-3,
    "interval": {"lr": [1e-3, 2e-3], "loss": [2.0, 2.4]},
    "band": {"lr": [1.1e-3, 1.9e-3]},
    "loss": 2.2,
    "status": ["extrapolated more than 10x"],
    "assumptions": ["batch of 512 tokens"],
    "files": ["out/config.json"],
    "answer": ANSWER,
}


@pytest.fixture(scope="module")
def fitted():
    return fit(study())


def one(lines, *words):
    """The one line that has all these words."""
    (line,) = [line for line in lines if all(word in line for word in words)]
    return line


# --- text -----------------------------------------------------------------------------------------


def test_lines_of_a_fit_give_law_runs_parameters_and_held_out_error(fitted):
    lines = fit_lines(fitted)
    dropped = len(fitted.dropped)
    assert (
        lines[0]
        == f"Fit: law lr_nd, {len(fitted.used)} runs used, {dropped} dropped, 6 settings, status ok"
    )
    assert len(fitted.used) + len(fitted.dropped) == len(study())
    for name in ("c", "a", "b"):
        value, (low, high) = fitted.params[name]["value"], fitted.params[name]["interval"]
        assert (
            one(lines, f"  {name} = ")
            == f"  {name} = {value:.4g}   (95 % interval {low:.4g} to {high:.4g})"
        )
    worst, coverage = fitted.held_out["worst_excess"], fitted.held_out["coverage"]
    assert one(lines, "leave-one-setting-out cross-validation").endswith(
        f"worst excess loss {100 * worst:.2f} %, interval covers {100 * coverage:.0f} % of settings"
    )
    assert fitted.status == ["ok"] and not [line for line in lines if "Caution" in line]


def test_every_status_is_a_line_and_a_missing_interval_is_shown(fitted):
    fixed = replace(
        fitted, status=["first", "second"], params={"a": {"value": 0.0, "interval": None}}
    )
    assert fit_lines(fixed)[:2] == ["Caution: first", "Caution: second"]
    assert fit_lines(fixed)[2].endswith("6 settings")
    assert fit_lines(fixed)[3] == "  a = 0   (95 % interval not available)"


@pytest.mark.parametrize(
    ("held_out", "lines"),
    [
        ({}, ["  held out: nothing (too few settings, or too many runs, to hold some out)"]),
        (
            {"kind": "hold-out: tokens > 1"},
            ["  hold-out: tokens > 1: no setting could be evaluated"],
        ),
        (
            {"kind": "x", "worst_excess": 0.0123, "coverage": None},
            ["  x: worst excess loss 1.23 %"],
        ),
        (
            {"kind": "x", "worst_excess": 0.0, "coverage": 0.0},
            ["  x: worst excess loss 0.00 %, interval covers 0 % of settings"],
        ),
    ],
)
def test_the_held_out_error_is_described(held_out, lines):
    assert held_out_lines(held_out) == lines


def test_a_validation_comes_before_the_cells_left_out():
    lines = held_out_lines(
        {
            "kind": "validation",
            "cells": [CELL, CELL],
            "leave_one_cell_out": {"kind": "loo", "worst_excess": 0.5},
        }
    )
    assert lines == 2 * validation_lines(CELL) + ["  loo: worst excess loss 50.00 %"]
    assert held_out_lines(
        {"kind": "validation", "cells": [CELL], "leave_one_cell_out": {}}
    ) == validation_lines(CELL)


def test_a_validated_cell_says_predicted_measured_and_the_miss():
    assert validation_lines(CELL) == [
        "  held-out setting: 1.2M parameters, 200M tokens",
        "    learning rate: predicted 2.00e-3 (interval 1.0e-3 to 5.0e-3), measured 4.00e-3: "
        "ratio 0.5, inside the interval",
        "    loss at the predicted learning rate 2.6000, "
        "lowest loss of the grid 2.5000 at 3.90e-3: "
        "+4.00 %",
        "    minimum loss: predicted 2.6000 (interval 2.5 to 2.7), measured 2.5500: "
        "inside the interval",
    ]


@pytest.mark.parametrize(
    ("which", "line"), [("covered", "learning rate: predicted"), ("loss_covered", "minimum loss")]
)
def test_an_interval_that_missed_says_so_in_capitals(which, line):
    missed = validation_lines(CELL | {which: False})
    assert one(missed, line).endswith("OUTSIDE the interval")
    assert sum("OUTSIDE" in line for line in missed) == 1
    assert sum("inside the interval" in line for line in missed) == 1


def test_a_prediction_whose_trial_did_not_finish_has_failed():
    lines = validation_lines(CELL | {"loss_excess": None, "loss_at_predicted": None})
    assert (
        "    the trial at the predicted learning rate did not finish: the prediction failed"
        in lines
    )
    assert not [line for line in lines if "lowest loss of the grid" in line]


def test_an_optimum_that_could_not_be_measured_says_why():
    # Too few runs give no minimum loss.
    cell = {key: value for key, value in CELL.items() if not key.endswith("_loss")}
    lines = validation_lines(
        cell
        | {
            "measured_lr": None,
            "ratio": None,
            "covered": None,
            "status": "2 usable",
            "loss_excess": None,
        }
    )
    assert lines[1].endswith("not measured: 2 usable")
    assert not [line for line in lines if "ratio" in line or "the interval" in line]


def test_the_answer_has_settings_intervals_and_assumptions():
    lines = transfer_lines(TRANSFER)
    assert lines[:2] == ["Target: 5.0M parameters (non-embedding), 1.0B tokens", ""]
    assert lines[2:-3] == answer_text.lines(ANSWER)
    assert lines[2] == (
        "  learning rate   1.50e-3   (peak, at base width; 95 % interval 1.0e-3 to 2.0e-3; "
        "within 0.25 % of the best loss: 1.1e-3 to 1.9e-3)"
    )
    assert lines[-3:] == [
        "",
        "Caution: extrapolated more than 10x",
        "Assumptions: 1, listed in the report",
    ]
    files = ["out/answer.json", "out/ANSWER.md"]
    assert transfer_lines(TRANSFER | {"files": files})[-1].endswith("listed in out/ANSWER.md")
    quiet = ANSWER | {"loss": ANSWER["loss"] | {"value": None}}
    calm = transfer_lines(TRANSFER | {"answer": quiet, "status": ["ok"]})
    assert not [line for line in calm if "Caution" in line or "expected loss" in line]


def test_a_doubtful_fit_stays_in_the_terminal_answer(fitted):
    """Every status of the fit and of the transfer is a caution before the details, once."""
    doubtful = replace(fitted, status=["the optimum is at the edge", "extrapolated more than 10x"])
    answer = {
        "study": "small",
        "fit": doubtful,
        "path": "fit.json",
        "shift": [],
        "pictures": [],
        "report": "report.html",
        "transfer": TRANSFER,
    }
    lines = answer_lines(answer)
    cautions = [line for line in lines if line.startswith("Caution: ")]
    assert cautions == [
        "Caution: extrapolated more than 10x",
        "Caution: the optimum is at the edge",
    ]
    (start,) = [i for i, line in enumerate(lines) if line.startswith("Fit: ")]
    assert max(map(lines.index, cautions)) < start


# --- how far optima move over width ---------------------------------------------------------------


def basin(sweep, width, best, lrs, tokens=1000, status=None, seeds=1):
    """Rows whose loss is a parabola in log2 lr with its minimum at `best`."""
    rows = [
        dict(
            sweep=sweep,
            width=width,
            n_params=10 * width**2,
            tokens=tokens,
            lr=lr,
            seed=seed,
            status=(status or {}).get(lr, "done"),
            loss=2 + 0.02 * math.log2(lr / best) ** 2,
        )
        for lr in lrs
        for seed in range(seeds)
    ]
    return [row | {"loss": row["loss"] if row["status"] == "done" else None} for row in rows]


GRID = [0.0625, 0.125, 0.25, 0.5, 1.0]


def table(*parts):
    rows = pd.DataFrame([row for part in parts for row in part])
    return rows.assign(id=[f"run{i}" for i in range(len(rows))])


def test_shifts_are_those_of_the_planted_optima():
    """The optimum of main stays, that of sp falls by 4; a horizon without sp is ignored."""
    rows = shifts(
        table(
            basin("main", 32, 0.25, GRID),
            basin("main", 64, 0.25, GRID),
            basin("main", 32, 0.125, GRID, 9000),
            basin("main", 64, 0.5, GRID, 9000),
            basin("sp", 64, 0.125, GRID),
            basin("sp", 32, 0.5, GRID),
            basin("validation", 128, 0.25, GRID, 9000),
        )
    )
    assert [(row["sweep"], row["tokens"], row["on_edge"]) for row in rows] == [
        ("main", 1000, []),
        ("sp", 1000, []),
    ]
    assert rows[0]["lr"] == pytest.approx([0.25, 0.25], rel=0.1)
    assert rows[1]["lr"] == pytest.approx([0.5, 0.125], rel=0.1)
    assert rows[0]["ratio"] == pytest.approx(1, rel=0.1)
    assert rows[1]["ratio"] == pytest.approx(4, rel=0.1)


def test_a_study_alone_is_taken_at_its_longest_horizon():
    trials = table(
        *(
            basin("main", w, 0.25 * 32 / w * t / 1000, GRID, t)
            for w in (32, 64)
            for t in (1000, 2000)
        )
    )
    (row,) = shifts(trials)
    assert row["tokens"] == 2000 and row["ratio"] == pytest.approx(2, rel=0.1)


def test_an_optimum_on_the_edge_is_a_bound():
    """An optimum below the grid is reported as its lowest lr, 0.0625.

    The highest lr that did not diverge is a bound in the same way.
    """
    (row,) = shifts(table(basin("main", 32, 0.25, GRID), basin("main", 64, 0.01, GRID)))
    assert row["lr"] == [pytest.approx(0.25, rel=0.1), 0.0625] and row["on_edge"] == ["40960"]
    assert shift_lines([row]) == [
        f"  main, 1,000 tokens: optimal learning rate {row['lr'][0]:.3g} -> 6.25e-2, "
        f"changes by a factor of at least {row['ratio']:.2f}"
    ]
    (row,) = shifts(
        table(basin("main", 32, 0.25, GRID), basin("main", 64, 1.0, GRID, status={1.0: "diverged"}))
    )
    assert row["lr"][1] == 0.5 and row["on_edge"] == ["40960"]


def test_an_optimum_inside_is_no_bound():
    (line,) = shift_lines(
        [
            {
                "sweep": "sp",
                "tokens": 81920.0,
                "lr": [0.5, 0.125],
                "ratio": 4.0,
                "on_edge": [],
                "unusable": [],
            }
        ]
    )
    assert (
        line
        == "  sp, 81.9k tokens: optimal learning rate 0.5 -> 0.125, changes by a factor of 4.00"
    )


@pytest.mark.parametrize(
    "trials",
    [
        table(basin("main", 32, 0.25, GRID)),  # one width
        table(
            basin("main", 32, 0.25, GRID), basin("sp", 32, 0.25, GRID, 500)
        ),  # no horizon in common
        table(
            basin("main", 32, 0.25, GRID),
            basin("main", 64, 0.25, GRID, status=dict.fromkeys(GRID, "diverged")),
        ),
    ],
)
def test_a_shift_that_cannot_be_measured_is_left_out(trials):
    assert shifts(trials) == []


# --- the page -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Text by tag, attributes of images, rows of every table."""

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.images, self.tables, self.attributes = [], {}, [], [], []
        self.source = path.read_text("utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.attributes += [value for name, value in attrs if name in ("href", "src")]
        self.images += [dict(attrs)] if tag == "img" else []
        self.tables += [[]] if tag == "table" else []
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + text
            if self.open[-1] in ("td", "th"):
                self.tables[-1][-1][-1] += text


def test_the_page_holds_every_line_every_cell_and_every_run_left_out(fitted, tmp_path):
    dropped = {f"run{i}": f"reason {i}" for i in range(40)}
    path = report(replace(fitted, dropped=dropped), tmp_path / "new" / "report.html")
    page = Page(path)
    assert path == tmp_path / "new/report.html" and page.open == []
    assert page.texts["pre"].splitlines() == fit_lines(replace(fitted, dropped=dropped))
    cells, left_out = page.tables
    headings = ["parameters", "tokens", "batch size, tokens", "optimal learning rate"]
    assert cells[0][:4] == headings and len(cells) == 1 + 6
    for row, cell in zip(cells[1:], fitted.cells, strict=True):
        assert (row[0], float(row[3]), row[-1]) == (
            human(cell["n_params"]),
            pytest.approx(cell["lr"], rel=1e-3),
            "ok",
        )
    assert left_out == [["run", "reason"], *([run, reason] for run, reason in dropped.items())]


def test_without_dropped_runs_there_is_no_table_of_them(fitted, tmp_path):
    page = Page(report(replace(fitted, dropped={}), tmp_path / "report.html"))
    assert len(page.tables) == 1 and "Dropped runs" not in page.source


def test_names_given_by_the_user_are_escaped(fitted, tmp_path):
    evil = "<script>alert('x') & \"y\"</script>"
    cells = [cell | {"status": evil} for cell in fitted.cells]
    answer = {
        "study": evil,
        "fit": replace(fitted, status=[evil], cells=cells),
        "path": "fit.json",
        "shift": [],
        "pictures": [],
    }
    page = Page(
        report(
            replace(fitted, status=[evil], cells=cells, dropped={evil: evil}),
            tmp_path / "r.html",
            answer,
        )
    )
    assert "<script" not in page.source and "script" not in page.texts
    assert page.texts["title"] == page.texts["h1"] == f"scaletune: {evil}"
    assert page.tables[1][1] == [evil, evil]
    assert page.tables[0][1][-1] == evil
    assert f"Caution: {evil}" in page.texts["pre"]


def test_the_pictures_are_in_the_page_and_nothing_is_outside(fitted, tmp_path):
    pictures = [tmp_path / "basins.png", tmp_path / "law.png"]
    for i, picture in enumerate(pictures):
        picture.write_bytes(bytes([i]) * 1000)
    shift = [
        {
            "sweep": name,
            "tokens": 1e3,
            "lr": [0.1, 0.2],
            "ratio": 2.0,
            "on_edge": [],
            "unusable": [],
        }
        for name in ("main", "sp")
    ]
    answer = {
        "study": "small",
        "fit": fitted,
        "path": tmp_path / "fit.json",
        "shift": shift,
        "transfer": TRANSFER,
        "pictures": pictures,
    }
    path = report(fitted, tmp_path / "report.html", answer)
    page = Page(path)
    assert [image["alt"] for image in page.images] == ["basins", "law"]
    for image, picture in zip(page.images, pictures, strict=True):
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(content) == picture.read_bytes()
    assert page.attributes == [image["src"] for image in page.images]
    assert "http" not in page.source and "url(" not in page.source and "@import" not in page.source
    lines = page.texts["pre"].splitlines()
    assert lines == "\n".join(answer_lines(answer | {"report": path})).strip().splitlines()
    assert one(lines, "learning rate   1.50e-3")
    assert one(lines, "sp, 1,000 tokens")
    assert f"Details of study small: {path}" in lines
    assert "  out/config.json" in lines


def test_an_answer_compares_forms_only_when_there_are_several(fitted):
    shift = [
        {
            "sweep": "main",
            "tokens": 1e3,
            "lr": [0.1, 0.2],
            "ratio": 2.0,
            "on_edge": [],
            "unusable": [],
        }
    ]
    answer = {
        "study": "small",
        "fit": fitted,
        "path": "fit.json",
        "shift": shift,
        "pictures": [],
        "report": "report.html",
    }
    assert not [
        line for line in answer_lines(answer) if "transfer over width" in line or "Target" in line
    ]
    assert [
        line
        for line in answer_lines(answer | {"shift": shift * 2})
        if "transfer over width" in line
    ]
    assert answer_lines(answer)[-3:] == [
        "Details of study small: report.html",
        "Files:",
        "  fit.json",
    ]


def test_a_page_of_a_fit_read_back_is_the_same(fitted, tmp_path):
    read = Fit.read(fitted.write(tmp_path / "fit.json"))
    assert (
        report(read, tmp_path / "a.html").read_bytes()
        == report(fitted, tmp_path / "b.html").read_bytes()
    )


def test_a_width_that_only_diverged_is_named_not_hidden():
    row = {
        "sweep": "sp",
        "tokens": 81920.0,
        "lr": [0.5, 0.125],
        "ratio": 4.0,
        "on_edge": [],
        "unusable": ["426624"],
    }
    assert shift_lines([row])[0].endswith("factor of 4.00 (426624 parameters: no usable run)")


def test_a_report_of_a_fit_alone_has_its_picture(tmp_path):
    rows = pd.DataFrame(
        {
            "n_params": [1e7, 1e8, 1e9, 1e10] * 2,
            "method": ["a"] * 4 + ["b"] * 4,
            "loss": [4.0, 3.5, 3.25, 3.125, 3.8, 3.4, 3.2, 3.1],
        }
    )
    page = report(
        fit_relation(rows, RELATIONS["asymptote_n"]), tmp_path / "report.html"
    ).read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "<th>method</th>" in page
    assert "solution" not in page
