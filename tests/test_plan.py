"""What can't be measured correctly is refused: on every rank, by name, in bounded time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import distnorm
from tests.refusals import TIMEOUT, Heard, clipper, distributed, heard, parameter, rank, with_ones


def refused(reports: list[Heard], kind: str, *words: str) -> None:
    """Every rank raised this kind, and every message has these words."""
    for said in reports:
        assert said[0] == kind, reports
        assert all(word in said[1] for word in words), (words, said)


# ---- claims that the plan checks


def replicas_with_other_values() -> Heard:
    same, other = with_ones(parameter(3)), with_ones(parameter(4, 3, seed=rank() // 3))
    return heard(lambda: clipper([("same", same), ("layer.weight", other)]))


def test_a_wrong_replica_claim_is_refused(ranks):
    words = (
        "'layer.weight'",
        "expected replicas with the same values",
        "checksum",
        "ranks [0, 1, 2]",
        "rank 3",
    )
    reports = ranks(4, replicas_with_other_values, timeout=TIMEOUT)
    refused(reports, "ReplicaError", *words)
    assert not any("'same'" in message for _, message in reports)


def one_changed_bit(kind: str) -> Heard:
    tensor = parameter(1001, dtype=getattr(torch, kind))
    if rank() == 1:
        with torch.no_grad():
            tensor[1000] = -tensor[1000]
    return heard(lambda: clipper([("w", tensor)]))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64", "complex64"])
def test_one_bit_of_one_replica_is_enough(ranks, kind):
    refused(ranks(2, one_changed_bit, kind, timeout=TIMEOUT), "ReplicaError", "'w'")


def exchanged_elements() -> Heard:
    tensor = torch.tensor([1.0, 2.0, 3.0] if rank() else [1.0, 3.0, 2.0])
    return heard(lambda: clipper([("w", nn.Parameter(tensor))]))


def test_replicas_with_the_same_elements_in_another_order_are_refused(ranks):
    refused(ranks(2, exchanged_elements, timeout=TIMEOUT), "ReplicaError", "'w'")


def shard_left_out(missing: int) -> Heard:
    tensor, other = distributed((4,), [Shard(0)], 6, 5), with_ones(parameter(2))
    named = [("other", other), ("layer.weight", tensor)]
    return heard(lambda: clipper(named[: 1 if rank() == missing else 2]))


@pytest.mark.parametrize(("missing", "elements"), [(0, "20 of 30"), (2, "20 of 30")])
def test_a_missing_shard_is_refused(ranks, missing, elements):
    reports = ranks(4, shard_left_out, missing, timeout=TIMEOUT)
    refused(reports, "CoverageError", "'layer.weight'", "expected", elements, "10 missing", "rank")


def overlapping_pieces() -> Heard:
    half = distributed((4,), [Shard(0)], 6, 5)
    whole = with_ones(parameter(6, 5))
    return heard(lambda: clipper([("layer.weight", half if rank() < 3 else whole)]))


def test_pieces_that_overlap_are_refused(ranks):
    reports = ranks(4, overlapping_pieces, timeout=TIMEOUT)
    refused(reports, "CoverageError", "'layer.weight'", "60 of 30", "30 counted twice", "rank 3")


def one_name_for_two_shapes() -> Heard:
    return heard(lambda: clipper([("layer.weight", with_ones(parameter(4, 4 + rank())))]))


def test_stages_that_use_one_name_for_other_shapes_are_refused(ranks):
    reports = ranks(2, one_name_for_two_shapes, timeout=TIMEOUT)
    refused(reports, "CoverageError", "'layer.weight'", "rank 0", "rank 1", "pp_mesh")


def local_tensor_unlike_its_placements() -> Heard:
    mesh = init_device_mesh("cpu", (2,))
    local = torch.ones(3 if rank() == 0 else 4, 5)
    tensor = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(6, 5), stride=(5, 1))
    return heard(lambda: clipper([("layer.weight", nn.Parameter(tensor))]))


def test_a_local_tensor_that_is_not_what_its_placements_say_is_refused(ranks):
    reports = ranks(2, local_tensor_unlike_its_placements, timeout=TIMEOUT)
    refused(reports, "UnsupportedGradientError", "'layer.weight'", "(3, 5)", "(4, 5)", "rank 1")


def two_names_alike(on: int) -> Heard:
    named = [("w", with_ones(parameter(3))), ("w" if rank() == on else "v", with_ones(parameter(3)))]
    return heard(lambda: clipper(named))


def test_two_tensors_of_one_name_are_refused(ranks):
    reports = ranks(2, two_names_alike, 1, timeout=TIMEOUT)
    refused(reports, "DistnormError", "'w'", "rank 1", "expected one tensor for each name")


# ---- terms


def other_terms(term: str) -> Heard:
    theirs: dict[str, Any] = {"max_norm": 1.0, "type": 2.0, "nonfinite": "raise", "tied": ()}
    if rank() == 2:
        theirs |= {"max_norm": 2.5, "type": 3.0, "nonfinite": "skip", "tied": [("w", "v")]}
    chosen = {"max_norm": 1.0, "type": 2.0, "nonfinite": "raise", "tied": (), term: theirs[term]}
    config = {"norm": {"type": chosen["type"]}, "clip": {k: chosen[k] for k in ("max_norm", "nonfinite")}}
    named = [("w", with_ones(parameter(3))), ("v", with_ones(parameter(3)))]
    return heard(lambda: distnorm.GradClipper(named, config, tied=chosen["tied"]))


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ("max_norm", ("clip.max_norm", "1.0", "2.5")),
        ("type", ("norm.type", "2.0", "3.0")),
        ("nonfinite", ("clip.nonfinite", "'raise'", "'skip'")),
        ("tied", ("tied", "'v'")),
    ],
)
def test_a_rank_with_other_terms_is_named(ranks, term, words):
    refused(
        ranks(3, other_terms, term, timeout=TIMEOUT), "DisagreementError", *words, "ranks [0, 1]", "rank 2"
    )


def misspelt_tied_name() -> Heard:
    named = [("tok.weight" if rank() == 0 else "head.weight", with_ones(parameter(3)))]
    return heard(lambda: clipper(named, tied=[("tok.weight", "heat.weight")]))


def test_a_tied_name_that_nobody_has_is_refused(ranks):
    refused(ranks(2, misspelt_tied_name, timeout=TIMEOUT), "ConfigError", "heat.weight")


def bad_numbers(call: str, value: float, ranks_with_it: tuple[int, ...]) -> Heard:
    tensor = with_ones(parameter(3))
    bad = rank() in ranks_with_it
    if call == "norm.type":
        return heard(lambda: distnorm.GradClipper([("w", tensor)], {"norm": {"type": value if bad else 2.0}}))
    if call == "clip.max_norm":
        return heard(lambda: clipper([("w", tensor)], max_norm=value if bad else 1.0))
    if call == "norm_type":
        return heard(lambda: distnorm.get_total_norm([tensor.grad], value if bad else 2.0))
    return heard(lambda: distnorm.clip_grad_norm_([tensor], value if bad else 1.0))


@pytest.mark.parametrize("who", [(0, 1), (1,)], ids=["on all ranks", "on one rank"])
@pytest.mark.parametrize(
    ("call", "value"),
    [
        *((call, value) for call in ("norm.type", "norm_type") for value in (0.0, -2.0, math.nan)),
        *((call, value) for call in ("clip.max_norm", "max_norm") for value in (-1.0, math.nan, -math.inf)),
    ],
)
def test_orders_and_thresholds_that_are_none_are_refused(ranks, call, value, who):
    reports = ranks(2, bad_numbers, call, value, who, timeout=TIMEOUT)
    refused(reports, "ConfigError", call.rpartition(".")[2], *(["rank 1"] if who == (1,) else []))


# ---- what works although it looks odd


def rank_outside_the_mesh() -> Heard:
    """Everybody holds the DTensor, but only ranks 0 and 1 are in its mesh."""
    mesh = init_device_mesh("cpu", (4,))
    part = DeviceMesh("cpu", [0, 1])
    local = torch.full((2, 3) if rank() < 2 else (0,), 2.0)
    spec: dict[str, Any] = {"run_check": False, "shape": (4, 3), "stride": (3, 1)}
    tensor = nn.Parameter(DTensor.from_local(local, part, [Shard(0)], **spec))
    tensor.grad = DTensor.from_local(local.clone(), part, [Shard(0)], **spec)
    other = nn.Parameter(DTensor.from_local(torch.ones(1), mesh, [Replicate()], run_check=False))
    other.grad = DTensor.from_local(torch.ones(1), mesh, [Replicate()], run_check=False)
    return heard(lambda: clipper([("w", tensor), ("v", other)]).measure())


def test_ranks_outside_a_mesh_hold_nothing_of_its_tensors(ranks):
    assert ranks(4, rank_outside_the_mesh, timeout=TIMEOUT) == [("", 7.0)] * 4  # 12 * 4 + 1


def only_some_ranks_belong() -> list[Heard]:
    """Two models on two groups at the same time, and a rank in neither of them."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    if rank() == 4:
        return [heard(lambda: clipper([("w", with_ones(parameter(1)))], group=groups[0]))]
    group, mine = groups[rank() // 2], with_ones(parameter(4 if rank() < 2 else 9, seed=rank() // 2))
    by_group = clipper([("w", mine)], group=group)
    functional = heard(lambda: distnorm.get_total_norm([mine.grad], group=group))
    return [heard(by_group.measure), functional, heard(by_group.clip)]


def test_a_group_measures_for_itself(ranks):
    *members, outsider = ranks(5, only_some_ranks_belong, timeout=TIMEOUT)
    assert members == [[("", 2.0)] * 3] * 2 + [[("", 3.0)] * 3] * 2
    assert outsider[0][0] == "DistnormError"
    assert "member" in outsider[0][1]


def many_shards() -> Heard:
    named = [(f"layers.{i}.{kind}", with_ones(parameter(1 + i % 3))) for i in range(300) for kind in "ab"]
    return heard(clipper(named).measure)


def test_six_hundred_small_parameters_are_planned_at_once(ranks):
    assert ranks(3, many_shards, timeout=TIMEOUT) == [("", math.sqrt(2 * 100 * (1 + 2 + 3)))] * 3
