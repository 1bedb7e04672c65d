"""The example recipes and targets that come with the package."""

from __future__ import annotations

from pathlib import Path

from scaletune.errors import UserError
from scaletune.records.files import write_atomically

PACKAGED = Path(__file__).parent / "example_configs"  # made by the build from configs/
CLONE = Path(__file__).parent.parent / "configs"  # the same files, in a clone
OWN = "examples/own"  # one's own trainer: scripts, a notebook and their recipes
PATTERNS = (
    *("*.toml", "examples/*.toml", "targets/*"),
    *(f"{OWN}/*.toml", f"{OWN}/*.py", f"{OWN}/*.ipynb"),
)


def init(folder: str | Path) -> list[Path]:
    """Writes the example recipes and targets to a folder.

    The folder gets `quickstart.toml` (a study), `quickstart-target.toml`, `examples/` (a recipe for
    each model family), `examples/own/` (trainers of one's own) and `targets/` (large models). A
    file that is already there and equal stays.

    Args:
        folder: The folder. It is created if it does not exist.

    Returns:
        The paths of the files.

    Raises:
        UserError: A file of that name exists and differs. Nothing is written then.

    Example:
        >>> import tempfile, scaletune as st
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in st.init(folder))[-1]
        'vit-digits.toml'
    """
    source = PACKAGED if PACKAGED.is_dir() else CLONE
    paths = sorted(path for pattern in PATTERNS for path in source.glob(pattern))
    texts = {Path(folder) / path.relative_to(source): path.read_text("utf-8") for path in paths}
    for path, text in texts.items():
        if path.exists() and path.read_text("utf-8") != text:
            raise UserError(f"`{path}` exists and differs from the example: choose another folder")
    for path, text in texts.items():
        write_atomically(path, text)
    return list(texts)
