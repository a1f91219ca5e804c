"""One measurement: shards and their plan in, the total norm out, by one all-reduce.

Beside its statistic every rank puts a ballot into the vector (see `distnorm.ballot`). Where the ranks
did not measure the same thing, the total norm is NaN on every rank, never a wrong number; a caller that
reads the result anyway (`raises`) gets a typed error that says who did what.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn

import torch
from torch import Tensor

from distnorm.ballot import LANES, Ballot, presence_weights
from distnorm.collectives import Ranks
from distnorm.errors import (
    DisagreementError,
    DistnormError,
    NonFiniteGradientError,
    ReplicaError,
    UnsupportedGradientError,
)
from distnorm.norms import Norm
from distnorm.partials import Batch, Reading, agree_on_partials
from distnorm.plan import Plan, agree_on_terms, differing, identity_rows, make_plan, raise_named, stable_hash
from distnorm.shards import GradShard, PartialGrad

NO_TERMS: Mapping[str, object] = MappingProxyType({})
_SET = "the set of parameters or tensors"
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """A total norm and the local gradients that it was taken of.

    Args:
        total_norm: 0-d fp64, the same bits on every rank; NaN if a gradient is NaN, or if the ranks did
            not measure the same thing.
        gradients: this rank's local gradients, after partial ones were reduced.
    """

    total_norm: Tensor
    gradients: list[Tensor]


@dataclass(slots=True)
class Meter:
    """Measures the same set of shards step after step.

    Args:
        ranks: who takes part.
        norm: which norm.
        terms: what all ranks must have alike, compared whenever a plan is made.
        raises: whether the result is read back, so that whatever is wrong is raised on every rank.
    """

    ranks: Ranks
    norm: Norm
    terms: Mapping[str, object]
    raises: bool
    _plan: Plan | None = None
    _batches: tuple[Batch, ...] | None = None
    _weights: Mapping[int, int] = field(default_factory=dict)

    def prepare(self, read: Callable[[], list[GradShard]]) -> list[GradShard]:
        """Read a set of shards and make its plan. Collective: every rank must call it.

        Raises:
            DistnormError: what `read` raised on any rank, or what `make_plan` found; on every rank.
        """
        shards, error = _attempt(read)
        self.ranks.raise_together(error)
        self._plan = make_plan(self.ranks, shards, self.terms, replicas_share=self.norm.replicas_share)
        self._batches = None
        self._weights = presence_weights(self._plan.shares) if self.norm.replicas_share else {}
        return shards

    def prepare_anew(self, read: Callable[[], list[GradShard]]) -> list[GradShard]:
        """Make another plan, after the set of shards changed. Collective.

        A rank can't know alone whether the others saw the change too. So it first takes part in the
        all-reduce that ranks with a plan are waiting in.

        Raises:
            DisagreementError: the set changed on this rank and not on every other.
        """
        lanes = self._vote_without_plan()
        if lanes["planned"]:
            self._raise_disagreement({"unplanned"}, lanes["raises"], {_SET: "changed"})
        return self.prepare(read)

    def withdraw(self, error: DistnormError) -> NoReturn:
        """Raise an error that came up on this rank before it could measure, and leave nobody waiting.

        Ranks that were about to plan raise it too; ranks with a plan see that this one has none.
        """
        lanes = self._vote_without_plan()
        if not lanes["planned"]:
            self.ranks.raise_together(error)
        else:
            with suppress(DisagreementError):  # tells the others; here the cause is raised
                self._raise_disagreement({"unplanned"}, lanes["raises"], {_SET: f"withdrawn: {error}"})
        raise error

    def measure(
        self, shards: Sequence[GradShard], *, store: bool = False, terms: Mapping[str, object] = NO_TERMS
    ) -> Measured:
        """Measure this step's gradients. Collective: every rank must call it.

        Args:
            shards: those of the plan, in its order.
            store: whether reduced partial gradients are put back where the partial ones were.
            terms: what else all ranks must have alike in this call, such as its threshold.

        Raises:
            DistnormError: on the rank that has a gradient which can't be measured; on all with `raises`.
        """
        assert self._plan is not None
        readings, problems = _read(shards)
        if self._batches is None:
            self.ranks.raise_together(problems[0] if problems else None)
            self._batches = agree_on_partials(self.ranks, self._plan, shards, readings)
        for batch in self._batches or ():
            batch.reduce(shards, readings, store=store)
        gradients, late = _completed(shards, readings)
        problems += late
        here = {**terms, "plan": self._plan.ident}
        ballot = Ballot(
            raises=self.raises,
            refused=bool(problems),
            presence=sum(weight for i, weight in self._weights.items() if gradients[i] is not None),
            terms=stable_hash(repr(here)) & 0xFFFF,
        )
        vector = self._vote(self._statistic(gradients), ballot)
        total_norm = self._finalise(vector, ballot)
        if self.raises and not math.isfinite(total_norm):
            lanes = vector[self.norm.width :].tolist()
            disputed = ballot.disputed(self.norm.op, self.ranks.size, lanes)
            self._raise_disagreement(disputed, lanes[LANES.index("raises")], here)
            self.ranks.raise_together(problems[0] if problems else None)
            self._raise_unequal_presence("presence" in disputed, shards, gradients)
            self._raise_not_finite(float(total_norm), shards, gradients)
        if problems:
            raise problems[0]
        return Measured(total_norm, [gradient for gradient in gradients if gradient is not None])

    def _statistic(self, gradients: Sequence[Tensor | None]) -> Tensor:
        assert self._plan is not None
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for gradient, share in zip(gradients, self._plan.shares, strict=True):
            if gradient is not None and share.start < share.stop:
                all_of_it = share.stop - share.start == gradient.numel()
                counted = gradient if all_of_it else gradient.reshape(-1)[share.start : share.stop]
                by_device[gradient.device].append(counted)
        devices = list(by_device) or [self.ranks.device()]
        device = self.ranks.device(devices[0])
        statistics = [self.norm.statistic(by_device[d], d).to(device, non_blocking=True) for d in devices]
        return self.norm.reduce(torch.stack(statistics))

    def _vote(self, statistic: Tensor, ballot: Ballot) -> Tensor:
        """All-reduce the statistic and the ballot. A NaN travels in a lane, since a maximum may lose it."""
        nan = statistic.isnan()
        votes = torch.tensor(ballot.votes(self.norm.op), dtype=torch.float64, device=statistic.device)
        vector = torch.cat([torch.where(nan, 0.0, statistic), nan.any().double().view(1), votes])
        return self.ranks.all_reduce_(vector, self.norm.op)

    def _finalise(self, vector: Tensor, ballot: Ballot) -> Tensor:
        statistic, lanes = vector[: self.norm.width], vector[self.norm.width :]
        agreed = ballot.agreed(self.norm.op, self.ranks.size)
        well = (lanes == torch.tensor(agreed, dtype=torch.float64, device=vector.device)).all()
        return torch.where(well, self.norm.finalise(statistic), math.nan)

    def _vote_without_plan(self) -> dict[str, float]:
        self._plan = None
        vector = self._vote(self.norm.zeros(self.ranks.device()), Ballot(planned=False, raises=self.raises))
        return dict(zip(LANES, vector[self.norm.width :].tolist(), strict=True))

    def _all_raise(self, votes: float) -> bool:
        return votes == Ballot(raises=True).agreed(self.norm.op, self.ranks.size)[LANES.index("raises")]

    def _raise_disagreement(self, disputed: set[str], raising: float, here: Mapping[str, object]) -> None:
        """Raise if the ranks measure different things; say who measures what if all of them will listen."""
        if not disputed & {"unplanned", "raises", "terms", "terms_again"}:
            return
        if self._all_raise(raising):
            agree_on_terms(
                self.ranks, {_SET: here.get(_SET, "as planned")} if "unplanned" in disputed else here
            )
        raise DisagreementError(
            "expected every rank to measure the same set on the same terms (threshold, norm type, "
            "error_if_nonfinite), found ranks with another set or other terms"
        )

    def _raise_unequal_presence(
        self, unequal: bool, shards: Sequence[GradShard], gradients: Sequence[Tensor | None]
    ) -> None:
        if not unequal:
            return
        mine = list(self._weights)
        present = [gradients[i] is not None for i in mine]
        values = torch.tensor(present, dtype=torch.int64).view(-1, 1)
        rows = torch.cat([identity_rows(shards)[mine], values], dim=1)
        splits = self.ranks.join(rows[:, 0], rows, differing).view(-1).tolist()
        raise_named(
            self.ranks,
            [
                (shards[i].name, "a gradient" if has_one else "no gradient")
                for i, has_one, bad in zip(mine, present, splits, strict=True)
                if bad
            ],
            ReplicaError,
            "a gradient on all replicas or on none",
            "Replicas' gradients must be reduced before they are measured; zeros count as a gradient.",
        )

    def _raise_not_finite(
        self, total_norm: float, shards: Sequence[GradShard], gradients: Sequence[Tensor | None]
    ) -> NoReturn:
        mine = [
            shard.name
            for shard, gradient in zip(shards, gradients, strict=True)
            if gradient is not None and not gradient.isfinite().all()
        ]
        everywhere = enumerate(self.ranks.gather(mine[:_MOST_NAMED]))
        found = [f"'{name}' on rank {rank}" for rank, names in everywhere for name in names]
        where = ", ".join(found[:_MOST_NAMED]) or "no single gradient; their norm leaves fp64's range"
        raise NonFiniteGradientError(
            f"expected a finite total norm of order {self.norm.order:g}, found {total_norm}: {where}"
        )


def _attempt(read: Callable[[], list[GradShard]]) -> tuple[list[GradShard], DistnormError | None]:
    try:
        return read(), None
    except DistnormError as error:
        return [], error


def _read(shards: Sequence[GradShard]) -> tuple[list[Reading], list[DistnormError]]:
    """This step's gradients, and what is wrong with those that can't be measured."""
    readings: list[Reading] = []
    problems: list[DistnormError] = []
    for shard in shards:
        reading: Reading = None
        try:
            reading = shard.read()
        except UnsupportedGradientError as error:
            problems.append(_refusal(shard, str(error)))
        local = reading.tensor if isinstance(reading, PartialGrad) else reading
        if local is not None and tuple(local.shape) != shard.shape and (local.numel() or shard.numel):
            problems.append(_refusal(shard, f"expected the shape {shard.shape}, found {tuple(local.shape)}"))
            reading = None
        readings.append(reading)
    return readings, problems


def _completed(
    shards: Sequence[GradShard], readings: Sequence[Reading]
) -> tuple[list[Tensor | None], list[DistnormError]]:
    """The readings without those that are partial still, which nobody agreed to reduce."""
    late = [
        _refusal(shard, "its gradient is Partial now; the first gradients that were seen had none such")
        for shard, reading in zip(shards, readings, strict=True)
        if isinstance(reading, PartialGrad)
    ]
    return [None if isinstance(reading, PartialGrad) else reading for reading in readings], late


def _refusal(shard: GradShard, fact: str) -> DistnormError:
    return UnsupportedGradientError(f"parameter '{shard.name}': {fact}")
