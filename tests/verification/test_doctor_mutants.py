"""A small part of benchmarks/mutants.py: collectives are spoilt, and the doctor says which, and how."""

from __future__ import annotations

import pytest

from benchmarks.mutants import clean, run_model
from distnorm.testing import preload
from tests.verification.topologies import Ranks

preload("benchmarks.mutants")


@pytest.mark.parametrize(("model", "most"), [("TP", 4), ("FSDP2", 4), ("DDP", 3), ("EP", 5)])
@pytest.mark.slow
def test_a_spoilt_collective_is_found_named_and_explained(ranks: Ranks, model: str, most: int) -> None:
    outcomes = run_model(ranks, model, most=most)
    assert len({outcome.mutation.how for outcome in outcomes}) >= 2
    for outcome in outcomes:
        assert outcome.found and outcome.named and outcome.mistake, outcome


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_found_where_nothing_is_spoilt(ranks: Ranks, dtype: str) -> None:
    assert ranks(2, clean, "TP + SP", [1, 2], dtype)[0] == []
