"""Small engines, their data, and what one process that holds everything would compute for them."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LR = 8.0  # so that a clipped update is large beside the rounding of a bf16 parameter
BATCH, WIDTH = 2, 7


def use_deepspeed() -> Any:
    """DeepSpeed, quiet and on the CPU, without compiling its shared-memory collectives."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29500")
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    logging.getLogger("distnorm").propagate = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, dist_init_required=False)
    get_accelerator().is_fp16_supported = lambda: True  # slow on most CPUs, not wrong
    return deepspeed


class Net(nn.Module):
    """Two layers, a bias that a batch may leave out, and odd sizes, so that partitions cut parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 5), nn.Linear(5, 3)
        self.extra = nn.Linear(5, 3)

    def forward(self, x: Tensor, uses_extra: bool = True) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        out = self.outer(hidden)
        return out + self.extra(hidden) if uses_extra else out


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int, micro: int, rank: int) -> Tensor:
    return torch.randn(
        BATCH, WIDTH, generator=torch.Generator().manual_seed(10007 * step + 101 * micro + rank)
    )


def loss_of(
    model: Callable[..., Tensor], x: Tensor, dtype: torch.dtype, *, uses_extra: bool = True
) -> Tensor:
    return (model(x.to(dtype), uses_extra).float() ** 2).mean()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Three parameter groups."""
    named = dict(model.named_parameters())
    picks = (["inner.weight"], ["inner.bias", "outer.bias", "extra.bias"], ["outer.weight", "extra.weight"])
    return [{"params": [named[name] for name in names]} for names in picks]


def fused_sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """SGD that DeepSpeed takes for its fused Adam, which has to be compiled."""
    from deepspeed.ops.adam import FusedAdam

    class FusedSGD(FusedAdam):
        def __init__(self) -> None:
            torch.optim.Optimizer.__init__(self, groups, {"lr": LR})

        def step(self, *_: Any, **__: Any) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.data.add_(parameter.grad, alpha=-group["lr"])

    return FusedSGD()


def make_engine(
    stage: int,
    dtype: str = "fp32",
    *,
    fused: bool = False,
    offload: bool = False,
    accumulation: int = 1,
    model: nn.Module | None = None,
    groups: Sequence[dict[str, Any]] | None = None,
    **settings: Any,
) -> Any:
    """An engine with plain SGD."""
    deepspeed = use_deepspeed()
    model = make_net() if model is None else model
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": accumulation,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero | settings.pop("zero", {}),
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] |= {"initial_scale_power": 8, "hysteresis": 1} | settings.pop("fp16", {})
    groups = groups_of(model) if groups is None else list(groups)
    optimizer = fused_sgd(groups) if fused else torch.optim.SGD(groups, lr=LR)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config | settings, dist_init_required=False
    )
    return engine


def parameters_of(engine: Any) -> dict[str, Tensor]:
    """Whole parameters, fp64, by name, on every rank."""
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() < 3:
        return {name: p.detach().to(torch.float64, copy=True) for name, p in parameters.items()}
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().to(torch.float64, copy=True) for name, p in parameters.items()}


def run_step(
    engine: Any,
    step: int,
    *,
    dtype: str = "fp32",
    uses_extra: Sequence[bool] = (True,),
    factor: float = 1.0,
    factor_of: int | None = None,
) -> None:
    """One optimizer step of the engine; `uses_extra` for each micro-batch, in turn.

    The loss is multiplied by `factor`, on rank `factor_of` only if that is given.
    """
    if factor_of not in (None, dist.get_rank()):
        factor = 1.0
    for micro in range(engine.gradient_accumulation_steps()):
        x = batch(step, micro, dist.get_rank())
        uses = uses_extra[micro % len(uses_extra)]
        engine.backward(loss_of(engine, x, DTYPES[dtype], uses_extra=uses) * factor)
        engine.step()


def dense_gradients(
    before: dict[str, Tensor],
    step: int,
    accumulation: int,
    *,
    dtype: str = "fp32",
    loss_scale: float = 1.0,
    uses_extra: Sequence[bool] = (True,),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean gradient over all ranks and micro-batches, and the mean of its summands' magnitudes, both fp64.

    In fp32 the model itself is fp64 here. In bf16 and fp16 each summand comes of the same low-precision
    forward and backward that the engine runs, with the same scaled loss; only their mean is exact.
    """
    world = dist.get_world_size()
    precision = torch.float64 if dtype == "fp32" else DTYPES[dtype]
    model = copy.deepcopy(Net()).to(precision)
    model.load_state_dict({name: value.to(precision) for name, value in before.items()})
    total = {name: torch.zeros_like(value) for name, value in before.items()}
    magnitude = {name: torch.zeros_like(value) for name, value in before.items()}
    for rank in range(world):
        for micro in range(accumulation):
            model.zero_grad()
            uses = uses_extra[micro % len(uses_extra)]
            x = batch(step, micro, rank)
            if dtype == "fp32":
                loss = (model(x.double(), uses) ** 2).mean()
            else:
                loss = loss_of(model, x, precision, uses_extra=uses)
            (loss / accumulation * loss_scale).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    summand = parameter.grad.double() / (world * loss_scale)
                    total[name] += summand
                    magnitude[name] += summand.abs()
    return total, magnitude


def norm_of(tensors: dict[str, Tensor]) -> float:
    return float(torch.sqrt(sum((t**2).sum() for t in tensors.values())))


def roundings(dtype: str, world: int, accumulation: int, loss_scale: float) -> tuple[float, float]:
    """How far rounding may move a gradient element, relative to its summands' magnitudes, and absolutely.

    A low-precision engine rounds each partial sum: `accumulation` additions of micro-batches, a division by
    the world and `world` additions over ranks, and its own copies of the result; each by half an ulp.
    """
    if dtype == "fp32":
        return 1e-6, 0.0
    info = torch.finfo(DTYPES[dtype])
    steps = accumulation + world + 2
    return steps * info.eps / 2, steps * info.smallest_normal * info.eps / loss_scale


def fractions_of_allowed(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    exact: dict[str, Tensor],
    slack: dict[str, Tensor],
    *,
    dtype: str,
    measured: float,
    max_norm: float,
) -> tuple[float, float]:
    """Errors of the norm, and of a clipped SGD update, by what rounding may do to them.

    Args:
        before, after: parameters, fp64.
        exact: the oracle's gradient.
        slack: how far rounding may move each element of it.
        dtype: the parameters' own.
        measured: the norm found.
        max_norm: the threshold in force.
    """
    true_norm = norm_of(exact)
    allowed = norm_of(slack) + 1e-5 * true_norm
    coef = min(1.0, max_norm / (true_norm + 1e-6))
    worst = 0.0
    for name, old in before.items():
        change = -LR * coef * exact[name]
        bound = torch.finfo(DTYPES[dtype]).eps * (old.abs() + after[name].abs()) + LR * coef * (
            slack[name] + exact[name].abs() * allowed / true_norm
        )
        worst = max(worst, float(((after[name] - old - change).abs() / bound).max()))
    return abs(measured - true_norm) / allowed, worst


@contextmanager
def counted_all_reduces() -> Iterator[list[str]]:
    """Names of the all-reduces that run inside, as the profiler sees them; filled at the end."""
    found: list[str] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield found
    found += [event.name for event in profile.events() if event.name == "c10d::allreduce_"]
