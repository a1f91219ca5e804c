"""Megatron-core: what its attributes claim of each parameter, and what its optimizers hold of it.

Megatron has plain tensors. Which of them are pieces, and who must not count what, is said by attributes of
parameters (``tensor_model_parallel``, ``allreduce``, ``shared``, ...), which modules set by hand. They are
read here as claims; `distnorm.integrations.megatron_claims` compares them with what the ranks hold.

Everything is recognised by attributes; nothing of Megatron is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from distnorm.sources.declared import Piece
from distnorm.sources.shards import Extent

EXPERTS = "experts"
"""What Megatron calls the module of the routed experts."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of parallelism, as this rank sees it.

    Args:
        index: this rank's place.
        size: number of places.
        members: ranks in the world, by place.
    """

    index: int = 0
    size: int = 1
    members: tuple[int, ...] = ()

    @classmethod
    def of(cls, group: Any) -> Axis:
        """That of a process group; `None` means none."""
        if group is None:
            return cls()
        return cls(group.rank(), group.size(), tuple(dist.get_process_group_ranks(group)))


@dataclass(frozen=True, slots=True)
class Axes:
    """The axes along which parameters differ.

    Args:
        tp: tensor parallelism of all but routed experts.
        expert_tp: that of routed experts.
        ep: expert parallelism.
        pp: pipeline stages.
    """

    tp: Axis = Axis()  # frozen
    expert_tp: Axis = Axis()
    ep: Axis = Axis()
    pp: Axis = Axis()

    @classmethod
    def of(cls, collection: Any = None) -> Axes:
        """Those of a `ProcessGroupCollection`, or of Megatron's global state, where it is imported."""
        state = sys.modules.get("megatron.core.parallel_state")
        if collection is None and state is not None and state.model_parallel_is_initialized():
            groups = {
                "tp": state.get_tensor_model_parallel_group(),
                "expert_tp": state.get_expert_tensor_parallel_group(),
                "ep": state.get_expert_model_parallel_group(),
                "pp": state.get_pipeline_model_parallel_group(),
            }
        else:
            tp = getattr(collection, "tp", None)
            groups = {"tp": tp, "expert_tp": getattr(collection, "expt_tp", tp)}
            groups |= {name: getattr(collection, name, None) for name in ("ep", "pp")}
        return cls(**{name: Axis.of(group) for name, group in groups.items()})


@dataclass(frozen=True, slots=True)
class Claims:
    """What a parameter's attributes say, with Megatron's defaults where one is missing."""

    tensor_model_parallel: bool = False
    partition_dim: int = -1
    partition_stride: int = 1
    allreduce: bool = True
    sequence_parallel: bool = False
    shared: bool = False

    @classmethod
    def of(cls, parameter: Tensor) -> Claims:
        """Read them."""
        return cls(
            bool(getattr(parameter, "tensor_model_parallel", False)),
            int(getattr(parameter, "partition_dim", -1)),
            int(getattr(parameter, "partition_stride", 1)),
            bool(getattr(parameter, "allreduce", True)),
            bool(getattr(parameter, "sequence_parallel", False)),
            bool(getattr(parameter, "shared", False)),
        )


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter of this rank's model chunks.

    Args:
        name: its name in the whole model, as far as the claims are true.
        place: that name with experts numbered as on this rank: the same on all ranks along `Axes.ep`.
        parameter: the model's, whole but for tensor parallelism.
        owner: the module that has it.
        claims: what its attributes say.
        is_expert: whether its module is one of the routed experts.
        axis: along which tensor parallelism cuts it.
    """

    name: str
    place: str
    parameter: Tensor
    owner: nn.Module
    claims: Claims
    is_expert: bool
    axis: Axis

    @property
    def is_cut(self) -> bool:
        """Whether it claims to be a piece."""
        return self.claims.tensor_model_parallel and self.axis.size > 1

    @property
    def dim(self) -> int:
        """The dim along which it claims to be cut; 0 where it doesn't say, as state-space modules don't."""
        return max(self.claims.partition_dim, 0)

    def piece(self, start: int, stop: int) -> Piece:
        """Which piece of the whole parameter some of its elements are, in row-major order."""
        shape, numel = tuple(self.parameter.shape), self.parameter.numel()
        dim, at, parts = (self.dim, self.axis.index, self.axis.size) if self.is_cut else (0, 0, 1)
        stride = self.claims.partition_stride if self.is_cut else 1
        whole = (*shape[:dim], shape[dim] * parts, *shape[dim + 1 :]) if shape else ()
        if stride == 1 and (start, stop) == (0, numel):
            extents: list[Extent] = [(0, size) for size in shape]
            if shape:
                extents[dim] = (at * shape[dim], (at + 1) * shape[dim])
            return Piece(tuple(extents), whole, self.name)
        if stride == 1 and dim == 0:
            return Piece(((at * numel + start, at * numel + stop),), whole, self.name)
        text = f"{start}:{stop} of part {at} of {parts} along dim {dim}, stride {stride}"
        return Piece((text,), whole, self.name)


def held_by(chunks: Sequence[nn.Module], axes: Axes) -> list[Held]:
    """All trained parameters of this rank's model chunks, each once."""
    found: dict[int, Held] = {}
    for number, chunk in enumerate(chunks):
        apart = f"pp{axes.pp.index}.vp{number}." if axes.pp.size > 1 or len(chunks) > 1 else ""
        for path, owner in chunk.named_modules():
            place, expert, is_numbered = _place(chunk, path, axes)
            is_expert = EXPERTS in path.split(".")
            for name, parameter in owner._parameters.items():
                if parameter is None or not parameter.requires_grad or id(parameter) in found:
                    continue
                claims = Claims.of(parameter)
                names = [f"{'' if is_numbered else apart}{_joined(p, name)}" for p in (place, expert)]
                if not claims.allreduce and axes.ep.size > 1:
                    names[1] = _of_expert(names, owner, name, axes.ep)
                else:
                    names[1] = names[0]
                axis = axes.expert_tp if is_expert or not claims.allreduce else axes.tp
                found[id(parameter)] = Held(names[1], names[0], parameter, owner, claims, is_expert, axis)
    return list(found.values())


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _place(chunk: nn.Module, path: str, axes: Axes) -> tuple[str, str, bool]:
    """The path of a module in the whole model, with layers counted over all stages: with experts as numbered
    here, and over all ranks; and whether layers could be counted."""
    here: list[str] = []
    over_all: list[str] = []
    module, is_numbered, is_layer = chunk, True, False
    for component in path.split(".") if path else ():
        parent, module = module, getattr(module, component)
        if component == "module" and not here:
            continue  # a wrapper: DDP, Float16Module
        expert = component
        if component.isdigit() and isinstance(getattr(module, "layer_number", None), int) and not is_layer:
            component = expert = str(module.layer_number - 1)
            is_layer = True
        elif component.isdigit() and here[-1:] == ["local_experts"]:
            expert = str(axes.ep.index * len(list(parent.children())) + int(component))
        elif component.isdigit() and not is_layer:
            is_numbered = False
        here.append(component)
        over_all.append(expert)
    return ".".join(here), ".".join(over_all), is_numbered


def _of_expert(names: Sequence[str], owner: nn.Module, name: str, ep: Axis) -> str:
    """The name of a parameter that only some expert-parallel ranks hold."""
    if names[0] != names[1]:
        return names[1]
    several = getattr(owner, "num_gemms", None)
    stem = name.rstrip("0123456789")
    if isinstance(several, int) and stem != name:  # weight0, weight1, ... of grouped experts
        return names[1].removesuffix(name) + f"{stem}{ep.index * several + int(name[len(stem) :])}"
    return f"ep{ep.index}.{names[1]}"
