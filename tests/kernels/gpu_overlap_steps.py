"""Steps on a GPU whose gradients are measured during backward; run as `gpu_steps.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm import kernels
from distnorm.kernels import addresses, gpu_clip_code, gpu_code, gpu_taken_code, taken
from distnorm.kernels.taken import TakenParts
from tests import oracle
from tests.counting import as_on_a_gpu
from tests.kernels.gpu_steps import Counted, gradients, group, local  # noqa: F401

KERNELS = {
    "partials": gpu_code,
    "totals": gpu_code,
    "clip": gpu_clip_code,
    "take": gpu_taken_code,
    "compare": gpu_taken_code,
    "partials_unless_taken": gpu_taken_code,
}
CHUNK = 1024
"""Elements of a chunk, as few as a program takes at once."""


@contextmanager
def small(least: int = 1) -> Iterator[None]:
    """Overlap is worth while for as many bytes, and tensors of more than a chunk are sampled."""
    with (
        as_on_a_gpu(),
        mock.patch.object(addresses, "_LEAST_CHUNK", CHUNK),
        mock.patch.object(kernels, "LEAST", least),
        mock.patch.object(taken, "WHOLE", 1),
    ):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels, as they are launched."""
    names: list[str] = []
    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, Counted(getattr(module, name), name, names))
    return names


def clipper_of(found: Any, overlap: bool, order: float = 2.0) -> distnorm.GradClipper:
    clip = {"max_norm": 0.5, "nonfinite": "skip", "overlap": overlap}
    return distnorm.GradClipper(found, {"norm": {"type": order}, "clip": clip})


def backward(found: list[nn.Parameter], seed: int, skipped: int | None = None) -> None:
    """A backward pass that gives each parameter random gradients, by autograd's own accumulation."""
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for i, p in enumerate(found):
        factor = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if i != skipped and p.numel():
            terms.append((p * factor).sum().double())
    torch.stack(terms).sum().backward()


def forget(found: list[nn.Parameter]) -> None:
    for p in found:
        p.grad = None


@pytest.mark.parametrize("least", [3 * CHUNK * 4, 1 << 30])
def test_what_is_left_after_backward_are_four_launches(launched, least):
    found = [nn.Parameter(torch.zeros(n)) for n in (10, 2 * CHUNK, 3, 3 * CHUNK + 5, 7)]
    with small(least):
        clipper = clipper_of(found, overlap=True)
        for seed in range(4):
            forget(found)
            launched.clear()
            backward(found, seed)
            early, expected = len(launched), oracle.dense_of(gradients(found))
            assert float(clipper.clip().total_norm) == pytest.approx(expected, rel=1e-14)
            if seed > 1 and least < 1 << 30:
                assert launched[:early] == ["take"]
                assert launched[early:] == ["compare", "partials_unless_taken", "totals", "clip"]
            elif seed:
                assert launched == ["partials", "totals", "clip"]


def test_the_cost_of_an_announcement_does_not_grow_with_their_number():
    class Sizes(list[int]):
        asked = 0

        def __getitem__(self, row: Any) -> Any:
            Sizes.asked += 1
            return super().__getitem__(row)

    found = [nn.Parameter(torch.zeros(3)) for _ in range(50)]
    with small(least=30 * 12):
        clipper = clipper_of(found, overlap=True)
        for seed in range(3):
            forget(found)
            if seed == 2:
                overlap: Any = clipper._step.meter.overlap
                overlap._on_gpu._bytes = Sizes(overlap._on_gpu._bytes)
            backward(found, seed)
            clipper.clip()
    assert Sizes.asked == len(found)


def test_sums_are_kept_if_no_byte_has_changed():
    """Sums are replaced by others after backward, which shows whether they are used."""
    found = [nn.Parameter(torch.zeros(n)) for n in (10, 2 * CHUNK + 1, 3)]
    with small():
        clipper = clipper_of(found, overlap=True)
        for seed in range(4):
            forget(found)
            backward(found, seed)
            expected = oracle.dense_of(gradients(found))
            if seed >= 2:
                made_by(clipper)._parts.copy_(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]))
            if seed == 2:
                expected = math.sqrt(11111)
            if seed == 3:
                local(found[1].grad).data[5:600].neg_()
            assert float(clipper.measure().total_norm) == pytest.approx(expected, rel=1e-14)
            expected = oracle.dense_of(gradients(found))
            assert float(clipper.clip().total_norm) == pytest.approx(expected, rel=1e-14)  # used once


def changes() -> dict[str, Any]:
    """What may happen to gradient i after backward; `at` is any number."""

    def nothing(found, i, at):
        pass

    def seen(found, i, at):
        found[i].grad[at % found[i].numel()] += 1

    def unseen(found, i, at):
        found[i].grad.data.mul_(3)

    def unseen_run(found, i, at):
        found[i].grad.data[at % found[i].numel() :][:1024] += 1
        found[i].grad.data[:1024] += 1

    def unseen_element_of_a_small_one(found, i, at):
        if found[i].numel() <= CHUNK:
            found[i].grad.data[at % found[i].numel()] += 1

    def reversed(found, i, at):
        found[i].grad.data.copy_(found[i].grad.flip(0))

    def replaced(found, i, at):
        found[i].grad = found[i].grad * 2

    def replaced_by_the_same(found, i, at):
        found[i].grad = found[i].grad.clone()

    def gone(found, i, at):
        found[i].grad = None

    def accumulated(found, i, at):
        backward(found, at, skipped=i if len(found) > 1 else None)

    def unaligned(found, i, at):
        room = torch.empty(found[i].numel() + 1, dtype=found[i].dtype)
        found[i].grad = room[1:].copy_(found[i].grad)

    return {change.__name__: change for change in list(locals().values())}


CHANGES = changes()


@given(st.data())
@settings(max_examples=6, deadline=None)
def test_bits_are_those_without_overlap(data):
    numels = st.sampled_from([1, 3, 700, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 9, 5 * CHUNK])
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    made = data.draw(st.lists(st.tuples(numels, dtypes), min_size=1, max_size=4))
    order = data.draw(st.sampled_from([1.0, 2.0, math.inf]))
    ways = [[nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in made] for _ in range(2)]
    least = data.draw(st.sampled_from([1, 20_000]))
    with small(least):
        clippers = [
            clipper_of(found, overlap, order) for found, overlap in zip(ways, (True, False), strict=True)
        ]
        for seed in range(4):
            name = data.draw(st.sampled_from(list(CHANGES))) if seed > 1 else "nothing"
            which = data.draw(st.integers(0, len(made) - 1))
            at = data.draw(st.integers(0, 10**6))
            for found in ways:
                forget(found)
                backward(found, seed, skipped=which if name == "gone" and len(made) > 1 else None)
                if found[which].grad is not None:
                    CHANGES[name](found, which, at)
            one, other = (clipper.clip() for clipper in clippers)
            assert torch.equal(one.total_norm, other.total_norm), name
            assert all(map(torch.equal, *map(gradients, ways)))


def test_a_column_is_met_as_surely_as_a_row():
    """Rows are as long as the period in which one line of 64 bytes is sampled."""
    matrix = nn.Parameter(torch.zeros(64, 256))
    with small():
        clipper = clipper_of([matrix], overlap=True)
        for column in (-1, -1, 0, 99):
            forget([matrix])
            backward([matrix], 0)
            if column >= 0:
                matrix.grad.data[:, column] += 1
            expected = oracle.dense_of(gradients([matrix]))
            assert float(clipper.measure().total_norm) == pytest.approx(expected, rel=1e-14)
    assert made_by(clipper) is not None


def made_by(clipper: distnorm.GradClipper) -> TakenParts | None:
    overlap: Any = clipper._step.meter.overlap
    made: TakenParts | None = overlap._on_gpu._taken
    return made


# ---- streams: each knows what has been done before whatever it does next


class Stream:
    def __init__(self, number: int) -> None:
        self.cuda_stream, self.done = number, set()

    def record_event(self) -> frozenset[str]:
        return frozenset(self.done)

    def wait_event(self, event: frozenset[str]) -> None:
        self.done |= event


def test_each_launch_waits_for_those_whose_records_it_uses(monkeypatch):
    streams, now, launches = [Stream(0), Stream(1), Stream(2)], [0], []

    def use(*numbers: int) -> None:
        now[:] = numbers

    for name in ("take", "compare", "partials_unless_taken"):

        class Noted(Counted):
            def __getitem__(self, grid: Any, name: str = name) -> Any:
                before = frozenset(streams[now[0]].done)
                launches.append((f"{name} {len(launches)}", before))
                streams[now[0]].done.add(launches[-1][0])
                return self.kernel[grid]

        monkeypatch.setattr(gpu_taken_code, name, Noted(getattr(gpu_taken_code, name), name, []))
    found = [nn.Parameter(torch.zeros(n)) for n in (2 * CHUNK, 5, 7)]
    recorded: list[Tensor] = []
    with small(), mock.patch.object(Tensor, "record_stream", lambda tensor, stream: recorded.append(tensor)):
        clipper = clipper_of(found, overlap=True)
        for module in (taken, kernels):
            monkeypatch.setattr(module, "stream_of", lambda device: streams[now[0]])
        for seed in range(4):
            forget(found)
            for stream in (1, 2):  # accumulates
                use(stream)
                backward(found, seed)
            use(0)
            if seed == 2:
                found[0].grad.mul_(2)
            clipper.clip()
    names = [name for name, _ in launches]
    assert names[0] == "take 0" and sum("partials" in name for name in names) == 1
    for i, (name, before) in enumerate(launches):
        same_stream_or_waited = set(names[:i]) <= before
        assert same_stream_or_waited, f"{name} doesn't wait for {set(names[:i]) - before}"
    assert {id(p.grad) for p in found} <= set(map(id, recorded))


# ---- ranks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(40, 60), nn.Linear(60, 30, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(rows)))


def steps_of(net: nn.Module, overlap: bool) -> list[tuple[float, float, int]]:
    """Of each step the norm, the true one, and how many chunks were read after backward."""
    clipper, steps, own = clipper_of(net, overlap), [], Net()
    for step in range(4):
        net.zero_grad()
        if overlap:
            clipper._step.meter.overlap.reads_before = True  # as before a monitored step
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        net(torch.randn(4, 40, generator=generator)).square().sum().backward()
        if step == 3:
            next(net.parameters()).grad.mul_(2)
        held = [p.grad for p in net.parameters() if p.grad is not None]
        expected = oracle.dense_of([g.full_tensor() if hasattr(g, "full_tensor") else g for g in held])
        own.zero_grad()
        own(
            torch.randn(4, 40, generator=generator.manual_seed(10 * step + dist.get_rank()))
        ).square().sum().backward()
        norm, made = float(clipper.clip().total_norm), made_by(clipper) if overlap else None
        if step == 2 and overlap and isinstance(net, DistributedDataParallel):
            squares = oracle.dense_of(gradients(list(own.parameters()))) ** 2
            before: Any = clipper._step.meter.overlap.before
            assert float(before) == pytest.approx(squares, rel=1e-12)
        read = -1 if made is None else int((made._prints[:, 1] == 0).sum())
        steps.append((norm, expected, read))
    return steps


def by_framework(name: str) -> list[list[tuple[float, float, int]]]:
    ways = []
    with small(least=1 if name == "fsdp2" else 1000):
        for overlap in (True, False):
            net = Net()
            if name == "fsdp2":
                fully_shard(net.first, mesh=init_device_mesh("cpu", (2,)))
                fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
            else:
                net = DistributedDataParallel(net, gradient_as_bucket_view=name == "ddp, view")
            ways.append(steps_of(net, overlap))
    return ways


@pytest.mark.parametrize("name", ["fsdp2", "ddp", "ddp, view"])
def test_what_frameworks_reduce_is_taken(ranks, name):
    for with_overlap, without in ranks(2, by_framework, name, timeout=240):
        assert [norm for norm, _, _ in with_overlap] == [norm for norm, _, _ in without]
        for norm, expected, _ in with_overlap:
            assert norm == pytest.approx(expected, rel=1e-6)
        assert with_overlap[2][2] == 0
