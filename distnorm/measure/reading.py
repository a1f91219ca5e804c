"""Reading one plan's gradients: by the fast path where nothing has changed, else with care."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from distnorm import kernels
from distnorm.errors import DistnormError
from distnorm.measure import diagnosis
from distnorm.measure.exchange import Exchange
from distnorm.measure.fast_path import FastPath
from distnorm.measure.gradients import Coefficients, Given, Gradients, completed, read_with_care
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
        coefficients: what has coefficients of its own.
        source: what is measured.
    """

    ranks: Ranks
    exchange: Exchange
    norm: Norm
    shares: Sequence[Share]
    weights: dict[int, int]
    listens: bool
    coefficients: Coefficients
    source: Source
    _batches: tuple[Batch, ...] | None = None
    _fast_path: FastPath | None = None

    def read_fast(self, holders: Sequence[Tensor]) -> Gradients | None:
        """This step's gradients, if they are laid out as those read before; `None` if they need care."""
        return self._fast_path.read(holders) if self._fast_path is not None else None

    def read_with_care(
        self,
        shards: Sequence[GradShard],
        given: Given = None,
        *,
        store: bool,
        meets: bool,
        payload_length: int,
    ) -> Gradients:
        """This step's gradients, each checked in full; see `Meter.read`. Collective where some may be
        partial."""
        readings, problems = read_with_care(shards, given)
        may_be_found = not any(isinstance(reading, PartialGrad) for reading in readings)
        if self.source is Source.GRADIENT:
            diagnosis.warn_of_taken_gradients(shards, readings)
        # First what was agreed on before, since that is what the other ranks of these groups do.
        self._reduce(shards, readings, store)
        if self._batches is None or (meets and not self._all_agreed(readings)):
            kernels.refuse_capture(
                "expected a step in which all ranks had agreed on partial gradients, found that they have to "
                "agree now; make the same call once with the same gradients before the capture"
            )
            decoded = self.exchange(None, Header("agree", self.listens), payload_length).decode()
            if not decoded.stages <= {"agree", "measure"}:
                diagnosis.raise_disagreement(self.ranks, decoded, {})
            if decoded.all_raise or not decoded.values["measure"]:
                self.agree(shards, readings, problems, store=store)
        gradients = completed(shards, readings, problems, store=store)
        # What is only measured may lie in memory as it likes.
        laid_out = gradients if store else Gradients(gradients.tensors, gradients.problems)
        laid_out.lay_out(shards, self.coefficients)
        self._fast_path = None
        # Until ranks have agreed, all of them read with care, or one that does would wait for the others.
        is_settled = self._batches is not None and not self._batches and not laid_out.problems
        if given is None and may_be_found and is_settled and self.norm.kernel is not None:
            presence = gradients.presence(self.weights)
            self._fast_path = FastPath.of(shards, self.shares, laid_out, presence)
        return gradients

    def again(
        self, shards: Sequence[GradShard], gradients: Gradients, given: Mapping[int, Tensor]
    ) -> Gradients:
        """What was measured, where a graph lets it be scaled: in the same memory, or in copies.

        Raises:
            UnsupportedGradientError: the copies can't be scaled.
        """
        found = [given.get(i) for i in range(len(gradients.tensors))]
        if all(_are_one(*pair) for pair in zip(found, gradients.tensors, strict=True)):
            return gradients
        copies = Gradients(found, gradients.problems)
        copies.marks, copies.taken = gradients.marks, gradients.taken
        if not gradients.problems:
            copies.lay_out(shards, self.coefficients)
            copies.raise_problems()
        return copies

    def agree_with_others(
        self, shards: Sequence[GradShard], gradients: Gradients, *, store: bool
    ) -> Gradients:
        """Agree with ranks that have found new partial gradients, which this one had not. Collective.

        Args:
            shards: this rank's.
            gradients: what it has read of them; partial ones that were agreed on before are reduced in it.
            store: as for `read_with_care`.

        Returns:
            The gradients, with its share of those that were reduced only now.
        """
        readings: list[Reading] = list(gradients.tensors)
        self.agree(shards, readings, gradients.problems, store=store)
        found = completed(shards, readings, gradients.problems, store=store)
        if store:
            found.lay_out(shards, self.coefficients)
        self._fast_path = None
        return found

    def _all_agreed(self, readings: Sequence[Reading]) -> bool:
        return all(is_agreed(self._batches or (), i, reading) for i, reading in enumerate(readings))

    def _reduce(self, shards: Sequence[GradShard], readings: list[Reading], store: bool) -> None:
        for batch in self._batches or ():
            batch.reduce(shards, readings, store=store)

    def agree(
        self,
        shards: Sequence[GradShard],
        readings: list[Reading],
        problems: Sequence[DistnormError],
        *,
        store: bool,
    ) -> None:
        """Agree on which gradients are partial, compare replicas of the others, and reduce. Collective."""
        self.ranks.raise_together(problems[0] if problems else None)
        agreed = agree_on_partials(self.ranks, shards, readings, self._batches or ())
        if agreed is None:  # no rank has a gradient, so what was agreed before still holds
            return
        self._batches = agreed
        if self.ranks.state.has_replicas:
            # A dry run's have no values.
            complete = [reading if type(reading) is Tensor else None for reading in readings]
            partial = {i for batch in self._batches for i in batch.layouts}
            compare_replicas(self.ranks, shards, self.shares, complete, apart_from=partial, finite_only=True)
        self._reduce(shards, readings, store)


def _are_one(copy: Tensor | None, tensor: Tensor | None) -> bool:
    """Whether there is no tensor, or its memory is that which was measured."""
    if copy is None or tensor is None:
        return tensor is None
    return copy.data_ptr() == tensor.data_ptr() and copy.stride() == tensor.stride()
