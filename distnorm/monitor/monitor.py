"""A run's host values become rows and alerts, and these go to sinks and callbacks."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from distnorm.config import MonitorConfig
from distnorm.monitor.alert_rules import AlertRules
from distnorm.monitor.records import Alert, LayerRow, as_python
from distnorm.monitor.sinks import Sinks, openers

_log = logging.getLogger("distnorm")


class Monitor:
    """Turns a run's values into rows and alerts, and never stops it.

    Every rank may hold one, and then all have the same state; only one that writes opens files, logs and
    calls back. The first value opens the sinks, or entering the monitor as a context does.

    Args:
        config: what is monitored, and where rows and alerts go.
        folder: for the run's files; None: `config.dir`, and where that is None too, no files.
        writes: whether this rank writes, logs and calls back.
        done: the step after which the run goes on: rows of later steps are dropped from files that are there.

    Attributes:
        non_finite_in_a_row: steps up to now whose norm was inf or NaN, without a finite one between.
    """

    def __init__(
        self, config: MonitorConfig, folder: Path | None = None, *, writes: bool = True, done: int = 0
    ) -> None:
        self._config, self._writes, self._done = config, writes, done
        self._folder = Path(config.dir) if folder is None and config.dir is not None else folder
        self._rules = AlertRules(config.alerts)
        self._clipped: deque[bool] = deque(maxlen=config.clip_rate_window)
        self._callbacks: list[Callable[[Alert], object]] = []
        self._failed: set[int] = set()
        self._undelivered: deque[Alert] = deque()
        self._holds = 0
        self._has_warned = False
        self._sinks: Sinks | None = None
        self._closed = False
        self._newest_layers: tuple[LayerRow, ...] = ()
        self.non_finite_in_a_row = 0

    def write_here(self, writes: bool) -> None:
        """Say whether this rank is the one that writes from now on."""
        self._writes = writes

    def on_alert(self, callback: Callable[[Alert], object]) -> None:
        """Have `callback` called with each alert, where this rank writes; what it raises is logged once.

        It may do anything, such as free gradients or save a checkpoint: its step has been written.
        """
        self._callbacks.append(callback)

    def step(
        self, row: Mapping[str, Any], *, parameter: str | None = None, ranks: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Take in a step.

        Args:
            row: the keys of metrics.jsonl, of which `step`, `clipped` and `finite` must be there.
            parameter: where the norm isn't finite, the first whose gradient isn't.
            ranks: those on which it isn't.

        Returns:
            The row with `clip_rate`, the share of clipped steps among the last `clip_rate_window`; with
            `skipped`, False, and `noise_scale`, None, where it has none; and with `time`, when it was
            written, in seconds since 1970.
        """
        # Before this step counts as done: rows of it that are in a file are of an earlier try.
        sinks = self._open()
        step, finite = int(row["step"]), bool(row["finite"])
        self._done = max(self._done, step)
        self._clipped.append(bool(row["clipped"]))
        rate = sum(self._clipped) / len(self._clipped)
        self.non_finite_in_a_row = 0 if finite else self.non_finite_in_a_row + 1
        full = {**{key: as_python(value) for key, value in row.items()}, "clip_rate": rate}
        full.setdefault("skipped", False)
        full.setdefault("noise_scale", None)
        full.setdefault("time", round(time.time(), 3))
        if sinks is not None:
            sinks.step(full)
        if len(self._clipped) == self._clipped.maxlen:
            self._alert(self._rules.clip_rate(step, rate))
        self._alert(self._rules.finite(step, finite, row.get("grad_norm"), parameter, ranks))
        return full

    def not_finite(
        self,
        step: int,
        norm: float,
        *,
        parameter: str | None = None,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Take in that a norm which is not finite was raised as an error: of a step that may have no row."""
        self.non_finite_in_a_row += step > self._done
        self._alert(self._rules.finite(step, False, norm, parameter, ranks))

    def layers(self, step: int, rows: Sequence[LayerRow]) -> None:
        """Take in a monitored step's rows of all layers, in the order of the model."""
        self._newest_layers = tuple(rows)
        if (sinks := self._open()) is not None:
            sinks.layers(step, rows)
            self._warn_of_no_place(sinks)
        self._alert(self._rules.layers(step, rows))

    def diverged(self, step: int, layer: str | None, ranks: Sequence[int] | None) -> None:
        """Take in that replicas of a layer's gradient differ: which ranks hold another than most."""
        self._alert(self._rules.diverged(step, layer, ranks))

    def state_dict(self) -> dict[str, Any]:
        """Windows, averages and which alerts were given: numbers, strings, lists and dicts, as in JSON."""
        return {
            "step": self._done,
            "clipped": [int(clipped) for clipped in self._clipped],
            "non_finite_in_a_row": self.non_finite_in_a_row,
            "rules": self._rules.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the run's files lose their rows of later steps, also of this monitor's own."""
        if self._sinks is not None:  # a run that goes back: they are opened anew, from that step on
            self._sinks.close()
            self._sinks = None
        self._done = int(state["step"])
        self._clipped.clear()
        self._clipped.extend(bool(clipped) for clipped in state["clipped"])
        self.non_finite_in_a_row = int(state["non_finite_in_a_row"])
        self._rules.load_state_dict(state["rules"])

    def close(self) -> None:
        """Close all sinks; later values still give alerts, and are written nowhere."""
        self._closed = True
        if self._sinks is not None:
            self._sinks.close()

    def __enter__(self) -> Monitor:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Sinks | None:
        if self._sinks is None and self._writes and not self._closed:
            self._sinks = Sinks(
                openers(
                    self._config.sinks,
                    self._folder,
                    self._done,
                    alerts=self._config.has_alerts,
                    notify=self._config.alerts.notify,
                )
            )
        return self._sinks

    def _warn_of_no_place(self, sinks: Sinks) -> None:
        if self._has_warned or sinks or self._callbacks or self._closed:
            return
        self._has_warned = True
        _log.warning(
            "monitor.every = %s measures layers, and nothing keeps what it finds, save alerts in this log: "
            "set monitor.dir (under the trainer train.output_dir), monitor.sinks.tensorboard, "
            "monitor.sinks.wandb or monitor.sinks.prometheus, or give Monitor.on_alert a callback",
            self._config.every,
        )

    def _alert(self, found: Iterable[Alert]) -> None:
        alerts = list(found)
        if not self._writes or not alerts:
            return
        for alert in alerts:
            if (sinks := self._open()) is not None:
                sinks.alert(alert)
        self._undelivered.extend(alerts)
        # A spike is in all layers at once: one line for each kind, whichever number of layers.
        for kind in dict.fromkeys(alert.kind for alert in alerts):
            first, *others = [alert for alert in alerts if alert.kind == kind]
            more = f" (and {len(others)} more like it)" if others else ""
            _log.warning("step %d: %s: %s%s", first.step, kind, first.message, more)
        self._deliver()

    def _deliver(self) -> None:
        # A callback may report further steps: their alerts come behind those that wait already.
        while self._undelivered and not self._holds:
            self._call_back(self._undelivered.popleft())

    def _call_back(self, alert: Alert) -> None:
        for number, callback in enumerate(self._callbacks):
            try:
                callback(alert)
            except Exception as error:
                if number not in self._failed:
                    self._failed.add(number)
                    name = getattr(callback, "__qualname__", repr(callback))
                    _log.warning(
                        "callback %s failed: %s: %s; it is called again for the next alert",
                        name,
                        type(error).__name__,
                        error,
                    )


@contextmanager
def callbacks_held(monitor: Monitor) -> Iterator[None]:
    """Have a monitor's callbacks called at the end of the block, when a step has been taken in completely."""
    monitor._holds += 1
    try:
        yield
    finally:
        monitor._holds -= 1
    monitor._deliver()


def take_layers(monitor: Monitor) -> tuple[LayerRow, ...]:
    """The rows of the newest monitored step that has been reported, once; then none until the next."""
    rows, monitor._newest_layers = monitor._newest_layers, ()
    return rows
