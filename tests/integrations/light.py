"""The tiny model of these tests in Lightning: its module, strategies that run without a GPU, a logger."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import deepspeed
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from distnorm.integrations.lightning import DistnormCallback
from tests.integrations.tiny import BATCH, MOMENTUM, RATE, STEPS, Net, samples

NAMES = ["grad_norm", "grad_norm_clipped", "clip_coef", "clip_threshold", "skipped"]


def loader(kind: str, accumulation: int = 1, steps: int = STEPS) -> Any:
    """Step k trains on samples 8k to 8k + 7, whatever the number of ranks and of micro-batches."""
    tensor_parallel = 2 if "tp" in kind else 1
    rank, world = (0, 1) if kind == "one" else (dist.get_rank(), dist.get_world_size())
    rank, world = rank // tensor_parallel, world // tensor_parallel
    mine = TensorDataset(*(each[rank::world] for each in samples(steps)))
    return DataLoader(mine, batch_size=BATCH // world // accumulation)


class Lit(pl.LightningModule):
    """Trains `Net` by SGD; `bad_step` is the step whose loss is infinite on the first rank alone."""

    def __init__(self, *, bad_step: int | None = None, fused: bool = False, sharded: bool = False) -> None:
        super().__init__()
        self.net, self.bad_step, self.fused, self.sharded = Net(), bad_step, fused, sharded

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or getattr(self.net, "is_cut", False):
            return
        self.net.is_cut = True  # type: ignore[assignment]
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if mesh["tensor_parallel"].size() > 1:
            parallelize_module(self.net, mesh["tensor_parallel"], plan)
        if self.sharded:
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.trainer.model.parameters(), RATE, MOMENTUM, fused=self.fused)

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = (self.net(batch[0]) - batch[1]).square().mean()
        first = not dist.is_initialized() or dist.get_rank() == 0
        return loss * torch.inf if first and self.trainer.global_step == self.bad_step else loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.loss(batch)


class Manual(Lit):
    """The same by manual optimization."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Recorder(DummyLogger):
    """Keeps what the Trainer logs."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({k: v for k, v in metrics.items() if k != "epoch"})


class OnCpu(FSDPStrategy):
    """Lightning asks for a GPU where the class itself is given, and FSDP1 does where no device is."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        with fsdp1_on_cpu():
            return super()._setup_model(model)


@contextmanager
def fsdp1_on_cpu() -> Iterator[None]:
    wrap = FullyShardedDataParallel.__init__

    def on_cpu(*args: Any, **kwargs: Any) -> None:
        wrap(*args, **{**kwargs, "device_id": torch.device("cpu")})

    with mock.patch.object(FullyShardedDataParallel, "__init__", on_cpu):
        yield


class Engine(DeepSpeedStrategy):
    """Lightning asks for GPUs, by their numbers; DeepSpeed does not."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first
        with mock.patch("lightning.pytorch.strategies.deepspeed._validate_device_index_selection"):
            super().setup_distributed()


def strategy(kind: str) -> Any:
    gloo = {"process_group_backend": "gloo"}
    if kind == "ddp":
        return DDPStrategy(**gloo)
    if kind == "fsdp1":
        return OnCpu(**gloo, use_orig_params=False, state_dict_type="sharded")
    if kind == "fsdp1-orig":
        return OnCpu(**gloo, auto_wrap_policy={nn.Linear})
    if kind.startswith("zero"):
        config = {"zero_optimization": {"stage": int(kind[4:])}, "zero_allow_untested_optimizer": True}
        return Engine(**gloo, config=config)
    dp, tp = {"tp": (1, 2), "fsdp2": (2, 1), "fsdp2xtp": (2, 2)}[kind]
    return ModelParallelStrategy(dp, tp, save_distributed_checkpoint=False, **gloo)


def elastic() -> None:
    """Let Lightning find the processes that are there, as under torchrun."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": "0"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def trainer(kind: str, callback: Any, callbacks: Sequence[Any] = (), **settings: Any) -> Any:
    """A Trainer in a process that has its group, or that is alone."""
    warnings.simplefilter("ignore")
    distributed: dict[str, Any] = {"devices": 1}
    if kind != "one":
        elastic()
        distributed = {"devices": dist.get_world_size(), "strategy": strategy(kind)}
    saves = any(isinstance(each, pl.callbacks.ModelCheckpoint) for each in callbacks)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": saves}
    defaults = {
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "logger": Recorder(),
        "accelerator": "cpu",
        "use_distributed_sampler": False,
    }
    given = [*([] if callback is None else [callback]), *callbacks]
    return pl.Trainer(**{**quiet, **defaults, **distributed, "callbacks": given, **settings})


def gathered(parameter: nn.Parameter) -> Any:
    """The whole parameter, where DeepSpeed's stage 3 has left a part on each rank."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    return deepspeed.zero.GatheredParameters([parameter])


def whole(root: nn.Module) -> dict[str, Tensor]:
    """Whole weights by their names in `Net`. Collective."""
    found: dict[str, Tensor] = {}
    if isinstance(root, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(root):
            found = {name: p.detach().clone() for name, p in root.named_parameters()}
    else:
        for name, p in root.named_parameters():
            with gathered(p):
                found[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
    for wrapper in ("_fsdp_wrapped_module.", "module.", "net."):
        found = {name.replace(wrapper, ""): p for name, p in found.items()}
    return found


class Watch(pl.Callback):
    """Keeps the whole weights after each batch. Collective."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.weights.append(whole(trainer.strategy.model))


def fitted(
    kind: str,
    config: Any,
    model: Lit | None = None,
    accumulation: int = 1,
    ckpt: str | None = None,
    steps: int = STEPS,
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Train, and tell what was logged, the weights, and the callback's state. Collective."""
    callback = DistnormCallback(config)
    run = trainer(kind, callback, callbacks, accumulate_grad_batches=accumulation, **settings)
    model = Lit(sharded="fsdp2" in kind) if model is None else model
    run.fit(model, loader(kind, accumulation, steps), ckpt_path=ckpt)
    return {
        "logged": run.logger.rows,
        "weights": whole(run.strategy.model),
        "state": callback.state_dict(),
        "clip_val": run.gradient_clip_val,
        "leftover": "clip_gradients" in vars(run.precision_plugin),
    }
