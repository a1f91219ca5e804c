"""A run's files while they grow: only what is new is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from distnorm.errors import RunError
from distnorm.monitor.records import ALERTS_FILE, LAYERS_FILE, METRICS_FILE, NOTES_FILE, STARTS_FILE
from distnorm.monitor.report.doctor_page import FILE as DOCTOR_FILE
from distnorm.monitor.report.layers import LayerGrid, LayerRows
from distnorm.monitor.report.row_reader import Row, UnreadableLines, open_own, rows_of
from distnorm.monitor.report.runs import Run, gather_run, run_names
from distnorm.monitor.report.steps import Step, Steps, step_of

_AT_ONCE, _HEAD = 1 << 22, 1 << 10
_MOST_CELLS = 20_000
"""Of a map of layers that is drawn again and again; a report, drawn once, has eight times as many."""


@dataclass(slots=True)
class Tail:
    """The lines of a file beyond those that have been read. A file that is another one now begins anew.

    Since a new file may get the number of one that was removed, its first bytes have to be the same too.

    Args:
        path: the file, which need not exist.
        epoch: how often it has begun anew.
    """

    path: Path
    epoch: int = 0
    _identity: tuple[int, int] = (0, 0)
    _head: bytes = b""
    _done: int = 0
    _lines: int = 0

    def read(self) -> list[tuple[int, Row]]:
        """The new rows, some megabytes of them at most, with the numbers of their lines.

        A last line that has no line break yet is left for the next time.
        """
        try:
            with open_own(self.path) as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                is_same = identity == self._identity and status.st_size >= self._done
                if not is_same or file.read(len(self._head)) != self._head:
                    self.epoch += self._identity != (0, 0)
                    self._identity, self._head, self._done, self._lines = identity, b"", 0, 0
                file.seek(self._done)
                found = file.read(_AT_ONCE)
                if b"\n" not in found and len(found) == _AT_ONCE:
                    found += file.readline()
        except OSError:
            return []
        whole = found[: found.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        rows = rows_of(lines, self._lines, cut=False, broken=UnreadableLines(self.path.name))
        self._head = self._head or whole[:_HEAD]
        self._done += len(whole)
        self._lines += len(lines)
        return rows


class Follower:
    """One run, followed.

    Args:
        path: its folder, or its metrics file; neither has to hold anything yet.
        name: for people.

    Attributes:
        epoch: grows when the run has begun anew, or gone back to an earlier step.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.folder, self.name = (path if path.is_dir() else path.parent), name
        self._metrics = Tail(path / METRICS_FILE if path.is_dir() else path.resolve())
        self._layers = Tail(self.folder / LAYERS_FILE)
        self._steps: list[Step] = []
        self._seen = 0
        self.epoch = 0
        self._rows = LayerRows()
        self._layers_seen = 0

    @property
    def steps(self) -> list[Step]:
        """All steps up to now, ascending."""
        return self._steps

    def refresh(self) -> None:
        """Read the steps that are new."""
        more = True
        while more:
            more = bool(rows := self._metrics.read())
            if self._seen != self._metrics.epoch:
                self._seen, self._steps = self._metrics.epoch, []
                self.epoch += 1
            for _, row in rows:
                step = step_of(row)
                if step is None:
                    continue
                while self._steps and self._steps[-1].step >= step.step:
                    self._steps.pop()
                    self.epoch += 1
                self._steps.append(step)

    def layers(self) -> LayerGrid:
        """The layers up to now. The first call reads all of their file."""
        more = True
        while more:
            more = bool(rows := self._layers.read())
            if self._layers_seen != self._layers.epoch:
                self._layers_seen, self._rows = self._layers.epoch, LayerRows()
            for line, row in rows:
                self._rows.add(line, row)
        return self._rows.grid(_MOST_CELLS)

    def run(self, *, with_layers: bool = False) -> Run:
        """The run as a report shows it."""
        layers = self.layers() if with_layers else LayerGrid()
        return gather_run(self.folder, self.name, Steps(tuple(self._steps), ()), layers)

    def stamp(self) -> str:
        """What changes whenever anything does that a page says of the run."""
        files = (METRICS_FILE, ALERTS_FILE, STARTS_FILE, NOTES_FILE, DOCTOR_FILE)
        return " ".join(_stamp(self.folder / name) for name in files)


def follow(paths: list[Path]) -> list[Follower]:
    """Followers of runs.

    Raises:
        RunError: a path is no folder, and no file either.
    """
    for path in paths:
        if not path.exists():
            raise RunError(f"expected a run's folder or its {METRICS_FILE}, found nothing at {path}")
    return [Follower(path, name) for path, name in zip(paths, run_names(paths), strict=True)]


def _stamp(file: Path) -> str:
    try:
        status = file.stat()
    except OSError:
        return "-"
    return f"{status.st_ino}.{status.st_size}.{status.st_mtime_ns}"
