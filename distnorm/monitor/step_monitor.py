"""A clipper's monitor: a row of every step, and on monitored steps a snapshot of all layers.

Values are copied to the host asynchronously, so a step is reported when the next one has been recorded, or at
a flush.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.config import MonitorConfig
from distnorm.errors import DistnormError, NonFiniteGradientError
from distnorm.kernels import AsyncHostCopy
from distnorm.measure.fingerprints import FingerprintedReads
from distnorm.measure.norms import Norm
from distnorm.measure.overlap import Overlap
from distnorm.monitor.monitor import Monitor
from distnorm.monitor.pending_steps import KeyPath, PendingStep, PendingSteps, Where, first_of
from distnorm.monitor.snapshot import LayerSnapshot
from distnorm.payload.finite_loss import LossFiniteness
from distnorm.payload.noise import noise_scale_payload
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard

_log = logging.getLogger("distnorm")
_SPECTRAL = ("spectral", "spectral_vectors")
_SAME_ON_ALL_RANKS = ("every", "by", "replicas", "cosines", "updates", "slices", *_SPECTRAL, "stop_after")


def monitor_terms(config: MonitorConfig) -> dict[str, object]:
    """What of a monitor's configuration must be the same on all ranks, by the paths of its keys."""
    # Ranks search together for gradients that are not finite, so none may have a monitor of its own, as by
    # a `dir` that the others don't set.
    state = "monitored" if config != MonitorConfig() else "not monitored"
    return {"monitor": state, **{f"monitor.{key}": getattr(config, key) for key in _SAME_ON_ALL_RANKS}}


class StepMonitor:
    """Monitors the steps of one clipper. Every rank has one and finds the same; rank 0 writes it down.

    Args:
        config: what is monitored.
        ranks: who takes part.
        norm: the configured norm.
    """

    def __init__(self, config: MonitorConfig, ranks: Ranks, norm: Norm) -> None:
        self._config, self._ranks, self._norm = config, ranks, norm
        self._pending = PendingSteps(Monitor(config, writes=ranks.rank == 0))
        self._snapshot: LayerSnapshot | None = None
        self._facts: dict[str, Any] = {}
        self._loss: Tensor | None = None
        self._losses = LossFiniteness()
        self._began: float | None = None
        # At the interpreter's exit too: the last step is reported though nobody flushed.
        self.close = weakref.finalize(self, self._pending.close)

    @classmethod
    def of(cls, config: MonitorConfig, ranks: Ranks, norm: Norm) -> StepMonitor | None:
        """A monitor of steps, where the configuration asks for anything."""
        return None if config == MonitorConfig() else cls(config, ranks, norm)

    def rebind(self, ranks: Ranks) -> None:
        """Take part in another group: from now on its rank 0 writes."""
        self._ranks, self._snapshot = ranks, None
        self.monitor.write_here(ranks.rank == 0)

    @property
    def monitor(self) -> Monitor:
        """Where the steps are reported."""
        return self._pending.monitor

    @kernels.plain_operators()
    def prepare(
        self,
        shards: Sequence[GradShard],
        shares: Sequence[Share],
        overlap: Overlap | FingerprintedReads | None,
    ) -> None:
        """Get ready for a set of shards. Collective.

        Raises:
            ConfigError: on every rank; see `LayerSnapshot`.
        """
        self._snapshot = None
        if self._config.every is not None:
            noise = noise_scale_payload(self._ranks, self._norm, shares, overlap)
            if noise is None and self._ranks.rank == 0:
                _log.info("noise_scale is not available: it needs clip.overlap, norm.type 2, and DDP alone")
            self._snapshot = LayerSnapshot(
                self._config, self._ranks, self._norm, shards, shares, self._losses, noise
            )

    def snapshot(self, step: int) -> LayerSnapshot | None:
        """What is added to a step's all-reduce; `None` in steps that are not monitored."""
        kernels.refuse_capture(
            "expected nothing under monitor, found a monitor, whose rows no replay would write; capture a "
            "clipper without one, or call clip() outside of the graph"
        )
        every = self._config.every
        return None if every is None or step % every else self._snapshot

    def prepare_next(self, step: int) -> None:
        """Get ready for a step, of which the optimizer's step before is still to come."""
        if self._snapshot is not None and self._config.every is not None:
            self._snapshot.prepare_next(step % self._config.every == 0)

    def note(
        self, loss: float | Tensor | None, tokens: int | Tensor | None, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Keep what belongs to the step that is recorded next; a tensor may be changed afterwards."""
        if isinstance(loss, Tensor):
            self._loss = self._losses.loss = loss.detach().clone()
        elif loss is not None:
            self._facts["loss"] = self._losses.loss = float(loss)
        if tokens is not None:
            self._facts["tokens"] = tokens.clone() if isinstance(tokens, Tensor) else tokens
        self._facts.update(facts or {})

    def record(
        self, step: int, result: object, payload: Tensor | None, where: Where = (), loss_scale: float = 1.0
    ) -> None:
        """Take in a step whose gradients have been scaled.

        Args:
            step: its number, from 1.
            result: a dataclass of 0-d tensors, whose names are the row's keys.
            payload: what the step's snapshot was reduced to, [length] fp64; `None` without one.
            where: (parameter, rank) pairs whose gradient is not finite, the same on every rank; empty where
                they are not known.
            loss_scale: what gradients are multiplied by; the result is without it.

        Raises:
            NonFiniteGradientError: it is the last of `stop_after` steps in a row whose norm is not finite; on
                every rank. On an accelerator the step before is the last that is counted.
        """
        loss, facts = self._take_notes()
        numbers = dict(_tensors_of(result))
        total_norm = numbers["total_norm",]
        if type(total_norm) is not Tensor:  # a dry run has no values
            return
        if loss is not None:
            loss = kernels.moved(loss.double().reshape(()), total_norm.device)
            numbers = {("loss",): loss, **numbers}
        values = torch.stack([number.double() for number in numbers.values()])
        copy = AsyncHostCopy(values if payload is None else torch.cat([values, payload]))
        flags = {path: number.dtype == torch.bool for path, number in numbers.items()}
        snapshot = None if payload is None else self.snapshot(step)
        if payload is not None and snapshot is not None:
            snapshot.advance(payload)
        self._pending.add(PendingStep(step, flags, copy, snapshot, facts, where, loss_scale))
        # An accelerator has computed the step before long ago, so all ranks read that one, and stop together:
        # before a callback, which one rank alone has, can report more.
        last, most = step if total_norm.is_cpu else step - 1, self._config.stop_after
        found = 0 if most is None else self._pending.not_finite_until(last)
        self._pending.report_arrived()
        if most is not None and found >= most:
            raise NonFiniteGradientError(
                f"monitor.stop_after: expected fewer than {most} steps in a row whose norm is not finite, "
                f"found {found}, the last of them step {last}"
            )

    def failed(self, step: int, error: NonFiniteGradientError) -> None:
        """Report a step that ended with an error."""
        self._pending.flush({})
        self._take_notes()
        name, ranks = first_of(error.where)
        self.monitor.not_finite(step, error.total_norm, parameter=name, ranks=ranks)

    def flush(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """Report all steps up to now; see `GradClipper.flush`."""
        return self._pending.flush(facts)

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state after all steps up to now. Waits for the device."""
        return self._pending.state_dict()

    def check_state(self, state: Mapping[str, Any] | None) -> None:
        """Refuse what is no state of a monitor, and change nothing.

        Raises:
            DistnormError: it is none.
        """
        try:
            if state is not None:
                PendingSteps(Monitor(self._config, writes=False)).load_state_dict(state)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise DistnormError(f"expected a monitor's state under monitor, found {found}") from error

    def load_state_dict(self, state: Mapping[str, Any] | None, steps: int) -> None:
        """Go on from a state, or without one after so many steps."""
        if self._snapshot is not None:  # weights that were kept are those of another course
            self._snapshot.prepare_next(False)
        self._pending.load_state_dict(
            state if state is not None else {**self.monitor.state_dict(), "step": steps}
        )

    def _take_notes(self) -> tuple[Tensor | None, dict[str, Any]]:
        """The loss and the facts of this step, with its tokens a second; the next step begins without."""
        loss, facts, now, began = self._loss, self._facts, time.perf_counter(), self._began
        self._loss, self._facts, self._began, self._losses.loss = None, {}, now, None
        tokens = facts.pop("tokens", None)
        if tokens is not None and began is not None:
            facts["tokens_per_second"] = tokens / (now - began)
        return loss, facts


def _tensors_of(found: object, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Tensor]]:
    """The tensors of a result and of what it holds, by the path of their names."""
    if isinstance(found, Tensor):
        yield path, found
    elif isinstance(found, Mapping):
        for name, inner in found.items():
            yield from _tensors_of(inner, (*path, name))
    elif is_dataclass(found):
        for each in fields(found):
            yield from _tensors_of(getattr(found, each.name), (*path, each.name))
