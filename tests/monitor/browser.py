"""Chromium without a window, without a network, driven over a pair of pipes: no package is needed for it."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

DRAWN = "document.documentElement?.dataset.waiting === '0'"
NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page at a time; `open` starts afresh. What the page complains of, asks for and pops up is kept."""

    def __init__(self, program: str, profile: Path, patience: float = 120.0) -> None:
        """Start it; `patience` is how many seconds an answer may take, many where the machine is busy."""
        self.patience = patience
        # Chromium reads commands from file descriptor 3 and answers on 4.
        ends = [*os.pipe(), *os.pipe()]
        read, self._to, self._from, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 64) for end in ends)
        for end in ends:
            os.close(end)

        def take_places() -> None:
            os.dup2(read, 3)
            os.dup2(write, 4)

        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run", "about:blank"]
        self._process = subprocess.Popen(
            command,
            close_fds=False,
            preexec_fn=take_places,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._rest = b""
        self._number = 0
        self._session = self._target = ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.traced: list[dict[str, Any]] = []
        self._heard: set[str] = set()

    def close(self) -> None:
        self._send("Browser.close")
        self._process.wait(timeout=20)
        os.close(self._to)
        os.close(self._from)

    def open(self, page: Path | str, scheme: str = "light", width: int = 1280, ready: str = DRAWN) -> None:
        """Load a page in a new tab, a file without a network, and wait until it has drawn its figures."""
        self._session = ""
        before, self._target = self._target, self.call("Target.createTarget", url="about:blank")["targetId"]
        if before:  # else all pages that were ever opened would go on at once
            self.call("Target.closeTarget", targetId=before)
        self._session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        self.complaints, self.requests = [], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        nothing = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.call("Network.emulateNetworkConditions", offline=isinstance(page, Path), **nothing)
        self.scheme(scheme)
        self.width(width)
        self.call("Page.navigate", url=page.resolve().as_uri() if isinstance(page, Path) else page)
        self.settle(ready)

    def settle(self, ready: str = DRAWN) -> None:
        """Wait until every figure that has to be drawn, or drawn again, is."""
        deadline = time.monotonic() + self.patience
        while not self.run(ready):
            assert time.monotonic() < deadline, f"nothing is drawn: {self.complaints}"
            time.sleep(0.02)

    def scheme(self, name: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def width(self, width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more
            )

    def drag(self, *points: tuple[float, float], clicks: int = 1) -> None:
        """Press the mouse at the first point, and move it along the others: a click if there are none."""
        moves = [("mouseMoved", 0), ("mousePressed", 1), *[("mouseMoved", 1)] * (len(points) - 1)]
        places = [points[0], *points, points[-1]]
        for (kind, buttons), (x, y) in zip([*moves, ("mouseReleased", 0)], places, strict=True):
            held = {"button": "left" if buttons or kind == "mouseReleased" else "none", "buttons": buttons}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, clickCount=clicks, **held)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = self._send(method, **params)
        deadline = time.monotonic() + self.patience
        while True:
            for message in self._messages(deadline):
                self._note(message)
                if message.get("id") == number:
                    assert "error" not in message, (method, message["error"])
                    return dict(message["result"])

    def wait_for(self, event: str) -> None:
        """Wait until the browser has told of an event since the last wait for it."""
        deadline = time.monotonic() + self.patience
        while event not in self._heard:
            for message in self._messages(deadline):
                self._note(message)
        self._heard.discard(event)

    def _send(self, method: str, **params: Any) -> int:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        if method.startswith(("Target.", "Browser.")):
            message.pop("sessionId", None)
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        return self._number

    def _messages(self, deadline: float) -> list[dict[str, Any]]:
        ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, "the browser doesn't answer"
        data = os.read(self._from, 1 << 20)
        assert data, "the browser has ended"
        *whole, self._rest = (self._rest + data).split(b"\0")
        return [json.loads(each) for each in whole]

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method", ""), message.get("params", {})
        self._heard.add(method)
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "log", "assert"):
            self.complaints.append(str([each.get("value") for each in params["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"])[:500])
        elif method == "Log.entryAdded":
            self.complaints.append(str(params["entry"]["text"]))
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append("a dialog: " + params["message"])
        elif method == "Tracing.dataCollected":
            self.traced += params["value"]
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
