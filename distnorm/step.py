"""One step from end to end: gradients, total norm, decision, scaling, monitor. `Step.take` is the walk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from distnorm import kernels
from distnorm.config import Config
from distnorm.deferred import DeferredRaise, Replays
from distnorm.errors import DistnormError, NonFiniteGradientError
from distnorm.measure.diagnosis import find_not_finite
from distnorm.measure.early_reads import early_reads
from distnorm.measure.fingerprints import Kept
from distnorm.measure.gradients import Given
from distnorm.measure.meter import Meter, Reader
from distnorm.measure.norms import norm
from distnorm.measure.reduced import without_norm
from distnorm.monitor.snapshot import LayerSnapshot
from distnorm.monitor.step_monitor import StepMonitor, monitor_terms
from distnorm.payload.payload import join_payloads, split_payload
from distnorm.plan.collectives import Ranks
from distnorm.plan.stops import Stopped, Stops, finish
from distnorm.policies.clipping import Clipping
from distnorm.policies.deciding import Outcome
from distnorm.policies.groups import PolicyGroups
from distnorm.policies.results import ClipResult, describe_steps
from distnorm.sources import UNDECLARED, Layout

_STATE_VERSION = 2


class Step:
    """The parts of one clipper and its steps, for `GradClipper` and for DeepSpeed's hook.

    Args:
        config: the configuration in force.
        ranks: who takes part.
        layout: how the whole model lies on the ranks.
        waits: the modes of ``clip.nonfinite`` that read every norm on the host.

    Attributes:
        groups, decider, meter: the policies, what asks them, and what measures.
        monitor: records steps; `None` where nothing is set under `monitor`.
        count, last, outcome, fingerprints: number of steps made; and what the newest gave.
        stopped: a step that is taken in a graph, from its reading to its scaling.
        deferred: raises what the step before found, where no step waits for its norm.
        is_registered_with_join: whether torch's `Join` has the clipper, and so ends with equal histories.

    Raises:
        ConfigError: a policy doesn't go with the norm.
    """

    def __init__(
        self, config: Config, ranks: Ranks, layout: Layout, waits: Collection[str] = ("raise_now",)
    ) -> None:
        self.config, self._layout, self._waits, self._norm = config, layout, waits, norm(config.norm.type)
        self.count, self._replays, self.is_registered_with_join = 0, Replays(self._norm.order), False
        self.last: ClipResult | None = None
        self._noted_step: float | None = None
        self.outcome: Outcome | None = None
        self.fingerprints: Kept = {}
        self.stopped: Stopped[Tensor] | None = None
        self.monitor = StepMonitor.of(config.monitor, ranks, self._norm)
        self._take_part(ranks)

    def _take_part(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.groups = PolicyGroups(self.config.clip, self._norm, ranks)
        self._clipping = Clipping(self.groups, self._norm.order)
        self.decider = self._clipping.decider
        self.meter = self._meter_of(ranks)
        self.deferred = DeferredRaise(self._norm.order, self._replays)
        self._alone: Meter | None = None

    def _meter_of(self, ranks: Ranks) -> Meter:
        clip = self.config.clip
        terms: dict[str, object] = {f"clip.{key}": value for key, value in clip.model_dump().items()}
        terms |= {"norm.type": self._norm.order, **monitor_terms(self.config.monitor), **self._layout.terms}
        raises, waits = clip.nonfinite in ("raise", "raise_now"), clip.nonfinite in self._waits
        return Meter(ranks, self._norm, terms, self._layout, raises, waits, self.groups.coefficients)

    # ---- the walk

    def take(self, holders: Sequence[Tensor], *, scales: bool, loss_scale: float = 1.0) -> Outcome:
        """Take a step, as `walk` does, with its all-reduce. Collective: every rank must call it."""
        self.stopped = None
        with kernels.Untracked():
            return finish(self.walk(holders, scales=scales, loss_scale=loss_scale))

    def walk(
        self, holders: Sequence[Tensor], *, scales: bool, loss_scale: float = 1.0, given: Given = None
    ) -> Stops[Outcome]:
        """A step, which stops at its all-reduce. Collective: every rank must take it.

        Args:
            holders: what holds the gradients of the planned shards, in their order.
            scales: whether the gradients are multiplied here.
            loss_scale: what gradients were multiplied by at backward; results are without it.
            given: the gradients, where a graph hands them over.

        Raises:
            DistnormError: as `GradClipper.clip`; no gradient has changed then.
        """
        self._replays.require_ready()
        number, meter = self.count + 1, self._meter_now()
        meter.step, self._noted_step = self._noted_step, None
        meter.ranks.place.step = number if meter.step is None else meter.step
        snapshot = None if meter is self._alone else self._snapshot(number)
        payload = join_payloads(self.groups.payload, snapshot)
        meets, length = self.groups.measures or snapshot is not None, 0 if payload is None else payload.length
        try:
            gradients = meter.read(holders, given, store=True, meets=meets, payload_length=length)
            if meets:
                gradients, reduced = yield from meter.reduce(gradients, payload)
            else:
                gradients.raise_problems()
                reduced = without_norm(gradients.tensors, gradients.device)
        except DistnormError as error:
            self._failed(number, error, meter)
            raise
        finally:  # a loss belongs to one step, even if that raises
            self.groups.loss.forget()
        meter.ranks.place.passed()
        of_policies, of_snapshot = split_payload(reduced.payload, self.groups.payload, snapshot)
        unnamed = self.monitor is not None and snapshot is None and meets and reduced.is_known_not_finite
        where = find_not_finite(meter.ranks, meter.shards, gradients.tensors) if unnamed else ()
        how = {"scales": scales, "defers": meter.defers and meets}
        marks = self.deferred.marks_of(gradients) if how["defers"] else None
        outcome = self._clipping(gradients, reduced, of_policies, **how, loss_scale=loss_scale)
        del gradients
        self.deferred.remember(number, meter, outcome.found, marks)
        self.made(number, outcome)
        if self.monitor is not None:
            self.monitor.record(number, outcome.result, of_snapshot, where, loss_scale)
        return outcome

    def measure(self, holders: Sequence[Tensor]) -> ClipResult:
        """Measure, and change and count nothing. Collective: every rank must call it."""
        meter, payload = self._meter_now(), self.groups.payload
        with kernels.Untracked():
            gradients = meter.read(holders, store=False, payload_length=payload.length if payload else 0)
            gradients, reduced = finish(meter.reduce(gradients, payload, store=False))
            return self.decider.measured(
                reduced.total_norm, reduced.payload if len(reduced.payload) else None
            )

    def _failed(self, number: int, error: DistnormError, meter: Meter) -> None:
        if isinstance(error, NonFiniteGradientError) and self.monitor is not None:
            self.monitor.failed(number, error)
        if meter.defers and meter.raised_alone:
            self.deferred.refused(error)

    def made(self, number: int, outcome: Outcome) -> None:
        """Count a step; not that of a dry run, and one that is captured when it is replayed."""
        self.last, self.outcome = outcome.result, outcome
        self.count = self.count if self._replays.leaves_out(outcome.result.total_norm) else number
        self._announce_snapshot()
        if self.monitor is not None:
            self.monitor.prepare_next(self.count + 1)

    def refuse_next(self, error: DistnormError) -> None:
        """Let the next step raise this, on all ranks. Not collective."""
        self._meter_now().refusal = error

    @property
    def may_skip(self) -> bool:
        """Whether a step that was not scaled here may say that the optimizer must not step."""
        return self.groups.may_skip or self.meter.defers

    # ---- planning

    @property
    def has_plan(self) -> bool:
        """Whether `plan` succeeded."""
        return self.meter.plan is not None

    def check_group(self) -> None:
        """Refuse to go on after the process group was destroyed, or the world was made.

        Raises:
            DistnormError: either of these.
        """
        if not self.ranks.is_current:
            found = "found that it was destroyed, or that there was none then"
            cure = "call clipper.rebind(group) on every rank that is there now"
            raise DistnormError(f"expected the process group that the clipper was made with, {found}; {cure}")

    def plan(self, read: Reader, modules: Sequence[nn.Module], *, anew: bool = False) -> None:
        """Plan who counts what, and bind policies and monitor to it. Collective: every rank must call it.

        Args:
            read: gives this rank's shards.
            modules: those of the target, for `clip.overlap`.
            anew: whether other ranks may be in the middle of a step.
        """
        meter, ranks = self.meter, self.ranks
        if anew:
            payload = join_payloads(self.groups.payload, self._snapshot(self.count + 1))
            meter.prepare_anew(read, 0 if payload is None else payload.length)
        else:
            meter.prepare(read)
        self._alone, self._replays.is_ready = None, False
        self.groups.bind(ranks, meter.shards, meter.shares)
        meter.overlap = early_reads(self.config, meter, modules, self.fingerprints, lambda: self.count + 1)
        if self.monitor is not None:
            self.monitor.prepare(meter.shards, meter.shares, meter.overlap)
        self._announce_snapshot()

    def rebind(self, ranks: Ranks) -> None:
        """Take part in another group, and keep histories and counts. `plan` must be called next."""
        self.deferred.check_alone()
        state = self.groups.state_dict()
        self._take_part(ranks)
        self.groups.load_state_dict(state)
        if self.monitor is not None:
            self.monitor.rebind(ranks)

    def _meter_now(self) -> Meter:
        """The meter for this step: under torch's `Join`, where ranks may be out of data, one of this rank
        alone."""
        managers = self.meter.managers
        if managers is None or not managers.is_joining:
            return self.meter
        has_history = self.monitor is not None or self.groups.default.looks_back
        if self.groups.payload is not None or (has_history and not self.is_registered_with_join):
            raise DistnormError(
                "expected under Join one constant threshold, or the clipper among what Join is given, as in "
                "Join([model, clipper]), and no clip.groups; found policies whose histories would part ways"
            )
        if self._alone is None:
            shards = self.meter.shards
            alone = self._meter_of(Ranks(alone=True))  # no other rank raises later, so it waits
            self._alone = replace(alone, layout=UNDECLARED, waits=True)
            self._alone.prepare(lambda: (shards, [(shard.name, shard.holder) for shard in shards]))
        return self._alone

    def take_over(self, is_last: bool) -> None:
        """Take over the state of a rank that made all steps under torch's `Join`. Collective."""
        states = [state for state in self.ranks.gather(self.state_dict() if is_last else None) if state]
        if states:
            self.load_state_dict(states[0])
        self._alone = None

    # ---- monitored steps

    def _snapshot(self, number: int) -> LayerSnapshot | None:
        """The layer snapshot of a step that clips; `None` if it is not a monitored one."""
        return None if self.monitor is None else self.monitor.snapshot(number)

    def _announce_snapshot(self) -> None:
        """Let the overlap know whether the next step is a monitored one."""
        if self.meter.overlap is not None:
            self.meter.overlap.reads_before = self._snapshot(self.count + 1) is not None

    def note(self, loss: Tensor | float | None, tokens: int | None, facts: dict[str, float]) -> None:
        """Keep the next step's loss, tokens and facts; facts alone leave a loss that was given."""
        self.stopped = None  # as it ends, it forgets its loss
        self.groups.loss.note(loss, keep=bool(facts))
        self._noted_step = facts.pop("step", self._noted_step)
        if self.monitor is not None:
            self.monitor.note(loss, tokens, facts)

    def close(self) -> None:
        """See `GradClipper.close`."""
        if self.meter.overlap is not None:
            self.meter.overlap.close()
            self.meter.overlap = None
        if self.monitor is not None:
            self.monitor.close()

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """See `GradClipper.state_dict`."""
        self.count += self._replays.new_steps()
        state = {"version": _STATE_VERSION, "steps": self.count, **self.groups.state_dict()}
        return state if self.monitor is None else {**state, "monitor": self.monitor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `GradClipper.load_state_dict`."""
        version, steps = state.get("version"), state.get("steps")
        if version not in (1, _STATE_VERSION) or not isinstance(steps, int) or steps < 0:
            raise DistnormError(f"expected a clipper's state of version 1 or 2, found {dict(state)!r}")
        if self.monitor is not None:
            self.monitor.check_state(state.get("monitor"))
        self.groups.load_state_dict(state if version == _STATE_VERSION else None)
        self.count = steps
        self.deferred.forget()
        if self.monitor is not None:
            self.monitor.load_state_dict(state.get("monitor"), steps)
            self._announce_snapshot()

    def describe(self) -> str:
        """One line for `repr`; nothing is read from a device."""
        size = f"{self.ranks.size} rank{'s' * (self.ranks.size > 1)}"
        return f"{size}, {describe_steps(self.config.clip, self._norm.order, self.count, self.last)}"
