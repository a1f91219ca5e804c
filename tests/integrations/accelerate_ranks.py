"""What the ranks of Accelerate's tests do: its documentation's loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.integrations import hf, hf_ranks


def accelerator_of(topology: str, accumulation: int = 1) -> Any:
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, ParallelismConfig

    AcceleratorState._reset_state()  # of an accelerator before
    PartialState(cpu=True)
    plugins: dict[str, Any] = {}
    if topology == "fsdp2":
        hf_ranks.pretend_gpus()
        plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=hf_ranks.WRAPPED,
        )
    if topology == "fsdp2_x_tp":
        hf_ranks.pretend_gpus()
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


def prepared(accelerator: Any, topology: str, saved: str = "", adam: bool = False) -> tuple[Any, Any]:
    model = hf_ranks.model_of(topology, saved)
    optimizer = (torch.optim.AdamW if adam else torch.optim.SGD)(model.parameters(), lr=hf.RATE)
    if (
        topology in hf_ranks.NATIVE
    ):  # transformers has sharded it: Accelerate is told the sizes, as by Trainer
        model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True).train()
        return model, accelerator.prepare(optimizer)
    made: tuple[Any, Any] = accelerator.prepare(model, optimizer)
    return made


def batches(topology: str, accumulation: int) -> list[Tensor]:
    """This rank's micro-batches of a step, of all samples."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    place = dist.get_rank() if ranks > 1 else 0
    tp = 2 if topology == "fsdp2_x_tp" else 1
    return [chunk.chunk(ranks // tp)[place // tp] for chunk in hf.rows().chunk(accumulation)]


def step(
    accelerator: Any, model: Any, optimizer: Any, *limit: float, topology: str = "ddp", accumulation: int = 1
) -> list[Any]:
    """What `clip_grad_norm_` returned for each micro-batch of a step."""
    found = []
    for rows in batches(topology, accumulation):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=rows, labels=rows).loss)
            found.append(accelerator.clip_grad_norm_(model.parameters(), *limit))
            optimizer.step()
            optimizer.zero_grad()
    return found


def weights(model: Any) -> dict[str, Tensor]:
    if hasattr(model, "zero_optimization_stage"):
        import deepspeed

        found = {}
        for name, parameter in model.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        return found
    return hf.whole(model.named_parameters())


def trained_in_both_ways(topology: str, saved: str, limit: tuple[float, ...], config: Any) -> list[Any]:
    """With one micro-batch a step, and with two."""
    return [trained(topology, saved, accumulation, limit, config) for accumulation in (1, 2)]


def trained(topology: str, saved: str, accumulation: int, limit: tuple[float, ...], config: Any) -> Any:
    """The norms returned, the weights at the end, and the number of steps that were counted."""
    from distnorm.integrations.accelerate import clip_with

    hf_ranks.prepare()
    accelerator = accelerator_of(topology, accumulation)
    model, optimizer = prepared(accelerator, topology, saved)
    clipping = clip_with(accelerator, model, config)
    how = {"topology": topology, "accumulation": accumulation}
    returned = [step(accelerator, model, optimizer, *limit, **how) for _ in range(hf.STEPS)]
    norms = [[float("nan") if norm is None else float(norm) for norm in found] for found in returned]
    return norms, weights(model), clipping.state_dict()["steps"]


def skipping(topology: str, config: Any) -> list[dict[str, Any]]:
    """Weights, optimizer state and what Accelerate says after each of three steps, the second of which is
    infinite on the last rank."""
    from distnorm.integrations.accelerate import clip_with

    hf_ranks.prepare()
    accelerator = accelerator_of(topology)
    model, optimizer = prepared(accelerator, topology, adam=True)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.LinearLR(optimizer.optimizer, total_iters=100))
    clipping = clip_with(accelerator, model, config)
    hf_ranks.poison(model, 2, rank=dist.get_world_size() - 1 if dist.is_initialized() else 0)
    seen = []
    for _ in range(3):
        step(accelerator, model, optimizer, 1.0)
        schedule.step()
        moments = [value for each in optimizer.state.values() for value in each.values()]
        seen.append(
            {
                "weights": weights(model),
                "moments": [getattr(value, "full_tensor", value.clone)() for value in moments],
                "rate": schedule.get_last_lr(),
                "skipped": accelerator.optimizer_step_was_skipped,
                "result": bool(clipping.last.skipped),
            }
        )
    return seen


INPUTS = torch.arange(8.0).view(2, 4) / 8


def stage(rank: int) -> nn.Module:
    """A part of a model that one rank holds alone, as a pipeline stage or an expert."""
    torch.manual_seed(rank)
    return nn.ModuleDict({f"stage{rank}": nn.Linear(4, 3)})


def loss_of(stage: nn.Module) -> Tensor:
    [layer] = stage.children()
    loss: Tensor = layer(INPUTS.to(layer.weight.dtype)).square().sum()
    return loss


def overflowing(scale: float) -> list[tuple[float, float, bool, dict[str, Tensor]]]:
    """Under a loss scaler, as fp16 on a GPU has it; the second step overflows on the last rank alone.

    Returns:
        Each step's norm, the scale after it, whether it was skipped, and this rank's weights.
    """
    from torch.amp import GradScaler

    from distnorm.integrations.accelerate import clip_with

    hf_ranks.prepare()
    accelerator = accelerator_of("ddp")
    accelerator.scaler = GradScaler("cpu", init_scale=scale)  # Accelerate makes none for a CPU
    model = stage(dist.get_rank())
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=hf.RATE))
    clip_with(accelerator, model, {"clip": {"nonfinite": "skip"}})
    seen: list[Any] = []
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model))
        if len(seen) == 1 and dist.get_rank() == 1:
            for parameter in model.parameters():
                parameter.grad.fill_(torch.inf)
        norm = accelerator.clip_grad_norm_(model.parameters(), hf.MAX_NORM)
        optimizer.step()
        scale = accelerator.scaler.get_scale()
        seen.append((float(norm), scale, accelerator.optimizer_step_was_skipped, weights(model)))
    return seen


def resumed(topology: str, folder: str) -> list[tuple[Any, dict[str, Tensor]]]:
    """The state and the weights after four steps; and after two, a checkpoint, and two of a new one."""
    from distnorm.integrations.accelerate import clip_with

    hf_ranks.prepare()
    results = []
    for goes_on in (False, True):
        accelerator = accelerator_of(topology)
        model, optimizer = prepared(accelerator, topology, adam=True)
        clipping = clip_with(accelerator, model, {"clip": {"policy": {"name": "zclip", "warmup": 2}}})
        if goes_on:
            accelerator.load_state(folder)
            assert clipping.clipper is None  # the state waits for it
        for number in range(2 if goes_on else 4):
            step(accelerator, model, optimizer, 1.0)
            if not goes_on and number == 1:
                accelerator.save_state(folder)
        results.append((clipping.state_dict(), weights(model)))
    return results
