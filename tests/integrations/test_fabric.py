"""Lightning's Fabric with `clip_with`, against one process in fp64."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from distnorm import ConfigError, DistnormError, testing
from distnorm.integrations.fabric import FabricClipper, clip_with
from distnorm.testing import dense_norm
from tests.integrations.light import elastic, fsdp1_on_cpu, whole
from tests.integrations.tiny import (
    BATCH,
    MAX_NORM,
    MOMENTUM,
    RATE,
    STEPS,
    Net,
    check_weights,
    on_its_ranks,
    oracle,
    same,
    samples,
)

testing.preload("lightning.fabric", "tests.integrations.light", "tests.integrations.test_fabric")

WORLDS = {"one": 1, "ddp": 2, "fsdp1": 2, "tp": 2, "fsdp2xtp": 4}
SKIP = {"clip": {"nonfinite": "skip"}}
HISTORY = {"clip": {"policy": {"name": "zclip", "warmup": 2}}}


def cut(net: Any, mesh: Any) -> Any:
    if mesh["tensor_parallel"].size() > 1:
        parallelize_module(net, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if mesh["data_parallel"].size() > 1:
        fully_shard(net, mesh=mesh["data_parallel"])
    return net


def fabric_of(kind: str, **settings: Any) -> Any:
    warnings.simplefilter("ignore")
    if kind == "one":
        return lightning.Fabric(accelerator="cpu", devices=1, **settings)
    elastic()
    gloo = {"process_group_backend": "gloo"}
    if kind == "ddp":
        strategy: Any = DDPStrategy(**gloo)
    elif kind == "fsdp1":
        strategy = OnCpu(**gloo)
    else:
        dp, tp = (2, 2) if kind == "fsdp2xtp" else (1, 2)
        strategy = ModelParallelStrategy(cut, dp, tp, **gloo)
    fabric = lightning.Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, **settings)
    fabric.launch()
    return fabric


class OnCpu(FSDPStrategy):
    """Lightning asks for a GPU where the class itself is given, and FSDP1 does where no device is."""

    def setup_module(self, module: Any) -> Any:
        with fsdp1_on_cpu():
            return super().setup_module(module)


class Run:
    """A loop as Fabric's users write it."""

    def __init__(self, kind: str, config: Any = None, accumulation: int = 1, **settings: Any) -> None:
        self.kind, self.accumulation = kind, accumulation
        self.fabric = fabric_of(kind, **settings)
        self.clipping = clip_with(self.fabric, config)
        module = self.fabric.setup_module(Net())
        self.model = module
        self.optimizer = self.fabric.setup_optimizers(torch.optim.SGD(module.parameters(), RATE, MOMENTUM))
        self.norms: list[float] = []

    def step(self, k: int, max_norm: float | None = MAX_NORM, bad: bool = False) -> None:
        tensor_parallel = 2 if "tp" in self.kind else 1
        rank, world = (0, 1) if self.kind == "one" else (dist.get_rank(), dist.get_world_size())
        rank, world = rank // tensor_parallel, world // tensor_parallel
        x, y = (each[k * BATCH : (k + 1) * BATCH][rank::world] for each in samples())
        self.optimizer.zero_grad()
        for part in range(self.accumulation):
            last = part == self.accumulation - 1
            with self.fabric.no_backward_sync(self.model, enabled=not last and self.kind == "ddp"):
                some = slice(part, None, self.accumulation)
                loss = (self.model(x[some]) - y[some]).square().mean() / self.accumulation
                self.fabric.backward(loss * (torch.inf if bad and rank == 0 else 1.0))
        given = {} if max_norm is None else {"max_norm": max_norm}
        norm = self.fabric.clip_gradients(self.model, self.optimizer, **given)
        self.norms.append(norm.item())
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return whole(self.model._forward_module)


def train(kind: str, accumulation: int) -> tuple[list[float], dict[str, Tensor]]:
    run = Run(kind, None, accumulation)
    for k in range(STEPS):
        run.step(k)
    return run.norms, run.weights()


def skip(kind: str, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    run = Run(kind, SKIP, **settings)
    run.step(0)
    before = run.weights()
    run.step(1, bad=True)
    assert run.clipping.last is not None
    return before, run.weights(), bool(run.clipping.last.skipped)


def resume(kind: str, folder: str) -> list[tuple[dict[str, Any], list[float], dict[str, Tensor]]]:
    """Of a run whose third step is made from a checkpoint of the second, and of one that has made all."""
    runs = [Run(kind, HISTORY) for _ in range(2)]
    straight, resumed = runs
    states = [{"model": r.model, "optimizer": r.optimizer, "distnorm": r.clipping} for r in runs]
    straight.step(0)
    straight.step(1)
    straight.fabric.save(f"{folder}/saved", states[0])
    resumed.fabric.load(f"{folder}/saved", states[1])
    assert states[1]["distnorm"] is resumed.clipping
    for run in runs:
        run.step(2)
    return [(run.clipping.state_dict(), run.norms[-1:], run.weights()) for run in runs]


def scaled() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**10))]}


def clip_scaled() -> tuple[float, float]:
    run = Run("ddp", SKIP, **scaled())
    run.step(0)
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    return run.norms[0], dense_norm(gradients)


def everything(kind: str, folder: str) -> dict[str, Any]:
    """All that is asked of a kind: starting ranks costs more than their steps."""
    found: dict[str, Any] = {"trained": [train(kind, accumulation) for accumulation in (1, 2)]}
    found["skips"] = [skip(kind)]
    found["resumed"] = resume(kind, folder)
    if kind == "ddp":
        found["skips"].append(skip(kind, **scaled()))
        found["scaled"] = clip_scaled()
    return found


@pytest.mark.parametrize("kind", WORLDS)
def test_norm_update_skip_and_resume(ranks: Any, kind: str, tmp_path: Path) -> None:
    """Against one process, with one micro-batch a step and with two; and bit for bit."""
    for found in on_its_ranks(ranks, WORLDS, everything, kind, str(tmp_path)):
        for norms, weights in found["trained"]:
            check_trained(norms, weights)
        for before, after, skipped in found["skips"]:
            assert skipped and same(before, after)
        straight, resumed = found["resumed"]
        assert straight[0]["steps"] == 3
        assert straight[:2] == resumed[:2]
        assert same(straight[2], resumed[2])
        if kind == "ddp":
            check_scaled(*found["scaled"])


def check_trained(norms: list[float], weights: dict[str, Tensor]) -> None:
    assert norms == pytest.approx(oracle()[0], rel=1e-5)
    check_weights(weights, oracle())


def check_scaled(norm: float, after: float) -> None:
    """Under a loss scaler the norm is of unscaled gradients."""
    assert norm == pytest.approx(oracle()[0][0], rel=0.02)  # fp16's 10 bits, through a net of two layers
    assert after == pytest.approx(MAX_NORM, rel=1e-4)


def test_arguments_that_contradict_the_configuration_are_refused() -> None:
    run = Run("one", {"clip": {"max_norm": MAX_NORM}})
    with pytest.raises(ConfigError, match=r"max_norm: .* found 2\.0"):
        run.step(0, max_norm=2.0)
    with pytest.raises(ConfigError, match=r"clip_val: .* clip\.policy"):
        run.fabric.clip_gradients(run.model, run.optimizer, clip_val=1.0)
    with pytest.raises(ConfigError, match=r"norm_type: .* norm\.type .* found inf"):
        run.fabric.clip_gradients(run.model, run.optimizer, max_norm=MAX_NORM, norm_type="inf")
    run.step(0, max_norm=None)
    with pytest.raises(DistnormError, match="expected the module of the first clip"):
        run.fabric.clip_gradients(Net(), run.optimizer)


def test_a_limit_that_changes_later_is_refused() -> None:
    run = Run("one")
    run.step(0)
    with pytest.raises(ConfigError, match="max_norm: "):
        run.step(1, max_norm=1.0)


def test_a_deepspeed_engine_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distnorm.integrations.fabric.is_engine", lambda module: True)
    clipping = FabricClipper(SimpleNamespace())
    with pytest.raises(DistnormError, match=r"distnorm\.attach\(engine\)"):
        clipping.clip(Net(), None, max_norm=1.0)
