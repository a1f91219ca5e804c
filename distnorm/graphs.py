"""Within `torch.compile` and `make_fx`: a call is traced as operators, and nothing breaks the graph.

A graph keeps nothing else of us: what its operators (`distnorm.operators`) call has a key.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from distnorm import operators
from distnorm.kernels import outside_graphs
from distnorm.measure.exchange import Exchange
from distnorm.measure.norms import norm
from distnorm.operators import CALLS
from distnorm.plan.collectives import Ranks
from distnorm.plan.group_state import FORMS
from distnorm.plan.stops import Form, Stops, all_reduce_in_graph
from distnorm.policies.deciding import Outcome
from distnorm.policies.results import ClipResult
from distnorm.step import Step

P = ParamSpec("P")
R = TypeVar("R")

_USUAL_ORDERS = (2.0, 1.0, 3.0, math.inf)

FIELDS = tuple(field.name for field in fields(ClipResult) if field.name != "groups")
"""Of a result: four numbers, then three flags."""


def numbers_of(step: Stops[Outcome]) -> Stops[Tensor]:
    """What a graph gets of a step's result, [FIELDS] fp64."""
    result = (yield from step).result
    return torch.stack([getattr(result, name).double() for name in FIELDS])


def form_of_step(step: Step) -> Form | None:
    """What a graph has to know of a step's all-reduce; `None` if there is none, or not always one as long."""
    if not step.groups.measures or step.config.monitor.every is not None:
        return None
    home = next((shard.holder.device for shard in step.meter.shards), torch.device("cpu"))
    payload = step.groups.payload
    return step.meter.exchange.form_in_graph(0 if payload is None else payload.length, home)


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


def _traced_as_constant(function: Callable[P, R]) -> Callable[P, R]:
    """Let `torch.compile` call a function as it traces, and keep the result, until an argument is another.

    It is `torch.compiler.assume_constant_result`, which would import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_traced_as_constant
def _form_of_clipper(caller: str, version: str) -> Form | None:
    return operators.form_of_clipper(caller)


@_traced_as_constant
def _form_of_function(norm_type: float, measures_tensors: bool, device: str, version: str) -> Form | None:
    order, ranks = norm(norm_type), Ranks()
    return Exchange(ranks, order).form_in_graph(0, torch.device(device), is_full=measures_tensors)


def _as_constant(norm_type: float) -> float:
    """A usual order as a constant of the graph, which may take a number that has changed for a variable."""
    for usual in _USUAL_ORDERS:
        if norm_type == usual:
            return usual
    return norm_type


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
    values, dtype = [tensor.detach() for tensor in given], _dtype_of(given)
    name, order, raises = "total_norm_in_graph", _as_constant(norm_type), bool(error_if_nonfinite)
    form = _form_of_function(order, True, _device_of(given), FORMS.version) if given else None
    if form is None:
        found: Tensor = operators.total_norm(values, name, order, raises, dtype, CALLS)
        return found
    vector = operators.statistic([], [], values, name, 0.0, order, raises, *form, CALLS)
    reduced = all_reduce_in_graph(vector, form.op, form.group_name)
    found = operators.norm(values, reduced, name, dtype, CALLS)
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
    device = _device_of([*found[0], *given])
    order = _as_constant(norm_type)
    form = _form_of_function(order, False, device, FORMS.version) if given else None
    settings = (max_norm, order, bool(error_if_nonfinite))
    values = [parameter.detach() for parameter in given]
    return _clipped(found, values, "clip_in_graph", settings, form, 0, _dtype_of(given))


def trace_clip(outside: Callable[..., ClipResult], clipper: Any) -> ClipResult:
    """`GradClipper.clip` as a graph has it."""
    found = gradients_of(clipper.parameters) if clipper.grad_place is None else None
    if found is None or clipper.config.clip.groups:
        return outside(clipper)
    key = clipper.key_in_graphs
    form = _form_of_clipper(key, FORMS.version)
    numbers = _clipped(found, [], key, (0.0, 0.0, False), form, len(FIELDS), torch.float64)
    result = ClipResult(*numbers[:4], *numbers[4:].bool())
    clipper.keep(result)  # for what the graph reads later
    return result


def _clipped(
    found: tuple[list[Tensor], list[int]],
    parameters: list[Tensor],
    caller: str,
    settings: operators.Settings,
    form: Form | None,
    numbers: int,
    dtype: torch.dtype,
) -> Tensor:
    if form is None:
        clipped: Tensor = operators.clip(*found, parameters, caller, *settings, numbers, dtype, CALLS)
        return clipped
    vector = operators.statistic(*found, parameters, caller, *settings, *form, CALLS)
    reduced = all_reduce_in_graph(vector, form.op, form.group_name)
    clipped = operators.scale_(*found, parameters, reduced, caller, numbers, dtype, CALLS)
    return clipped


def _device_of(tensors: Sequence[Tensor]) -> str:
    return str(tensors[0].device) if tensors else "cpu"


def _dtype_of(tensors: Sequence[Tensor]) -> torch.dtype:
    is_double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return torch.float64 if is_double else torch.float32
