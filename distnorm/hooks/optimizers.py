"""Clipping before the step of torch optimizers: foreach, single-tensor and fused, with or without a closure.

A step that must not happen is skipped by hiding the gradients from the optimizer for the call: an
optimizer passes over parameters without one, and touches neither them nor its state.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from distnorm.clipper import GradClipper
from distnorm.errors import ConfigError, DistnormError
from distnorm.hooks import amp, fused
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
        self._skips = clipper.rules.may_skip
        # Zeroing gradients that are not finite is no division.
        obstacle = clipper.rules.obstacle
        if obstacle is None and clipper.config.clip.nonfinite == "zero":
            obstacle = "nonfinite: zero, which no optimizer can do"
        self._may_hand_over = clipper.config.clip.apply != "scale" and obstacle is None
        self._members: list[Tensor] = []
        self._obstacle: str | None = None
        self._in_step = False  # whether the optimizers multiply by this round's coefficient
        self._handed: set[int] = set()
        if clipper.config.clip.apply == "optimizer" and not self._can_hand_over():
            found = obstacle or self._obstacle
            raise ConfigError(f"clip.apply: expected fused optimizers of all that is clipped, found {found}")
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
        for optimizer in self._optimizers:
            self._tidy(optimizer)
        while self._undo:
            self._undo.pop()()
        _attached.difference_update(self._optimizers)
        self._optimizers = ()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._tidy(optimizer)  # what a step that raised has left
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._clip_once_a_round(optimizer)
            self._finish(optimizer)
            return None

        def clipped_closure() -> Any:
            self._show()
            loss = closure()
            self._clip()
            self._finish(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": clipped_closure}

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tidy(optimizer)

    def _clip(self, *, scaled: bool = False) -> None:
        """Measure and decide; and multiply, unless the optimizers can do so in their own steps."""
        self._in_step = not scaled and self._can_hand_over()
        if self._in_step:
            self._clipper.decide()
        else:
            self._clipper.clip()

    def _can_hand_over(self) -> bool:
        if not self._may_hand_over or any(map(fused.is_taken, self._optimizers)):
            return False
        members = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
        if len(members) != len(self._members) or not all(map(is_, members, self._members)):
            self._members = members
            self._obstacle = next(fused.obstacles(self._optimizers, self._clipper.parameters), None)
        return self._obstacle is None

    def _finish(self, optimizer: Optimizer) -> None:
        if self._in_step:
            assert self._clipper.last is not None
            fused.hand_over(optimizer, self._clipper.last, skips=self._skips)
            self._handed.add(id(optimizer))
        else:
            self._hide_if_skipped(optimizer)

    def _before_scaled(self, optimizer: Optimizer, scaler: GradScaler) -> None:
        """The norm is of unscaled gradients; and all ranks skip the step, or none."""
        if not any(optimizer is ours for ours in self._optimizers):
            return
        self._tidy(optimizer)
        if self._begins_round(optimizer):
            for ours in self._optimizers:
                amp.unscale(scaler, ours)
        self._by_scaler.discard(id(optimizer))
        self._clip_once_a_round(optimizer, scaled=True)
        self._by_scaler.add(id(optimizer))
        amp.set_found_inf(scaler, optimizer, ~self._last_is_finite())

    def _begins_round(self, optimizer: Optimizer) -> bool:
        return not self._round or id(optimizer) in self._round

    def _clip_once_a_round(self, optimizer: Optimizer, *, scaled: bool = False) -> None:
        if id(optimizer) in self._by_scaler:
            self._by_scaler.remove(id(optimizer))
            return
        if self._begins_round(optimizer):
            self._round = set()
            self._clip(scaled=scaled)
        self._round.add(id(optimizer))

    def _hide_if_skipped(self, optimizer: Optimizer) -> None:
        """Read the result on the host: only a fused optimizer can skip a step on the device."""
        assert self._clipper.last is not None
        if not self._skips or fused.skip_too(optimizer, self._clipper.last) or not self._clipper.last.skipped:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def _last_is_finite(self) -> Tensor:
        assert self._clipper.last is not None
        return self._clipper.last.is_finite

    def _tidy(self, optimizer: Optimizer) -> None:
        self._show()
        if id(optimizer) in self._handed:
            self._handed.remove(id(optimizer))
            fused.take_back(optimizer)

    def _show(self) -> None:
        while self._hidden:
            parameter, gradient = self._hidden.pop()
            if gradient.dtype == parameter.dtype:
                parameter.grad = gradient
            else:  # FSDP1's `keep_low_precision_grads`, which a plain assignment refuses
                parameter.grad = torch.empty_like(parameter)
                parameter.grad.data = gradient
