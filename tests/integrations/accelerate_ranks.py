"""What the ranks of Accelerate's tests do: its documentation's loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.integrations import hf, hf_ranks


def accelerator_of(topology: str, accumulation: int = 1) -> Any:
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, ParallelismConfig

    PartialState(cpu=True)
    plugins: dict[str, Any] = {}
    if topology.startswith("fsdp"):
        hf_ranks.pretend_gpus()
        plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=int(topology[4]),
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=hf_ranks.WRAPPED,
        )
    if topology == "fsdp2_x_tp":
        plugins["parallelism_config"] = ParallelismConfig(dp_shard_size=2, tp_size=2)
    if topology.startswith("zero"):
        settings = hf_ranks.settings_of(topology)["deepspeed"]
        settings["train_micro_batch_size_per_gpu"] = hf.SAMPLES // dist.get_world_size() // accumulation
        settings["gradient_clipping"] = hf.MAX_NORM
        del settings["train_batch_size"]
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(
            hf_ds_config=settings, gradient_accumulation_steps=accumulation
        )
    return Accelerator(gradient_accumulation_steps=accumulation, **plugins)


def prepared(accelerator: Any, model: nn.Module, **kwargs: Any) -> tuple[Any, Any]:
    kind = torch.optim.AdamW if kwargs.pop("adam", False) else torch.optim.SGD
    model, optimizer = accelerator.prepare(model, kind(model.parameters(), lr=hf.RATE))
    return model, optimizer


def batches(accumulation: int) -> list[Tensor]:
    """This rank's micro-batches of a step, of all samples."""
    from accelerate import PartialState

    state = PartialState()
    return [
        chunk.chunk(state.num_processes)[state.process_index] for chunk in hf.rows().chunk(accumulation)
    ]


def step(accelerator: Any, model: Any, optimizer: Any, accumulation: int, *limit: float) -> list[Any]:
    """What `clip_grad_norm_` returned for each micro-batch of a step."""
    found = []
    for rows in batches(accumulation):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=rows, labels=rows).loss)
            found.append(accelerator.clip_grad_norm_(model.parameters(), *limit))
            optimizer.step()
            optimizer.zero_grad()
    return found


def weights(accelerator: Any, model: Any) -> dict[str, Tensor]:
    if hasattr(model, "zero_optimization_stage"):
        import deepspeed

        found = {}
        for name, parameter in model.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        return found
    return {k: v.clone() for k, v in accelerator.get_state_dict(model).items()} or hf.whole(
        model.named_parameters()
    )


def trained(topology: str, accumulation: int, limit: tuple[float, ...], config: Any) -> Any:
    """The norms returned, the weights at the end, and the number of steps that were counted."""
    from distnorm.integrations.accelerate import clip_with

    hf_ranks.prepare()
    accelerator = accelerator_of(topology, accumulation)
    model, optimizer = prepared(accelerator, hf.llama())
    clipping = clip_with(accelerator, model, config)
    returned = [step(accelerator, model, optimizer, accumulation, *limit) for _ in range(hf.STEPS)]
    norms = [[float("nan") if norm is None else float(norm) for norm in found] for found in returned]
    return norms, weights(accelerator, model), clipping.state_dict()["steps"]
