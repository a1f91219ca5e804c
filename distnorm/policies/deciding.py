"""From the reduced vector to the policies' decisions, to what is told of them, and to scaled gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.measure.readings import Measured, present
from distnorm.policies import Decision, Seen, constant
from distnorm.policies.decision import is_finite as is_finite_norm
from distnorm.policies.groups import Rule, Rules, max_norm_of
from distnorm.policies.policy import rounded
from distnorm.policies.results import ClipResult, GroupResult, clip_result


@dataclass(frozen=True, slots=True)
class Ruling:
    """What one rule decided.

    Args:
        rule: which one.
        decision: what is to be done.
        total_norm: the norm of its parameters.
        clipped_norm: the same after clipping.
    """

    rule: Rule
    decision: Decision
    total_norm: Tensor
    clipped_norm: Tensor

    def told(self) -> GroupResult:
        """What is told of it."""
        decision = self.decision
        return GroupResult(
            self.total_norm, decision.coef, self.clipped_norm, decision.threshold, decision.coef < 1
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is told of a step, and the decision that it comes from: one coefficient, or those of all rules."""

    result: ClipResult
    decision: Decision | None
    rulings: Sequence[Ruling] = ()


@dataclass(slots=True)
class _Found:
    """What the reduced lanes say beside the total norm."""

    norms: Tensor | None = None
    units: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    loss: Tensor | None = None


_NOTHING = _Found()


class Decider:
    """Asks the policies. Nothing here is collective, and no device is waited for.

    Args:
        rules: the policies, and what they need.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._no: dict[torch.device, Tensor] = {}

    def decide(self, total_norm: Tensor, more: Tensor | None) -> Outcome:
        """What is to be done in this step; the policies' states go one step on.

        Args:
            total_norm: 0-d fp64; NaN where nothing was measured.
            more: what `Rules.lanes` were reduced to.

        Raises:
            DistnormError: a policy looks at the loss, and no rank gave one; on every rank.
        """
        rules = self._rules
        found = _NOTHING if rules.lanes is None or more is None else self._found(more)
        is_finite = is_finite_norm(total_norm) if rules.measures else ~self._never(total_norm)
        if rules.obstacle is None:
            seen = Seen(total_norm, total_norm)
            if rules.default.looks_back:
                seen = Seen.of(total_norm, loss=found.loss)
            decision = rules.default.decide(seen)
            skipped = self._skipped(is_finite, [decision])
            return Outcome(clip_result(total_norm, is_finite, decision, skipped), decision)
        rulings = [self._ruling(rule, total_norm, is_finite, found) for rule in rules.rules if rule.applies]
        return Outcome(self._told(total_norm, is_finite, rulings), None, rulings)

    def measured(self, total_norm: Tensor, more: Tensor | None) -> ClipResult:
        """What is told of a step in which nothing is decided, nor clipped."""
        rules, norms = self._rules, None
        unclipped = constant(total_norm, math.inf)
        if not rules.is_single and more is not None:
            norms = self._found(more, with_loss=False).norms
        groups = {}
        for rule in [] if norms is None else rules.rules[:-1]:
            assert rule.group is not None
            own = self._own(rule, total_norm, norms)
            threshold = torch.full_like(own, max_norm_of(rule, rules.clip))
            groups[rule.group.name] = GroupResult(own, unclipped.coef, own, threshold, self._never(own))
        threshold = torch.full_like(total_norm, max_norm_of(rules.rules[-1], rules.clip))
        decision, never = replace(unclipped, threshold=threshold), self._never(total_norm)
        return replace(clip_result(total_norm, total_norm.isfinite(), decision, never), groups=groups)

    def _found(self, more: Tensor, *, with_loss: bool = True) -> _Found:
        rules, found = self._rules, _Found()
        assert rules.lanes is not None
        parts = iter(rules.lanes.split(more))
        if rules.detail is not None:
            found.norms = rules.detail.parameter_norms(next(parts))
        for i, rule in enumerate(rules.rules):
            if rule.units is not None:
                found.units[i] = rule.units.norms(next(parts))
        rest = next(parts, None)
        if rest is not None and with_loss:
            found.loss = rules.loss.mean(rest)
        return found

    def _own(self, rule: Rule, total_norm: Tensor, norms: Tensor | None) -> Tensor:
        if self._rules.is_single:
            return total_norm
        assert norms is not None
        return self._rules.norm.together(norms[self._rules.members(rule, norms.device)])

    def _ruling(self, rule: Rule, whole: Tensor, is_finite: Tensor, found: _Found) -> Ruling:
        rules, norm = self._rules, self._rules.norm
        own, each = self._own(rule, whole, found.norms), None
        basis = whole if rule.goes_by_whole else own
        if not rules.is_single and rules.clip.nonfinite != "propagate":
            basis = basis.masked_fill(~is_finite, math.nan)  # the step is of no use to any of them
        seen = Seen.of(basis, loss=found.loss)
        if rule.units is not None:
            each, weights = found.units[rules.rules.index(rule)]
            seen = replace(seen, unit_norms=each, unit_weight_norms=weights)
        elif found.norms is not None:
            members = rules.members(rule, found.norms.device)
            each, numels = found.norms[members], rules.numels(found.norms.device)[members]
            seen = replace(seen, parameter_norms=rounded(each), numels=numels.double())
        decision = rule.policy.decide(seen)
        if decision.clamp is not None:
            clipped = torch.full_like(own, math.nan)
        elif decision.each is not None and each is not None:
            clipped = norm.together(decision.each * each)
        else:
            clipped = own * decision.coef
        if decision.zero:
            clipped = clipped.where(is_finite, 0.0)
        return Ruling(rule, decision, own, clipped)

    def _told(self, total_norm: Tensor, is_finite: Tensor, rulings: Sequence[Ruling]) -> ClipResult:
        if len(rulings) == 1 and self._rules.is_single:
            coef, clipped = rulings[0].decision.coef, rulings[0].clipped_norm
        else:
            coef = torch.stack([ruling.decision.coef for ruling in rulings]).min()
            clipped = self._rules.norm.together(torch.stack([ruling.clipped_norm for ruling in rulings]))
        rest = [ruling.decision.threshold for ruling in rulings if ruling.rule.group is None]
        threshold = rest[0] if rest else torch.full_like(total_norm, math.inf)
        skipped = self._skipped(is_finite, [ruling.decision for ruling in rulings])
        groups = {
            ruling.rule.group.name: ruling.told() for ruling in rulings if ruling.rule.group is not None
        }
        return ClipResult(total_norm, coef, clipped, threshold, is_finite, coef < 1, skipped, groups)

    def _skipped(self, is_finite: Tensor, decisions: Sequence[Decision]) -> Tensor:
        skips = [decision.skip for decision in decisions if decision.skip is not None]
        if self._rules.clip.nonfinite == "skip":
            skips.append(~is_finite)
        return reduce(torch.logical_or, skips) if skips else self._never(is_finite)

    def _never(self, like: Tensor) -> Tensor:
        """False, made once."""
        if like.device not in self._no:
            self._no[like.device] = torch.zeros((), dtype=torch.bool, device=like.device)
        return self._no[like.device]

    # ---- gradients

    def apply(self, outcome: Outcome, measured: Measured) -> None:
        """Clip the local gradients in place, without a host read."""
        if outcome.decision is not None:
            apply(outcome.decision, measured)
            return
        gradients = measured.gradients()
        if any(self._multiplies(ruling) for ruling in outcome.rulings):
            self._scale_(outcome.rulings, gradients)
        for ruling in outcome.rulings:
            rule, decision = ruling.rule, ruling.decision
            if rule.units is not None and decision.each is not None:
                rule.units.scale_(gradients, decision.each)
            if decision.clamp is not None:
                mine = self._rules.shards_of(rule, len(gradients))
                kernels.clamp_(present(gradients[i] for i in mine), decision.clamp)
        if any(ruling.decision.zero for ruling in outcome.rulings):
            kernels.zero_unless_(present(gradients), outcome.result.is_finite)

    def _multiplies(self, ruling: Ruling) -> bool:
        """Whether parameters as wholes are multiplied."""
        return ruling.decision.may_clip and ruling.rule.units is None

    def _scale_(self, rulings: Sequence[Ruling], gradients: Sequence[Tensor | None]) -> None:
        coefs = []
        for ruling in rulings:
            decision, count = ruling.decision, len(ruling.rule.slots)
            if not self._multiplies(ruling):
                coefs.append(torch.ones_like(decision.coef).expand(count))
            else:
                coefs.append(decision.coef.expand(count) if decision.each is None else decision.each)
        mine = torch.cat(coefs)
        mine = mine[self._rules.places(mine.device)]
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if len(there) < len(gradients):
            mine = mine[there]
        kernels.scale_each_(present(gradients), mine)


def apply(decision: Decision, measured: Measured) -> None:
    """Multiply the local gradients by one coefficient, in place, without a host read."""
    if decision.may_clip:
        measured.scale_(decision.coef)
    if decision.zero:
        kernels.zero_unless_(present(measured.gradients()), measured.total_norm.isfinite())
