"""What a clipper does for its monitor: looks at layers in some steps, and a row of every step."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.config import MonitorConfig
from distnorm.errors import DistnormError, NonFiniteGradientError
from distnorm.measure import diagnosis
from distnorm.measure.norms import Norm
from distnorm.measure.overlap import Overlap
from distnorm.measure.readings import Measured, completed, read_gradients
from distnorm.monitor import Monitor
from distnorm.monitor.journal import Entry, Journal, first_of, numbers_of
from distnorm.monitor.snapshot import Look
from distnorm.payload.noise import noise_scale_payload
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard

_log = logging.getLogger("distnorm")
_ALIKE = ("every", "by", "replicas", "stop_after")


def alike(config: MonitorConfig) -> dict[str, object]:
    """What of a monitor's config all ranks must have alike, by the paths of its keys."""
    # A step that isn't finite is looked into together: no rank may watch alone, as by a `dir` of its own.
    watched = "watched" if config != MonitorConfig() else "not watched"
    return {"monitor": watched, **{f"monitor.{key}": getattr(config, key) for key in _ALIKE}}


class Watch:
    """Watches one clipper. Every rank has one, with the same config, and finds the same; rank 0 tells.

    Args:
        config: what is watched.
        ranks: who takes part.
        norm: the configured norm.
    """

    def __init__(self, config: MonitorConfig, ranks: Ranks, norm: Norm) -> None:
        self._config, self._ranks, self._norm = config, ranks, norm
        self._journal = Journal(Monitor(config, writes=ranks.rank == 0))
        self._look: Look | None = None
        self._facts: dict[str, Any] = {}
        self._loss: Tensor | None = None
        self._began: float | None = None
        # At the interpreter's exit too: the last step is told though nobody flushed.
        self.close = weakref.finalize(self, self._journal.close)

    @classmethod
    def of(cls, config: MonitorConfig, ranks: Ranks, norm: Norm) -> Watch | None:
        """A watch, where the config says anything."""
        return None if config == MonitorConfig() else cls(config, ranks, norm)

    @property
    def monitor(self) -> Monitor:
        """Who is told."""
        return self._journal.monitor

    def prepare(self, shards: Sequence[GradShard], shares: Sequence[Share], overlap: Overlap | None) -> None:
        """Get ready for a set of shards. Collective.

        Raises:
            ConfigError: on every rank; see `Look`.
        """
        self._look = None
        if self._config.every is not None:
            noise = noise_scale_payload(self._ranks, self._norm, shares, overlap)
            if noise is None and self._ranks.rank == 0:
                _log.info("noise_scale is not available: it needs clip.overlap, norm.type 2, and DDP alone")
            self._look = Look(self._config, self._ranks, self._norm, shards, shares, noise)

    def look(self, step: int) -> Look | None:
        """The lanes of a step; `None` in those that look at no layers."""
        every = self._config.every
        return None if every is None or step % every or _is_captured() else self._look

    def note(self, loss: float | Tensor | None, tokens: int | None) -> None:
        """Take in what is told of the coming step."""
        if isinstance(loss, Tensor):
            self._loss = loss.detach()
        elif loss is not None:
            self._facts["loss"] = float(loss)
        if tokens is not None:
            self._facts["tokens"] = tokens

    def made(
        self, step: int, result: object, measured: Measured, shards: Sequence[GradShard], loss_scale: float
    ) -> None:
        """Take in a step, before anything is done to its gradients.

        Args:
            step: its number, from 1.
            result: a dataclass of 0-d tensors, whose names are the row's keys.
            measured: what it is from.
            shards: whose gradients.
            loss_scale: what gradients are multiplied by; the result is without it.

        Raises:
            NonFiniteGradientError: it is the last of `stop_after` steps in a row that aren't finite; on every
                rank. On CUDA it is the step before that is looked at.
        """
        if _is_captured():  # a graph's steps are made without us
            return
        numbers = dict(numbers_of(result))
        if self._loss is not None:
            device = measured.total_norm.device
            numbers = {("loss",): kernels.moved(self._loss.double().reshape(()), device), **numbers}
        look = None if measured.more is None else self.look(step)
        lanes = None if look is None or measured.more is None else measured.more[-look.length :]
        where = self._where(measured, shards, look)
        entry = Entry(step, numbers, lanes, look, self._timed(), where, loss_scale)
        self._journal.add(entry)
        self._loss, self._facts = None, {}
        self._stop(step, measured)

    def failed(self, step: int, error: NonFiniteGradientError) -> None:
        """Tell of a step that a measurement ended by raising."""
        self._journal.flush({})
        self._loss, self._facts = None, {}
        name, ranks = first_of(error.where)
        self.monitor.not_finite(step, error.total_norm, parameter=name, ranks=ranks)

    def flush(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """Tell all steps up to now; see `Journal.flush`."""
        return self._journal.flush(facts)

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state after all steps up to now. Waits for the device."""
        return self._journal.state_dict()

    def check_state(self, state: Mapping[str, Any] | None) -> None:
        """Refuse what is no state of a monitor, and change nothing.

        Raises:
            DistnormError: it is none.
        """
        try:
            if state is not None:
                Journal(Monitor(self._config, writes=False)).load(state)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise DistnormError(f"expected a monitor's state under monitor, found {found}") from error

    def load_state_dict(self, state: Mapping[str, Any] | None, steps: int) -> None:
        """Go on from a state, or without one after so many steps."""
        self._journal.load(state if state is not None else {**self.monitor.state_dict(), "step": steps})

    def _timed(self) -> dict[str, Any]:
        """The facts, with tokens a second since the step before."""
        now, began = time.perf_counter(), self._began
        self._began = now
        tokens = self._facts.pop("tokens", None)
        rate = None if tokens is None or began is None else tokens / (now - began)
        return self._facts if rate is None else {**self._facts, "tokens_per_second": rate}

    def _where(
        self, measured: Measured, shards: Sequence[GradShard], look: Look | None
    ) -> Sequence[tuple[str, int]]:
        """What isn't finite, where the norm can be read for free: on the CPU. All ranks find the same."""
        norm = measured.total_norm
        if look is not None or not norm.is_cpu or norm.numpy() < torch.inf or not measured.well:
            return ()
        gradients = completed(shards, read_gradients(shards)[0], store=False)[0]
        return diagnosis.found_not_finite(self._ranks, shards, gradients)

    def _stop(self, step: int, measured: Measured) -> None:
        most = self._config.stop_after
        if most is None:
            return
        # On a device the step before: all ranks wait for what has been computed long ago, and stop together.
        last = step if measured.total_norm.is_cpu else step - 1
        if (found := self._journal.not_finite_until(last)) >= most:
            raise NonFiniteGradientError(
                f"monitor.stop_after: expected fewer than {most} steps in a row whose norm is not finite, "
                f"found {found}, the last of them step {last}"
            )


def _is_captured() -> bool:
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()
