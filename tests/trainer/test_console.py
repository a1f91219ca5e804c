"""What the trainer prints, on a terminal and elsewhere."""

from __future__ import annotations

import builtins
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distnorm.trainer.console import Bar, Console, Silence, open_console

ROW = {"step": 7, "loss": 1.5, "grad_norm": 0.25, "clip_coef": 1.0, "tokens_per_second": 12345.6}
LINE = "step   7/100  loss 1.5000  grad norm 0.2500  coefficient 1.0000  12,346 tokens/s\n"


def test_plain_is_a_line_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("plain", "auto"):  # standard output is no terminal here
        with open_console(mode, 6, 100, quiet=False) as console:
            console.row(ROW)
        assert capsys.readouterr().out == LINE
    with open_console("rich", 6, 100, quiet=True) as console:
        console.row(ROW)
        console.say("anything")
    assert isinstance(console, Silence)
    assert capsys.readouterr().out == ""


def test_without_rich_a_terminal_gets_lines_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.split(".")[0] == "rich":
            raise ModuleNotFoundError("No module named 'rich'")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert type(open_console("auto", 0, 100, quiet=False)) is Console
    assert capsys.readouterr().out == ""
    open_console("rich", 0, 100, quiet=False).row(ROW)
    assert capsys.readouterr().out == (
        "monitor.console: rich is not installed, so a line a step; pip install 'distnorm[rich]'\n" + LINE
    )


ON_A_TERMINAL = """
import logging
from distnorm.trainer.console import open_console
with open_console("auto", 6, 100, quiet=False) as console:
    console.row({row})
    logging.getLogger("distnorm").warning("[an alert]")
    console.say("[red]stopped")
"""


def test_on_a_terminal_it_is_a_bar(tmp_path: Path) -> None:
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    code = ON_A_TERMINAL.replace("{row}", repr(ROW))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=child, stderr=child, env=environment
    ) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                part = os.read(parent, 4096)
            except OSError:  # the other end is closed
                break
            shown += part
    os.close(parent)
    assert process.returncode == 0
    text = shown.decode()
    assert "7/100  loss 1.5000  grad norm 0.2500  coef 1.0000  12,346 tokens/s" in text
    assert "[an alert]" in text and "[red]stopped" in text
    assert "step " not in text


def test_a_bar_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with open_console("rich", 6, 100, quiet=False) as console:
        assert isinstance(console, Bar)
        console.row(ROW)
    assert capsys.readouterr().out.startswith("7/100  loss 1.5000  grad norm 0.2500  coef 1.0000")
