"""Who is timed, and how each is called on a problem."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import distnorm
from distnorm.bench.peers import Peers, by_deepspeed, by_megatrons_rule, by_torch
from distnorm.bench.problem import Problem

PLAIN_SUM = "plain sum of these bytes"
EXACT, CLOSE = 1e-6, 1e-4
"""Largest relative errors of distnorm, and of peers in fp32."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do what a variant asks for.

    Args:
        name: as it is shown.
        call: what is timed; returns the norm, or `None` where none is taken. Collective.
        tolerance: the largest relative error of the norm.
        is_reference: whether the others' times are compared with this one's.
        close: puts back what was changed to make it ready.
    """

    name: str
    call: Callable[[], Any]
    tolerance: float = CLOSE
    is_reference: bool = False
    close: Callable[[], None] = lambda: None


def clippers(problem: Problem, max_norm: float, peers: Peers) -> list[Contender]:
    """All that can clip this problem's gradients to `max_norm`. Collective."""
    parameters = [each.parameter for each in problem.held]
    if (root := problem.fsdp1) is not None:
        found = [Contender("FSDP1", lambda: root.clip_grad_norm_(max_norm), is_reference=True)]
    else:
        found = [Contender("torch", lambda: by_torch(problem.parts, max_norm), is_reference=True)]
        if peers.torchtitan is not None and _on_one_mesh(problem):
            titan = peers.torchtitan.clip_grad_norm_
            found.append(Contender("torchtitan", lambda: titan(parameters, max_norm)))
    found += _on_local_tensors(problem, max_norm, peers)
    clipper = distnorm.GradClipper(
        problem.target, {"clip": {"max_norm": max_norm}}, tied=[tuple(names) for names in problem.tied]
    )
    function = distnorm.clip_grad_norm_
    return [
        *found,
        Contender("distnorm.GradClipper", lambda: clipper.clip().total_norm, EXACT),
        Contender(
            "distnorm.clip_grad_norm_",
            lambda: function(problem.target, max_norm, tied=[tuple(names) for names in problem.tied]),
            EXACT,
        ),
    ]


def _on_one_mesh(problem: Problem) -> bool:
    return len(problem.parts) == 1 and problem.parts[0][1] is None and len(problem.parts[0][0]) == 1


def _on_local_tensors(problem: Problem, max_norm: float, peers: Peers) -> Iterator[Contender]:
    """Those that know no DTensors: they don't apply where a gradient is not reduced yet.

    They are given the local tensors ready-made, since their own engines hold plain ones.
    """
    if problem.any_partial:
        return
    everywhere = problem.replications == {problem.world.size}
    reduces = problem.world.size > 1 and not everywhere
    gradients = problem.locals
    owned = [g for g, each in zip(gradients, problem.held, strict=True) if everywhere or each.owned]

    def megatron() -> float:
        return by_megatrons_rule(owned, gradients, reduces, max_norm)

    def deepspeed() -> Any:
        return by_deepspeed(peers.deepspeed, gradients, max_norm, over_all_ranks=reduces)

    yield Contender("Megatron's rule", megatron)
    if peers.deepspeed is not None and problem.whole_ranks and (everywhere or problem.replications == {1}):
        yield Contender("DeepSpeed", deepspeed)


def measurers(problem: Problem, peers: Peers) -> list[Contender]:
    """All that take the norm of one process's gradients. Peers' errors are shown, not judged.

    A plain fp32 sum of the same bytes takes its turns with them: as fast as this memory can be read then.
    """
    gradients = problem.locals
    as_fp32 = [gradient.view(-1).view(torch.float32) for gradient in gradients]

    def plain_sum() -> None:
        for gradient in as_fp32:
            gradient.sum()

    clipper = distnorm.GradClipper(problem.target)
    found = [
        Contender(PLAIN_SUM, plain_sum),
        Contender("torch", lambda: torch.nn.utils.get_total_norm(gradients), float("inf"), is_reference=True),
    ]
    if peers.deepspeed is not None:
        norm_of = peers.deepspeed.get_global_norm_of_tensors
        found.append(Contender("DeepSpeed", lambda: norm_of(gradients), float("inf")))
    return [
        *found,
        Contender("distnorm.GradClipper", lambda: clipper.measure().total_norm, EXACT),
        Contender("distnorm.get_total_norm", lambda: distnorm.get_total_norm(gradients), EXACT),
    ]


def fingerprinters(problem: Problem) -> list[Contender]:
    """The norm alone, and with fingerprints of the same gradients in the same read. Collective."""
    alone = distnorm.GradClipper(problem.target)
    both = distnorm.GradClipper(problem.target, {"monitor": {"fingerprints": 8}})
    return [
        Contender("the norm alone", lambda: alone.measure().total_norm, EXACT, is_reference=True),
        Contender("norm and fingerprints", lambda: both.measure().total_norm, EXACT),
    ]


def steppers(problem: Problem, max_norm: float) -> list[Contender]:
    """Fused AdamW's step, alone and after everyone's clipping. Collective."""
    parameters = [each.parameter for each in problem.held]
    config = {"clip": {"max_norm": max_norm}}
    plain, attached = (torch.optim.AdamW(parameters, lr=0.0, fused=True) for _ in range(2))
    clipper = distnorm.GradClipper(problem.target, config)
    handle = distnorm.attach(problem.target, attached, config)

    def by_clipper() -> Any:
        result = clipper.clip()
        plain.step()
        return result.total_norm

    def by_torch_then_step() -> Any:
        with handle.paused():  # which would refuse gradients that torch has clipped
            norm = by_torch(problem.parts, max_norm)
        plain.step()
        return norm

    def by_attach() -> Any:
        attached.step()
        assert handle.last is not None
        return handle.last.total_norm

    return [
        Contender("no clipping", plain.step),
        Contender("torch, then step", by_torch_then_step, is_reference=True),
        Contender("GradClipper.clip, then step", by_clipper, EXACT),
        Contender("distnorm.attach", by_attach, EXACT, close=handle.remove),
    ]


def training_steppers(
    problem: Problem, backward: Callable[[nn.Module], None], max_norm: float
) -> list[Contender]:
    """Whole training steps, forward and backward too, of models that don't move. Collective.

    Args:
        problem: of the model that all of them share but the one with overlap, which has a copy: a hook that
            reads gradients during backward stays with its model.
        backward: computes a model's gradients.
        max_norm: the threshold.
    """
    copied = type(problem.target)(copy.deepcopy(problem.target.module))
    steps: list[Contender] = []

    def add(name: str, model: nn.Module, clip: str, *, overlap: bool = False) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        handle = None
        if clip == "attach":
            handle = distnorm.attach(model, optimizer, {"clip": {"max_norm": max_norm, "overlap": overlap}})

        def step() -> Any:
            optimizer.zero_grad()
            backward(model)
            norm = by_torch(problem.parts, max_norm) if clip == "torch" else None
            optimizer.step()
            return norm if handle is None or handle.last is None else handle.last.total_norm

        tolerance = EXACT if clip == "attach" else CLOSE
        close = (lambda: None) if handle is None else handle.remove
        steps.append(Contender(name, step, tolerance, is_reference=clip == "torch", close=close))

    add("no clipping", problem.target, "none")
    add("torch", problem.target, "torch")
    add("distnorm.attach", problem.target, "attach")
    add("distnorm.attach, overlap", copied, "attach", overlap=True)
    return steps
