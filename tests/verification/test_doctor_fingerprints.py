"""A flipped bit at any position is found, on the rank and in the parameter where it is."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distnorm import DistnormError
from distnorm.testing import preload
from distnorm.verification.doctor.fingerprints import Fingerprints, fingerprints_of
from tests.verification.topologies import Block, Ranks, backward

preload("distnorm.verification.doctor.fingerprints")

INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}


@pytest.mark.parametrize("dtype", INTS)
@pytest.mark.parametrize("native", [True, False])
def test_every_bit_counts(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("distnorm.kernels.fingerprints", lambda table: None)
    gradient = torch.randn(65, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = gradient.view(INTS[dtype])
    before = fingerprints_of([gradient])
    for bit in range(8 * dtype.itemsize):
        flip = 1 << bit if bit < 8 * dtype.itemsize - 1 else -(1 << bit)
        bits[41, 3] ^= flip
        assert fingerprints_of([gradient]) != before, bit
        bits[41, 3] ^= flip
        assert fingerprints_of([gradient]) == before


def test_what_is_large_is_read_whole() -> None:
    gradient = torch.zeros((1 << 23) + 5, dtype=torch.bfloat16)
    before = fingerprints_of([gradient])
    for at in (0, 12_345, (1 << 23) - 1, (1 << 23) + 4):
        gradient[at] = 1e-30
        assert fingerprints_of([gradient]) != before
        gradient[at] = 0


def replayed(flips: bool) -> list[tuple[int, str]]:
    model = Block()
    prints = Fingerprints(model, keep=3)
    for step in range(5):
        model.zero_grad()
        backward(model, step)
        prints.record(step)
    assert prints.steps == (2, 3, 4)
    model.zero_grad()
    backward(model, 4)
    if flips and dist.get_rank() == 1:
        assert isinstance(model.up.weight, nn.Parameter) and model.up.weight.grad is not None
        model.up.weight.grad.view(torch.int32)[3, 2] ^= 1
    return prints.differing(4)


def test_the_rank_and_the_parameter_are_named(ranks: Ranks) -> None:
    assert ranks(2, replayed, False) == [[], []]
    assert ranks(2, replayed, True) == [[(1, "up.weight")]] * 2


def test_a_step_that_is_forgotten_is_refused() -> None:
    with pytest.raises(DistnormError, match="expected one of the steps"):
        Fingerprints(Block()).differing(1)
