"""`GradClipper` and `ClipResult`: what is found, what is changed, and what is left alone to the last bit."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import distnorm
from distnorm.measure import diagnosis
from tests import oracle
from tests.refusals import TIMEOUT, Heard, clipper, heard, rank, with_gradient, with_ones

FLAGS = ("is_finite", "was_clipped", "skipped")
FIELDS = ("total_norm", "clip_coef", "clipped_norm", "threshold", *FLAGS)


# ---- one process, no process group


def test_hand_chosen_numbers():
    tensors = [with_gradient(3.0, 0.0), with_gradient(-4.0, dtype=torch.float64)]
    clipping = clipper(tensors, max_norm=2.0)
    coef = 2.0 / (5.0 + 1e-6)
    unchanged = {"total_norm": 5.0, "clip_coef": 1.0, "clipped_norm": 5.0, "threshold": 2.0}
    flags = {"is_finite": True, "was_clipped": False, "skipped": False}
    assert clipping.measure().to_dict() == {**unchanged, **flags}
    result = clipping.clip()
    clipped = {"total_norm": 5.0, "clip_coef": coef, "clipped_norm": 5.0 * coef, "threshold": 2.0}
    flags = {"is_finite": True, "was_clipped": True, "skipped": False}
    assert result.to_dict() == pytest.approx({**clipped, **flags}, rel=1e-15)
    assert tensors[1].grad.item() == -4.0 * result.clip_coef.item()
    assert tensors[0].grad.tolist() == [float(torch.tensor(3.0) * torch.tensor(coef)), 0.0]
    assert clipping.clip().total_norm.item() == pytest.approx(5.0 * coef, rel=1e-7)


def test_results_are_0d_tensors_on_the_gradients_device():
    result = clipper([with_gradient(3.0, 4.0)]).clip()
    for name in FIELDS:
        value = getattr(result, name)
        assert value.shape == ()
        assert value.device.type == "cpu"
        assert value.dtype == (torch.bool if name in FLAGS else torch.float64), name
    assert [type(value) for value in result.to_dict().values()] == [float] * 4 + [bool] * 3
    assert tuple(result.to_dict()) == FIELDS


@pytest.mark.parametrize("max_norm", [None, math.inf])
def test_no_threshold_only_measures(max_norm):
    tensor = with_gradient(3.0, 4.0)
    before = oracle.bits(tensor.grad)
    result = clipper([tensor], max_norm=max_norm).clip().to_dict()
    assert (result["total_norm"], result["clip_coef"], result["threshold"]) == (5.0, 1.0, math.inf)
    assert oracle.bits(tensor.grad) == before


def test_a_threshold_of_zero_makes_every_gradient_zero():
    tensor = with_gradient(3.0, -4.0)
    result = clipper([tensor], max_norm=0.0).clip().to_dict()
    assert (result["clip_coef"], result["clipped_norm"], result["was_clipped"]) == (0.0, 0.0, True)
    assert tensor.grad.tolist() == [0.0, 0.0]


def test_nothing_at_all_has_norm_zero():
    for target in ([], nn.Identity(), [nn.Parameter(torch.ones(3))], [nn.Parameter(torch.ones(0))]):
        result = clipper(target).clip().to_dict()
        assert (result["total_norm"], result["clip_coef"], result["is_finite"]) == (0.0, 1.0, True)


SPECIAL = {
    torch.float32: "<I", torch.float64: "<Q", torch.float16: "<H", torch.bfloat16: "<H",
}  # fmt: skip
PATTERNS = {  # -0.0, a NaN with a payload, a negative one, subnormals, inf
    torch.float32: [0x80000000, 0x7FC12345, 0xFFC00001, 1, 0x807FFFFF, 0x7F800000],
    torch.float64: [
        1 << 63,
        0x7FF8000012345678,
        0xFFF8000000000001,
        1,
        0x800FFFFFFFFFFFFF,
        0x7FF0000000000000,
    ],
    torch.float16: [0x8000, 0x7E12, 0xFE01, 1, 0x83FF, 0x7C00],
    torch.bfloat16: [0x8000, 0x7FD2, 0xFFC1, 1, 0x807F, 0x7F80],
}


@pytest.mark.parametrize("dtype", SPECIAL, ids=str)
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "with NaN and inf"])
@pytest.mark.parametrize("call", ["clip", "measure", "clip_grad_norm_"])
def test_a_coefficient_of_1_leaves_every_bit_alone(dtype, finite, call):
    patterns = [p for i, p in enumerate(PATTERNS[dtype]) if not finite or i in (0, 3, 4)]
    raw = b"".join(struct.pack(SPECIAL[dtype], pattern) for pattern in patterns)
    tensor = nn.Parameter(torch.zeros(len(patterns), dtype=dtype))
    tensor.grad = torch.frombuffer(bytearray(raw), dtype=dtype)
    assert oracle.bits(tensor.grad) == raw
    if call == "clip_grad_norm_":
        distnorm.clip_grad_norm_([tensor], 1.0 if finite else math.inf)
    else:
        assert getattr(clipper([tensor], "skip"), call)().clip_coef.item() == 1.0
    assert oracle.bits(tensor.grad) == raw


# ---- state


def test_the_state_goes_round():
    clipping, other = clipper([with_gradient(1.0)]), clipper([with_gradient(1.0)])
    for _ in range(3):
        clipping.clip()
    clipping.measure()
    state = clipping.state_dict()
    assert state == torch.load(_saved(state), weights_only=True)
    other.load_state_dict(state)
    other.clip(), clipping.clip()
    assert other.state_dict() == clipping.state_dict() != state


def _saved(state: dict[str, Any]) -> Any:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("state", [{}, {"version": 99, "steps": 0}, {"version": 1, "steps": "many"}])
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(distnorm.DistnormError, match="expected"):
        clipper([with_gradient(1.0)]).load_state_dict(state)


# ---- targets


def test_targets_of_every_kind_are_one_model():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    targets = [
        model,
        [model[0], model[1]],
        list(model.parameters()),
        model.parameters(),
        list(model.named_parameters()),
        model.named_parameters(),
        dict(model.named_parameters()),
    ]
    for target in targets:
        clipping = clipper(target, max_norm=100.0)
        assert [clipping.clip().total_norm.item() for _ in range(2)] == [math.sqrt(11)] * 2
    assert clipper(model[0].weight).measure().total_norm.item() == math.sqrt(6)


def test_a_shared_parameter_counts_once():
    tok, head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
    head.weight = tok.weight
    with_ones(tok.weight)
    assert clipper(nn.ModuleDict({"tok": tok, "head": head})).measure().total_norm.item() == math.sqrt(12)


@pytest.mark.parametrize(
    "target", [[1.0], "weights", [torch.ones(1), None], [("a", torch.ones(1), 1)], 3, None]
)
def test_a_target_that_is_none_is_refused(target):
    with pytest.raises(distnorm.DistnormError, match="expected"):
        clipper(target)


def test_gradients_in_the_place_of_parameters_are_refused():
    with pytest.raises(distnorm.DistnormError, match="expected parameters"):
        clipper([torch.ones(3), torch.ones(2)])


def test_a_step_without_any_gradient_is_warned_of_once(caplog, monkeypatch):
    monkeypatch.setattr(diagnosis, "_said", set())
    model = nn.Linear(2, 2)
    clipping = clipper(model)
    for _ in range(3):
        assert clipping.clip().total_norm.item() == 0.0
    said = [r.getMessage() for r in caplog.records if r.name == "distnorm"]
    assert len(said) == 1 and said[0].startswith("no parameter has a gradient on any rank")


def test_frozen_parameters_are_no_gradients():
    model = nn.Linear(2, 2)
    model.requires_grad_(False)
    assert clipper(model).clip().total_norm.item() == 0.0


# ---- pipeline stages


def stages_with_the_same_names(with_mesh: bool) -> Heard:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    part = nn.Linear(2, 2, bias=False)  # every stage calls its weight so
    with torch.no_grad():
        part.weight.fill_(1.0 + rank() // 2)
    part.weight.grad = torch.full((2, 2), 1.0 + rank() // 2)
    return heard(lambda: clipper(part, pp_mesh=mesh["pp"] if with_mesh else None).measure())


def test_stages_that_use_the_same_names_need_pp_mesh(ranks):
    assert ranks(4, stages_with_the_same_names, True, timeout=TIMEOUT) == [("", pytest.approx(20**0.5))] * 4
    assert {said[0] for said in ranks(4, stages_with_the_same_names, False, timeout=TIMEOUT)} == {
        "ReplicaError"
    }
