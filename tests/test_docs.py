"""The code blocks of README and docs run, and print what they show.

- A block with a title (` ```toml title="study.toml" `) becomes a file in the page's folder.
- ` ```console `: each line `$ command` runs in that folder. The lines below it are its output;
  `...` stands for any text. `scaletune` runs in this process, other commands in bash.
- ` ```console no-run `: shown only (installs, clusters, long training).
- ` ```toml `: a recipe, or a part of one, which must load.
- `>>>` blocks run as doctests (`--doctest-glob`).

`UPDATE_DOCS=1 pytest tests/test_docs.py` writes the real output into the pages.
"""

import doctest
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from scaletune import cli, recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAME = doctest.OutputChecker().check_output
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
UPDATE = bool(os.environ.get("UPDATE_DOCS"))


def blocks(text):
    """(match, language, title, options) of each fenced block."""
    for match in FENCE.finditer(text):
        options = match[2]
        title = re.search(r'title="([^"]+)"', options)
        yield match, match[1], title and title[1], options


def split(block):
    """A console block as [(command, expected output)]; a command goes on after a backslash."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)
    assert parts[0].strip() == "", "a console block starts with `$ `"
    for part in parts[1:]:
        command = re.match(r"(?:[^\n]*\\\n)*[^\n]*", part)[0]
        yield command, part[len(command) :].lstrip("\n")


def run(command, capsys):
    """(exit status, output) of one command."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    if words[0] == "scaletune" and not set(words) & set("|&;<>"):
        capsys.readouterr()
        try:
            code = cli.main(words[1:])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out if code == 0 else out + err
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the project's configs and records, as in a clone."""
    for name in ("configs", "sweeps", "fits"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page, folder, capsys):
    text, replaced = page.read_text(), {}
    for match, language, title, options in blocks(text):
        if title:
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text(match[3])
        if language == "console" and "no-run" not in options:
            shown = []
            for command, expected in split(match[3]):
                code, output = run(command, capsys)
                refusal = output.startswith("scaletune: ")
                assert code == (2 if refusal else 0), f"{page.name}: {command}\n{output}"
                same = not expected.strip() or SAME(expected.strip(), output.strip(), FLAGS)
                if UPDATE:
                    kept = expected if same and expected.strip() else output.rstrip() + "\n"
                    shown.append(f"$ {command}\n{kept}")
                else:
                    assert same, f"{page.name}: {command}\n{output}"
            replaced[match.start(3)] = (match[3], "".join(shown))
    if UPDATE:
        for old, new in replaced.values():
            text = text.replace(old, new)
        page.write_text(text)


REQUIRED = {  # tables that a part of a recipe lacks
    "model": "width = 64",
    "parametrization": "base_width = 32",
    "budget": "tokens = 4096\nbatch_tokens = 512",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_recipes_of_a_page_load(page, folder):
    for match, language, _, options in blocks(page.read_text()):
        if language == "toml" and "no-check" not in options:
            tables = tomllib.loads(match[3])
            missing = [f"[{name}]\n{REQUIRED[name]}\n" for name in REQUIRED.keys() - tables]
            (folder / "page.toml").write_text(match[3] + "\n".join(missing))
            recipe.load(folder / "page.toml")
