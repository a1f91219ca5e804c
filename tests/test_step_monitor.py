"""A monitored clipper: planted faults give alerts in time, and steps cost what they cost."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import distnorm
from distnorm.config import MonitorConfig
from distnorm.kernels import AsyncHostCopy
from distnorm.measure.norms import norm
from distnorm.monitor.step_monitor import StepMonitor
from distnorm.plan.collectives import Ranks
from tests.counting import as_on_an_accelerator, collectives_and_reads
from tests.refusals import heard

EVERY = 3


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Model:
    """Sharded, copied and half-copied parameters, and the gradient of each step."""

    def __init__(self) -> None:
        size = dist.get_world_size() if dist.is_initialized() else 1
        self.named: dict[str, nn.Parameter] = {}
        layouts: dict[str, Any] = {f"blocks.{i}.copied": None for i in range(3)}
        if size > 1:
            mesh = init_device_mesh("cpu", (2, size // 2))
            layouts |= {"hybrid": (mesh, [Replicate(), Shard(0)]), "sharded": (mesh, [Shard(0), Shard(0)])}
        for i, (name, layout) in enumerate(layouts.items()):
            value = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
            parameter = nn.Parameter(value if layout is None else distribute_tensor(value, *layout))
            self.named[name] = parameter

    def backward(self, step: int) -> None:
        for i, parameter in enumerate(self.named.values()):
            gradient = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + i))
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient

    def local(self, name: str) -> Tensor:
        gradient = self.named[name].grad
        assert gradient is not None
        return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def config(folder: Path | None, nonfinite: str = "propagate", **monitor: Any) -> dict[str, Any]:
    return {
        "clip": {"max_norm": 1.0, "nonfinite": nonfinite},
        "monitor": {"every": EVERY, "replicas": True, "dir": folder, **monitor},
    }


# ---- what a step costs


def costs_of_steps(folder: Path) -> list[Any]:
    model = Model()
    clipper = distnorm.GradClipper(list(model.named.items()), config(folder))
    unmonitored = distnorm.GradClipper(list(model.named.items()), {"clip": config(None)["clip"]})
    seen = []
    for step in range(1, 3 * EVERY + 1):
        model.backward(step)
        clipper.note(loss=torch.tensor(0.5), tokens=100)
        with as_on_an_accelerator():
            plain = collectives_and_reads(unmonitored.measure)
            seen.append((plain, collectives_and_reads(clipper.clip)))
    return seen


@pytest.mark.slow
def test_every_step_has_one_collective_and_no_host_read(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for costs in ranks(4, costs_of_steps, tmp_path):
        one = ({"c10d::allreduce_": 1}, {})
        assert costs[1:] == [(one, one)] * (3 * EVERY - 1)  # the first also agrees on partial gradients
    rows = lines(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(step, 0.5) for step in range(1, 3 * EVERY + 1)]
    assert rows[0]["tokens_per_second"] is None and rows[1]["tokens_per_second"] > 0
    layers = lines(tmp_path / "layers.jsonl")
    assert [(row["step"], row["layer"]) for row in layers] == [
        (step, name)
        for step in (EVERY, 2 * EVERY, 3 * EVERY)  # the last by the clipper's own end
        for name in ("blocks.0.copied", "blocks.1.copied", "blocks.2.copied", "hybrid", "sharded")
    ]


# ---- planted faults


def scaled(name: str, factor: float) -> Callable[[Model, int], None]:
    def scale(model: Model, rank: int) -> None:
        model.local(name).mul_(factor)

    return scale


def not_a_number(model: Model, rank: int) -> None:
    if rank == 1:
        model.local("sharded")[0, 0] = math.nan


def flipped(name: str) -> Callable[[Model, int], None]:
    def flip(model: Model, rank: int) -> None:
        if rank == 2:
            bits = model.local(name).view(torch.int32)
            bits[0, 1] ^= 1  # the lowest bit of the mantissa

    return flip


FAULTS: dict[str, Callable[[Model, int], None]] = {
    "vanishing": scaled("blocks.1.copied", 1e-6),
    "exploding": scaled("sharded", 1e4),
    "non_finite": not_a_number,
    "flipped copy": flipped("blocks.2.copied"),
    "flipped half": flipped("hybrid"),
}
EXPECTED = {
    "vanishing": ("vanishing", "blocks.1.copied", None),
    "exploding": ("exploding", "sharded", None),
    "non_finite": ("non_finite", "sharded", [1]),
    "flipped copy": ("divergence", "blocks.2.copied", [2]),
    "flipped half": ("divergence", "hybrid", [0, 2]),  # of two, who knows which
}
PLANTED = (6 * EVERY, 6 * EVERY + 1, 6 * EVERY + 2)


def run_with_fault(folder: Path, kind: str, planted: int) -> list[Any]:
    """The alerts that callbacks got on this rank, with the step that had been made then."""
    model, alerted, made = Model(), [], [0]
    clipper = distnorm.GradClipper(list(model.named.items()), config(folder))
    assert clipper.monitor is not None
    clipper.monitor.on_alert(lambda alert: alerted.append((made[0], alert)))
    for step in range(1, planted + EVERY + 1):
        model.backward(step)
        if step >= planted:
            FAULTS[kind](model, dist.get_rank())
        clipper.clip()
        made[0] = step
    clipper.flush()
    return alerted


def runs_with_faults(folder: Path) -> list[Any]:
    return [
        run_with_fault(folder / kind / str(planted), kind, planted) for kind in FAULTS for planted in PLANTED
    ]


@pytest.mark.slow
def test_a_planted_fault_gives_an_alert_within_one_interval(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    alerted, *others = ranks(4, runs_with_faults, tmp_path)
    assert all(alerts == [] for other in others for alerts in other)
    for kind in FAULTS:
        for planted in PLANTED:
            found = alerted.pop(0)
            found_at = planted if kind == "non_finite" else -(-planted // EVERY) * EVERY
            alerts = lines(tmp_path / kind / str(planted) / "alerts.jsonl")
            assert [(a["kind"], a["layer"], a["ranks"]) for a in alerts] == [EXPECTED[kind]]
            assert [a["step"] for a in alerts] == [found_at]
            ((made, alert),) = found
            assert (alert.step, alert.layer) == (found_at, EXPECTED[kind][1])
            assert made <= planted + EVERY


def clean(folder: Path) -> int:
    model = Model()
    clipper = distnorm.GradClipper(list(model.named.items()), config(folder))
    for step in range(1, 41):
        model.backward(step)
        clipper.clip()
    clipper.close()
    return len(lines(folder / "metrics.jsonl"))


def test_without_a_fault_there_is_no_alert(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    ranks(4, clean, tmp_path)
    assert len(lines(tmp_path / "metrics.jsonl")) == 40
    assert lines(tmp_path / "alerts.jsonl") == []


# ---- steps that are not finite


def stops(most: int, bad: set[int]) -> Any:
    model = Model()
    clipper = distnorm.GradClipper(
        list(model.named.items()), {"clip": {"nonfinite": "skip"}, "monitor": {"stop_after": most}}
    )
    for step in range(1, 12):
        model.backward(step)
        if step in bad and dist.get_rank() == 1:
            model.local("sharded")[0, 0] = math.inf
        if (said := heard(clipper.clip))[0]:
            return step, said
    return None


def test_stop_after_raises_on_all_ranks_at_the_same_step(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(4, stops, 3, {2, 3, 5, 6, 8}) == [None] * 4
    for step, (kind, message) in ranks(4, stops, 3, {2, 3, 5, 6, 7, 8}):
        assert (step, kind) == (7, "NonFiniteGradientError")
        assert "expected fewer than 3 steps in a row whose norm is not finite, found 3" in message


def refusing(folder: Path) -> Any:
    """One rank has a gradient that can't be measured, so nobody may wait for it to name anything."""
    model = Model()
    clipper = distnorm.GradClipper(list(model.named.items()), config(folder, every=None, replicas=False))
    model.backward(1)
    clipper.clip()
    if dist.get_rank() == 1:
        model.named["blocks.0.copied"].grad = torch.zeros(8, 4).to_sparse()
    said = heard(clipper.clip)
    return said[0], clipper.flush()


def test_a_refused_gradient_leaves_nobody_waiting(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    found = ranks(4, refusing, tmp_path, timeout=30)
    assert [kind for kind, _ in found] == ["UnsupportedGradientError"] * 4
    assert [(row["step"], row["finite"]) for _, row in found] == [(1, True)] * 4


RULES: dict[str, dict[str, Any]] = {
    "the maximum norm": {"norm": {"type": "inf"}},
    "groups": {"clip": {"max_norm": 1.0, "groups": [{"params": ["hybrid"], "max_norm": 0.5}]}},
}


def with_a_nan(folder: Path, rules: str, ends: str) -> list[Any]:
    """The alerts of a step in which one rank has one bad gradient, after good ones."""
    model, alerts = Model(), []
    settings = {"clip": {"max_norm": 1.0}, "monitor": {"dir": folder / rules / ends}} | RULES[rules]
    settings["clip"]["nonfinite"] = "skip"
    clipper = distnorm.GradClipper(list(model.named.items()), settings)
    assert clipper.monitor is not None
    clipper.monitor.on_alert(alerts.append)
    for step in range(1, 4):
        model.backward(step)
        if step == 3 and dist.get_rank() == 1:
            model.local("sharded")[0, 0] = math.nan if ends == "nan" else math.inf
        clipper.clip()
    clipper.close()
    return [(alert.kind, alert.step, alert.layer, alert.ranks) for alert in alerts]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("ends", ["nan", "inf"])
def test_an_alert_names_the_gradient_that_is_not_finite(
    ranks: Callable[..., list[Any]], tmp_path: Path, rules: str, ends: str
) -> None:
    assert ranks(4, with_a_nan, tmp_path, rules, ends)[0] == [("non_finite", 3, "sharded", (1,))]


class Late(AsyncHostCopy):
    """Values that take two steps to arrive, as a device's may."""

    waits = 0

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        self.asked = 0

    @property
    def has_arrived(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def values(self) -> Tensor:
        Late.waits += self.asked < 2
        return super().values()


def test_no_step_waits_for_values_on_their_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distnorm.monitor.step_monitor.AsyncHostCopy", Late)
    monkeypatch.setattr(Late, "waits", 0)
    model = Model()
    clipper = distnorm.GradClipper(list(model.named.items()), config(tmp_path))
    for step in range(1, 8):
        model.backward(step)
        clipper.clip()
        assert len(lines(tmp_path / "metrics.jsonl")) == max(0, step - 2)
    assert Late.waits == 0
    row = clipper.flush(loss=0.25)
    assert Late.waits > 0
    rows = lines(tmp_path / "metrics.jsonl")
    assert row is not None and (row["step"], row["loss"]) == (7, 0.25)
    assert [(each["step"], each["loss"]) for each in rows] == [*((s, None) for s in range(1, 7)), (7, 0.25)]


UNFLUSHED = """
import sys, torch, distnorm
weight = torch.nn.Parameter(torch.ones(3))
clipper = distnorm.GradClipper([("w", weight)], {"monitor": {"every": 1, "dir": sys.argv[1]}})
for _ in range(3):
    weight.grad = torch.ones(3)
    clipper.clip()
"""


@pytest.mark.slow
def test_the_last_row_is_written_at_the_interpreters_end(tmp_path: Path) -> None:
    command = [sys.executable, "-c", UNFLUSHED, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert ended.stderr == ""
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in lines(tmp_path / "layers.jsonl")] == [1, 2, 3]


# ---- other sets of parameters, and state


def changing(folder: Path) -> None:
    model = Model()
    module = nn.Module()
    for name, parameter in model.named.items():
        module.register_parameter(name.replace(".", "_"), parameter)
    clipper = distnorm.GradClipper(module, config(folder))
    for step in range(1, 2 * EVERY + 1):
        if step == 2 * EVERY:
            module.added = nn.Parameter(torch.ones(3))  # in a monitored step
        model.backward(step)
        clipper.clip()
    clipper.close()


def test_parameters_may_change_in_a_monitored_step(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    ranks(4, changing, tmp_path)
    layers = lines(tmp_path / "layers.jsonl")
    assert [len([row for row in layers if row["step"] == step]) for step in (EVERY, 2 * EVERY)] == [5, 6]
    assert [row["norm"] for row in layers if row["layer"] == "added"] == [0.0]


def test_the_monitors_state_goes_along(tmp_path: Path) -> None:
    def run(clipper: distnorm.GradClipper, first: int, last: int) -> None:
        for step in range(first, last + 1):
            model.backward(step)
            clipper.clip()

    model = Model()
    named = list(model.named.items())
    straight = distnorm.GradClipper(named, config(tmp_path / "a"))
    run(straight, 1, 20)
    before = distnorm.GradClipper(named, config(tmp_path / "b"))
    run(before, 1, 13)
    state = before.state_dict()
    run(before, 14, 15)  # lost
    before.close()
    after = distnorm.GradClipper(named, config(tmp_path / "b"))
    after.load_state_dict(state)
    run(after, 14, 20)
    assert after.state_dict() == straight.state_dict()
    for name in ("metrics.jsonl", "layers.jsonl"):
        a, b = (lines(tmp_path / folder / name) for folder in "ab")
        assert [{**row, "time": 0} for row in a] == [{**row, "time": 0} for row in b]
    later = distnorm.GradClipper(named, config(tmp_path / "b"))
    later.load_state_dict({"version": 1, "steps": 20})
    later.close()
    assert len(lines(tmp_path / "b" / "metrics.jsonl")) == 20


def test_without_a_monitor_there_is_nothing_to_flush() -> None:
    model = Model()
    clipper = distnorm.GradClipper(list(model.named.items()), {"clip": {"max_norm": 1.0}})
    model.backward(1)
    clipper.note(loss=1.0)
    clipper.clip()
    assert (clipper.monitor, clipper.flush()) == (None, None)
    assert "monitor" not in clipper.state_dict()


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(distnorm.ConfigError, match=r"monitor\.by.*nothing"):
        distnorm.GradClipper(list(Model().named.items()), config(None, by=["blocks.*", "nothing"]))


# ---- noise


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(rows)))
        return out


def rows_of(step: int, rank: int) -> Tensor:
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(10 * step + rank)).double()


def under_ddp(folder: Path) -> None:
    replicated = nn.parallel.DistributedDataParallel(Linear().double(), bucket_cap_mb=1e-4)
    monitored = config(folder, every=2)
    monitored["clip"]["overlap"] = True
    clipper = distnorm.GradClipper(replicated, monitored)
    for step in range(1, 7):
        replicated.zero_grad()
        replicated(rows_of(step, dist.get_rank())).square().sum().backward()
        if step == 4:  # what is measured isn't what was reduced
            next(iter(replicated.parameters())).grad.mul_(2)
        clipper.clip()
    clipper.close()


def test_the_noise_scale_is_that_of_its_formula(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    ranks(4, under_ddp, tmp_path)
    signal = noise = 0.0
    expected = []
    for step in range(1, 7):
        own = []
        for rank in range(4):
            model = Linear().double()
            model(rows_of(step, rank)).square().sum().backward()
            own.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        small = sum(float(gradient.square().sum()) for gradient in own) / 4
        big = float((sum(own) / 4).square().sum())  # type: ignore[union-attr]
        if step in (2, 6):
            signal = 0.9 * signal + 0.1 * (4 * big - small) / 3
            noise = 0.9 * noise + 0.1 * (small - big) / (1 - 1 / 4)
        expected.append(noise / signal if signal > 0 else None)
    found = [row["noise_scale"] for row in lines(tmp_path / "metrics.jsonl")]
    assert [scale is None for scale in found] == [scale is None for scale in expected]
    assert found[-1] == pytest.approx(expected[-1], rel=1e-9)
    assert found[1:5] == pytest.approx(expected[1:5], rel=1e-9)


def without_noise() -> Any:
    model = Model()
    clipper = distnorm.GradClipper(list(model.named.items()), config(None))
    model.backward(1)
    clipper.clip()
    row = clipper.flush()
    assert row is not None
    return row["noise_scale"]


def test_without_ddp_there_is_no_noise_scale(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(2, without_noise) == [None, None]


def monitored_by_one(folder: Path) -> Any:
    model, here = Model(), dist.get_rank() == 0
    monitored = {"monitor": {"dir": folder}} if here else {}
    return heard(
        lambda: distnorm.GradClipper(list(model.named.items()), {"clip": {"nonfinite": "skip"}, **monitored})
    )


def test_a_monitor_on_one_rank_alone_is_refused(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    for kind, message in ranks(2, monitored_by_one, tmp_path, timeout=30):
        assert kind == "DisagreementError"
        assert "monitor" in message and "not monitored" in message


def test_a_checkpoint_of_torch_brings_back_the_monitors_memory(tmp_path: Path) -> None:
    model = Model()
    named = list(model.named.items())
    before = distnorm.GradClipper(named, config(None))
    for step in range(1, 2 * EVERY + 1):
        model.backward(step)
        before.clip()
    state_dict_saver.save({"clipper": before}, checkpoint_id=tmp_path)
    after = distnorm.GradClipper(named, config(None))
    state_dict_loader.load({"clipper": after}, checkpoint_id=tmp_path)
    state = after.state_dict()
    assert state == before.state_dict()
    assert [row[0] for row in state["monitor"]["rules"]["layers"]] == list(model.named)


def test_a_loss_is_not_that_of_the_step_after_one_that_raised() -> None:
    model = Model()
    settings = config(None, "raise", every=None, replicas=False, clip_rate_window=7)
    clipper = distnorm.GradClipper(list(model.named.items()), settings)
    model.backward(1)
    model.local("blocks.0.copied")[0, 0] = math.nan
    clipper.note(loss=torch.tensor(7.0))
    with pytest.raises(distnorm.NonFiniteGradientError):
        clipper.clip()
    model.backward(2)
    clipper.clip()
    row = clipper.flush()
    assert row is not None and row["step"] == 1 and row["loss"] is None


class CopiesToTheHost:
    """Which copies to the host's memory nobody waits for: on their way, they could be read too soon."""

    def __enter__(self) -> CopiesToTheHost:
        self.copies, self.hasty = 0, 0
        original: Any = Tensor.to

        def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            device = kwargs.get("device", args[0] if args else None)
            if isinstance(device, torch.device) and device.type == "cpu":
                self.copies += 1
                self.hasty += bool(kwargs.get("non_blocking"))
            return original(tensor, *args, **kwargs)

        self._patch = mock.patch.object(Tensor, "to", to)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


@pytest.mark.parametrize("policy", ["constant", "per_tensor", "agc", "skip_spikes"])
def test_what_is_copied_to_the_host_is_waited_for(policy: str) -> None:
    model = Model()
    of = {"name": policy, "on": "loss"} if policy == "skip_spikes" else policy
    settings = config(None, "zero", every=1)
    settings["clip"] |= {"policy": of, "max_norm": None if policy == "agc" else 0.1}
    clipper = distnorm.GradClipper(list(model.named.items()), settings)
    model.backward(1)
    clipper.note(loss=torch.tensor(0.5))
    with CopiesToTheHost() as copies:
        clipper.clip()
    assert copies.copies and not copies.hasty


def test_facts_may_be_tensors_or_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    clipper = distnorm.GradClipper(list(model.named.items()), config(tmp_path))
    facts = {"loss": torch.ones((), requires_grad=True) * 0.5, "lr": torch.tensor([0.25]), "of": tmp_path}
    for step in (1, 2):
        model.backward(step)
        clipper.note(tokens=torch.tensor(100))  # type: ignore[arg-type]  # as somebody will
        clipper.clip()
        row = clipper.flush(**facts)
        assert row is not None and (type(row["loss"]), row["loss"], row["lr"]) == (float, 0.5, 0.25)
    written = lines(tmp_path / "metrics.jsonl")
    assert [(row["loss"], row["lr"], row["of"]) for row in written] == [(0.5, 0.25, str(tmp_path))] * 2
    assert type(written[1]["tokens_per_second"]) is float and not caplog.messages


def test_a_state_whose_monitor_is_none_changes_nothing() -> None:
    model = Model()
    clipper = distnorm.GradClipper(list(model.named.items()), config(None))
    model.backward(1)
    clipper.clip()
    before = clipper.state_dict()
    with pytest.raises(distnorm.DistnormError, match="expected a monitor's state under monitor"):
        clipper.load_state_dict({**before, "steps": 7, "monitor": {"step": 7}})
    assert clipper.state_dict() == before


# ---- what a callback of an alert may do


class Alerting:
    """A monitored clipper whose third step gives an alert; every step has a row and a snapshot."""

    def __init__(self, folder: Path, **monitor: Any) -> None:
        self.model, self.folder = Model(), folder
        alerts = {"cooldown": 1}
        settings = config(folder, every=1, replicas=False, alerts=alerts, clip_rate_window=3, **monitor)
        settings["monitor"]["alerts"] |= {"clip_rate": 0.1, "hysteresis": 1.0}
        self.clipper = distnorm.GradClipper(list(self.model.named.items()), settings)
        assert self.clipper.monitor is not None
        self.monitor = self.clipper.monitor

    def step(self, step: int) -> distnorm.ClipResult:
        self.model.backward(step)
        return self.clipper.clip()

    def written(self) -> tuple[list[int], list[int]]:
        """The steps of the rows, and of the layers' rows, of which each step has three."""
        layers = [row["step"] for row in lines(self.folder / "layers.jsonl")]
        assert layers == [step for step in layers[::3] for _ in range(3)]
        return [row["step"] for row in lines(self.folder / "metrics.jsonl")], layers[::3]


def test_a_callback_finds_its_step_written_and_may_flush(tmp_path: Path) -> None:
    run, found = Alerting(tmp_path), []

    def flush(alert: distnorm.Alert) -> None:
        before = run.written()
        row = run.clipper.flush()
        assert row is not None
        found.append((alert.step, before, row["step"], run.written()))

    run.monitor.on_alert(flush)
    for step in range(1, 6):
        run.step(step)
    run.clipper.close()
    assert [len(steps) for steps in run.written()] == [5, 5]
    # The alert of step 3 comes with step 4, whose own row the callback's flush then writes.
    assert found[0] == (3, ([1, 2, 3], [1, 2, 3]), 4, ([1, 2, 3, 4], [1, 2, 3, 4]))


def test_a_callback_may_note_what_belongs_to_the_next_step(tmp_path: Path) -> None:
    run = Alerting(tmp_path)
    run.monitor.on_alert(lambda alert: run.clipper.note(loss=100.0 + alert.step))
    for step in range(1, 6):
        if step < 5:
            run.clipper.note(loss=float(step))
        run.step(step)
    run.clipper.close()
    assert [row["loss"] for row in lines(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0, 4.0, 103.0]


def test_a_callback_may_clip_again(tmp_path: Path) -> None:
    run = Alerting(tmp_path)
    again = iter([0.0])

    def clip(alert: distnorm.Alert) -> None:
        if next(again, None) is not None:
            run.step(alert.step + 100)

    run.monitor.on_alert(clip)
    for step in range(1, 6):
        run.step(step)
    run.clipper.close()
    assert run.written() == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])


def test_a_callback_may_save_a_checkpoint(tmp_path: Path) -> None:
    run, states = Alerting(tmp_path), []
    run.monitor.on_alert(lambda _: states.append(run.clipper.state_dict()))
    for step in range(1, 5):
        run.step(step)
    assert (states[0]["steps"], states[0]["monitor"]["step"]) == (4, 4)
    straight = Alerting(tmp_path / "straight")
    for step in range(1, 5):
        straight.step(step)
    assert straight.clipper.state_dict() == states[-1]


def test_a_callback_may_close_the_clipper(tmp_path: Path) -> None:
    run = Alerting(tmp_path)
    run.monitor.on_alert(lambda _: run.clipper.close())
    for step in range(1, 7):
        run.step(step)
    run.clipper.close()
    assert run.written() == ([1, 2, 3, 4], [1, 2, 3, 4])


def test_what_a_callback_frees_has_been_scaled(tmp_path: Path) -> None:
    run = Alerting(tmp_path)
    held: list[Tensor] = []

    def free(alert: distnorm.Alert) -> None:
        for parameter in run.model.named.values():
            assert parameter.grad is not None
            held.append(parameter.grad)
            parameter.grad = None
        raise RuntimeError("and more")

    run.monitor.on_alert(free)
    for step in range(1, 5):
        result = run.step(step)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in held))
    assert norm == pytest.approx(float(result.clipped_norm), rel=1e-6) == pytest.approx(1.0, rel=1e-5)


def test_an_interrupted_callback_leaves_the_other_steps_in_their_order(tmp_path: Path) -> None:
    run = Alerting(tmp_path)

    def interrupt(alert: distnorm.Alert) -> None:
        if alert.step == 3:
            raise KeyboardInterrupt

    run.monitor.on_alert(interrupt)
    for step in range(1, 4):
        run.step(step)
    with pytest.raises(KeyboardInterrupt):
        run.step(4)
    for step in range(5, 7):
        run.step(step)
    run.clipper.close()
    assert run.written() == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])


# ---- what is noted, and where it goes


def test_a_noted_loss_is_the_value_that_it_had_then(tmp_path: Path) -> None:
    model = Model()
    clipper = distnorm.GradClipper(list(model.named.items()), config(tmp_path))
    running, tokens = torch.tensor(7.5), torch.tensor(64)
    for step in (1, 2):
        model.backward(step)
        clipper.note(loss=running, tokens=tokens)  # type: ignore[arg-type]
        running.zero_()
        tokens.zero_()
        clipper.clip()
        running.fill_(7.5)
        tokens.fill_(64)
    clipper.close()
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [7.5, 7.5] and rows[1]["tokens_per_second"] > 0


NOWHERE = "monitor.every = 3 measures layers, and nothing keeps what it finds"


@pytest.mark.parametrize("place", [None, "dir", "callback", "sink"])
def test_a_monitor_without_a_place_to_write_says_so_once(
    place: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model()
    sinks = {"tensorboard": True} if place == "sink" else {}
    folder = tmp_path if place in ("dir", "sink") else None
    clipper = distnorm.GradClipper(list(model.named.items()), config(folder, sinks=sinks))
    assert clipper.monitor is not None
    if place == "callback":
        clipper.monitor.on_alert(lambda _: None)
    for step in range(1, 3 * EVERY + 1):
        model.backward(step)
        clipper.clip()
    clipper.close()
    said = [message for message in caplog.messages if message.startswith(NOWHERE)]
    assert len(said) == (place is None)
    assert all(key in message for message in said for key in ("monitor.dir", "monitor.sinks.wandb"))


def without_a_place() -> list[str]:
    heard_here: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard_here.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distnorm").addHandler(handler)
    model = Model()
    clipper = distnorm.GradClipper(list(model.named.items()), config(None, every=1))
    for step in (1, 2):
        model.backward(step)
        clipper.clip()
    clipper.close()
    return [message for message in heard_here if "nothing keeps what it finds" in message]


def test_only_rank_0_says_that_there_is_no_place(ranks: Callable[..., list[Any]]) -> None:
    assert [len(said) for said in ranks(2, without_a_place)] == [1, 0]


def test_a_dry_run_has_no_rows(tmp_path: Path) -> None:
    monitor = StepMonitor.of(MonitorConfig(every=1, dir=str(tmp_path)), Ranks(None), norm(2.0))
    assert monitor is not None
    with FakeTensorMode():
        result = Result(torch.zeros((), device="cpu"), torch.ones((), dtype=torch.bool, device="cpu"))
        monitor.note(1.0, None)
        monitor.record(1, result, None)
    assert monitor.flush({}) is None
    monitor.close()


@dataclass
class Result:
    total_norm: Tensor
    is_finite: Tensor
