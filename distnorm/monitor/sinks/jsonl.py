"""The run's own files, which `distnorm report` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distnorm.monitor.jsonl import LineWriter
from distnorm.monitor.records import Alert, LayerRow

METRICS_FILE, LAYERS_FILE, ALERTS_FILE = "metrics.jsonl", "layers.jsonl", "alerts.jsonl"


class JsonlSink:
    """metrics.jsonl, layers.jsonl and alerts.jsonl, as `LineWriter` writes them.

    Args:
        folder: made where it isn't there.
        last_kept: rows of later steps are dropped.
    """

    def __init__(self, folder: Path, last_kept: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._layers, self._alerts = self._files = tuple(
            LineWriter(folder / name, last_kept) for name in (METRICS_FILE, LAYERS_FILE, ALERTS_FILE)
        )

    def step(self, row: Mapping[str, Any]) -> None:
        self._metrics.write([row])

    def layers(self, step: int, rows: Sequence[LayerRow]) -> None:
        self._layers.write({"step": step, **asdict(row)} for row in rows)

    def alert(self, alert: Alert) -> None:
        self._alerts.write([alert.to_dict()])

    def close(self) -> None:
        for file in self._files:
            file.close()
