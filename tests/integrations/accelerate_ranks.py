"""What the ranks of Accelerate's tests do: its documentation's loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distnorm.errors import ConfigError
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


def scheduled(accelerator: Any, topology: str, saved: str) -> tuple[Any, Any, Any]:
    """Model, AdamW and a schedule; an engine steps its schedule itself, and is given it as it is made."""
    if not topology.startswith("zero"):
        model, optimizer = prepared(accelerator, topology, saved, adam=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer.optimizer, total_iters=9)
        return model, optimizer, accelerator.prepare(schedule)
    model = hf_ranks.model_of(topology, saved)
    optimizer = torch.optim.AdamW(model.parameters(), lr=hf.RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=9)
    made: tuple[Any, Any, Any] = accelerator.prepare(model, optimizer, schedule)
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


def trained(topology: str, saved: str, accumulation: int, limit: tuple[float, ...], config: Any) -> Any:
    """The norms returned, the weights at the end, and the number of steps that were counted."""
    from distnorm.integrations.accelerate import clip_with

    accelerator = accelerator_of(topology, accumulation)
    model, optimizer = prepared(accelerator, topology, saved)
    clipping = clip_with(accelerator, model, config)
    how = {"topology": topology, "accumulation": accumulation}
    returned = [step(accelerator, model, optimizer, *limit, **how) for _ in range(hf.STEPS)]
    norms = [[float("nan") if norm is None else float(norm) for norm in found] for found in returned]
    return norms, weights(model), clipping.state_dict()["steps"]


HISTORY = {"clip": {"nonfinite": "skip", "policy": {"name": "zclip", "warmup": 2}}}


@contextmanager
def kept_in(memory: dict[str, Any], what: str, accelerator: Any = None, *parts: Any) -> Iterator[None]:
    """Keep model and optimizer there where transformers has sharded the model: Accelerate 1.15 writes plain
    tensors alone. All else is left to its own checkpoint."""
    if what == "save":
        memory.update({str(i): hf_ranks.copied(part.state_dict()) for i, part in enumerate(parts)})
    for i, part in enumerate(parts if what == "load" else ()):
        part.load_state_dict(memory[str(i)])
    if accelerator is None:
        yield
        return
    with mock.patch.multiple(accelerator, _models=[], _optimizers=[]):
        yield


def interrupted(topology: str, folder: str, saved: str = "") -> dict[str, Any]:
    """A run of four steps, the second of which is infinite on the last rank, and one that goes on from its
    checkpoint of the second: what there is after each step, and the clipper's state at the end."""
    from distnorm.integrations.accelerate import clip_with

    found: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for part in ("straight", "resumed"):
        accelerator = accelerator_of(topology)
        model, optimizer, schedule = scheduled(accelerator, topology, saved)
        clipping = clip_with(accelerator, model, HISTORY)
        inside = (accelerator, model, optimizer) if topology in hf_ranks.NATIVE else ()
        if part == "resumed":
            with kept_in(kept, "load", *inside):
                accelerator.load_state(folder)
            assert clipping.clipper is None or topology.startswith("zero")  # the state waits for it
        else:
            hf_ranks.poison(model, 2, rank=dist.get_world_size() - 1)
        seen = []
        for number in range(4 if part == "straight" else 2):
            step(accelerator, model, optimizer, hf.MAX_NORM, topology=topology)
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
            if part == "straight" and number == 1:
                with kept_in(kept, "save", *inside):
                    accelerator.save_state(folder)
        found[part] = {"steps": seen, "state": clipping.state_dict()}
    return found


def everything(
    topology: str, folder: str, saved: str, limit: tuple[float, ...], config: Any
) -> dict[str, Any]:
    """All that is asked of a topology: starting ranks costs more than their steps."""
    hf_ranks.prepare()
    found: dict[str, Any] = {
        "trained": [trained(topology, saved, accumulation, limit, config) for accumulation in (1, 2)],
        "interrupted": interrupted(topology, folder, saved),
    }
    if topology == "ddp":
        found["overflowing"] = overflowing(1024.0)
    if topology == "zero2":
        try:
            trained(topology, "", 1, (), {"clip": {"max_norm": 0.3}})
        except ConfigError as error:
            found["refusal"] = str(error)
    return found


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
