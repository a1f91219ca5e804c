"""The custom operators of the graphs that `torch.compile` and `make_fx` make.

Where other ranks are met, a call is three operators: one reads the gradients and returns this rank's vector,
torch's functional collective reduces it, and one decides, scales in place and returns what was found.
Otherwise it is one. They do what is done eagerly, by the same code (`distnorm.plan.stops`), to the same bits.

What was measured is what is scaled, though a compiler may put other operators between the two:
- The graph is in single assignment, so the last operator gets the very values that the first has read. A
  write to a gradient before the call makes a value that both get; one after it waits for the last operator,
  which changes the gradients. So no write comes in between.
- It may get the values in other memory, a copy that may be changed, and from there on works on what it gets.
  Where it gets no copy, nothing else is put into the memory that was read, as it has yet to be read again.
- All of them change one counter, so that calls are not interleaved, left out or put in another order.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from distnorm.errors import DistnormError
from distnorm.kernels import Untracked, plain_operators
from distnorm.plan.stops import Form, Stopped, Stops, finish

with plain_operators():
    CALLS = torch.zeros((), dtype=torch.int64, device="cpu")
"""The operators change it: each call is collective, whether or not its result is used, and whether or not
there are gradients."""

Settings = tuple[float, float, bool]
"""Of a function: the threshold, the order of the norm, and whether one that is not finite raises."""

Function = Callable[[Mapping[int, Tensor], Sequence[Tensor], float, float, bool], Stops[Tensor]]
"""What a function does in a graph, of local gradients by position, what holds them, and its settings."""


class Keeper(Protocol):
    """Keeps a call between its operators."""

    stopped: Stopped[Tensor] | None


class Clipper(Protocol):
    """Whose steps the operators take."""

    def in_graph(self, given: Mapping[int, Tensor]) -> tuple[Keeper, Stops[Tensor]]:
        """Begin a step of local gradients, by position: what keeps it, and its work."""

    def form_in_graph(self) -> Form | None:
        """What a graph has to know of a step's all-reduce; `None` if it can't issue it."""


class _Thread(threading.local):
    stopped: Stopped[Tensor] | None = None


_thread = _Thread()  # keeps the calls of functions
_numbers = count()
_functions: dict[str, Function] = {}
_clippers: weakref.WeakValueDictionary[str, Clipper] = weakref.WeakValueDictionary()
_keepers: weakref.WeakValueDictionary[str, Keeper] = weakref.WeakValueDictionary()


def called(function: Function) -> Function:
    """Let the operators call a function by its name."""
    return _functions.setdefault(function.__name__, function)


def key_of(clipper: Clipper) -> str:
    """A key by which the operators find a clipper, as long as something else keeps it."""
    _clippers[key := f"clipper {next(_numbers)}"] = clipper
    return key


def form_of_clipper(caller: str) -> Form | None:
    """Of a clipper's next step in a graph; `None` if that is one operator."""
    found = _clippers.get(caller)
    return None if found is None else found.form_in_graph()


# ---- in one


@torch.library.custom_op("distnorm::total_norm", mutates_args=("calls",))
def total_norm(
    tensors: Sequence[Tensor],
    function: str,
    norm_type: float,
    raises: bool,
    dtype: torch.dtype,
    calls: Tensor,
) -> Tensor:
    """Measure tensors, and return their total norm, 0-d."""
    calls += 1
    _, work = _begun(function, {}, tensors, (0.0, norm_type, raises))
    return _output(work, dtype)


@torch.library.custom_op("distnorm::clip", mutates_args=("gradients", "calls"))
def clip(
    gradients: Sequence[Tensor],
    positions: Sequence[int],
    parameters: Sequence[Tensor],
    caller: str,
    max_norm: float,
    norm_type: float,
    raises: bool,
    numbers: int,
    dtype: torch.dtype,
    calls: Tensor,
) -> Tensor:
    """Clip gradients in place, and return so many numbers, [numbers]; or the norm before, 0-d, if that is 0.

    Args:
        gradients, positions: the local ones, and where they belong in `parameters`, or the clipper's shards.
        parameters: those of a function.
        caller: the key of a clipper, or the name of a function.
        max_norm, norm_type, raises: the function's settings.
        numbers, dtype: of the result.
        calls: `CALLS`.
    """
    calls += 1
    _, work = _begun(caller, _by_position(positions, gradients), parameters, (max_norm, norm_type, raises))
    return _output(work, dtype)


# ---- in three


@torch.library.custom_op("distnorm::statistic", mutates_args=("calls",))
def statistic(
    gradients: Sequence[Tensor],
    positions: Sequence[int],
    parameters: Sequence[Tensor],
    caller: str,
    max_norm: float,
    norm_type: float,
    raises: bool,
    length: int,
    op: str,
    group_name: str,
    device: torch.device,
    calls: Tensor,
) -> Tensor:
    """Read gradients, or tensors, and return what this rank adds to the all-reduce, [length] fp64.

    Args:
        gradients, positions, parameters, caller, max_norm, norm_type, raises: as of `clip`.
        length, op, group_name, device: of the all-reduce.
        calls: `CALLS`.
    """
    calls += 1
    given = _by_position(positions, gradients)
    keeper, work = _begun(caller, given, parameters, (max_norm, norm_type, raises))
    _keepers[caller] = keeper
    keeper.stopped = None
    form = Form(length, op, group_name, device)
    with Untracked():
        keeper.stopped, vector = Stopped.at_first(work, given, form)
    return vector


@torch.library.custom_op("distnorm::scale_", mutates_args=("gradients", "calls"))
def scale_(
    gradients: Sequence[Tensor],
    positions: Sequence[int],
    parameters: Sequence[Tensor],
    reduced: Tensor,
    caller: str,
    numbers: int,
    dtype: torch.dtype,
    calls: Tensor,
) -> Tensor:
    """Decide by what `statistic` was reduced to, clip in place, and return what `clip` returns."""
    calls += 1
    return _output(_taken(caller).going_on(reduced, _by_position(positions, gradients)), dtype)


@torch.library.custom_op("distnorm::norm", mutates_args=("calls",))
def norm(
    tensors: Sequence[Tensor], reduced: Tensor, function: str, dtype: torch.dtype, calls: Tensor
) -> Tensor:
    """The total norm, 0-d, by what `statistic` of the tensors was reduced to."""
    calls += 1
    return _output(_taken(function).going_on(reduced, {}), dtype)


# ---- without values


@total_norm.register_fake
@norm.register_fake
def _(tensors: Sequence[Tensor], *rest: Any) -> Tensor:
    *_, dtype, _ = rest
    return torch.empty((), dtype=dtype, device=_device_of(tensors))


@clip.register_fake
@scale_.register_fake
def _(
    gradients: Sequence[Tensor], positions: Sequence[int], parameters: Sequence[Tensor], *rest: Any
) -> Tensor:
    *_, numbers, dtype, _ = rest
    shape = (numbers,) if numbers else ()
    return torch.empty(shape, dtype=dtype, device=_device_of([*gradients, *parameters]))


@statistic.register_fake
def _(gradients: Sequence[Tensor], *rest: Any) -> Tensor:
    *_, length, _, _, device, _ = rest
    return torch.empty(length, dtype=torch.float64, device=device)


def _device_of(tensors: Sequence[Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


# ---- what they share


def _begun(
    caller: str, given: dict[int, Tensor], parameters: Sequence[Tensor], settings: Settings
) -> tuple[Keeper, Stops[Tensor]]:
    if caller in _functions:
        return _thread, _functions[caller](given, parameters, *settings)
    clipper = _clippers.get(caller)
    if clipper is None:
        raise DistnormError(
            "expected the clipper that this graph was made with, found that it is gone; keep it as long as "
            "the graph, or compile again"
        )
    return clipper.in_graph(given)


def _taken(caller: str) -> Stopped[Tensor]:
    keeper: Keeper | None = _thread if caller in _functions else _keepers.get(caller)
    stopped = None if keeper is None else keeper.stopped
    if keeper is None or stopped is None:
        raise DistnormError(
            "expected the operator that measures before the one that scales, found none; run the graph as it "
            "was made, from its beginning"
        )
    keeper.stopped = None
    return stopped


def _by_position(positions: Sequence[int], gradients: Sequence[Tensor]) -> dict[int, Tensor]:
    return dict(zip(positions, gradients, strict=True))


def _output(work: Stops[Tensor], dtype: torch.dtype) -> Tensor:
    with Untracked():
        return finish(work).to(dtype, copy=True)
