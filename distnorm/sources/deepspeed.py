"""DeepSpeed: what every optimizer wrapper holds of the gradient, at the moment its step begins.

Wrappers flatten parameters and cut the result between data-parallel ranks, each with offsets of its own. A
piece is therefore described by the extent of the parameter that it is. Where holders of one parameter (two
pipeline stages with a tied weight) cut it differently, every one of them is cut again at all the cuts, so
that equal pieces are replicas and no others are.

Only the caller imports DeepSpeed: an engine is proof that it has.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm.errors import UnsupportedGradientError
from distnorm.sources.shards import FlatGradient, GradShard, Source, measurable

Cuts = Mapping[str, Sequence[int]]
"""Offsets, ascending, at which a parameter is cut into pieces, by the parameter's name."""


@dataclass(frozen=True, slots=True)
class EngineShard(GradShard):
    """A piece of a parameter of an engine.

    Args:
        gradient: finds this step's gradient of it.
        values: the elements themselves.
        lies: where the gradient lies.
    """

    gradient: Callable[[], Tensor | None]
    values: Callable[[], Tensor]
    lies: FlatGradient | None

    @property
    def flat(self) -> FlatGradient | None:
        return self.lies

    def value(self) -> Tensor | None:
        return self.gradient()

    def witness(self) -> Tensor:
        return self.values().detach()

    def read(self) -> Tensor | None:
        value = self.value()
        return None if value is None else measurable(value)


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` of a parameter, in row-major order, as one optimizer wrapper holds them.

    Args:
        name: the parameter's name in the whole model.
        parameter: the module's parameter.
        shape: its shape in the whole model.
        start: first element.
        stop: end of the elements.
        gradient: this step's gradient of the elements, in any shape, scaled as backward left it.
        values: the elements, in any shape.
        lies: where the gradient lies, if that is known.
    """

    name: str
    parameter: Tensor
    shape: tuple[int, ...]
    start: int
    stop: int
    gradient: Callable[[], Tensor | None]
    values: Callable[[], Tensor]
    lies: FlatGradient | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole parameter."""
        return (self.start, self.stop) == (0, math.prod(self.shape))


def shards(pieces: Iterable[Piece], cuts: Cuts) -> list[GradShard]:
    """Describe pieces as shards, cut where other ranks' pieces end."""
    return [shard for piece in pieces for shard in _shards(piece, cuts.get(piece.name, ()))]


def _shards(piece: Piece, cuts: Sequence[int]) -> Iterator[EngineShard]:
    ends = [piece.start, *(cut for cut in cuts if piece.start < cut < piece.stop), piece.stop]
    for start, stop in pairwise(ends):
        inside = (start - piece.start, stop - start)
        yield EngineShard(
            piece.name,
            piece.parameter,
            Source.GRADIENT,
            ((start, stop),),
            (stop - start,),
            piece.shape,
            partial(_part_of_gradient, piece.gradient, inside),
            partial(_part_of_values, piece.values, inside),
            piece.lies and piece.lies._replace(at=piece.lies.at + inside[0]),
        )


def _part_of_gradient(gradient: Callable[[], Tensor | None], inside: tuple[int, int]) -> Tensor | None:
    found = gradient()
    if found is None or found.layout is not torch.strided:
        return found  # `read` refuses it
    return found.reshape(-1).narrow(0, *inside)


def _part_of_values(values: Callable[[], Tensor], inside: tuple[int, int]) -> Tensor:
    return values().reshape(-1).narrow(0, *inside)


def whole_model_names(engine: Any) -> dict[int, str]:
    """The name in the whole model of every parameter that is trained, by the parameter's `id`.

    Names of layers of a `PipelineModule` are those of the whole model already. Beside them: an expert is
    counted over all expert-parallel ranks; what tensor parallelism has cut bears its rank; what a tied layer
    holds beside the weight that is tied bears its stage.
    """
    groups = sys.modules["deepspeed.utils.groups"]
    experts = {
        name: module.num_local_experts
        for name, module in engine.module.named_modules()
        if hasattr(module, "deepspeed_experts") and hasattr(module, "num_local_experts")
    }
    tensor_rank = _tensor_parallel_rank(engine)
    names = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if getattr(parameter, "allreduce", True) is False:
            rank = groups._get_expert_parallel_rank(parameter.group_name)
            name = _expert_name(name, rank, experts)
        if _is_cut_by_tensor_parallelism(parameter):
            name = f"tp{tensor_rank}.{name}"
        if _is_untied_part_of_tied_layer(engine.module, name):
            name = f"pp{engine.module.stage_id}.{name}"
        names[id(parameter)] = name
    return names


def _expert_name(name: str, rank: int, experts: Mapping[str, int]) -> str:
    for prefix, count in experts.items():
        if name.startswith(f"{prefix}.deepspeed_experts."):
            local, _, rest = name[len(f"{prefix}.deepspeed_experts.") :].partition(".")
            return f"{prefix}.deepspeed_experts.{rank * count + int(local)}.{rest}"
    return f"ep{rank}.{name}"


def _is_cut_by_tensor_parallelism(parameter: Tensor) -> bool:
    return bool(
        getattr(parameter, "model_parallel", False) or getattr(parameter, "tensor_model_parallel", False)
    )


def _tensor_parallel_rank(engine: Any) -> int:
    if engine.mpu is not None:
        bwc = sys.modules["deepspeed.utils.bwc"]
        return int(bwc.bwc_tensor_model_parallel_rank(engine.mpu))
    groups = sys.modules["deepspeed.utils.groups"]
    return int(groups.get_tensor_model_parallel_rank()) if engine.autotp_size() > 1 else 0


def _is_untied_part_of_tied_layer(module: Any, name: str) -> bool:
    attributes = getattr(module, "tied_weight_attrs", None)
    if not attributes or not name.startswith("tied_modules."):
        return False
    key = next((key for key in attributes if name.startswith(f"tied_modules.{key}.")), None)
    return key is not None and name[len(f"tied_modules.{key}.") :] not in attributes[key]


def of_parameters(parameters: Iterable[Tensor], names: Mapping[int, str]) -> list[Piece]:
    """Whole parameters with their gradient in `grad`: stage 0, but for `BF16_Optimizer`."""
    pieces = []
    for p in parameters:
        found = (partial(_own_gradient, p), p.detach, FlatGradient(id(p), partial(_own_gradient, p), 0))
        pieces.append(Piece(names[id(p)], p, tuple(p.shape), 0, p.numel(), *found))
    return pieces


def _own_gradient(parameter: Tensor) -> Tensor | None:
    return parameter.grad


def of_bf16_optimizer(optimizer: Any, names: Mapping[int, str]) -> list[Piece]:
    """This rank's partition of the high-precision gradients of `BF16_Optimizer`."""
    pieces = []
    for i, group in enumerate(optimizer.bf16_groups):
        partition = optimizer.fp32_groups_gradient_flat_partition[i]
        rank = dist.get_rank(optimizer.real_dp_process_group[i])
        for p, start, stop, at in _in_partition(group, _contiguous(group), partition.numel(), rank):
            flats = optimizer.fp32_groups_gradient_flat_partition
            gradient = partial(_narrowed, flats, i, at, stop - start)
            values = partial(_narrowed, optimizer.fp32_groups_flat_partition, i, at, stop - start)
            lies = FlatGradient(("flat", i), partial(flats.__getitem__, i), at)
            pieces.append(Piece(names[id(p)], p, tuple(p.shape), start, stop, gradient, values, lies))
    return pieces


def of_zero_1_and_2(optimizer: Any, names: Mapping[int, str]) -> list[Piece]:
    """This rank's partition of the averaged gradients, on the device or offloaded."""
    pieces = []
    for i, group in enumerate(optimizer.round_robin_bit16_groups):
        masters, size = optimizer.single_partition_of_fp32_groups, int(optimizer.partition_size[i])
        rank = dist.get_rank(optimizer.real_dp_process_group[i])
        index = end = 0
        for p, start, stop, at in _in_partition(group, optimizer.round_robin_bit16_offsets[i], size, rank):
            numel = stop - start
            index += at > end  # alignment's padding is a tensor of the list as well
            found = _of_zero(optimizer, optimizer.cpu_offload, masters, i, at, index, numel)
            index, end = index + 1, at + numel
            pieces.append(Piece(names[id(p)], p, tuple(p.shape), start, stop, *found))
    return pieces


def of_zero_3(optimizer: Any, names: Mapping[int, str]) -> list[Piece]:
    """This rank's piece of every parameter, on the device or offloaded."""
    pieces = []
    masters = optimizer.fp32_partitioned_groups_flat
    for group in optimizer.fp16_groups:
        for index, p in enumerate(group):
            i, at, size = optimizer.grad_position[optimizer.get_param_id(p)]
            start = size * optimizer._get_param_partition_rank(p)
            numel = min(size, p.ds_numel - start)
            if numel <= 0:
                continue
            found = _of_zero(optimizer, optimizer.offload_optimizer, masters, i, at, index, numel)
            pieces.append(Piece(names[id(p)], p, tuple(p.ds_shape), start, start + numel, *found))
    return pieces


def _of_zero(
    optimizer: Any, is_offloaded: bool, masters: Sequence[Tensor], i: int, at: int, index: int, numel: int
) -> tuple[Callable[[], Tensor | None], Callable[[], Tensor], FlatGradient]:
    """Gradient, values and place of `numel` elements: from `at` on in group i, of which they are the tensor
    `index` where they are averaged."""
    values = partial(_narrowed, masters, i, at, numel)
    if is_offloaded:
        lies = FlatGradient(("grad", i), partial(_gradient, masters, i), at)
        return partial(_narrowed_gradient, masters, i, at, numel), values, lies
    lies = FlatGradient(("averaged", i, index), partial(_averaged_whole, optimizer, i, index), 0)
    return partial(_averaged, optimizer, i, index, numel), values, lies


def _contiguous(group: Sequence[Tensor]) -> list[int]:
    return [0, *accumulate(parameter.numel() for parameter in group[:-1])]


def _in_partition(
    group: Sequence[Tensor], offsets: Sequence[int], size: int, rank: int
) -> Iterator[tuple[Tensor, int, int, int]]:
    """What a partition holds of flattened parameters: each one's start, stop, and place in the partition."""
    first = size * rank
    for parameter, offset in zip(group, offsets, strict=True):
        low, high = max(offset, first), min(offset + parameter.numel(), first + size)
        if low < high:
            yield parameter, low - offset, high - offset, low - first


def _narrowed(flats: Sequence[Tensor], i: int, at: int, numel: int) -> Tensor:
    return flats[i].detach().narrow(0, at, numel)


def _narrowed_gradient(flats: Sequence[Tensor], i: int, at: int, numel: int) -> Tensor | None:
    gradient = flats[i].grad
    return None if gradient is None else gradient.narrow(0, at, numel)


def _gradient(flats: Sequence[Tensor], i: int) -> Tensor | None:
    return flats[i].grad


def _averaged_whole(optimizer: Any, i: int, index: int) -> Tensor | None:
    buffers = optimizer.averaged_gradients.get(i)
    return None if buffers is None or index >= len(buffers) else buffers[index]


def _averaged(optimizer: Any, i: int, index: int, numel: int) -> Tensor | None:
    """A tensor of `averaged_gradients`; in stage 3 with padding at its end."""
    buffers = optimizer.averaged_gradients.get(i)
    if buffers is None:
        return None
    if index >= len(buffers) or buffers[index].numel() < numel:
        raise UnsupportedGradientError(
            f"expected {numel} elements in averaged_gradients[{i}][{index}], found "
            f"{[tuple(buffer.shape) for buffer in buffers]}"
        )
    flat: Tensor = buffers[index].reshape(-1).narrow(0, 0, numel)
    return flat
