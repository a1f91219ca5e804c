"""torch's three functions, exact on every topology. See `torch.nn.utils.clip_grad_norm_`."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from distnorm import policies
from distnorm.errors import DistnormError
from distnorm.measure.gradients import Gradients
from distnorm.measure.meter import Meter
from distnorm.measure.norms import norm
from distnorm.measure.readings import Measured
from distnorm.plan.collectives import Ranks
from distnorm.policies.deciding import apply
from distnorm.sources import (
    Inventory,
    Target,
    Tied,
    checked_tied,
    named_tensors,
    read_once,
    shards_of,
    stage_of,
)
from distnorm.sources.shards import GradShard, PartialGrad, itself, of_grad

_MOST_METERS = 32
_meters: OrderedDict[tuple[Any, ...], tuple[Meter, list[weakref.ref[Tensor]]]] = OrderedDict()
_same: OrderedDict[tuple[Any, ...], _Same] = OrderedDict()


@torch.no_grad()
def get_total_norm(
    tensors: Target,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    pp_mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
    tied: Tied = (),
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

    Returns:
        0-d fp32, the same bits on every rank. NaN where the ranks did not measure the same set: of
        tensors that are no parameters the plan knows only names and layouts, and these must change on
        every rank in the same call, or on none. Where gradients come and go by rank, give
        `clip_grad_norm_` the parameters instead. A rank that is given nothing does what the others do.

    Raises:
        ConfigError: `norm_type` is no order of a norm.
        NonFiniteGradientError: the norm is not finite and `error_if_nonfinite` is true.
        CoverageError, ReplicaError, DisagreementError, UnsupportedGradientError: the tensors can't be
            measured correctly; see `GradClipper`.

    Example:
        >>> distnorm.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    """
    return _measure(tensors, itself, norm_type, error_if_nonfinite, pp_mesh, group, tied).total_norm.float()


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Target, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scale gradients in place by ``min(1, max_norm / (total_norm + 1e-6))``.

    Not collective: it uses the norm that it is given, which must be the same on every rank.

    Args:
        parameters: what holds the gradients, as in `clip_grad_norm_`.
        max_norm: the threshold, at least 0; inf leaves every bit alone.
        total_norm: 0-d, such as `get_total_norm` returns.
        foreach: accepted for torch's sake, and ignored.

    Raises:
        ConfigError: `max_norm` is negative or NaN.
        DistnormError: gradients were given where parameters are meant.
    """
    threshold, parameters = policies.check_max_norm(max_norm), read_once(parameters)
    shards = shards_of(named_tensors(parameters), of_grad, target=parameters)
    readings = [shard.read() for shard in shards]
    gradients = [r.tensor if isinstance(r, PartialGrad) else r for r in readings if r is not None]
    total = torch.as_tensor(total_norm)
    total = total.full_tensor() if hasattr(total, "full_tensor") else total
    apply(policies.constant(total.double(), threshold), Gradients(gradients))


@torch.no_grad()
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
) -> Tensor:
    """Clip the gradient of the whole model, held in pieces by many ranks, to a norm.

    Collective: every rank of `group` must call it, whether it has gradients or not.

    Args:
        parameters: one parameter, an iterable of parameters or of (name, parameter) pairs, a module, or
            a list of modules (pipeline parts).
        max_norm: the threshold, at least 0; inf measures only.
        norm_type, error_if_nonfinite, foreach, pp_mesh, group, tied: as in `get_total_norm`.

    Returns:
        The norm before clipping, 0-d fp32, the same bits on every rank.

    Raises:
        ConfigError: `max_norm` is negative or NaN, or `norm_type` is no order of a norm.
        NonFiniteGradientError: the norm is not finite and `error_if_nonfinite` is true; gradients are as
            they were. (Otherwise they become what the formula gives, as in torch.)
        CoverageError, ReplicaError, DisagreementError, UnsupportedGradientError: the gradients can't be
            measured correctly; see `GradClipper`.

    Example:
        >>> distnorm.clip_grad_norm_(model.parameters(), max_norm=1.0)
    """
    measured = _measure(parameters, of_grad, norm_type, error_if_nonfinite, pp_mesh, group, tied, max_norm)
    decision = policies.constant(measured.total_norm, policies.check_max_norm(max_norm))
    apply(decision, Gradients(measured.gradients(), measured.scale_))
    return measured.total_norm.float()


def _measure(
    target: Target,
    take: Callable[[Tensor], Tensor | None],
    norm_type: float,
    raises: bool,
    pp_mesh: DeviceMesh | None,
    group: ProcessGroup | None,
    tied: Tied,
    max_norm: float | None = None,
) -> Measured:
    ranks = Ranks(group)
    try:
        target = read_once(target)
        order, threshold = norm(norm_type), policies.check_max_norm(max_norm)
        stage, tied = stage_of(pp_mesh), checked_tied(tied)
        terms = {"norm_type": order.order, "error_if_nonfinite": raises, "tied": tied}
        fixed = (id(ranks.group), *terms.values(), stage, take)
        same = _same.get((*fixed, *_key(target)))
        holders = same.holders(target) if same is not None else None
        named = named_tensors(target) if holders is None else []
    except DistnormError as error:
        Meter(ranks, norm(2), {}, (), raises).withdraw(error)

    def read() -> tuple[list[GradShard], list[str]]:
        pairs = named or named_tensors(target)
        shards = shards_of(pairs, take, target=target, stage=stage, tied=tied)
        return shards, [name for name, _ in pairs]

    now = {"max_norm": threshold}
    if same is not None and holders is not None:
        again = same.meter.measure_again(holders, lambda: read()[0], now)
        if again is not None:
            return again
        named = named_tensors(target)
    key = (*fixed, _signature(named, take))
    meter, shards = _cached(key, named), None
    if meter is None:
        meter = Meter(ranks, order, terms, tied, raises, may_follow=take is itself)
        if not named:
            return meter.follow()
        shards = meter.prepare_anew(read)
        _remember(key, meter, named if take is of_grad else [])
    if take is of_grad and holders is None:
        _remember_same((*fixed, *_key(target)), target, meter, named)
    try:
        shards = shards or read()[0]
    except DistnormError as error:
        Meter(ranks, order, terms, tied, raises).withdraw(error)
    return meter.measure([tensor for _, tensor in named], lambda: shards, store=take is of_grad, terms=now)


def _remember(key: tuple[Any, ...], meter: Meter, named: Sequence[tuple[str, Tensor]]) -> None:
    _meters[key] = meter, [weakref.ref(tensor) for _, tensor in named]
    if len(_meters) > _MOST_METERS:
        _meters.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _Same:
    """A target that was measured before. It keeps no module alive, nor parameters given in a list."""

    meter: Meter
    alive: list[weakref.ref[Any]]
    inventory: Inventory | None

    def holders(self, target: Any) -> Sequence[Tensor] | None:
        """The parameters, if they are the same ones still; found without a look at any of them."""
        given = [target] if self.inventory is not None else target
        if not all(map(is_, (ref() for ref in self.alive), given)):
            return None
        if self.inventory is None:
            return cast(Sequence[Tensor], target)
        return self.inventory.holders if self.inventory.is_current else None


def _key(target: Any) -> tuple[int, ...]:
    return tuple(map(id, target)) if isinstance(target, list | tuple) else (id(target),)


def _remember_same(
    key: tuple[Any, ...], target: Any, meter: Meter, named: Sequence[tuple[str, Tensor]]
) -> None:
    """Remember a module, or a list of just these tensors, each once and without a name."""
    if isinstance(target, nn.Module):
        alive = [weakref.ref(target, lambda _: _same.pop(key, None))]
        _same[key] = _Same(meter, alive, Inventory(target))
    elif isinstance(target, list | tuple) and _key(target) == tuple(id(tensor) for _, tensor in named):
        _same[key] = _Same(meter, [weakref.ref(tensor) for tensor in target], None)
    if len(_same) > _MOST_METERS:
        _same.popitem(last=False)


def _signature(
    named: Sequence[tuple[str, Tensor]], take: Callable[[Tensor], Tensor | None]
) -> tuple[Any, ...]:
    """What a plan depends on. Parameters live long and are known by themselves; of other tensors, which
    are new in every step, only their layout is known."""
    if take is of_grad:
        # FSDP1 may keep a parameter and give it another shape.
        return tuple((name, id(tensor), tensor.shape) for name, tensor in named)
    return tuple(
        (name, t.shape, t.dtype, getattr(t, "placements", None), getattr(t, "device_mesh", None))
        for name, t in named
    )


def _cached(key: tuple[Any, ...], named: Sequence[tuple[str, Tensor]]) -> Meter | None:
    meter, alive = _meters.get(key, (None, []))
    if any(ref() is not tensor for ref, (_, tensor) in zip(alive, named, strict=False)):
        return None  # another tensor has got the address of one that is gone
    if meter is not None:
        _meters.move_to_end(key)
    return meter
