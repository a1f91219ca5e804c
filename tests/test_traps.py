"""Where this field's norms come out wrong, a test each. Where torch's own is, the test shows that first."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distnorm
from tests import oracle
from tests.refusals import TIMEOUT, clipper, distributed, rank, with_gradient, with_ones


def local_squares(parameters: list[nn.Parameter]) -> torch.Tensor:
    """What a hand-written norm adds up over all ranks."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.stack(
        [(g.to_local() if isinstance(g, DTensor) else g).double().square().sum() for g in grads]
    ).sum()


def added_over_ranks(parameters: list[nn.Parameter]) -> float:
    squares = local_squares(parameters)
    dist.all_reduce(squares)
    return squares.sqrt().item()


# ---- wrong numbers: replicas


def hsdp() -> tuple[float, float]:
    model = nn.Linear(6, 6, bias=False)
    nn.init.ones_(model.weight)
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard")))
    model(torch.ones(1, 6)).sum().backward()
    return added_over_ranks(list(model.parameters())), clipper(model).measure().total_norm.item()


def test_hsdp_replicas_count_once(ranks):
    for naive, found in ranks(4, hsdp, timeout=TIMEOUT):
        assert naive == pytest.approx(6 * math.sqrt(2))
        assert found == 6.0


def tensor_parallel_with_a_plain_layer_norm() -> tuple[float, str, float]:
    mesh = init_device_mesh("cpu", (4,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8))
    parallelize_module(model, mesh, {"1": ColwiseParallel(), "2": RowwiseParallel()})
    model(torch.ones(2, 8)).sum().backward()
    for p in model.parameters():
        with_ones(p)
    of_torch = torch_raises(list(model.parameters()))
    return added_over_ranks(list(model.parameters())), of_torch, clipper(model).measure().total_norm.item()


def torch_raises(parameters: list[nn.Parameter]) -> str:
    try:
        torch.nn.utils.clip_grad_norm_(parameters, math.inf)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_tensor_parallel_layer_norm_counts_once(ranks):
    """NeMo-RL #3788. 8 + 8 of LayerNorm, 8 of the second bias: on each of 4 ranks."""
    elements = 16 + (128 + 16) + 128 + 8
    for naive, of_torch, found in ranks(4, tensor_parallel_with_a_plain_layer_norm, timeout=TIMEOUT):
        assert naive == pytest.approx(math.sqrt(elements + 3 * 24))
        assert "mixed torch.Tensor and DTensor" in of_torch
        assert found == math.sqrt(elements)


def tied_on_two_stages() -> tuple[float, float, float]:
    """The embedding of the first stage is the head of the last; both have the summed gradient."""
    name = {0: "tok.weight", 3: "head.weight"}.get(rank(), f"layer{rank()}.weight")
    weight = nn.Parameter(torch.ones(5, 2))
    weight.grad = torch.full((5, 2), 10.0 if rank() in (0, 3) else 0.0)
    untied = clipper([(name, weight)]).measure().total_norm.item()
    tied = clipper([(name, weight)], tied=[("tok.weight", "head.weight")]).measure().total_norm.item()
    return added_over_ranks([weight]), untied, tied


def test_a_tied_embedding_on_two_stages_counts_once(ranks):
    """Megatron-LM #7227: sqrt(2) high."""
    for naive, untied, tied in ranks(4, tied_on_two_stages, timeout=TIMEOUT):
        assert naive == untied == pytest.approx(math.sqrt(2) * tied)
        assert tied == math.sqrt(1000)


def ddp() -> tuple[float, float, float, float]:
    torch.manual_seed(0)
    dense = nn.Linear(3, 2).double()
    model = nn.Linear(3, 2).double()
    model.load_state_dict(dense.state_dict())
    wrapped = nn.parallel.DistributedDataParallel(model)
    x = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    dense(x).square().mean().backward()
    wrapped(x[rank() :: 2]).square().mean().backward()
    exact = oracle.dense_of([p.grad for p in dense.parameters()])
    of_torch = torch.nn.utils.get_total_norm([p.grad for p in wrapped.parameters()]).item()
    assert torch.allclose(torch.tensor(of_torch), torch.tensor(exact))
    clipping = clipper(wrapped)
    return exact, added_over_ranks(list(model.parameters())), clipping.measure().total_norm.item(), rank()


def test_ddp_is_not_summed_again(ranks):
    """twinkle #290."""
    for exact, naive, found, _ in ranks(2, ddp, timeout=TIMEOUT):
        assert naive == pytest.approx(math.sqrt(2) * exact)
        assert found == pytest.approx(exact, rel=1e-12)


# ---- wrong numbers: what is not complete yet


def partial_logged_as_final() -> tuple[float, float]:
    """torchtitan #766, pytorch #170862: the norm of sharded gradients is itself a partial DTensor."""
    parameter = distributed((4,), [Shard(0)], 8, 2)
    total = torch.linalg.vector_norm(parameter.grad)
    assert isinstance(total, DTensor)
    assert total.placements[0].is_partial()
    return total.to_local().item(), distnorm.get_total_norm([parameter.grad]).item()


def test_a_norm_is_never_a_partial_dtensor(ranks):
    for of_torch, found in ranks(4, partial_logged_as_final, timeout=TIMEOUT):
        assert (of_torch, found) == (2.0, 4.0)


def partial_measured_as_complete() -> tuple[float, float]:
    parameter = distributed((2,), [Replicate()], 4)
    local = torch.full((4,), float(rank() + 1))
    parameter.grad = DTensor.from_local(local, parameter.device_mesh, [Partial()], run_check=False)
    return local.square().sum().sqrt().item(), clipper(
        [("norm.weight", parameter)]
    ).measure().total_norm.item()


def test_a_partial_gradient_is_not_measured_as_if_complete(ranks):
    """Pure tensor parallel with SequenceParallel; with the real thing in test_partials.py."""
    assert [found for _, found in ranks(2, partial_measured_as_complete, timeout=TIMEOUT)] == [6.0, 6.0]


# ---- wrong numbers: meshes


def experts_on_a_mesh_of_their_own() -> dict[str, Any]:
    """Dense weights over all four ranks; two groups of experts, each sharded over two of them."""
    everybody = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "ep_shard"))
    dense = with_ones(nn.Parameter(distribute_tensor(torch.ones(8), everybody, [Shard(0)])))
    expert = with_ones(nn.Parameter(distribute_tensor(torch.ones(6, 2), grid["ep_shard"], [Shard(0)])))
    experts = with_ones(nn.Parameter(distribute_tensor(torch.ones(4, 3), grid, [Shard(0), Replicate()])))
    named = [
        ("dense", dense),
        (f"experts.{grid.get_local_rank('ep')}.weight", expert),
        ("experts.all", experts),
    ]
    return {
        "torch": torch_raises([p for _, p in named]),
        "naive": added_over_ranks([p for _, p in named]),
        "sum of norms": 8**0.5 + 12**0.5 * 2 + 12**0.5,
        "found": clipper(named).measure().total_norm.item(),
        "function": distnorm.clip_grad_norm_(named, math.inf).item(),
    }


def test_experts_on_another_mesh_are_neither_missed_nor_counted_twice(ranks):
    """Automodel #3816, Megatron-LM #6470/#6489; norms are not added where squares should be (ColossalAI)."""
    for seen in ranks(4, experts_on_a_mesh_of_their_own, timeout=TIMEOUT):
        assert re.search(
            "must have the same mesh|does not support cross-mesh|Sharding propagation failed", seen["torch"]
        )
        assert seen["found"] == math.sqrt(8 + 2 * 12 + 12) != pytest.approx(seen["sum of norms"])
        assert seen["naive"] != pytest.approx(seen["found"])
        assert seen["function"] == pytest.approx(seen["found"], rel=1.2e-7)


def strided_shard(uneven: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Linear(3, 10 if uneven else 8, bias=False)
    nn.init.ones_(model.weight)
    parallelize_module(model, mesh["tp"], ColwiseParallel())
    fully_shard(model, mesh=mesh["dp"])
    model(torch.ones(1, 3)).sum().backward()
    strided, shard = model.weight.placements
    return {
        "placements": [type(strided).__name__, type(shard).__name__],
        "is_shard": strided.is_shard() or isinstance(strided, Shard),
        "found": clipper(model).measure().total_norm.item(),
    }


@pytest.mark.parametrize("uneven", [False, True])
def test_a_strided_shard_is_a_shard(ranks, uneven):
    """FSDP2 over tensor parallel on one dim: torch 2.13 answers False to is_shard()."""
    for seen in ranks(4, strided_shard, uneven, timeout=TIMEOUT):
        assert seen["placements"] == ["_StridedShard", "Shard"]
        if torch.__version__.startswith("2.13"):
            assert not seen["is_shard"]
        assert seen["found"] == math.sqrt(30 if uneven else 24)


# ---- wrong numbers: precision and range


@pytest.mark.parametrize(("elements", "error"), [(1_000_000, 1e-6), (10_000_000, 1e-4)])
def test_fp32_norms_of_many_elements(elements, error):
    gradient = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    exact = oracle.dense_of([gradient])
    of_torch = torch.nn.utils.get_total_norm([gradient]).item()
    assert oracle.relative_error(of_torch, exact) > error
    assert oracle.ulps(distnorm.get_total_norm([gradient]).item(), exact) <= 1


def test_bf16_norms():
    gradients = [torch.randn(1000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(8)]
    exact = oracle.dense_of(gradients)
    of_torch = torch.nn.utils.get_total_norm(gradients)
    assert of_torch.dtype is torch.bfloat16
    assert oracle.relative_error(of_torch.item(), exact) > 1e-4
    found = distnorm.get_total_norm(gradients)
    assert found.dtype is torch.float32
    assert oracle.ulps(found.item(), exact) <= 1


@pytest.mark.parametrize(
    ("value", "elements", "dtype"),
    [(100.0, 1_000_000, torch.float16), (1e20, 4, torch.float32), (1e-25, 4, torch.float32)],
)
def test_norms_that_over_and_underflow(value, elements, dtype):
    def gradient() -> nn.Parameter:
        result = nn.Parameter(torch.zeros(elements, dtype=dtype))
        result.grad = torch.full((elements,), value, dtype=dtype)
        return result

    theirs, ours = gradient(), gradient()
    exact = float(ours.grad[0]) * math.sqrt(elements)
    of_torch = torch.nn.utils.clip_grad_norm_([theirs], 1.0).item()
    assert of_torch in (0.0, math.inf)
    if of_torch:
        assert not theirs.grad.any()  # every gradient is gone
    assert distnorm.clip_grad_norm_([ours], 1.0).item() == pytest.approx(exact, rel=1.2e-7, abs=0)
    assert oracle.dense_of([ours.grad]) == pytest.approx(min(exact, 1.0), rel=2e-3, abs=0)


# ---- wrong numbers: the formula


def test_a_threshold_of_inf_only_measures():
    """inf / inf makes NaN of every gradient."""
    theirs, ours = with_gradient(math.inf, 1.0), with_gradient(math.inf, 1.0)
    torch.nn.utils.clip_grad_norm_([theirs], math.inf)
    assert theirs.grad.isnan().any()
    assert distnorm.clip_grad_norm_([ours], math.inf).item() == math.inf
    assert ours.grad.tolist() == [math.inf, 1.0]


def eps_on_each_rank() -> tuple[float, float]:
    parameter = distributed((4,), [Shard(0)], 4)
    parameter.grad.to_local().fill_(1e-6)
    result = clipper([("w", parameter)], max_norm=1e-6).clip().to_dict()
    return result["total_norm"], result["clip_coef"]


def test_eps_is_added_once(ranks):
    """pytorch #149768: 1e-6 is added to the total norm, not to each rank's part of it."""
    total = 2.0 * float(torch.tensor(1e-6))
    for found, coef in ranks(4, eps_on_each_rank, timeout=TIMEOUT):
        assert found == pytest.approx(total, rel=1e-14, abs=0)
        assert coef == pytest.approx(1e-6 / (total + 1e-6), rel=1e-14)
