"""Fused torch optimizers that multiply by the coefficient in their own step: no pass over gradients is left.

They read two attributes, made for `torch.amp.GradScaler`: they divide every gradient by `grad_scale`, and do
nothing at all, to parameters and state, where `found_inf` is 1. Neither is read on the host. The gradients
stay unclipped until that step; torch's kernels then store back what they used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import is_

import torch
from torch import Tensor
from torch.optim import Optimizer

from distnorm import kernels
from distnorm.clipper import GradClipper
from distnorm.errors import ConfigError
from distnorm.policies.results import ClipResult
from distnorm.sources import GradPlace

_ATTRIBUTES = ("grad_scale", "found_inf")


class HandOver:
    """Decides who multiplies gradients by the coefficient: the optimizers in their own step, or `clip`.

    Args:
        clipper: decides the coefficient.
        optimizers: all that step.

    Raises:
        ConfigError: ``clip.apply`` is ``optimizer``, and they can't; what stands in the way is named.
    """

    def __init__(self, clipper: GradClipper, optimizers: Sequence[Optimizer]) -> None:
        self._clipper, self._optimizers = clipper, optimizers
        clip, fixed = clipper.config.clip, clipper.rules.obstacle
        if fixed is None and (place := place_of(clipper)) is not None:
            fixed = f"gradients in {place}"
        if fixed is None and clip.nonfinite == "zero":  # zeroing what is not finite is no division
            fixed = "nonfinite: zero, which no optimizer can do"
        self._fixed = "clip.apply: scale" if clip.apply == "scale" else fixed
        self._members: list[Tensor] = []
        self._obstacle: str | None = None
        self._given: Optimizer | None = None
        if clip.apply == "optimizer" and (found := self.obstacle()) is not None:
            raise ConfigError(f"clip.apply: expected fused optimizers of all that is clipped, found {found}")

    def obstacle(self) -> str | None:
        """Why the optimizers can't multiply in this step; `None` if they can."""
        if self._fixed is not None:
            return self._fixed
        if any(map(is_taken, self._optimizers)):
            return "a scale or an overflow that something else has set for the coming step"
        members = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
        if len(members) != len(self._members) or not all(map(is_, members, self._members)):
            self._members = members
            self._obstacle = next(_obstacles(self._optimizers, self._clipper.parameters), None)
        return self._obstacle

    def give(self, optimizer: Optimizer, result: ClipResult) -> None:
        """Let the coming step divide by the coefficient's inverse, unless it has to be skipped."""
        self._given = optimizer
        skipped = result.skipped.float() if self._clipper.may_skip else None
        # In the host's memory a coefficient of 1 is read for free.
        is_one = kernels.on_host(result.clip_coef) and result.clip_coef.numpy() == 1
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.grad_scale = None if is_one else result.clip_coef.reciprocal().float()  # type: ignore[attr-defined]

    def leave_out(self, optimizer: Optimizer, result: ClipResult) -> bool:
        """Let the coming step do nothing where the result says so; whether the optimizer can, by itself."""
        if is_taken(optimizer) or not _is_fused(optimizer):
            return False
        self._given = optimizer
        optimizer.found_inf = result.skipped.float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        return True

    def take_back(self) -> None:
        """Leave the optimizer that was given a coefficient as it was."""
        optimizer, self._given = self._given, None
        if optimizer is not None:
            for name in _ATTRIBUTES:
                vars(optimizer).pop(name, None)


def place_of(clipper: GradClipper) -> GradPlace | None:
    """Where gradients are, if not in `grad`; of simulated ranks they always are there."""
    place: GradPlace | None = getattr(clipper, "grad_place", None)
    return place


def _is_fused(optimizer: Optimizer) -> bool:
    supports = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    return supports and all(group.get("fused", False) for group in optimizer.param_groups)


def _obstacles(optimizers: Sequence[Optimizer], clipped: Sequence[Tensor]) -> Iterator[str]:
    """Why optimizers can't take the coefficient; nothing if they can.

    Args:
        optimizers: all that step.
        clipped: what the coefficient is for.
    """
    known = set(map(id, clipped))
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if any(p.requires_grad and id(p) not in stepped for p in clipped):
        yield "clipped parameters that another optimizer may step"
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            yield f"{name}, which is not fused"
        for group in optimizer.param_groups:
            if not group.get("fused", False):
                yield f"{name} with a group that is not fused"
            if not known.issuperset(map(id, group["params"])):
                yield f"{name} with parameters that are not clipped"
            if any(p.dtype is torch.float64 for p in group["params"]):
                yield f"{name} with float64 parameters, which it would divide by a float32"


def skip_too(optimizer: Optimizer, result: ClipResult) -> bool:
    """Have a step that a `GradScaler` has prepared skipped where the result says so; whether it can be."""
    found = getattr(optimizer, "found_inf", None)
    if found is None:
        return False
    skipped = result.skipped.to(found.device, found.dtype, non_blocking=True)
    optimizer.found_inf = torch.maximum(found, skipped)  # type: ignore[attr-defined]
    return True


def is_taken(optimizer: Optimizer) -> bool:
    """Whether something else, such as a `GradScaler`, has given it a scale for the coming step."""
    return any(getattr(optimizer, name, None) is not None for name in _ATTRIBUTES)
