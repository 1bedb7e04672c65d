"""The house rules of imports, read off the source with `ast`: which room a module is in, and what it may take from where."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "scaletune"
ROWS = {
    "shared": (
        "errors",
        "units",
        "records",
        "rules",
        "sections",
        "zoo",
        "huggingface",
        "hardware",
        "recipe",
        "counting",
    ),
    "torch": ("models", "parametrizing", "data", "optim", "training", "checking", "sweeping"),
    "numpy": (
        "laws",
        "predicting",
        "importing",
        "fitting",
        "planning",
        "transferring",
        "linting",
        "plotting",
        "reporting",
    ),
    "top": ("study", "cli", "__init__", "__main__"),
}
ROW = {name: row for row, names in ROWS.items() for name in names}
HANDS_OVER = {
    ("records", "predicting")
}  # `Fit.predict` hands over to the numpy row: the one method that does
HEAVY = {"torch", "accelerate", "mup", "transformers"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    """`models/layers.py` -> `models`; `recipe.py` -> `recipe`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


ROOMS = {room(path) for path in SOURCES}


def running_code(tree):
    """Every node but those under `if TYPE_CHECKING:`; deferred imports inside functions are among them."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        yield node
        checking = (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        )
        nodes += node.orelse if checking else ast.iter_child_nodes(node)


def imports(path):
    """Dotted names of what a file imports, `from scaletune import data` as `scaletune.data`."""
    for node in running_code(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path):
    """Rooms that a file imports from; the package itself is `__init__`."""
    return {
        [*name.split("."), "__init__"][1]
        for name in imports(path)
        if name.split(".")[0] == "scaletune"
    }


def packages(path):
    return {name.split(".")[0] for name in imports(path)}


def reached(name):
    """Packages imported by a room and by every room it leads to, inside functions too."""
    seen, queue, found = set(), [name], set()
    while queue:
        now = queue.pop()
        files = [path for path in SOURCES if room(path) == now]
        seen.add(now)
        for path in files:
            found |= packages(path)
            queue += [
                other
                for other in ours(path)
                if other not in seen and (now, other) not in HANDS_OVER
            ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_left_in_the_row_or_to_shared(path):
    name = room(path)
    row = ROWS[ROW[name]]  # a KeyError: a new room, which DESIGN.md and ROWS must give a place
    allowed = (
        {name, *ROWS["shared"], *row[: row.index(name)]}
        if ROW[name] != "shared"
        else {name, *row[: row.index(name)]}
    )
    allowed |= {other for here, other in HANDS_OVER if here == name}
    if ROW[name] != "top":
        assert ours(path) <= allowed


def test_fit_predict_alone_hands_over():
    tree = ast.parse((PACKAGE / "records" / "fit.py").read_text())
    handing = [
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        and any(
            isinstance(node, ast.ImportFrom) and node.module == "scaletune.predicting"
            for node in ast.walk(function)
        )
    ]
    assert handing == ["predict"]


@pytest.mark.parametrize(
    "name", [name for name in ROW if ROW[name] in ("shared", "numpy") and name in ROOMS]
)
def test_shared_and_numpy_rows_never_reach_torch(name):
    assert not HEAVY & reached(name)


@pytest.mark.parametrize(
    ("package", "rooms_of_it"),
    [
        ("accelerate", "training"),
        ("matplotlib", "plotting"),
        ("datasets", "data"),
        ("sklearn", "data sweeping"),
        ("torchvision", ""),
    ],
)
def test_no_other_room_imports_it(package, rooms_of_it):
    rooms = {room(path) for path in SOURCES if package in packages(path)}
    assert rooms == set(rooms_of_it.split())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_runs_strings_or_pickles(path):
    called = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"eval", "exec", "compile", "__import__"}
    assert not packages(path) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def _called(node):
    """`a.b(c=True)` -> ("a.b", {"c": True}); of an argument that is no constant, None."""
    return ast.unparse(node.func), {
        arg.arg: getattr(arg.value, "value", None) for arg in node.keywords
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_are_read_as_data_and_no_shell_is_started(path):
    calls = [
        _called(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]
    for name, named in calls:
        assert name not in (
            "os.system",
            "os.popen",
            "subprocess.getoutput",
            "subprocess.getstatusoutput",
            "pd.read_pickle",
        )
        assert "shell" not in named and not named.get("allow_pickle", False)
        assert name != "torch.load" or named.get("weights_only") is True


@pytest.mark.parametrize(
    "name", ["recipe", "counting", "data", "transferring.formats.granite", "sweeping"]
)
def test_torch_stays_out_until_something_trains(name):
    code = f"import sys, scaletune.{name}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
