"""Fused torch optimizers that multiply by the coefficient in their own step: no pass over gradients is left.

They read two attributes, made for `torch.amp.GradScaler`: they divide every gradient by `grad_scale`, and do
nothing at all, to parameters and state, where `found_inf` is 1. Neither is read on the host. The gradients
stay unclipped until that step; torch's kernels then store back what they used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from distnorm.policies.results import ClipResult


def obstacles(optimizers: Sequence[Optimizer], clipped: Sequence[Tensor]) -> Iterator[str]:
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


def hand_over(optimizer: Optimizer, result: ClipResult, *, skips: bool) -> None:
    """Let the next step divide by the coefficient's inverse; with `skips`, unless it must be skipped."""
    coef = result.clip_coef
    optimizer.found_inf = result.skipped.float() if skips else None  # type: ignore[attr-defined]
    # In the host's memory a coefficient of 1 is seen at once.
    leaves = coef.is_cpu and coef.numpy() == 1
    optimizer.grad_scale = None if leaves else coef.reciprocal().float()  # type: ignore[attr-defined]


def skip_too(optimizer: Optimizer, result: ClipResult) -> bool:
    """Have a step that a `GradScaler` has prepared skipped where the result says so; whether it can be."""
    found = getattr(optimizer, "found_inf", None)
    if found is None:
        return False
    skipped = result.skipped.to(found.device, found.dtype, non_blocking=True)
    optimizer.found_inf = torch.maximum(found, skipped)  # type: ignore[attr-defined]
    return True


def take_back(optimizer: Optimizer) -> None:
    """Leave the optimizer as it was."""
    for name in ("grad_scale", "found_inf"):
        vars(optimizer).pop(name, None)


def is_taken(optimizer: Optimizer) -> bool:
    """Whether something else, such as a `GradScaler`, has given it a scale for the coming step."""
    return any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))
