"""FSDP1 (`FullyShardedDataParallel`), with `use_orig_params` true or false.

Each of its units lays parameters end to end into one flat parameter, and cuts that into equal runs. Which
run a rank holds of which parameter, the unit's handle alone knows. So a parameter by itself is refused: its
module has to be given.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from distnorm.errors import UnsupportedGradientError
from distnorm.sources.shards import Extent, GradShard, Source, measurable, whole

_FLAT = "_flat_param"

SHARDED = "dp_shard"
"""What the axis over which FSDP1 shards is called, which knows its ranks and no name."""


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """One of FSDP1's units, which decides whether the gradients of its parameters may be read.

    Args:
        handle: torch's `FlatParamHandle`.
    """

    handle: Any

    def refusal(self) -> str | None:
        return _not_resharded(self.handle) or _unreduced(self.handle)


@dataclass(frozen=True, slots=True)
class Home:
    """Where a parameter lies.

    Args:
        unit: the unit that manages it.
        index: the original parameter's number in the flat one; `None` for the flat parameter itself.
    """

    unit: Unit
    index: int | None

    @property
    def handle(self) -> Any:
        """The unit's `FlatParamHandle`."""
        return self.unit.handle


def homes(modules: Iterable[nn.Module]) -> dict[int, Home]:
    """Where each parameter that FSDP1 manages lies, by the `id` of the parameter that the module shows.

    Raises:
        UnsupportedGradientError: a unit is not resharded, so that its module shows other tensors.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return {}
    found: dict[int, Home] = {}
    for module in modules:
        for unit in module.modules():
            if isinstance(unit, fsdp.FullyShardedDataParallel) and unit._handle is not None:
                found.update(_homes_in(unit._handle))
    return found


def _homes_in(handle: Any) -> dict[int, Home]:
    flat = handle.flat_param
    unsettled = _not_resharded(handle)
    if unsettled is not None:
        raise UnsupportedGradientError(f"parameter '{plain_name('', flat)}': {unsettled}")
    if not handle._use_orig_params:
        return {id(flat): Home(Unit(handle), None)}
    # Asked of the modules, since the handle learns of a parameter that was replaced only in the next forward.
    shown = [info.module._parameters.get(info.param_name) for info in flat._param_infos]
    unit = Unit(handle)
    return {id(parameter): Home(unit, index) for index, parameter in enumerate(shown)}


def holds(tensor: Tensor) -> bool:
    """Whether FSDP1 has flattened this parameter, or made it."""
    return getattr(tensor, "_fsdp_flattened", False)


def plain_name(name: str, tensor: Tensor) -> str:
    """Name a flat parameter by the first of its parameters and the number of others: ``0.weight+3``."""
    if not getattr(tensor, "_is_flat_param", False):
        return name
    names: list[str] = tensor._fqns  # type: ignore[attr-defined]
    first, *others = names
    return name.removesuffix(_FLAT) + first + (f"+{len(others)}" if others else "")


@dataclass(frozen=True, slots=True)
class FlatShard(GradShard):
    """The run of a parameter that this rank's part of the flat parameter holds.

    What is read is the `.grad` that the optimizer will read, never the handle's own buffers: the two
    differ after `zero_grad`, and where the caller has put another gradient in its place.
    """

    has_fast_path: ClassVar[bool] = True

    home: Home

    @property
    def gate(self) -> Unit:
        return self.home.unit

    @property
    def is_flat(self) -> bool:
        """Its global shape is that of the run, so the unit is asked for the parameter's."""
        handle, index = self.home.handle, self.home.index
        return index is None or (handle.uses_sharded_strategy and len(handle.flat_param._shapes[index]) > 1)

    @property
    def cutting_axes(self) -> dict[str, int]:
        handle = self.home.handle
        return {SHARDED: handle.world_size} if handle.uses_sharded_strategy else {}

    def piece_at(self, places: Mapping[str, int]) -> tuple[tuple[Extent, ...], int]:
        handle, index = self.home.handle, self.home.index
        if not handle.uses_sharded_strategy:
            return self.piece, self.numel
        if index is None:
            raise UnsupportedGradientError("expected FSDP1 with use_orig_params, found a flat parameter")
        flat = handle.flat_param
        offsets = zip(handle._get_flat_param_offsets(), flat._is_padding_mask, strict=True)
        begin, last = [extent for extent, is_padding in offsets if not is_padding][index]
        held = flat._sharded_size.numel()
        start = max(places[SHARDED] * held, begin) - begin
        stop = min((places[SHARDED] + 1) * held, last + 1) - begin
        return ((start, stop),) if start < stop else ((0, 0),), max(0, stop - start)

    def witness(self) -> Tensor:
        return self._unpadded(self.holder.detach())

    def read(self) -> Tensor | None:
        value = self.value()
        if value is None:
            return None
        is_gradient = self.source is Source.GRADIENT
        unfit = self.gate.refusal() if is_gradient else _not_resharded(self.home.handle)
        if unfit is not None:
            raise UnsupportedGradientError(unfit)
        return self._unpadded(measurable(value))

    def _unpadded(self, tensor: Tensor) -> Tensor:
        return tensor if self.home.index is not None else tensor[: self.numel]


def shard(name: str, tensor: Tensor, source: Source, homes: Mapping[int, Home]) -> FlatShard:
    """Describe what this rank holds of one parameter.

    Raises:
        UnsupportedGradientError: the parameter's module isn't known, or the piece isn't what its unit says.
    """
    home = homes.get(id(tensor))
    if home is None:
        raise UnsupportedGradientError(
            f"parameter '{name}': expected the FullyShardedDataParallel module that manages it, found the "
            "parameter alone or an inner module; pass the FSDP model itself (the outermost wrapped module)"
        )
    flat = home.handle.flat_param
    if any(extension is not None for extension in flat._param_extensions):
        raise UnsupportedGradientError(
            f"parameter '{name}': expected plain tensors under FSDP1, found DTensors (tensor parallel); "
            "use torch's fully_shard (FSDP2) for these"
        )
    piece, shape, global_shape, held = _flat_piece(home) if home.index is None else _piece(home)
    if tensor.numel() != held:
        raise UnsupportedGradientError(
            f"parameter '{name}': expected {held} local elements by its FSDP1 unit, found {tensor.numel()}"
        )
    return FlatShard(name, tensor, source, piece, shape, global_shape, home)


_Described = tuple[tuple[Extent, ...], tuple[int, ...], tuple[int, ...], int]
"""Piece, local shape, global shape, and the local number of elements with padding."""


def _piece(home: Home) -> _Described:
    """Of an original parameter: the whole of it under NO_SHARD, else a run of it as it lies in memory."""
    flat = home.handle.flat_param
    shape, info = tuple(flat._shapes[home.index]), flat._shard_param_infos[home.index]
    if not home.handle.uses_sharded_strategy:
        return whole(shape), shape, shape, math.prod(shape)
    start, length = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
    return ((start, start + length),), (length,), (math.prod(shape),), length


def _flat_piece(home: Home) -> _Described:
    """Of a flat parameter: a run of it, without the padding that makes all ranks' runs equally long."""
    flat = home.handle.flat_param
    total, held = flat._unpadded_unsharded_size.numel(), flat._sharded_size.numel()
    first = home.handle.rank * held if home.handle.uses_sharded_strategy else 0
    start, stop = min(first, total), min(first + held, total)
    return ((start, stop),), (stop - start,), (total,), held


def _not_resharded(handle: Any) -> str | None:
    """Why the parameters that the module shows are not the sharded ones, if they are not."""
    state = handle._training_state.name
    if state == "IDLE" and not handle._skipped_use_sharded_views:
        return None
    where = {
        "SUMMON_FULL_PARAMS": "its unsharded state, inside summon_full_params()",
        "IDLE": "its unsharded state, between forward and backward",
    }
    return (
        f"expected FSDP1's sharded state, found {where.get(state, f'the state {state}')}; "
        "measure after the backward pass and outside of summon_full_params()"
    )


def _unreduced(handle: Any) -> str | None:
    """Why a gradient is this rank's own and not the model's yet, if it is.

    Under NO_SHARD both have one shape, so only FSDP1's own mark says which it is: every backward pass that
    reduces clears it, and none under `no_sync()` does.
    """
    flat = handle.flat_param
    pending = flat.grad is not None and handle.uses_sharded_strategy and flat.grad.shape != flat._sharded_size
    if not (pending or flat._post_backward_called):
        return None
    return (
        "expected a gradient that FSDP1 has reduced, found what a backward pass under no_sync() left; "
        "measure after a backward pass outside of it"
    )
