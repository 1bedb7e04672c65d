"""The results file of a trial, `SCALETUNE_RESULTS`: one JSON object a line, read as it grows."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from io import BufferedReader, FileIO
from pathlib import Path

from scaletune.sweeping.trainers.reports import parse_row

LINE = 1 << 16  # bytes of a line that are read: a longer one is no report
BLOCK = 1 << 20  # bytes


class ResultsFile:
    """Reads the lines that are new. An unfinished last line waits.

    A file that is deleted is still read to its end. One that the trainer writes anew is read from
    its start.

    Args:
        path: The file. It exists.
        restart: Called before lines are read again.
    """

    def __init__(self, path: Path, restart: Callable[[], None]):
        self.path, self._restart, self._unread = path, restart, b""
        self._file = _open_file(path)
        self.behind = False
        """Whether the last `read` has left something unread."""

    def read(self, most: int = BLOCK) -> Iterator[bytes]:
        """The lines of at most about `most` new bytes; of a long line, its beginning."""
        yield from self._read_lines(most)
        if not self.behind and self._is_written_anew():
            self._unread = b""
            self._restart()
            yield from self._read_lines(most)

    def _read_lines(self, most: int) -> Iterator[bytes]:
        self.behind = False
        with suppress(OSError):
            while new := self._file.read(BLOCK):
                *lines, unread = (self._unread + new).split(b"\n")
                self._unread = unread[: LINE + 1]
                yield from (line[: LINE + 1] for line in lines if line.strip())
                most -= len(new)
                if most <= 0:
                    self.behind = True
                    return

    def _is_written_anew(self) -> bool:
        """Whether the file is shorter now, or another one; reading continues at its start then."""
        with suppress(OSError):
            status = os.fstat(self._file.fileno())
            if status.st_size < self._file.tell():
                self._file.seek(0)
                return True
            if self.path.stat().st_ino != status.st_ino:
                old, self._file = self._file, _open_file(self.path)
                old.close()
                return True
        return False

    def rest(self) -> Iterable[bytes]:
        """The last line, if it does not end with a line break."""
        rest, self._unread = self._unread, b""
        return [rest] if rest.strip() else []

    def close(self) -> None:
        self._file.close()


def _open_file(path: Path) -> FileIO:
    """Opens a file for reading; OSError for what is no file, such as a pipe that would block."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = FileIO(number)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        file.close()
        raise OSError(f"{path} is no file")
    return file


def cut_at_checkpoint(path: Path, find: Callable[[str], str]) -> str:
    """The checkpoint to resume from; cuts the results file after the report that names it.

    Without one that exists the file is emptied, or created: the trial starts from the beginning.

    Args:
        path: The results file of an earlier try, if there was one.
        find: The path of a checkpoint that was reported, where it is now; empty if it is gone.
    """
    kept, checkpoint, whole, offset = 0, "", True, 0
    with suppress(OSError), _open_file(path) as raw, BufferedReader(raw, BLOCK) as file:
        while line := file.readline(BLOCK):
            offset += len(line)
            row = parse_row(line) if b"checkpoint" in line and len(line) <= LINE else None
            name = row.get("checkpoint") if row else None
            if isinstance(name, str) and (now := find(name)):
                kept, checkpoint, whole = offset, now, line.endswith(b"\n")
    if path.is_symlink() or not path.is_file():
        _remove(path)
    with path.open("ab") as file:
        file.truncate(kept)
        if not whole:
            file.write(b"\n")
    return checkpoint


def _remove(path: Path) -> None:
    """Removes what a trainer has put in the place of its results file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
