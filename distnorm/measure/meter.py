"""One measurement: from shards and their plan to the total norm, by one all-reduce.

Where the ranks did not measure the same thing, the total norm is NaN on every rank, never a wrong number;
ranks that read the result on the host (all do on the CPU) raise a typed error that names the ranks and what
each did, before any of them has changed a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NoReturn

import torch
from torch import Tensor, nn

from distnorm import kernels
from distnorm.errors import DisagreementError, DistnormError
from distnorm.measure import diagnosis
from distnorm.measure.diagnosis import SET
from distnorm.measure.exchange import Exchange, Payload, ReducedStatistics
from distnorm.measure.fast_path import FastPath
from distnorm.measure.gradients import Gradients, completed, read_with_care
from distnorm.measure.header import DecodedHeader, Header, Stage, presence_weights
from distnorm.measure.norms import Norm
from distnorm.measure.overlap import Overlap
from distnorm.measure.partials import Batch, agree_on_partials, is_agreed
from distnorm.measure.replica_check import ReplicaCheck, compare_replicas
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import Plan, Share, check_tied, make_plan, stable_hash
from distnorm.sources import Managers, Tied
from distnorm.sources.shards import GradShard, Reading, Source

Reader = Callable[[], tuple[list[GradShard], list[tuple[str, Tensor]]]]
"""Gives this rank's shards, and its tensors with the names that they were given under."""

NO_TERMS: Mapping[str, object] = MappingProxyType({})


@dataclass(slots=True)
class Meter:
    """Measures the same set of shards step after step.

    Args:
        ranks: who takes part.
        norm: which norm.
        terms: settings that must be equal on all ranks, compared whenever a plan is made.
        tied: groups of names that are one parameter.
        raises: whether the norm is read on the host, and raises on every rank if it is not finite.
        one_coefficient: whether all gradients are multiplied by the same coefficient.
        source: what is measured of the tensors that were given.
        allow_empty: a rank may pass an empty target in some calls.

    Attributes:
        overlap: what reads gradients during backward.
        managers: of the parameters whose gradients are measured; `None` for other tensors.
        plan: who counts what; `None` before `prepare`.
    """

    ranks: Ranks
    norm: Norm
    terms: Mapping[str, object]
    tied: Tied
    raises: bool
    one_coefficient: bool = True
    source: Source = Source.GRADIENT
    allow_empty: bool = False
    overlap: Overlap | None = None
    managers: Managers | None = None
    plan: Plan | None = None
    _shards: list[GradShard] | None = None
    _describe: Callable[[], list[GradShard]] = list
    _exchange: Exchange = field(init=False)
    _replica_check: ReplicaCheck | None = None
    _batches: tuple[Batch, ...] | None = None
    _weights: dict[int, int] = field(default_factory=dict)
    _fast_path: FastPath | None = None
    _hashed: tuple[tuple[object, ...], int] = ((), 0)  # terms, and their hash

    def __post_init__(self) -> None:
        self._exchange = Exchange(self.ranks, self.norm)

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
        return self.plan.shares if self.plan is not None else ()

    @property
    def listens(self) -> bool:
        """Whether this rank reads results on the host: if it must, or if they are reduced there anyway."""
        return self.raises or self.ranks.reduce_device(torch.device("cpu")).type == "cpu"

    # ---- planning

    def prepare(self, read: Reader) -> None:
        """Read a set of shards and make its plan. Collective: every rank must call it.

        Raises:
            DistnormError: what `read` raised on any rank, or what `make_plan` found; on every rank.
        """
        self.plan = self._fast_path = self._batches = self.overlap = None
        named: list[tuple[str, Tensor]] = []
        with self.ranks.together():
            self._shards, named = read()
        plan = make_plan(self.ranks, self.shards, self.terms, replicas_share=self.norm.replicas_share)
        check_tied(self.ranks, [name for name, _ in named], self.tied)
        if self.allow_empty or not self._exchange.can_pack:
            self._exchange.use_full_form()
        self.ranks.state.compares_replicas |= plan.has_replicas
        self._weights, self._replica_check = {}, None
        if self.norm.replicas_share:
            self._weights = dict(presence_weights(plan.shares))
            if plan.has_replicas:
                self._replica_check = ReplicaCheck.of(self.ranks, self.shards, plan.shares)
        if self.source is Source.GRADIENT and (self.managers is None or not self.managers.are_of(named)):
            self.managers = Managers(named)
        self.plan = plan

    def prepare_anew(self, read: Reader, payload_length: int = 0) -> None:
        """Make another plan, after the set of shards changed. Collective.

        A rank can't know alone whether the others saw the change too. So it first takes part in the
        all-reduce that ranks with a plan are waiting in, with a payload as long as theirs.

        Raises:
            DisagreementError: the set changed on this rank and not on every other.
        """
        decoded = self._poll("plan", {SET: "changed"}, payload_length)
        self.allow_empty |= self._exchange.can_pack and decoded.values["plan"] < self.ranks.size
        self.prepare(read)

    def abort(self, error: DistnormError) -> NoReturn:
        """Raise an error of this rank that came before it could measure, without leaving other ranks waiting.

        Ranks that were about to plan raise it too; ranks with a plan raise that this one has none.
        """
        with suppress(DisagreementError):  # which the others raise; here the cause is raised
            self._poll("plan", {SET: f"aborted: {error}"})
            self.ranks.raise_together(error)
        raise error

    def read_during_backward(self, modules: Sequence[nn.Module]) -> None:
        """Read gradients as soon as backward has finished them; only where compiled code can. Not collective.

        Raises:
            ConfigError: see `Overlap`.
        """
        if self.norm.kernel is not None:
            self.overlap = Overlap(self.norm, self.shards, self.shares, modules)

    # ---- a step

    def read(self, holders: Sequence[Tensor], *, store: bool, payload_length: int = 0) -> Gradients:
        """This step's gradients. Collective where some are partial, or may be for the first time.

        Args:
            holders: those of the plan's shards, in its order.
            store: whether reduced partial gradients are put back where the partial ones were.
            payload_length: of the payload that ranks may be reducing meanwhile.

        Raises:
            UnsupportedGradientError: a backward pass is running.
        """
        if self.managers is not None:
            diagnosis.refuse_inside_backward()
            try:
                self.managers.refuse_unreduced()
            except DistnormError as error:
                return Gradients([None] * len(self.shares), [error])
        found = self._fast_path.read(holders) if self._fast_path is not None else None
        return found if found is not None else self._read_with_care(store, payload_length)

    def reduce(
        self,
        gradients: Gradients,
        payload: Payload | None = None,
        terms: Mapping[str, object] = NO_TERMS,
        *,
        store: bool = True,
    ) -> tuple[Gradients, ReducedStatistics]:
        """Measure gradients, in one all-reduce. Collective: every rank must call it.

        Args:
            gradients: what `read` gave.
            payload: what else is reduced, by the norm's op, on all ranks alike.
            terms: what else must be equal on all ranks in this call, such as the threshold.
            store: as for `read`.

        Returns:
            The gradients, read once more if ranks had to agree on partial ones first; and what was reduced.

        Raises:
            DistnormError: a gradient can't be measured, or ranks didn't measure the same; on every rank that
                listens, before any gradient has changed.
        """
        here = {**terms, "plan": self._ident, "raises": self.raises}
        device = self.ranks.reduce_device(gradients.device)
        statistic = self.overlap.take(gradients) if self.overlap is not None else None
        if statistic is None:
            statistic = gradients.statistic(self.norm, self.shares, device)
        check = self._replica_check
        replicas: Tensor | float = 0.0
        if check is not None and self.ranks.state.compares_replicas:
            replicas = gradients.replica_number(check, device)
        header = self._header(gradients, here)
        more = 0 if payload is None else payload.local(gradients.tensors, device)
        reduced = self._exchange(statistic, header, more, replicas)
        if not self.listens:
            if gradients.problems:
                raise gradients.problems[0]
            return gradients, self._without_suspects(reduced)
        if not reduced.agreed:
            decoded = reduced.decode()
            if decoded.stages == {"agree", "measure"} and decoded.all_raise:
                self._agree(read_with_care(self.shards)[0], gradients.problems)
                length = 0 if payload is None else payload.length
                return self.reduce(self._read_with_care(store, length), payload, terms, store=store)
            self._raise_disagreement(reduced, decoded, here, gradients)
        self._check_values(gradients, reduced)
        return gradients, reduced

    def without_norm(self, gradients: Gradients) -> ReducedStatistics:
        """The result where no norm is needed: a total norm of NaN. Not collective.

        Raises:
            UnsupportedGradientError: a gradient of this rank's can't be clipped.
        """
        if gradients.problems:
            raise gradients.problems[0]
        norm = torch.full((), math.nan, dtype=torch.float64, device=gradients.device)
        return ReducedStatistics(norm, norm.view(1)[:0], lambda: DecodedHeader({}), True, True)

    def join_empty(self) -> tuple[Tensor, bool]:
        """The total norm where this rank was given no tensors, and whether the result is fp64.
        Collective.

        This rank can't know whether the others plan, so it reads their headers on the host, and does the
        same.
        """
        while True:
            reduced = self._exchange(None, Header("join", self.listens))
            decoded = reduced.decode()
            if decoded.stages == {"plan"}:
                self.allow_empty = True
                self.prepare(lambda: ([], []))
            elif "agree" in decoded.stages:
                self._agree([], [])
            elif not decoded.stages:  # nobody has anything
                return self.norm.finalise(self.norm.zeros(self.ranks.device())), False
            else:
                break
        empty = Gradients([])
        if not reduced.agreed and self.listens:
            self._raise_disagreement(reduced, decoded, None, empty)
        if self.listens:
            self._check_values(empty, reduced)
        return reduced.total_norm, decoded.values["double"] > 0

    def find_not_finite(self, gradients: Gradients) -> tuple[tuple[str, int], ...]:
        """The first few parameters of each rank whose gradient isn't finite, with that rank. Collective."""
        return diagnosis.find_not_finite(self.ranks, self.shards, gradients.tensors)

    # ---- reading

    def _read_with_care(self, store: bool, payload_length: int) -> Gradients:
        readings, problems = read_with_care(self.shards)
        if self.managers is not None:
            diagnosis.warn_of_taken_gradients(self.shards, readings)
        if self._batches is None or not all(is_agreed(self._batches, i, r) for i, r in enumerate(readings)):
            decoded = self._poll("agree", {}, payload_length)
            if decoded.all_raise or not decoded.values["measure"]:
                self._agree(readings, problems)
        for batch in self._batches or ():
            batch.reduce(self.shards, readings, store=store)
        gradients = completed(self.shards, readings, problems, store=store)
        self._fast_path = None
        if store:
            gradients.lay_out(self.shards, one_coefficient=self.one_coefficient)
            if not self._batches and not gradients.problems and self.norm.kernel is not None:
                presence = gradients.presence(self._weights)
                self._fast_path = FastPath.of(self.shards, self.shares, gradients, presence)
        return gradients

    def _agree(self, readings: Sequence[Reading], problems: Sequence[DistnormError]) -> None:
        """Agree on which gradients are partial; the first time, also check that replicas are equal."""
        self.ranks.raise_together(problems[0] if problems else None)
        is_first = self._batches is None
        self._batches = agree_on_partials(self.ranks, self.shards, readings, self._batches or ())
        if is_first and self._batches is not None and self.plan is not None and self.plan.has_replicas:
            complete = [reading if isinstance(reading, Tensor) else None for reading in readings]
            partial = {i for batch in self._batches for i in batch.layouts}
            compare_replicas(
                self.ranks, self.shards, self.shares, complete, apart_from=partial, finite_only=True
            )

    # ---- agreement

    @property
    def _ident(self) -> int:
        assert self.plan is not None, "prepare() comes first"
        return self.plan.ident

    def _header(self, gradients: Gradients, here: Mapping[str, object]) -> Header:
        if self._hashed[0] != (terms := tuple(here.values())):
            self._hashed = terms, stable_hash(repr(here))
        return Header(
            "measure",
            self.listens,
            refused=bool(gradients.problems),
            is_double=self.plan is not None and self.plan.is_double,
            presence=gradients.presence(self._weights),
            terms=self._hashed[1],
        )

    def _poll(self, stage: Stage, here: Mapping[str, object], payload_length: int = 0) -> DecodedHeader:
        """Exchange headers without a statistic, and raise if ranks are at different stages of a call."""
        decoded = self._exchange(None, Header(stage, self.listens), payload_length).decode()
        if not (stage == "agree" and decoded.stages <= {"agree", "measure"}):
            diagnosis.raise_disagreement(self.ranks, decoded, here)
        return decoded

    def _raise_disagreement(
        self,
        reduced: ReducedStatistics,
        decoded: DecodedHeader,
        here: Mapping[str, object] | None,
        gradients: Gradients,
    ) -> NoReturn:
        """Raise the reason: searched by all ranks if all of them read results, else what this rank knows."""
        diagnosis.raise_disagreement(self.ranks, decoded, here, terms_too=True)
        self.ranks.raise_together(gradients.problems[0] if gradients.problems else None)
        if decoded.is_one_sided:
            compare_replicas(self.ranks, self.shards, self.shares, gradients.tensors)
        if reduced.is_packed:
            diagnosis.raise_left_out(self.ranks, decoded)
        raise DisagreementError("expected every rank to measure the same set, found headers that don't fit")

    def _check_values(self, gradients: Gradients, reduced: ReducedStatistics) -> None:
        """Raise or warn, on ranks that read results: not finite, unequal replicas, no gradient at all."""
        total_norm, difference = reduced.total_norm, reduced.replica_difference
        # In the host's memory to read a value takes no operator.
        norm = float(total_norm.numpy() if kernels.on_host(total_norm) else total_norm)
        if not math.isfinite(norm):
            if self.raises:
                diagnosis.raise_not_finite(self.ranks, self.norm.order, norm, self.shards, gradients.tensors)
            return
        if difference is not None and self._are_suspect(reduced, float(difference)):
            compare_replicas(self.ranks, self.shards, self.shares, gradients.tensors)
            if self._replica_check is not None:
                self._replica_check.learn(float(difference))
        if norm == 0 and self.managers is not None:
            diagnosis.warn_of_no_gradients(self.ranks, self.shards, gradients.is_empty())

    def _are_suspect(self, reduced: ReducedStatistics, difference: float) -> bool:
        """Whether replicas are to be compared whole; alike on all ranks."""
        check = self._replica_check
        suspect = check is not None and bool(check.is_suspect(difference))
        if reduced.is_packed or difference == 0 or reduced.decode().values["measure"] == self.ranks.size:
            return suspect
        return self.ranks.any(suspect)[0]  # a rank that was given nothing has no plan to go by

    def _without_suspects(self, reduced: ReducedStatistics) -> ReducedStatistics:
        """Where no rank reads results: make the total norm NaN if replicas differ by much."""
        difference = reduced.replica_difference
        if self._replica_check is None or not isinstance(difference, Tensor):
            return reduced
        suspect = self._replica_check.exceeds_rounding(difference)
        agreed = torch.as_tensor(reduced.agreed, device=difference.device) & ~suspect
        return replace(reduced, total_norm=reduced.total_norm.masked_fill(~agreed, math.nan), agreed=agreed)
