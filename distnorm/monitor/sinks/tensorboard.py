"""TensorBoard, by the writer of its own package: no torch, and all layers of a step are one event."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distnorm.monitor.records import Alert, LayerRow, scalars

# Seconds for which a killed run may have lost its last events.
_FLUSH = 10


class TensorBoardSink:
    """Scalars `step/<key>`, `<group>/<key>` and `layer <number>/<layer>`, and alerts as text.

    Args:
        folder: where event files are written, one for each start of the run.
        last_kept: TensorBoard no longer shows what earlier files hold of later steps.
    """

    def __init__(self, folder: Path, last_kept: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._text = Event, Summary, text_pb
        self._writer = EventFileWriter(str(folder), flush_secs=_FLUSH)
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=last_kept + 1, session_log=start))

    def step(self, row: Mapping[str, Any]) -> None:
        self._put(row["step"], ((f"{group or 'step'}/{key}", value) for key, group, value in scalars(row)))

    def layers(self, step: int, rows: Sequence[LayerRow]) -> None:
        self._put(
            step,
            ((f"layer {key}/{row.layer}", value) for row in rows for key, value in row.numbers().items()),
        )

    def alert(self, alert: Alert) -> None:
        self._add(alert.step, self._text(f"alerts/{alert.kind}", alert.message))
        # Alerts are few, and what somebody searches for after a crash.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _put(self, step: int, values: Iterable[tuple[str, float]]) -> None:
        self._add(
            step, self._summary(value=[self._summary.Value(tag=tag, simple_value=v) for tag, v in values])
        )

    def _add(self, step: int, summary: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
