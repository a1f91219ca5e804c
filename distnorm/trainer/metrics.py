"""One JSON line a step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

METRICS_FILE = "metrics.jsonl"
"""The file's name in the run's folder."""


Row = Mapping[str, float | int | bool]
"""The metrics of one step; `step` counts from 1."""


class MetricsWriter:
    """Writes rows to a run's metrics file, each at once, so that a reader sees every finished step.

    Args:
        folder: the run's folder, which exists.
        last_kept: rows of later steps are dropped: the run goes on from there, or starts anew with 0.
    """

    def __init__(self, folder: Path, last_kept: int) -> None:
        self.path = folder / METRICS_FILE
        kept = [line for line in _lines(self.path) if 1 <= _step(line) <= last_kept]
        draft = self.path.with_suffix(".partial")
        draft.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        draft.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append a row. Finite floats read back to the same bits; others are strings, such as "nan"."""
        plain = {key: _plain(value) for key, value in row.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _step(line: str) -> int:
    """The row's step; 0 for a line that a killed run left unfinished."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def _plain(value: float | int | bool) -> float | int | bool | str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers, and float() reads the strings back
    return value
