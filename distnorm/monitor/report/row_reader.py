"""Rows of JSON, a line each, read fast and without stumbling over those that a killed run left broken."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from distnorm.errors import RunError

Row = dict[str, Any]

_AT_ONCE = 1 << 22


@dataclass(slots=True)
class UnreadableLines:
    """The lines of a file that hold no row: how many, and the first. A last line cut short isn't one."""

    file: str
    count: int = 0
    first: int = 0

    def add(self, line: int) -> None:
        self.count += 1
        self.first = self.first or line

    def __str__(self) -> str:
        if self.count == 1:
            return f"{self.file}: line {self.first} could not be read and is left out"
        return (
            f"{self.file}: {self.count:,} lines could not be read and are left out, line {self.first} first"
        )


def leads_out(file: Path) -> bool:
    """Whether a file is a link to what is not in its folder.

    A folder that somebody else wrote may have one in a file's place, to what its reader alone may read.
    """
    try:
        return not file.resolve().is_relative_to(file.parent.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return True


def open_own(file: Path) -> BinaryIO:
    """Open a file of a run's folder to read it.

    Raises:
        OSError: it is a link that leads out of the folder, or no file of bytes, which might never end.
    """
    if leads_out(file):
        raise OSError(errno.ELOOP, "it is a link out of its folder, which is not followed", str(file))
    # The file may have become a link, or a pipe, which would be waited for, since it was looked at.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(file.resolve(), flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(file))
    return os.fdopen(descriptor, "rb")


def read_rows(path: Path, broken: UnreadableLines) -> Iterator[list[tuple[int, Row]]]:
    """The rows of a file with the numbers of their lines, some megabytes at a time.

    A last line without its line break, which is what SIGKILL leaves, counts only where it is whole.

    Raises:
        RunError: the file can't be read.
    """
    done = 0
    try:
        with open_own(path) as file:
            while lines := file.readlines(_AT_ONCE):
                cut = not lines[-1].endswith(b"\n")
                yield rows_of(lines, done, cut, broken)
                done += len(lines)
    except OSError as error:
        raise RunError(f"expected a run's {path.name}, found {error}") from error


def rows_of(lines: list[bytes], done: int, cut: bool, broken: UnreadableLines) -> list[tuple[int, Row]]:
    """The rows of lines that come after `done` others; `cut` says that the last one may not be whole."""
    if not lines:
        return []
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")  # one call is several times as fast as one a line
        if len(rows) == len(lines) and all(type(row) is dict for row in rows):
            return list(enumerate(rows, done + 1))
    except (ValueError, RecursionError):
        pass
    found: list[tuple[int, Row]] = []
    for place, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            found.append((done + place + 1, row))
        elif not (cut and place == len(lines) - 1):
            broken.add(done + place + 1)
    return found
