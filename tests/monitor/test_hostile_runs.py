"""Runs as nobody should write them, or that change while they are followed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distnorm import RunError, cli
from distnorm.monitor.report.command import main as report
from distnorm.monitor.report.numbers import step_number
from distnorm.monitor.report.runs import read_runs
from distnorm.monitor.watch import follower as following
from distnorm.monitor.watch.follower import Follower
from tests.monitor.synthetic import metric_row
from tests.monitor.test_watch import add


def test_a_row_whose_step_is_none_is_left_out(folder: Path) -> None:
    add(folder / "metrics.jsonl", good := metric_row(1, 1.0, clip_rate=0.0))
    add(folder / "layers.jsonl", {"step": 1, "layer": "a", "norm": 1.0})
    for step in (1 << 31, 10**400, -1, "x", "inf", None, [1], float("inf")):
        add(folder / "metrics.jsonl", {**good, "step": step})
        add(folder / "layers.jsonl", {"step": step, "layer": "b", "norm": 1.0})
        add(folder / "alerts.jsonl", {"step": step, "kind": "exploding"})
    assert report([folder], folder / "page.html") == 0
    (run,) = read_runs([folder])
    assert [each.step for each in run.steps.rows] == [1] and run.alerts == ()
    assert [layer.name for layer in run.layers.layers] == ["a"]
    assert len(run.notes) == 3 and all(": 8 lines could not be read" in note for note in run.notes)


def test_steps_are_numbers_in_any_form_that_json_rows_have() -> None:
    assert [step_number(each) for each in (0, 7, 7.0, "7", (1 << 31) - 1)] == [0, 7, 7, 7, (1 << 31) - 1]


def test_an_alias_in_a_config_is_not_followed(folder: Path) -> None:
    """A hundred lines, each twice the one above."""
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, 100))]
    (folder / "config.yaml").write_text("\n".join(lines))
    add(folder / "metrics.jsonl", metric_row(1, 1.0))
    code = (
        "import sys; from distnorm.monitor.report.command import main; main([sys.argv[1]] * 2, sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(folder), str(folder / "page.html")]
    subprocess.run(command, check=True, timeout=180)
    assert "No run has a config.yaml that can be read" in (folder / "page.html").read_text()


def test_a_file_that_begins_anew_under_the_same_number_is_another(folder: Path) -> None:
    """As where a folder is removed and made again: the new file may get the number of the old one."""
    file, followed = folder / "metrics.jsonl", Follower(folder, "run")
    add(file, *(metric_row(step, 1.0) for step in range(1, 5)))
    followed.refresh()
    before = file.stat().st_ino
    text = "".join(json.dumps(metric_row(step, 7.0)) + "\n" for step in range(1, 9))
    file.write_text(text)
    assert file.stat().st_ino == before
    followed.refresh()
    assert [step.norm for step in followed.steps] == [7.0] * 8 and followed.epoch > 0
    os.truncate(file, 0)
    followed.refresh()
    assert followed.steps == [], "no row of the run that was there"


def test_a_row_longer_than_is_read_at_once_stops_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_AT_ONCE", 100)
    followed = Follower(folder, "run")
    add(folder / "metrics.jsonl", *(metric_row(step, 1.0, note="x" * 10_000) for step in (1, 2)))
    followed.refresh()
    assert [step.step for step in followed.steps] == [1, 2]


@pytest.mark.parametrize("module", ["plotly.offline", "jinja2"])
def test_what_is_not_installed_is_said_before_anybody_waits_for_a_page(
    module: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distnorm.monitor.report import page

    page.environment.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    began = time.monotonic()
    assert cli.main(["watch", str(folder), "--port", "0"]) != 0
    assert time.monotonic() - began < 30
    assert "pip install 'distnorm[report]'" in capsys.readouterr().err
    page.environment.cache_clear()


NAMES = ("notes.md", "config.yaml", "starts.jsonl", "alerts.jsonl", "layers.jsonl")


def test_links_out_of_a_run_are_not_followed_and_the_page_says_so(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere" / "secret"
    secret.parent.mkdir()
    secret.write_text(
        '{"step": 1, "time": 1.0, "kind": "secret", "layer": "secret", "norm": 1.0, "commit": "secret"}\n'
    )
    add(folder / "metrics.jsonl", metric_row(1, 1.0, clip_rate=0.0))
    for name in NAMES:
        (folder / name).symlink_to(secret)
    followed = Follower(folder, "run")
    followed.refresh()
    for run in (*read_runs([folder]), followed.run(with_layers=True)):
        assert [step.norm for step in run.steps.rows] == [1.0]
        assert (run.remarks, run.config, run.starts, run.alerts) == ("", "", (), ())
        assert not run.has_alerts and run.layers.layers == ()
        assert sorted(note.split()[0] for note in run.notes) == sorted(NAMES)
    assert report([folder], tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "secret" not in page and "notes.md is a link out of the run" in page


def test_links_of_metrics_are_followed_within_a_run_and_where_the_reader_names_them(
    folder: Path, tmp_path: Path
) -> None:
    add(folder / "rows", metric_row(1, 3.0, clip_rate=0.0))
    (folder / "metrics.jsonl").symlink_to("rows")
    (folder / "notes.md").symlink_to(folder / "remarks.txt")
    (folder / "remarks.txt").write_text("mine")
    (run,) = read_runs([folder])
    assert run.remarks == "mine" and [step.norm for step in run.steps.rows] == [3.0] and run.notes == ()
    other = tmp_path / "other"
    other.mkdir()
    link = other / "metrics.jsonl"
    link.symlink_to(folder / "rows")
    assert [step.norm for step in read_runs([link])[0].steps.rows] == [3.0]
    with pytest.raises(RunError, match="a link out of its folder"):
        read_runs([other])
    followed = Follower(other, "run")
    followed.refresh()
    assert followed.steps == []


def test_a_pipe_in_the_place_of_metrics_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "metrics.jsonl")
    followed = Follower(folder, "run")
    followed.refresh()
    assert followed.steps == []
