"""Alerts that reach people: what they get, how often, and what happens where they can't be reached."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from distnorm.monitor.records import Alert
from distnorm.monitor.sinks import notify
from distnorm.monitor.sinks.notify import NotifySink
from tests.monitor.feeding import monitored, step_row

HOSTILE = "$(touch owned); `touch owned` \x1b[2J --help\nsecond line \x00"
# Writes its arguments and its input, a line a call; a session of its own, so no shell stands in between.
WRITES = (
    "import json,sys; open(sys.argv[1],'a').write(json.dumps([sys.argv[2:], json.load(sys.stdin)])+'\\n')"
)


def alert(step: int, message: str = "boom") -> Alert:
    return Alert(step, "exploding", "a.weight", None, float("inf"), 2.0, message)


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def command(file: Path) -> list[str]:
    return [sys.executable, "-S", "-c", WRITES, str(file)]


@pytest.fixture
def posts() -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    """An address, what was posted there, and what it does: `status`, and `wait` before it answers."""
    got: list[Any] = []
    does: dict[str, Any] = {"status": 200, "wait": None}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if does["wait"] is not None:
                does["wait"].wait(30)
            self.send_response(does["status"])
            if "location" in does:
                self.send_header("Location", does["location"])
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/secret", got, does
        for thread in threading.enumerate():  # one that still sends would speak in the next test's log
            if thread.name == "distnorm-notify":
                thread.join(30)
        server.shutdown()


def wait_for(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_command_and_webhook_get_what_the_log_gets(tmp_path: Path, posts: Any) -> None:
    url, got, _ = posts
    config = {"alerts": {"notify": {"command": command(tmp_path / "told"), "webhook": url}}}
    monitor, alerts = monitored(config, tmp_path / "run")
    monitor.step(step_row(7, norm=float("nan")), parameter="b.weight", ranks=[1])
    monitor.close()
    text = f"distnorm run: step 7: non_finite: {alerts[0].message}"
    ((arguments, data),) = lines(tmp_path / "told")
    assert arguments == [text] and data == got[0]
    assert (data["text"], data["run"]) == (text, str(tmp_path / "run"))
    (told,) = data["alerts"]
    assert (told["step"], told["kind"], told["layer"], told["ranks"], told["value"]) == (
        7, "non_finite", "b.weight", [1], "nan"
    )  # fmt: skip


def test_names_are_neither_commands_nor_options_nor_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sink = NotifySink(command(tmp_path / "told"), None, 0.0, None)
    sink.alert(alert(1, HOSTILE))
    sink.close()
    (((argument,), data),) = lines(tmp_path / "told")
    assert argument.startswith("distnorm: step 1: exploding: $(touch owned)")
    assert argument.isprintable() and "\\x1b[2J" in argument and "\\x00" in argument
    assert data["alerts"][0]["message"] == HOSTILE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["told"]


def test_alerts_in_between_are_told_together(posts: Any) -> None:
    url, got, _ = posts
    sink = NotifySink(None, url, 3600.0, None)
    sink.alert(alert(1))
    wait_for(lambda: len(got) == 1)
    for step in range(2, 30):
        sink.alert(alert(step))
    time.sleep(0.1)
    assert len(got) == 1
    sink.close()
    assert [len(message["alerts"]) for message in got] == [1, 28]
    assert got[1]["text"].splitlines()[-1] == "and 18 more"
    assert len(got[1]["text"].splitlines()) == 11


def test_nobody_waits_for_an_address_that_does_not_answer(
    posts: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    url, got, does = posts
    does["wait"] = threading.Event()
    monkeypatch.setattr(notify, "_PATIENCE", 0.2)
    monitor, _ = monitored({"alerts": {"cooldown": 1, "notify": {"webhook": url, "every": 0}}})
    began = time.monotonic()
    for step in range(1, 2001):
        monitor.step(step_row(step, norm=1.0 if step % 2 else float("nan")))
    taken = time.monotonic() - began
    monitor.close()
    assert time.monotonic() - began - taken < 5
    does["wait"].set()
    assert got and sum(text.startswith("monitor.alerts.notify") for text in caplog.messages) <= 1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"command": ["/nowhere/at/all"]}, "command failed: there is no program /nowhere/at/all"),
        ({"command": [sys.executable, "-S", "-c", "raise SystemExit(3)"]}, "command failed: it ended with 3"),
        ({"webhook": "http://127.0.0.1:9/secret"}, "webhook failed: [Errno 111] Connection refused"),
    ],
)
def test_what_fails_is_said_once_and_the_run_goes_on(
    config: dict[str, Any], says: str, tmp_path: Path, caplog: Any
) -> None:
    monitor, alerts = monitored({"alerts": {"cooldown": 1, "notify": {**config, "every": 0}}}, tmp_path)
    for step in (1, 2, 3, 4):
        monitor.step(step_row(step, norm=1.0 if step % 2 else float("nan")))
        time.sleep(0.05)
    monitor.close()
    (failed,) = [text for text in caplog.messages if "notify" in text]
    assert says in failed and "secret" not in failed
    assert len(alerts) == len(lines(tmp_path / "alerts.jsonl")) == 2


def test_an_answer_that_refuses_names_no_address(posts: Any, caplog: Any) -> None:
    url, _, does = posts
    does["status"] = 403
    sink = NotifySink(None, url, 0.0, None)
    sink.alert(alert(1))
    sink.close()
    (failed,) = caplog.messages
    assert "webhook failed: the answer was 403" in failed and "secret" not in failed


def test_an_answer_that_leads_elsewhere_has_not_told_anybody(posts: Any, caplog: Any) -> None:
    url, got, does = posts
    does["status"], does["location"] = 302, url
    sink = NotifySink(None, url, 0.0, None)
    sink.alert(alert(1))
    sink.close()
    assert len(got) == 1 and "webhook failed: the answer was 302" in caplog.messages[0]


def test_what_takes_too_long_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(notify, "_PATIENCE", 2.0)
    late = tmp_path / "late"
    script = f"(sleep 6; touch {late}) & touch {tmp_path / 'began'}; sleep 60"
    sink = NotifySink(["sh", "-c", script], None, 0.0, None)
    sink.alert(alert(1))
    wait_for(lambda: bool(caplog.messages))
    sink.close()
    assert "command failed: it took more than 2 s" in caplog.messages[0] and (tmp_path / "began").exists()
    time.sleep(5)
    assert not late.exists()


def test_a_secret_address_comes_from_the_environment(
    posts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    url, got, _ = posts
    for value, told in ((url, 1), ("file:///etc/passwd", 1), (None, 1)):
        monkeypatch.setenv("HOOK", value) if value else monkeypatch.delenv("HOOK")
        monitor, _ = monitored({"alerts": {"notify": {"webhook": "$HOOK"}}}, tmp_path)
        monitor.step(step_row(1, norm=float("nan")))
        monitor.close()
        assert len(got) == told
    refused = [text for text in caplog.messages if text.startswith("sink notify failed")]
    assert len(refused) == 2 and all("variable HOOK to hold an http(s) address" in text for text in refused)


def test_a_run_without_alerts_has_no_thread() -> None:
    before = set(threading.enumerate())
    monitor, _ = monitored({"alerts": {"notify": {"webhook": "http://127.0.0.1:9/"}}})
    monitor.step(step_row(1))
    assert set(threading.enumerate()) == before
    monitor.close()
