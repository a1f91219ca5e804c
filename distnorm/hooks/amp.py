"""`torch.amp.GradScaler`: the one file that knows its insides.

A scaler decides about a step before the optimizer's hooks run, and each rank by its own gradients. So while
something is attached, `GradScaler.step` is wrapped: all ranks unscale, measure and agree beforehand.

The wrapper is set on the class, because torch keeps no list of its scalers, and one that was made before
`attach` could not be found. It calls whatever stood there when it was set, so that others' wrappers stay at
work. It is taken away only while it is the outermost; otherwise it stays, and passes calls through.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from distnorm.errors import UnsupportedGradientError
from distnorm.hooks import callers
from distnorm.sources import GradPlace


class Participant(Protocol):
    """What takes part in the steps of enabled scalers."""

    def before_scaled_step(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        """Called before a scaler decides whether to step."""

    def after_scaled_step(self) -> None:
        """Called when the scaler's step is over, or has raised."""


_participants: list[weakref.ref[Participant]] = []  # weak: an optimizer that is gone is not kept by its hook
_running: list[tuple[GradScaler, Optimizer]] = []
_DECIDES = GradScaler._maybe_opt_step.__code__


def take_part_in_steps(participant: Participant) -> Callable[[], None]:
    """Let `participant` take part in the steps of every enabled scaler; the function returned ends that."""
    reference = weakref.ref(participant)
    if not getattr(GradScaler.step, "is_distnorms", False):
        GradScaler.step = _wrapped_step(GradScaler.step)  # type: ignore[method-assign]
    _participants.append(reference)

    def stop() -> None:
        _participants[:] = [each for each in _participants if each is not reference and each() is not None]
        beneath = getattr(GradScaler.step, "beneath", None)
        if not _participants and beneath is not None and getattr(GradScaler.step, "is_distnorms", False):
            GradScaler.step = beneath  # type: ignore[method-assign]

    return stop


def _wrapped_step(beneath: Callable[..., Any]) -> Any:
    def step_by_all_ranks(self: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        is_inner = any(self is scaler and optimizer is its for scaler, its in _running)
        participants = [alive for each in _participants if (alive := each()) is not None]
        if is_inner or not participants or not self.is_enabled():
            return beneath(self, optimizer, *args, **kwargs)
        _running.append((self, optimizer))
        try:
            for participant in participants:
                participant.before_scaled_step(self, optimizer)
            return beneath(self, optimizer, *args, **kwargs)
        finally:
            _running.remove((self, optimizer))
            for participant in participants:
                participant.after_scaled_step()

    step_by_all_ranks.is_distnorms = True  # type: ignore[attr-defined]
    step_by_all_ranks.beneath = beneath  # type: ignore[attr-defined]
    return step_by_all_ranks


def has_decided_alone() -> bool:
    """Whether a scaler makes the coming step by this rank's gradients alone, without distnorm's wrapper."""
    return callers.is_called_by(_DECIDES)


def has_stepped(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether this scaler stepped this optimizer since its last update: then its own `step` refuses."""
    return scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.STEPPED


def unscale(scaler: GradScaler, optimizer: Optimizer, wrappers: Iterable[object]) -> None:
    """Divide the optimizer's gradients by the loss scale, unless the user did, by it or a wrapper."""
    states = scaler._per_optimizer_states
    known = [states[key] for key in map(id, (optimizer, *wrappers)) if key in states]
    if all(state["stage"] is OptState.READY for state in known):
        scaler.unscale_(optimizer)


def refuse_elsewhere(place: GradPlace | None) -> None:
    """Refuse gradients that no scaler unscales, so that the loss scale would stay in their norm.

    Raises:
        UnsupportedGradientError: they are elsewhere than in `grad`.
    """
    if place is not None:
        raise UnsupportedGradientError(
            "expected gradients in .grad under an enabled GradScaler, which unscales no others, found them "
            f"in {place}; divide them by the loss scale yourself, and step without a scaler"
        )


def set_found_inf(scaler: GradScaler, optimizer: Optimizer, found: Tensor) -> None:
    """Give the scaler, before it steps `optimizer`, all ranks' common finding: a 0-d bool tensor."""
    state = scaler._per_optimizer_states[id(optimizer)]
    state["stage"] = OptState.UNSCALED  # maybe by a wrapper, or by what it wraps
    state["found_inf_per_device"] = {found.device: found.to(torch.float32)}
