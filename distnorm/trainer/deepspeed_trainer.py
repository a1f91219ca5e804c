"""Training through a DeepSpeed engine, which owns forward, backward and step; `attach` clips in its step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from distnorm import ClipResult, RunError, attach
from distnorm.trainer.deepspeed_settings import engine_settings
from distnorm.trainer.job import Job
from distnorm.trainer.model import Transformer, mean_loss
from distnorm.trainer.optimizer import make_optimizer
from distnorm.trainer.progress import Part
from distnorm.trainer.topology import Topology
from distnorm.trainer.world import World


class DeepSpeedTrainer:
    """The steps of one DeepSpeed engine. Collective, as all of its methods are.

    Raises:
        RunError: DeepSpeed isn't installed, there is no process group, or `train.deepspeed.config` says
            something that the configuration says as well.
    """

    def __init__(self, job: Job, model: Transformer) -> None:
        config, world = job.config, job.world
        deepspeed = world.together("train.parallel.backend", lambda: _import_deepspeed(world))
        settings = world.together("train.deepspeed.config", lambda: engine_settings(config, job.topology))
        model.to(device=world.device, dtype=getattr(torch, config.train.dtype))
        self.job = job
        self.pipelined = config.train.deepspeed.pipeline
        module: nn.Module = _pipeline(job.topology, model) if self.pipelined else model
        self.deepspeed, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(module.parameters(), config),
            config=settings,
            dist_init_required=False,
        )
        _limit_groups(config.train.timeout)
        self._handle = attach(self.deepspeed, config=config)
        self.clipper = self._handle.clipper

    def step(self, step: int) -> tuple[Tensor, ClipResult]:
        """Make step `step`. Collective.

        Returns:
            This rank's share of the loss, 0-d fp64: summed over all ranks it is the mean over all tokens;
            and what was measured and clipped.
        """
        self.job.progress.at(step, Part.GRADIENT)
        inputs, targets = self.job.batch(step)
        if self.pipelined:
            loss = self.deepspeed.train_batch(self._microbatches(inputs, targets))
            share = loss.detach().double() / self.job.world.size  # every rank gets the mean
        else:
            loss = mean_loss(self.deepspeed(inputs), targets)
            self.deepspeed.backward(loss)
            share = loss.detach().double() / self.job.topology.data_degree
            self._handle.note(loss=loss, step=step)
            self.deepspeed.step()
        result = self._handle.last
        assert result is not None
        return share, result

    def save(self, step: int) -> NoReturn:
        """Not reached: the configuration has no checkpoints under this backend."""
        raise NotImplementedError

    def load(self, checkpoint: Path) -> NoReturn:
        """Not reached, as `save`."""
        raise NotImplementedError

    def _microbatches(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        count = self.deepspeed.gradient_accumulation_steps()
        return iter(zip(inputs.chunk(count), targets.chunk(count), strict=True))


def _limit_groups(timeout: int | None) -> None:
    """Let the groups that the engine has made wait as long as that of all ranks, not for torch's default."""
    if timeout is not None:
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)


def _import_deepspeed(world: World) -> ModuleType:
    if not torch.distributed.is_initialized():
        raise RunError(
            "train.parallel.backend: deepspeed needs a process group, even of one rank; start it "
            "with torchrun"
        )
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise RunError(
            f"train.parallel.backend: deepspeed can't be imported ({error}); "
            "pip install 'distnorm[deepspeed]'"
        ) from error
    # DeepSpeed calls, in every step, what torch has newer names for.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if world.device.type == "cpu":
        # It would be compiled now, for a minute, to make collectives faster that hardly count here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, dist_init_required=False)
    found: ModuleType = deepspeed
    return found


class _Embedding(nn.Module):
    """The embedding, and as a tied layer's other end the head."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight)


def _unembed(embedding: _Embedding, x: Tensor) -> Tensor:
    return F.linear(x, embedding.weight)


class _ScaledNorm(nn.Module):
    """What stands before the head."""

    def __init__(self, norm: nn.LayerNorm, scale: float) -> None:
        super().__init__()
        self.norm, self.scale = norm, scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x) * self.scale
        return out


def _pipeline(topology: Topology, model: Transformer) -> nn.Module:
    """The model as a `PipelineModule`, of which this rank keeps its stage."""
    from deepspeed.pipe import PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    assert model.tok is not None and model.norm is not None and model.head is not None
    embedding = model.tok.weight
    blocks = list(model.blocks.values())
    ends: list[Any] = [_Embedding(embedding), model.head]
    if model.tie_embeddings:
        ends = [
            TiedLayerSpec("tok", _Embedding, embedding),
            TiedLayerSpec("tok", _Embedding, embedding, forward_fn=_unembed),
        ]
    module: nn.Module = PipelineModule(
        layers=[ends[0], *blocks, _ScaledNorm(model.norm, model.logit_scale), ends[1]],
        loss_fn=mean_loss,
        topology=PipeDataParallelTopology(topology.degree("pp"), topology.data_degree),
        partition_method="uniform",
        activation_checkpoint_interval=0,
    )
    return module
