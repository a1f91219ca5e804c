"""Files with a JSON object a line, of which a reader sees every finished line at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from distnorm.monitor.records import plain

# How lines begin that were written here; others are parsed.
_STEP = re.compile(rb'\{"step": (\d+)[,}]')


class LineWriter:
    """Appends rows to a file, each at once and whole: neither SIGKILL nor a full disk leaves half a line.

    Args:
        path: the file, in a folder that exists; it is made with its first row.
        last_kept: rows of later steps that are there already are dropped: the run goes on from that step, or
            starts anew with 0. So are unfinished ones.

    Raises:
        OSError: the file can't be read or written.
    """

    def __init__(self, path: Path, last_kept: int) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._size = 0
        if path.exists():
            draft = path.with_suffix(".partial")
            with path.open("rb") as old, draft.open("wb") as new:
                new.writelines(line for line in old if 1 <= _step(line) <= last_kept)
            draft.replace(path)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows. Finite floats read back to the same bits; others are strings, such as "nan".

        Raises:
            OSError: a row couldn't be written, and nothing of it was left.
        """
        if self._file is None:
            # Unbuffered: a line is one write, and nothing is left to fail once the file is given up.
            self._file = self.path.open("ab", buffering=0)
            self._size = self._file.tell()
        for row in rows:
            line = (json.dumps(plain(row), allow_nan=False) + "\n").encode()
            try:
                self._put(self._file, line)
            except OSError:
                os.truncate(self.path, self._size)
                raise
            self._size += len(line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @staticmethod
    def _put(file: IO[bytes], line: bytes) -> None:
        # A disk that is all but full takes a part; the next write says why.
        while line:
            line = line[file.write(line) :]


def _step(line: bytes) -> int:
    """The row's step; 0 for what is no row, such as a line that a killed run left unfinished."""
    found = _STEP.match(line)
    if found is not None and line.endswith(b"}\n"):
        return int(found[1])
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
