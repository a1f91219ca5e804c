"""torch's LocalTensorMode: all ranks in this process, which meet in the collectives that torch simulates.

Each rank runs the code of a process of its own (see `distnorm.plan.lockstep`), and what the ranks reduce is
reduced by torch, in one call for all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from distnorm import kernels
from distnorm.errors import DistnormError
from distnorm.plan.collectives import Ranks, reduce_partial_
from distnorm.plan.group_state import GroupState
from distnorm.plan.lockstep import Combine, Lockstep, SimulatedGroup, local_tensor_mode

T = TypeVar("T")


class SimulatedRanks(Ranks):
    """The ranks that take part, as one of them sees them that torch simulates.

    Args:
        simulation: all of them.
        rank: this one, by its rank in the world.
    """

    def __init__(self, simulation: Simulation, rank: int) -> None:
        super().__init__(simulation.real.group)
        self._simulation, self._here, self._state = simulation, rank, GroupState()
        self.rank, self.size, self.is_simulated = (
            simulation.members.index(rank),
            len(simulation.members),
            False,
        )

    def all_reduce_(self, tensor: Tensor, op: str) -> Tensor:
        def reduced(values: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
            with self._simulation.together(values) as joined:
                self._simulation.real.all_reduce_(joined, op)
            return values

        return cast(Tensor, self._meet(("all-reduce", op), tensor, reduced))

    def gather(self, fact: Any) -> list[Any]:
        def gathered(values: Mapping[int, Any]) -> Mapping[int, Any]:
            return {rank: list(values.values()) for rank in values}

        return cast(list[Any], self._meet("gather", fact, gathered))

    def exchange(self, rows: Tensor, send: Mapping[int, int], receive: Mapping[int, int]) -> Tensor:
        members = self._simulation.members

        def delivered(values: Mapping[int, Any]) -> Mapping[int, Tensor]:
            with kernels.plain_operators():
                sent = {
                    members.index(rank): dict(zip(to, torch.split(own, list(to.values())), strict=True))
                    for rank, (own, to, _) in values.items()
                }
                return {
                    rank: torch.cat([sent[sender][members.index(rank)] for sender in of])
                    for rank, (_, _, of) in values.items()
                }

        return cast(Tensor, self._meet("exchange", (rows, send, receive), delivered))

    def _meet(self, key: object, value: Any, combine: Combine) -> Any:
        simulation = self._simulation
        return simulation.lockstep.meet(self._here, key, simulation.members, value, combine)


class Simulation:
    """The ranks of one process group, all of them simulated by torch.

    Args:
        real: the group, as it is outside of the mode.
        members: its ranks in the world.
    """

    def __init__(self, real: Ranks, members: tuple[int, ...]) -> None:
        self.real, self.members, self.lockstep = real, members, Lockstep()
        self._mode: Any = None
        self.ranks = {rank: SimulatedRanks(self, rank) for rank in members}

    @contextmanager
    def together(self, values: Mapping[int, Tensor]) -> Iterator[Tensor]:
        """The ranks' tensors as one, and the mode for a collective of it. A rank's own code has none."""
        from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

        are_fake = any(isinstance(value, FakeTensor) for value in values.values())
        self._mode.enable_()
        try:
            with nullcontext() if are_fake else unset_fake_temporarily():
                yield local_tensor(values)
        finally:
            self._mode.disable_()

    def run(self, work: Callable[[int], T]) -> dict[int, T]:
        """Do what each rank does."""
        self._mode = mode_in_force()
        with self._mode.disable():
            return self.lockstep.run(self.members, work, _callers_modes())

    def add_up(self, values: Mapping[int, Tensor], group: ProcessGroup | None) -> Mapping[int, Tensor]:
        """Add up tensors in place, over a group and over those that lie beside it on a mesh.

        Without a group, over all that are given.
        """
        if group is None:
            with kernels.plain_operators():
                total = torch.stack(list(values.values())).sum(dim=0)
                for value in values.values():
                    value.copy_(total)
            return values
        with self.together(values) as joined:
            reduce_partial_(joined, [group])
        return values


_simulations: weakref.WeakKeyDictionary[ProcessGroup, Simulation] = weakref.WeakKeyDictionary()


def simulation_of(group: ProcessGroup | None) -> Simulation:
    """The simulated ranks of a group, kept with it; default: of the whole world.

    Raises:
        DistnormError: LocalTensorMode simulates other ranks, or there is no process group.
    """
    mode = mode_in_force()
    with mode.disable():
        real = Ranks(group)
        if real.group is None:
            raise DistnormError(
                "expected a process group of the ranks that LocalTensorMode simulates, found none; make one "
                'with torch.distributed.init_process_group("fake", ...)'
            )
        members = tuple(dist.get_process_group_ranks(real.group))
        if set(members) != mode.ranks:
            raise DistnormError(
                f"expected LocalTensorMode to simulate all ranks of the group, found {sorted(mode.ranks)} of "
                f"{list(members)}"
            )
        if real.group not in _simulations:
            _simulations[real.group] = Simulation(real, members)
        return _simulations[real.group]


class RankMesh(DeviceMesh):
    """A device mesh as one simulated rank sees it."""

    def __init__(self, simulation: Simulation, mesh: DeviceMesh, rank: int) -> None:
        # Each rank has another slice of a mesh that is one of several.
        try:
            slices = mesh._layout.remap_to_tensor(torch.tensor(mesh._flatten_rank_map, device="cpu"))
            own = next((one for one in slices if (one == rank).any()), slices[0])
            names = mesh.mesh_dim_names
            super().__init__(mesh.device_type, own, mesh_dim_names=names, _init_backend=False, _rank=rank)
        except (AttributeError, TypeError) as error:
            raise DistnormError(
                "expected a torch whose device meshes can be simulated, such as 2.13, found "
                f"{torch.__version__}; use torch's fake process group for a dry run"
            ) from error
        self._simulation, self._seen = simulation, mesh

    def get_rank(self) -> int:
        return self._rank

    def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
        return (self.get_coordinate() or ())[self._axis(mesh_dim)]

    def get_group(self, mesh_dim: int | str | None = None) -> Any:
        axis = self._axis(mesh_dim)
        place = [slice(None) if a == axis else at for a, at in enumerate(self.get_coordinate() or ())]
        simulation, rank = self._simulation, self._rank
        real: ProcessGroup | None = None
        # torch knows no group of a mesh that rank 0 isn't on, nor of one of a world that was destroyed, which
        # its caches may give in place of an equal mesh.
        with suppress(IndexError, RuntimeError):
            real = self._seen.get_group(axis)

        def meet(buffer: Tensor, members: tuple[int, ...]) -> Tensor:
            add_up, key = partial(simulation.add_up, group=real), members if real is None else real.group_name
            return cast(Tensor, simulation.lockstep.meet(rank, key, members, buffer, add_up))

        with kernels.plain_operators():
            return SimulatedGroup(tuple(self.mesh[tuple(place)].tolist()), meet)

    def _axis(self, mesh_dim: int | str | None) -> int:
        return (self.mesh_dim_names or ()).index(mesh_dim) if isinstance(mesh_dim, str) else mesh_dim or 0


def mode_in_force() -> Any:
    """torch's LocalTensorMode.

    Raises:
        DistnormError: it is not in force, where a clipper was made within it.
    """
    found = local_tensor_mode()
    if found is None:
        raise DistnormError(
            "expected torch's LocalTensorMode, within which this clipper was made, found none"
        )
    return found


def local_tensor(values: Mapping[int, Tensor]) -> Tensor:
    """The LocalTensor of the ranks' own tensors."""
    from torch.distributed._local_tensor import LocalTensor

    return LocalTensor(dict(values))  # type: ignore[no-untyped-call]


def _callers_modes() -> Callable[[], AbstractContextManager[object]]:
    """What a rank's thread enters: inference and FakeTensorMode, as they are in the calling thread."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    inference = torch.is_inference_mode_enabled()
    fakes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, FakeTensorMode)]

    def entered() -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        for mode in fakes:
            stack.enter_context(mode)
        return stack

    return entered
