"""`distnorm watch --terminal`: what is drawn, and what a run's names can't do to a terminal."""

from __future__ import annotations

import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from distnorm import cli
from distnorm.monitor.watch.follower import follow
from distnorm.monitor.watch.terminal import frame, plot
from tests.monitor.synthetic import alert, metric_row, write_lines, write_run

HOSTILE = "[bold]x[/bold] \x1b[2J\x1b]0;owned\x07 \x9b31m"


def dots(lines: list[str]) -> set[tuple[int, int]]:
    """(column, row) of every dot of a plot, from the braille characters; independent of how it was drawn."""
    bits = {0x01: (0, 0), 0x02: (0, 1), 0x04: (0, 2), 0x40: (0, 3), 0x08: (1, 0), 0x10: (1, 1), 0x20: (1, 2)}
    bits[0x80] = (1, 3)
    found = set()
    for row, line in enumerate(lines):
        cells = [char for char in line if 0x2800 <= ord(char) < 0x2900]
        for column, char in enumerate(cells):
            for bit, (x, y) in bits.items():
                if ord(char) - 0x2800 & bit:
                    found.add((2 * column + x, 4 * row + y))
    return found


@pytest.mark.parametrize("count", [7, 64, 1000])
def test_a_straight_line_is_straight_and_a_power_is_on_a_logarithmic_axis(count: int) -> None:
    for values, log in (
        ([float(n) for n in range(count)], False),
        ([10.0 ** (n / count) for n in range(count)], True),
    ):
        drawn = dots(plot(values, 40, 4, log=log))
        columns = max(x for x, _ in drawn) + 1
        assert {x for x, _ in drawn} == set(range(columns)) and columns > 60
        assert (0, 15) in drawn and (columns - 1, 0) in drawn, "from the lowest left to the highest right"
        for x, y in drawn:
            assert abs(y - 15 * (1 - x / (columns - 1))) <= 15 / min(count, 15) + 1.5


def test_a_spike_is_seen_and_what_is_not_finite_is_a_gap() -> None:
    values = [1.0] * 1000
    values[500] = 9.0
    drawn = dots(plot(values, 40, 4, log=False))
    assert [x for x, y in drawn if y == 0] == [pytest.approx(max(x for x, _ in drawn) / 2, abs=1)]
    values[300:700] = [math.nan] * 400
    columns = {x for x, _ in dots(plot(values, 40, 4, log=False))}
    assert len(columns) == pytest.approx(0.6 * (max(columns) + 1), abs=2)
    assert plot([2.0, 2.0], 20, 2, log=True)[0].startswith("2 ")


def test_a_run_is_drawn_once_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", 50, 4)
    (run / "notes.md").write_text("half the rate\nmore\n")
    assert cli.main(["watch", str(run), "--terminal"]) == 0
    text = capsys.readouterr().out
    for said in ("step 50", "gradient norm", "learning rate", "tokens/s", "half the rate", "exploding"):
        assert said in text
    (tmp_path / "none").mkdir()
    assert cli.main(["watch", str(tmp_path / "none"), "--terminal"]) == 0
    assert "no step yet" in capsys.readouterr().out


@pytest.mark.parametrize("width", [30, 80, 200])
def test_names_are_neither_markup_nor_escapes_and_it_fits(width: int, tmp_path: Path) -> None:
    run = tmp_path / "[red]run"
    run.mkdir()
    write_lines(run / "metrics.jsonl", (metric_row(step, 1.0 + step) for step in range(1, 30)))
    write_lines(run / "alerts.jsonl", iter([alert(3, HOSTILE, HOSTILE, None, 1.0, 2.0, HOSTILE)]))
    (run / "notes.md").write_text(HOSTILE)
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(frame(follow([run]), console))
    text = captured.get()
    assert "[red]run" in text
    if width > 80:
        assert text.count("[bold]x[/bold] \\x1b[2J") == 3
    assert all(char.isprintable() for char in text.replace("\n", ""))
    assert max(map(len, text.splitlines())) <= width


def test_on_a_terminal_it_follows_until_ctrl_c(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "50"}
    command = [sys.executable, "-m", "distnorm", "watch", str(run), "--terminal"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs do not
    with subprocess.Popen(command, stdout=child, stderr=child, env=environment, preexec_fn=heard) as process:
        os.close(child)
        shown = b""
        for said in (b"no step yet", b"step 1", b"step 2"):
            deadline = time.monotonic() + 60
            while said not in shown:
                shown += os.read(parent, 65536)
                assert time.monotonic() < deadline
            with (run / "metrics.jsonl").open("a") as out:
                out.write(json.dumps(metric_row(1 + (said != b"no step yet"), 2.0)) + "\n")
        process.send_signal(signal.SIGINT)
        while True:
            try:
                if not os.read(parent, 65536):
                    break
            except OSError:  # the other end is closed
                break
    os.close(parent)
    assert process.returncode == 0
