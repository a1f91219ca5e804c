"""What follows the all-reduce of a step: the policies decide, and gradients are scaled."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.measure.gradients import Gradients
from distnorm.measure.reduced import ReducedStatistics, UnreadStatistics
from distnorm.policies.deciding import Decider, Outcome
from distnorm.policies.decision import EPS, Decision, is_finite
from distnorm.policies.fixed import Constant
from distnorm.policies.groups import PolicyGroups
from distnorm.policies.results import ClipResult


class Clipping:
    """Decides and scales, step after step. Nothing here is collective or waits for a device.

    Args:
        groups: the policies, and what they need.
        order: of the norm.

    Attributes:
        decider: asks the policies.
    """

    def __init__(self, groups: PolicyGroups, order: float) -> None:
        self.decider, self._groups, self._order = Decider(groups), groups, order
        self._terms: dict[tuple[float | None, bool], kernels.ClipTerms] = {}

    def __call__(
        self,
        gradients: Gradients,
        reduced: ReducedStatistics | UnreadStatistics,
        payload: Tensor | None,
        *,
        scales: bool,
        defers: bool,
        loss_scale: float,
    ) -> Outcome:
        """Decide about a step, and clip its gradients, in one kernel where the threshold is constant.

        Args:
            gradients: what was measured.
            reduced: what the all-reduce gave.
            payload: what `PolicyGroups.payload` was reduced to.
            scales: whether gradients are multiplied here.
            defers: whether a step whose norm is not finite is to be without effect: its gradients become
                zero, or the caller leaves it out.
            loss_scale: what gradients were multiplied by at backward; results are without it.

        Raises:
            DistnormError: as `Decider.decide`.
        """
        if scales and loss_scale == 1 and isinstance(reduced, UnreadStatistics):
            outcome = self._in_one_kernel(gradients, reduced, defers)
            if outcome is not None:
                return outcome
        norm = reduced.total_norm
        agreed = reduced.agreed if isinstance(reduced.agreed, Tensor) else None
        shown = norm if loss_scale == 1 else norm / loss_scale
        outcome, keep = self.decider.decide(shown, payload, agreed), None
        if defers:
            keep = is_finite(norm)
            outcome = _left_out(outcome, keep, norm, agreed)
        if scales:
            self.decider.apply(outcome, gradients, keep)
        return outcome

    def _in_one_kernel(self, gradients: Gradients, reduced: UnreadStatistics, defers: bool) -> Outcome | None:
        if self._groups.obstacle is not None or not isinstance(self._groups.default, Constant):
            return None
        key = (reduced.tolerance, defers)
        if key not in self._terms:
            self._terms[key] = kernels.ClipTerms(
                self._groups.max_norm(self._groups.groups[-1]),
                EPS,
                "leave out" if defers else self._groups.clip.nonfinite,
                reduced.packing.modulus,
                reduced.tolerance,
                self._order,
            )
        clipped = gradients.clip_(reduced.vector, self._terms[key])
        if clipped is None:
            return None
        decision = Decision(clipped.clip_coef, clipped.threshold)
        return Outcome(ClipResult(*clipped[1:]), decision, found=clipped.found)


def _left_out(outcome: Outcome, is_good: Tensor, norm: Tensor, agreed: Tensor | None) -> Outcome:
    result = replace(
        outcome.result,
        clipped_norm=outcome.result.clipped_norm.where(is_good, 0.0),
        skipped=outcome.result.skipped | ~is_good,
    )
    found = torch.stack([norm, torch.ones_like(norm) if agreed is None else agreed.to(norm.dtype)])
    return replace(outcome, result=result, found=found)
