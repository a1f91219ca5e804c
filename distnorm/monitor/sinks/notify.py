"""Alerts reach people: by a command, a webhook, or both, from a thread of their own."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distnorm.monitor.records import Alert, LayerRow, plain
from distnorm.monitor.report.numbers import visible

_log = logging.getLogger("distnorm")

_PATIENCE = 20.0
"""Seconds that a command or an answer may take; as long a run's end waits for the last message at most."""
_MOST_WAITING, _MOST_LISTED, _MOST_SAID = 1000, 10, 3000


class NotifySink:
    """Sends alerts, at most one message in `every` seconds; what comes in between is in the next one.

    Training waits for none of it, but for the last message at a run's end, and that not for long.

    Args:
        command: a program and its arguments; it gets the text as one more, and JSON on its standard input.
        webhook: an http(s) address, or $NAME of an environment variable that has it.
        every: seconds between two messages.
        folder: the run's, which messages name.

    Raises:
        ValueError: the environment variable has no such address.
    """

    def __init__(
        self, command: Sequence[str] | None, webhook: str | None, every: float, folder: Path | None
    ) -> None:
        self._every, self._folder = every, folder
        self._channels: dict[str, Callable[[str, bytes], None]] = {}
        if command is not None:
            self._channels["command"] = lambda text, data: _run(command, text, data)
        if webhook is not None:
            url = _address(webhook)
            self._channels["webhook"] = lambda text, data: _post(url, data)
        self._waiting: list[Alert] = []
        self._dropped = 0
        self._failed: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def step(self, row: Mapping[str, Any]) -> None:
        """Nothing: only alerts are sent."""

    def layers(self, step: int, rows: Sequence[LayerRow]) -> None:
        """Nothing."""

    def alert(self, alert: Alert) -> None:
        with self._changed:
            if len(self._waiting) < _MOST_WAITING:
                self._waiting.append(alert)
            else:
                self._dropped += 1
            if self._thread is None:  # a run without alerts has no thread
                self._thread = threading.Thread(target=self._send_all, name="distnorm-notify", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def _send_all(self) -> None:
        due = 0.0
        while True:
            with self._changed:
                while not self._closed and (not self._waiting or time.monotonic() < due):
                    self._changed.wait(max(0.0, due - time.monotonic()) if self._waiting else None)
                alerts, self._waiting = self._waiting, []
                dropped, self._dropped = self._dropped, 0
                closed = self._closed
            if alerts:
                self._send(alerts, dropped)
                due = time.monotonic() + self._every
            if closed:
                return

    def _send(self, alerts: Sequence[Alert], dropped: int) -> None:
        text = _words(alerts, dropped, self._folder)
        run = None if self._folder is None else str(self._folder)
        listed = [plain(alert.to_dict()) for alert in alerts[:100]]
        data = json.dumps({"text": text, "run": run, "alerts": listed}).encode()
        for name, send in self._channels.items():
            try:
                send(text, data)
            except Exception as error:  # whatever it is, the run goes on
                if name not in self._failed:
                    self._failed.add(name)
                    advice = "alerts are in the log and in alerts.jsonl; it is tried again for the next"
                    _log.warning("monitor.alerts.notify.%s failed: %s; %s", name, _reason(error), advice)
            else:
                self._failed.discard(name)


def _words(alerts: Sequence[Alert], dropped: int, folder: Path | None) -> str:
    """The alerts, a line each; what can't be printed is spelt out, since names come from a model."""
    where = "" if folder is None else f" {folder.name}"
    lines = [
        f"distnorm{where}: step {each.step}: {each.kind}: {each.message}" for each in alerts[:_MOST_LISTED]
    ]
    more = len(alerts) - len(lines) + dropped
    text = "\n".join(
        [visible(line.replace("\n", " ")) for line in lines] + ([f"and {more} more"] if more else [])
    )
    return text if len(text) <= _MOST_SAID else text[: _MOST_SAID - 1] + "…"


def _address(webhook: str) -> str:
    if not webhook.startswith("$"):
        return webhook
    found = os.environ.get(webhook[1:], "")
    if not found.startswith(("http://", "https://")):
        raise ValueError(f"expected the environment variable {webhook[1:]} to hold an http(s) address")
    return found


def _run(command: Sequence[str], text: str, data: bytes) -> None:
    # A list and no shell: nothing in a parameter's name is ever a command. A session of its own: Ctrl-C at
    # the training's terminal doesn't end the message, and what takes too long is ended with all it started.
    with subprocess.Popen(
        [*command, text],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            process.communicate(data, timeout=_PATIENCE)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[0])


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST that is redirected would become a GET without the message, and look as if it had arrived."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(url: str, data: bytes) -> None:
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=_PATIENCE) as answer:
        answer.read(1)


def _reason(error: Exception) -> str:
    """What went wrong, without the address: in many a webhook that is the password."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the answer was {error.code}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        return str(error.reason)
    if isinstance(error, subprocess.CalledProcessError):
        return f"it ended with {error.returncode}"
    if isinstance(error, (subprocess.TimeoutExpired, TimeoutError)):
        return f"it took more than {_PATIENCE:g} s"
    if isinstance(error, FileNotFoundError):
        return f"there is no program {error.filename}"
    return type(error).__name__
