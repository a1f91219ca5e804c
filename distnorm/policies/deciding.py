"""From the reduced vector to the policies' decisions, to a result, and to scaled gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.measure.gradients import Gradients
from distnorm.policies.decision import Decision
from distnorm.policies.decision import is_finite as is_finite_norm
from distnorm.policies.fixed import constant
from distnorm.policies.groups import PolicyGroup, PolicyGroups
from distnorm.policies.policy import StepStatistics, rounded
from distnorm.policies.results import ClipResult, GroupResult, clip_result


@dataclass(frozen=True, slots=True)
class GroupDecision:
    """What the policy of one group decided.

    Args:
        group: which one.
        decision: what is to be done.
        total_norm: the norm of its parameters.
        clipped_norm: the same after clipping.
    """

    group: PolicyGroup
    decision: Decision
    total_norm: Tensor
    clipped_norm: Tensor

    def to_result(self) -> GroupResult:
        """What is reported of the group."""
        decision = self.decision
        return GroupResult(
            self.total_norm, decision.coef, self.clipped_norm, decision.threshold, decision.coef < 1
        )

    @property
    def multiplies(self) -> bool:
        """Whether parameters as wholes are multiplied."""
        return self.decision.may_clip and self.group.units is None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A step's result, and the decisions that it comes from: one coefficient, or those of all groups.

    Args:
        result: what the caller gets.
        decision: where one coefficient is all that was decided.
        groups: what each group's policy decided otherwise.
        found: where the step's error is raised later: fp64, begins with the norm, and whether the ranks
            measured the same.
    """

    result: ClipResult
    decision: Decision | None
    groups: Sequence[GroupDecision] = ()
    found: Tensor | None = None


@dataclass(slots=True)
class _Statistics:
    """What the reduced payload holds for the policies.

    Args:
        norms: of single parameters.
        units: the norms of units and of their weights, by the index of a group.
        loss: the mean loss.
    """

    norms: Tensor | None = None
    units: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    loss: Tensor | None = None


class Decider:
    """Asks every group's policy. Nothing here is collective or waits for a device.

    Args:
        groups: the policies, and what they need.
    """

    def __init__(self, groups: PolicyGroups) -> None:
        self._groups, self._nonfinite = groups, groups.clip.nonfinite
        self._never_on: dict[torch.device, Tensor] = {}

    def decide(self, total_norm: Tensor, payload: Tensor | None, agreed: Tensor | None = None) -> Outcome:
        """Let the policies decide about this step, and advance their states.

        Args:
            total_norm: 0-d fp64; NaN where nothing was measured, or where the ranks disagree.
            payload: what `PolicyGroups.payload` was reduced to.
            agreed: 0-d bool; where it is false, the ranks did not measure the same thing, and gradients are
                left alone, whatever `clip.nonfinite` says (policy value clamps them, by no norm). `None`:
                they are known to agree.

        Raises:
            DistnormError: a policy uses the loss, and no rank gave one; on every rank.
        """
        groups = self._groups
        found = self._read(payload)
        is_finite = is_finite_norm(total_norm) if groups.measures else ~self._never(total_norm)
        if groups.obstacle is None:
            step = StepStatistics(total_norm, total_norm)
            if groups.default.looks_back:
                step = StepStatistics.of(total_norm, loss=found.loss)
            decision = self._leave_if_disagreed(groups.default.decide(step), agreed)
            skipped = self._skipped(is_finite, [decision])
            return Outcome(clip_result(total_norm, is_finite, decision, skipped), decision)
        decisions = [
            self._decide_group(group, total_norm, is_finite, found, agreed)
            for group in groups.groups
            if group.applies
        ]
        return Outcome(self._result(total_norm, is_finite, decisions), None, decisions)

    def measured(self, total_norm: Tensor, payload: Tensor | None) -> ClipResult:
        """The result of a step in which nothing is decided, nor clipped."""
        groups, results = self._groups, {}
        unclipped = constant(total_norm, math.inf)
        norms = None if groups.is_single else self._read(payload, with_loss=False).norms
        for group in groups.groups:
            if group.config is not None and norms is not None:
                own = self._own_norm(group, total_norm, norms)
                threshold = torch.full_like(own, groups.max_norm(group))
                results[group.config.name] = GroupResult(
                    own, unclipped.coef, own, threshold, self._never(own)
                )
        threshold = torch.full_like(total_norm, groups.max_norm(groups.groups[-1]))
        decision, never = replace(unclipped, threshold=threshold), self._never(total_norm)
        return replace(clip_result(total_norm, total_norm.isfinite(), decision, never), groups=results)

    def _read(self, payload: Tensor | None, *, with_loss: bool = True) -> _Statistics:
        groups, found = self._groups, _Statistics()
        if groups.payload is None or payload is None:
            return found
        parts = iter(groups.payload.split(payload))
        if groups.statistics is not None:
            found.norms = groups.statistics.parameter_norms(next(parts))
        for group in groups.groups:
            if group.units is not None:
                found.units[group.index] = group.units.norms(next(parts))
        loss = next(parts, None)
        if loss is not None and with_loss:
            found.loss = groups.loss.mean(loss)
        return found

    def _leave_if_disagreed(self, decision: Decision, agreed: Tensor | None) -> Decision:
        """The decision, or one that leaves gradients alone where the ranks disagree."""
        # Their total norm is NaN, which the other modes leave alone anyway.
        return (
            decision
            if agreed is None or self._nonfinite not in ("zero", "propagate")
            else decision.where(agreed)
        )

    def _own_norm(self, group: PolicyGroup, total_norm: Tensor, norms: Tensor | None) -> Tensor:
        if self._groups.is_single:
            return total_norm
        assert norms is not None and self._groups.ownership is not None
        members = self._groups.ownership.members(group.index, norms)
        return self._groups.norm.together(norms[members])

    def _decide_group(
        self, group: PolicyGroup, whole: Tensor, is_finite: Tensor, found: _Statistics, agreed: Tensor | None
    ) -> GroupDecision:
        own = self._own_norm(group, whole, found.norms)
        if agreed is not None:
            own = own.where(agreed, math.nan)
        basis = whole if group.goes_by_whole else own
        if not self._groups.is_single and self._nonfinite != "propagate":
            basis = basis.masked_fill(~is_finite, math.nan)  # the step is of no use to any of them
        step, each = self._statistics_of(group, basis, found)
        decision = self._leave_if_disagreed(group.policy.decide(step), agreed)
        if decision.clamp is not None:
            clipped = torch.full_like(own, math.nan)
        elif decision.each is not None and each is not None:
            clipped = self._groups.norm.together(decision.each * each)
            clipped = clipped if agreed is None else clipped.where(agreed, math.nan)
        else:
            clipped = own * decision.coef
        if decision.zero_unless is not None:
            clipped = clipped.where(decision.zero_unless, 0.0)
        return GroupDecision(group, decision, own, clipped)

    def _statistics_of(
        self, group: PolicyGroup, basis: Tensor, found: _Statistics
    ) -> tuple[StepStatistics, Tensor | None]:
        """What a group's policy decides by, and the norms that its own coefficients are for."""
        step = StepStatistics.of(basis, loss=found.loss)
        if group.units is not None:
            each, weights = found.units[group.index]
            return replace(step, unit_norms=each, unit_weight_norms=weights), each
        if found.norms is None:
            return step, None
        assert self._groups.ownership is not None
        members = self._groups.ownership.members(group.index, found.norms)
        each, numels = found.norms[members], self._groups.ownership.numels(found.norms)[members]
        return replace(step, parameter_norms=rounded(each), numels=numels.double()), each

    def _result(
        self, total_norm: Tensor, is_finite: Tensor, decisions: Sequence[GroupDecision]
    ) -> ClipResult:
        if self._groups.is_single:
            coef, clipped = decisions[0].decision.coef, decisions[0].clipped_norm
        else:
            coef = torch.stack([one.decision.coef for one in decisions]).min()
            clipped = self._groups.norm.together(torch.stack([one.clipped_norm for one in decisions]))
        rest = [one.decision.threshold for one in decisions if one.group.config is None]
        threshold = rest[0] if rest else torch.full_like(total_norm, math.inf)
        skipped = self._skipped(is_finite, [one.decision for one in decisions])
        results = {one.group.config.name: one.to_result() for one in decisions if one.group.config}
        return ClipResult(total_norm, coef, clipped, threshold, is_finite, coef < 1, skipped, results)

    def _skipped(self, is_finite: Tensor, decisions: Sequence[Decision]) -> Tensor:
        skips = [decision.skip for decision in decisions if decision.skip is not None]
        if self._nonfinite == "skip":
            skips.append(~is_finite)
        return reduce(torch.logical_or, skips) if skips else self._never(is_finite)

    def _never(self, like: Tensor) -> Tensor:
        """False, made once for each device."""
        if type(like) is not Tensor:  # made in a dry run: not to be kept for real steps
            return torch.zeros_like(like, dtype=torch.bool)
        if like.device not in self._never_on:
            if kernels.is_captured():  # it would have its value only after a replay
                return torch.zeros_like(like, dtype=torch.bool)
            self._never_on[like.device] = torch.zeros((), dtype=torch.bool, device=like.device)
        return self._never_on[like.device]

    # ---- gradients

    def apply(self, outcome: Outcome, gradients: Gradients, keep: Tensor | None = None) -> None:
        """Clip the local gradients in place, without a host read; or set them to zero, unless the 0-d bool
        tensor `keep` is true."""
        if outcome.decision is not None:
            apply(outcome.decision, gradients, keep)
            return
        decisions = outcome.groups
        if any(one.multiplies for one in decisions):
            gradients.scale_each_(self._coefficients(decisions))
        for one in decisions:
            group, decision = one.group, one.decision
            if group.units is not None and decision.each is not None:
                group.units.scale_(gradients.views(), decision.each)
            if decision.clamp is not None:
                gradients.clamp_(decision.clamp, self._shards_of(group, len(gradients.tensors)))
        asked = [keep, *(one.decision.zero_unless for one in decisions)]
        zeroing = [condition for condition in asked if condition is not None]
        if zeroing:
            gradients.zero_unless_(reduce(torch.logical_and, zeroing))

    def _coefficients(self, decisions: Sequence[GroupDecision]) -> Tensor:
        """[shards] by what each of this rank's shards is multiplied."""
        ownership, coefs = self._groups.ownership, []
        assert ownership is not None
        for one in decisions:
            decision, count = one.decision, ownership.count(one.group.index)
            if not one.multiplies:
                coefs.append(torch.ones_like(decision.coef).expand(count))
            else:
                coefs.append(decision.coef.expand(count) if decision.each is None else decision.each)
        every = torch.cat(coefs)
        return every[ownership.places(every)]

    def _shards_of(self, group: PolicyGroup, count: int) -> Sequence[int]:
        ownership = self._groups.ownership
        return range(count) if ownership is None else ownership.shards(group.index)


def apply(decision: Decision, gradients: Gradients, keep: Tensor | None = None) -> None:
    """Multiply the local gradients by one coefficient, in place, without a host read; or set them to zero,
    unless the 0-d bool tensor `keep` is true."""
    if decision.zero_unless is not None:
        keep = decision.zero_unless if keep is None else keep & decision.zero_unless
    if decision.may_clip:
        gradients.scale_(decision.coef, keep)
    elif keep is not None:
        gradients.zero_unless_(keep)
