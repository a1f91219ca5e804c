"""Each sink's output, read by the reader it is meant for; and sinks that fail."""

from __future__ import annotations

import builtins
import json
import math
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distnorm import Monitor
from distnorm.config import MonitorConfig
from distnorm.monitor.sinks import Sinks
from tests.monitor.feeding import layer_row, monitored, step_row

GROUPS = {"experts": {"grad_norm": 2.0, "clip_coef": 0.25, "threshold": 0.5}}


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("", 0))
        number: int = taken.getsockname()[1]
    yield number


def run(monitor: Monitor) -> None:
    monitor.step(step_row(1, clipped=True, norm=3.0, groups=GROUPS))
    monitor.layers(1, [layer_row("b.weight", 2.0), layer_row("a.weight", 4.0)])
    monitor.step(step_row(2, norm=math.nan), parameter="b.weight", ranks=[1])


def test_tensorboard_reads_scalars_and_alerts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor, alerts = monitored({"sinks": {"tensorboard": True}}, tmp_path)
    run(monitor)
    monitor.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    scalar = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert scalar["step/loss"] == [(1, 2.5), (2, 2.5)]
    assert scalar["step/clip_rate"] == [(1, 1.0), (2, 0.5)]
    assert scalar["step/clipped"] == [(1, 1.0), (2, 0.0)]
    assert scalar["step/grad_norm"][0] == (1, 3.0) and math.isnan(scalar["step/grad_norm"][1][1])
    assert scalar["experts/clip_coef"] == [(1, 0.25)]
    assert scalar["layer norm/a.weight"] == [(1, 4.0)]
    assert "step/noise_scale" not in scalar
    (event,) = read.Tensors("alerts/non_finite")
    assert (event.step, event.tensor_proto.string_val[0].decode()) == (2, alerts[0].message)


def test_tensorboard_forgets_what_is_made_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, last, norm in ((0, 6, 1.0), (3, 5, 2.0)):
        monitor, _ = monitored({"sinks": {"tensorboard": True}}, tmp_path)
        monitor.load_state_dict({**monitor.state_dict(), "step": done})
        for step in range(done + 1, last + 1):
            monitor.step(step_row(step, norm=norm))
        monitor.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = [(event.step, event.value) for event in read.Scalars("step/grad_norm")]
    assert values == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]


def scrape(port: int) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {s.name + "".join(f"{{{k}={v}}}" for k, v in s.labels.items()): s.value for s in samples}


def test_prometheus_scrapes_the_newest_row(port: int, caplog: Any) -> None:
    monitor, _ = monitored({"sinks": {"prometheus": port}})
    began = time.time()
    run(monitor)
    found = scrape(port)
    assert found["distnorm_step"] == 2
    assert math.isnan(found["distnorm_grad_norm"])
    assert found["distnorm_clip_rate"] == 0.5
    assert found["distnorm_group_threshold{group=experts}"] == 0.5
    assert found["distnorm_layer_norm{layer=a.weight}"] == 4.0
    assert found["distnorm_layer_zero_fraction{layer=b.weight}"] == 0.25
    assert found["distnorm_alerts_total{kind=non_finite}"] == 1
    assert began - 1 <= found["distnorm_last_step_timestamp_seconds"] <= time.time() + 1
    # Its own registry: nothing of the process's, and two of them in one process don't meet.
    assert not [name for name in found if not name.startswith("distnorm_")]
    other, _ = monitored({"sinks": {"prometheus": port}})
    other.step(step_row(1))
    other.step(step_row(2))
    failed = [text for text in caplog.messages if "prometheus" in text]
    assert len(failed) == 1
    assert failed[0].endswith("set monitor.sinks.prometheus to a port that nobody uses")
    monitor.close()
    with pytest.raises(urllib.error.URLError):
        scrape(port)


def addresses(port: int) -> set[str]:
    """Where this machine listens on a port, IPv4, as the kernel says."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    local = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {socket.inet_ntoa(struct.pack("<I", int(host, 16))) for host, at in local if int(at, 16) == port}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc/net/tcp to see who listens")
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_prometheus_listens_at_loopback_unless_told_otherwise(host: str, port: int) -> None:
    told: Any = port if host == "127.0.0.1" else {"port": port, "host": host}
    monitor, _ = monitored({"sinks": {"prometheus": told}})
    monitor.step(step_row(1))
    assert addresses(port) == {host}
    monitor.close()


def wandb_records(content: bytes) -> Iterator[Any]:
    """What `wandb sync` sends: records in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, data = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # no header fits in what is left of a block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if len(content) < at + 7 + length:
            return  # it is being written
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            record = Record()
            record.ParseFromString(data)
            yield record
            data = b""


def test_wandb_offline_has_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monitor, alerts = monitored({"sinks": {"wandb": True}}, tmp_path)
    run(monitor)
    monitor.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    history, alerted, until = [], [], time.monotonic() + 30
    records: list[Any] = []
    # The process that writes it is wandb's own, and `finish` may be back before it is done.
    while "exit" not in [record.WhichOneof("record_type") for record in records]:
        assert time.monotonic() < until
        time.sleep(0.02)
        records = list(wandb_records(file.read_bytes()))
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
        if record.WhichOneof("record_type") == "alert":
            alerted.append((record.alert.title, record.alert.text))
    first, layers, second = history
    assert (first["distnorm/step"], first["distnorm/grad_norm"]) == (1, 3.0)
    assert first["distnorm/groups/experts/threshold"] == 0.5
    assert (layers["distnorm/step"], layers["distnorm/layers/norm/a.weight"]) == (1, 4.0)
    assert math.isnan(second["distnorm/grad_norm"])
    assert alerted == [("distnorm: non_finite", f"step 2: {alerts[0].message}")]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "prometheus"])
def test_a_missing_package_is_named_once_with_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    package = {"prometheus": "prometheus_client"}.get(name, name)
    real = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    value = 9090 if name == "prometheus" else True
    monitor, alerts = monitored({"sinks": {name: value}}, tmp_path)
    run(monitor)
    (failed,) = [text for text in caplog.messages if name in text]
    assert failed == (
        f"sink {name} failed and is dropped: ModuleNotFoundError: No module named {package!r}; "
        f"pip install 'distnorm[{name}]', or take it out of monitor.sinks"
    )
    assert len(alerts) == 1
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


class Fails:
    """A sink that fails in one of its methods."""

    def __init__(self, method: str) -> None:
        self.method, self.calls = method, [0, 0]
        self.closed = 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> None:
            self.closed += name == "close"
            self.calls[0] += 1
            if name == self.method:
                raise OSError(28, "No space left on device")

        return call


@pytest.mark.parametrize("method", ["step", "layers", "alert", "close"])
def test_a_sink_that_fails_is_closed_and_dropped_and_others_go_on(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    broken, fine = Fails(method), Fails("")
    sinks = Sinks({"broken": lambda: broken, "fine": lambda: fine})
    monkeypatch.setattr("distnorm.monitor.monitor.openers", lambda *_: {})
    monitor, _ = monitored({})
    monitor._sinks = sinks
    run(monitor)
    run(monitor)
    monitor.close()
    (failed,) = [text for text in caplog.messages if "sink" in text]
    assert failed.startswith("sink broken failed and is dropped: OSError: [Errno 28] No space left")
    assert broken.closed >= 1
    assert fine.calls[0] == 8
    assert fine.closed == 1


def test_tensorboard_without_a_folder_says_where_to_name_one(caplog: Any) -> None:
    monitor, _ = monitored({"sinks": {"tensorboard": True}})
    monitor.step(step_row(1))
    (failed,) = caplog.messages
    assert "expected monitor.dir to name a folder, found null" in failed


def test_a_rank_that_does_not_write_opens_nothing(port: int, tmp_path: Path, caplog: Any) -> None:
    config = MonitorConfig(sinks={"tensorboard": True, "prometheus": port})  # type: ignore[arg-type]
    monitor = Monitor(config, tmp_path, writes=False)
    calls: list[Any] = []
    monitor.on_alert(calls.append)
    run(monitor)
    assert monitor.non_finite_in_a_row == 1
    assert (calls, caplog.messages, list(tmp_path.iterdir())) == ([], [], [])
    with pytest.raises(urllib.error.URLError):
        scrape(port)
