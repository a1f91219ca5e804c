"""The loop's parts: data, metrics, the optimizer's step under `nonfinite: skip`, and stopping by a signal."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distnorm import Config, NonFiniteGradientError
from distnorm.trainer.data import Text
from distnorm.trainer.run import build
from distnorm.trainer.torch_trainer import TorchTrainer
from distnorm.trainer.world import open_world

from .tiny import rows, shipped, train


def test_slices_of_a_batch_are_the_batch(tmp_path: Path) -> None:
    text = Text(shipped("single", tmp_path))
    whole = text.batch(3)
    for parts in (2, 8):
        slices = [text.batch(3, part, parts) for part in range(parts)]
        for kind in (0, 1):
            assert torch.equal(torch.cat([part[kind] for part in slices]), whole[kind])
    inputs, targets = whole
    assert inputs.shape == targets.shape == (16, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_batches_depend_on_seed_and_step(tmp_path: Path) -> None:
    text = Text(shipped("single", tmp_path))
    other = Text(shipped("single", tmp_path, "train.seed=1"))
    assert torch.equal(text.batch(1)[0], Text(shipped("single", tmp_path)).batch(1)[0])
    assert not torch.equal(text.batch(1)[0], text.batch(2)[0])
    assert not torch.equal(text.batch(1)[0], other.batch(1)[0])


def test_folder_of_text(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("b" * 20)
    (tmp_path / "a.txt").write_text("a" * 20)
    (tmp_path / ".hidden").write_text("c" * 20)
    text = Text(shipped("single", tmp_path, f"train.data.path={tmp_path}"))
    assert bytes(text.content.tolist()) == b"a" * 20 + b"b" * 20


@pytest.mark.parametrize(("policy", "moves"), [("skip", False), ("propagate", True)])
def test_skip_leaves_the_weights(policy: str, moves: bool, tmp_path: Path) -> None:
    config = shipped("single", tmp_path, f"clip.nonfinite={policy}")
    with open_world(config) as world:
        trainer = build(config, world)
        assert isinstance(trainer, TorchTrainer)
        trainer.compute_gradient(1)
        parameters = trainer.engine.named_parameters()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        gradient = parameters["tok.weight"].grad
        assert gradient is not None
        gradient[0, 0] = math.nan
        assert not trainer.update().is_finite
    moved = [name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])]
    assert bool(moved) == moves


def test_a_run_goes_on_though_it_is_watched_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = "train.checkpoint.every=2"
    code, printed = train(shipped("single", tmp_path, checkpoints))
    watched = ("monitor={clip_rate_window: 2, console: rich, sinks: {tensorboard: true}}", "train.steps=4")
    resumed, _ = train(shipped("single", tmp_path, checkpoints, *watched))
    assert (code, resumed) == (0, 0)
    keys = "step loss grad_norm clip_coef clipped_norm threshold clipped finite skipped"
    written = rows(tmp_path)
    assert [list(row) for row in written] == [
        [*keys.split(), "tokens_per_second", "learning_rate", "clip_rate", "noise_scale", "time"]
    ] * 4
    assert [row["step"] for row in written] == [1, 2, 3, 4]
    assert [row["clip_rate"] for row in written] == [1.0, 1.0, 1.0, 1.0]
    assert printed.splitlines()[1].startswith(f"step 1/3  loss {written[0]['loss']:.4f}  grad norm ")
    assert len(printed.splitlines()) == 5
    assert list((tmp_path / "tensorboard").iterdir()) != []
    assert [record for record in caplog.records if record.name == "distnorm"] == []


def test_raise_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteGradientError):
        train(shipped("single", tmp_path, "train.optimizer.lr=1e300", "train.steps=5"))
    assert [row["step"] for row in rows(tmp_path)] == [1]


def train_until_a_signal(config: Config, number: int, signalled: int) -> tuple[int, str]:
    """One rank gets the signal, once two steps are written."""
    metrics = Path(config.train.output_dir, "metrics.jsonl")

    def send() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    if dist.get_rank() == signalled:
        threading.Thread(target=send, daemon=True).start()
    before = signal.getsignal(number)
    outcome = train(config)
    assert signal.getsignal(number) is before
    return outcome


@pytest.mark.parametrize(("number", "signalled"), [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_signal_on_one_rank_stops_all_after_the_same_step(
    number: int, signalled: int, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    config = shipped("tp2", tmp_path, "train.steps=10000", "train.checkpoint.every=1000")
    results = ranks(2, train_until_a_signal, config, number, signalled)
    assert [code for code, _ in results] == [130, 130]
    written = rows(tmp_path)
    assert [row["step"] for row in written] == list(range(1, len(written) + 1))
    assert 2 <= len(written) < 10000
    last = results[0][1].splitlines()[-1]
    assert last.startswith(f"stopped by a signal after step {len(written)} of 10000; its checkpoint is saved")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["alerts.jsonl", "checkpoints", "config.yaml", "metrics.jsonl", "starts.jsonl"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{len(written)}"]
