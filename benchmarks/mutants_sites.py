"""Every collective of a forward and backward, found and spoilt by wrapping torch's own functions.

A site is one call of one function on one rank: the n-th all-reduce, say. A mutant spoils one site on all
ranks that make the call. What is called where is learnt from module hooks, and from FSDP2's own names.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed import distributed_c10d

from distnorm.verification.doctor.tracing import INPUT, INPUT_GRADIENT, OUTPUT, OUTPUT_GRADIENT, Boundary

FACTOR = 3.0  # of "scale": no number of ranks or micro-batches here


@dataclass(frozen=True)
class Site:
    """One call: which function, its number on this rank, and what it is about.

    Args:
        stage: the pipeline stage that makes the call.
        what: the kind of collective.
        number: which call of that kind.
        axis: the mesh axis of its group.
        where: the module that it serves, or the FSDP unit, or the parameter.
        is_unit: whether `where` is an FSDP unit, with all its parameters.
        phase: "forward", "backward" or "gradient" (of parameters).
        size: ranks of the group.
        dtype: of what travels.
    """

    stage: int
    what: str
    number: int
    axis: str
    where: str
    is_unit: bool
    phase: str
    size: int
    dtype: str


@dataclass(frozen=True)
class Mutation:
    """How one site is spoilt: dropped, doubled, scaled, or moved to another axis."""

    site: Site
    how: str


class _Done:
    def wait(self, *_: Any, **__: Any) -> bool:
        return True


class _Spoilt:
    """A receive whose buffer is spoilt as soon as it is complete."""

    def __init__(self, work: Any, spoil: Callable[[], None]) -> None:
        self._work, self._spoil = work, spoil

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        done = self._work.wait(*args, **kwargs)
        self._spoil()
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Sites:
    """Counts calls, tells where they come from, and spoils one.

    Args:
        axes: mesh axis -> this rank's group along it.
        stage: this rank's pipeline stage.
        mutation: what is spoilt; `None` for nothing.
    """

    def __init__(self, axes: dict[str, dist.ProcessGroup], stage: int, mutation: Mutation | None) -> None:
        self.found: list[Site] = []
        self._axes, self._stage, self._mutation = axes, stage, mutation
        self._counts: dict[str, int] = {}
        self._stack: list[str] = []
        self._backward: str | None = None
        self.parameter: str | None = None  # set by who reduces gradients by hand
        self.names: dict[int, str] = {}  # of parameters, by `id`

    def on_tensor(self, boundary: Boundary, call: int, tensor: Tensor) -> None:
        """Follow the run: a tracer's callback."""
        if boundary.kind == INPUT and boundary.which == 0:
            self._stack.append(boundary.module)
        elif boundary.kind == OUTPUT and boundary.module in self._stack:
            while self._stack.pop() != boundary.module:
                pass
        elif boundary.kind == OUTPUT_GRADIENT:
            self._backward = boundary.module
        elif boundary.kind == INPUT_GRADIENT:  # this module is done: what comes next is of the one around it
            self._backward = boundary.module.rpartition(".")[0]

    def how(self, what: str, group: Any, dtype: torch.dtype) -> str | None:
        """Note a call; whether, and how, it is spoilt."""
        number = self._counts[what] = self._counts.get(what, -1) + 1
        axis, size = self._axis_of(group)
        unit = _unit()
        in_backward = torch._C._current_graph_task_id() != -1
        where = unit if unit is not None else self.parameter
        phase = "gradient" if self.parameter is not None else "backward" if in_backward else "forward"
        if where is None:
            where = (self._backward or "") if in_backward else (self._stack[-1] if self._stack else "")
        if unit is not None and what.startswith("reduce"):
            phase = "gradient"
        site = Site(self._stage, what, number, axis, where, unit is not None, phase, size, str(dtype))
        self.found.append(site)
        mutation = self._mutation
        if mutation is None or (mutation.site.stage, mutation.site.what, mutation.site.number) != (
            self._stage,
            what,
            number,
        ):
            return None
        return mutation.how

    def other_group(self, group: Any) -> dist.ProcessGroup:
        """The group of another axis of the same size."""
        axis, size = self._axis_of(group)
        return next(g for a, g in self._axes.items() if a != axis and g.size() == size)

    def _axis_of(self, group: Any) -> tuple[str, int]:
        resolved = _resolved(group)
        ranks = dist.get_process_group_ranks(resolved)
        for axis, other in self._axes.items():
            if dist.get_process_group_ranks(other) == ranks:
                return axis, len(ranks)
        return f"ranks {ranks}", len(ranks)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Wrap torch's functions."""
        inner = _Inner()

        def wrapped(what: str, home: Any, name: str, spoil: Callable[..., Any]) -> Any:
            original = getattr(home, name)
            signature = inspect.signature(original)

            def call(*args: Any, **kwargs: Any) -> Any:
                if inner.is_within:
                    return original(*args, **kwargs)
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                with inner:
                    return spoil(self, what, original, *bound.args, **bound.kwargs)

            return call

        patches = []
        for home, name, spoil in (
            (funcol, "all_reduce", _functional_all_reduce),
            (funcol, "all_gather_single", _functional_all_gather),
            (funcol, "reduce_scatter_single", _functional_reduce_scatter),
            (dist, "all_reduce", _all_reduce),
            (dist, "all_gather_single", _all_gather),
            (dist, "reduce_scatter_single", _reduce_scatter),
            (dist, "all_to_all_single", _all_to_all),
            (dist, "irecv", _irecv),
        ):
            replacement = wrapped(name, home, name, spoil)
            patches.append(mock.patch.object(home, name, replacement))
            if name == "irecv":
                patches.append(mock.patch.object(distributed_c10d, name, replacement))
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.stop()


class _Inner:
    """A collective that calls another one is one site."""

    is_within = False

    def __enter__(self) -> None:
        self.is_within = True

    def __exit__(self, *_: Any) -> None:
        self.is_within = False


def _resolved(group: Any) -> dist.ProcessGroup:
    if group is None:
        return dist.group.WORLD
    if isinstance(group, tuple):
        mesh, dim = group
        return mesh.get_group(dim)
    if isinstance(group, str):
        return distributed_c10d._resolve_process_group(group)
    return group


def _unit() -> str | None:
    """The FSDP2 unit that is calling."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        me = frame.f_locals.get("self")
        if type(me).__name__ == "FSDPParamGroup":
            return me._module_fqn or ""
        frame = frame.f_back
    return None


def _functional_all_reduce(s: Sites, what: str, call: Any, x: Tensor, op: str, group: Any, *rest: Any) -> Any:
    how = s.how(what, group, x.dtype)
    if how == "drop":
        return x.clone()
    if how == "move":
        return call(x, op, s.other_group(group), *rest)
    out = call(x, op, group, *rest)
    if how == "double":
        return call(funcol.wait_tensor(out), op, group, *rest)
    return funcol.wait_tensor(out) * FACTOR if how == "scale" else out


def _functional_all_gather(
    s: Sites, what: str, call: Any, x: Tensor, dim: int, group: Any, *rest: Any
) -> Any:
    how = s.how(what, group, x.dtype)
    if how == "drop":
        return torch.cat([x] * _resolved(group).size(), dim)
    if how == "move":
        return call(x, dim, s.other_group(group), *rest)
    out = call(x, dim, group, *rest)
    return funcol.wait_tensor(out) * FACTOR if how == "scale" else out


def _functional_reduce_scatter(
    s: Sites, what: str, call: Any, x: Tensor, op: str, dim: int, group: Any, *rest: Any
) -> Any:
    how, resolved = s.how(what, group, x.dtype), _resolved(group)
    if how == "drop":
        return x.chunk(resolved.size(), dim)[resolved.rank()].clone()
    if how == "move":
        return call(x, op, dim, s.other_group(group), *rest)
    out = call(x, op, dim, group, *rest)
    if how == "double":
        return funcol.wait_tensor(out) * resolved.size()
    return funcol.wait_tensor(out) * FACTOR if how == "scale" else out


def _all_reduce(
    s: Sites,
    what: str,
    call: Any,
    tensor: Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    how = s.how(what, group, tensor.dtype)
    if how == "drop":
        return _Done() if async_op else None
    if how == "move":
        group = s.other_group(group)
    work = call(tensor, op, group, async_op)
    if how in ("double", "scale"):
        if async_op:
            work.wait()
        call(tensor, op, group) if how == "double" else tensor.mul_(FACTOR)
    return work


def _all_gather(
    s: Sites,
    what: str,
    call: Any,
    output_tensor: Tensor,
    input_tensor: Tensor,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    how, out, x = s.how(what, group, input_tensor.dtype), output_tensor, input_tensor
    if how == "drop":
        out.copy_(torch.cat([x.reshape(-1)] * _resolved(group).size()).view_as(out))
        return _Done() if async_op else None
    if how == "move":
        group = s.other_group(group)
    work = call(out, x, group, async_op)
    if how == "scale":
        if async_op:
            work.wait()
        out.mul_(FACTOR)
    return work


def _reduce_scatter(
    s: Sites, what: str, call: Any, output: Tensor, input: Tensor, op: Any, group: Any, async_op: bool
) -> Any:
    how, resolved = s.how(what, group, input.dtype), _resolved(group)
    if how == "drop":
        output.copy_(input.reshape(resolved.size(), -1)[resolved.rank()].view_as(output))
        return _Done() if async_op else None
    if how == "move":
        group = s.other_group(group)
    work = call(output, input, op, group, async_op)
    if how in ("double", "scale"):
        if async_op:
            work.wait()
        output.mul_(resolved.size() if how == "double" else FACTOR)
    return work


def _all_to_all(
    s: Sites,
    what: str,
    call: Any,
    output: Tensor,
    input: Tensor,
    ours: Any,
    theirs: Any,
    group: Any,
    wait: bool,
) -> Any:
    how, rest = s.how(what, group, input.dtype), (ours, theirs, group, wait)
    if how == "drop":
        output.copy_(input.view_as(output))
        return None
    work = call(output, input, *rest)
    if how == "double":
        again = output.clone()
        call(output, again, *rest)
    if how == "scale":
        output.mul_(FACTOR)
    return work


def _irecv(s: Sites, what: str, call: Any, tensor: Tensor, source: Any, group: Any, *rest: Any) -> Any:
    how = s.how(what, group, tensor.dtype)
    work = call(tensor, source, group, *rest)
    if how == "drop":
        return _Spoilt(work, lambda: tensor.zero_())
    return _Spoilt(work, lambda: tensor.mul_(FACTOR)) if how == "scale" else work
