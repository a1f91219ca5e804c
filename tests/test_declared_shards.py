"""Plain tensors that are declared to be pieces: hand-written tensor parallelism, without DTensor."""

from __future__ import annotations

import logging
import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import distnorm
from distnorm import testing
from distnorm.testing import dense_norm
from tests.counting import as_on_an_accelerator

testing.preload("tests.counting")

SHAPES = {"0.qkv.weight": (8, 6), "0.out.weight": (6, 8), "0.norm.weight": (6,)}
CUTS = {"0.qkv.weight": 0, "0.out.weight": 1}


def whole(name: str, what: int) -> Tensor:
    seed = sorted(SHAPES).index(name) * 2 + what
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def truth() -> float:
    return dense_norm({name: whole(name, 1) for name in SHAPES})


def held(tp: int, at: int) -> dict[str, nn.Parameter]:
    """What one of `tp` ranks holds, with gradients."""
    parameters = {}
    for name in SHAPES:
        value, gradient = whole(name, 0), whole(name, 1)
        if name in CUTS:
            value, gradient = (t.chunk(tp, CUTS[name])[at].contiguous() for t in (value, gradient))
        parameters[name] = nn.Parameter(value)
        parameters[name].grad = gradient
    return parameters


def tensor_parallel(by: str) -> dict[str, Any]:
    """Two groups of two ranks, which are replicas of each other, and the argument that says so."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    at, group = mesh.get_local_rank("tp"), mesh.get_group("tp")
    if by == "function":
        return {"sharded": lambda name, tensor: piece(name, tensor, at)}
    given = {"group": group, "mesh": mesh["tp"]}[by]
    return {"sharded": {"*.qkv.weight": (0, given), "*.out.weight": (-1, given)}}


def piece(name: str, tensor: Tensor, at: int) -> distnorm.Piece | None:
    if name not in CUTS:
        return None
    dim, size = CUTS[name], tensor.shape[CUTS[name]]
    extents = [(0, n) for n in tensor.shape]
    extents[dim] = (at * size, (at + 1) * size)
    return distnorm.Piece(tuple(extents), SHAPES[name])


def by_clipper(by: str) -> list[float]:
    said = tensor_parallel(by)
    parameters = held(2, dist.get_rank() % 2)
    clipper = distnorm.GradClipper(parameters, {"clip": {"max_norm": 1.0}}, **said)
    norms = []
    for _ in range(3):  # the first is read with care, and the others by address
        for name, parameter in held(2, dist.get_rank() % 2).items():
            parameters[name].grad = parameter.grad
        norms.append(float(clipper.clip().total_norm))
    return [*norms, float(clipper.measure().total_norm)]


@pytest.mark.parametrize("by", ["group", "mesh", "function"])
def test_a_clipper_counts_each_declared_piece_once(ranks, by):
    for norms in ranks(4, by_clipper, by):
        assert norms == pytest.approx([truth()] * 3 + [1.0], rel=1e-6)


def by_functions() -> list[float]:
    said = tensor_parallel("group")
    parameters = held(2, dist.get_rank() % 2)
    found = distnorm.get_total_norm({name: p.grad for name, p in parameters.items()}, **said)
    clipped = distnorm.clip_grad_norm_(parameters, 0.5, **said)
    again = distnorm.clip_grad_norm_(parameters, float("inf"), **said)
    return [float(found), float(clipped), float(again)]


def test_functions_take_declared_pieces(ranks):
    for norms in ranks(4, by_functions):
        assert norms == pytest.approx([truth(), truth(), 0.5], rel=1e-6)


def uneven_runs() -> float:
    """A flat buffer cut anywhere, under names of its own."""
    value, gradient = whole("0.qkv.weight", 0).view(-1), whole("0.qkv.weight", 1).view(-1)
    start, stop = ((0, 17), (17, 48))[dist.get_rank()]
    flat = nn.Parameter(value[start:stop].clone())
    flat.grad = gradient[start:stop].clone()
    said = {"sharded": lambda name, tensor: distnorm.Piece(((start, stop),), (8, 6), "0.qkv.weight")}
    return float(distnorm.GradClipper([(f"flat{start}", flat)], **said).clip().total_norm)


def test_a_function_may_give_names_and_runs_of_any_length(ranks):
    assert ranks(2, uneven_runs) == [pytest.approx(dense_norm({"0": whole("0.qkv.weight", 1)}), rel=1e-6)] * 2


def always(stop: int, name: str, tensor: Tensor) -> distnorm.Piece | None:
    return distnorm.Piece(((0, stop), (0, 6)), (8, 6)) if "qkv" in name else None


def four_rows(start: int, name: str, tensor: Tensor) -> distnorm.Piece:
    return distnorm.Piece(((start, start + 4), (0, 6)), (8, 6))


def refused(what: str) -> None:
    group = dist.new_group([0, 1])
    rank = dist.get_rank()
    said: Any = {"*.qkv.weight": (0, group), "*.out.weight": (1, group)}
    parameters = held(2, rank)
    if what == "nothing":
        said = None
    elif what == "pattern":
        said["*.qvk.weight"] = said.pop("*.qkv.weight")
    elif what == "dim":
        said["*.out.weight"] = (2, group)
    elif what == "group":
        other = dist.new_group([0])
        said["*.out.weight"] = (1, other if rank else group)
    elif what == "dims that differ":
        said["*.out.weight"] = (rank, group)
    elif what == "shape":
        said = partial(always, 3)
    elif what == "overlap":
        said = partial(always, 4)
        parameters.pop("0.out.weight")
    elif what == "overlap that adds up":
        rows = rank * 2
        parameters = {"0.qkv.weight": nn.Parameter(whole("0.qkv.weight", 0)[rows : rows + 4])}
        said = partial(four_rows, rows)
    elif what == "uneven":
        said["*.norm.weight"] = (0, group)
        parameters["0.norm.weight"] = nn.Parameter(whole("0.norm.weight", 0)[: 4 - rank])
    distnorm.GradClipper(parameters, sharded=said)


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("nothing", distnorm.ReplicaError, r"0\.qkv\.weight.*sharded=\{"),
        ("pattern", distnorm.ConfigError, r"'\*\.qvk\.weight'.*fit none on any rank"),
        ("dim", distnorm.ConfigError, r"\*\.out\.weight.*dim of '0\.out\.weight'.*found 2"),
        ("group", distnorm.ConfigError, r"\*\.out\.weight.*this rank is in"),
        ("dims that differ", distnorm.DisagreementError, r"sharded: expected the same"),
        ("shape", distnorm.ConfigError, r"0\.qkv\.weight.*\(3, 6\).*found the shape \(4, 6\)"),
        ("overlap", distnorm.CoverageError, r"0\.qkv\.weight.*24 of 48"),
        ("overlap that adds up", distnorm.CoverageError, r"0\.qkv\.weight.*each element once.*\(2, 6\)"),
        ("uneven", distnorm.CoverageError, r"0\.norm\.weight"),
    ],
)
def test_what_is_declared_wrongly_is_refused_on_all_ranks(ranks, what, kind, text):
    failures = ranks(2, refused, what, expect_errors=True)
    assert len(failures) == 2
    for failure in failures:
        assert failure.type_name == kind.__name__, failure
        assert re.search(text, failure.message.replace("\n", " ")), failure.message


def test_a_piece_lies_within_its_parameter():
    with pytest.raises(distnorm.ConfigError, match=r"\(start, stop\) within \(8, 6\)"):
        distnorm.Piece(((0, 9), (0, 6)), (8, 6))
    with pytest.raises(distnorm.ConfigError, match="process group"):
        distnorm.GradClipper([torch.ones(2, requires_grad=True)], sharded={"0": (0, None)})


def test_a_piece_may_be_spelt_with_lists_and_a_size():
    spelt: Any = [[0, 4], [0, 6]]
    assert distnorm.Piece(spelt, torch.Size((8, 6))) == distnorm.Piece(((0, 4), (0, 6)), (8, 6))
    with pytest.raises(distnorm.ConfigError, match="of integers"):
        distnorm.Piece((0, 4), (8,))  # type: ignore[arg-type]


def blocks_runs_and_a_text() -> float:
    """Pieces of one parameter, described in each way."""
    value, gradient = whole("0.qkv.weight", 0), whole("0.qkv.weight", 1)
    rank, ends = dist.get_rank(), (0, 2, 5, 8)
    start, stop = ends[rank], ends[rank + 1]
    extents = [((start, stop), (0, 6)), ((start * 6, stop * 6),), ("the rest", (0, 6))][rank]
    held = nn.Parameter(value[start:stop].reshape(-1) if rank == 1 else value[start:stop])
    held.grad = gradient[start:stop].reshape(held.shape)
    said = {"sharded": lambda name, tensor: distnorm.Piece(extents, (8, 6))}
    return float(distnorm.GradClipper([("0.qkv.weight", held)], **said).clip().total_norm)


def test_a_function_may_give_blocks_runs_and_texts_of_one_parameter(ranks):
    norm = dense_norm({"0": whole("0.qkv.weight", 1)})
    assert ranks(3, blocks_runs_and_a_text) == [pytest.approx(norm, rel=1e-6)] * 3


def dtensor_declared() -> None:
    mesh = init_device_mesh("cpu", (2,))
    tensor = nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Replicate()]))
    distnorm.GradClipper([("w", tensor)], sharded={"w": (0, mesh.get_group())})


def test_a_dtensor_says_itself_which_piece_it_is(ranks):
    for failure in ranks(2, dtensor_declared, expect_errors=True):
        assert failure.type_name == "ConfigError" and "placements say" in failure.message


def alike(what: str, which: int = 0) -> Tensor:
    seed = sum(map(ord, what)) + 1000 * which
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


ONES = torch.ones(8, 6)
COPIES = {  # of each: values, and gradients in three steps, by the place in the group
    "copies": lambda at: (alike("v"), [alike("g")] * 3),
    "norm of ones": lambda at: (ONES, [alike("g")] * 3),
    "key heads": lambda at: (alike("v", at // 2), [alike("g", at // 2)] * 3),
    "late": lambda at: (ONES, [0 * ONES, alike("g"), alike("g")]),
}
PIECES = {
    "ones of ones": lambda at: (ONES, [ONES] * 3),
    "last layer": lambda at: (alike("v", at), [alike("g")] * 3),
    "norm that is cut": lambda at: (ONES, [alike("g", at)] * 3),
    "bias that is cut": lambda at: (0 * ONES, [0 * ONES, alike("g", at), alike("g", at)]),
}


def warned(tp: int, on: str) -> list[list[str]]:
    """The warnings of each step, with a replica of each piece where `tp` is not the number of ranks."""
    mesh = init_device_mesh("cpu", (4 // tp, tp), mesh_dim_names=("dp", "tp"))
    at = mesh.get_local_rank("tp")
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distnorm").addHandler(handler)
    steps = []
    with as_on_an_accelerator() if on == "accelerator" else nullcontext():
        held = {name: case(at) for name, case in (COPIES | PIECES).items()}
        parameters = {name: nn.Parameter(values.clone()) for name, (values, _) in held.items()}
        clipper = distnorm.GradClipper(parameters, sharded={"*": (0, mesh.get_group("tp"))})
        for step in range(3):
            for name, parameter in parameters.items():
                parameter.grad = held[name][1][step].clone()
            clipper.clip()
            steps.append(told[:])
            told.clear()
    return steps


@pytest.mark.parametrize(("tp", "on"), [(4, "host"), (2, "host"), (2, "accelerator")])
def test_copies_that_are_declared_to_be_pieces_are_named_once_and_pieces_are_not(ranks, tp, on):
    first, *others = ranks(4, warned, tp, on)
    assert others == [[[], [], []]] * 3
    (at_once,), (late,), last = first
    assert re.findall(r"parameter '([^']*)'", at_once) == ["copies", "key heads", "norm of ones"]
    assert re.findall(r"parameter '([^']*)'", late) == ["late"]
    assert re.search(r"\[0:8, 0:6\] with values and gradient of another piece.* on rank", late)
    assert "leave it out of sharded=" in late and "the norm is right" in late
    assert last == []
