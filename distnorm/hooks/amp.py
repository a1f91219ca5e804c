"""`torch.amp.GradScaler`: the one file that knows its insides.

A scaler decides about a step before the optimizer's hooks run, and each rank by its own gradients. So its
`step` is watched, for as long as anything is attached, to unscale, measure and agree beforehand.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

Watcher = Callable[[Optimizer, GradScaler], None]

_watchers: list[weakref.WeakMethod[Watcher]] = []  # weak: an optimizer that is gone is not kept by its hook
_original_step = GradScaler.step


def watch_steps(watcher: Watcher) -> Callable[[], None]:
    """Call `watcher`, a bound method, before any enabled scaler's `step`; returns what ends that."""
    reference = weakref.WeakMethod(watcher)

    def watched_step(self: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if self.is_enabled():
            for alive in [each() for each in _watchers]:
                if alive is not None:
                    alive(optimizer, self)
        return _original_step(self, optimizer, *args, **kwargs)

    def stop() -> None:
        _watchers[:] = [each for each in _watchers if each is not reference and each() is not None]
        if not _watchers:
            GradScaler.step = _original_step  # type: ignore[method-assign]

    if not _watchers:
        GradScaler.step = watched_step  # type: ignore[method-assign]
    _watchers.append(reference)
    return stop


def unscale(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Divide the optimizer's gradients by the loss scale, unless the user has done so."""
    if scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
        scaler.unscale_(optimizer)


def set_found_inf(scaler: GradScaler, optimizer: Optimizer, found: Tensor) -> None:
    """Tell the scaler what all ranks found together, by a 0-d bool tensor."""
    state = scaler._per_optimizer_states[id(optimizer)]
    state["found_inf_per_device"] = {found.device: found.to(torch.float32)}
