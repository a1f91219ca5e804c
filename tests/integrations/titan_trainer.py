"""torchtitan's `Trainer` on the CPU: its constructor, Llama 3, parallelisms, `train()` and checkpoints.

Not its own: it asks for an accelerator's name and memory, and is told the CPU's (`use_cpu`); gloo can't scale
while it reduces, so FSDP2 is set to reduce by sums; torch 2.13 has no `dist.set_timeout`, which is left out.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.optimizer.optimizer import ParamGroupConfig
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config.configs import ParallelismConfig, TrainingConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.models import llama3
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from distnorm.testing import dense_norm

DIM, VOCABULARY, LENGTH, BATCH = 16, 32, 8, 8
RATE, MOMENTUM, MAX_NORM, STEPS = 0.1, 0.9, 0.5, 3
WORLDS = {"one": 1, "fsdp2": 2, "tp": 2, "hsdp": 4, "fsdp2xtp": 4}
DEGREES = {
    "tp": {"tensor_parallel_degree": 2},
    "fsdp2xtp": {"tensor_parallel_degree": 2},
    "hsdp": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2},
}


def use_cpu() -> None:
    """Answer torchtitan's questions about the device, wherever it has copied the module that does."""
    device = ModuleType("cpu")
    vars(device).update(vars(torch.cpu))
    device.set_device = device.synchronize = device.reset_peak_memory_stats = lambda *_: None
    device.empty_cache, device.current_device = lambda: None, lambda: 0
    device.get_device_name, device.memory_stats = lambda *_: "cpu", lambda *_: {}
    device.get_device_properties = lambda *_: SimpleNamespace(total_memory=2**30)
    for name, module in list(sys.modules.items()):
        copies = {"device_type": "cpu", "device_module": device}
        if name.startswith("torchtitan"):
            vars(module).update({key: value for key, value in copies.items() if hasattr(module, key)})


use_cpu()
ScaledDotProductAttention.sdpa_backends = [SDPBackend.MATH]


def tokens(step: int) -> Tensor:
    """[BATCH, LENGTH + 1]: what one optimizer step sees, counted from 0."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)


class Tokens(BaseDataLoader):
    """Gives each data rank its part of a step's micro-batches, in turn."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(
        self, config: Any, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any
    ) -> None:
        self.size, self.rank, self.ranks, self.given = local_batch_size, dp_rank, dp_world_size, 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        parts = BATCH // self.ranks // self.size
        while True:
            step, part = divmod(self.given, parts)
            self.given += 1
            rows = tokens(step).chunk(self.ranks)[self.rank].chunk(parts)[part]
            yield {"input": rows[:, :-1].contiguous()}, rows[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Any, tokenizer_path: str) -> None:
        super().__init__()

    encode = decode = get_vocab_size = None


class Sgd(OptimizersContainer):  # Adam's steps would tell little of a gradient's size
    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return torch.optim.SGD


def llama() -> Any:
    """The configuration of a tiny model of torchtitan's Llama 3."""
    with mock.patch.object(llama3, "get_attention_config", lambda _: ScaledDotProductAttention.Config()):
        rope = ComplexRoPE.Config(dim=DIM // 4, max_seq_len=64, theta=10000, scaling="none")
        sizes = {"n_layers": 2, "dim": DIM, "n_heads": 4, "hidden_dim": 32}
        layers = llama3._build_llama3_layers(fuse_qkv=False, rope=rope, attn_backend="sdpa", **sizes)
    table = Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=DIM, param_init=llama3._EMBEDDING_INIT)
    head = Linear.Config(in_features=DIM, out_features=VOCABULARY, param_init=llama3._output_linear_init(DIM))
    norm = RMSNorm.Config(normalized_shape=DIM, param_init=llama3._NORM_INIT)
    return llama3.Llama3Model.Config(
        dim=DIM, vocab_size=VOCABULARY, tok_embeddings=table, norm=norm, lm_head=head, layers=layers
    )


def parallelized(model: nn.Module, **settings: Any) -> nn.Module:
    llama3.parallelize_llama(model, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return model


def configured(
    kind: str,
    folder: str,
    accumulation: int = 1,
    steps: int = STEPS,
    interval: int = 0,
    load: int = -1,
    **training: Any,
) -> Trainer.Config:
    world = dist.get_world_size() if dist.is_initialized() else 1
    ranks = world // DEGREES.get(kind, {}).get("tensor_parallel_degree", 1)
    spec = ModelSpec("llama3", "tiny", llama(), parallelized, llama3.pipeline_llm, None, None)
    settings = {"lr": RATE, "momentum": MOMENTUM}
    groups = [ParamGroupConfig(pattern=".*", optimizer_name="SGD", optimizer_kwargs=settings)]
    types = {"mixed_precision_param": "float32", "mixed_precision_reduce": "float32"}
    sizes = {"local_batch_size": BATCH // ranks // accumulation, "global_batch_size": BATCH, "steps": steps}
    more = {"max_norm": MAX_NORM, "disable_cuda_graphs": True, **training}
    return Trainer.Config(
        model_spec=spec,
        dump_folder=folder,
        tokenizer=NoTokenizer.Config(),
        dataloader=Tokens.Config(),
        loss=CrossEntropyLoss.Config(),
        optimizer=Sgd.Config(param_groups=groups, implementation="for-loop"),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0),
        activation_checkpoint=None,
        training=TrainingConfig(seq_len=LENGTH, **sizes, **types, **more),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor", **DEGREES.get(kind, {})),
        metrics=MetricsProcessor.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(
            enable=interval > 0, interval=interval or 1, last_save_model_only=False, load_step=load
        ),
    )


def fill(model: nn.Module) -> None:
    """The same weights in every process, by the parameters' names."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        whole = 0.2 * torch.randn(parameter.shape, generator=generator) + ("norm" in name)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        with torch.no_grad():
            parameter.copy_(whole)


class Log:
    """What the Trainer's metrics processor gives to TensorBoard or W&B."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append(metrics)

    def close(self) -> None: ...


class Bad(Trainer):
    """In step `bad_step` the first rank's gradients are infinite, and weights before and after are kept."""

    bad_step = -1
    kept: tuple[dict[str, Tensor], ...] = ()

    def train_step(self, *args: Any, **given: Any) -> None:
        is_bad = self.step == self.bad_step
        before = [whole_weights(self)] if is_bad else []
        super().train_step(*args, **given)
        if is_bad:
            self.kept = *before, whole_weights(self)

    def forward_backward_step(self, **given: Any) -> Tensor:
        loss = super().forward_backward_step(**given)
        if self.step == self.bad_step and dist.get_rank() == 0:
            next(p.grad for p in self.model_parts[0].parameters() if p.grad is not None).mul_(torch.inf)
        return loss


def built(kind: str, folder: str, **settings: Any) -> Bad:
    """A Trainer with known weights. Collective."""
    os.environ.setdefault("LOCAL_RANK", "0")
    trainer = Bad(configured(kind, folder, **settings))
    fill(trainer.model_parts[0])
    trainer.metrics_processor.logger = Log()
    return trainer


def trained(trainer: Trainer) -> dict[str, Tensor]:
    """As `Trainer.train` does. The whole weights afterwards; collective."""
    with mock.patch.object(dist_utils, "set_pg_timeouts"), mock.patch.object(time, "sleep"):
        trainer.train()
    return whole_weights(trainer)


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    """By their names. Collective."""
    found = {}
    for name, p in trainer.model_parts[0].named_parameters():
        found[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
    return found


@functools.cache
def oracle() -> tuple[list[float], dict[str, Tensor]]:
    """The norms before clipping, and the weights at the end, of one process in fp64."""
    config = llama()
    model = config.build()
    model.init_weights(buffer_device=None)
    fill(model)
    model.double()
    optimizer, norms = torch.optim.SGD(model.parameters(), RATE, MOMENTUM), []
    for step in range(STEPS):
        optimizer.zero_grad()
        rows = tokens(step)
        nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norms.append(dense_norm(grads))
        for gradient in grads.values():
            gradient.mul_(min(1.0, MAX_NORM / (norms[-1] + 1e-6)))
        optimizer.step()
    return norms, {name: p.detach() for name, p in model.named_parameters()}
