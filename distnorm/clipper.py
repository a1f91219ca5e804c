"""`GradClipper`: from a target to clipped gradients, the whole line from end to end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from distnorm.config import Config, load_config
from distnorm.errors import DistnormError, NonFiniteGradientError
from distnorm.measure.diagnosis import found_not_finite
from distnorm.measure.exchange import Lanes
from distnorm.measure.meter import Meter
from distnorm.measure.norms import norm
from distnorm.measure.readings import Measured, completed, read_gradients
from distnorm.monitor import Monitor
from distnorm.monitor.snapshot import LayerSnapshot
from distnorm.monitor.step_monitor import StepMonitor, monitor_terms
from distnorm.payload.payload import Joined
from distnorm.plan.collectives import Ranks
from distnorm.policies.deciding import Decider, Outcome
from distnorm.policies.groups import Rules
from distnorm.policies.results import ClipResult
from distnorm.sources import Inventory, Target, Tied, checked_tied, modules_of, read_once, shards_of, stage_of
from distnorm.sources.shards import GradShard, of_grad


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
        ConfigError: the configuration, or a tied name, is wrong; or a pattern of `clip.groups` doesn't fit.
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
            self._check()
            order = norm(self.config.norm.type)
            self._rules = Rules(self.config.clip, order, ranks)
            self._target = read_once(target)
            self._stage, self._tied = stage_of(pp_mesh), checked_tied(tied)
        except DistnormError as caught:
            error = caught
        ranks.raise_together(error)
        self._decider, self._steps = Decider(self._rules), 0
        self.last: ClipResult | None = None
        clip = self.config.clip.model_dump()
        terms = {
            "norm.type": order.order,
            **{f"clip.{key}": value for key, value in clip.items()},
            **monitor_terms(self.config.monitor),
            "tied": self._tied,
        }
        self._meter = Meter(ranks, order, terms, self._tied, raises=self.config.clip.nonfinite == "raise")
        self._watch = StepMonitor.of(self.config.monitor, ranks, order)
        self._begin(self._meter.prepare(self._read_target))

    def clip(self) -> ClipResult:
        """Measure this step's gradient and clip it, in place, as the policies decide.

        By the default policy it is scaled so that its norm is the threshold at most. Collective: every rank
        must call it, after the backward pass and before ``optimizer.step()``, whether it has gradients or
        not. Partial DTensor gradients are stored back reduced. Policy value alone measures nothing, and meets
        no other rank once it is known which gradients may be partial.

        Returns:
            The norm before, the coefficient, and what follows from them, as 0-d tensors on the device. Where
            `skipped` is true the optimizer's step must not happen.

        Raises:
            NonFiniteGradientError: the norm is not finite and ``clip.nonfinite`` is ``raise``; gradients
                are as they were.
            UnsupportedGradientError: a gradient that can't be measured, such as a sparse one.
            ReplicaError: replicas hold different gradients.
            DisagreementError: ranks measure different sets of parameters.
            DistnormError: a policy looks at the loss, and no rank gave one.
        """
        with torch.no_grad():
            outcome, measured = self._decide()
            told = self._found(measured)
            self._decider.apply(outcome, measured)
            self._made(outcome.result, *told)
        return outcome.result

    def decide(self) -> ClipResult:
        """Do as `clip` does, but leave the gradients for the caller to multiply by the coefficient.

        Collective, as `clip` is. Partial DTensor gradients are stored back reduced here too. Where there are
        many coefficients, the caller doesn't learn them.

        Raises:
            DistnormError: as `clip`.
        """
        with torch.no_grad():
            outcome, measured = self._decide()
            self._made(outcome.result, *self._found(measured))
            return outcome.result

    def note(self, *, loss: Tensor | float | None = None, tokens: int | None = None) -> None:
        """Say what belongs to the step that is clipped next. Not collective.

        Policies that look at a loss take the mean over the ranks that hand one in, which travels with the
        norm, and only if it is wanted. The monitor's row has that of rank 0.

        Args:
            loss: this rank's own, 0-d, or a number; `None` where it has none.
            tokens: of the whole batch, from which the row's tokens a second follow.

        Raises:
            DistnormError: the loss is no single number.
        """
        self._rules.loss.note(loss)
        if self._watch is not None:
            self._watch.note(loss, tokens)

    @property
    def rules(self) -> Rules:
        """What decides."""
        return self._rules

    @property
    def parameters(self) -> list[Tensor]:
        """The target's tensors, each once."""
        return list(self._inventory.holders)

    def measure(self) -> ClipResult:
        """Measure this step's gradient and change nothing. Collective, and raises, as `clip` does."""
        with torch.no_grad():
            measured = self._measure(store=False)
            return self._decider.measured(measured.total_norm, measured.more)

    @property
    def monitor(self) -> Monitor | None:
        """What is told of every step, and gives alerts; `None` where nothing is set under `monitor`."""
        return None if self._watch is None else self._watch.monitor

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
        """What a checkpoint needs to go on, on any topology: plain numbers, strings and lists.

        Not collective. Waits for the device where a policy has a history, or there is a monitor.
        """
        state = {"version": 2, "steps": self._steps, **self._rules.state_dict()}
        return state if self._watch is None else {**state, "monitor": self._watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Not collective. One of version 1 has no policies: theirs begin anew.

        Raises:
            DistnormError: the state is of another version, of other policies or groups, or no state of a
                clipper; nothing has changed then.
        """
        version, steps = state.get("version"), state.get("steps")
        if version not in (1, 2) or not isinstance(steps, int) or steps < 0:
            raise DistnormError(f"expected a clipper's state of version 1 or 2, found {dict(state)!r}")
        if self._watch is not None:
            self._watch.check_state(state.get("monitor"))
        self._rules.load_state_dict(state if version == 2 else None)
        self._steps = steps
        if self._watch is not None:
            self._watch.load_state_dict(state.get("monitor"), steps)
            self._expect()

    def _check(self) -> None:
        """Refuse a configuration that this clipper can't do; what one rank refuses, all refuse."""

    def _decide(self) -> tuple[Outcome, Measured]:
        measured = self._measured()
        outcome = self._decider.decide(measured.total_norm, self._of_rules(measured.more))
        return outcome, measured

    def _of_rules(self, more: Tensor | None) -> Tensor | None:
        return None if more is None or self._rules.lanes is None else more[: self._rules.lanes.length]

    def _found(self, measured: Measured) -> tuple[Tensor | None, tuple[tuple[str, int], ...]]:
        """The snapshot's reduced part, and which gradients aren't finite, before they are scaled."""
        snapshot = self._look()
        if self._watch is None or snapshot is not None:
            payload = measured.more
            return None if snapshot is None or payload is None else payload[-snapshot.length :], ()
        norm = measured.total_norm
        if not norm.is_cpu or norm.numpy() < torch.inf or not measured.well:
            return None, ()
        gradients = completed(self._shards, read_gradients(self._shards)[0], store=False)[0]
        return None, found_not_finite(self._meter.ranks, self._shards, gradients)

    def _made(
        self,
        result: ClipResult,
        payload: Tensor | None,
        where: tuple[tuple[str, int], ...],
        loss_scale: float = 1.0,
    ) -> None:
        """Count a step, and have it told."""
        self._steps += 1
        self.last = result
        if self._watch is not None:
            self._expect()
            self._watch.record(self._steps, result, payload, where, loss_scale)

    def _measured(self) -> Measured:
        if not self._rules.measures and self._look() is None:
            self._plan_if_changed(store=True)
            return self._meter.settle(self._shards)
        try:
            return self._measure(store=True)
        except NonFiniteGradientError as error:
            if self._watch is not None:
                self._watch.failed(self._steps + 1, error)
            raise
        finally:  # a loss is of one step, even of one that raises
            self._rules.loss.forget()

    def _read_target(self) -> tuple[list[GradShard], list[str]]:
        self._inventory = Inventory(self._target)
        named = self._inventory.named
        shards = shards_of(named, of_grad, target=self._target, stage=self._stage, tied=self._tied)
        return shards, [name for name, _ in named]

    def _begin(self, shards: list[GradShard]) -> None:
        """Take over the shards of a new plan. Collective."""
        self._shards = shards
        self._rules.bind(self._meter, shards)
        self._overlap_backward()
        if self._watch is not None:
            self._watch.prepare(shards, self._meter.shares, self._meter.overlap)
            self._expect()

    def _overlap_backward(self) -> None:
        if not self.config.clip.overlap:
            return
        error: DistnormError | None = None
        try:
            self._meter.take_during_backward(self._shards, modules_of(self._target))
        except DistnormError as caught:
            error = caught
        self._meter.ranks.raise_together(error)

    def _measure(self, *, store: bool) -> Measured:
        self._plan_if_changed(store=store)
        lanes = self._lanes(store=store)
        return self._meter.measure(self._inventory.holders, lambda: self._shards, store=store, more=lanes)

    def _plan_if_changed(self, *, store: bool) -> None:
        if not self._meter.has_plan or not self._inventory.is_current:
            lanes = self._lanes(store=store)
            self._begin(self._meter.prepare_anew(self._read_target, 0 if lanes is None else lanes.length))

    def _expect(self) -> None:
        """Tell what reads gradients during backward whether the next step is looked at."""
        if self._meter.overlap is not None:
            self._meter.overlap.looks_before = self._look() is not None

    def _look(self) -> LayerSnapshot | None:
        """What looks at layers in the step that is clipped next."""
        return None if self._watch is None else self._watch.snapshot(self._steps + 1)

    def _lanes(self, *, store: bool) -> Joined | None:
        """What travels with the total norm: what policies need, and in some steps that are clipped a look."""
        parts: list[Lanes] = [] if self._rules.lanes is None else [self._rules.lanes]
        if store and (look := self._look()) is not None:
            parts.append(look)
        return Joined(parts) if parts else None
