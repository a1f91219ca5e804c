"""A stand-in for CUDA graphs where there is no GPU: operators that are recorded once, and replayed.

As in a graph, every operator is replayed on the memory that it had when it was recorded, its results go to
the memory that they had, and no Python of ours runs. What a graph can't hold is refused while it is recorded:
values that the host reads, and tensors that it makes of its own numbers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import Work
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.counting import HOST_READS

_FROM_THE_HOST = {"aten::lift_fresh", "aten::lift_fresh_copy"}


class CaptureError(AssertionError):
    """A recorded call did what a CUDA graph can't hold."""


class Recording(TorchDispatchMode):
    """Records the operators that run within it.

    Attributes:
        names: of the operators, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._calls: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        alive = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
        self._known = set(map(_memory, alive))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it does with local tensors is recorded
        args, kwargs = tree_map_only(list, list, args), kwargs or {}
        given, result = _tensors((args, kwargs)), func(*args, **kwargs)
        made = _tensors(result)
        if any(isinstance(each, FakeTensor) or each.is_meta for each in (*given, *made)):
            return result  # DTensor asks for shapes
        self._refuse(func, given)
        held = {*map(_memory, given)}
        self._known.update(map(_memory, made))
        self.names.append(func._schema.name)
        new = [(i, tensor) for i, tensor in enumerate(made) if _memory(tensor) not in held]
        self._calls.append((func, args, kwargs, new))
        return result

    def _refuse(self, func: Any, given: Sequence[Tensor]) -> None:
        name = func._schema.name
        if name in HOST_READS or (name == "aten::index" and any(t.dtype is torch.bool for t in given)):
            raise CaptureError(f"{name} reads a value on the host")
        if name in _FROM_THE_HOST or not {_memory(t) for t in given if t.numel()} <= self._known:
            raise CaptureError(f"{name} takes a tensor that the host has made")

    def replay(self) -> None:
        """Run the operators once more, in the memory that they had."""
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for func, args, kwargs, held in self._calls:
                result = func(*args, **kwargs)
                if func._schema.name.startswith("c10d::"):
                    for each in tree_leaves(result):
                        if isinstance(each, torch.ScriptObject):
                            Work.unbox(each).wait()
                found = _tensors(result) if held else []
                for i, tensor in held:
                    tensor.copy_(found[i])


def _tensors(found: Any) -> list[Tensor]:
    return [each for each in tree_leaves(found) if isinstance(each, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def capturing() -> Iterator[None]:
    """Let the library find that a CUDA graph is captured."""
    yes: Callable[[], bool] = lambda: True  # noqa: E731
    with mock.patch.multiple(torch.cuda, is_initialized=yes, is_current_stream_capturing=yes):
        yield


@contextmanager
def recorded() -> Iterator[Recording]:
    """Record what runs within it, as while a graph is captured; but unlike then it runs."""

    def read(*args: Any, **kwargs: Any) -> NoReturn:
        raise CaptureError("a tensor is read on the host")

    recording = Recording()
    with ExitStack() as stack:
        stack.enter_context(capturing())
        for name in ("numpy", "tolist", "cpu"):
            stack.enter_context(mock.patch.object(Tensor, name, read))
        stack.enter_context(recording)
        yield recording
