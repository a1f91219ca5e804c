"""`GradClipper`: from a target to clipped gradients, the whole line from end to end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from distnorm import kernels, policies
from distnorm.collectives import Ranks
from distnorm.config import Config, load_config
from distnorm.errors import DistnormError, NonFiniteGradientError
from distnorm.measurement import Meter
from distnorm.monitor import Monitor
from distnorm.norms import norm
from distnorm.policies import Decision
from distnorm.readings import Measured
from distnorm.shards import GradShard, of_grad
from distnorm.sources import Inventory, Target, Tied, checked_tied, modules_of, read_once, shards_of, stage_of
from distnorm.watching import Watch, alike


@dataclass(frozen=True, slots=True)
class ClipResult:
    """What one `GradClipper.clip` or `GradClipper.measure` found and did.

    All fields are 0-d tensors on the gradients' device, the same bits on every rank; nothing has been
    read on the host.

    Args:
        total_norm: fp64; the norm of the whole model's gradient before clipping.
        clip_coef: fp64; what every gradient was multiplied by (by `measure`: 1).
        clipped_norm: fp64; the norm after clipping.
        threshold: fp64; the max norm in force, inf where none is.
        is_finite: bool; whether the total norm is finite.
        was_clipped: bool; whether the coefficient is below 1.
    """

    total_norm: Tensor
    clip_coef: Tensor
    clipped_norm: Tensor
    threshold: Tensor
    is_finite: Tensor
    was_clipped: Tensor

    def to_dict(self) -> dict[str, float | bool]:
        """The fields as Python floats and bools. Waits for the device."""
        return {field.name: getattr(self, field.name).item() for field in fields(self)}


class GradClipper:
    """Measures and clips the gradient of one model, held in pieces by many ranks.

    Collective: every rank of `group` must make one, at the same point, with the same `config` and `tied`.

    Args:
        target: a module, a list of modules (pipeline parts), one parameter, or an iterable of parameters
            or of (name, parameter) pairs. Names must be those of the whole model; without names the
            position is the name.
        config: a path to a YAML file, a mapping, a `Config`, or `None` for the defaults (measure only).
        group: the ranks that hold the model; default: the whole world, or this process alone.
        pp_mesh: a 1-d mesh of pipeline stages, where stages use the same names for other parameters:
            every name that is not tied is then prefixed by the stage's coordinate.
        tied: groups of names that are one parameter, such as ``[("tok.weight", "head.weight")]``.

    Attributes:
        config: the `Config` in force.
        last: what the newest `clip` returned, or `None`.

    Raises:
        ConfigError: the configuration, or a tied name, is wrong.
        DisagreementError: configuration or tied names differ between ranks.
        CoverageError: pieces of a parameter are missing or overlap.
        ReplicaError: shards that claim to be replicas hold other parameter values.
        UnsupportedGradientError: a parameter's local tensor isn't what its placements say.

    Example:
        >>> clipper = distnorm.GradClipper(model, {"clip": {"max_norm": 1.0}})
        >>> loss.backward()
        >>> result = clipper.clip()
        >>> optimizer.step()
    """

    def __init__(
        self,
        target: Target,
        config: str | Path | Mapping[str, Any] | Config | None = None,
        *,
        group: ProcessGroup | None = None,
        pp_mesh: DeviceMesh | None = None,
        tied: Tied = (),
    ) -> None:
        ranks = Ranks(group)
        error: DistnormError | None = None
        try:
            self.config = load_config(config)
            order = norm(self.config.norm.type)
            self._target = read_once(target)
            self._stage, self._tied = stage_of(pp_mesh), checked_tied(tied)
        except DistnormError as caught:
            error = caught
        ranks.raise_together(error)
        self._max_norm = policies.check_max_norm(self.config.clip.max_norm)
        self._steps = 0
        self.last: ClipResult | None = None
        clip = self.config.clip.model_dump()
        terms = {
            "norm.type": order.order,
            **{f"clip.{key}": value for key, value in clip.items()},
            **alike(self.config.monitor),
            "tied": self._tied,
        }
        self._meter = Meter(ranks, order, terms, self._tied, raises=self.config.clip.nonfinite == "raise")
        self._watch = Watch.of(self.config.monitor, ranks, order)
        self._prepared(self._meter.prepare(self._read_target))

    def clip(self) -> ClipResult:
        """Measure this step's gradient and scale it, in place, so that its norm is the threshold at most.

        Collective: every rank must call it, after the backward pass and before ``optimizer.step()``,
        whether it has gradients or not. Partial DTensor gradients are stored back reduced.

        Returns:
            The norm before, the coefficient, and what follows from them, as 0-d tensors on the device.

        Raises:
            NonFiniteGradientError: the norm is not finite and ``clip.nonfinite`` is ``raise``; gradients
                are as they were.
            UnsupportedGradientError: a gradient that can't be measured, such as a sparse one.
            ReplicaError: replicas hold different gradients.
            DisagreementError: ranks measure different sets of parameters.
        """
        with torch.no_grad():
            decision, measured = self._decide()
            apply(decision, measured)
        assert self.last is not None
        return self.last

    def decide(self) -> ClipResult:
        """Do as `clip` does, but leave the gradients for the caller to multiply by the coefficient.

        Collective, as `clip` is. Partial DTensor gradients are stored back reduced here too.

        Raises:
            DistnormError: as `clip`.
        """
        with torch.no_grad():
            self._decide()
        assert self.last is not None
        return self.last

    @property
    def parameters(self) -> list[Tensor]:
        """The target's tensors, each once."""
        return list(self._inventory.holders)

    def measure(self) -> ClipResult:
        """Measure this step's gradient and change nothing. Collective, as `clip` is.

        Raises:
            DistnormError: as `clip`.
        """
        with torch.no_grad():
            total_norm = self._measure(store=False).total_norm
            unclipped = policies.constant(total_norm, math.inf)
            decision = replace(unclipped, threshold=torch.full_like(total_norm, self._max_norm))
        return clip_result(total_norm, decision)

    @property
    def monitor(self) -> Monitor | None:
        """What is told of every step, and gives alerts; `None` where nothing is set under `monitor`."""
        return None if self._watch is None else self._watch.monitor

    def note(self, *, loss: float | Tensor | None = None, tokens: int | None = None) -> None:
        """Say what else belongs to the step that is clipped next. Not collective.

        Args:
            loss: the whole batch's; a 0-d tensor isn't waited for.
            tokens: of the whole batch, from which tokens a second follow.
        """
        if self._watch is not None:
            self._watch.note(loss, tokens)

    def flush(self, **facts: Any) -> dict[str, Any] | None:
        """Write the rows of all steps up to now. Not collective.

        A step's row is written when the next step is clipped, or here, which waits for the device.

        Args:
            facts: what else stands in the newest step's row, where it hasn't been written yet.

        Returns:
            That row, as in metrics.jsonl; `None` before the first step, or without a monitor.
        """
        return None if self._watch is None else self._watch.flush(facts)

    def close(self) -> None:
        """Write what isn't written yet, and close the monitor's files. Not collective."""
        if self._watch is not None:
            self._watch.close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on: plain numbers, alike on all ranks. Not collective."""
        state = {"version": 1, "steps": self._steps}
        return state if self._watch is None else {**state, "monitor": self._watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Not collective.

        Raises:
            DistnormError: the state is of another version, or no state of a clipper.
        """
        version, steps = state.get("version"), state.get("steps")
        if version != 1 or not isinstance(steps, int) or steps < 0:
            raise DistnormError(f"expected a clipper's state of version 1, found {dict(state)!r}")
        self._steps = steps
        if self._watch is not None:
            self._watch.load_state_dict(state.get("monitor"), steps)

    def _decide(self) -> tuple[Decision, Measured]:
        measured = self._measure(store=True)
        decision = policies.constant(measured.total_norm, self._max_norm, self.config.clip.nonfinite)
        self._steps += 1
        self.last = clip_result(measured.total_norm, decision)
        if self._watch is not None:
            self._watch.made(self._steps, self.last, measured, self._shards)
        return decision, measured

    def _read_target(self) -> tuple[list[GradShard], list[str]]:
        self._inventory = Inventory(self._target)
        named = self._inventory.named
        shards = shards_of(named, of_grad, target=self._target, stage=self._stage, tied=self._tied)
        return shards, [name for name, _ in named]

    def _overlap_backward(self) -> None:
        if not self.config.clip.overlap:
            return
        error: DistnormError | None = None
        try:
            self._meter.take_during_backward(self._shards, modules_of(self._target))
        except DistnormError as caught:
            error = caught
        self._meter.ranks.raise_together(error)

    def _prepared(self, shards: list[GradShard]) -> None:
        self._shards = shards
        self._overlap_backward()
        if self._watch is not None:
            self._watch.prepare(shards, self._meter.shares)

    def _measure(self, *, store: bool) -> Measured:
        watch, step = self._watch if store else None, self._steps + 1
        if not self._meter.has_plan or not self._inventory.is_current:
            more = watch.look(step) if watch is not None else None
            self._prepared(self._meter.prepare_anew(self._read_target, 0 if more is None else more.length))
        more = watch.look(step) if watch is not None else None
        try:
            return self._meter.measure(self._inventory.holders, lambda: self._shards, store=store, more=more)
        except NonFiniteGradientError as error:
            if watch is not None:
                watch.failed(step, error)
            raise


def apply(decision: Decision, measured: Measured) -> None:
    """Scale the local gradients in place, without a host read."""
    if decision.may_clip:
        measured.scale_(decision.coef)
    if decision.zero:
        kernels.zero_unless_(measured.gradients(), measured.total_norm.isfinite())


def clip_result(total_norm: Tensor, decision: Decision) -> ClipResult:
    """What a decision makes of a norm."""
    is_finite = total_norm.isfinite()
    clipped_norm = total_norm * decision.coef
    if decision.zero:
        clipped_norm = clipped_norm.where(is_finite, 0.0)
    return ClipResult(
        total_norm, decision.coef, clipped_norm, decision.threshold, is_finite, was_clipped=decision.coef < 1
    )
