"""What the doctor holds on a rank: of the reference's gradients as much as a shard, and little more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.doctor_size import body
from benchmarks.held import HeldPeak, can_count, held_bytes
from distnorm.testing import preload
from distnorm.verification.doctor import blocks, examining, posting, preparing, session
from tests.verification.topologies import Ranks

preload("benchmarks.doctor_size")
pytestmark = pytest.mark.skipif(not can_count(), reason="this C library doesn't count what it hands out")


def shards_held(cases: list[str]) -> list[float]:
    """On every rank: the most that the doctor holds in any part of its work, in shards."""
    blocks.ELEMENTS, examining.WHOLE, examining.LATER = 1 << 12, 1 << 13, 1 << 14
    posting._ROUND_BYTES, preparing._PARTS_ELEMENTS = 1 << 15, 1 << 13
    originals = preparing.copied_blocks, session.read_holdings
    found = []
    for case in ["spoilt", *cases]:  # once before, for what is loaded then
        if case == "reference's gradients kept":
            preparing.copied_blocks = _and_keeps(originals[0], lambda _, __, values, *___: values)
        elif case == "own gradients copied":
            session.read_holdings = _and_keeps(originals[1], _copies)
        cost = body(8, case == "spoilt", dim=128, words=8192)
        preparing.copied_blocks, session.read_holdings = originals
        assert cost.ok is (case != "spoilt")
        # How much of the next layers FSDP2 gathers within a step depends on when messages come: one layer
        # of this small model is half a shard. So of the step there is what is held when it has ended.
        found.append(cost.most("held", but="step") / cost.shard)
    return found[1:]


def _copies(rank: int, model: nn.Module, *_: Any) -> list[Tensor]:
    return [parameter.grad.to_local().clone() for parameter in model.parameters()]  # type: ignore[union-attr]


def _and_keeps(function: Callable[..., Any], of: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which now keeps what is made of its arguments as long as its result lives."""

    def keeping(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        result = type("Keeping", (type(found),), {})(found)
        result.kept = of(*args, **kwargs)
        return result

    return keeping


def test_no_rank_holds_two_shards_beside_the_reference(ranks: Ranks) -> None:
    for held in ranks(2, shards_held, ["right", "spoilt"]):
        assert min(held) > 1
        assert max(held) < 2, held


def test_a_copy_too_many_is_counted(ranks: Ranks) -> None:
    """Of the whole model on the first rank, or of each rank's shard."""
    each = ranks(2, shards_held, ["reference's gradients kept", "own gradients copied"])
    assert each[0][0] > 3
    assert min(held[1] for held in each) > 2


def test_bytes_held_are_those_of_tensors_and_strings() -> None:
    with HeldPeak() as counter:
        torch.zeros(1).add(1)  # what the first operator loads
        before = counter.next() and held_bytes()
        kept = [torch.zeros(1 << 20), bytearray(1 << 20)]
        assert 0 <= held_bytes() - before - (5 << 20) < 1 << 16
        (kept[0].double() * 2).sum()
        assert 0 <= counter.next() - before - (21 << 20) < 1 << 16
        kept.clear()
        counter.next()
        assert 0 <= counter.next() - before < 1 << 16
