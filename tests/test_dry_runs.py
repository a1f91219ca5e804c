"""Dry runs: FakeTensorMode, torch's fake process group, and LocalTensorMode, which simulates all ranks.

The values of the first two have no meaning, and their shapes, dtypes and collectives do. LocalTensorMode has
the values too: they are compared with one dense process in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import distnorm
from distnorm.trainer.engine import Engine
from distnorm.trainer.job import Job
from distnorm.trainer.model import build_model
from distnorm.trainer.topology import make_topology
from distnorm.trainer.world import open_world

CONFIGS = sorted(
    p for p in Path(__file__).parents[1].joinpath("configs").glob("*.yaml") if "zero" not in p.stem
)
AXES = ("pp", "dp_replicate", "dp_shard", "tp")
ONE = 1.2e-7  # an ulp of fp32
TIMEOUT = 300

POLICIES: dict[str, Any] = {
    "constant": {"max_norm": 1.0},
    "schedule": {
        "max_norm": 2.0,
        "policy": {
            "name": "schedule",
            "curve": "linear",
            "points": [{"step": 0, "factor": 1.0}, {"step": 9, "factor": 0.5}],
        },
    },
    "zclip": {"policy": "zclip"},
    "percentile": {"policy": "percentile"},
    "skip_spikes": {"policy": "skip_spikes"},
    "skip_spikes loss": {"policy": {"name": "skip_spikes", "on": "loss"}},
    "adagc": {"policy": "adagc"},
    "agc": {"policy": "agc"},
    "per_tensor": {"policy": "per_tensor", "max_norm": 1.0},
    "value": {"policy": "value", "max_norm": 0.5},
    "groups": {
        "max_norm": 1.0,
        "groups": [
            {"name": "first", "params": ["0.*"], "policy": "adagc"},
            {"name": "bias", "params": ["1.bias"], "policy": "zclip"},
        ],
    },
}
NONFINITE = ("raise", "raise_now", "skip", "zero", "propagate")


@pytest.fixture(autouse=True)
def _no_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def fake_group(size: int, rank: int = 0) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


def all_reduces(comm: CommDebugMode) -> int:
    counts = {str(op): count for op, count in comm.get_comm_counts().items()}
    assert set(counts) <= {"c10d.allreduce_"}
    return sum(counts.values())


def results(result: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for each in fields(result):
        value = getattr(result, each.name)
        if isinstance(value, Tensor):
            found[each.name] = value
        else:
            for name, group in value.items():
                found |= {f"{name}.{key}": inner for key, inner in results(group).items()}
    return found


def filled(net: nn.Module, seed: int) -> nn.Module:
    dice = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=dice)
    return net


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))


def config_of(policy: str, nonfinite: str = "propagate", **norm: Any) -> dict[str, Any]:
    return {
        "clip": {"nonfinite": nonfinite, **POLICIES[policy]},
        "monitor": {"every": 2, "replicas": True},
        "norm": norm,
    }


# ---- FakeTensorMode


def check_fakes(real: Any, fake: Any) -> None:
    expected, found = results(real), results(fake)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        other = found[name]
        assert isinstance(other, FakeTensor), name
        assert (other.dtype, other.shape, other.device) == (value.dtype, value.shape, value.device), name


def goes_with(policy: str, order: float) -> bool:
    """Whether the policy can be had with this norm, with layers monitored."""
    return order == 2 if policy == "agc" else order != 8


@pytest.mark.parametrize(
    ("policy", "order"),
    [(policy, order) for policy in POLICIES for order in (2.0, 3.0, math.inf) if goes_with(policy, order)],
)
@pytest.mark.slow
def test_a_model_of_fake_tensors(policy, order):
    config = config_of(policy, type=order)
    real = distnorm.GradClipper(filled(made(), 1), config)
    real.note(loss=1.0)
    expected = real.clip(), real.measure()
    for nonfinite in NONFINITE if order == 2 and policy in ("constant", "groups") else ("raise",):
        with FakeTensorMode():
            net = made()
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter)
            clipper = distnorm.GradClipper(net, config_of(policy, nonfinite, type=order))
            for _ in range(2):
                clipper.note(loss=torch.ones(()), tokens=3)
                result = clipper.clip()
                check_fakes(expected[0], result)
                check_fakes(expected[1], clipper.measure())
            clipper.decide()
            clipper.load_state_dict(clipper.state_dict())
            clipper.flush()
            clipper.close()
            assert all(isinstance(parameter.grad, FakeTensor) for parameter in net.parameters())


@pytest.mark.parametrize("within", [True, False], ids=["in the mode", "after it"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_dry_step_between_real_ones_changes_nothing(policy, within):
    def run(dry: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        net, found = made(), []
        clipper = distnorm.GradClipper(net, {**config_of(policy), "monitor": {"every": 1}})
        for seed in range(4):
            clipper.note(loss=float(seed))
            found.append(filled(net, seed) and clipper.clip().to_dict())
            if dry and seed == 1:
                mode = FakeTensorMode(allow_non_fake_inputs=True)
                for parameter in net.parameters():
                    gradient, parameter.grad = parameter.grad, None
                    parameter.grad = mode.from_tensor(gradient)
                clipper.note(loss=9.0)
                if within:
                    with mode:
                        result = clipper.clip()
                else:
                    result = clipper.clip()
                assert isinstance(result.total_norm, FakeTensor)
                for parameter in net.parameters():
                    parameter.grad = None
        state = {key: clipper.state_dict()[key] for key in ("policy", "groups")}
        return found, state

    (wet, one), (dry, other) = run(False), run(True)
    assert str(wet) == str(dry)  # NaN too
    assert one == other


def test_a_norm_of_several_buckets():
    with FakeTensorMode():
        net = made()
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        clipper = distnorm.GradClipper(net, {"clip": {"max_norm": 1.0}, "norm": {"type": 8.0}})
        check_fakes(clipper.measure(), clipper.clip())


def test_functions_of_fake_tensors_and_then_of_real_ones():
    for order in (1.0, 2.0, 3.0, 8.0, math.inf):
        real = filled(made(), 3)
        expected = distnorm.get_total_norm([p.grad for p in real.parameters()], order)
        with FakeTensorMode():
            fake = made()
            for parameter in fake.parameters():
                parameter.grad = torch.ones_like(parameter)
            for norm in (
                distnorm.get_total_norm([p.grad for p in fake.parameters()], order),
                distnorm.clip_grad_norm_(fake, 1.0, order),
            ):
                assert isinstance(norm, FakeTensor) and norm.dtype == torch.float32 and norm.shape == ()
                distnorm.clip_grads_with_norm_(fake, 1.0, norm)
        assert torch.equal(distnorm.get_total_norm([p.grad for p in real.parameters()], order), expected)
        assert torch.equal(distnorm.clip_grad_norm_(real, 1e9, order), expected)


# ---- torch's fake process group


def dry_step(path: Path, rank: int, fakes: bool) -> None:
    """A clipper's steps and a function's call on a shipped topology, seen by one of its ranks."""
    document = distnorm.load_config(path).model_dump(exclude_unset=True)
    small = {"dim": 16, "layers": 4, "heads": 4, "context": 16}
    document["train"]["model"] = {**document["train"].get("model", {}), **small}
    config = distnorm.Config.model_validate(document)
    size = math.prod(int(getattr(config.train.parallel, axis)) for axis in AXES)
    fake_group(size, rank % size)
    with open_world(config) as world:
        topology = make_topology(config, world)
        engine = Engine(Job(config, world, None, topology), build_model(config))  # type: ignore[arg-type]
    target: Any = [engine.module]
    for parameter in engine.named_parameters().values():
        if parameter.numel():
            parameter.grad = torch.ones_like(parameter)
    mode = FakeTensorMode() if fakes else nullcontext()
    if isinstance(mode, FakeTensorMode):  # torch itself can't make all of these models in the mode
        target = []
        for name, parameter in engine.named_parameters().items():
            gradient, parameter.grad = parameter.grad, None
            held = nn.Parameter(mode.from_tensor(parameter.detach()))
            held.grad = None if gradient is None else mode.from_tensor(gradient)
            target.append((name, held))
    with mode:
        clipper = distnorm.GradClipper(target, config, tied=engine.tied)
        for _ in range(2):
            clipper.note(loss=1.0)
            with CommDebugMode() as comm:
                result = clipper.clip()
            assert all_reduces(comm) == 1
        assert {type(value) for value in results(result).values()} == {FakeTensor if fakes else Tensor}
        assert {value.shape for value in results(result).values()} == {torch.Size()}
        norm = distnorm.clip_grad_norm_(target, 1.0, tied=engine.tied)
        assert (type(norm), norm.dtype) == (FakeTensor if fakes else Tensor, torch.float32)
        clipper.close()


def dry_steps(paths: list[Path], fakes: bool) -> list[str]:
    wrong = []
    for path in paths:
        for rank in (0,) if fakes or "pp" not in path.stem else (0, 7):
            try:
                dry_step(path, rank, fakes)
            except Exception as error:
                wrong.append(f"{path.name}, rank {rank}: {type(error).__name__}: {error}")
    return wrong


@pytest.mark.parametrize("fakes", [False, True], ids=["tensors", "fake tensors"])
@pytest.mark.slow
def test_every_shipped_topology_on_the_fake_process_group(ranks, fakes):
    (wrong,) = ranks(1, dry_steps, CONFIGS, fakes, timeout=TIMEOUT)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("fakes", [False, True], ids=["tensors", "fake tensors"])
def test_a_world_of_16384_ranks(fakes):
    fake_group(16384, 77)
    with FakeTensorMode() if fakes else torch.no_grad():
        mesh = DeviceMesh("cpu", torch.arange(16384).view(2048, 8)) if not fakes else None
        local = torch.ones(3, 2)
        net = nn.Linear(2, 3)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        target: list[Any] = list(net.parameters())
        if mesh is not None:
            weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0), Replicate()], run_check=False))
            weight.grad = DTensor.from_local(local, mesh, [Shard(0), Replicate()], run_check=False)
            target.append(weight)
        clipper = distnorm.GradClipper(target, {"clip": {"max_norm": 1.0}})
        with CommDebugMode() as comm:
            clipper.clip()
        assert all_reduces(comm) == 1


# ---- LocalTensorMode


Pieces = dict[int, Tensor]


def piece(whole: Tensor, mesh: Tensor, placements: list[Any], rank: int) -> Tensor | None:
    """What a rank holds of a whole tensor, cut axis by axis from left to right."""
    place = (mesh == rank).nonzero()
    if not len(place):
        return None
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            size = -(-whole.shape[placement.dim] // mesh.shape[axis])
            start = min(int(place[0][axis]) * size, whole.shape[placement.dim])
            stop = min(start + size, whole.shape[placement.dim])
            whole = whole.narrow(placement.dim, start, stop - start)
    return whole.clone()


def simulated(whole: Tensor, mesh: DeviceMesh, ids: Tensor, placements: list[Any]) -> Tensor:
    """A DTensor of LocalTensors; partial along an axis, each rank has its share of the sum."""
    from torch.distributed._local_tensor import LocalTensor

    pieces: Pieces = {}
    for rank in ids.flatten().tolist():
        own = piece(whole, ids, placements, rank)
        assert own is not None
        for axis, placement in enumerate(placements):
            if isinstance(placement, Partial):
                at, size = int((ids == rank).nonzero()[0][axis]), ids.shape[axis]
                own = own * (at + 1) * 2 / (size * (size + 1))
        pieces[rank] = own
    return DTensor.from_local(
        LocalTensor(pieces), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def dense(tensors: list[Tensor], order: float = 2.0) -> float:
    flat = torch.cat([t.double().flatten() for t in tensors]).abs()
    return float(flat.max()) if order == math.inf else float(flat.pow(order).sum().pow(1 / order))


def values(norm: Any) -> list[float]:
    return [float(value) for value in norm._local_tensors.values()]


def whole_of(gradient: Tensor, ids: Tensor, placements: list[Any], like: Tensor) -> Tensor:
    """The whole tensor, put together from what ranks hold."""
    local: Pieces = (gradient._local_tensor if isinstance(gradient, DTensor) else gradient)._local_tensors  # type: ignore[attr-defined]
    found = torch.full_like(like, math.nan)
    places = torch.arange(like.numel()).view(like.shape)
    for rank, own in local.items():
        held = piece(places, ids, placements, rank)
        assert held is not None
        found.view(-1)[held.flatten()] = own.flatten()
    return found


def clipped_right(
    size: int, held: list[tuple[tuple[int, ...], Any, list[Any], list[Any]]], order: float
) -> None:
    """Make parameters of (shape, ranks of the mesh, placements, those of the gradient), and clip them."""
    from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

    fake_group(size)
    dice = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=dice) for shape, *_ in held]
    extra = torch.randn(5, generator=dice)
    parameters: list[Any] = []
    every = torch.arange(size)
    plain = nn.Parameter(LocalTensor({rank: torch.zeros(5) for rank in range(size)}))
    plain.grad = LocalTensor({rank: extra.clone() for rank in range(size)})
    for gradient, (_, ids, placements, arrived) in zip(gradients, held, strict=True):
        # A stage's mesh has some of the ranks, and torch can use it in a mode of just these.
        with LocalTensorMode(frozenset(ids.flatten().tolist())):
            mesh = DeviceMesh("cpu", ids)
            parameter = nn.Parameter(simulated(torch.zeros_like(gradient), mesh, ids, placements))
            parameter.grad = simulated(gradient, mesh, ids, arrived)
            parameters.append(parameter)
    parameters.append(plain)
    with LocalTensorMode(size):
        expected = dense([*gradients, extra], order)
        for _ in range(2):
            found = values(distnorm.clip_grad_norm_(parameters, 1e9, order))
            assert len(found) == size and len(set(found)) == 1
            assert found[0] == pytest.approx(expected, rel=ONE)
        with CommDebugMode() as comm:
            distnorm.clip_grad_norm_(parameters, expected / 2, order)
        partial = sum(isinstance(p, Partial) for *_, got in held for p in got)
        assert (size > 1) <= all_reduces(comm) <= 1 + partial
    for parameter, gradient, (_, ids, placements, _) in zip(parameters, gradients, held, strict=False):
        scaled = whole_of(parameter.grad, ids, placements, gradient)
        torch.testing.assert_close(scaled, gradient / 2, rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(
        whole_of(plain.grad, every, [Replicate()], extra), extra / 2, rtol=3e-6, atol=0
    )


LAYOUTS: dict[str, Any] = {
    "fsdp2, 64": [((130, 7), (64,), [Shard(0)], [Shard(0)]), ((3,), (64,), [Shard(0)], [Shard(0)])],
    "hsdp, 8 x 8": [((70, 3), (8, 8), [Replicate(), Shard(0)], [Replicate(), Shard(0)])],
    "fsdp2 x tp": [
        ((16, 24), (8, 8), [Shard(0), Shard(1)], [Shard(0), Shard(1)]),
        ((9,), (8, 8), [Shard(0), Replicate()], [Shard(0), Replicate()]),
    ],
    "sequence parallel": [
        ((17,), (8, 8), [Shard(0), Replicate()], [Shard(0), Partial()]),
        ((6, 8), (8, 8), [Replicate(), Shard(1)], [Replicate(), Shard(1)]),
    ],
}


@pytest.mark.parametrize("order", [2.0, 3.0, math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
def test_64_local_tensor_ranks_give_the_dense_norm(layout, order):
    held = [
        (shape, torch.arange(64).view(mesh), placements, arrived)
        for shape, mesh, placements, arrived in LAYOUTS[layout]
    ]
    clipped_right(64, held, order)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_topology_of_local_tensors(path):
    parallel = distnorm.load_config(path).train.parallel
    degrees = [int(getattr(parallel, axis)) for axis in AXES]
    stages = torch.arange(math.prod(degrees)).view(degrees)
    held: list[Any] = []
    for ids in stages:
        cut = [Replicate(), Shard(0), Shard(1)]
        held.append(((9, 8), ids, cut, cut))
        norm = [Replicate(), Shard(0), Replicate()]
        arrived = [*norm[:2], Partial()] if parallel.sequence_parallel else norm
        held.append(((7,), ids, norm, arrived))
    clipped_right(math.prod(degrees), held, 2.0)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[Any]]:
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    size = math.prod(shape)
    held = []
    for _ in range(draw(st.integers(1, 3))):
        whole = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=2)))
        kinds = st.sampled_from([Replicate(), *(Shard(dim) for dim in range(len(whole)))])
        placements = [draw(kinds) for _ in shape]
        arrived = [Partial() if isinstance(p, Replicate) and draw(st.booleans()) else p for p in placements]
        held.append((whole, torch.arange(size).view(shape), placements, arrived))
    return size, held


@settings(max_examples=12, deadline=None, derandomize=True)
@given(layouts())
def test_any_mesh_of_local_tensors(case):
    clipped_right(*case, 2.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_clipper_of_local_tensors_is_one_of_each_rank(policy):
    from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

    def net_of(make: Any) -> list[tuple[str, nn.Parameter]]:
        named = []
        for name, parameter in filled(made(), 5).named_parameters():
            held = nn.Parameter(make(parameter.detach()))
            held.grad = make(parameter.grad)
            named.append((name, held))
        return named

    def seen(clipper: Any) -> list[dict[str, Any]]:
        found = []
        for _ in range(3):
            clipper.note(loss=2.0)
            found += [clipper.clip().to_dict(), clipper.measure().to_dict()]
        return [*found, {key: value for key, value in clipper.state_dict().items() if key != "monitor"}]

    expected = seen(distnorm.GradClipper(net_of(torch.clone), config_of(policy)))
    fake_group(4)
    named = net_of(lambda whole: LocalTensor({rank: whole.clone() for rank in range(4)}))
    with LocalTensorMode(4):
        clipper = distnorm.GradClipper(named, config_of(policy))
        found = seen(clipper)
        assert clipper.parameters[0] is named[0][1] and "4 ranks" in repr(clipper)
    assert str(close(found)) == str(close(expected))


def close(found: Any) -> Any:
    """Numbers to ten digits: four ranks add up in another order."""
    if isinstance(found, dict):
        return {key: close(value) for key, value in found.items()}
    if isinstance(found, list):
        return [close(value) for value in found]
    return f"{found:.9g}" if isinstance(found, float) else found


def test_what_ranks_refuse_is_raised_with_their_numbers():
    from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

    fake_group(4)
    weight = nn.Parameter(LocalTensor({rank: torch.zeros(9) for rank in range(4)}))
    weight.grad = LocalTensor({rank: torch.full((9,), 1.0 + (rank == 3)) for rank in range(4)})
    with LocalTensorMode(4):
        with pytest.raises(distnorm.ReplicaError, match=r"rank 3"):
            distnorm.clip_grad_norm_([("w", weight)], 1.0)
        with pytest.raises(distnorm.DistnormError, match="LocalTensorMode"):
            distnorm.GradClipper([("w", weight)]).rebind()
        with pytest.raises(distnorm.DistnormError, match="LocalTensorMode"):
            distnorm.attach([weight], torch.optim.SGD([weight], lr=0.1))
    with LocalTensorMode(2), pytest.raises(distnorm.DistnormError, match=r"\[0, 1\] of \[0, 1, 2, 3\]"):
        distnorm.get_total_norm([weight])
    assert float(weight.grad._local_tensors[3][0]) == 2.0


def test_a_target_given_by_name_and_an_optimizer_that_steps():
    from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

    fake_group(2)
    weight = nn.Parameter(LocalTensor({rank: torch.zeros(2) for rank in range(2)}))
    slope = LocalTensor({rank: torch.tensor([3.0, 4.0]) for rank in range(2)})
    with LocalTensorMode(2):
        optimizer = torch.optim.SGD([weight], lr=1.0)
        clipper = distnorm.GradClipper(target=[("w", weight)], config={"clip": {"max_norm": 1.0}})
        for _ in range(2):
            (weight * slope).sum().backward()
            result = clipper.clip()
            assert not result.skipped
            optimizer.step()
            assert values(distnorm.get_total_norm(tensors=[weight.grad])) == pytest.approx(
                [1.0] * 2, rel=1e-6
            )
            distnorm.clip_grads_with_norm_(parameters=[weight], max_norm=1.0, total_norm=result.total_norm)
            optimizer.zero_grad()
    for rank in range(2):
        expected = -2 * torch.tensor([0.6, 0.8])
        torch.testing.assert_close(weight._local_tensors[rank].detach(), expected)  # type: ignore[attr-defined]


def test_tensors_that_all_ranks_are_given_are_scaled_once():
    from torch.distributed._local_tensor import LocalTensorMode

    fake_group(4)
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([3.0, 0.0, 4.0])
    with LocalTensorMode(4):
        assert values(distnorm.clip_grad_norm_([weight], 2.5)) == [5.0] * 4
    torch.testing.assert_close(weight.grad, torch.tensor([1.5, 0.0, 2.0]))


def test_local_tensors_of_fake_tensors():
    from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

    fake_group(4)
    with FakeTensorMode():
        pieces = {rank: torch.ones(3) for rank in range(4)}
        weight = nn.Parameter(LocalTensor(pieces))
        weight.grad = LocalTensor({rank: torch.ones(3) for rank in range(4)})
        with LocalTensorMode(4):
            norm: Any = distnorm.clip_grad_norm_([weight], 1.0)
    assert all(isinstance(value, FakeTensor) for value in norm._local_tensors.values())
