"""The policies of one clipper: one for each of `clip.groups`, and one for all other parameters.

A single policy of the total norm adds nothing to the all-reduce, needs no list of the model's parameters, and
leaves one coefficient. Groups and policies that need more add a payload to the all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distnorm import kernels
from distnorm.config import ClipConfig, GroupConfig
from distnorm.errors import ConfigError, DistnormError
from distnorm.measure.exchange import Payload
from distnorm.measure.gradients import Coefficients
from distnorm.measure.norms import Norm
from distnorm.payload.parameters import ParameterStatistics
from distnorm.payload.payload import LossPayload, PayloadParts
from distnorm.payload.units import UnitStatistics
from distnorm.plan.collectives import Ranks
from distnorm.plan.model_table import make_model_table
from distnorm.plan.plan import Share
from distnorm.policies.factory import policy_of
from distnorm.policies.ownership import Ownership
from distnorm.policies.policy import Policy
from distnorm.sources.shards import GradShard

_AGC_ORDER = 2
_KINDS_OF_COEFFICIENTS = {
    "parameters": "has a coefficient for each parameter",
    "units": "has a coefficient for each output unit",
    "nothing": "multiplies nothing",
}


@dataclass(slots=True)
class PolicyGroup:
    """A policy and the parameters that it is for.

    Args:
        index: its place among the groups, of which the last is the one of all other parameters.
        policy: what decides.
        config: its group's; `None`: it is for the parameters in no group.
        applies: whether there are any parameters of its own.
        units: their output units, for a policy that reads these.
    """

    index: int
    policy: Policy
    config: GroupConfig | None
    applies: bool = True
    units: UnitStatistics | None = None

    @property
    def goes_by_whole(self) -> bool:
        """Whether its policy is given the norm of the whole model, though it has parameters of its own."""
        return self.config is not None and self.config.norm == "shared"


class PolicyGroups:
    """What decides, and what has to be measured for it.

    Args:
        clip: the configuration.
        norm: the configured norm.
        ranks: who takes part.

    Attributes:
        groups: those of `clip.groups`, in their order, and last the one of all other parameters.
        loss: the payload of the loss, for policies that use it.
        payload: what policies add to the all-reduce; `None` if nothing.
        is_single: whether there is one policy for all parameters.
        obstacle: why one coefficient of the total norm isn't all that is decided; `None` if it is.
        measures: whether any norm is needed.
        may_skip: whether a step may have to be skipped.
        statistics: the norms of single parameters, where they are needed.
        ownership: which parameters are whose, where that matters.

    Raises:
        ConfigError: a policy doesn't go with the norm.
    """

    @kernels.plain_operators()  # the policies' state is real in a dry run too
    def __init__(self, clip: ClipConfig, norm: Norm, ranks: Ranks) -> None:
        self.clip, self.norm = clip, norm
        self.groups = self._new_groups()
        for group in self.groups:
            if group.policy.reads == "units" and norm.order != _AGC_ORDER:
                raise ConfigError(
                    f"clip.policy: expected norm.type {_AGC_ORDER} under policy {group.policy.name}, which "
                    f"goes by the 2-norms of output units; found {norm.order:g}"
                )
        self.is_single, self.obstacle = not clip.groups, self._obstacle()
        self.measures = not self.is_single or self.default.reads != "nothing"
        spikes = any(group.policy.name == "skip_spikes" for group in self.groups)
        self.may_skip = spikes or clip.nonfinite == "skip"
        self.loss = LossPayload(ranks, norm.op)
        self.payload: PayloadParts | None = None
        self.statistics: ParameterStatistics | None = None
        self.ownership: Ownership | None = None

    def _new_groups(self) -> list[PolicyGroup]:
        configs = [*self.clip.groups, None]
        return [PolicyGroup(i, policy_of(self.clip, config), config) for i, config in enumerate(configs)]

    @property
    def default(self) -> Policy:
        """The policy of the parameters in no group."""
        return self.groups[-1].policy

    @property
    def coefficients(self) -> Coefficients:
        """What has coefficients of its own."""
        if any(group.policy.reads == "units" for group in self.groups):
            return "of units"
        return "one" if self.obstacle is None else "of parameters"

    def _obstacle(self) -> str | None:
        if self.clip.groups:
            return "clip.groups, which have coefficients of their own"
        kind = _KINDS_OF_COEFFICIENTS.get(self.default.reads)
        return kind and f"policy {self.default.name}, which {kind}"

    def max_norm(self, group: PolicyGroup) -> float:
        """The configured max norm of a group, inf where there is none."""
        if group.policy.reads == "nothing":  # its bound is that of elements
            return math.inf
        value = self.clip.max_norm if group.config is None else group.config.max_norm
        return math.inf if value is None else value

    @kernels.plain_operators()
    def bind(self, ranks: Ranks, shards: Sequence[GradShard], shares: Sequence[Share]) -> None:
        """Bind every group to its parameters, after every planning. Collective.

        Raises:
            ConfigError: a pattern matches no parameter, or two groups the same one; on every rank.
            UnsupportedGradientError: a policy can't read a shard; on every rank.
            DistnormError: a state that was loaded is of other parameters; on every rank.
        """
        parts: list[Payload] = []
        reads = {group.policy.reads for group in self.groups}
        by_parameter = not self.is_single or "parameters" in reads
        if by_parameter or "units" in reads:
            table = make_model_table(ranks, shards, shares)
            self.ownership = ownership = Ownership(table, self.clip.groups, is_whole=not ranks.is_simulated)
            if by_parameter:
                self.statistics = ParameterStatistics(table, shards, shares, self.norm, layers=False)
                parts.append(self.statistics)
            for group in self.groups:
                group.applies = self.is_single or bool(ownership.names(group.index))
                if group.policy.reads == "units":
                    names = frozenset(ownership.names(group.index))
                    group.units = UnitStatistics(ranks, table, shards, shares, names)
                    parts.append(group.units)
            self._bind_policies(ranks, ownership)
        if any(group.policy.wants_loss for group in self.groups):
            parts.append(self.loss)
        self.payload = PayloadParts(parts) if parts else None

    def _bind_policies(self, ranks: Ranks, ownership: Ownership) -> None:
        with ranks.together():
            for group in self.groups:
                group.policy.bind(ownership.names(group.index))

    # ---- what a checkpoint needs

    @kernels.plain_operators()
    def state_dict(self) -> dict[str, Any]:
        """The policies' states, of numbers, strings and lists."""
        states = {group.config.name: group.policy.state_dict() for group in self.groups if group.config}
        return {"policy": self.default.state_dict(), "groups": states}

    @kernels.plain_operators()
    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a `state_dict`, or begin anew; if it doesn't fit, nothing has changed.

        Raises:
            DistnormError: it is of other policies, groups or parameters.
        """
        fresh = self._new_groups()
        if state is not None:
            _fill(fresh, state)
        if self.ownership is not None:
            for new in fresh:
                new.policy.bind(self.ownership.names(new.index))
        for new, group in zip(fresh, self.groups, strict=True):
            group.policy.take_over(new.policy)


def _fill(fresh: Sequence[PolicyGroup], state: Mapping[str, Any]) -> None:
    states = state.get("groups")
    names = {group.config.name for group in fresh if group.config}
    if not isinstance(states, Mapping) or set(states) != names:
        found = sorted(map(str, states)) if isinstance(states, Mapping) else states
        raise DistnormError(f"expected the states of the groups {sorted(names)}, found {found!r}")
    for group in fresh:  # every policy checks its own part of the state
        group.policy.load_state_dict(states[group.config.name] if group.config else state.get("policy", {}))
