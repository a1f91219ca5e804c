"""The same kernels under a default device, in a dry run, and where another library watches every operator."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.flop_counter import FlopCounterMode

from distnorm import kernels
from distnorm.kernels import Kernel, native

CPU = torch.device("cpu")
WATCHERS: dict[str, Any] = {
    "default device": lambda: torch.device("meta"),
    "flop counter": lambda: FlopCounterMode(display=False),
    "communication counter": CommDebugMode,
    "inference": torch.inference_mode,
}


def made() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e5m2)
    tensors = [torch.randn(70 + i, 3, generator=generator).to(dtype) for i, dtype in enumerate(dtypes)]
    return [*tensors, torch.randn(6, 4, generator=generator)[:, ::2], torch.zeros(0)]


def coef(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def everything(tensors: list[Tensor], half: Tensor, halves: Tensor, keep: Tensor) -> list[Tensor]:
    """What every kernel gives for tensors and 0-d values made elsewhere, and the tensors it leaves."""
    results: list[Tensor] = []
    for kernel in Kernel:
        statistics, rest = kernels.measure(tensors, kernel)
        results += statistics
        results += [block.sum() for block in kernels.blocks(rest)]
        results.append(kernels.summaries(tensors, kernel))
    results.append(kernels.row_squares(tensors))
    results += [kernels.checksum(tensor) for tensor in tensors]
    results.append(kernels.samples_of(tensors))
    results += [kernels.summaries([], Kernel.SQUARES), kernels.row_squares([]), kernels.samples_of([])]
    results.append(kernels.on_device([1.0, 2.0], CPU))
    views = kernels.once([kernels.memory_of(tensor) for tensor in tensors])
    kernels.scale_(views, half)
    kernels.scale_each_(views, halves)
    kernels.clamp_(views, 0.1)
    results += [tensor.clone() for tensor in tensors]
    kernels.zero_unless_(views, keep)
    return [*results, *tensors]


def inputs() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    return made(), coef(0.5), torch.tensor([0.5, 1.0, 0.25, 0.5, 0.5, 0.7, 1.0]), torch.tensor(False)


def bits(tensor: Tensor) -> Tensor:
    plain = tensor.detach().contiguous()
    return (torch.view_as_real(plain) if plain.is_complex() else plain).reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("path", ["compiled", "eager"])
@pytest.mark.parametrize("mode", WATCHERS)
def test_the_results_are_the_same(monkeypatch, path, mode):
    if path == "eager":
        monkeypatch.setattr(native, "split", lambda tensors: ([], list(tensors)))
    expected = everything(*inputs())
    given = inputs()
    with WATCHERS[mode]():
        found = everything(*given)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.device, one.dtype, one.shape) == (other.device, other.dtype, other.shape)
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("within", [True, False], ids=["in the mode", "after it"])
def test_a_dry_run_gives_the_same_shapes_and_reads_nothing(within):
    expected = everything(*inputs())
    mode = FakeTensorMode()
    with mode:
        given = inputs()
    context: AbstractContextManager[object] = mode if within else nullcontext()
    with context:
        found = everything(*given)
    assert isinstance(found[-1], FakeTensor)
    of_tensors = slice(-2 * len(given[0]), None)  # elsewhere compiled code takes several tensors as one
    for one, other in zip(found[of_tensors], expected[of_tensors], strict=True):
        assert (one.device, one.dtype, one.shape) == (other.device, other.dtype, other.shape)


def test_fake_gradients_are_not_found_again():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    finder = kernels.Finder([parameter.grad])
    with FakeTensorMode():
        fake = torch.nn.Parameter(torch.ones(3))
        fake.grad = torch.ones(3)
        assert finder([fake]) is None
    assert finder([parameter]) is not None


def test_what_is_on_the_host():
    assert kernels.on_host(torch.ones(1))
    assert not kernels.on_host(torch.ones(1, device="meta"))
    with FakeTensorMode():
        assert not kernels.on_host(torch.ones(1))
