"""How the model is cut over the ranks: mesh, tensor and sequence parallel, FSDP2, FSDP1, HSDP and DDP."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from distnorm import Config
from distnorm.trainer.model import Block, Transformer
from distnorm.trainer.world import World

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
"""The mesh's axes, outermost first: tensor parallel ranks are neighbours."""

FSDP1_PREFIX = "_fsdp_wrapped_module."
"""What FSDP1 puts into the names of parameters, once for each of its wrappers."""


@dataclass(frozen=True, slots=True)
class Topology:
    """The mesh, and where on it this rank is. A world without a process group has no mesh."""

    config: Config
    mesh: DeviceMesh | None

    def degree(self, axis: str) -> int:
        return int(getattr(self.config.train.parallel, axis))

    def index(self, axis: str) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)

    @property
    def data_degree(self) -> int:
        """How many slices the global batch is cut into."""
        return self.degree("dp_replicate") * self.degree("dp_shard")

    @property
    def data_index(self) -> int:
        """Which of the slices is this rank's."""
        return self.index("dp_replicate") * self.degree("dp_shard") + self.index("dp_shard")

    @property
    def is_last_stage(self) -> bool:
        return self.index("pp") == self.degree("pp") - 1

    def axis(self, *names: str) -> DeviceMesh:
        assert self.mesh is not None
        return self.mesh[names]

    def end_stages_group(self) -> dist.ProcessGroup | None:
        """The group of the first and the last stage with this rank's other coordinates. Collective.

        Returns:
            `None` on the stages between.
        """
        assert self.mesh is not None
        columns = self.mesh.mesh.flatten(start_dim=1)
        pairs = [[int(first), int(last)] for first, last in zip(columns[0], columns[-1], strict=True)]
        return _group_of(pairs, self.config.train.timeout)


def make_topology(config: Config, world: World) -> Topology:
    """Lay the mesh over the ranks. Collective."""
    if not dist.is_initialized():
        return Topology(config, None)
    degrees = tuple(int(getattr(config.train.parallel, axis)) for axis in AXES)
    if config.train.timeout is None:
        return Topology(config, init_device_mesh(world.device.type, degrees, mesh_dim_names=AXES))
    # A mesh would give its groups torch's default timeout, whatever that of all ranks' group is.
    ranks = torch.arange(world.size).view(degrees)
    groups = []
    for dim, degree in enumerate(degrees):
        group = _group_of(ranks.movedim(dim, -1).reshape(-1, degree).tolist(), config.train.timeout)
        assert group is not None  # every rank is in one
        groups.append(group)
    mesh = DeviceMesh.from_group(groups, world.device.type, ranks, mesh_dim_names=AXES)
    return Topology(config, mesh)


def _group_of(groups: list[list[int]], timeout: int | None) -> dist.ProcessGroup | None:
    """This rank's among groups that have no rank in common; `None` if it is in none. Collective."""
    if len(groups[0]) == dist.get_world_size():
        return dist.group.WORLD
    seconds = None if timeout is None else timedelta(seconds=timeout)
    mine: dist.ProcessGroup | None
    mine, _ = dist.new_subgroups_by_enumeration(groups, seconds)  # type: ignore[no-untyped-call]
    return mine


def parallelize(model: Transformer, topology: Topology) -> nn.Module:
    """Apply tensor parallel and then data parallel to this rank's stage. Collective.

    Returns:
        The module to call: the model itself, or DDP's or FSDP1's wrapper of it.
    """
    if topology.degree("tp") > 1:
        _apply_tensor_parallel(model, topology)
    if topology.data_degree == 1:
        return model
    backend = topology.config.train.parallel.backend
    if backend == "ddp":
        group = topology.axis("dp_replicate").get_group()
        return DistributedDataParallel(model, process_group=group)
    if backend == "fsdp1":
        return _apply_fsdp1(model, topology)
    _apply_fsdp2(model, topology)
    return model


def _apply_fsdp2(model: Transformer, topology: Topology) -> None:
    replicated = topology.degree("dp_replicate") > 1
    mesh = topology.axis("dp_replicate", "dp_shard") if replicated else topology.axis("dp_shard")
    # A pipeline would gather a stage again for every micro-batch.
    reshard = topology.degree("pp") == 1
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def _apply_fsdp1(model: Transformer, topology: Topology) -> nn.Module:
    if topology.degree("dp_shard") == 1:
        strategy, mesh = ShardingStrategy.NO_SHARD, topology.axis("dp_replicate")
    elif topology.degree("dp_replicate") == 1:
        strategy, mesh = ShardingStrategy.FULL_SHARD, topology.axis("dp_shard")
    else:
        strategy, mesh = ShardingStrategy.HYBRID_SHARD, topology.axis("dp_replicate", "dp_shard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of FSDP1 as a whole, which the config asks for
        return FullyShardedDataParallel(
            model,
            sharding_strategy=strategy,
            device_mesh=mesh,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=True,
            device_id=next(model.parameters()).device,
        )


def _apply_tensor_parallel(model: Transformer, topology: Topology) -> None:
    mesh = topology.axis("tp")
    sequence = topology.config.train.parallel.sequence_parallel
    for block in model.blocks.values():
        parallelize_module(block, mesh, _block_plan(sequence))
    activations = Shard(1) if sequence else Replicate()
    ends: dict[str, ParallelStyle] = {}
    if model.tok is not None:
        ends["tok"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=activations)
    if model.head is not None:
        ends["head"] = ColwiseParallel(input_layouts=activations, output_layouts=Replicate())
        if sequence:
            ends["norm"] = SequenceParallel()
    if ends:
        parallelize_module(model, mesh, ends)
    if model.head is not None:
        # FSDP2 warns of an output that is a view, as a DTensor's local tensor is.
        model.head.register_forward_hook(lambda head, inputs, logits: logits.clone())
    model.tie()  # each end was made a DTensor of its own; both are sharded by byte, so one can stand for both


def _block_plan(sequence: bool) -> dict[str, ParallelStyle]:
    """A layer's plan. Without sequence parallel its norms stay plain tensors, the same on every rank."""
    activations = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        "attn.wq": ColwiseParallel(),
        "attn.wk": ColwiseParallel(),
        "attn.wv": ColwiseParallel(),
        "attn.wo": RowwiseParallel(output_layouts=activations),
        "mlp.w1": ColwiseParallel(),
        "mlp.w2": RowwiseParallel(output_layouts=activations),
    }
    if sequence:
        for norm, layer in (("norm1", "attn"), ("norm2", "mlp")):
            plan[norm] = SequenceParallel()
            plan[layer] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    return plan
