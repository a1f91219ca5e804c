"""Clipping before the step of torch optimizers: foreach, single-tensor and fused, with or without a closure.

A step that must not happen is skipped by hiding the gradients from the optimizer for the call: an
optimizer passes over parameters without one, and touches neither them nor its state.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from distnorm.clipper import GradClipper
from distnorm.errors import DistnormError
from distnorm.hooks import amp
from distnorm.hooks.second_clipper import refuse_second_clipper

_attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def refuse_other_clippers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers whose gradients would be clipped twice.

    Raises:
        ConfigError: an optimizer clips inside its own step; the key is named.
        DistnormError: an optimizer is attached to already.
    """
    for optimizer in optimizers:
        refuse_second_clipper(optimizer)
        if optimizer in _attached:
            raise DistnormError(
                f"expected an optimizer that nothing is attached to, found {type(optimizer).__name__}, which "
                "clips already; call remove() of its handle first"
            )


class OptimizerHook:
    """Clips once for all optimizers of a model, when the first of them steps.

    Args:
        clipper: of the model that they step.
        optimizers: those that step the model's parameters. A round is over when one of them steps again.
    """

    def __init__(self, clipper: GradClipper, optimizers: Sequence[Optimizer]) -> None:
        self._clipper, self._optimizers = clipper, optimizers
        self._skips = clipper.config.clip.nonfinite == "skip"
        self._round: set[int] = set()
        self._by_scaler: set[int] = set()
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._undo = [amp.watch_steps(self._before_scaled)]
        for optimizer in optimizers:
            _attached.add(optimizer)
            self._undo.append(optimizer.register_step_pre_hook(self._before).remove)
            self._undo.append(optimizer.register_step_post_hook(self._after).remove)

    def remove(self) -> None:
        """Put everything back."""
        self._show()
        while self._undo:
            self._undo.pop()()
        _attached.difference_update(self._optimizers)
        self._optimizers = ()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._show()  # what a step that raised left hidden
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._clip_once_a_round(optimizer)
            self._hide_if_skipped(optimizer)
            return None

        def clipped_closure() -> Any:
            self._show()
            loss = closure()
            self._clipper.clip()
            self._hide_if_skipped(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": clipped_closure}

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._show()

    def _before_scaled(self, optimizer: Optimizer, scaler: GradScaler) -> None:
        """The norm is of unscaled gradients; and all ranks skip the step, or none."""
        if not any(optimizer is ours for ours in self._optimizers):
            return
        if self._begins_round(optimizer):
            for ours in self._optimizers:
                amp.unscale(scaler, ours)
        self._by_scaler.discard(id(optimizer))
        self._clip_once_a_round(optimizer)
        self._by_scaler.add(id(optimizer))
        amp.set_found_inf(scaler, optimizer, ~self._last_is_finite())

    def _begins_round(self, optimizer: Optimizer) -> bool:
        return not self._round or id(optimizer) in self._round

    def _clip_once_a_round(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self._by_scaler:
            self._by_scaler.remove(id(optimizer))
            return
        if self._begins_round(optimizer):
            self._round = set()
            self._clipper.clip()
        self._round.add(id(optimizer))

    def _hide_if_skipped(self, optimizer: Optimizer) -> None:
        """Read the result on the host: only a fused optimizer can take a step back on the device."""
        if not self._skips or self._last_is_finite():
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def _last_is_finite(self) -> Tensor:
        assert self._clipper.last is not None
        return self._clipper.last.is_finite

    def _show(self) -> None:
        while self._hidden:
            parameter, gradient = self._hidden.pop()
            if gradient.dtype == parameter.dtype:
                parameter.grad = gradient
            else:  # FSDP1's `keep_low_precision_grads`, which a plain assignment refuses
                parameter.grad = torch.empty_like(parameter)
                parameter.grad.data = gradient
