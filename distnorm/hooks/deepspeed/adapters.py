"""One adapter for each of DeepSpeed's wrappers: where it has gradients, takes a norm, skips, scales.

An adapter patches its wrapper so that each of these does what the step's verdict says. What a wrapper uses
as a norm is then only a sign: 0, which it takes for fine, or inf, by which it skips the step in its own way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distnorm.hooks.deepspeed.patches import Patches, rebound
from distnorm.hooks.deepspeed.verdict import Verdict
from distnorm.sources import deepspeed as source
from distnorm.sources.deepspeed import Piece


class Adapter(ABC):
    """What the hook asks of a wrapper.

    Args:
        engine: the engine.
        names: names in the whole model by a parameter's `id`.
    """

    def __init__(self, engine: Any, names: Mapping[int, str]) -> None:
        self.engine, self.names, self.optimizer = engine, names, engine.optimizer
        self.verdict: Verdict | None = None

    @property
    def loss_scale(self) -> float:
        """What the gradients were multiplied by; valid only before the wrapper's step, which changes it."""
        scale = getattr(self.optimizer, "loss_scale", None)
        return 1.0 if scale is None else float(scale)

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """What this rank holds."""

    @abstractmethod
    def install(self, patches: Patches) -> None:
        """Let the wrapper do what the verdict says."""

    def wait_for_gradients(self) -> None:  # noqa: B027 - most have nothing to do
        """Wait for gradients that are still on their way."""

    def impose(self) -> None:  # noqa: B027
        """Do what the wrapper's own step can't be made to do."""

    def forget(self) -> None:  # noqa: B027
        """Clear what a parameter that is unused in the next step would contribute again."""

    @property
    def is_between_steps(self) -> bool:
        """Whether there has been no backward since the last step, as far as the wrapper knows."""
        return False

    def _verdict(self) -> Verdict:
        assert self.verdict is not None, "the engine steps through _take_model_step only"
        return self.verdict

    def _skips(self, *_: Any, **__: Any) -> bool:
        return self._verdict().skips

    def _sign(self, *_: Any, **__: Any) -> float:
        return math.inf if self._verdict().skips else 0.0

    def _rescale(self, gradients: Sequence[Tensor], *_: Any, **__: Any) -> float:
        self._verdict().rescale_(gradients)
        return 1.0


class TorchOptimizer(Adapter):
    """Stage 0 in fp32: the engine steps the user's optimizer itself."""

    def pieces(self) -> list[Piece]:
        return source.of_parameters(self._parameters(), self.names)

    def install(self, patches: Patches) -> None:
        patches.add(self.optimizer, "overflow", False)  # by which the engine counts a step as skipped

    def impose(self) -> None:
        self.optimizer.overflow = self._skips()
        if self._skips():
            for parameter in self._parameters():
                parameter.grad = None  # an optimizer touches neither the parameter then nor its state
        else:
            self._rescale([p.grad for p in self._parameters() if p.grad is not None])

    def _parameters(self) -> list[Tensor]:
        return [p for p in self.engine.module.parameters() if p.requires_grad]


class Unfused(Adapter):
    """`FP16_UnfusedOptimizer`: stage 0 in fp16, and in bf16 with bf16 accumulation.

    The loss is scaled by this wrapper's own `backward`, which the engine's `backward` doesn't call, though
    the step divides by the scale whichever was called. So whether the gradients are scaled is checked.
    """

    _functions: tuple[str, ...] = ("get_weight_norm", "get_global_norm")
    _check = "check"
    _borne = 1.0

    @property
    def loss_scale(self) -> float:
        return self._borne

    def pieces(self) -> list[Piece]:
        parameters = [p for group in self.optimizer.fp16_groups for p in group]
        return source.of_parameters(parameters, self.names)

    def install(self, patches: Patches) -> None:
        patches.set(self.optimizer.overflow_checker, self._check, self._skips)
        patches.set(self.optimizer, "unscale_and_clip_grads", self._unscale_and_clip)
        functions = dict.fromkeys(self._functions, self._sign)
        patches.set(self.optimizer, "step", rebound(self.optimizer, "step", functions))
        backward = self.optimizer.backward

        def scaling_backward(*args: Any, **kwargs: Any) -> None:
            self._borne = super(Unfused, self).loss_scale
            backward(*args, **kwargs)

        patches.set(self.optimizer, "backward", scaling_backward)

    def forget(self) -> None:
        self._borne = 1.0

    def _unscale_and_clip(self, *_: Any, **__: Any) -> float:
        masters = (p for group in self.optimizer.fp32_groups for p in group)
        return self._rescale([p.grad for p in masters if p.grad is not None])


class Fused(Unfused):
    """`FP16_Optimizer`: the same with a fused Adam, over flattened groups."""

    _functions = ("get_flattened_grad_norm", "get_norm_with_moe_layers", "get_global_norm")
    _check = "has_overflow"

    def _unscale_and_clip(self, gradients: Sequence[Tensor], *_: Any, **__: Any) -> float:
        return self._rescale(gradients)


class BF16(Adapter):
    """`BF16_Optimizer`: bf16 with fp32 accumulation, at stage 1, and at stage 0 of a pipeline."""

    def pieces(self) -> list[Piece]:
        return source.of_bf16_optimizer(self.optimizer, self.names)

    def install(self, patches: Patches) -> None:
        functions = dict.fromkeys(("get_global_norm_of_tensors", "get_norm_with_moe_layers"), self._sign)
        step = rebound(self.optimizer, "step", functions)
        patches.set(self.optimizer, "step", torch.no_grad()(step))

    def impose(self) -> None:
        self._clip_grad, self.optimizer.clip_grad = self.optimizer.clip_grad, 0.0
        if not self._skips():
            self._rescale(self.optimizer.fp32_groups_gradient_flat_partition)

    def forget(self) -> None:
        self.optimizer.clip_grad = self._clip_grad


class Zero12(Adapter):
    """`DeepSpeedZeroOptimizer`: stages 1 and 2, with offload or without."""

    def pieces(self) -> list[Piece]:
        return source.of_zero_1_and_2(self.optimizer, self.names)

    def wait_for_gradients(self) -> None:
        self.optimizer._wait_for_offload_copies()

    def install(self, patches: Patches) -> None:
        optimizer = self.optimizer
        patches.set(optimizer, "check_grad_overflow", True)
        patches.set(optimizer, "check_overflow", self._set_overflow)
        patches.set(optimizer, "scaled_global_norm", self._no_norm)
        patches.set(optimizer, "unscale_and_clip_grads", self._rescale)

    def forget(self) -> None:
        if self.optimizer.cpu_offload:
            masters = self.optimizer.single_partition_of_fp32_groups
            stale = [p.grad for p in masters if p.grad is not None]
            torch._foreach_zero_(stale + list(self.optimizer.accumulated_grads_in_cpu.values()))

    @property
    def is_between_steps(self) -> bool:
        return bool(self.optimizer.micro_step_id == -1)

    def _set_overflow(self, *_: Any, **__: Any) -> None:
        self.optimizer.overflow = self._skips()

    def _no_norm(self, *_: Any, **__: Any) -> Tensor:
        return torch.zeros((), device="cpu")


class Zero3(Adapter):
    """`DeepSpeedZeroOptimizer_Stage3`, with offload to the CPU or without."""

    def pieces(self) -> list[Piece]:
        return source.of_zero_3(self.optimizer, self.names)

    def wait_for_gradients(self) -> None:
        stream = self.optimizer.reduce_and_partition_stream
        if torch.cuda.is_available() and stream is not None:
            stream.synchronize()

    def install(self, patches: Patches) -> None:
        patches.set(self.optimizer, "check_overflow", self._set_overflow)
        patches.set(self.optimizer, "_get_norm_groups", self._norm_groups)
        patches.set(self.optimizer, "unscale_and_clip_grads", self._unscale_and_clip)

    def forget(self) -> None:
        self.optimizer.grad_partitions_flat_buffer.zero_()
        if self.optimizer.offload_optimizer:
            for master in self.optimizer.fp32_partitioned_groups_flat:
                master.grad.zero_()

    @property
    def is_between_steps(self) -> bool:
        return not (self.optimizer._epilogue_ran_this_backward or self.optimizer.micro_step_id)

    def _set_overflow(self, *_: Any, **__: Any) -> None:
        self.optimizer.overflow = self._skips()
        self.optimizer.inf_or_nan_tracker.zero_()

    def _norm_groups(self) -> list[Tensor]:
        return [torch.tensor(self._sign(), device="cpu")]

    def _unscale_and_clip(self, sub_group: int, *_: Any, **__: Any) -> None:
        self._rescale([self.optimizer.fp32_partitioned_groups_flat[sub_group].grad])


WRAPPERS: Mapping[str, type[Adapter]] = {
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": Unfused,
    "deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer": Fused,
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": BF16,
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": Zero12,
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": Zero3,
}
"""By the wrapper's exact class: a subclass may do anything with its gradients."""
