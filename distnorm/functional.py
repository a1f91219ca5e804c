"""torch's three functions, exact on every topology. See `torch.nn.utils.clip_grad_norm_`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from distnorm import graphs, kernels, operators, policies
from distnorm.errors import DistnormError
from distnorm.measure.empty_rank import join_empty
from distnorm.measure.gradients import Given, Gradients, read_with_care
from distnorm.measure.meter import Meter
from distnorm.measure.norms import norm
from distnorm.plan.collectives import Ranks
from distnorm.plan.each_rank import for_each_rank
from distnorm.plan.stops import Stops, finish
from distnorm.policies.deciding import apply
from distnorm.sources import (
    UNDECLARED,
    GradOf,
    Layout,
    Sharded,
    Source,
    Target,
    Tied,
    named_tensors,
    read_once,
    recognise,
    shards_of,
)
from distnorm.sources.shards import GradShard, PartialGrad

R = TypeVar("R")

_log = logging.getLogger("distnorm")


@operators.called
def total_norm_in_graph(
    given: Mapping[int, Tensor], tensors: Sequence[Tensor], max_norm: float, norm_type: float, raises: bool
) -> Stops[Tensor]:
    """What `get_total_norm` does in a graph."""
    return (yield from _measure(tensors, Source.TENSOR, norm_type, raises, None, Layout)).result()


@graphs.in_graphs(graphs.trace_total_norm)
@for_each_rank
def get_total_norm(
    tensors: Target,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    pp_mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
    tied: Tied = (),
    sharded: Sharded = None,
) -> Tensor:
    """The norm of tensors as one vector, over all ranks that hold pieces of them.

    Collective: every rank of `group` must call it. The tensors are measured themselves, be they
    gradients, parameters or updates; a module stands for its parameters.

    Args:
        tensors: one tensor, an iterable of tensors or of (name, tensor) pairs, a module, or a list of
            modules. Floating-point or complex, dense, of any dtype; DTensors and plain tensors mix.
        norm_type: the order p, above 0, or inf.
        error_if_nonfinite: whether a norm that is not finite raises. Reads the result on the host.
        foreach: accepted for torch's sake, and ignored.
        pp_mesh: a 1-d mesh of pipeline stages, where stages use the same names for other tensors.
        group: the ranks that take part; default: the whole world, or this process alone.
        tied: groups of names that are one tensor.
        sharded: plain tensors that are pieces, as for `GradClipper`.

    Returns:
        0-d fp32, or fp64 where a tensor of any rank is fp64 or complex128; the same bits on every rank. Of
        tensors that are no parameters the plan knows only names and layouts, and these must change on every
        rank in the same call, or on none. Where gradients come and go by rank, give `clip_grad_norm_` the
        parameters instead. A rank that is given nothing does what the others do. On an accelerator, where
        nothing is read on the host, the norm is NaN where the ranks did not measure the same set.

    Raises:
        ConfigError: `norm_type` is no order of a norm.
        NonFiniteGradientError: the norm is not finite and `error_if_nonfinite` is true.
        CoverageError, ReplicaError, DisagreementError, UnsupportedGradientError: the tensors can't be
            measured correctly; see `GradClipper`.

    Example:
        >>> distnorm.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    """
    layout = partial(Layout.of, pp_mesh, tied, sharded)
    return _done(_measure(tensors, Source.TENSOR, norm_type, error_if_nonfinite, group, layout)).result()


@kernels.outside_graphs
@for_each_rank
def clip_grads_with_norm_(
    parameters: Target,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
    *,
    grad_of: GradOf = None,
) -> None:
    """Scale gradients in place by ``min(1, max_norm / (total_norm + 1e-6))``.

    Not collective: it uses the norm that it is given, which must be the same on every rank.

    Args:
        parameters: what holds the gradients, as in `clip_grad_norm_`.
        max_norm: the threshold, at least 0; inf leaves every bit alone.
        total_norm: 0-d, such as `get_total_norm` returns.
        foreach: accepted for torch's sake, and ignored.
        grad_of: where gradients are, as for `GradClipper`.

    Raises:
        ConfigError: `max_norm` is negative or NaN.
        DistnormError: gradients were given where parameters are meant.
        UnsupportedGradientError: a gradient can't be multiplied, or FSDP2 holds it back; nothing has changed
            then.
    """
    with kernels.Untracked():
        threshold, parameters = policies.check_max_norm(max_norm), read_once(parameters)
        known, _ = recognise(parameters, Source.GRADIENT, ("clip_grads_with_norm_",))
        if known.managers is not None:
            known.managers.refuse_unreduced()
        layout = Layout.of(grad_of=grad_of)
        shards = shards_of(named_tensors(parameters), Source.GRADIENT, target=parameters, layout=layout)
        readings, problems = read_with_care(shards)
        gradients = Gradients([r.tensor if isinstance(r, PartialGrad) else r for r in readings], problems)
        gradients.lay_out(shards, "one")
        gradients.raise_problems()
        total = torch.as_tensor(total_norm)
        total = total.full_tensor() if hasattr(total, "full_tensor") else total
        apply(policies.constant(total.double(), threshold), gradients)


@operators.called
def clip_in_graph(
    given: Mapping[int, Tensor], parameters: Sequence[Tensor], max_norm: float, norm_type: float, raises: bool
) -> Stops[Tensor]:
    """What `clip_grad_norm_` does in a graph."""
    holders = [parameter.detach() for parameter in parameters]
    for position, gradient in given.items():
        holders[position] = holders[position].to(gradient.dtype)  # the same tensor, where dtypes are equal
        holders[position].grad = gradient
    return _clip(holders, max_norm, norm_type, raises, None, Layout, given)


@graphs.in_graphs(graphs.trace_clip_grad_norm_)
@for_each_rank
def clip_grad_norm_(
    parameters: Target,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    pp_mesh: DeviceMesh | None = None,
    *,
    group: ProcessGroup | None = None,
    tied: Tied = (),
    sharded: Sharded = None,
    grad_of: GradOf = None,
) -> Tensor:
    """Clip the gradient of the whole model, held in pieces by many ranks, to a norm.

    Collective: every rank of `group` must call it, whether it has gradients or not. Of several models that
    are clipped in turn, each should have a `GradClipper`, which keeps its plan.

    Args:
        parameters: one parameter, an iterable of parameters or of (name, parameter) pairs, a module, or
            a list of modules (pipeline parts).
        max_norm: the threshold, at least 0, the same on every rank; inf measures only.
        norm_type, error_if_nonfinite, foreach, pp_mesh, group, tied, sharded: as in `get_total_norm`.
        grad_of: where gradients are, as for `GradClipper`. Give the same function in every call.

    Returns:
        The norm before clipping, 0-d fp32, or fp64 as in `get_total_norm`; the same bits on every rank.

    Raises:
        ConfigError: `max_norm` is negative or NaN, or `norm_type` is no order of a norm.
        NonFiniteGradientError: the norm is not finite and `error_if_nonfinite` is true; gradients are as
            they were. (Otherwise they become what the formula gives, as in torch.)
        CoverageError, ReplicaError, DisagreementError, UnsupportedGradientError: the gradients can't be
            measured correctly; see `GradClipper`.

    Example:
        >>> distnorm.clip_grad_norm_(model.parameters(), max_norm=1.0)
    """
    layout = partial(Layout.of, pp_mesh, tied, sharded, grad_of)
    return _done(_clip(parameters, max_norm, norm_type, error_if_nonfinite, group, layout))


def _done(work: Stops[R]) -> R:
    with kernels.Untracked():
        return finish(work)


def _clip(
    target: Target,
    max_norm: float,
    norm_type: float,
    raises: bool,
    group: ProcessGroup | None,
    layout_of: Callable[[], Layout],
    given: Given = None,
) -> Stops[Tensor]:
    measured = yield from _measure(
        target, Source.GRADIENT, norm_type, raises, group, layout_of, max_norm, given
    )
    decision = policies.constant(measured.total_norm, policies.check_max_norm(max_norm))
    if isinstance(measured.agreed, Tensor):  # not read on the host: whether the ranks measured the same
        decision = decision.where(measured.agreed)
    apply(decision, measured.gradients)
    return measured.result()


class _Measured(NamedTuple):
    gradients: Gradients
    total_norm: Tensor
    agreed: Tensor | bool
    is_double: bool

    def result(self) -> Tensor:
        return self.total_norm if self.is_double else self.total_norm.float()


def _measure(
    target: Target,
    source: Source,
    norm_type: float,
    raises: bool,
    group: ProcessGroup | None,
    layout_of: Callable[[], Layout],
    max_norm: float | None = None,
    given: Given = None,
) -> Stops[_Measured]:
    ranks, is_gradient = (group if isinstance(group, Ranks) else Ranks(group)), source is Source.GRADIENT
    try:
        target = read_once(target)
        order, threshold = norm(norm_type), policies.check_max_norm(max_norm)
        layout = layout_of()
        terms = {"norm_type": order.order, "error_if_nonfinite": raises, **layout.terms}
        known, holders = recognise(target, source, (order.order, raises, layout))
        if not is_gradient:
            _warn_of_weights(holders)
    except DistnormError as error:
        Meter(ranks, norm(2), {}, UNDECLARED, raises, raises).abort(error)
    if ranks.is_connected and known.is_joining(holders):
        # The ranks that are out of data make no step, and replicas hold all of it.
        ranks = Ranks(alone=True)

    def describe() -> list[GradShard]:
        return shards_of(named_tensors(target), source, target=target, layout=layout)

    meter = ranks.state.recall(known.key)
    if meter is None or not holders:
        meter = Meter(ranks, order, terms, layout, raises, raises, source=source, allow_empty=not is_gradient)
        meter.managers = known.managers
        if not holders:  # which plan the others have, it can't know
            total_norm, is_double = join_empty(meter)
            return _Measured(Gradients([]), total_norm, True, is_double)
        meter.prepare_anew(lambda: (describe(), named_tensors(target)))
        ranks.state.remember(known.key, meter)
    else:
        meter.managers = known.managers
        meter.describe_by(describe)
    try:
        gradients = meter.read(holders, store=is_gradient)
        meter.given = given
        terms_now = {"max_norm": threshold}
        gradients, reduced = yield from meter.reduce(gradients, terms=terms_now, store=is_gradient)
    finally:
        meter.describe_by(list)
    assert meter.plan is not None
    return _Measured(gradients, reduced.total_norm, reduced.agreed, meter.plan.is_double)


def _warn_of_weights(tensors: Sequence[Tensor]) -> None:
    """Say once that parameters are measured themselves, where gradients may have been meant."""
    if tensors and not _said and all(isinstance(t, nn.Parameter) and t.grad is not None for t in tensors):
        _said.append(True)
        _log.warning(
            "get_total_norm was given %d parameters, and measures the parameters themselves; for the norm of "
            "their gradients pass [p.grad for p in ...], or call clip_grad_norm_ with max_norm=float('inf')",
            len(tensors),
        )


_said: list[bool] = []
