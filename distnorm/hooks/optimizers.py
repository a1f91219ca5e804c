"""Clipping before the step of torch optimizers: foreach, single-tensor, fused; with or without a closure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from distnorm.clipper import GradClipper
from distnorm.errors import ConfigError, DistnormError, NonFiniteGradientError, UnsupportedGradientError
from distnorm.hooks import amp, callers, fused
from distnorm.hooks.second_clipper import TorchClips, note_clipped
from distnorm.hooks.wrapping import hookable, wrapped
from distnorm.kernels import refuse_capture
from distnorm.sources import GradPlace


class OptimizerHook:
    """Clips once for all optimizers of a model, when the first of them steps.

    Args:
        clipper: of the model that they step.
        given: the optimizers that step the model's parameters, or wrappers of them.

    Raises:
        ConfigError: ``clip.apply`` is ``optimizer``, and these can't multiply by the coefficient.
    """

    def __init__(self, clipper: GradClipper, given: Sequence[Any]) -> None:
        self._clipper = clipper
        self._known = [each for outer in given for each in wrapped(outer)]
        # The optimizers that a step of each known object steps.
        self._steppers = {id(each): hookable(each) for each in self._known}
        self.optimizers = list({id(each): each for all_ in self._steppers.values() for each in all_}.values())
        self._hand_over = fused.HandOver(clipper, self.optimizers)
        self._optimizers_multiply = False  # those of this round, in their own steps
        self._round = _Round()
        self._hidden = _HiddenGradients(fused.place_of(clipper))
        _refuse_unhidable(clipper)
        self._prepared: set[int] = set()  # optimizers for which a running GradScaler step has clipped
        self._outermost: FrameType | None = None  # the newest step that is not part of another
        self._pauses = 0
        self._torch = TorchClips(clipper)
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Begin to clip. Nothing outside of this object has changed before, and nothing is refused here."""
        self._undo.append(amp.take_part_in_steps(self))
        self._undo.append(self._torch.listen())
        self._undo.append(note_clipped(self.optimizers))
        for optimizer in self.optimizers:
            self._undo.append(optimizer.register_step_pre_hook(self._before).remove)
            self._undo.append(optimizer.register_step_post_hook(self._after).remove)

    def remove(self) -> None:
        """Put everything back."""
        self._restore()
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let steps pass as if nothing were attached."""
        self._pauses, self._torch.is_paused = self._pauses + 1, True
        try:
            yield
        finally:
            self._pauses -= 1
            self._torch.is_paused = self._pauses > 0

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if callers.is_running(self._outermost):
            return None  # super().step(), or a wrapper's inner optimizer: clipped as the outer step began
        self._restore()
        if self._pauses:
            return None
        _refuse_within_backward()
        self._outermost = sys._getframe(1)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            return args[:1], {**kwargs, "closure": self._clipping_after(closure, optimizer)}
        if id(optimizer) not in self._prepared:
            _refuse_bypassing_scaler(optimizer)
            if self._trains_nothing(optimizer):
                return None
            if self._round.is_begun_by([optimizer]):
                self._clip(self._steppers[id(optimizer)])
            self._round.add(self._steppers[id(optimizer)])
        self._multiply_or_skip(optimizer)
        return None

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if sys._getframe(1) is self._outermost:
            self._restore()

    def _clipping_after(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def clipped_closure() -> Any:
            self._hidden.show()
            loss = closure()
            self._clip(self._steppers[id(optimizer)])
            self._multiply_or_skip(optimizer)
            return loss

        return clipped_closure

    def before_scaled_step(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        """Measure unscaled gradients, and let all ranks skip the step, or none."""
        # A wrapper that `attach` was not given leads to its optimizers as well.
        steppers = [each for each in hookable(optimizer) if id(each) in self._steppers]
        if not steppers or self._pauses or amp.has_stepped(scaler, optimizer):
            return
        self._restore()
        amp.refuse_elsewhere(fused.place_of(self._clipper))
        _refuse_within_backward()
        if self._round.is_begun_by(steppers):
            for each in self.optimizers:
                amp.unscale(scaler, each, [w for w in (*self._known, optimizer) if each in hookable(w)])
            self._clip(steppers, may_hand_over=False)
        self._round.add(steppers)
        self._prepared = set(map(id, steppers))
        assert self._clipper.last is not None
        amp.set_found_inf(scaler, optimizer, ~self._clipper.last.is_finite)

    def after_scaled_step(self) -> None:
        """Forget what was prepared for the scaler's step."""
        self._prepared = set()

    def _clip(self, steppers: Sequence[Optimizer], *, may_hand_over: bool = True) -> None:
        """Measure and decide; and multiply, unless the optimizers can do so in their own steps."""
        self._round.clear()
        if self._clipper.monitor is not None and (rate := _learning_rate(steppers[0])) is not None:
            self._clipper.note(learning_rate=rate)
        self._optimizers_multiply = may_hand_over and self._hand_over.obstacle() is None
        self._torch.refuse()
        try:
            if self._optimizers_multiply:
                self._clipper.decide()
            else:
                self._clipper.clip()
        except DistnormError:
            self._round.miss(steppers)
            raise

    def _multiply_or_skip(self, optimizer: Optimizer) -> None:
        result = self._clipper.last
        assert result is not None
        if self._optimizers_multiply:
            self._hand_over.give(optimizer, result)
        elif not self._clipper.may_skip or fused.skip_too(optimizer, result):
            pass
        elif self._hand_over.leave_out(optimizer, result):
            pass  # only a fused optimizer can skip without a read on the host
        elif self._clipper.rules.may_skip:
            refuse_capture(
                f"expected an optimizer that skips a step on its device, found {type(optimizer).__name__} "
                "without fused=True, under policy skip_spikes or clip.nonfinite: skip"
            )
            if result.skipped:
                self._hidden.hide(optimizer)

    def _trains_nothing(self, optimizer: Optimizer) -> bool:
        """Whether this step only makes the optimizer's state: learning rates and gradients are all zero."""
        rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
        # A rate in a device's memory is not read, since that would wait for the device in every step.
        in_host_memory = [rate for rate in rates if not isinstance(rate, Tensor) or rate.is_cpu]
        if any(rate != 0 for rate in in_host_memory):
            return False
        if callers.is_checkpoint_helper():
            return True
        if not rates or len(in_host_memory) < len(rates) or not self._round.is_begun_by([optimizer]):
            return False
        try:
            return bool(self._clipper.measure().total_norm == 0)
        except NonFiniteGradientError:
            return False  # `clip` raises it, and counts the step

    def _restore(self) -> None:
        """Give back gradients and attributes that this step, or one that raised, had changed."""
        self._outermost = None
        self._hidden.show()
        self._hand_over.take_back()


def _learning_rate(optimizer: Optimizer) -> float | None:
    """The rate of the first parameter group, where that is known without a wait for a device."""
    rate = optimizer.param_groups[0].get("lr")
    if isinstance(rate, Tensor):
        rate = float(rate) if rate.is_cpu and rate.numel() == 1 else None
    return None if rate is None else float(rate)


class _Round:
    """The optimizers that have stepped since gradients were clipped; the first to step again clips anew."""

    def __init__(self) -> None:
        self._stepped: set[int] = set()
        self._missed: set[int] = set()  # those that raised since, whose turn is over too

    def miss(self, steppers: Sequence[Optimizer]) -> None:
        self._missed.update(map(id, steppers))

    def is_begun_by(self, steppers: Sequence[Optimizer]) -> bool:
        return not self._stepped or any(id(each) in self._stepped for each in steppers)

    def clear(self) -> None:
        self._stepped = set()

    def add(self, steppers: Sequence[Optimizer]) -> None:
        self._stepped.update(self._missed, map(id, steppers))
        self._missed = set()


class _HiddenGradients:
    """Gradients that are hidden from a step, which passes over parameters without one and their state."""

    def __init__(self, place: GradPlace | None) -> None:
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._place = place

    def hide(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if self._place is not None:
                    if (gradient := self._place.of(parameter)) is not None:
                        self._hidden.append((parameter, gradient))
                        self._place.put(parameter, None)
                elif parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def show(self) -> None:
        while self._hidden:
            parameter, gradient = self._hidden.pop()
            if self._place is not None:
                self._place.put(parameter, gradient)
            elif gradient.dtype == parameter.dtype:
                parameter.grad = gradient
            else:  # FSDP1's `keep_low_precision_grads`, which a plain assignment refuses
                parameter.grad = torch.empty_like(parameter)
                parameter.grad.data = gradient


def _refuse_unhidable(clipper: GradClipper) -> None:
    place = fused.place_of(clipper)
    if place is not None and callable(place.given) and clipper.rules.may_skip:
        raise ConfigError(
            "grad_of: expected an attribute's name under clip.nonfinite: skip or policy skip_spikes, where a "
            "skipped step must find no gradients; found a function. Use GradClipper, and step unless "
            "result.skipped"
        )


def _refuse_within_backward() -> None:
    if torch._C._current_graph_task_id() != -1:
        raise UnsupportedGradientError(
            "expected optimizer steps after the backward pass, found one inside of it (a hook on gradients "
            "steps), where the gradient of the whole model does not exist yet; step after backward(), or "
            "call remove() of the handle to train without clipping"
        )


def _refuse_bypassing_scaler(optimizer: Optimizer) -> None:
    if fused.is_taken(optimizer) or amp.has_decided_alone():
        raise UnsupportedGradientError(
            f"expected GradScaler.step to ask distnorm before {type(optimizer).__name__} steps, found a "
            "grad_scale or found_inf from elsewhere, by which each rank decides alone; look up scaler.step "
            "after distnorm.attach and not before, and give it the optimizer that is attached"
        )
