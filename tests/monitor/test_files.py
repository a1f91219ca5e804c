"""The run's own files, whatever happens to the run or the disk."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distnorm import Monitor
from distnorm.config import MonitorConfig
from distnorm.monitor.sinks.jsonl import LineWriter
from tests.monitor.feeding import layer_row, monitored, step_row

FILES = ("metrics.jsonl", "layers.jsonl", "alerts.jsonl")


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(monitor: Monitor, first: int, last: int) -> None:
    for step in range(first, last + 1):
        monitor.step(step_row(step))
        monitor.layers(step, [layer_row("b", float(step)), layer_row("a", 0.0)])
        monitor.diverged(step, "b", [1, 2])


def test_each_file_has_what_it_is_documented_to_have_at_once(tmp_path: Path) -> None:
    monitor, alerts = monitored({"every": 1, "dir": str(tmp_path / "made")})
    groups = {"experts": {"grad_norm": 2.0, "clip_coef": math.nan, "threshold": 1.0}}
    row = monitor.step(step_row(1, norm=math.inf, groups=groups), parameter="b", ranks=[0])
    monitor.layers(1, [layer_row("b", 0.1 + 0.2), layer_row("a", math.nan)])
    metrics, layers, alerted = (rows(tmp_path / "made" / name) for name in FILES)
    groups["experts"]["clip_coef"] = "nan"  # type: ignore[assignment]
    infinite = {"grad_norm": "inf", "clipped_norm": "inf"}
    extra = {"clip_rate": 0.0, "skipped": False, "noise_scale": None, "groups": groups}
    assert abs(metrics[0].pop("time") - time.time()) < 60
    assert metrics == [{**step_row(1), **infinite, "finite": False, **extra}]
    assert list(metrics[0])[:2] == ["step", "loss"]
    assert row["grad_norm"] == math.inf
    assert list(layers[0]) == ["step", "layer", "norm", "rms", "max", "zero_fraction", "grad_to_weight"]
    assert [(r["step"], r["layer"], r["norm"]) for r in layers] == [(1, "b", 0.1 + 0.2), (1, "a", "nan")]
    assert alerted == [
        {
            "step": 1,
            "kind": "non_finite",
            "layer": "b",
            "ranks": [0],
            "value": "inf",
            "bound": None,
            "message": alerts[0].message,
        }
    ]


def test_a_run_that_goes_on_has_each_row_once(tmp_path: Path) -> None:
    config = MonitorConfig(alerts={"cooldown": 1})  # type: ignore[arg-type]
    with Monitor(config, tmp_path) as first:
        run(first, 1, 6)
    with (tmp_path / "layers.jsonl").open("a") as file:
        file.write('{"step": 3, "layer": "b", "no')
    with Monitor(config, tmp_path, done=4) as resumed:
        assert [len(rows(tmp_path / name)) for name in FILES] == [4, 8, 4]
        run(resumed, 5, 7)
    # The step of a state that is loaded counts as well, and a monitor that doesn't write leaves all alone.
    after = Monitor(config, tmp_path)
    after.load_state_dict({**resumed.state_dict(), "step": 5})
    run(Monitor(config, tmp_path, writes=False), 1, 3)
    run(after, 6, 6)
    for name in FILES:
        assert sorted({row["step"] for row in rows(tmp_path / name)}) == [1, 2, 3, 4, 5, 6]
    assert len(rows(tmp_path / "layers.jsonl")) == 12
    with Monitor(config, tmp_path):
        assert [rows(tmp_path / name) for name in FILES] == [[], [], []]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "starts.jsonl"])


def test_numbers_read_back_to_the_same_bits(tmp_path: Path) -> None:
    numbers = {"a": 0.1 + 0.2, "b": 5e-324, "c": math.inf, "d": -math.inf, "e": math.nan}
    LineWriter(tmp_path / "x.jsonl", 0).write([{"step": 1, **numbers}])
    (read,) = rows(tmp_path / "x.jsonl")
    assert read.pop("step") == 1
    assert [repr(float(value)) for value in read.values()] == [repr(value) for value in numbers.values()]


WRITES_UNTIL_KILLED = """
import sys
from pathlib import Path
from tests.monitor.feeding import monitored
from tests.monitor.test_files import run
monitor, _ = monitored({"alerts": {"cooldown": 1}}, Path(sys.argv[1]))
run(monitor, 1, 3)
print("three", flush=True)
run(monitor, 4, 10**6)
"""


def test_a_killed_run_leaves_every_finished_step(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITES_UNTIL_KILLED, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=root, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "three\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    for name in FILES:
        found = [row["step"] for row in rows(tmp_path / name)]
        assert found == sorted(found)
        assert {1, 2, 3} <= set(found)


def test_a_file_that_may_not_grow_keeps_whole_rows_and_the_run_goes_on(tmp_path: Path) -> None:
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from tests.monitor.feeding import monitored\nfrom tests.monitor.test_files import run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "monitor, alerts = monitored({'alerts': {'cooldown': 1}}, Path(sys.argv[1]))\n"
        "run(monitor, 1, 50)\nmonitor.close()\nprint(len(alerts))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout == "50\n"
    assert done.stderr.count("sink jsonl failed and is dropped: OSError") == 1
    assert done.stderr.count("make room on the disk") == 1
    steps = [row["step"] for row in rows(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert 2500 < (tmp_path / "metrics.jsonl").stat().st_size < 3000
    assert [{row["step"] for row in rows(tmp_path / name)} for name in FILES[1:]] == [set(steps)] * 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named_once_and_other_sinks_go_on(tmp_path: Path, caplog: Any, capsys: Any) -> None:
    for name in FILES:
        os.symlink("/dev/full", tmp_path / name.replace(".jsonl", ".partial"))
        (tmp_path / name).write_text('{"step": 1}\n')
    monitor, alerts = monitored({"alerts": {"cooldown": 1}}, tmp_path)
    run(monitor, 2, 4)
    monitor.close()
    assert len(alerts) == 3
    (failed,) = [text for text in caplog.messages if "sink" in text]
    assert "sink jsonl failed and is dropped: OSError: [Errno 28] No space left on device" in failed
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_made_is_named_once(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").write_text("")
    monitor, _ = monitored({}, tmp_path / "file" / "run")
    monitor.step(step_row(1))
    monitor.step(step_row(2))
    (failed,) = caplog.messages
    assert failed.startswith("sink jsonl failed and is dropped: NotADirectoryError")


def test_a_device_in_a_files_place_stays_there_unread(tmp_path: Path) -> None:
    # /dev/full, by which one tries a full disk, could be read for ever.
    (tmp_path / "metrics.jsonl").symlink_to(os.devnull)
    monitor, _ = monitored({"dir": str(tmp_path)})
    run(monitor, 1, 2)
    assert (tmp_path / "metrics.jsonl").is_symlink()
    assert len(rows(tmp_path / "layers.jsonl")) == 4


def test_a_run_that_goes_back_has_each_row_once(tmp_path: Path) -> None:
    monitor, _ = monitored({"dir": str(tmp_path), "alerts": {"cooldown": 1}})
    run(monitor, 1, 3)
    state = monitor.state_dict()
    run(monitor, 4, 6)
    monitor.load_state_dict(state)
    run(monitor, 4, 5)
    for name, each in zip(FILES, (1, 2, 1), strict=True):
        assert [row["step"] for row in rows(tmp_path / name)] == [s for s in range(1, 6) for _ in range(each)]


@pytest.mark.parametrize("is_on", [True, False])
def test_an_empty_alerts_file_says_that_there_was_none(is_on: bool, tmp_path: Path) -> None:
    off = {"vanishing": None, "drop": None, "falling": None, "exploding": None, "non_finite": False}
    config = MonitorConfig(alerts={} if is_on else off)  # type: ignore[arg-type]
    with Monitor(config, tmp_path) as monitor:
        assert (tmp_path / "alerts.jsonl").exists() == is_on
        monitor.step(step_row(1))
    with Monitor(config, tmp_path, done=1) as resumed:
        resumed.step(step_row(2))
    assert (tmp_path / "alerts.jsonl").exists() == is_on
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]
    if is_on:
        assert (tmp_path / "alerts.jsonl").read_bytes() == b""


def test_each_rule_alone_is_reason_enough_for_an_alerts_file() -> None:
    off = {"vanishing": None, "drop": None, "falling": None, "exploding": None, "non_finite": False}
    assert not MonitorConfig(alerts=off).has_alerts  # type: ignore[arg-type]
    assert MonitorConfig(alerts=off, every=1, replicas=True).has_alerts  # type: ignore[arg-type]
    for rule, bound in {**dict.fromkeys(off, 0.5), "exploding": 2.0, "clip_rate": 0.5}.items():
        one = {**off, rule: True if rule == "non_finite" else bound}
        assert MonitorConfig(alerts=one).has_alerts, rule  # type: ignore[arg-type]
