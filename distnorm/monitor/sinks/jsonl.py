"""The run's own files, a JSON object a line, of which a reader sees every finished line at once."""

from __future__ import annotations

import json
import os
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distnorm.monitor.records import ALERTS_FILE, LAYERS_FILE, METRICS_FILE, Alert, LayerRow, plain
from distnorm.monitor.sinks.starts import write_start

# How lines begin that were written here; others are parsed.
_STEP = re.compile(rb'\{"step": (\d+)[,}]')


class LineWriter:
    """Appends rows to a file, each at once and whole: neither SIGKILL nor a full disk leaves half a line.

    Args:
        path: the file, in a folder that exists; the first `write` makes it, though it have no rows.
        last_kept: rows of later steps that are there already are dropped: the run goes on from that step, or
            starts anew with 0. So are unfinished ones.

    Raises:
        OSError: the file can't be read or written.
    """

    def __init__(self, path: Path, last_kept: int) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._close: Callable[[], object] = lambda: None
        self._size = 0
        if path.is_file():  # a device or a pipe has no rows, and may have no end
            draft = path.with_suffix(".partial")
            with path.open("rb") as old, draft.open("wb") as new:
                new.writelines(line for line in old if 1 <= _step(line) <= last_kept)
            draft.replace(path)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows. Finite floats read back to the same bits; others are strings, such as "nan".

        Raises:
            OSError: a row couldn't be written, and nothing of it was left.
        """
        if self._descriptor is None:
            # No file object, whose buffer would have to be written yet when the disk is full.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
            self._descriptor = os.open(self.path, flags, 0o666)
            self._close = finalizer = weakref.finalize(self, os.close, self._descriptor)
            finalizer.atexit = False  # the interpreter's end may bring a last row yet
            self._size = os.fstat(self._descriptor).st_size
        for row in rows:
            line = (json.dumps(plain(row), allow_nan=False) + "\n").encode()
            try:
                _put(self._descriptor, line)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)
                raise
            self._size += len(line)

    def close(self) -> None:
        """Let go of the file; the next row opens it again."""
        self._close()
        self._descriptor = None


class JsonlSink:
    """metrics.jsonl, layers.jsonl and alerts.jsonl, as `LineWriter` writes them; and a line in starts.jsonl.

    Args:
        folder: made where it isn't there.
        last_kept: rows of later steps are dropped.
        alerts: whether there can be alerts: then alerts.jsonl is there from the start, and empty says none.
    """

    def __init__(self, folder: Path, last_kept: int, *, alerts: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._layers, self._alerts = self._files = tuple(
            LineWriter(folder / name, last_kept) for name in (METRICS_FILE, LAYERS_FILE, ALERTS_FILE)
        )
        with suppress(OSError):
            write_start(folder, last_kept)
        if alerts:
            self._alerts.write(())

    def step(self, row: Mapping[str, Any]) -> None:
        self._metrics.write([row])

    def layers(self, step: int, rows: Sequence[LayerRow]) -> None:
        self._layers.write({"step": step, **row.to_dict()} for row in rows)

    def alert(self, alert: Alert) -> None:
        self._alerts.write([alert.to_dict()])

    def close(self) -> None:
        for file in self._files:
            file.close()


def _put(descriptor: int, line: bytes) -> None:
    # A disk that is all but full takes a part; the next write says why.
    while line:
        line = line[os.write(descriptor, line) :]


def _step(line: bytes) -> int:
    """The row's step; 0 for what is no row, such as a line that a killed run left unfinished."""
    found = _STEP.match(line)
    if found is not None and line.endswith(b"}\n"):
        return int(found[1])
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
