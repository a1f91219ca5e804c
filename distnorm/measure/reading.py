"""Reading one plan's gradients: by the fast path where nothing has changed, else with care."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from distnorm.errors import DistnormError
from distnorm.measure import diagnosis
from distnorm.measure.exchange import Exchange
from distnorm.measure.fast_path import FastPath
from distnorm.measure.gradients import Gradients, completed, read_with_care
from distnorm.measure.header import Header
from distnorm.measure.norms import Norm
from distnorm.measure.partials import Batch, agree_on_partials, is_agreed
from distnorm.measure.replica_check import compare_replicas
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard, PartialGrad, Reading, Source


@dataclass(slots=True)
class GradientReader:
    """Reads the gradients of one plan, step after step.

    Args:
        ranks: who takes part.
        exchange: meets the others, where gradients may be partial.
        norm: which norm.
        shares: what it counts of each.
        weights: of replicas, by position; see `presence_weights`.
        listens: whether this rank reads results on the host.
        one_coefficient: whether all gradients are multiplied by the same coefficient.
        source: what is measured.
    """

    ranks: Ranks
    exchange: Exchange
    norm: Norm
    shares: Sequence[Share]
    weights: dict[int, int]
    listens: bool
    one_coefficient: bool
    source: Source
    _batches: tuple[Batch, ...] | None = None
    _fast_path: FastPath | None = None

    def read_fast(self, holders: Sequence[Tensor]) -> Gradients | None:
        """This step's gradients, if they are laid out as those read before; `None` if they need care."""
        return self._fast_path.read(holders) if self._fast_path is not None else None

    def read_with_care(self, shards: Sequence[GradShard], store: bool, payload_length: int) -> Gradients:
        """This step's gradients, each checked in full; see `Meter.read`. Collective where some may be
        partial."""
        readings, problems = read_with_care(shards)
        any_partial = any(isinstance(reading, PartialGrad) for reading in readings)
        if self.source is Source.GRADIENT:
            diagnosis.warn_of_taken_gradients(shards, readings)
        if self._batches is None or not all(is_agreed(self._batches, i, r) for i, r in enumerate(readings)):
            decoded = self.exchange(None, Header("agree", self.listens), payload_length).decode()
            if not decoded.stages <= {"agree", "measure"}:
                diagnosis.raise_disagreement(self.ranks, decoded, {})
            if decoded.all_raise or not decoded.values["measure"]:
                self.agree(shards, readings, problems)
        for batch in self._batches or ():
            batch.reduce(shards, readings, store=store)
        gradients = completed(shards, readings, problems, store=store)
        # What is only measured may lie in memory as it likes.
        laid_out = gradients if store else Gradients(gradients.tensors, gradients.problems)
        laid_out.lay_out(shards, one_coefficient=self.one_coefficient)
        self._fast_path = None
        # Until ranks have agreed, all of them read with care, or one that does would wait for the others.
        plain = self._batches is not None and not self._batches and not any_partial and not laid_out.problems
        if plain and self.norm.kernel is not None:
            presence = gradients.presence(self.weights)
            self._fast_path = FastPath.of(shards, self.shares, laid_out, presence)
        return gradients

    def agree(
        self,
        shards: Sequence[GradShard],
        readings: Sequence[Reading],
        problems: Sequence[DistnormError],
    ) -> None:
        """Agree on which gradients are partial, and compare replicas of the others. Collective."""
        self.ranks.raise_together(problems[0] if problems else None)
        agreed = agree_on_partials(self.ranks, shards, readings, self._batches or ())
        if agreed is None:  # no rank has a gradient, so what was agreed before still holds
            return
        self._batches = agreed
        if self.ranks.state.has_replicas:
            complete = [reading if isinstance(reading, Tensor) else None for reading in readings]
            partial = {i for batch in self._batches for i in batch.layouts}
            compare_replicas(self.ranks, shards, self.shares, complete, apart_from=partial, finite_only=True)
