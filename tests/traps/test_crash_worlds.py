"""Groups that come and go, caches and devices that differ by rank, modes, and copies."""

from __future__ import annotations

import copy
import datetime
import gc
import io
import math
import pickle
import tempfile
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.plan.collectives import Ranks
from tests.refusals import TIMEOUT, heard, rank, with_gradient, with_ones


def agreed_devices() -> tuple[list[str], list[str]]:
    both = mock.patch.object(dist, "get_backend_config", lambda group=None: "cpu:gloo,cuda:nccl")
    device = mock.patch.object(torch.accelerator, "current_device_index", lambda: 0)
    with both, device, mock.patch.object(torch.cuda, "is_available", lambda: True):
        group = Ranks()
        mine = [torch.device("cuda", 0)] if rank() == 0 else []
        found = []
        for devices in (mine, []):  # the second plan has no gradients anywhere
            group.agree_on_device(devices)
            found.append([group.reduce_device(torch.device(kind)).type for kind in ("cpu", "cuda")])
        return found[0], found[1]


def test_a_rank_without_gradients_reduces_where_the_others_do(ranks):
    assert ranks(3, agreed_devices, timeout=TIMEOUT) == [(["cuda", "cuda"], ["cuda", "cuda"])] * 3


def other_calls_on_some_ranks() -> list[float]:
    alone = [dist.new_group([0]), dist.new_group([1])][rank()]
    shared = with_gradient(3.0, 4.0)
    norms = [float(distnorm.clip_grad_norm_([("w", shared)], math.inf))]
    for size in range(40 * rank()):  # more than a group's cache holds
        distnorm.clip_grad_norm_([with_ones(nn.Parameter(torch.ones(size + 1)))], math.inf, group=alone)
    return [*norms, float(distnorm.clip_grad_norm_([("w", shared)], math.inf))]


def test_calls_that_only_some_ranks_make_evict_nothing_of_the_others(ranks):
    assert ranks(2, other_calls_on_some_ranks, timeout=TIMEOUT) == [[5.0, 5.0]] * 2


def late_partials() -> list[Any]:
    """Two meshes over the same ranks; rank 3 holds neither parameter, and b is partial from step 2 on."""
    meshes = [dist.DeviceMesh("cpu", [0, 1, 2]) for _ in range(2)]
    named = []
    if rank() < 3:
        for name, mesh in zip("ab", meshes, strict=True):
            named.append((name, nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))))
    clipper, norms = distnorm.GradClipper(named), []
    for step in range(4):
        for (_, parameter), mesh, first in zip(named, meshes, (1, 2), strict=False):
            parameter.grad = None
            if step >= first and (step != 3 or rank() == 0):
                parameter.grad = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
        norms.append(heard(clipper.clip)[1])
    return norms


def test_partial_gradients_that_come_late_on_two_meshes_and_not_on_every_rank(ranks):
    """In the last step rank 0 alone holds a summand."""
    expected = [0.0, math.sqrt(18), math.sqrt(36), 2.0]
    for norms in ranks(4, late_partials, timeout=TIMEOUT):
        assert norms == pytest.approx(expected, rel=1.2e-7)


def a_new_world() -> list[Any]:
    parameter = with_gradient(3.0, 4.0)
    clipper = distnorm.GradClipper(
        [("w", parameter)], {"clip": {"policy": {"name": "zclip"}, "max_norm": 9.0}}
    )
    clipper.clip()
    group = dist.group.WORLD
    dist.barrier()
    dist.destroy_process_group()
    said = [heard(clipper.clip), heard(clipper.measure), heard(lambda: Ranks(group))]
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=0, world_size=1)
        said.append(heard(clipper.clip))
        clipper.rebind()
        clipper.clip()
        function = float(distnorm.clip_grad_norm_([("w", parameter)], math.inf))
        return [[kind for kind, _ in said], said[-1][1], clipper.state_dict()["policy"]["steps"], function]


def test_a_destroyed_group_and_a_new_one(ranks):
    for kinds, message, steps, norm in ranks(2, a_new_world, timeout=TIMEOUT):
        assert kinds == ["DistnormError"] * 4
        assert "call clipper.rebind(group)" in message
        assert (steps, norm) == (2, 5.0)


def test_a_world_made_after_the_clipper(tmp_path):
    clipper = distnorm.GradClipper([("w", with_gradient(3.0, 4.0))])
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1, timeout=timeout)
    try:
        assert "clipper.rebind" in heard(clipper.clip)[1]
        clipper.rebind()
        assert float(clipper.clip().total_norm) == 5.0
    finally:
        dist.destroy_process_group()


def copied_under_overlap() -> list[bool]:
    model = DistributedDataParallel(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = distnorm.attach(model, optimizer, {"clip": {"max_norm": 1.0, "overlap": True}})
    torch.save(model, io.BytesIO())
    twin = copy.deepcopy(model)
    before = twin.module.weight.clone()
    twin(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    untouched = handle.last is None
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return [untouched, not torch.equal(before, twin.module.weight), handle.last is not None]


def test_a_copy_of_a_ddp_model_under_overlap_trains(ranks):
    assert ranks(2, copied_under_overlap, timeout=TIMEOUT) == [[True] * 3] * 2


@pytest.mark.parametrize("do", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_a_copy_of_a_clipper_is_refused(do):
    with pytest.raises(distnorm.DistnormError, match="state_dict"):
        do(distnorm.GradClipper([with_gradient(1.0)]))


@pytest.mark.parametrize(
    "config",
    [
        {"clip": {"overlap": True}},
        {"clip": {"policy": {"name": "agc"}}},
        {"clip": {"groups": [{"name": "g", "params": ["weight"], "max_norm": 1.0}]}},
        {"monitor": {"every": 1}},
    ],
    ids=lambda config: str(next(iter(next(iter(config.values()))))),
)
def test_another_default_device(config):
    net, x = nn.Linear(3, 2), torch.ones(1, 3)
    with torch.device("meta"):
        clipper = distnorm.GradClipper(net, config)
        for _ in range(3):
            net.zero_grad()
            net(x).sum().backward()
            assert float(clipper.clip().total_norm) == pytest.approx(math.sqrt(8), rel=1.2e-7)


@pytest.mark.parametrize("through", ["function", "clipper", "overlap", "attach", "verify"])
def test_parameters_can_be_swapped_afterwards(through):
    net, x = nn.Linear(3, 2), torch.ones(1, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    config = {"clip": {"max_norm": 1e9, "overlap": through == "overlap"}}
    held: Any = distnorm.GradClipper(net, config) if through in ("clipper", "overlap") else None
    held = distnorm.attach(net, optimizer, config) if through == "attach" else held

    def norm() -> Tensor:
        net.zero_grad()
        net(x.to(net.weight.dtype)).sum().backward()
        optimizer.step()
        if through == "verify":
            distnorm.verify(net)
        if held is None:
            return distnorm.clip_grad_norm_(net, 1e9)
        return (held.last if through == "attach" else held.clip()).total_norm

    norm()
    with mock.patch.object(torch.__future__, "get_swap_module_params_on_conversion", lambda: True):
        for dtype in (torch.bfloat16, torch.float32):
            net.to(dtype)
            net.load_state_dict({name: value * 2 for name, value in net.state_dict().items()})
            assert float(norm()) == pytest.approx(math.sqrt(8), rel=1.2e-7)


def group_that_ends() -> bool:
    """Whether a destroyed group is gone, though plans for it were remembered."""
    group: Any = dist.new_group([0, 1])
    weight = with_gradient(3.0, 4.0)
    clipping = distnorm.GradClipper([("w", weight)], {"clip": {"max_norm": 9.0}}, group=group)
    norms = [
        float(clipping.clip().total_norm),
        float(distnorm.clip_grad_norm_([("w", weight)], 9.0, group=group)),
        float(distnorm.get_total_norm([weight.grad], group=group)),
    ]
    assert norms == pytest.approx([5.0] * 3)
    reference = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert heard(clipping.clip)[0] == "DistnormError"
    return reference() is None


def test_a_destroyed_group_is_not_kept(ranks):
    assert ranks(2, group_that_ends, timeout=TIMEOUT) == [True, True]
