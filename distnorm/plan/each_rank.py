"""What is called once in torch's LocalTensorMode is done by each rank that it simulates.

Each rank gets the target as it would hold it: its pieces of every tensor, on meshes that know its place.
Scaling changes the pieces in place. What the ranks return is joined to LocalTensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar, cast

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from distnorm import kernels
from distnorm.errors import DistnormError
from distnorm.plan.lockstep import local_tensor_mode
from distnorm.plan.simulation import RankMesh, local_tensor, mode_in_force, simulation_of
from distnorm.sources import Fleeting, Managers, Target, dtensor, fsdp1, named_tensors, read_once

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class EachRank(Generic[T]):
    """A target as each simulated rank holds it, and what each rank has made of it.

    Args:
        target: the caller's, of LocalTensors, of DTensors of them, or of tensors that all ranks have alike.
        group: the process group of the simulated ranks.

    Attributes:
        each: what was made, by rank.
    """

    def __init__(self, target: Target, group: ProcessGroup | None) -> None:
        self._target, self._simulation = read_once(target), simulation_of(group)
        self._targets = {rank: Fleeting() for rank in self._simulation.members}
        self._tensors: list[tuple[Tensor, dict[int, Tensor]]] = []
        self._seen: list[object] = []
        self._meshes: dict[tuple[int, int], RankMesh] = {}
        self._managers = Managers(())
        self.each: dict[int, T] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """The target's, as the caller gave them."""
        return [tensor for tensor, _ in self._tensors]

    def make(self, kind: Callable[..., T], *args: Any, **kwargs: Any) -> None:
        """Let every rank make something of its target and its group, which methods are then called on."""
        self.each = self._run(kind, args, kwargs)

    def call(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Call a function on every rank, of its target, or of what it has made of that; and join the results.

        Args:
            function: gets further arguments as the rank has them; and its group, if it takes one.
            args, kwargs: these arguments.
        """
        return cast(R, joined(self._run(function, args, kwargs)))

    def ask(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Call what is not collective, of what every rank has made, within LocalTensorMode or outside."""

        def of_rank(rank: int) -> R:
            return function(self.each[rank], *args, **kwargs)

        within = local_tensor_mode() is not None
        found = self._simulation.run(of_rank) if within else {rank: of_rank(rank) for rank in self.each}
        return cast(R, joined(found))

    def _run(
        self, function: Callable[..., R], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[int, R]:
        """Run it on every rank, with its gradients as they are now."""
        takes_group = not self.each and "group" in inspect.signature(function).parameters

        def of_rank(rank: int) -> R:
            with kernels.plain_operators():
                mine = [self._argument(value, rank) for value in args]
                named = {name: self._argument(value, rank) for name, value in kwargs.items()}
            if takes_group:
                named["group"] = self._simulation.ranks[rank]
            return function(self.each.get(rank, self._targets[rank]), *mine, **named)

        with mode_in_force().disable(), kernels.plain_operators():
            self._refresh()
            self._managers.refuse_unreduced()
            given = self._lend_gradients()
        try:
            return self._simulation.run(of_rank)
        finally:
            self._take_gradients(given)

    # ---- what each rank holds

    def _refresh(self) -> None:
        """Cut the target up, if it is another one than before; in the same lists, so that ranks see it."""
        named = named_tensors(self._target)
        seen: list[object] = [part for _, t in named for part in (t, *(_pieces(t) or {}).values())]
        if len(seen) == len(self._seen) and all(a is b for a, b in zip(seen, self._seen, strict=True)):
            return
        for target in self._targets.values():
            target.clear()
        self._seen, self._managers, self._tensors = seen, Managers(named), []
        for name, tensor in named:
            if fsdp1.holds(tensor):
                raise DistnormError(
                    f"parameter '{name}': expected tensors that LocalTensorMode can simulate, found FSDP1's; "
                    "shard with fully_shard (FSDP2), or use torch's fake process group for a dry run"
                )
            views: dict[int, Tensor] = {}
            for rank, target in self._targets.items():
                piece = self._piece(tensor, rank)
                if piece is not None:
                    views[rank] = piece.requires_grad_(tensor.requires_grad)
                    target.append((name, views[rank]))
            self._tensors.append((tensor, views))

    def _piece(self, tensor: Tensor, rank: int, *, shared: bool = True) -> Tensor | None:
        """What one rank holds of a tensor; `None` if nothing.

        Args:
            tensor: the caller's.
            rank: which rank.
            shared: whether ranks may have one memory, where the caller has given one tensor for all of them.
        """
        pieces = _pieces(tensor)
        if pieces is not None and rank not in pieces:
            return None
        local = (_inner(tensor) if pieces is None else pieces[rank]).detach()
        if pieces is None and not shared and rank != self._simulation.members[0]:
            local = local.clone()  # only the first rank's is scaled where it lies
        if not dtensor.holds(tensor):
            return local
        return _as_dtensor(local, tensor, self._mesh(tensor.device_mesh, rank))  # type: ignore[attr-defined]

    def _mesh(self, mesh: DeviceMesh, rank: int) -> RankMesh:
        key = id(mesh), rank
        if key not in self._meshes:
            self._meshes[key] = RankMesh(self._simulation, mesh, rank)
        return self._meshes[key]

    def _argument(self, value: Any, rank: int) -> Any:
        if isinstance(value, DeviceMesh):
            return self._mesh(value, rank)
        return self._piece(value, rank) if isinstance(value, Tensor) else value

    # ---- gradients

    def _lend_gradients(self) -> list[dict[int, Tensor | None]]:
        given: list[dict[int, Tensor | None]] = []
        for tensor, views in self._tensors:
            gradient = tensor.grad
            mine = {r: None if gradient is None else self._piece(gradient, r, shared=False) for r in views}
            for rank, view in views.items():
                view.grad = None
                view.grad = mine[rank]
            given.append(mine)
        return given

    def _take_gradients(self, given: Sequence[Mapping[int, Tensor | None]]) -> None:
        """Put what ranks have stored in place of a gradient, such as a reduced one, where it was."""
        for (tensor, views), before in zip(self._tensors, given, strict=True):
            stored = {rank: view.grad for rank, view in views.items() if view.grad is not None}
            if len(stored) == len(views) and any(stored[rank] is not before[rank] for rank in views):
                like = next(iter(stored.values()))
                with kernels.plain_operators():  # a mode of all ranks can't take what only some have
                    local = local_tensor({rank: _inner(gradient) for rank, gradient in stored.items()})
                    tensor.grad = None
                    tensor.grad = _as_dtensor(local, like, tensor.device_mesh)  # type: ignore[attr-defined]


def for_each_rank(function: Callable[P, R]) -> Callable[P, R]:
    """Let each simulated rank do what a function does with a target, its first argument."""

    @wraps(function)
    def either(*args: P.args, **kwargs: P.kwargs) -> R:
        if local_tensor_mode() is None:
            return function(*args, **kwargs)
        target, rest, named = _apart(function, args, kwargs)
        return EachRank[None](target, named.pop("group", None)).call(function, *rest, **named)

    return either


def _apart(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The target, however it is given, and the other arguments."""
    for name in ("sharded", "grad_of"):
        if kwargs.get(name) is not None:
            raise DistnormError(
                f"{name}: expected none in LocalTensorMode, whose tensors stand for all ranks' tensors; "
                "found one; use torch's fake process group for a dry run"
            )
    if args:
        return args[0], args[1:], dict(kwargs)
    named = inspect.signature(function).bind(**kwargs).arguments
    return named.pop(next(iter(named))), (), named


def by_each_rank(*collective: str, tensors: str) -> Callable[[type[T]], type[T]]:
    """Let an object of a class that is made in LocalTensorMode stand for one object of each simulated rank.

    Args:
        collective: methods that all ranks call together. What other public methods and properties return is
            joined too, but no rank may meet others in them.
        tensors: the property that has the target's tensors, which are the caller's and no rank's.
    """

    def decorate(kind: type[T]) -> type[T]:
        made: Callable[..., None] = kind.__init__

        @wraps(made)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            self.of_ranks = None
            if local_tensor_mode() is None:
                made(self, *args, **kwargs)
            else:
                target, rest, named = _apart(kind, args, kwargs)
                self.of_ranks = EachRank[T](target, named.pop("group", None))
                self.of_ranks.make(kind, *rest, **named)

        kind.__init__ = init  # type: ignore[method-assign]
        for name, of_one in list(vars(kind).items()):
            if name.startswith("_") and name != "__repr__":
                continue
            function: Any = of_one.fget if isinstance(of_one, property) else of_one
            wrapped = _by_each(function, is_collective=name in collective, has_tensors=name == tensors)
            setattr(kind, name, property(wrapped) if isinstance(of_one, property) else wrapped)
        return kind

    return decorate


def _by_each(function: Callable[..., Any], *, is_collective: bool, has_tensors: bool) -> Callable[..., Any]:
    @wraps(function)
    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.of_ranks is None:
            return function(self, *args, **kwargs)
        ranks: EachRank[Any] = self.of_ranks
        if has_tensors:
            return ranks.tensors
        return (ranks.call if is_collective else ranks.ask)(function, *args, **kwargs)

    return either


def _inner(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, or a tensor itself, when it has arrived."""
    inner: Any = tensor._local_tensor if dtensor.holds(tensor) else tensor  # type: ignore[attr-defined]
    arrived: Tensor = inner.trigger_wait() if hasattr(inner, "trigger_wait") else inner
    return arrived


def _pieces(tensor: Tensor) -> Mapping[int, Tensor] | None:
    """What each rank holds of a tensor; `None` where all of them are given one."""
    pieces: Mapping[int, Tensor] | None = getattr(_inner(tensor), "_local_tensors", None)
    return pieces


def _as_dtensor(local: Tensor, like: Tensor, mesh: DeviceMesh) -> Tensor:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    assert isinstance(like, DTensor)
    # `from_local` would ask the mesh for a place that not every simulated rank has on it.
    meta = TensorMeta(like.shape, like.stride(), local.dtype)
    spec = DTensorSpec(mesh, like.placements, tensor_meta=meta)
    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def joined(values: Mapping[int, Any]) -> Any:
    """What ranks returned, as one: tensors as LocalTensors, of everything else what the lowest rank has."""
    first = next(iter(values.values()))
    if isinstance(first, Tensor):
        return local_tensor({rank: value.detach() for rank, value in values.items()})
    if isinstance(first, Mapping) and any(is_dataclass(value) for value in first.values()):
        return {key: joined({rank: value[key] for rank, value in values.items()}) for key in first}
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first)]
        return replace(first, **{n: joined({r: getattr(v, n) for r, v in values.items()}) for n in names})
    return first
