"""Within a graph of several ranks a call is two operators, and the graph's own all-reduce between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import distnorm
from distnorm import operators
from tests.refusals import TIMEOUT, heard

KINDS: dict[str, dict[str, Any]] = {
    "constant": {},
    "agc": {"policy": {"name": "agc", "lambda": 0.01}, "max_norm": None},
    "zclip": {"policy": {"name": "zclip", "warmup": 2}},
    "skip": {"nonfinite": "skip"},
    "zero": {"nonfinite": "zero"},
    "propagate": {"nonfinite": "propagate"},
}
NO_SETTINGS = (0.0, 0.0, False)  # a clipper has its own
MODES = ("skip", "zero", "propagate")
FUNCTIONS = ("get_total_norm", "largest", "clip_grad_norm_")
Call = Callable[[Tensor, Tensor], Tensor]


class Held:
    """What a rank holds: a parameter of its own, and a replica of one."""

    def __init__(self) -> None:
        self.own, self.both = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
        self.named = [
            (f"own{dist.get_rank() if dist.is_initialized() else 0}", self.own),
            ("both", self.both),
        ]

    def after(self, clip: Callable[[], Any]) -> Call:
        """A call with gradients, which returns the norm."""

        def call(own: Tensor, both: Tensor) -> Tensor:
            self.own.grad, self.both.grad = own, both
            found = clip()
            norm: Tensor = getattr(found, "total_norm", found)
            return norm

        return call


def calls() -> dict[str, Call]:
    held = Held()
    functions: dict[str, Call] = {
        "get_total_norm": lambda own, both: distnorm.get_total_norm([own, both]),
        "largest": lambda own, both: distnorm.get_total_norm([own, both], math.inf),
        "clip_grad_norm_": held.after(lambda: distnorm.clip_grad_norm_([held.own, held.both], 0.5)),
    }
    for kind, clip in KINDS.items():
        clipper = distnorm.GradClipper(held.named, {"clip": {"max_norm": 0.5, **clip}})
        functions[kind] = held.after(clipper.clip)
    return functions


def gradients(seed: int, bad: bool = False, alike: bool = False) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    own = torch.randn(dist.get_world_size(), 3, generator=dice)[0 if alike else dist.get_rank()].clone()
    if bad and dist.get_rank() == 1:
        own[0] = math.inf
    return own, torch.randn(2, 2, generator=dice)


def called(traced: torch.fx.GraphModule) -> list[str]:
    targets = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    return [name for name in targets if name.startswith(("distnorm", "_c10d"))]


def bits(values: tuple[Tensor, ...]) -> list[bytes]:
    return [value.detach().numpy().tobytes() for value in values]


def traced_and_eager() -> dict[str, tuple[list[str], list[Any], list[Any]]]:
    found = {}
    inside, outside = calls(), calls()
    for name, call in inside.items():
        alike = name in FUNCTIONS  # which take tensors without names for replicas
        traced = make_fx(call)(*gradients(0, alike=alike))
        outside[name](*gradients(0, alike=alike))
        ways: list[list[Any]] = []
        for way in (traced, outside[name]):
            ways.append([])
            for seed in range(1, 4):
                given = gradients(seed, bad=name in MODES and seed == 2, alike=alike)
                ways[-1].append(bits((way(*given), *given)))
        found[name] = called(traced), *ways
    return found


def test_a_traced_call_has_one_all_reduce_and_the_eager_bits(ranks):
    of_ranks = ranks(2, traced_and_eager, timeout=2 * TIMEOUT)
    reduced = ["_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default"]
    for found in of_ranks:
        for name, (operators_called, traced, eager) in found.items():
            last = "norm" if name in FUNCTIONS[:2] else "scale_"
            assert operators_called == ["distnorm.statistic.default", *reduced, f"distnorm.{last}.default"], (
                name
            )
            assert traced == eager, name
    for name in of_ranks[0]:
        norms = [[step[0] for step in found[name][1]] for found in of_ranks]
        assert norms[0] == norms[1] and len(set(norms[0])) == 3, name


def test_one_rank_has_no_all_reduce():
    for call in calls().values():
        (operator,) = called(make_fx(call)(torch.ones(3), torch.ones(2, 2)))
        assert operator in ("distnorm.total_norm.default", "distnorm.clip.default")


# ---- what ranks disagree about


def refused_in_a_graph() -> list[tuple[Any, bool]]:
    torch._dynamo.reset()
    held, rank = Held(), dist.get_rank()
    clipper = distnorm.GradClipper(held.named, {"clip": {"max_norm": 0.5}})
    clip = torch.compile(clipper.clip, fullgraph=True, backend="aot_eager")
    found = []

    def clip_by(max_norm: float) -> Any:
        return lambda: distnorm.clip_grad_norm_([held.own, held.both], max_norm)

    by_rank = torch.compile(clip_by(0.5 + rank), fullgraph=True, backend="aot_eager")
    for case in ("well", "not finite", "unreduced", "one-sided", "another max_norm", "well"):
        given = gradients(1, bad=case == "not finite", alike=case == "another max_norm")
        if case == "unreduced":
            given = given[0], given[1] * (1 + rank)
        before = bits(given)
        held.own.grad, held.both.grad = given
        if case == "one-sided" and rank == 1:
            held.both.grad = None
        said = heard(by_rank if case == "another max_norm" else clip)
        found.append((said, bits(given) == before))
    torch._dynamo.reset()
    return found


@pytest.mark.slow
def test_what_ranks_disagree_about_is_raised_by_all_of_them_and_changes_nothing(ranks):
    kinds = ["", "NonFiniteGradientError", "ReplicaError", "ReplicaError", "DisagreementError", ""]
    for found in ranks(2, refused_in_a_graph, timeout=4 * TIMEOUT):
        assert [said[0] for said, _ in found] == kinds
        for (kind, _), is_unchanged in found:
            assert is_unchanged == (kind != "")


# ---- graphs that are older than what they find


def an_older_form() -> tuple[list[Any], list[Any]]:
    held = Held()
    clipper = distnorm.GradClipper(held.named, {"clip": {"max_norm": 0.5}})
    call = held.after(clipper.clip)
    traced = make_fx(call)(*gradients(0))
    ways = []
    distnorm.get_total_norm([torch.ones(3)])  # plans: from now on the group's vectors have their full form
    for way in (traced, call):
        given = gradients(1)
        ways.append(bits((way(*given), *given)))
    return ways[0], ways[1]


def test_a_graph_that_is_older_than_the_form_of_the_vector_gives_the_same(ranks):
    for traced, eager in ranks(2, an_older_form, timeout=TIMEOUT):
        assert traced == eager


def a_step_that_never_ends() -> tuple[Any, Any, bool, float]:
    held = Held()
    clipper = distnorm.GradClipper(held.named, {"clip": {"max_norm": 0.5}})
    own, both = gradients(1)
    form = clipper.form_in_graph()
    assert form is not None
    operators.statistic([own, both], [0, 1], [], clipper.key_in_graphs, *NO_SETTINGS, *form, operators.CALLS)
    held_back = clipper._step.stopped is not None
    held.own.grad, held.both.grad = own, both
    norm = float(clipper.clip().total_norm)
    reduced = torch.zeros(form.length, dtype=torch.float64)
    last = (clipper.key_in_graphs, 7, torch.float64, operators.CALLS)
    said = heard(lambda: operators.scale_([own, both], [0, 1], [], reduced, *last))
    other = heard(
        lambda: operators.statistic(
            [own],
            [0],
            [],
            clipper.key_in_graphs,
            *NO_SETTINGS,
            *form._replace(group_name="gone"),
            operators.CALLS,
        )
    )
    return said, other, held_back, norm


def test_a_step_that_never_ends_is_dropped_by_the_next(ranks):
    for said, other, held_back, norm in ranks(2, a_step_that_never_ends, timeout=TIMEOUT):
        assert held_back and norm > 0
        assert said[0] == "DistnormError" and "before the one that scales" in said[1]
        assert other[0] == "DistnormError" and "'gone'" in other[1]


# ---- without values


@pytest.fixture
def four_fake_ranks() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def test_graphs_are_traced_without_values(four_fake_ranks):
    def clipped(own: Tensor, both: Tensor) -> Tensor:
        found = [nn.Parameter(torch.zeros_like(own)), nn.Parameter(torch.zeros_like(both))]
        found[0].grad, found[1].grad = own, both
        return distnorm.clip_grad_norm_(found, 0.5)

    for call in (lambda own, both: distnorm.get_total_norm([own, both]), clipped):
        record = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)  # the operators' counter
        traced = record(torch.ones(3), torch.ones(2, 2))
        (value,) = (node.meta["val"] for node in traced.graph.nodes if "all_reduce" in str(node.target))
        assert value.dtype is torch.float64 and value.shape in ((2,), (19,))  # packed, and full
        (result,) = (node.args[0] for node in traced.graph.nodes if node.op == "output")
        assert result.meta["val"].shape == () and result.meta["val"].dtype is torch.float32
