"""What a watched run writes: rows of layers against one dense process, and files that outlive what fails."""

from __future__ import annotations

import builtins
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distnorm import Config, NonFiniteGradientError
from distnorm.trainer.data import Text
from distnorm.trainer.model import build_model, mean_loss
from distnorm.trainer.optimizer import make_optimizer

from .tiny import rank_count, rows, shipped, train

RTOL = 1e-9
NUMBERS = ("norm", "rms", "max", "zero_fraction", "grad_to_weight", "weight_norm")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- layers


def dense_steps(config: Config) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Of each step: name -> gradient and weight, by one process that clips by the formula."""
    model = build_model(config).to(getattr(torch, config.train.dtype))
    optimizer = make_optimizer(model.parameters(), config)
    text, seen = Text(config), []
    for step in range(1, config.train.steps + 1):
        optimizer.zero_grad()
        inputs, targets = text.batch(step)
        mean_loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        now = {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            now[name] = parameter.grad.clone(), parameter.detach().clone()
        seen.append(now)
        total = math.sqrt(sum(float(gradient.double().square().sum()) for gradient, _ in now.values()))
        assert config.clip.max_norm is not None
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, config.clip.max_norm / (total + 1e-6))
        optimizer.step()
    return seen


def dense_layer(members: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    gradient = torch.cat([gradient.double().flatten() for gradient, _ in members])
    weight = torch.cat([weight.double().flatten() for _, weight in members])
    norm, weight_norm = float(gradient.square().sum().sqrt()), float(weight.square().sum().sqrt())
    return {
        "norm": norm,
        "rms": norm / math.sqrt(len(gradient)),
        "max": float(gradient.abs().max()),
        "zero_fraction": float((gradient == 0).double().mean()),
        "grad_to_weight": norm / weight_norm,
        "weight_norm": weight_norm,
    }


LAYERS: Mapping[str, Callable[[str], Sequence[str]]] = {
    "parameter": lambda name: [name],
    "module": lambda name: [name.rpartition(".")[0]],
    "depth": lambda name: [".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])],
    '["*.weight", "blocks.1.*"]': lambda name: [
        *(["*.weight"] if name.endswith(".weight") else []),
        *(["blocks.1.*"] if name.startswith("blocks.1.") else []),
    ],
}


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("monitor", "parameter"),
        ("pp2_tied", "depth"),
        ("pp2_tied", '["*.weight", "blocks.1.*"]'),
        ("replicate2_tp2", "module"),
    ],
)
@pytest.mark.slow
def test_rows_of_layers_are_those_of_one_dense_process(
    name: str, by: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    overrides = ("monitor.every=2", f"monitor.by={by}", "monitor.replicas=true", "train.steps=4")
    config = shipped(name, tmp_path, *overrides)
    ranks(rank_count(config), train, config)
    dense = dense_steps(config)
    found = lines(tmp_path / "layers.jsonl")
    expected = []
    for step in (2, 4):
        members: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for parameter, pair in dense[step - 1].items():
            for layer in LAYERS[by](parameter):
                members.setdefault(layer, []).append(pair)
        expected += [(step, layer, dense_layer(pairs)) for layer, pairs in members.items()]
    assert sorted((row["step"], row["layer"]) for row in found) == sorted((s, n) for s, n, _ in expected)
    by_key = {(row["step"], row["layer"]): row for row in found}
    for step, layer, numbers in expected:
        row = by_key[step, layer]
        assert list(row) == ["step", "layer", *NUMBERS]
        assert {key: row[key] for key in NUMBERS} == pytest.approx(numbers, rel=RTOL, abs=0), (step, layer)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "alerts.jsonl").read_bytes() == b""


# ---- a clean run


@pytest.mark.slow
def test_nothing_is_reported_of_a_clean_run(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    small = "train.model={dim: 16, layers: 2, heads: 2, context: 8, tie_embeddings: true}"
    watched = ("monitor.every=5", "monitor.replicas=true", "train.steps=100", small)
    ranks(2, train, shipped("tp2", tmp_path, *watched))
    assert len(rows(tmp_path)) == 100
    assert {row["step"] for row in lines(tmp_path / "layers.jsonl")} == set(range(5, 101, 5))
    assert lines(tmp_path / "alerts.jsonl") == []


# ---- going on, and ends


def test_a_resumed_run_has_each_row_once_and_the_same(tmp_path: Path) -> None:
    watched = ("monitor.every=2", "train.checkpoint.every=3", "monitor.clip_rate_window=4")
    files = ("metrics.jsonl", "layers.jsonl")
    train(shipped("single", tmp_path / "a", *watched, "train.steps=6"))
    train(shipped("single", tmp_path / "b", *watched, "train.steps=5"))
    train(shipped("single", tmp_path / "b", *watched, "train.steps=6"))
    for name in files:
        straight, resumed = lines(tmp_path / "a" / name), lines(tmp_path / "b" / name)
        for row in (*straight, *resumed):
            row.pop("tokens_per_second", None)
            row.pop("time", None)
        assert resumed == straight


def test_stop_after_ends_a_run_after_its_row(tmp_path: Path) -> None:
    diverges = ("train.optimizer.lr=1e300", "train.steps=9", "clip.nonfinite=skip", "monitor.stop_after=3")
    with pytest.raises(NonFiniteGradientError, match="expected fewer than 3 steps in a row"):
        train(shipped("single", tmp_path, *diverges))
    assert [(row["step"], row["finite"]) for row in rows(tmp_path)] == [
        (1, True), *((step, False) for step in (2, 3, 4))
    ]  # fmt: skip
    (alert,) = lines(tmp_path / "alerts.jsonl")
    assert (alert["step"], alert["kind"], alert["ranks"]) == (2, "non_finite", [0])
    assert alert["layer"] in {name for name, _ in build_model(shipped("single", tmp_path)).named_parameters()}


def test_a_run_that_raises_leaves_an_alert(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteGradientError):
        train(shipped("single", tmp_path, "train.optimizer.lr=1e300", "monitor.every=1"))
    assert [row["step"] for row in rows(tmp_path)] == [1]
    (alert,) = lines(tmp_path / "alerts.jsonl")
    assert (alert["step"], alert["kind"], alert["ranks"]) == (2, "non_finite", [0])


def test_sinks_that_fail_leave_the_run_going(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_import, real_write = builtins.__import__, os.write

    def without_wandb(module: str, *args: Any, **kwargs: Any) -> Any:
        if module == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'")
        return real_import(module, *args, **kwargs)

    def full_disk(descriptor: int, line: bytes) -> int:
        if line.startswith(b'{"step": 2'):
            raise OSError(28, "No space left on device")
        return real_write(descriptor, line)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    monkeypatch.setattr("distnorm.monitor.sinks.jsonl.os.write", full_disk)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        sinks = f"monitor.sinks={{wandb: true, prometheus: {taken.getsockname()[1]}}}"
        code, printed = train(shipped("single", tmp_path, sinks, "monitor.every=1"))
    assert code == 0
    assert sum(line.startswith("step ") for line in printed.splitlines()) == 3
    assert [row["step"] for row in rows(tmp_path)] == [1]
    failed = [text.split()[1] for text in caplog.messages if text.startswith("sink ")]
    assert sorted(failed) == ["jsonl", "prometheus", "wandb"]


@pytest.mark.slow
def test_a_killed_run_leaves_readable_files(tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(shipped("single", run, "monitor.every=1", "train.steps=100000").to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "distnorm", "train", str(config)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until = time.monotonic() + 60
    while len(lines(run / "metrics.jsonl")) < 5 and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [row["step"] for row in rows(run)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 5
    looked = [row["step"] for row in lines(run / "layers.jsonl")]
    assert sorted(set(looked)) in (steps, steps[:-1])
