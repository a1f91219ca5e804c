"""A rank that does not come to a norm, or comes to another step's, is named by the others, in any loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import distnorm

TIMEOUT = 2  # seconds
LONGER = TIMEOUT + 5  # until the others have given up, and have asked each other who is there


def loop(fault: str, notes: bool = False) -> None:
    """Four steps without a collective but the norm's; rank 1 has a fault in the third."""
    rank = torch.distributed.get_rank()
    weight = torch.nn.Parameter(torch.ones(3))
    clipper = distnorm.GradClipper([(f"stage{rank}.weight", weight)], {"clip": {"max_norm": 1.0}})
    for step in range(1, 5):
        weight.grad = torch.full((3,), float(rank + 1))
        has_fault = rank == 1 and step == 3
        if notes:
            clipper.note(step=step)
        if has_fault and fault in ("ends", "waits"):
            time.sleep(LONGER if fault == "waits" else 0)
            os._exit(7)
        if not (has_fault and fault == "forgets"):
            clipper.clip()
        if has_fault and fault == "repeats":
            clipper.clip()


@pytest.mark.parametrize("fault", ["ends", "waits"])
def test_a_rank_that_is_lost_is_named_with_the_step(fault: str, ranks: Callable[..., list[Any]]) -> None:
    failures = ranks(3, loop, fault, expect_errors=True, collective_timeout=TIMEOUT, timeout=30)
    for rank in (0, 2):
        assert failures[rank].type_name == "LostRankError", failures[rank]
        said = f"rank 1 did not come to step 3's norm: last at step 2's norm; rank {rank} waited"
        assert said in failures[rank].message


@pytest.mark.parametrize(
    ("fault", "found"),
    [("forgets", "3 on ranks [0, 2], 4 on rank 1"), ("repeats", "4 on ranks [0, 2], None on rank 1")],
)
def test_a_clip_left_out_or_repeated_is_named_on_all_ranks(
    fault: str, found: str, ranks: Callable[..., list[Any]]
) -> None:
    failures = ranks(3, loop, fault, True, expect_errors=True)
    assert [failure.type_name for failure in failures] == ["DisagreementError"] * 3
    assert all(f"step: expected the same on every rank, found {found}" in f.message for f in failures)


def plain_norm() -> None:
    if torch.distributed.get_rank() == 1:
        os._exit(7)
    distnorm.get_total_norm([torch.ones(3)])


def test_the_functions_name_a_lost_rank_too(ranks: Callable[..., list[Any]]) -> None:
    failures = ranks(2, plain_norm, expect_errors=True, timeout=30)
    assert "rank 1 did not come to the norm: at none before" in failures[0].message
