"""Triton's kernels: in its interpreter, which needs no GPU; compiled for one; and, if there is one, on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import distnorm
from distnorm import kernels
from distnorm.kernels import device_table, dispatch, eager, gpu
from distnorm.measure.norms import norm
from tests import oracle

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton here")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def run(*arguments: str, **environment: str) -> str:
    """In a process of its own: the interpreter takes Triton's place when that is imported, or never."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cases(name: str, **environment: str) -> None:
    told = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{name}.py", **environment)
    assert " passed" in told and " skipped" not in told


@pytest.mark.parametrize("name", ["triton_cases", "triton_statistics"])
@pytest.mark.slow
def test_in_the_interpreter(name):
    cases(name, TRITON_INTERPRET="1")


@on_gpu
@pytest.mark.parametrize("name", ["triton_cases", "triton_statistics"])
def test_on_the_gpu(name):
    cases(name)


@pytest.mark.parametrize("arguments", [("80", "one"), ("90",)], ids=" ".join)
@pytest.mark.slow
def test_they_compile_for_a_gpu(arguments, tmp_path):
    run("tests/kernels/compile_kernels.py", *arguments, TRITON_CACHE_DIR=str(tmp_path))


def test_without_a_gpu_triton_is_not_imported():
    code = """
        import sys, torch, distnorm
        weight = torch.nn.Parameter(torch.ones(2)); weight.grad = torch.ones(2)
        distnorm.GradClipper([weight], {"clip": {"max_norm": 1.0}}).clip()
        print("triton" in sys.modules)
    """
    assert run("-c", "\n".join(line.strip() for line in code.splitlines())) == "False\n"


ROUTE = """
import sys, torch
from distnorm import kernels
from distnorm.kernels import gpu
gpu.split = lambda tensors: (list(tensors), [])  # as of a GPU's memory
gpu.usable = lambda device: True
gpu.scale_, scale_, taken = lambda table, coef: (taken.append(table), scale_(table, coef)), gpu.scale_, []
held, flat = torch.ones(3), torch.ones(9)
product = (torch.ones(3, requires_grad=True) * held).sum()
kernels.scale_([held, flat], torch.tensor(0.5))
kernels.scale_([flat[:5], flat[4:]], torch.tensor(0.5))  # programs would race for flat[4]
assert len(taken) == 1 and held.tolist() == [0.5] * 3
assert flat.tolist() == [0.25] * 4 + [0.125] + [0.25] * 4
try:
    product.backward()
except RuntimeError as error:
    print("modified by an inplace operation" in str(error))
"""


@pytest.mark.slow
def test_scaling_is_routed_and_seen_by_autograd():
    assert run("-c", ROUTE, TRITON_INTERPRET="1", DISTNORM_NATIVE="0") == "True\n"


@pytest.fixture
def cuda_device(monkeypatch):
    """Settings under which a GPU would be usable, if it were asked for nothing else."""
    monkeypatch.delenv("DISTNORM_TRITON", raising=False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "_try_out", lambda device: None)
    gpu.usable.cache_clear()
    yield CUDA
    gpu.usable.cache_clear()


def no_compiler(device: torch.device) -> None:
    raise RuntimeError("Failed to find C compiler.")


def test_which_devices_are_usable(monkeypatch, cuda_device, caplog):
    caplog.set_level("INFO", "distnorm")
    assert gpu.usable(cuda_device)
    assert not gpu.usable(torch.device("cpu")) and not gpu.usable(torch.device("meta"))
    for name, value in (
        ("torch.version.cuda", None),
        ("torch.cuda.get_device_capability", lambda device: (7, 5)),
        ("distnorm.kernels.gpu.find_spec", lambda name: None),
        ("distnorm.kernels.gpu._try_out", no_compiler),
    ):
        with monkeypatch.context() as context:
            context.setattr(name, value)
            gpu.usable.cache_clear()
            assert not gpu.usable(cuda_device), name
    told = [record.getMessage() for record in caplog.records]
    assert ["there is no Triton" in told[0], "C compiler" in told[1], len(told)] == [True, True, 2]
    gpu.usable.cache_clear()
    monkeypatch.setenv("DISTNORM_TRITON", "0")
    assert not gpu.usable(cuda_device)


# ---- on a GPU


def gradients(count: int = 3000) -> list[torch.Tensor]:
    seeds = torch.Generator().manual_seed(5)
    return [torch.randn(1 + (i * 7919) % 2000, generator=seeds).to(CUDA) for i in range(count)]


def launches(body: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        body()
        torch.cuda.synchronize()
    kinds = ("memcpy", "memset")
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA and not event.name.lower().startswith(kinds)
        for event in seen.events()
    )


@on_gpu
@pytest.mark.parametrize("order", [1, 2, float("inf")])
def test_3000_tensors_in_three_launches(order):
    tensors, coef = gradients(), torch.tensor(0.5, dtype=torch.float64, device=CUDA)
    before = [oracle.as_numpy(tensor.cpu()) for tensor in tensors]
    chosen = norm(order)
    found = []

    def body() -> None:
        found[:] = [chosen.statistic(tensors, CUDA)]
        kernels.scale_(tensors, coef)

    body()
    exact = oracle.dense(before, order)
    assert oracle.ulps(float(chosen.finalise(found[0])), exact) <= 1
    assert all(oracle.is_scaled(t.cpu(), b, 0.5) for t, b in zip(tensors, before, strict=True))
    assert launches(body) <= 3


@on_gpu
def test_without_the_kernels_the_result_is_the_same(monkeypatch):
    tensors, chosen = [*gradients(50), torch.ones(7, 3, device=CUDA)[:, :2]], norm(2)
    fast = chosen.statistic(tensors, CUDA)
    monkeypatch.setattr(gpu, "usable", lambda device: False)
    assert dispatch.measure(tensors, kernels.Kernel.SQUARES) == ([], tensors)
    assert float(fast) == pytest.approx(float(chosen.statistic(tensors, CUDA)), rel=1e-14)


def clipped_model() -> tuple[torch.nn.Module, torch.optim.Optimizer, distnorm.GradClipper]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.ReLU(), torch.nn.Linear(65, 3)).to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, capturable=True)
    config = {"clip": {"max_norm": 0.01, "nonfinite": "propagate"}}
    clipper = distnorm.GradClipper(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, optimizer, clipper


def fill(model: torch.nn.Module, step: int) -> None:
    for i, parameter in enumerate(model.parameters()):
        assert parameter.grad is not None
        parameter.grad.copy_(torch.linspace(-step, i + 1, parameter.numel(), device=CUDA).view_as(parameter))


@on_gpu
def test_clipping_never_waits_for_the_device():
    model, optimizer, clipper = clipped_model()
    fill(model, 1)
    clipper.clip()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for parameter in model.parameters():
            parameter.grad = parameter.grad.clone()  # elsewhere
        result = clipper.clip()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(result.was_clipped)


@on_gpu
def test_a_graph_of_clipping_and_step():
    captured, plain = clipped_model(), clipped_model()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for model, optimizer, clipper in (captured, plain):
        with torch.cuda.stream(stream):
            fill(model, 1)
            clipper.clip()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model, optimizer, clipper = captured
    with torch.cuda.graph(graph):
        result = clipper.clip()
        optimizer.step()
    for step in (2, 3, 4):
        fill(model, step)
        fill(plain[0], step)
        graph.replay()
        expected = plain[2].clip()
        plain[1].step()
        assert torch.equal(result.total_norm, expected.total_norm)
    for mine, other in zip(model.parameters(), plain[0].parameters(), strict=True):
        assert torch.equal(mine, other)


@on_gpu
def test_capturing_without_a_step_before_is_left_to_torch():
    tensors = gradients(5)
    expected = norm(2).statistic(tensors, CUDA)
    device_table._tables.clear()
    peers = [tensor.clone() for tensor in tensors]
    eager.scale_(peers, torch.tensor(0.5, dtype=torch.float64, device=CUDA))
    coef = torch.tensor(0.5, dtype=torch.float64, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = norm(2).statistic(tensors, CUDA)
        kernels.scale_(tensors, coef)
    graph.replay()
    assert float(found) == pytest.approx(float(expected), rel=1e-14)
    assert all(torch.equal(tensor, peer) for tensor, peer in zip(tensors, peers, strict=True))
