"""What a norm that is not finite does to the gradients, and that all ranks see it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.tensor import Shard

import distnorm
from tests import oracle
from tests.refusals import TIMEOUT, Heard, clipper, distributed, heard, rank, with_gradient

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, 20.0, math.inf])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "zero", "propagate"])
def test_nonfinite_modes(nonfinite, order, bad):
    tensors = [with_gradient(1.0, BAD[bad]), with_gradient(2.0, dtype=torch.bfloat16)]
    before = [oracle.bits(tensor.grad) for tensor in tensors]
    config = {"norm": {"type": order}, "clip": {"max_norm": 1.0, "nonfinite": nonfinite}}
    clipping = distnorm.GradClipper(tensors, config)
    if nonfinite == "raise":
        with pytest.raises(
            distnorm.NonFiniteGradientError, match=r"(?s)finite.*found (nan|inf).*'0' on rank 0"
        ) as caught:
            clipping.clip()
        assert isinstance(caught.value, RuntimeError)
        assert [oracle.bits(tensor.grad) for tensor in tensors] == before
        return
    result = clipping.clip().to_dict()
    assert not result["is_finite"]
    assert str(result["total_norm"]) == bad.lstrip("-")
    if nonfinite == "skip":
        assert [oracle.bits(tensor.grad) for tensor in tensors] == before
        assert (result["clip_coef"], result["was_clipped"]) == (1.0, False)
    elif nonfinite == "zero":
        assert [tensor.grad.tolist() for tensor in tensors] == [[0.0, 0.0], [0.0]]
        assert (result["clip_coef"], result["clipped_norm"]) == (0.0, 0.0)
    else:
        expected = [with_gradient(1.0, BAD[bad]), with_gradient(2.0, dtype=torch.bfloat16)]
        torch.nn.utils.clip_grad_norm_(expected, 1.0, order)
        for tensor, one in zip(tensors, expected, strict=True):
            assert torch.equal(tensor.grad.nan_to_num(7), one.grad.nan_to_num(7))


def test_a_good_step_after_a_bad_one():
    tensor = with_gradient(math.nan)
    clipping = clipper([tensor], "raise", max_norm=1.0)
    with pytest.raises(distnorm.NonFiniteGradientError):
        clipping.clip()
    tensor.grad = torch.tensor([0.5])
    assert clipping.clip().total_norm.item() == 0.5


def bad_value_on_one_rank(order: float, value: float, nonfinite: str) -> tuple[Heard, Heard]:
    """Six elements over four ranks: 2, 2, 2 and none; the bad one is on rank 1."""
    tensor = distributed((4,), [Shard(0)], 6)
    if rank() == 1:
        tensor.grad.to_local()[1] = value
    config = {"norm": {"type": order}, "clip": {"max_norm": 1.0, "nonfinite": nonfinite}}
    clipping = distnorm.GradClipper([("layer.weight", tensor)], config)
    said = heard(clipping.clip)
    tensor.grad = torch.ones_like(tensor)
    return said, heard(clipping.clip)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("order", [2.0, 20.0, math.inf])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.slow
def test_one_rank_s_bad_value_is_seen_by_all(ranks, order, value, nonfinite):
    for said, after in ranks(4, bad_value_on_one_rank, order, value, nonfinite, timeout=TIMEOUT):
        if nonfinite == "raise":
            assert said[0] == "NonFiniteGradientError"
            assert "'layer.weight' on rank 1" in said[1]
        else:
            assert repr(said) == repr(("", value))
        assert after == ("", pytest.approx(6 ** (1 / order) if order < math.inf else 1.0))


def test_a_finite_step_under_zero_touches_no_gradient():
    tensor = with_gradient(0.3, 0.4)
    version = tensor.grad._version
    clipper([tensor], "zero", max_norm=1.0).clip()
    assert tensor.grad._version == version
