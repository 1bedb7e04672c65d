"""Tests of `scaletune check`: JSON, text, files under --out, and the data of the plots."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

import scaletune
from scaletune import checking, cli, recipe
from scaletune.errors import UserError
from scaletune.plotting import checks

RECIPE = """
[model]
width = 32
depth = 1
head_dim = 16
ffn_ratio = 2.0
[parametrization]
base_width = 32
init_std = 0.05
[optimizer]
lr = 0.003
[data]
source = "{words}"
seq_len = 32
[budget]
tokens = 2048
batch_tokens = 256
"""


@pytest.fixture(scope="module")
def folder_with_recipe(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("checks")
    (folder / "point.toml").write_text(RECIPE.format(words=words))
    return folder


@pytest.fixture(scope="module")
def all_checks(folder_with_recipe):
    """Runs `check --what all --out` once; returns (JSON answer, folder)."""
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as output:
        arguments = [
            "check",
            str(folder_with_recipe / "point.toml"),
            "--what",
            "all",
            "--widths",
            "32,64",
            "--seeds",
            "1",
            "--out",
            str(folder_with_recipe / "out"),
            "--json",
        ]
        assert cli.main(arguments) == 0
    return json.loads(output.getvalue()), folder_with_recipe / "out"


WHATS = ("coordinate", "sharpness", "alignment", "regime")
OWN = {
    "coordinate": {"slopes", "sizes", "diagnosis"},
    "sharpness": {"steps", "slope", "threshold", "finding"},
    "alignment": {"tensors", "finding"},
    "regime": {"changes", "finding"},
}


def test_all_checks_are_one_document(all_checks):
    answer, folder = all_checks
    assert answer["what"] == "all" and set(WHATS) <= answer.keys()
    assert answer["files"] == [
        str(folder / f"{what}{kind}") for what in WHATS for kind in (".png", ".json")
    ]
    for what in WHATS:
        assert (
            answer[what].keys()
            >= {"verdict", "over", "widths", "depths", "seeds", "caveats"} | OWN[what]
        )
        assert json.loads((folder / f"{what}.json").read_text()) == answer[what]
        assert (folder / f"{what}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("what", WHATS)
def test_one_check_prints_observations_and_their_meaning(folder_with_recipe, capsys, what):
    arguments = [
        "check",
        str(folder_with_recipe / "point.toml"),
        "--what",
        what,
        "--widths",
        "32,64",
        "--seeds",
        "1",
    ]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{what} check over widths 32, 64: ") and "Traceback" not in err
    labels = [line.strip().partition(":")[0] for line in out.splitlines() if line[2] != " "]
    assert labels[1:3] == ["observed", "meaning"] and set(labels[3:]) <= {"to change", "note"}
    assert len(out.splitlines()) > 3 and "files" not in out


def test_all_checks_over_depth_omit_alignment(folder_with_recipe, capsys):
    arguments = [
        "check",
        str(folder_with_recipe / "point.toml"),
        "--what",
        "all",
        "--over",
        "depth",
        "--depths",
        "1,2",
        "--seeds",
        "1",
        "--json",
    ]
    assert cli.main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(WHATS) & answer.keys() == set(WHATS) - {"alignment"}
    assert answer["regime"]["depths"] == [1, 2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--what sharpnes", "--what: invalid choice: 'sharpnes'"),
        ("--widths 32,0", "widths must be whole numbers above 0, but got 0"),
        ("--widths 32", "a slope needs two different widths, but got 32"),
        ("--seeds 0", "a slope needs at least one seed, but got none"),
        (
            "--what alignment --over depth",
            "the alignment exponent compares fan-ins, which grow with width, but got over='depth'",
        ),
        ("--what regime --set form=mupp", "`form` must be a known form, but got 'mupp'"),
        ("--widths 32,64 --seeds 1 --out {home}/point.toml", "point.toml"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(folder_with_recipe, capsys, options, sentence):
    options = options.format(home=folder_with_recipe).split()
    assert cli.main(["check", str(folder_with_recipe / "point.toml"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.startswith("scaletune: ")
    assert len(err.splitlines()) == 1


def test_the_function_takes_a_recipe_file_and_overrides(folder_with_recipe):
    settings = ["lr=0.001", "model.depth=2"]
    loaded = recipe.load(folder_with_recipe / "point.toml", settings)
    expected = checking.check(loaded, (32, 64), (0,))
    path = folder_with_recipe / "point.toml"
    assert scaletune.check(str(path), (32, 64), (0,), settings=settings) == expected
    assert scaletune.check(recipe.load(path), (32, 64), (0,), settings=settings) == expected
    assert expected["depths"] == [2]
    with pytest.raises(UserError, match=r"the recipe file must exist, but got `nowhere\.toml`"):
        scaletune.check("nowhere.toml")
    with pytest.raises(UserError, match="unknown setting `lrr`"):
        scaletune.check(loaded, settings=["lrr=1"])


# --- data of the plots ----------------------------------------------------------------------------


def test_a_panel_has_the_measured_data(all_checks):
    answer, _ = all_checks
    step = checks.panels(answer["coordinate"])[1]
    rows = {
        row["activation"]: row["rms"] for row in answer["coordinate"]["sizes"] if row["step"] == 4
    }
    assert step.title == "step 4"
    assert [list(curve.y) for curve in step.curves] == list(rows.values())
    assert all(list(curve.x) == [32, 64] for curve in step.curves)
    raw, preconditioned, scaled = checks.panels(answer["sharpness"])
    assert preconditioned.references == [("stability limit", pytest.approx(38.0))]
    assert raw.references == scaled.references == []
    assert [list(curve.y) for curve in scaled.curves] == [
        [row["scaled"][i] for row in answer["sharpness"]["steps"]] for i in (0, 1)
    ]
    terms = checks.panels(answer["alignment"])
    assert [panel.title for panel in terms] == ["W x", "dW x0", "W0 dx", "dW dx"]
    assert terms[0].references == [("full", 1.0), ("none", 0.5)]
    features, kernel = checks.panels(answer["regime"])
    for panel, of in ((features, "features"), (kernel, "kernel")):
        assert [list(curve.y) for curve in panel.curves] == [
            row["relative"] for row in answer["regime"]["changes"] if row["of"] == of
        ]


def test_plotted_lines_have_the_data_of_the_panel(all_checks):
    for what in WHATS:
        for panel in checks.panels(all_checks[0][what]):
            ax = checks.draw(panel, Figure().subplots())
            for curve, line in zip(panel.curves, ax.lines, strict=False):
                assert np.array_equal(line.get_xdata(), curve.x)
                assert np.array_equal(line.get_ydata(), curve.y, equal_nan=True)
            assert [line.get_ydata()[0] for line in ax.lines[len(panel.curves) :]] == [
                y for _, y in panel.references
            ]
            low, high = ax.get_ylim()
            assert ax.get_title() == panel.title and (not panel.log or high / low > 9.99)


def test_a_log_axis_covers_a_decade_and_a_missing_value_leaves_a_gap():
    curve = checks.Curve("c", np.array([32.0, 64.0]), np.array([1.0, 1.01]))
    low, high = checks.draw(
        checks.CheckPanel("t", "width", "y", [curve]), Figure().subplots()
    ).get_ylim()
    assert high / low == pytest.approx(10)
    assert np.isnan(checks._array([1.0, None])[1])
    assert checks._with_slope("x", None) == "x, slope +inf"


def test_an_optimizer_without_a_diagonal_has_the_raw_sharpness_alone():
    row = {"step": 4, "raw": [1.0, 2.0], "preconditioned": None, "scaled": None}
    assert [
        panel.title
        for panel in checks.panels(
            {"what": "sharpness", "over": "width", "widths": [32, 64], "steps": [row]}
        )
    ] == ["raw"]
