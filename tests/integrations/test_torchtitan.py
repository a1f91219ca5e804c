"""torchtitan's clip function and Trainer with distnorm, against one process in fp64."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torchtitan.components.optimizer.utils import init_optim_state
from torchtitan.distributed import utils as dist_utils

import distnorm
from distnorm import ConfigError, testing
from distnorm.integrations.torchtitan import attach_trainer, clip_grad_norm_
from distnorm.testing import dense_norm
from tests.integrations.tiny import MAX_NORM, STEPS, check_trained, on_its_ranks, oracle, samples
from tests.integrations.titan import Tiny

testing.preload("torchtitan.trainer", "tests.integrations.titan")

WORLDS = {"one": 1, "fsdp2": 2, "tp": 2, "fsdp2xtp": 4, "pp": 2}
SKIP = {"clip": {"nonfinite": "skip"}}
HISTORY = {"clip": {"policy": {"name": "percentile", "window": 8}}, "monitor": {"every": 2}}


def test_the_signature_is_torchtitans() -> None:
    theirs, ours = inspect.signature(dist_utils.clip_grad_norm_), inspect.signature(clip_grad_norm_)
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]


def call_function(kind: str) -> tuple[float, dict[str, Tensor]]:
    trainer = Tiny(kind)
    x, y = next(trainer.batches(1))
    trainer.forward_backward_step(input_dict=x, labels=y)
    parameters = (p for part in trainer.model_parts for p in part.parameters())
    norm = clip_grad_norm_(parameters, MAX_NORM, foreach=True, pp_mesh=trainer.pp_mesh)
    named = [pair for part in trainer.model_parts for pair in part.named_parameters()]
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    return norm.item(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def dense_gradients() -> dict[str, Tensor]:
    trainer = Tiny("one")
    net, (x, y) = trainer.net.double(), samples(1)
    (net(x.double()) - y.double()).square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def clip_experts() -> tuple[float, float, list[Tensor]]:
    torch.manual_seed(0)
    whole = [torch.randn(4, 3), torch.randn(8, 2), torch.randn(5)]
    sparse = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    dense = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    expert = distribute_tensor(whole[0], sparse, [Shard(1), Shard(0)], src_data_rank=None)
    other = distribute_tensor(whole[1], dense, [Shard(0)], src_data_rank=None)
    parameters = [torch.nn.Parameter(each) for each in (expert, other)]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    theirs = dist_utils.clip_grad_norm_(parameters, 1e9, ep_enabled=True)
    parameters.append(torch.nn.Parameter(whole[2]))  # a plain tensor, which torchtitan's own asserts away
    parameters[2].grad = whole[2].clone()
    ours = clip_grad_norm_(parameters, 1e9, ep_enabled=True)
    return theirs.item(), ours.item(), whole


# ---- the Trainer


def train(
    kind: str, accumulation: int, steps: int = STEPS
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    trainer = Tiny(kind, accumulation)
    attach_trainer(trainer)
    weights = trainer.trained(steps)
    return trainer.metrics_processor.rows, weights


def test_another_limit_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"training\.max_norm: .* clip\.max_norm .* found 1\.0"):
        attach_trainer(Tiny("one", max_norm=1.0), {"clip": {"max_norm": 2.0}})


def test_the_steps_limit_cannot_change_behind_the_hook() -> None:
    trainer = Tiny("one")
    attach_trainer(trainer)
    trainer.config.training.max_norm = 3.0
    theirs = dist_utils.clip_grad_norm_
    with pytest.raises(ConfigError, match=r"training\.max_norm"):
        trainer.trained(1)
    assert dist_utils.clip_grad_norm_ is theirs


def train_skipping(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, float]]]:
    before, after = Tiny(kind), Tiny(kind, bad_step=2)
    for trainer in (before, after):
        attach_trainer(trainer, SKIP)
    return before.trained(1), after.trained(2), after.metrics_processor.rows


def train_resumed(kind: str, folder: str) -> tuple[Any, Any, Any]:
    straight = Tiny(kind)
    expected = attach_trainer(straight, HISTORY).clipper
    straight.trained(6)
    saving = Tiny(kind)
    attach_trainer(saving, HISTORY)
    saving.trained(4)
    dcp.save(saving.checkpointer.states, checkpoint_id=folder)
    loading = Tiny(kind)
    found = attach_trainer(loading, HISTORY).clipper
    empty = found.state_dict()
    dcp.load(loading.checkpointer.states, checkpoint_id=folder)
    before = found.state_dict()
    # The rest of the straight run's steps, with its weights: the history alone is at stake here.
    loading.net.load_state_dict(saving.net.state_dict())
    loading.optimizers.optimizers[0].load_state_dict(saving.optimizers.optimizers[0].state_dict())
    batches = loading.batches(6)
    for _ in range(4 * loading.gradient_accumulation_steps):
        next(batches)
    for _ in range(2):
        loading.train_step(batches)
    return (empty, before), expected.state_dict(), found.state_dict()


def make_states(attached: bool) -> int:
    trainer = Tiny("fsdp2")
    handle = distnorm.attach(trainer.model_parts, trainer.optimizers) if attached else None
    clipper = attach_trainer(trainer).clipper if handle is None else handle.clipper
    for optimizer in trainer.optimizers:
        init_optim_state(optimizer)
    assert dist.is_initialized()
    return int(clipper.state_dict()["steps"])


def everything(kind: str, folder: str) -> dict[str, Any]:
    """All that is asked of a kind: starting ranks costs more than their steps."""
    found: dict[str, Any] = {"function": call_function(kind)}
    if kind == "pp":
        return {**found, "trained": [train(kind, 1, 1)]}
    found["trained"] = [train(kind, accumulation) for accumulation in (1, 2)]
    found["skipping"] = train_skipping(kind)
    if kind != "one":
        found["resumed"] = train_resumed(kind, folder)
    if kind == "fsdp2":
        found["counted"] = [make_states(attached) for attached in (True, False)]
    if kind == "fsdp2xtp":
        found["experts"] = clip_experts()
    return found


@pytest.mark.parametrize("kind", WORLDS)
def test_every_topology(ranks: Any, kind: str, tmp_path: Path) -> None:
    """The function and the Trainer against one process, with one micro-batch a step and with two; and skip
    and resume, bit for bit."""
    runs = on_its_ranks(ranks, WORLDS, everything, kind, str(tmp_path))
    for found in runs:
        check_function(*found["function"])
        if kind == "pp":
            check_stages(*found["trained"][0])
            continue
        for rows, weights in found["trained"]:
            check_trained(rows, weights, oracle())
        check_skipped(*found["skipping"])
        if kind != "one":
            check_resumed(*found["resumed"])
        if kind == "fsdp2":
            assert found["counted"] == [0, 0]
        if kind == "fsdp2xtp":
            check_experts(*found["experts"])
    assert all(found["trained"][0][0] == runs[0]["trained"][0][0] for found in runs)


def check_function(norm: float, clipped: dict[str, Tensor]) -> None:
    norms, dense = oracle()[0], dense_gradients()
    assert norm == pytest.approx(norms[0], rel=1e-5)
    for name, gradient in clipped.items():
        expected = dense[name] * (MAX_NORM / (norms[0] + 1e-6))
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


def check_stages(rows: list[dict[str, float]], _: dict[str, Tensor]) -> None:
    """Pipeline stages have one norm."""
    assert rows[0]["grad_norm"] == pytest.approx(oracle()[0][0], rel=1e-5)


def check_skipped(before: dict[str, Tensor], after: dict[str, Tensor], rows: list[dict[str, float]]) -> None:
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["skipped"] for row in rows] == [0, 1]


def check_resumed(before: Any, straight: Any, resumed: Any) -> None:
    empty, loaded = before
    assert empty != loaded
    assert resumed == straight


def check_experts(theirs: float, ours: float, whole: list[Tensor]) -> None:
    """Experts are on a mesh of their own."""
    named = {str(i): each for i, each in enumerate(whole)}
    assert theirs == pytest.approx(dense_norm({"0": whole[0], "1": whole[1]}), rel=1e-6)
    assert ours == pytest.approx(dense_norm(named), rel=1e-6)


def test_nothing_is_logged_between_logged_steps() -> None:
    trainer = Tiny("one", freq=2)
    attach_trainer(trainer, {"monitor": {"every": 2}})
    trainer.trained(5)
    rows = trainer.metrics_processor.rows
    assert len(rows) == 2
    for row in rows:
        layers = [value for name, value in row.items() if name.startswith("grad_norm/")]
        assert sum(value**2 for value in layers) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-5)
