"""What one rank of a world would hold, without the others: the model on torch's fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from distnorm import Config, RunError
from distnorm.trainer.model import TIED_NAMES, Transformer
from distnorm.trainer.topology import make_topology, parallelize
from distnorm.trainer.world import World

Tied = tuple[tuple[str, ...], ...]


@contextmanager
def model_of(config: Config, rank: int, size: int) -> Iterator[tuple[nn.Module, Tied]]:
    """Build a rank's part of the model as the trainer does, with memory for what it holds and no values.

    Args:
        config: its degrees multiply to `size`.
        rank, size: of the world, whose other ranks don't exist.

    Returns:
        The module, and the names on different stages that are one parameter.

    Raises:
        RunError: the backend's pieces can't be known without its ranks, or there is a process group already.
    """
    train = config.train
    if train.parallel.backend == "deepspeed":
        raise RunError(
            "train.parallel.backend: expected fsdp2, fsdp1 or ddp, found deepspeed, whose engine decides who "
            "holds what while it exchanges messages with all ranks; run distnorm verify under torchrun"
        )
    if dist.is_initialized():
        raise RunError("expected no process group, found one; distnorm plan runs as one process")
    # Imported for its backend, which torch keeps among its tests.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        topology = make_topology(config, World(rank, size, torch.device("cpu")))
        # FSDP1 lays parameters end to end in memory; the others can cut what has none.
        is_flat = train.parallel.backend == "fsdp1" and topology.data_degree > 1
        with torch.device("cpu" if is_flat else "meta"):
            model = Transformer(config).to(getattr(torch, train.dtype))
        pipelined = topology.degree("pp") > 1
        if pipelined:
            model.keep_stage(topology.index("pp"), topology.degree("pp"))
        # DDP leaves parameters as they are, and compares them with ranks that don't exist.
        module = model if train.parallel.backend == "ddp" else parallelize(model, topology)
        if not is_flat:
            model.to_empty(device="cpu")
            model.tie()
        yield module, (TIED_NAMES,) if pipelined and train.model.tie_embeddings else ()
    finally:
        dist.destroy_process_group()


def partial_bytes(config: Config, module: nn.Module) -> int:
    """Bytes of the gradients that arrive partial in every step: replicated over tp, and reduced by nobody.

    FSDP2 reduces them along with its own; without it they are left as sequence parallel computed them.
    """
    parallel = config.train.parallel
    if not parallel.sequence_parallel or parallel.tp == 1 or parallel.dp_shard * parallel.dp_replicate > 1:
        return 0
    whole = [p for p in module.parameters() if isinstance(p, DTensor) and p.placements[0].is_replicate()]
    return sum(p.numel() * p.element_size() for p in whole)
