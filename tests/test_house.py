"""Rules of the source tree, checked with `ast`.

Import rules between packages, names, docstrings of public names, and the length of the README.
"""

import ast
import inspect
import subprocess
import sys
import textwrap
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import get_args

import pydantic
import pytest

import scaletune

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
        "environment",
        "recipe",
        "counting",
        "surface",
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
    "top": ("examples", "study", "cli", "trial", "__init__", "__main__"),
}
ROW = {name: row for row, names in ROWS.items() for name in names}
# `Fit.predict` is the only function of the shared row that imports from the numpy row. A sweep
# reads the log of a user's trainer with the readers of `importing`, and starts `scaletune.trial`.
ALLOWED_EXCEPTIONS = {("records", "predicting"), ("sweeping", "importing"), ("sweeping", "trial")}
HEAVY = {"torch", "accelerate", "mup", "transformers"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    """`models/layers.py` -> `models`; `recipe.py` -> `recipe`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


ROOMS = {room(path) for path in SOURCES}


def running_code(tree):
    """Every node except those under `if TYPE_CHECKING:`, including imports inside functions."""
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


def rooms_imported(path):
    """Rooms that a file imports from; the package itself is `__init__`."""
    return {
        [*name.split("."), "__init__"][1]
        for name in imports(path)
        if name.split(".")[0] == "scaletune"
    }


def packages(path):
    return {name.split(".")[0] for name in imports(path)}


def reachable_packages(name):
    """Packages imported by a room and by every room that it imports, inside functions too."""
    seen, queue, imported = set(), [name], set()
    while queue:
        now = queue.pop()
        files = [path for path in SOURCES if room(path) == now]
        seen.add(now)
        for path in files:
            imported |= packages(path)
            queue += [
                other
                for other in rooms_imported(path)
                if other not in seen and (now, other) not in ALLOWED_EXCEPTIONS
            ]
    return imported


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_left_in_the_row_or_to_shared(path):
    name = room(path)
    row = ROWS[ROW[name]]  # KeyError: add a new room to ROWS and DESIGN.md
    allowed = (
        {name, *ROWS["shared"], *row[: row.index(name)]}
        if ROW[name] != "shared"
        else {name, *row[: row.index(name)]}
    )
    allowed |= {other for here, other in ALLOWED_EXCEPTIONS if here == name}
    if ROW[name] != "top":
        assert rooms_imported(path) <= allowed


def test_only_fit_predict_imports_from_the_numpy_row():
    tree = ast.parse((PACKAGE / "records" / "fit.py").read_text())
    importers = [
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        and any(
            isinstance(node, ast.ImportFrom) and str(node.module).startswith("scaletune.predicting")
            for node in ast.walk(function)
        )
    ]
    assert importers == ["predict"]


@pytest.mark.parametrize(
    "name", [name for name in ROW if ROW[name] in ("shared", "numpy") and name in ROOMS]
)
def test_shared_and_numpy_rows_never_reach_torch(name):
    assert not HEAVY & reachable_packages(name)


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


def call_and_keywords(node):
    """`a.b(c=True)` -> ("a.b", {"c": True}); of an argument that is no constant, None."""
    return ast.unparse(node.func), {
        arg.arg: getattr(arg.value, "value", None) for arg in node.keywords
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_are_read_as_data_and_no_shell_is_started(path):
    calls = [
        call_and_keywords(node)
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


# --- names and import cycles ----------------------------------------------------------------------

PACKAGES_AND_TERMS = {  # the only modules whose names end in -ing: packages, and terms of the field
    *("parametrizing", "training", "checking", "sweeping", "counting", "predicting", "importing"),
    *("fitting", "planning", "transferring", "linting", "plotting", "reporting"),
    *("hashing", "sharding", "overtraining", "resampling", "embedding"),
}
# names that do not describe the value
PRIVATE_WORDS = {
    "said",
    "found",
    "asked",
    "left",
    "made",
    "told",
}


def module_of(path):
    """`scaletune/sweeping/__init__.py` -> `scaletune.sweeping`."""
    dotted = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def modules_imported(path):
    """Modules of ours that a file imports, also inside functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                yield from (
                    name
                    for name in [dotted if dotted in MODULES else node.module]
                    if name in MODULES
                )


def test_there_are_no_import_cycles():
    graph = {
        name: set(modules_imported(path)) - {name, "scaletune"} for name, path in MODULES.items()
    }
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_is_named_by_a_noun(path):
    name = path.parent.name if path.name == "__init__.py" else path.stem
    assert not name.endswith("ing") or name in PACKAGES_AND_TERMS


def test_class_names_are_unique():
    homes = defaultdict(list)
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(name)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def bound_names(tree):
    """Names that a file assigns: variables, arguments, functions, imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.alias):
            yield node.asname or node.name, node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_names_say_what_they_hold(path):
    bound = bound_names(ast.parse(path.read_text()))
    assert [(name, line) for name, line in bound if name.strip("_") in PRIVATE_WORDS] == []


@pytest.mark.parametrize("name", scaletune.__all__)
def test_public_names_are_documented_with_an_example(name):
    """Google style: what tools show as arguments, results, errors; doctest runs the example."""
    public = getattr(scaletune, name)
    text = inspect.getdoc(public)
    assert text and ">>>" in text
    if inspect.isfunction(public):
        if inspect.signature(public).parameters:
            assert "\nArgs:\n" in text
        assert "\nReturns:\n" in text and "\nExample:\n" in text


def field_strings(cls):
    """The fields of a class, and those with a string under them."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    for field, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and not field.target.id.startswith("_"):
            text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            yield field.target.id, text and isinstance(below.value.value, str)


def tables(model):
    """The recipe tables that a pydantic model contains, itself among them."""
    yield model
    for field in model.model_fields.values():
        queue = [field.annotation]
        while queue:
            each = queue.pop()
            queue += get_args(each)
            if isinstance(each, type) and issubclass(each, pydantic.BaseModel):
                yield from tables(each)


def public_records():
    from scaletune.parametrizing.plan import Plan
    from scaletune.predicting import Prediction

    classes = {*tables(scaletune.Recipe), scaletune.Trial, scaletune.Fit, Plan, Prediction}
    bases = {
        base for cls in classes for base in cls.__mro__ if base.__module__.startswith("scaletune")
    }
    return sorted(classes | bases, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", public_records(), ids=lambda cls: cls.__name__)
def test_each_field_of_a_public_record_has_a_docstring(cls):
    assert [name for name, has_text in field_strings(cls) if not has_text] == []


def test_the_readme_fits_on_a_few_screens():
    lines = (PACKAGE.parent / "README.md").read_text().splitlines()
    assert len(lines) <= 130
