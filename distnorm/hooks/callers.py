"""Who calls an optimizer's step: three situations that only the call stack tells apart."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

_NEAR = 12  # callers looked at; between a step and its caller stand wrappers of schedulers and decorators


def is_running(frame: FrameType | None) -> bool:
    """Whether this call happens inside the call that `frame` belongs to."""
    return frame is not None and any(each is frame for each in _callers())


def is_checkpoint_helper() -> bool:
    """Whether torch's checkpoint helper steps, with zero gradients and lr 0, to make an optimizer's state.

    It may do so on one rank alone, so nothing collective may be done in such a step.
    """
    helper = ("torch.distributed.checkpoint.state_dict", "_init_optim_state")
    return helper in map(_name, _nearest())


def is_enabled_scaler() -> bool:
    """Whether an enabled `torch.amp.GradScaler` steps, having looked at the gradients of this rank."""
    return ("torch.amp.grad_scaler", "_maybe_opt_step") in map(_name, _nearest())


def _name(frame: FrameType) -> tuple[str, str]:
    return frame.f_globals.get("__name__", ""), frame.f_code.co_name


def _nearest() -> Iterator[FrameType]:
    return (frame for _, frame in zip(range(_NEAR), _callers(), strict=False))


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
