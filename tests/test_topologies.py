"""Any topology against a dense oracle: the norm, its bits on every rank, and what clipping does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

import distnorm
from tests import oracle
from tests.topologies import (
    DTYPES,
    Held,
    Mesh,
    Topology,
    cut,
    exact_norms,
    local_of,
    make_meshes,
    make_parameters,
    pp_mesh,
    set_gradients,
    whole_gradients,
)

FP32_ROUNDING = 1.2e-7
FP64_ROUNDING = 1e-13
ORDERS = (2.0, 0.5, 1.0, 1.5, 3.0, 7.0, 20.0, math.inf)
SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 0])


# ---- drawing a topology


SHAPES = [(2, 2), (2,), (2, 2, 2), (4, 2), (2, 3), (3, 2), (1, 2), (4,), (3,), (2, 1, 3), (8,), (7,), (1,)]


@st.composite
def meshes_of(draw: st.DrawFn, ranks: int) -> Mesh:
    shape = draw(st.sampled_from([shape for shape in SHAPES if math.prod(shape) <= ranks]))
    who = draw(st.permutations(range(ranks)))[: math.prod(shape)]
    return Mesh(tuple(who if draw(st.booleans()) else sorted(who)), shape)


@st.composite
def layouts(draw: st.DrawFn, mesh: Mesh, ndim: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Placements, and the axes over which the gradient is partial."""
    shards = [f"S{dim}" for dim in range(ndim)]
    kind = draw(st.sampled_from(["strided", "free", "replicated"])) if shards else "replicated"
    if kind == "replicated":
        placements = ["R"] * len(mesh.shape)
    elif kind == "free":
        placements = [draw(st.sampled_from(["R", *shards])) for _ in mesh.shape]
    else:  # as FSDP2 over TP on one dim: the right-most axis cuts first
        text = draw(st.sampled_from(shards))
        placements = [draw(st.sampled_from([text, text, "R"])) for _ in mesh.shape]
        for axis in range(len(mesh.shape)):
            later = [
                n for n, t in zip(mesh.shape[axis + 1 :], placements[axis + 1 :], strict=True) if t == text
            ]
            if placements[axis] == text and later:
                placements[axis] = f"Z{text[1:]}/{math.prod(later)}"
    op = draw(st.sampled_from(["sum", "", "avg"]))
    partial = [op if text == "R" and draw(st.booleans()) else "" for text in placements]
    return tuple(placements), tuple(partial)


@st.composite
def parameters(
    draw: st.DrawFn, meshes: list[tuple[int, Mesh]], ranks: list[int], name: str
) -> dict[str, Any]:
    shape = tuple(draw(SIZES) for _ in range(draw(st.sampled_from([2, 1, 3, 0]))))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    exponent = draw(st.integers(-2, 2)) if dtype == "fp16" else draw(st.integers(-9, 9))
    common = {"name": name, "shape": shape, "dtype": dtype, "exponent": exponent}
    if draw(st.integers(0, 3)) == 0:
        who = draw(st.sets(st.sampled_from(ranks), min_size=1)) if draw(st.booleans()) else ranks
        return {**common, "ranks": tuple(sorted(who))}
    index, mesh = draw(st.sampled_from(meshes))
    placements, partial = draw(layouts(mesh, len(shape)))
    return {**common, "mesh": index, "placements": placements, "partial": partial}


@st.composite
def topologies(draw: st.DrawFn, world: int) -> Topology:
    """Stages, the same meshes in each of them, and other parameters in each of them."""
    stages = draw(st.sampled_from([n for n in (1, 1, 1, 2, 3, 4) if world % n == 0]))
    size = world // stages
    of_a_stage = draw(st.lists(meshes_of(size), min_size=1, max_size=3))
    meshes, held = [], []
    own_names = stages > 1 and draw(st.booleans())
    tied = draw(parameters([(0, of_a_stage[0])], list(range(size)), "tok")) if draw(st.booleans()) else None
    for stage in range(stages):
        shifted = [Mesh(tuple(stage * size + r for r in mesh.ranks), mesh.shape) for mesh in of_a_stage]
        numbered = list(enumerate(shifted, start=len(meshes)))
        ranks = list(range(stage * size, (stage + 1) * size))
        for i in range(draw(st.sampled_from([2, 3, 1, 0]))):
            name = f"layer{i}" if own_names else f"stage{stage}.layer{i}"
            held.append(Held(label=f"{stage}.{i}", **draw(parameters(numbered, ranks, name))))
        if tied and stage in (0, stages - 1):
            moved = {
                **tied,
                "name": "tok" if stage == 0 else "head",
                "ranks": tuple(stage * size + r for r in tied.get("ranks", ())),
                "mesh": None if "ranks" in tied else len(meshes),
            }
            held.append(Held(label="tied", **moved))
        meshes += shifted
    return Topology(
        world,
        tuple(meshes),
        tuple(held),
        order=draw(st.sampled_from(ORDERS)),
        seed=draw(st.integers(0, 99)),
        factor=draw(st.sampled_from([0.5, 2.0])),
        missing=draw(st.sampled_from([0.0, 0.0, 0.3, 0.7])),
        stages=stages if own_names else 1,
        tied=(("tok", "head"),) if tied and stages > 1 else (),
    )


# ---- on every rank


def measure_all(batch: list[Topology]) -> list[list[dict[str, Any]]]:
    return [follow(topology) for topology in batch]


def follow(topology: Topology) -> list[dict[str, Any]]:
    """All steps of one topology, by one clipper and by the functions in turn."""
    held = make_parameters(topology, make_meshes(topology))
    named = [(one.name, parameter) for one, _, parameter in held]
    stages = pp_mesh(topology)
    # A group of its own: a rank that holds nothing of two models can't tell one from the other.
    shared = {"pp_mesh": stages, "tied": topology.tied, "group": dist.new_group()}
    max_norm = topology.factor * (exact_norms(topology)[0] or 1.0)
    terms = {"norm": {"type": topology.order}}
    clipper = distnorm.GradClipper(named, {**terms, "clip": {"max_norm": max_norm}}, **shared)
    seen = []
    for step in range(topology.steps):
        whole = whole_gradients(topology, step)
        set_gradients(topology, held, step)
        before = snapshot(held)
        measured = clipper.measure().to_dict()
        report = {"measured": measured["total_norm"], "measuring changed nothing": snapshot(held) == before}
        if complete(topology, step):
            gradients = [(name, parameter.grad) for name, parameter in named]
            report["get_total_norm"] = distnorm.get_total_norm(gradients, topology.order, **shared).item()
        if step % 2 == 0:
            result = clipper.clip().to_dict()
            report["clip"] = result["total_norm"]
            coef = report["coef"] = result["clip_coef"]
        else:
            total = distnorm.clip_grad_norm_(named, max_norm, topology.order, **shared)
            report["clip_grad_norm_"] = total.item()
            coef = report["coef"] = oracle.coefficient(measured["total_norm"], max_norm)
        report["wrongly scaled"] = [
            one.name
            for one, _, parameter in held
            if parameter.grad is not None
            and not (
                layout(parameter.grad) == layout(parameter)
                and oracle.is_scaled(
                    local_of(parameter.grad), cut(topology, one, whole[one.label], dist.get_rank()), coef
                )
            )
        ]
        seen.append(report)
    return seen


def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Its dtype and its placements, where there is more than one rank to place something on."""
    if not isinstance(tensor, DTensor):
        return (tensor.dtype,)
    sizes = tensor.device_mesh.shape
    return (tensor.dtype, *(p for p, size in zip(tensor.placements, sizes, strict=True) if size > 1))


def snapshot(held: list[Any]) -> list[Any]:
    gradients = [parameter.grad for _, _, parameter in held]
    return [
        None if g is None else (id(g), str(getattr(g, "placements", "")), oracle.bits(local_of(g)))
        for g in gradients
    ]


def complete(topology: Topology, step: int) -> bool:
    return topology.missing == 0 or step == topology.steps - 1


# ---- the tests


# A failing example is plain data and small enough to read; shrinking it by running ranks takes minutes.
RANDOM = settings(
    max_examples=4,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


@pytest.mark.parametrize("world", [1, 2, 3, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 8))])
@RANDOM
@given(data=st.data())
def test_every_topology_has_the_dense_norm_on_every_rank(ranks, world, data):
    batch = data.draw(st.lists(topologies(world), min_size=3, max_size=3))
    reports = ranks(world, measure_all, batch, timeout=180)
    for position, topology in enumerate(batch):
        found = check(topology, [report[position] for report in reports])
        assert not found, f"{found}\n{topology}"


BOUNDS = {
    "measured": FP64_ROUNDING,
    "clip": FP64_ROUNDING,
    "get_total_norm": FP32_ROUNDING,
    "clip_grad_norm_": FP32_ROUNDING,
}


def check(topology: Topology, by_rank: list[list[dict[str, Any]]]) -> list[str]:
    """What is wrong with the ranks' reports of one topology."""
    exact = exact_norms(topology)
    elements = sum(math.prod(shape) for shape in {held.label: held.shape for held in topology.held}.values())
    ones = min(elements, 1) if math.isinf(topology.order) else elements ** (1 / topology.order)
    assert exact[-1] == pytest.approx(ones, rel=1e-14)  # the oracle itself accounts for every element
    wrong = []
    for step, norm in enumerate(exact):
        numbers = {
            repr([report[step][call] for call in (*BOUNDS, "coef") if call in report[step]])
            for report in by_rank
        }
        if len(numbers) > 1:
            wrong.append(f"step {step}: ranks found {numbers}")
        for rank, report in enumerate(by_rank):
            if not report[step]["measuring changed nothing"]:
                wrong.append(f"step {step}: measuring changed a gradient on rank {rank}")
            if report[step]["wrongly scaled"]:
                wrong.append(f"step {step}: wrongly scaled on rank {rank}: {report[step]['wrongly scaled']}")
        for call, bound in BOUNDS.items():
            value = by_rank[0][step].get(call, norm)
            if not oracle.relative_error(value, norm) <= bound:
                wrong.append(f"step {step}: {call} gave {value!r} for {norm!r}")
    return wrong
