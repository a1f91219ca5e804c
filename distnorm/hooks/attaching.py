"""`attach`: finds who owns the step, and hooks into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from distnorm.clipper import GradClipper
from distnorm.config import Config
from distnorm.errors import DistnormError
from distnorm.hooks.deepspeed import DeepSpeedHook, is_engine
from distnorm.hooks.optimizers import OptimizerHook, refuse_other_clippers
from distnorm.plan.collectives import Ranks
from distnorm.policies.results import ClipResult
from distnorm.sources import Target, Tied


class Hook(Protocol):
    """What stands between an engine and its step."""

    def remove(self) -> None:
        """Put everything back."""


class Handle:
    """What `attach` returns: the newest result, and the way back.

    Attributes:
        clipper: the `GradClipper` at work; its state belongs into the checkpoint.
    """

    def __init__(self, clipper: GradClipper, hook: Hook) -> None:
        self.clipper = clipper
        self._hook: Hook | None = hook

    @property
    def last(self) -> ClipResult | None:
        """The newest result, or `None` before the first step."""
        return self.clipper.last

    def note(self, *, loss: Tensor | float | None = None, tokens: int | None = None) -> None:
        """Hand in this step's loss and tokens, as `GradClipper.note` does, before the optimizer's step."""
        self.clipper.note(loss=loss, tokens=tokens)

    def remove(self) -> None:
        """Put everything back as it was before `attach`; again does nothing. Not collective."""
        hook, self._hook = self._hook, None
        if hook is not None:
            hook.remove()


def attach(
    target: Target,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    config: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    group: ProcessGroup | None = None,
    pp_mesh: DeviceMesh | None = None,
    tied: Tied = (),
) -> Handle:
    """Clip by itself, in every step of a torch optimizer, of several over one model, or of an engine.

    Collective: every rank of `group` must call it, and must step as often. The gradient is that of the
    whole target, measured and clipped once when the first of its optimizers steps; with a closure, after
    every evaluation of it. Under `torch.amp.GradScaler` the norm is that of unscaled gradients, whether
    ``unscale_`` was called or not, and all ranks find an overflow together. ``clip.nonfinite: skip``
    skips the step, and so does policy skip_spikes: parameters and optimizer state stay bit for bit.

    With fused optimizers of all that is clipped, and one coefficient, ``clip.apply: auto`` lets their own
    step multiply by it, and skip: gradients are as they were until that step, and no pass over them is left.

    A DeepSpeed engine clips by distnorm's norm inside its own step, once; its own clipping is retired,
    and ``engine.get_global_grad_norm()`` tells distnorm's number.

    Args:
        target: what holds the gradients, as for `GradClipper`; or a `DeepSpeedEngine`.
        optimizer: the optimizer, or all of those that step the target; none beside an engine.
        config, group, pp_mesh, tied: as for `GradClipper`.

    Returns:
        A handle whose `last` is the newest `ClipResult`.

    Raises:
        ConfigError, CoverageError, ReplicaError, DisagreementError, UnsupportedGradientError: as
            `GradClipper` raises.
        ConfigError: the optimizer clips inside its own step as well; the key is named.
        DistnormError: no optimizer, or something else, was given, or one that is attached to already.

    Example:
        >>> handle = distnorm.attach(model, optimizer, {"clip": {"max_norm": 1.0}})
        >>> loss.backward()
        >>> optimizer.step()
        >>> handle.last.total_norm
    """
    if is_engine(target):
        _refuse_beside_engine(optimizer, pp_mesh)
        hook = DeepSpeedHook(target, config, group=group, tied=tied)
        return Handle(hook.clipper, hook)
    optimizers = _checked_together(optimizer, Ranks(group))
    clipper = GradClipper(target, config, group=group, pp_mesh=pp_mesh, tied=tied)
    return Handle(clipper, _hooked_together(clipper, optimizers, Ranks(group)))


def _checked_together(given: Optimizer | Iterable[Optimizer] | None, ranks: Ranks) -> list[Optimizer]:
    optimizers = [given] if isinstance(given, Optimizer) else list(given or ())
    error: DistnormError | None = None
    try:
        if not optimizers or not all(isinstance(each, Optimizer) for each in optimizers):
            raise DistnormError(f"optimizer: expected a torch optimizer or several, found {given!r}")
        refuse_other_clippers(optimizers)
    except DistnormError as caught:
        error = caught
    ranks.raise_together(error)
    return optimizers


def _hooked_together(clipper: GradClipper, optimizers: list[Optimizer], ranks: Ranks) -> OptimizerHook:
    error: DistnormError | None = None
    try:
        hook = OptimizerHook(clipper, optimizers)
    except DistnormError as caught:
        error = caught
    ranks.raise_together(error)
    return hook


def _refuse_beside_engine(optimizer: object, pp_mesh: object) -> None:
    if optimizer is not None or pp_mesh is not None:
        raise DistnormError(
            "expected a DeepSpeed engine alone, found an optimizer or a pp_mesh beside it; the engine owns "
            "its optimizer, and its pipeline names its layers"
        )
