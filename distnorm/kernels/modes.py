"""The modes of torch that a caller may be in, and how our own work is kept out of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from distnorm.errors import DistnormError

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def plain_operators() -> Iterator[None]:
    """Run bookkeeping on real tensors in the host's memory, whatever modes the caller is in.

    A default device, FakeTensorMode and counting modes apply to the caller's tensors, and not to ours.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    with ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(_disable_current_modes())
        yield


class Untracked:
    """What runs in `with` is kept from autograd, and from torch functions of modes and of subclasses.

    `torch.no_grad` and `torch._C.DisableTorchFunction` in one, which every step enters, in less time.
    """

    __slots__ = ("_guard", "_was_enabled")

    def __enter__(self) -> None:
        self._was_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self._guard = torch._C.DisableTorchFunction()
        self._guard.__enter__()

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(None, None, None)
        torch._C._set_grad_enabled(self._was_enabled)


def is_captured() -> bool:
    """Whether what runs now is captured in a CUDA graph: replays repeat it on the device alone."""
    has_started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # asking would start it
    return has_started and torch.cuda.is_current_stream_capturing()


def refuse_capture(fact: str) -> None:
    """Refuse to be captured.

    Args:
        fact: what is expected, what was found, and the cure.

    Raises:
        DistnormError: a CUDA graph is being captured.
    """
    if is_captured():
        raise DistnormError(f"within a CUDA graph that is being captured: {fact}")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Let a compiled function that calls this one leave its graph for the call, and trace nothing inside."""
    disabled: list[Callable[P, R]] = []

    @wraps(function)
    def eager(*args: P.args, **kwargs: P.kwargs) -> R:
        compiler = sys.modules.get("torch._dynamo")  # importing it is slow
        if compiler is None or (not torch.compiler.is_compiling() and _nobody_compiles()):
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return eager


def _nobody_compiles() -> bool:
    """Whether the frames that are called here run as they are; to disable that costs more than to ask."""
    frames = getattr(torch._C._dynamo, "eval_frame", None)
    callback = getattr(frames, "get_eval_frame_callback", None)
    return callback is not None and callback() is None
