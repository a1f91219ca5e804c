"""The vector of a step is short; and no difference between ranks gets lost in it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import distnorm
from distnorm.measure.header import Ballot, Brief
from distnorm.plan.collectives import Ranks
from tests.refusals import TIMEOUT, Heard, heard, is_nan, rank, with_gradient

SIZES = st.one_of(st.integers(1, 70), st.sampled_from([128, 1000, 1024, 16384]))
TERMS = st.integers(0, 2**63 - 1)


def total(marks: list[int]) -> torch.Tensor:
    """What an all-reduce makes of them: fp64's sum."""
    assert sum(marks) < 2**53
    return torch.tensor(marks, dtype=torch.float64).sum()


def marks(size: int, terms: list[int], **more: Any) -> list[int]:
    return [Brief(r, size).mark(Ballot("measure", True, terms=terms[r], **more)) for r in range(size)]


@given(SIZES, TERMS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_ranks_that_agree_are_well_and_their_deaf_are_counted(size, terms, raises):
    briefs = [Brief(r, size) for r in range(size)]
    summed = total([brief.mark(Ballot("measure", raises, terms=terms)) for brief in briefs])
    assert bool(briefs[0].well(summed)) and briefs[-1].is_well(summed.item())
    assert briefs[-1].deaf(summed.item()) == (0 if raises else size)


@given(SIZES.filter(lambda size: size > 1), TERMS, TERMS, st.data())
@settings(max_examples=120, deadline=None)
def test_any_set_of_ranks_on_other_terms_is_seen(size, terms, others, data):
    low = (1 << 19) - 1  # what the numbers of the largest world still tell apart
    if terms & low == others & low:
        return
    odd = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=min(size - 1, 20)))
    summed = total(marks(size, [others if r in odd else terms for r in range(size)]))
    assert not Brief(0, size).well(summed)
    assert not Brief(0, size).is_well(summed.item())


@given(st.integers(2, 64), TERMS, st.integers(0, 0xFFFFF), st.data())
@settings(max_examples=60, deadline=None)
def test_a_gradient_on_some_replicas_only_is_seen(size, terms, key, data):
    weights = [((key | 1) * (size - 1 if r == 0 else -1)) for r in range(size)]
    missing = data.draw(st.sets(st.integers(0, size - 1), max_size=size))
    ballots = [
        Ballot("measure", True, presence=0 if r in missing else w, terms=terms) for r, w in enumerate(weights)
    ]
    summed = total([Brief(r, size).mark(ballot) for r, ballot in enumerate(ballots)])
    assert bool(Brief(0, size).well(summed)) == (len(missing) in (0, size))


# ---- on ranks


def lengths_of_steps(order: float) -> tuple[list[int], list[int]]:
    """The lengths of all vectors of two steps, before and after a plan of this order on the same group."""
    found: list[int] = []
    original = Ranks.all_reduce_

    def recorded(self: Ranks, tensor: torch.Tensor, op: str) -> torch.Tensor:
        found.append(len(tensor))
        return original(self, tensor, op)

    Ranks.all_reduce_ = recorded
    parameter = with_gradient(3.0, 4.0)
    clipper = distnorm.GradClipper([parameter], {"clip": {"max_norm": 100.0}})
    clipper.clip()
    found.clear()
    for _ in range(2):
        assert clipper.clip().total_norm == 5.0
    before = list(found)
    other = distnorm.GradClipper([with_gradient(3.0, 4.0)], {"norm": {"type": order}})
    other.clip()
    found.clear()
    for _ in range(2):
        assert clipper.clip().total_norm == 5.0
        other.clip()
    return before, found


@pytest.mark.parametrize(
    ("order", "after"), [(1.0, [2] * 4), (6.5, [2] * 4), (math.inf, [17] * 4), (20.0, [17] * 4)]
)
def test_two_numbers_are_reduced_in_a_step_unless_the_group_has_norms_that_need_more(ranks, order, after):
    for before, then in ranks(2, lengths_of_steps, order):
        assert before == [2, 2]
        assert then == after


def alternating(orders: dict[int, float]) -> list[Heard]:
    """Steps of two norms, of which this rank takes the order that it is told in the third."""
    parameter = with_gradient(3.0, 4.0)
    said = []
    for order in (2.0, math.inf, orders[rank()], 2.0):
        said.append(heard(lambda order=order: distnorm.clip_grad_norm_([parameter], 9.0, order, True)))
    return said


def test_ranks_in_several_norms_that_were_planned_before_meet_and_see_it(ranks):
    for said in ranks(3, alternating, {0: 2.0, 1: math.inf, 2: 2.0}, timeout=TIMEOUT):
        assert said[0][1] == 5.0 and said[1][1] == 4.0
        assert said[2][0] == "DisagreementError"
        assert said[3][1] == 5.0


def comes_and_goes(error_if_nonfinite: bool) -> list[Heard]:
    """The last rank is given nothing from the second call on."""
    parameters = [with_gradient(3.0, 4.0)] if rank() == 0 else [with_gradient(5.0, 12.0)]
    pairs = [(f"of{rank()}", p) for p in parameters]
    said = []
    for given_ in (pairs, pairs, pairs if rank() == 0 else [], pairs):
        said.append(heard(lambda g=given_: distnorm.clip_grad_norm_(g, math.inf, 2.0, error_if_nonfinite)))
    return said


@pytest.mark.parametrize("error_if_nonfinite", [True, False])
def test_parameters_that_go_on_one_rank_only_are_no_number(ranks, error_if_nonfinite):
    exact = math.sqrt(3**2 + 4**2 + 5**2 + 12**2)
    for said in ranks(2, comes_and_goes, error_if_nonfinite, timeout=TIMEOUT):
        assert said[0][1] == said[1][1] == said[3][1] == pytest.approx(exact, rel=1e-7)
        if error_if_nonfinite:
            assert said[2][0] == "DisagreementError" and "nothing at all on 1 of 2 ranks" in said[2][1]
        else:
            assert is_nan(said[2])


def given_nothing_from_the_first() -> list[float]:
    """Rank 1 never has anything; gradients, which are new in each step."""
    return [
        float(distnorm.get_total_norm([torch.full((4,), 2.0 * step)] if rank() == 0 else []))
        for step in (1, 2, 3)
    ]


def test_a_rank_that_is_given_nothing_follows(ranks):
    assert ranks(2, given_nothing_from_the_first, timeout=TIMEOUT) == [[4.0, 8.0, 12.0]] * 2


def of_a_group_that_is_made_anew() -> list[int]:
    """A group's form goes with the group."""
    lengths = []
    original = Ranks.all_reduce_

    def recorded(self: Ranks, tensor: torch.Tensor, op: str) -> torch.Tensor:
        lengths.append(len(tensor))
        return original(self, tensor, op)

    Ranks.all_reduce_ = recorded
    for order in (math.inf, 2.0):
        group = dist.new_group()
        clipper = distnorm.GradClipper([with_gradient(3.0)], {"norm": {"type": order}}, group=group)
        clipper.measure()
        clipper.measure()
        dist.destroy_process_group(group)
    return [lengths[-1], max(lengths)]


def test_the_form_goes_with_the_group(ranks):
    assert ranks(2, of_a_group_that_is_made_anew) == [[2, 17]] * 2
