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
from distnorm.measure.exchange import Exchange
from distnorm.measure.header import FIELDS, Header, Packing, Stage
from distnorm.measure.norms import norm
from distnorm.measure.reduced import ReducedStatistics
from distnorm.plan.collectives import Ranks
from tests.refusals import TIMEOUT, Heard, heard, rank, with_gradient

SIZES = st.one_of(st.integers(1, 70), st.sampled_from([128, 1000, 1024, 16384]))
TERMS = st.integers(0, 2**63 - 1)


def total(packed: list[int]) -> torch.Tensor:
    """What an all-reduce makes of them: fp64's sum."""
    assert sum(packed) < 2**53
    return torch.tensor(packed, dtype=torch.float64).sum()


def packed_headers(size: int, terms: list[int]) -> list[int]:
    return [Packing(r, size).pack(Header("measure", True, terms=terms[r])) for r in range(size)]


@given(SIZES, TERMS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_ranks_that_measure_the_same_agree_and_those_that_do_not_raise_are_counted(size, terms, raises):
    packings = [Packing(r, size) for r in range(size)]
    summed = total([packing.pack(Header("measure", raises, terms=terms)) for packing in packings])
    assert bool(packings[0].agreed(summed)) and packings[-1].agreed_on_host(summed.item())
    assert packings[-1].nonraising(summed.item()) == (0 if raises else size)


@given(SIZES.filter(lambda size: size > 1), TERMS, TERMS, st.data())
@settings(max_examples=120, deadline=None)
def test_any_set_of_ranks_on_other_terms_is_seen(size, terms, others, data):
    low = (1 << 19) - 1  # what the numbers of the largest world still tell apart
    if terms & low == others & low:
        return
    odd = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=min(size - 1, 20)))
    summed = total(packed_headers(size, [others if r in odd else terms for r in range(size)]))
    assert not Packing(0, size).agreed(summed)
    assert not Packing(0, size).agreed_on_host(summed.item())


@given(st.integers(2, 64), TERMS, st.integers(0, 0xFFFFF), st.data())
@settings(max_examples=60, deadline=None)
def test_a_gradient_on_some_replicas_only_is_seen(size, terms, key, data):
    weights = [((key | 1) * (size - 1 if r == 0 else -1)) for r in range(size)]
    missing = data.draw(st.sets(st.integers(0, size - 1), max_size=size))
    headers = [
        Header("measure", True, presence=0 if r in missing else w, terms=terms) for r, w in enumerate(weights)
    ]
    summed = total([Packing(r, size).pack(header) for r, header in enumerate(headers)])
    assert bool(Packing(0, size).agreed(summed)) == (len(missing) in (0, size))


@given(st.integers(2, 64), TERMS, st.data())
@settings(max_examples=60, deadline=None)
def test_a_refusal_on_any_ranks_is_seen(size, terms, data):
    refusing = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size))
    headers = [Header("measure", True, refused=r in refusing, terms=terms) for r in range(size)]
    assert not Packing(0, size).agreed(total([Packing(r, size).pack(h) for r, h in enumerate(headers)]))


# ---- full headers


def reduced_headers(op: str, headers: list[Header]) -> torch.Tensor:
    """The headers of all ranks as an all-reduce of the full form leaves them, with none that is NaN."""
    rows = torch.tensor([[0.0, *header.full(op)] for header in headers], dtype=torch.float64)
    return rows.sum(dim=0) if op == "sum" else rows.amax(dim=0)


def full_agree(op: str, headers: list[Header]) -> set[bool]:
    reduced = reduced_headers(op, headers)
    assert len(reduced) == len(FIELDS)
    return {bool(header.agreed(op, len(headers), reduced)) for header in headers}


@given(st.sampled_from(["sum", "max"]), st.integers(1, 20), TERMS, st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_full_headers_agree_whether_or_not_some_ranks_were_given_nothing(op, size, terms, raises, is_double):
    measure = Header("measure", raises, terms=terms, is_double=is_double)
    assert full_agree(op, [measure] * size) == {True}
    assert full_agree(op, [measure] * size + [Header("join", raises)] * 2) == {True}


@given(
    st.sampled_from(["sum", "max"]),
    st.integers(2, 12),
    TERMS,
    st.sampled_from(["plan", "agree", "refused", "raises", "terms"]),
    st.booleans(),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_full_headers_show_every_kind_of_disagreement(op, size, terms, kind, raises, data):
    """Some ranks, but not all, are elsewhere; a rank that measures and one that joins see it alike."""
    of_measure = Header("measure", raises, terms=terms)
    others = {
        "plan": Header("plan", raises),
        "agree": Header("agree", raises),
        "refused": Header("measure", raises, refused=True, terms=terms),
        "raises": Header("measure", not raises, terms=terms ^ (op == "max")),  # a maximum of flags tells less
        "terms": Header("measure", raises, terms=terms ^ 1),
    }
    odd = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1))
    headers = [others[kind] if r in odd else of_measure for r in range(size)]
    joining = [Header("join", raises)]
    reduced = reduced_headers(op, headers + joining)
    assert not of_measure.agreed(op, size + 1, reduced)
    assert not joining[0].agreed(op, size + 1, reduced)


def test_presence_of_some_replicas_only_is_no_agreement_in_full_form():
    """By a sum; a maximum's replicas each count everything, and have no weights."""
    weights = [2, -1, -1]
    for missing in range(3):
        headers = [
            Header("measure", True, presence=0 if r == missing else w, terms=7) for r, w in enumerate(weights)
        ]
        assert full_agree("sum", headers) == {False}
    assert full_agree("sum", [Header("measure", True, presence=w, terms=7) for w in weights]) == {True}


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
    ("order", "after"), [(1.0, [2] * 4), (6.5, [2] * 4), (math.inf, [19] * 4), (20.0, [19] * 4)]
)
def test_two_numbers_are_reduced_in_a_step_unless_the_group_has_norms_that_need_more(ranks, order, after):
    for before, then in ranks(2, lengths_of_steps, order):
        assert before == [2, 2]  # header and statistic
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
def test_parameters_that_go_on_one_rank_only_are_refused(ranks, error_if_nonfinite):
    exact = math.sqrt(3**2 + 4**2 + 5**2 + 12**2)
    for said in ranks(2, comes_and_goes, error_if_nonfinite, timeout=TIMEOUT):
        assert said[0][1] == said[1][1] == said[3][1] == pytest.approx(exact, rel=1e-7)
        assert said[2][0] == "DisagreementError" and "nothing at all on 1 of 2 ranks" in said[2][1]


def given_nothing_from_the_first() -> list[float]:
    """Rank 1 never has anything; gradients, which are new in each step."""
    return [
        float(distnorm.get_total_norm([torch.full((4,), 2.0 * step)] if rank() == 0 else []))
        for step in (1, 2, 3)
    ]


def test_a_rank_that_is_given_nothing_follows(ranks):
    assert ranks(2, given_nothing_from_the_first, timeout=TIMEOUT) == [[4.0, 8.0, 12.0]] * 2


def unreduced_beside_a_rank_that_is_given_nothing(of_gradients: bool) -> list[Heard]:
    """Rank 2 has no plan, and so no tolerance to judge the difference of replicas by."""
    said = []
    for step in range(3):
        parameter = with_gradient(1.0, 2.0 + (rank() if step == 2 else 0.0))
        target = [("w", parameter if of_gradients else parameter.grad)] if rank() < 2 else []
        measure = distnorm.clip_grad_norm_ if of_gradients else distnorm.get_total_norm
        said.append(
            heard(lambda m=measure, t=target: m(t, **({"max_norm": math.inf} if of_gradients else {})))
        )
    return said


@pytest.mark.parametrize("of_gradients", [True, False])
def test_unreduced_replicas_beside_a_rank_that_is_given_nothing_are_refused_on_all(ranks, of_gradients):
    for said in ranks(3, unreduced_beside_a_rank_that_is_given_nothing, of_gradients, timeout=TIMEOUT):
        assert said[0] == said[1] == ("", pytest.approx(5**0.5))
        assert said[2][0] == "ReplicaError" and "'w'" in said[2][1]


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
    assert ranks(2, of_a_group_that_is_made_anew) == [[2, 19]] * 2


# ---- the three forms: packed, packed with an element that compares replicas, and full


def summary(reduced: ReducedStatistics) -> dict[str, Any]:
    difference = reduced.replica_difference
    return {
        "norm": float(reduced.total_norm),
        "payload": reduced.payload.tolist(),
        "agreed": bool(reduced.agreed),
        "packed": reduced.is_packed,
        "difference": None if difference is None else float(difference),
    }


def in_every_form(payload_length: int, odd: dict[int, Header]) -> dict[str, Any]:
    """One vector of each form: statistics 9 and 16, payloads of rank + 1, replica summands that differ by
    0.5."""
    header = odd.get(rank(), Header("measure", True, terms=5))
    statistic = torch.tensor([9.0, 16.0], dtype=torch.float64)[rank()].view(1)
    payload = torch.full((payload_length,), rank() + 1.0, dtype=torch.float64)
    found: dict[str, Any] = {}
    for form in ("packed", "packed and compared", "full"):
        group = Ranks(dist.new_group())
        exchange = Exchange(group, norm(2))
        group.state.compares_replicas = "compared" in form
        if form == "full":
            exchange.use_full_form()
        given_ = statistic if header.has_statistic else None
        reduced = exchange(given_, header, payload, (1.5, -1.0)[rank()])
        decoded = {} if reduced.agreed else reduced.decode().values
        found[form] = {**summary(reduced), "decoded": decoded}
    return found


@pytest.mark.parametrize("payload_length", [0, 3])
def test_all_forms_give_the_same_norm_payload_and_comparison(ranks, payload_length):
    for found in ranks(2, in_every_form, payload_length, {}, timeout=TIMEOUT):
        for form, seen in found.items():
            assert seen["norm"] == 5.0 and seen["agreed"], form
            assert seen["payload"] == [3.0] * payload_length, form
            assert seen["packed"] == (form != "full")
            assert seen["difference"] == (None if form == "packed" else 0.5)


@pytest.mark.parametrize("payload_length", [0, 2])
@pytest.mark.parametrize(
    ("odd", "shown"),
    [
        (Header("plan", True), {"plan": 1, "measure": 1}),
        (Header("agree", True), {"agree": 1, "measure": 1}),
        (Header("join", True), {"measure": 1}),
        (Header("measure", True, refused=True, terms=5), {"measure": 2, "refused": 1}),
        (Header("measure", True, terms=6), {"measure": 2, "refused": 0}),
    ],
    ids=["plan", "agree", "join", "refused", "terms"],
)
def test_all_forms_show_the_same_disagreement(ranks, odd: Header, shown: dict[Stage, int], payload_length):
    """But for a rank that joins: in the full form, where a rank may be given nothing, its zero counts."""
    for found in ranks(2, in_every_form, payload_length, {1: odd}, timeout=TIMEOUT):
        for form, seen in found.items():
            if odd.stage == "join" and form == "full":
                assert seen["norm"] == 3.0 and seen["agreed"]
                continue
            assert math.isnan(seen["norm"]) and not seen["agreed"], form
            assert {key: seen["decoded"][key] for key in shown} == shown, form


def not_raising_in_packed_form() -> dict[str, float]:
    """Rank 1 goes on without reading, so rank 0 may not wait for a second exchange with it."""
    group = Ranks(dist.new_group())
    exchange = Exchange(group, norm(2))
    nonraising = rank() == 1
    reduced = exchange(torch.ones(1, dtype=torch.float64), Header("measure", not nonraising, terms=rank()))
    return {} if nonraising else dict(reduced.decode().values)


def test_a_rank_that_decodes_does_not_wait_for_one_that_does_not(ranks):
    decoded, _ = ranks(2, not_raising_in_packed_form, timeout=TIMEOUT)
    assert decoded["nonraising"] == 1 and decoded["measure"] == 1
