"""Within `torch.compile`: a measurement, or a clip, is one operator of the graph, so that nothing breaks it.

The operators do what is done eagerly, by the same code and to the same bits, with the tensors that the graph
hands them. A graph keeps nothing else of us: what an operator calls has a number.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from itertools import count
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from distnorm.errors import DistnormError
from distnorm.kernels import outside_graphs, plain_operators
from distnorm.policies.results import ClipResult

P = ParamSpec("P")
R = TypeVar("R")


class Clipper(Protocol):
    """What the operator `distnorm::clip` calls."""

    def clip_given(self, gradients: Mapping[int, Tensor]) -> Tensor:
        """Clip gradients, by their parameter's position, and return what was found, [n] fp64."""


FIELDS = tuple(field.name for field in fields(ClipResult) if field.name != "groups")
"""Of a result: four numbers, then three flags."""

with plain_operators():
    _CALLS = torch.zeros((), dtype=torch.int64, device="cpu")
"""The operators change it, so that none is left out or moved before another: each call is collective, whether
or not its result is used, and whether or not there are gradients."""

_numbers = count()
_clippers: weakref.WeakValueDictionary[int, Clipper] = weakref.WeakValueDictionary()
_functions: dict[str, Callable[..., Tensor]] = {}


def number_of(clipper: Clipper) -> int:
    """A number by which the operator finds a clipper, as long as something else keeps it."""
    number = next(_numbers)
    _clippers[number] = clipper
    return number


def called_by_operator(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let the operator of a function's name call it."""
    return _functions.setdefault(function.__name__, function)


@torch.library.custom_op("distnorm::clip", mutates_args=("gradients", "calls"))
def clip(
    gradients: Sequence[Tensor], positions: Sequence[int], clipper: int, numbers: int, calls: Tensor
) -> Tensor:
    """Clip gradients in place, and return so many numbers, [numbers] fp64."""
    calls += 1
    found = _clippers.get(clipper)
    if found is None:
        raise DistnormError(
            "expected the clipper that this graph was made with, found that it is gone; keep it as long as "
            "the graph, or compile again"
        )
    return found.clip_given(dict(zip(positions, gradients, strict=True)))


@clip.register_fake
def _(
    gradients: Sequence[Tensor], positions: Sequence[int], clipper: int, numbers: int, calls: Tensor
) -> Tensor:
    return torch.empty(numbers, dtype=torch.float64, device=_device_of(gradients))


@torch.library.custom_op("distnorm::total_norm", mutates_args=("calls",))
def total_norm(
    tensors: Sequence[Tensor], norm_type: float, error_if_nonfinite: bool, calls: Tensor
) -> Tensor:
    """The total norm of the tensors, 0-d."""
    calls += 1
    found = _functions["total_norm_given"](tensors, norm_type, error_if_nonfinite)
    return found.to(_dtype_of(tensors), copy=True)


@total_norm.register_fake
def _(tensors: Sequence[Tensor], norm_type: float, error_if_nonfinite: bool, calls: Tensor) -> Tensor:
    return torch.empty((), dtype=_dtype_of(tensors), device=_device_of(tensors))


@torch.library.custom_op("distnorm::clip_grad_norm_", mutates_args=("gradients", "calls"))
def clip_grad_norm_(
    gradients: Sequence[Tensor],
    positions: Sequence[int],
    parameters: Sequence[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    calls: Tensor,
) -> Tensor:
    """Clip gradients of the parameters at these positions in place, and return the norm before, 0-d."""
    calls += 1
    given = dict(zip(positions, gradients, strict=True))
    found = _functions["clip_given"](parameters, given, max_norm, norm_type, error_if_nonfinite)
    return found.to(_dtype_of(parameters), copy=True)


@clip_grad_norm_.register_fake
def _(
    gradients: Sequence[Tensor], positions: Sequence[int], parameters: Sequence[Tensor], *rest: object
) -> Tensor:
    return torch.empty((), dtype=_dtype_of(parameters), device=_device_of(parameters))


def _device_of(tensors: Sequence[Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _dtype_of(tensors: Sequence[Tensor]) -> torch.dtype:
    is_double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def in_graphs(in_graph: Callable[..., R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let `torch.compile` trace another function in place of one.

    Args:
        in_graph: gets the function itself, which breaks the graph where it is called, and the arguments.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        outside = outside_graphs(function)

        @wraps(function)
        def either(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or _is_recorded():
                return in_graph(outside, *args, **kwargs)
            return outside(*args, **kwargs)

        return either

    return decorate


def _is_recorded() -> bool:
    """Whether `make_fx` records what is called."""
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return module is not None and module.get_proxy_mode() is not None


def listed(target: Any) -> Any:
    """A target's tensors as a list, which is traced, if it is a tensor or an iterable; else the target."""
    if isinstance(target, Tensor):
        return [target]
    if isinstance(target, (nn.Module, dict)):
        return target
    return list({id(item): item for item in target}.values())  # each once


def are_plain(tensors: Any) -> bool:
    """Whether these are tensors in a list, and none is a DTensor, whose mesh a graph does not hand over."""
    if not isinstance(tensors, list):
        return False
    return all(isinstance(tensor, Tensor) and not hasattr(tensor, "placements") for tensor in tensors)


def are_numbers(*given: Any) -> bool:
    """Whether these are what a graph may have as arguments; others are converted, or refused, outside."""
    return all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in given)


def gradients_of(parameters: Sequence[Any]) -> tuple[list[Tensor], list[int]] | None:
    """The local gradients that there are, and their positions; `None` if one is laid out in its own way.

    That is a DTensor which is partial or cut unlike its parameter, or elements that share memory.
    """
    gradients, positions = [], []
    for position, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        if hasattr(gradient, "placements"):
            if gradient.placements != parameter.placements:
                return None
            gradient = gradient.to_local()
        gradient = gradient.detach()
        if 0 in gradient.stride():
            return None
        gradients.append(gradient)
        positions.append(position)
    return gradients, positions


def trace_total_norm(
    outside: Callable[..., Tensor],
    tensors: Any,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    **more: Any,
) -> Tensor:
    """`get_total_norm` as a graph has it."""
    given = listed(tensors)
    if more or not are_plain(given) or not are_numbers(norm_type):
        return outside(given, norm_type, error_if_nonfinite, foreach, **more)
    values = [tensor.detach() for tensor in given]
    found: Tensor = total_norm(values, norm_type, error_if_nonfinite, _CALLS)
    return found


def trace_clip_grad_norm_(
    outside: Callable[..., Tensor],
    parameters: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    pp_mesh: Any = None,
    **more: Any,
) -> Tensor:
    """`clip_grad_norm_` as a graph has it."""
    given = listed(parameters)
    fits = are_plain(given) and are_numbers(max_norm, norm_type)
    found = gradients_of(given) if fits else None
    if found is None or pp_mesh is not None or more:
        return outside(given, max_norm, norm_type, error_if_nonfinite, foreach, pp_mesh, **more)
    values = [parameter.detach() for parameter in given]
    norm: Tensor = clip_grad_norm_(*found, values, max_norm, norm_type, error_if_nonfinite, _CALLS)
    return norm


def trace_clip(outside: Callable[..., ClipResult], clipper: Any) -> ClipResult:
    """`GradClipper.clip` as a graph has it."""
    found = gradients_of(clipper.parameters) if clipper.grad_place is None else None
    if found is None or clipper.config.clip.groups:
        return outside(clipper)
    numbers = clip(*found, clipper.number_in_graphs, len(FIELDS), _CALLS)
    result = ClipResult(*numbers[:4], *numbers[4:].bool())
    clipper.keep(result)  # for what the graph reads later
    return result
