"""Work that stops where it needs an all-reduce, so that a graph can do that in its place.

A step is written once, from top to bottom, as a generator. Eagerly `finish` runs it and issues its
all-reduces. In a graph one operator runs it up to the first, the graph reduces, and another operator runs the
rest.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from distnorm.errors import DistnormError
from distnorm.plan.collectives import Ranks
from distnorm.plan.group_state import FORMS

R = TypeVar("R")
Wanted = tuple[Ranks, Tensor, str]
"""An all-reduce: whose, of what, in place, and by which op."""

Stops = Generator[Wanted, Tensor, R]
"""Work that yields each all-reduce that it needs, and is sent the reduced tensor."""


def finish(work: Stops[R]) -> R:
    """Do work, and issue its all-reduces. Collective, as the work is."""
    try:
        ranks, tensor, op = next(work)
        while True:
            ranks, tensor, op = work.send(ranks.all_reduce_(tensor, op))
    except StopIteration as end:
        result: R = end.value
        return result
    finally:
        work.close()  # at once, if the all-reduce raises


class Form(NamedTuple):
    """What a graph knows of an all-reduce when it is traced.

    Args:
        length: of the vector.
        op: ``"sum"`` or ``"max"``.
        group_name: of the process group.
        device: of the vector.
    """

    length: int
    op: str
    group_name: str
    device: torch.device


@dataclass(slots=True)
class Stopped(Generic[R]):
    """Work that has stopped at its first all-reduce, which a graph issues.

    Args:
        work: the work.
        wanted: what is reduced eagerly after all, since it is not as long as when the graph was traced; else
            `None`.
        given: the tensors that the work was given, by position. Before it goes on, these are exchanged for
            those that it may change.
        device: where it goes on with what was reduced.
    """

    work: Stops[R]
    wanted: Wanted | None
    given: dict[int, Tensor]
    device: torch.device

    @classmethod
    def at_first(cls, work: Stops[R], given: dict[int, Tensor], form: Form) -> tuple[Stopped[R], Tensor]:
        """Do work up to its first all-reduce.

        The length follows from what all ranks of the group have planned and found together, so it changes on
        all of them in one step. A graph that was traced before then reduces zeros, and `finish` the vector.

        Args:
            work: not begun.
            given: what it was given.
            form: what the graph was traced with.

        Returns:
            What is left, and this rank's vector, [form.length] fp64.

        Raises:
            DistnormError: the work needs no all-reduce, or one of another group.
        """
        try:
            wanted = next(work)
        except StopIteration:
            raise DistnormError(
                "expected a step of all ranks, with which the graph was made, found one without an "
                "all-reduce; call it outside of the compiled function"
            ) from None
        ranks, vector, op = wanted
        if ranks.group_name != form.group_name or op != form.op:
            work.close()
            raise DistnormError(
                f"expected the process group and norm that the graph was made with ({form.group_name!r}, "
                f"{form.op}), found others ({ranks.group_name!r}, {op}); compile again, or under Join call "
                "it outside of the compiled function"
            )
        if len(vector) == form.length:  # a copy: a graph may put something else into its memory
            return cls(work, None, given, vector.device), vector.to(form.device, copy=True)
        FORMS.change()
        zeros = torch.zeros(form.length, dtype=torch.float64, device=form.device)
        return cls(work, wanted, given, vector.device), zeros

    def going_on(self, reduced: Tensor, given: Mapping[int, Tensor]) -> Stops[R]:
        """The rest. Collective only where ranks disagree, or the graph is older than the vector's form.

        Args:
            reduced: what the graph has made of the vector.
            given: what may be changed: the tensors of before, or copies.
        """
        self.given.update(given)
        vector = reduced.to(self.device, copy=True) if self.wanted is None else (yield self.wanted)
        try:
            while True:
                vector = yield self.work.send(vector)
        except StopIteration as end:
            result: R = end.value
            return result


def all_reduce_in_graph(tensor: Tensor, op: str, group_name: str) -> Tensor:
    """The all-reduce as operators of a graph that is traced; `all_reduce_` of other ranks meets it."""
    import torch.distributed._functional_collectives  # defines what the operators do without values

    functional = torch.ops._c10d_functional
    reduced: Tensor = functional.wait_tensor(functional.all_reduce(tensor, op, group_name))
    return reduced
