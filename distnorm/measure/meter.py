"""One measurement: from shards and their plan to the total norm, by one all-reduce.

Where the ranks did not measure the same thing, the total norm is NaN on every rank, never a wrong number;
ranks that read the result on the host (all do on the CPU) raise a typed error that names the ranks and what
each did, before any of them has changed a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import NoReturn

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DisagreementError, DistnormError
from distnorm.measure import diagnosis
from distnorm.measure.diagnosis import SET
from distnorm.measure.exchange import Exchange, Payload
from distnorm.measure.fingerprints import FingerprintedReads
from distnorm.measure.gradients import Coefficients, Given, Gradients
from distnorm.measure.header import DecodedHeader, Header, Stage, StepHeaders, presence_weights
from distnorm.measure.norms import Norm
from distnorm.measure.overlap import Overlap
from distnorm.measure.reading import GradientReader
from distnorm.measure.reduced import ReducedStatistics, UnreadStatistics
from distnorm.measure.result_checks import ResultChecks
from distnorm.measure.unread import UnreadReduction
from distnorm.plan.collectives import Ranks
from distnorm.plan.names import check_names
from distnorm.plan.plan import Plan, Share, make_plan
from distnorm.plan.stops import Stops
from distnorm.plan.terms import STEP
from distnorm.sources import Layout, Managers
from distnorm.sources.shards import GradShard, Source

Reader = Callable[[], tuple[list[GradShard], list[tuple[str, Tensor]]]]
"""Gives this rank's shards, and its tensors with the names that they were given under."""


@dataclass(slots=True)
class Meter:
    """Measures the same set of shards step after step.

    Args:
        ranks: who takes part.
        norm: which norm.
        terms: settings that must be equal on all ranks, compared whenever a plan is made.
        layout: how the whole model lies on the ranks.
        raises: whether a norm that is not finite raises, be it in the next step.
        waits: whether the norm is read on the host, whatever it costs.
        coefficients: what has coefficients of its own.
        source: what is measured of the tensors that were given.
        allow_empty: a rank may pass an empty target in some calls.

    Attributes:
        overlap: what has read gradients during backward, or reads them otherwise.
        managers: of the parameters whose gradients are measured; `None` for other tensors.
        plan: who counts what; `None` before `prepare`.
        raised_alone: whether in the newest step this rank raised what the others have not read.
        refusal: why the next step's gradients may not be measured, if they may not.
        step: the caller's number of the step, where it gave one.
        given: this step's gradients, where a graph hands them over to be read, and then to be scaled.
    """

    ranks: Ranks
    norm: Norm
    terms: Mapping[str, object]
    layout: Layout
    raises: bool
    waits: bool
    coefficients: Coefficients = "one"
    source: Source = Source.GRADIENT
    allow_empty: bool = False
    overlap: Overlap | FingerprintedReads | None = None
    managers: Managers | None = None
    plan: Plan | None = None
    raised_alone: bool = False
    refusal: DistnormError | None = None
    step: float | None = None
    given: Given = None
    _home: torch.device = kernels.HOST  # of the first parameter
    _shards: list[GradShard] | None = None
    _describe: Callable[[], list[GradShard]] = list
    exchange: Exchange = field(init=False)
    _checks: ResultChecks = field(init=False)
    _unread: UnreadReduction = field(init=False)
    _weights: dict[int, int] = field(default_factory=dict)
    _reader: GradientReader = field(init=False)
    _headers: StepHeaders = field(default_factory=StepHeaders)

    def __post_init__(self) -> None:
        self.exchange = Exchange(self.ranks, self.norm)

    @property
    def shards(self) -> list[GradShard]:
        """What the plan was made of."""
        if self._shards is None:
            self._shards = self._describe()
        return self._shards

    def describe_by(self, describe: Callable[[], list[GradShard]]) -> None:
        """Drop the shards, which keep tensors alive, and describe them again when a step needs them."""
        self._shards, self._describe = None, describe

    @property
    def shares(self) -> Sequence[Share]:
        """What this rank counts of each shard of the plan."""
        return () if self.plan is None else self.plan.shares

    @property
    def listens(self) -> bool:
        """Whether this rank reads results on the host: if it waits, or if they are reduced there anyway."""
        return self.waits or self.ranks.reduce_device(self._home).type == "cpu"

    @property
    def defers(self) -> bool:
        """Whether a norm that is not finite raises when the next step begins."""
        return self.raises and not self.listens

    # ---- planning

    @kernels.plain_operators()
    def prepare(self, read: Reader) -> None:
        """Read a set of shards and make its plan. Collective: every rank must call it.

        Raises:
            DistnormError: what `read` raised on any rank, or what `make_plan` found; on every rank.
        """
        diagnosis.refuse_captured_planning()
        self.plan = self.overlap = None
        named: list[tuple[str, Tensor]] = []
        with self.ranks.together():
            self._shards, named = read()
        self._home = next((shard.holder.device for shard in self.shards), self._home)
        given, shares = [name for name, _ in named], self.norm.replicas_share
        names = partial(check_names, self.ranks, given, self.shards, self.layout)
        plan = make_plan(self.ranks, self.shards, self.terms, replicas_share=shares, check_names=names)
        if self.allow_empty or not self.exchange.can_pack:
            self.exchange.use_full_form()
        self.ranks.state.has_replicas |= plan.has_replicas
        if not self.listens:
            self.ranks.state.compares_replicas |= plan.has_replicas
        self._weights = dict(presence_weights(plan.shares)) if shares else {}
        self._checks = ResultChecks.of(self.ranks, self.norm, self.raises, self.source, self.shards, plan)
        self._unread = UnreadReduction(self.exchange, self.norm, self._checks, plan.shares)
        if self.source is Source.GRADIENT and (self.managers is None or not self.managers.are_of(named)):
            self.managers = Managers(named if type(self.ranks) is Ranks else ())  # simulated: asked before
        self._reader = self._reader_of(plan.shares)
        self.plan, self._headers = plan, StepHeaders(plan.is_double)

    def _reader_of(self, shares: Sequence[Share]) -> GradientReader:
        reads = (self.listens, self.coefficients, self.source)
        return GradientReader(self.ranks, self.exchange, self.norm, shares, self._weights, *reads)

    def prepare_anew(self, read: Reader, payload_length: int = 0) -> None:
        """Make another plan, after the set of shards changed. Collective.

        A rank can't know alone whether the others saw that too. So it first takes part in the all-reduce that
        ranks with a plan are waiting in, with a payload as long as theirs.

        Raises:
            DisagreementError: the set changed on this rank and not on every other.
        """
        diagnosis.refuse_captured_planning()
        decoded = self._poll("plan", {SET: "changed"}, payload_length)
        self.allow_empty |= self.exchange.can_pack and decoded.values["plan"] < self.ranks.size
        self.prepare(read)

    def abort(self, error: DistnormError) -> NoReturn:
        """Raise an error of this rank that came before it could measure, and leave no other rank waiting:
        ranks that were about to plan raise it too; ranks with a plan raise that this one has none."""
        with suppress(DisagreementError):  # which the others raise; here the cause is raised
            self._poll("plan", {SET: f"aborted: {error}"})
            self.ranks.raise_together(error)
        raise error

    # ---- a step

    def read(
        self,
        holders: Sequence[Tensor],
        given: Given = None,
        *,
        store: bool,
        meets: bool = True,
        payload_length: int = 0,
    ) -> Gradients:
        """This step's gradients. Collective where some are partial, or may be for the first time.

        Args:
            holders, given: those of the plan's shards; and the gradients, where a graph hands them over.
            store: whether reduced partial gradients are put back where the partial ones were.
            meets: whether `reduce` follows, in which ranks that read on learn of new partial gradients.
            payload_length: of the payload that ranks may be reducing meanwhile.

        Raises:
            UnsupportedGradientError: a backward pass is running.
        """
        if self.managers is not None:
            diagnosis.refuse_inside_backward()
            try:
                refusal, self.refusal = self.refusal, None
                if refusal is not None:
                    raise refusal
                self.managers.refuse_unreduced()
            except DistnormError as error:
                return Gradients([None] * len(self.shares), [error])
        found, self.given = self._reader.read_fast(holders) if given is None else None, given
        return found or self._reader.read_with_care(
            self.shards, given, store=store, meets=meets, payload_length=payload_length
        )

    def reduce(
        self,
        gradients: Gradients,
        payload: Payload | None = None,
        terms: Mapping[str, object] = MappingProxyType({}),
        *,
        store: bool = True,
    ) -> Stops[tuple[Gradients, ReducedStatistics | UnreadStatistics]]:
        """Measure gradients, in one all-reduce, where it stops. Collective.

        Args:
            gradients, store: what `read` gave, and was given.
            payload: what else is reduced, by the norm's op, on all ranks alike.
            terms: what else must be equal on all ranks in this call, such as the threshold.

        Returns:
            The gradients, with partial ones on which ranks had to agree first; and what was reduced.

        Raises:
            DistnormError: a gradient can't be measured, or ranks measured other things; on every rank that
                listens, before a gradient has changed.
        """
        assert self.plan is not None
        here = {**terms, "plan": self.plan.ident, "raises": self.raises, STEP: self.step}
        reduced = yield from self._reduced(gradients, payload, here)
        if self.given is not None:  # a graph may have others by now
            gradients, self.given = self._reader.again(self.shards, gradients, self.given), None
        if isinstance(reduced, UnreadStatistics) or not self.listens:
            return gradients, reduced
        if type(reduced.total_norm) is not Tensor:  # a dry run has no values to read
            gradients.raise_problems()
            return gradients, reduced
        if not reduced.agreed:
            decoded = reduced.decode()
            if decoded.agreed and decoded.values["measure"] == self.ranks.size:
                reduced = self._checks.compare_bits(reduced, self.shards, gradients)
            elif decoded.stages == {"agree", "measure"} and decoded.all_raise:
                gradients = self._reader.agree_with_others(self.shards, gradients, store=store)
                return (yield from self.reduce(gradients, payload, terms, store=store))
            else:
                self._checks.raise_disagreement(reduced, decoded, here, self.shards, gradients)
        self._checks.check_values(reduced, lambda: self.shards, gradients)
        return gradients, reduced.checked()

    def _reduced(
        self, gradients: Gradients, payload: Payload | None, here: Mapping[str, object]
    ) -> Stops[ReducedStatistics | UnreadStatistics]:
        diagnosis.refuse_captured_reads(self.listens, self.overlap is not None)
        device = self.ranks.reduce_device(gradients.device)
        statistic = self.overlap.take(gradients) if self.overlap is not None else None
        if not self.listens:
            self.raised_alone = bool(gradients.problems) and self.ranks.size > 1
            header, marks = self._header(gradients, here, 0), self.defers
            return (yield from self._unread(gradients, statistic, header, payload, device, marks=marks))
        if statistic is None:
            statistic = gradients.statistic(self.norm, self.shares, device)
        bits, replicas = self._checks.replica_summand(gradients)
        more = 0 if payload is None else payload.local(gradients.tensors, device)
        header = self._header(gradients, here, bits)
        return (yield from self.exchange.reduce(statistic, header, more, replicas))

    # ---- a rank that was given nothing

    def join(self, payload_length: int = 0) -> ReducedStatistics:
        """Take part in an all-reduce of the other ranks without a plan and a statistic."""
        return self.exchange(None, Header("join", self.listens), payload_length)

    def agree_on_nothing(self) -> None:
        """Take part where the other ranks agree on partial gradients."""
        self._reader_of(()).agree([], [], [], store=False)

    # ---- agreement

    def _header(self, gradients: Gradients, here: Mapping[str, object], replica_bits: int) -> Header:
        presence, refused = gradients.presence(self._weights), bool(gradients.problems)
        return self._headers.measuring(self.listens, refused, presence, here, replica_bits)

    def _poll(self, stage: Stage, here: Mapping[str, object], payload_length: int = 0) -> DecodedHeader:
        """Exchange headers without a statistic, and raise if ranks are at different stages of a call."""
        decoded = self.exchange(None, Header(stage, self.listens), payload_length).decode()
        diagnosis.raise_disagreement(self.ranks, decoded, here)
        return decoded
