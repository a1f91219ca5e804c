"""`attach`: finds who owns the step, and hooks into it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from distnorm.clipper import GradClipper
from distnorm.config import Config
from distnorm.errors import DistnormError
from distnorm.hooks.deepspeed import DeepSpeedHook, EngineClipper, is_engine
from distnorm.hooks.optimizers import OptimizerHook
from distnorm.hooks.second_clipper import refuse_other_clippers
from distnorm.hooks.wrapping import checked, parameters_of
from distnorm.plan.collectives import Ranks
from distnorm.policies.results import ClipResult
from distnorm.sources import GradOf, Sharded, Target, Tied, named_tensors, read_once

_LOG = logging.getLogger("distnorm")


class Hook(Protocol):
    """Clips before the steps of an engine or of optimizers."""

    @property
    def optimizers(self) -> Sequence[object]:
        """What steps."""

    def remove(self) -> None:
        """Put everything back."""

    def paused(self) -> AbstractContextManager[None]:
        """Let steps pass as if nothing were attached."""


class Handle:
    """What `attach` returns: the newest result, and the way back.

    Attributes:
        clipper: the `GradClipper`, or an engine's clipper; its state belongs in the checkpoint.
    """

    def __init__(self, clipper: GradClipper | EngineClipper, hook: Hook) -> None:
        self.clipper = clipper
        self._hook: Hook | None = hook

    @property
    def last(self) -> ClipResult | None:
        """The newest result, or `None` before the first step."""
        return self.clipper.last

    def note(self, *, loss: Tensor | float | None = None, tokens: int | None = None, **facts: float) -> None:
        """Hand in this step's loss and tokens, as `GradClipper.note` does, before the optimizer's step."""
        self.clipper.note(loss=loss, tokens=tokens, **facts)

    def paused(self) -> AbstractContextManager[None]:
        """A context in which the optimizer's steps are neither measured, nor clipped, nor counted.

        Not collective, but every rank must use it for the same steps.

        Raises:
            DistnormError: the handle is of a DeepSpeed engine, whose own step needs distnorm's norm.

        Example:
            >>> with handle.paused():
            ...     optimizer.step()  # makes the optimizer's state, and trains nothing
        """
        return nullcontext() if self._hook is None else self._hook.paused()

    def __repr__(self) -> str:
        names = [type(each).__name__ for each in self._hook.optimizers] if self._hook is not None else []
        return f"Handle({', '.join(names) or 'removed'}; {self.clipper!r})"

    def __reduce__(self) -> NoReturn:
        """Refused: a copy would be attached to nothing."""
        raise DistnormError(
            "expected a handle to stay with its optimizer, found a copy or pickle of it; keep "
            "handle.clipper.state_dict(), and attach again"
        )

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
    sharded: Sharded = None,
    grad_of: GradOf = None,
) -> Handle:
    """Clip in every step of a torch optimizer, of several over one model, or of a DeepSpeed engine.

    Collective: every rank of `group` must call it, and must step as often. The whole target's gradient is
    measured and clipped once, when the first of its optimizers steps; with a closure, after every
    evaluation. Under `torch.amp.GradScaler` the norm is that of unscaled gradients, whether ``unscale_``
    was called or not, and all ranks find an overflow together. ``clip.nonfinite: skip`` and policy
    skip_spikes skip the step: parameters and optimizer state stay bit for bit. Steps with learning rates
    0 and gradients of zeros, by torch's checkpoint helpers, do not count. Fused optimizers of all that is
    clipped multiply by one coefficient, and skip, in their own step (``clip.apply: auto``): gradients are
    as they were until then. A DeepSpeed engine clips by distnorm's norm inside its own step, once; its
    own clipping is off, and ``engine.get_global_grad_norm()`` returns distnorm's norm.

    Args:
        target: what holds the gradients, as for `GradClipper`; or a `DeepSpeedEngine`.
        optimizer: all that step the target, or wrappers such as accelerate's; none beside an engine.
        config, group, pp_mesh, tied, sharded, grad_of: as for `GradClipper`.

    Returns:
        A handle whose `last` is the newest `ClipResult`.

    Raises:
        ConfigError: the optimizer clips inside its own step as well; the key is named.
        DistnormError: as `GradClipper`; or no optimizer was given, one of other parameters, or one that is
            attached to already.

    Example:
        >>> handle = distnorm.attach(model, optimizer, {"clip": {"max_norm": 1.0}})
        >>> loss.backward()
        >>> optimizer.step()
    """
    more: dict[str, Any] = {"pp_mesh": pp_mesh, "sharded": sharded, "grad_of": grad_of}
    if is_engine(target):
        _refuse_beside_engine(optimizer, *more.values())
        hook = DeepSpeedHook(target, config, group=group, tied=tied)
        return Handle(hook.clipper, hook)
    with (ranks := Ranks(group)).together():
        target, given = _checked(target, optimizer)
    clipper = GradClipper(target, config, group=group, tied=tied, **more)
    return Handle(clipper, _installed(ranks, clipper, given))


def _installed(ranks: Ranks, clipper: GradClipper, given: Sequence[Any]) -> OptimizerHook:
    try:
        with ranks.together():
            hook = OptimizerHook(clipper, given)
    except DistnormError:
        clipper.close()
        raise
    hook.install()
    return hook


def _checked(target: Target, optimizer: object) -> tuple[Target, list[Any]]:
    given = checked(optimizer)
    refuse_other_clippers(given)
    target = read_once(target)
    parameters = [tensor for _, tensor in named_tensors(target)]
    for each in given:
        _refuse_strangers(each, parameters)
    return target, given


def _refuse_strangers(optimizer: object, parameters: Sequence[Tensor]) -> None:
    """Refuse an optimizer of another model, and warn of one that steps more than what is clipped."""
    name, known = type(optimizer).__name__, set(map(id, parameters))
    stepped = {id(p): p for p in parameters_of(optimizer)}
    frozen = sum(not p.requires_grad for p in parameters)
    if known and not known & stepped.keys():
        raise DistnormError(
            f"expected {name} to step parameters of the target, found none of its {len(stepped)} among the "
            f"target's {len(known)} ({frozen} frozen); make the optimizer of this model's parameters, and "
            "after what replaces them, such as fully_shard"
        )
    others = sum(p.requires_grad for key, p in stepped.items() if key not in known)
    if others:
        _LOG.warning(
            "%s steps %d trainable parameters that are not in the target, and not clipped", name, others
        )
    if known and frozen == len(known):
        _LOG.warning(
            "all %d parameters of the target are frozen (requires_grad is False) on this rank: nothing is "
            "clipped here until some of them require gradients",
            frozen,
        )


def _refuse_beside_engine(*given: object) -> None:
    if any(each is not None for each in given):
        raise DistnormError(
            "expected a DeepSpeed engine alone, found an optimizer, pp_mesh, sharded or grad_of beside it; "
            "the engine owns its optimizer and the gradients' pieces, and its pipeline names its layers"
        )
