"""`distnorm watch`: what is read of a run that goes on, what the server says, and what the page does."""

from __future__ import annotations

import base64
import http.client
import inspect
import json
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distnorm import cli
from distnorm.monitor.watch.answers import Answers
from distnorm.monitor.watch.follower import Follower, follow
from distnorm.monitor.watch.server import Server
from tests.monitor.browser import Browser
from tests.monitor.page_reading import texts
from tests.monitor.synthetic import metric_row, write_lines, write_run
from tests.monitor.test_report_page import EVIL


def add(file: Path, *rows: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


@contextmanager
def served(*runs: Path) -> Iterator[Server]:
    with Server(Answers(follow(list(runs))), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body, {name.lower(): value for name, value in answer.getheaders()}


# ---- what is read


def test_only_what_is_new_is_read_and_half_a_line_waits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "metrics.jsonl"
    follower = Follower(folder, "run")
    follower.refresh()
    assert follower.steps == []
    add(file, *(metric_row(step, float(step)) for step in (1, 2)))
    text = json.dumps(metric_row(3, 3.0)) + "\n"
    with file.open("a") as out:
        out.write(text[:30])
    parsed: list[int] = []
    real = json.loads
    monkeypatch.setattr(json, "loads", lambda data: parsed.append(len(data)) or real(data))
    follower.refresh()
    assert [step.norm for step in follower.steps] == [1.0, 2.0]
    read = sum(parsed)
    follower.refresh()
    assert sum(parsed) == read, "nothing new, nothing parsed"
    with file.open("a") as out:
        out.write(text[30:])
    follower.refresh()
    assert [step.norm for step in follower.steps] == [1.0, 2.0, 3.0] and follower.epoch == 0
    assert sum(parsed) - read < 2 * len(text)


def test_a_run_that_goes_back_or_begins_anew_is_another_epoch(folder: Path) -> None:
    file = folder / "metrics.jsonl"
    follower = Follower(folder, "run")
    add(file, *(metric_row(step, 1.0) for step in (1, 2, 3)))
    follower.refresh()
    add(file, metric_row(2, 5.0))
    follower.refresh()
    assert [(step.step, step.norm) for step in follower.steps] == [(1, 1.0), (2, 5.0)]
    went_back = follower.epoch
    assert went_back > 0
    write_lines(folder / "draft", iter([metric_row(1, 7.0)]))
    (folder / "draft").replace(file)
    follower.refresh()
    assert [(step.step, step.norm) for step in follower.steps] == [(1, 7.0)] and follower.epoch > went_back


def test_layers_grow_too(folder: Path) -> None:
    follower = Follower(folder, "run")
    for step in (1, 2):
        add(folder / "layers.jsonl", *({"step": step, "layer": f"l{i}", "norm": 1.0 + i} for i in range(3)))
        grid = follower.layers()
        assert (grid.steps, grid.rows, [layer.name for layer in grid.layers]) == (
            step,
            3 * step,
            ["l0", "l1", "l2"],
        )
        assert grid.layers[2].cells == (pytest.approx(3.0),) * step


# ---- what is answered


def test_rows_are_those_that_a_page_has_not(folder: Path) -> None:
    add(folder / "metrics.jsonl", *(metric_row(step, step / 7) for step in range(1, 6)))
    with served(folder) as server:
        (news,) = json.loads(ask(server, "/rows?have=0.3")[1])["runs"]
        assert (news["epoch"], news["count"], news["replace"]) == (0, 5, False)
        norms = struct.unpack("<2d", base64.b64decode(news["columns"]["norm"]["bdata"]))
        assert norms == (4 / 7, 5 / 7), "bit for bit"
        assert json.loads(ask(server, "/rows?have=0.5")[1])["runs"] == [{"epoch": 0, "count": 5}]
        for odd in ("7.3", "0.99", "0.-1"):
            (news,) = json.loads(ask(server, f"/rows?have={odd}")[1])["runs"]
            assert news["replace"] and len(base64.b64decode(news["columns"]["step"]["bdata"])) == 5 * 4, odd
        text = json.loads(ask(server, "/text?open=run0-0")[1])
        assert "5 steps" in text["words"]["run0-0-says"] and "<table>" in text["html"]["run0-0-table"]


@pytest.mark.parametrize(
    ("path", "method", "headers", "status"),
    [
        ("/../../etc/passwd", "GET", {}, 404),
        ("/%2e%2e/%2e%2e/etc/passwd", "GET", {}, 404),
        ("//etc/passwd", "GET", {}, 404),
        ("/metrics.jsonl", "GET", {}, 404),
        ("/layers?run=-1", "GET", {}, 400),
        ("/layers?run=9", "GET", {}, 400),
        ("/layers?run=a", "GET", {}, 400),
        ("/rows", "GET", {}, 400),
        ("/rows?have=0.0,0.0", "GET", {}, 400),
        ("/", "POST", {}, 501),
        ("/", "PUT", {}, 501),
        ("/", "HEAD", {}, 200),
        ("/rows?have=0.0", "GET", {"Host": "evil.example"}, 421),
        ("/rows?have=0.0", "GET", {"Host": "evil.example:80"}, 421),
        ("/rows?have=0.0", "GET", {"Host": "127.0.0.1.evil.example"}, 421),
        ("/rows?have=0.0", "GET", {"Host": "[::1"}, 421),
        ("/rows?have=0.0", "GET", {"Host": ""}, 421),
        ("/rows?have=0.0", "GET", {"Host": "localhost:9999"}, 200),  # through a tunnel
        ("/rows?have=0.0", "GET", {"Host": "[::1]:1"}, 200),
    ],
)
def test_nothing_but_its_own_addresses_of_its_own_machine(
    path: str, method: str, headers: dict[str, str], status: int, folder: Path
) -> None:
    add(folder / "metrics.jsonl", metric_row(1, 1.0))
    with served(folder) as server:
        found, body, said = ask(server, path, method, **headers)
        assert found == status
        assert "grad_norm" not in body and "root:" not in body and str(folder) not in body
        if status != 501:
            assert (
                said["x-content-type-options"] == "nosniff"
                and "frame-ancestors 'none'" in said["content-security-policy"]
            )
            assert (
                said["cross-origin-resource-policy"] == "same-origin"
                and "access-control-allow-origin" not in said
            )


def test_it_listens_at_loopback_unless_told_otherwise(folder: Path) -> None:
    options = vars(cli.make_parser().parse_args(["watch", str(folder)]))
    assert options["host"] == "127.0.0.1"
    with served(folder) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_run_that_is_not_there_and_a_port_that_is_taken(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["watch", str(folder / "absent")]) == 2
    assert "found nothing at" in capsys.readouterr().err
    with served(folder) as server:
        assert cli.main(["watch", str(folder), "--port", str(server.server_address[1])]) == 2
    assert "--port 0 takes a free one" in capsys.readouterr().err


def test_help_comes_without_torch_and_serving_too(folder: Path) -> None:
    add(folder / "metrics.jsonl", metric_row(1, 1.0))
    code = """
        import sys
        from pathlib import Path
        from distnorm.cli import make_parser
        make_parser()
        slow = ("torch", "numpy", "jinja2", "plotly", "rich", "http", "pydantic")
        print([name for name in slow if name in sys.modules])
        from distnorm.monitor.watch.server import Server, Answers, follow
        assert len(Answers(follow([Path(sys.argv[1])])).page()) > 1e6
        print([name for name in ("torch", "numpy", "pandas") if name in sys.modules])
    """
    command = [sys.executable, "-c", inspect.cleandoc(code), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.stdout.splitlines() == ["[]", "[]"], done.stderr


# ---- the page


def until(browser: Browser, script: str) -> None:
    deadline = time.monotonic() + 120
    while not browser.run(script):
        assert time.monotonic() < deadline, (script, browser.complaints)
        time.sleep(0.05)
    browser.settle()


@pytest.mark.slow
def test_the_page_of_a_long_run_holds_no_more_than_a_screen_shows(browser: Browser, folder: Path) -> None:
    rows = [metric_row(step, 1.0 + step % 7) for step in range(1, 5001)]
    rows[2345] = metric_row(2346, 99.0)
    write_lines(folder / "metrics.jsonl", iter(rows))
    layers = (
        {"step": step, "layer": f"l{i}", "norm": 1.0 + i} for step in range(50, 5001, 50) for i in range(301)
    )
    write_lines(folder / "layers.jsonl", layers)
    with served(folder) as server:
        cells = json.loads(ask(server, "/layers?run=0")[1])["figures"][0]["layers"]["z"]
        assert len(cells) == 301 and len(base64.b64decode(cells[0]["bdata"])) == 4 * (20_000 // 301)
        browser.open(server.url)
        drawn = "[...document.querySelectorAll('.plot.steps')].flatMap((e) => e.data.map((t) => t.x.length))"
        assert max(browser.run(drawn)) <= 1001
        norm = "document.querySelector('.plot.steps').data[0]"
        assert browser.run(f"Math.max(...{norm}.y)") == 99.0
        browser.run("showSteps('run0', [2300, 2400])")
        browser.settle()
        assert browser.run(f"[...{norm}.x]") == list(range(2299, 2402)), "every step, with one on either side"
        assert browser.complaints == []
        browser.call("Page.navigate", url="about:blank")


@pytest.mark.slow
def test_the_page_follows_a_run_and_asks_nobody_else(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>run<script>", 120, 12, 4)
    file, notes = run / "metrics.jsonl", run / "notes.md"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:60]))
    notes.write_text(EVIL)
    add(run / "layers.jsonl", {"step": 120, "layer": EVIL, "norm": 1.0})
    with served(run) as server:
        browser.open(server.url)
        assert browser.run("runs[0].columns.step.length") == 60
        browser.run("form.elements.smoothing.value = 0.9; form.dispatchEvent(new Event('input'))")
        with file.open("a") as out:
            out.writelines(lines[60:])
        until(browser, "runs[0].columns.step.length === 120")
        drawn = "document.querySelector('.plot.steps').data[0].x"
        until(browser, f"{drawn}[{drawn}.length - 1] === 120")
        assert browser.run("document.querySelector('.plot.steps').data.length") >= 5, "raw and smoothed"
        until(browser, "document.querySelector('.tiles dd')?.textContent === '120'")
        assert texts(browser, ".remarks")[0]["textContent"] == EVIL
        until(browser, "document.getElementById('status')?.textContent.startsWith('Following, step 120')")
        browser.run("document.querySelector('[data-layers]').click()")
        until(browser, "document.querySelectorAll('.plot.heat canvas').length > 0")
        assert texts(browser, "select[data-run] option")[-1] == {"textContent": EVIL}
        browser.run("form.elements.axis.value = 'elapsed'; form.dispatchEvent(new Event('input'))")
        browser.settle()
        assert browser.run(f"{drawn}[0]") == 0 and browser.run(f"{drawn}[119]") == pytest.approx(0.75 * 119)
        assert browser.run("document.querySelectorAll('main script, main img, .plot a, main b').length") == 0
        asked = {
            url.split("?")[0].replace(server.url, "/")
            for url in browser.requests
            if not url.startswith("data:")
        }
        assert asked == {"/", "/rows", "/text", "/layers"}
        # A run that begins anew is drawn anew, and what the reader chose stays.
        (run / "draft").write_text("".join(lines[:30]))
        (run / "draft").replace(file)
        until(browser, "runs[0].columns.step.length === 30")
        assert browser.run("view.smoothing") == 0.9
        assert browser.complaints == []
        browser.call("Page.navigate", url="about:blank")
