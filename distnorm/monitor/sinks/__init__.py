"""Where rows and alerts go. A sink imports its library when it is opened, and is dropped where it fails."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from distnorm.config import NotifyConfig, SinksConfig
from distnorm.monitor.records import Alert, LayerRow

_log = logging.getLogger("distnorm")


class Sink(Protocol):
    """Takes rows and alerts, on rank 0. Whatever it raises, it is closed and dropped."""

    def step(self, row: Mapping[str, Any]) -> None:
        """A step's row, as in metrics.jsonl."""

    def layers(self, step: int, rows: Sequence[LayerRow]) -> None:
        """A monitored step's rows of all layers, in the order of the model."""

    def alert(self, alert: Alert) -> None:
        """An alert."""

    def close(self) -> None:
        """Write what isn't written yet, and let go of everything."""


Opener = Callable[[], Sink]


class Sinks:
    """All sinks of a run as one that never raises.

    Args:
        openers: what makes each, by its name; called at once.
    """

    def __init__(self, openers: Mapping[str, Opener]) -> None:
        self._open: dict[str, Sink] = {}
        for name, opener in openers.items():
            try:
                self._open[name] = opener()
            except Exception as error:
                _warn(name, error)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._open)

    def step(self, row: Mapping[str, Any]) -> None:
        self._each(lambda sink: sink.step(row))

    def layers(self, step: int, rows: Sequence[LayerRow]) -> None:
        self._each(lambda sink: sink.layers(step, rows))

    def alert(self, alert: Alert) -> None:
        self._each(lambda sink: sink.alert(alert))

    def close(self) -> None:
        self._each(lambda sink: sink.close())
        self._open.clear()

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._open.items()):
            try:
                call(sink)
            except Exception as error:
                _warn(name, error)
                del self._open[name]
                try:
                    sink.close()
                except Exception:
                    _log.debug("sink %s could not be closed", name, exc_info=True)


def openers(
    config: SinksConfig,
    folder: Path | None,
    last_kept: int,
    *,
    alerts: bool = True,
    notify: NotifyConfig | None = None,
) -> dict[str, Opener]:
    """What makes the sinks of a config.

    Args:
        config: which there are besides JSONL.
        folder: the run's, which need not exist; None: no JSONL.
        last_kept: what is there of later steps is from a run that this one takes the place of.
        alerts: whether there can be alerts.
        notify: whom they reach.
    """
    wanted: dict[str, Opener] = {}
    if folder is not None:
        wanted["jsonl"] = lambda: _jsonl(folder, last_kept, alerts)
    if config.tensorboard:
        wanted["tensorboard"] = lambda: _tensorboard(folder, last_kept)
    if config.wandb:
        wanted["wandb"] = lambda: _wandb(folder)
    if (where := config.prometheus) is not None:
        wanted["prometheus"] = lambda: _prometheus(where.port, where.host)
    if notify is not None:
        wanted["notify"] = lambda: _notify(notify, folder)
    return wanted


def _jsonl(folder: Path, last_kept: int, alerts: bool) -> Sink:
    from distnorm.monitor.sinks.jsonl import JsonlSink

    return JsonlSink(folder, last_kept, alerts=alerts)


def _tensorboard(folder: Path | None, last_kept: int) -> Sink:
    from distnorm.monitor.sinks.tensorboard import TensorBoardSink

    if folder is None:
        raise ValueError("expected monitor.dir to name a folder, found null")
    return TensorBoardSink(folder / "tensorboard", last_kept)


def _wandb(folder: Path | None) -> Sink:
    from distnorm.monitor.sinks.wandb import WandbSink

    return WandbSink(folder)


def _prometheus(port: int, host: str) -> Sink:
    from distnorm.monitor.sinks.prometheus import PrometheusSink

    return PrometheusSink(port, host)


def _notify(config: NotifyConfig, folder: Path | None) -> Sink:
    from distnorm.monitor.sinks.notify import NotifySink

    return NotifySink(config.command, config.webhook, config.every, folder)


def _warn(name: str, error: Exception) -> None:
    if isinstance(error, ImportError):
        advice = f"pip install 'distnorm[{name}]', or take it out of monitor.sinks"
    elif isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        advice = f"set monitor.sinks.{name} to a port that nobody uses"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "make room on the disk, and start again from a checkpoint to have all rows"
    else:
        advice = "what it would have written is lost; the other sinks go on"
    _log.warning("sink %s failed and is dropped: %s: %s; %s", name, type(error).__name__, error, advice)
