"""FSDP2 modules out of their sharded state, or with gradients that are not reduced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distnorm
from tests.refusals import TIMEOUT, Heard, clipper, heard

INPUTS = torch.arange(32.0).view(4, 8) / 32


def dense_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def model(sizes: tuple[int, ...]) -> Any:
    net = dense_model()
    names = ("replicate", "shard")[-len(sizes) :]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def backward(net: Any) -> None:
    net(INPUTS).sum().backward()


def true_norm() -> float:
    net = dense_model()
    backward(net)
    return float(torch.cat([p.grad.double().flatten() for p in net.parameters()]).norm())


def unsynchronised(net: Any) -> None:
    net.set_requires_gradient_sync(False)
    backward(net)
    net.set_requires_gradient_sync(True)


def one_layer_unsynchronised(net: Any) -> None:
    net[0].set_requires_gradient_sync(False)
    backward(net)
    net[0].set_requires_gradient_sync(True)


def not_all_reduced(net: Any) -> None:
    net.set_requires_all_reduce(False)
    backward(net)
    net.set_requires_all_reduce(True)


def not_resharded(net: Any) -> None:
    net.set_reshard_after_backward(False)
    backward(net)


def forward_again(net: Any) -> None:
    backward(net)
    with torch.no_grad():
        net(INPUTS)


def gathered(net: Any) -> None:
    backward(net)
    net.unshard()


def one_layer_gathered(net: Any) -> None:
    backward(net)
    net[0].unshard()


UNREDUCED = {f.__name__: f for f in (unsynchronised, one_layer_unsynchronised, not_all_reduced)}
GATHERED = {f.__name__: f for f in (not_resharded, forward_again, gathered, one_layer_gathered)}


def clipped(net: Any, how: str) -> Callable[[], Tensor | distnorm.ClipResult | None]:
    parameters = net.parameters
    return {
        "clipper": lambda: clipper(net, "propagate", None).clip(),
        "module": lambda: distnorm.clip_grad_norm_(net, float("inf")),
        "list": lambda: distnorm.clip_grad_norm_(parameters(), float("inf")),
        "scaling": lambda: distnorm.clip_grads_with_norm_(parameters(), 1.0, torch.tensor(1.0)),
    }[how]


def in_states(sizes: tuple[int, ...], cases: list[str]) -> dict[tuple[str, str], Heard]:
    said = {}
    for case in cases:
        for how in ("clipper", "module", "list", "scaling"):
            net = model(sizes)
            {**UNREDUCED, **GATHERED}[case](net)
            said[case, how] = heard(clipped(net, how))
    return said


@pytest.mark.parametrize(("sizes", "cases"), [((2,), list(UNREDUCED)[:2]), ((2, 2), list(UNREDUCED)[2:])])
def test_what_fsdp2_has_not_reduced_is_refused(ranks, sizes, cases):
    for said in ranks(4 if len(sizes) == 2 else 2, in_states, sizes, cases, timeout=TIMEOUT):
        assert {error for error, _ in said.values()} == {"UnsupportedGradientError"}, said


def test_gathered_parameters_are_seen_through_or_refused(ranks):
    """A module leads to the sharded parameters; a list of gathered ones doesn't, and had a norm of 0."""
    for said in ranks(2, in_states, (2,), list(GATHERED), timeout=TIMEOUT):
        for (case, how), (error, found) in said.items():
            if how in ("clipper", "module"):
                assert (error, found) == ("", pytest.approx(true_norm(), rel=1e-6)), case
            else:
                assert (error, "found the gathered one" in found) == ("UnsupportedGradientError", True), case


def sharded_afterwards() -> tuple[Heard, Heard]:
    net: Any = dense_model()
    clipping = clipper(net, "propagate", None)
    backward(net)
    first = heard(clipping.clip)
    net.zero_grad()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    unsynchronised(net)
    return first, heard(clipping.clip)


def test_a_clipper_made_before_fully_shard_looks_for_its_modules_again(ranks):
    for first, later in ranks(2, sharded_afterwards, timeout=TIMEOUT):
        assert first == ("", pytest.approx(true_norm(), rel=1e-6))
        assert later[0] == "UnsupportedGradientError"


def replaced_after_sharding() -> tuple[list[float], Heard]:
    """Norms by a clipper made after parameters were replaced, as transformers' loader does, and before that;
    and what is said of gradients that FSDP2 holds back then."""
    norms = []
    for makes_clipper_first in (False, True):
        net = model((2,))
        made = [clipper(net, "propagate", None)] if makes_clipper_first else []
        for layer in (net[0], net[2]):
            layer.weight = nn.Parameter(layer.weight.detach().clone())
        clipping = (made or [clipper(net, "propagate", None)])[0]
        backward(net)
        norms.append(float(clipping.clip().total_norm))
        net.zero_grad()
    unsynchronised(net)
    return norms, heard(clipping.clip)


def test_parameters_replaced_between_fully_shard_and_the_first_forward_are_those_measured(ranks):
    """FSDP2 knew of the old ones until its first forward, and so did distnorm: the norm was 0."""
    for norms, said in ranks(2, replaced_after_sharding, timeout=TIMEOUT):
        assert norms == [pytest.approx(true_norm(), rel=1e-6)] * 2
        assert said[0] == "UnsupportedGradientError"
