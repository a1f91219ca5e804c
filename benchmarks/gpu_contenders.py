"""How a norm and a clip in place are asked of each library: those that can be imported, for `gpu.py`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm

Clip = Callable[[], object]
"""Clips gradients in place, and returns their norm before."""

MAX_NORM = 1.0


def contenders(parameters: Sequence[nn.Parameter]) -> dict[str, Callable[[], Clip]]:
    """What makes each library's call for parameters with gradients; it raises where that can't be had."""
    gradients = [p.grad for p in parameters if p.grad is not None]

    def ours() -> Clip:
        return lambda: distnorm.clip_grad_norm_(parameters, MAX_NORM)

    def torchs() -> Clip:
        return lambda: torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)

    def transformer_engine() -> Clip:
        home = importlib.import_module("transformer_engine.pytorch.optimizers")
        return _by_multi_tensor(
            gradients, home.multi_tensor_applier, home.multi_tensor_l2norm, home.multi_tensor_scale
        )

    def apex() -> Clip:
        applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
        code = importlib.import_module("amp_C")
        return _by_multi_tensor(gradients, applier, code.multi_tensor_l2norm, code.multi_tensor_scale)

    def deepspeed() -> Clip:
        home = importlib.import_module("deepspeed.runtime.utils")

        def clip() -> object:
            norm = home.get_global_norm_of_tensors(gradients)
            home.clip_tensors_by_global_norm(gradients, MAX_NORM, norm)
            return norm

        return clip

    def megatron() -> Clip:
        home = importlib.import_module("megatron.core.optimizer.clip_grads")
        if not dist.is_initialized():
            backend = "nccl" if gradients[0].is_cuda else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        group = dist.new_group([0])

        def clip() -> object:
            norm = home.get_grad_norm_fp32(gradients, grad_stats_parallel_group=group)
            home.clip_grad_by_total_norm_fp32(parameters, MAX_NORM, norm)
            return norm

        return clip

    # Megatron's last: it needs a process group, which the others are measured without.
    return {
        "distnorm": ours,
        "torch, foreach": torchs,
        "TransformerEngine": transformer_engine,
        "apex": apex,
        "DeepSpeed": deepspeed,
        "Megatron": megatron,
    }


def _by_multi_tensor(gradients: list[Tensor], applier: Any, l2norm: Any, scale: Any) -> Clip:
    """The two calls that Megatron makes of apex and of TransformerEngine, with the norm read on the host."""
    overflow = torch.zeros(1, dtype=torch.int, device=gradients[0].device)

    def clip() -> object:
        norm, _ = applier(l2norm, overflow, [gradients], False)
        coefficient = MAX_NORM / (float(norm) + 1e-6)
        if coefficient < 1:
            applier(scale, overflow, [gradients, gradients], coefficient)
        return norm

    return clip
