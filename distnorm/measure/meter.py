"""One measurement: shards and their plan in, the total norm out, by one all-reduce.

Beside its statistic every rank puts a ballot into the vector (see `distnorm.exchange`). Where the ranks
did not measure the same thing, the total norm is NaN on every rank, never a wrong number; a caller that
reads the result anyway (`raises`) gets a typed error that says who did what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import NoReturn

import torch
from torch import Tensor, nn

from distnorm.errors import DisagreementError, DistnormError
from distnorm.measure import diagnosis
from distnorm.measure.diagnosis import SET
from distnorm.measure.exchange import Exchange, Lanes, Reply
from distnorm.measure.fast_path import Steady
from distnorm.measure.header import Ballot, Count, Stage, presence_weights
from distnorm.measure.norms import Norm
from distnorm.measure.overlap import Overlap
from distnorm.measure.partials import Batch, agree_on_partials
from distnorm.measure.readings import Measured, Reading, completed, read_gradients, statistic_of
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import Plan, Share, check_tied, make_plan, stable_hash
from distnorm.sources import Tied
from distnorm.sources.shards import GradShard

Reader = Callable[[], tuple[list[GradShard], list[str]]]
"""Gives this rank's shards and the names that its tensors were given under."""

NO_TERMS: Mapping[str, object] = MappingProxyType({})


@dataclass(slots=True)
class Meter:
    """Measures the same set of shards step after step.

    Args:
        ranks: who takes part.
        norm: which norm.
        terms: what all ranks must have alike, compared whenever a plan is made.
        tied: groups of names that are one parameter.
        raises: whether the result is read back, so that whatever is wrong is raised on every rank.
        overlap: what has read some gradients during backward.
        may_follow: whether a rank may be given nothing in one call, and something in another.
    """

    ranks: Ranks
    norm: Norm
    terms: Mapping[str, object]
    tied: Tied
    raises: bool
    overlap: Overlap | None = None
    may_follow: bool = False
    _exchange: Exchange = field(init=False)
    _plan: Plan | None = None
    _batches: tuple[Batch, ...] | None = None
    _weights: Mapping[int, int] = field(default_factory=dict)
    _steady: Steady | None = None  # of the shards that were measured last
    _presence: int = 0
    _hashed: tuple[tuple[object, ...], int] = ((), 0)  # terms, and their hash

    def __post_init__(self) -> None:
        self._exchange = Exchange(self.ranks, self.norm)

    def take_during_backward(self, shards: Sequence[GradShard], modules: Sequence[nn.Module]) -> None:
        """Read gradients as soon as backward has finished them; only where compiled code can. Not collective.

        Raises:
            ConfigError: see `Overlap`.
        """
        assert self._plan is not None
        if self.norm.kernel is not None:
            self.overlap = Overlap(self.norm, shards, self._plan.shares, modules)

    @property
    def has_plan(self) -> bool:
        """Whether `prepare` succeeded."""
        return self._plan is not None

    @property
    def shares(self) -> Sequence[Share]:
        """What this rank counts of each shard of the plan."""
        return self._plan.shares if self._plan is not None else ()

    def prepare(self, read: Reader) -> list[GradShard]:
        """Read a set of shards and make its plan. Collective: every rank must call it.

        Raises:
            DistnormError: what `read` raised on any rank, or what `make_plan` found; on every rank.
        """
        self._plan = self._steady = self.overlap = None
        shards: list[GradShard] = []
        names: list[str] = []
        error: DistnormError | None = None
        try:
            shards, names = read()
        except DistnormError as caught:
            error = caught
        self.ranks.raise_together(error)
        plan = make_plan(self.ranks, shards, self.terms, replicas_share=self.norm.replicas_share)
        check_tied(self.ranks, names, self.tied)
        if self.may_follow or not self._exchange.fits:
            self._exchange.use_full_form()
        self._plan, self._batches = plan, None
        self._weights = presence_weights(plan.shares) if self.norm.replicas_share else {}
        return shards

    def prepare_anew(self, read: Reader, more: int = 0) -> list[GradShard]:
        """Make another plan, after the set of shards changed. Collective.

        A rank can't know alone whether the others saw the change too. So it first takes part in the
        all-reduce that ranks with a plan are waiting in, with as many further lanes as they have there.

        Raises:
            DisagreementError: the set changed on this rank and not on every other.
        """
        count = self._poll("plan", {SET: "changed"}, more)
        self.may_follow |= self._exchange.fits and count.lanes["plan"] < self.ranks.size
        return self.prepare(read)

    def withdraw(self, error: DistnormError) -> NoReturn:
        """Raise an error that came up on this rank before it could measure, and leave nobody waiting.

        Ranks that were about to plan raise it too; ranks with a plan see that this one has none.
        """
        with suppress(DisagreementError):  # tells the others; here the cause is raised
            self._poll("plan", {SET: f"withdrawn: {error}"})
            self.ranks.raise_together(error)
        raise error

    def follow(self) -> Measured:
        """Measure where this rank was given nothing at all. Collective.

        It can't know whether the others plan, so it does what they do. Reads their votes on the host.
        """
        while True:
            reply = self._exchange(None, Ballot("follow", self.raises))
            count = reply.count()
            if count.stages == {"plan"}:
                self.may_follow = True
                self.prepare(lambda: ([], []))
            elif count.stages == {"agree"}:
                self._agree([], [], [])
            elif not count.stages:  # nobody has anything
                return Measured.of(self.norm.finalise(self.norm.zeros(self.ranks.device())), [])
            else:
                break
        self._raise_if_wrong(reply, count, None, [], [], [])
        return Measured.of(reply.total_norm, [])

    def measure(
        self,
        holders: Sequence[Tensor],
        describe: Callable[[], Sequence[GradShard]],
        *,
        store: bool = False,
        terms: Mapping[str, object] = NO_TERMS,
        more: Lanes | None = None,
    ) -> Measured:
        """Measure this step's gradients. Collective: every rank must call it.

        Args:
            holders: those of the plan's shards, in its order.
            describe: gives the shards, where the holders alone don't do.
            store: whether reduced partial gradients are put back where the partial ones were.
            terms: what else all ranks must have alike in this call, such as its threshold.
            more: what else is reduced, by the norm's op, on all ranks alike.

        Raises:
            DistnormError: on the rank that has a gradient which can't be measured; on all with `raises`.
        """
        taken = self.overlap.take() if self.overlap is not None else None
        again = self.measure_again(holders, describe, terms, taken, more)
        return again if again is not None else self._measure_with_care(describe(), store, terms, more)

    def measure_again(
        self,
        holders: Sequence[Tensor],
        describe: Callable[[], Sequence[GradShard]],
        terms: Mapping[str, object] = NO_TERMS,
        taken: Tensor | None = None,
        more: Lanes | None = None,
    ) -> Measured | None:
        """Measure, as `measure` does, gradients that lie as before; else do nothing: `None`."""
        steady = self._steady
        spans = steady.read(holders) if steady is not None else None
        if steady is None or spans is None:
            return None
        statistic = taken if taken is not None else self.norm.statistic_of_spans(spans.counted)
        statistic = statistic.to(self.ranks.device(statistic.device))  # nccl alone reduces no CPU tensor
        here = self._here(terms)

        def gradients() -> list[Tensor | None]:
            shards = describe()
            return completed(shards, read_gradients(shards)[0], store=False)[0]

        lanes = 0 if more is None else more.local(gradients(), statistic.device)
        reply = self._exchange(statistic, self._ballot(self._presence, here), lanes)
        if self.raises and not math.isfinite(reply.total_norm):
            self._raise_if_wrong(reply, reply.count(), here, describe(), gradients(), [])
        scale_ = partial(steady.scale_, spans, holders=holders)
        return Measured(reply.total_norm, gradients, scale_, reply.more, reply.well)

    def _measure_with_care(
        self, shards: Sequence[GradShard], store: bool, terms: Mapping[str, object], more: Lanes | None
    ) -> Measured:
        here = self._here(terms)
        gradients, problems = self._complete(shards, store, 0 if more is None else more.length)
        presence = sum(weight for i, weight in self._weights.items() if gradients[i] is not None)
        self._presence = presence
        ballot = self._ballot(presence, here, refused=bool(problems))
        statistic = statistic_of(self.norm, self.ranks, self.shares, gradients)
        lanes = 0 if more is None else more.local(gradients, statistic.device)
        reply = self._exchange(statistic, ballot, lanes)
        if self.raises and not math.isfinite(reply.total_norm):
            self._raise_if_wrong(reply, reply.count(), here, shards, gradients, problems)
        if problems:
            raise problems[0]
        return Measured.of(reply.total_norm, gradients, reply.more, reply.well)

    def settle(self, shards: Sequence[GradShard]) -> Measured:
        """Reduce and store partial gradients, and measure nothing: the total norm is NaN.

        Collective where a gradient may be partial, and until some rank has a gradient.

        Raises:
            UnsupportedGradientError: a gradient of this rank's can't be reduced.
        """
        gradients, problems = self._complete(shards, True, 0)
        self._steady = None  # which goes with the presence that a measurement found
        if problems:
            raise problems[0]
        device = next((g.device for g in gradients if g is not None), self.ranks.device())
        return Measured.of(torch.full((), math.nan, dtype=torch.float64, device=device), gradients)

    def _complete(
        self, shards: Sequence[GradShard], store: bool, more: int
    ) -> tuple[list[Tensor | None], list[DistnormError]]:
        """This step's gradients, read with care, partial ones reduced; and what is wrong with others."""
        readings, problems = read_gradients(shards)
        if self._batches is None:
            self._poll("agree", {}, more)
            self._agree(shards, readings, problems)
        self._steady = None
        if self._batches == () and not problems and self.norm.kernel is not None:
            self._steady = Steady.of(shards, self.shares, readings)
        for batch in self._batches or ():
            batch.reduce(shards, readings, store=store)
        gradients, late = completed(shards, readings, store=store)
        return gradients, problems + late

    def _here(self, terms: Mapping[str, object]) -> Mapping[str, object]:
        assert self._plan is not None
        return {**terms, "plan": self._plan.ident, "raises": self.raises}

    def _ballot(self, presence: int, here: Mapping[str, object], *, refused: bool = False) -> Ballot:
        if self._hashed[0] != (terms := tuple(here.values())):
            self._hashed = terms, stable_hash(repr(here))
        return Ballot("measure", self.raises, refused=refused, presence=presence, terms=self._hashed[1])

    def _agree(
        self, shards: Sequence[GradShard], readings: Sequence[Reading], problems: Sequence[DistnormError]
    ) -> None:
        self.ranks.raise_together(problems[0] if problems else None)
        self._batches = agree_on_partials(self.ranks, self.shares, shards, readings)

    def _poll(self, stage: Stage, here: Mapping[str, object], more: int = 0) -> Count:
        """Vote without a statistic, and raise if any rank is in another stage."""
        count = self._exchange(None, Ballot(stage, self.raises), more).count()
        diagnosis.raise_disagreement(self.ranks, count, here)
        return count

    def _raise_if_wrong(
        self,
        reply: Reply,
        count: Count,
        here: Mapping[str, object] | None,
        shards: Sequence[GradShard],
        gradients: Sequence[Tensor | None],
        problems: Sequence[DistnormError],
    ) -> None:
        """Raise what all ranks find together if all of them listen, else what this rank found alone."""
        if not self.raises or math.isfinite(reply.total_norm):
            return
        diagnosis.raise_disagreement(self.ranks, count, here, terms_too=True)
        self.ranks.raise_together(problems[0] if problems else None)
        if count.one_sided:
            diagnosis.raise_one_sided(self.ranks, shards, gradients, list(self._weights))
        if reply.is_brief:
            diagnosis.raise_left_out(self.ranks, count)
        diagnosis.raise_not_finite(self.ranks, self.norm.order, float(reply.total_norm), shards, gradients)
