"""What ranks that read the reduced vector on the host do about it: raise together, warn, or go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DisagreementError
from distnorm.measure import diagnosis
from distnorm.measure.equal_pieces import EqualPieces
from distnorm.measure.gradients import Gradients
from distnorm.measure.header import DecodedHeader
from distnorm.measure.norms import Norm
from distnorm.measure.reduced import ReducedStatistics, UnreadStatistics
from distnorm.measure.replica_check import ReplicaCheck, compare_replicas
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import Plan, Share
from distnorm.sources.shards import GradShard, Source


@dataclass(frozen=True, slots=True)
class ResultChecks:
    """The checks of one plan's results. Every rank that reads results makes the same ones.

    Args:
        ranks: who takes part.
        norm: which norm.
        raises: whether a norm that is not finite is raised.
        source: what is measured.
        shares: what this rank counts of each shard.
        replica_check: compares replicas; `None` where there are none.
        equal_pieces: declared pieces that may be replicas; `None` where there are none.
    """

    ranks: Ranks
    norm: Norm
    raises: bool
    source: Source
    shares: Sequence[Share] = ()
    replica_check: ReplicaCheck | None = None
    equal_pieces: EqualPieces | None = None

    @classmethod
    def of(
        cls, ranks: Ranks, norm: Norm, raises: bool, source: Source, shards: Sequence[GradShard], plan: Plan
    ) -> ResultChecks:
        """Those of a new plan. Collective: every rank must call it."""
        compares = plan.has_replicas and norm.replicas_share
        replica_check = ReplicaCheck.of(ranks, shards, plan.shares) if compares else None
        # What is counted twice is too much in a sum alone.
        may_count_twice = plan.has_declared and norm.replicas_share and source is Source.GRADIENT
        equal_pieces = EqualPieces.of(ranks, shards) if may_count_twice and not ranks.is_simulated else None
        return cls(ranks, norm, raises, source, plan.shares, replica_check, equal_pieces)

    def replica_summand(self, gradients: Gradients) -> tuple[int, float]:
        """This rank's part of the comparison of replicas: by their bits, or but for the last of these. Waits
        for the gradients."""
        if self.replica_check is None:
            return 0, 0.0
        numbers = gradients.replica_numbers(self.replica_check)
        if self.ranks.state.compares_replicas:
            return 0, self.replica_check.difference(numbers)
        return self.replica_check.bits(numbers), 0.0

    def replica_difference(self, gradients: Gradients, device: torch.device) -> Tensor | float:
        """This rank's part of the comparison of replicas but for the last bits, on a device. Waits for
        nothing."""
        if self.replica_check is None:
            return 0.0
        return gradients.replica_difference(self.replica_check, device)

    def raise_disagreement(
        self,
        reduced: ReducedStatistics,
        decoded: DecodedHeader,
        here: Mapping[str, object] | None,
        shards: Sequence[GradShard],
        gradients: Gradients,
    ) -> NoReturn:
        """Raise the reason: searched by all ranks if all of them read results, else what this rank knows."""
        diagnosis.raise_disagreement(self.ranks, decoded, here, terms_too=True)
        self.ranks.raise_together(gradients.problems[0] if gradients.problems else None)
        if decoded.is_one_sided:
            compare_replicas(self.ranks, shards, self.shares, gradients.tensors)
        if reduced.is_packed:
            diagnosis.raise_left_out(self.ranks, decoded)
        raise DisagreementError("expected every rank to measure the same set, found headers that don't fit")

    def compare_bits(
        self, reduced: ReducedStatistics, shards: Sequence[GradShard], gradients: Gradients
    ) -> ReducedStatistics:
        """What was reduced, where only samples of replicas differ in bits: equal but for the last digits.

        Raises:
            ReplicaError: replicas differ by more.
        """
        if math.isfinite(float(reduced.if_agreed)):
            compare_replicas(self.ranks, shards, self.shares, gradients.tensors)
            self.ranks.state.compares_replicas = True
        return replace(reduced, total_norm=reduced.if_agreed, agreed=True)

    def check_values(
        self, reduced: ReducedStatistics, shards: Callable[[], Sequence[GradShard]], gradients: Gradients
    ) -> None:
        """Raise or warn of what the values say: not finite, unequal replicas, no gradient at all.

        Args:
            reduced: what the all-reduce gave.
            shards: gives this rank's shards, which most steps don't need.
            gradients: theirs.
        """
        total_norm, difference = reduced.total_norm, reduced.replica_difference
        # In the host's memory to read a value takes no operator.
        norm = float(total_norm.numpy() if kernels.on_host(total_norm) else total_norm)
        if not math.isfinite(norm):
            if self.raises:
                diagnosis.raise_not_finite(self.ranks, self.norm.order, norm, shards(), gradients.tensors)
            return
        if difference is not None and self._are_suspect(reduced, float(difference)):
            compare_replicas(self.ranks, shards(), self.shares, gradients.tensors)
            if self.replica_check is not None:
                self.replica_check.learn(float(difference))
        if norm != 0:
            self._compare_pieces(reduced, gradients)
        elif self.source is Source.GRADIENT:
            diagnosis.warn_of_no_gradients(self.ranks, shards(), gradients.is_empty())

    def compare_unread_pieces(
        self, reduced: ReducedStatistics | UnreadStatistics, gradients: Gradients
    ) -> None:
        """Warn of declared pieces that may be replicas, where no rank reads results. Waits for the device in
        the first steps of a plan in which there are such pieces."""
        pieces = self.equal_pieces
        if (
            pieces is None
            or not pieces.steps
            or kernels.is_captured()
            or type(reduced.total_norm) is not Tensor
        ):
            return
        if bool(reduced.agreed) and 0 < float(reduced.total_norm) < math.inf:
            self._compare_pieces(reduced, gradients)

    def _compare_pieces(self, reduced: ReducedStatistics | UnreadStatistics, gradients: Gradients) -> None:
        pieces = self.equal_pieces
        if pieces is not None and pieces.steps and self._all_measured(reduced):
            pieces.compare(gradients.tensors)

    def _all_measured(self, reduced: ReducedStatistics | UnreadStatistics) -> bool:
        """Whether no rank was given nothing, and so has no plan to go by; where the ranks agree."""
        if isinstance(reduced, UnreadStatistics) or reduced.is_packed:
            return True
        return reduced.decode().values["measure"] == self.ranks.size

    def _are_suspect(self, reduced: ReducedStatistics, difference: float) -> bool:
        """Whether replicas are to be compared whole; alike on all ranks."""
        suspect = self.replica_check is not None and self.replica_check.is_suspect(difference)
        if difference == 0 or self._all_measured(reduced):
            return suspect
        return self.ranks.any(suspect)[0]  # a rank that was given nothing has no plan to go by

    def without_suspects(
        self, reduced: ReducedStatistics | UnreadStatistics
    ) -> ReducedStatistics | UnreadStatistics:
        """Where no rank reads results: make the total norm NaN if replicas differ by much."""
        if isinstance(reduced, UnreadStatistics):
            if reduced.has_replicas and self.replica_check is not None:
                reduced.tolerance = self.replica_check.unread_tolerance
            return reduced
        difference = reduced.replica_difference
        if self.replica_check is None or not isinstance(difference, Tensor):
            return reduced
        # What is not finite has no difference; the norm says it itself.
        suspect = self.replica_check.exceeds_rounding(difference) & reduced.if_agreed.isfinite()
        agreed = torch.as_tensor(reduced.agreed, device=difference.device) & ~suspect
        return replace(reduced, total_norm=reduced.total_norm.masked_fill(~agreed, math.nan), agreed=agreed)
