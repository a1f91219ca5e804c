"""Who calls an optimizer's step, found on the call stack, where nothing else says it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from types import CodeType, FrameType

_NEAR = 12  # so many callers are checked: between a step and its caller stand schedulers' wrappers


def is_running(frame: FrameType | None) -> bool:
    """Whether this call happens inside the call that `frame` belongs to."""
    return frame is not None and any(each is frame for each in _callers())


def is_checkpoint_helper() -> bool:
    """Whether torch's checkpoint helper steps, with zero gradients and lr 0, to make an optimizer's state.

    It may do so on one rank alone, so nothing collective may be done in such a step.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    helper = getattr(module, "_init_optim_state", None)
    return helper is not None and is_called_by(helper.__code__)


def is_called_by(code: CodeType) -> bool:
    """Whether one of the nearest callers runs `code`."""
    return code in (frame.f_code for frame in islice(_callers(), _NEAR))


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
