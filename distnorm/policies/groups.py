"""The policies of one clipper: one for each of `clip.groups`, and one for all other parameters.

A single policy that goes by the total norm adds nothing to the all-reduce, needs no list of the model's
parameters, and leaves one coefficient, as if there were no policies. What looks closer adds lanes to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from distnorm.config import ClipConfig, GroupConfig
from distnorm.errors import ConfigError, DistnormError
from distnorm.measure.exchange import Lanes
from distnorm.measure.meter import Meter
from distnorm.measure.norms import Norm
from distnorm.payload.parameters import Detail
from distnorm.payload.payload import Joined, Loss, Part
from distnorm.payload.units import Units
from distnorm.plan.collectives import Ranks
from distnorm.plan.model_table import Table, make_table
from distnorm.policies import Policy, policy_of
from distnorm.sources.shards import GradShard

_SHOWN = 3
_AGC_ORDER = 2


@dataclass(slots=True)
class Rule:
    """A policy and the parameters that it is for.

    Args:
        policy: what decides.
        group: its group's config; `None`: it is for the parameters in no group.
        slots: places of its parameters in the table, ascending.
        names: their names.
        units: their output units, for a policy that reads these.
    """

    policy: Policy
    group: GroupConfig | None
    slots: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    units: Units | None = None

    applies: bool = True  # whether there are any of them

    @property
    def goes_by_whole(self) -> bool:
        """Whether its policy is told the norm of the whole model, though it has parameters of its own."""
        return self.group is not None and self.group.norm == "shared"


class Rules:
    """What decides, and what has to be measured for it.

    Args:
        clip: the configuration.
        norm: the configured norm.
        ranks: who takes part.

    Attributes:
        rules: those of the groups, in their order, and last the one of all other parameters.
        loss: what a policy may look at beside the gradients.
        is_single: whether there is one policy for all parameters.
        obstacle: why one coefficient of the total norm isn't all that is decided; `None` if it is.
        measures: whether any norm is needed.
        may_skip: whether a step may have to be skipped.
        detail: the norms of single parameters, where they are needed.
        table: the model's parameters, where they are needed.

    Raises:
        ConfigError: a policy doesn't go with the norm.
    """

    def __init__(self, clip: ClipConfig, norm: Norm, ranks: Ranks) -> None:
        self.clip, self.norm = clip, norm
        self.loss = Loss(ranks, norm.op)
        self.rules = self._made()
        for rule in self.rules:
            if rule.policy.reads == "units" and norm.order != _AGC_ORDER:
                raise ConfigError(
                    f"clip.policy: expected norm.type {_AGC_ORDER} under policy {rule.policy.name}, which "
                    f"goes by the 2-norms of output units; found {norm.order:g}"
                )
        self.is_single, self.obstacle = not clip.groups, self._obstacle()
        self.measures = not self.is_single or self.default.reads != "nothing"
        spikes = any(rule.policy.name == "skip_spikes" for rule in self.rules)
        self.may_skip = spikes or clip.nonfinite == "skip"
        self.detail: Detail | None = None
        self.table: Table | None = None
        self._lanes: Joined | None = None
        self._slots: Sequence[int] = ()
        self._copies: dict[tuple[str, torch.device], Tensor] = {}

    def _made(self) -> list[Rule]:
        groups = self.clip.groups
        rules = [Rule(policy_of(self.clip, group), group) for group in groups]
        return [*rules, Rule(policy_of(self.clip), None)]

    @property
    def default(self) -> Policy:
        """The policy of the parameters in no group."""
        return self.rules[-1].policy

    def _obstacle(self) -> str | None:
        if self.clip.groups:
            return "clip.groups, which have coefficients of their own"
        kinds = {
            "parameters": "has a coefficient for each parameter",
            "units": "has a coefficient for each output unit",
            "nothing": "multiplies nothing",
        }
        name, reads = self.default.name, self.default.reads
        return f"policy {name}, which {kinds[reads]}" if reads in kinds else None

    @property
    def lanes(self) -> Joined | None:
        """What has to travel with the total norm."""
        return self._lanes

    # ---- whose parameters are whose

    def bind(self, meter: Meter, shards: Sequence[GradShard]) -> None:
        """Learn which parameters there are; again whenever they are others. Collective.

        Raises:
            ConfigError: a pattern matches no parameter, or two groups the same one; on every rank.
            UnsupportedGradientError: a policy can't read a shard; on every rank.
            DistnormError: a state that was loaded is of other parameters; on every rank.
        """
        parts: list[Lanes] = []
        reads = {rule.policy.reads for rule in self.rules}
        by_parameter = not self.is_single or "parameters" in reads
        if by_parameter or "units" in reads:
            self.table = make_table(meter.ranks, shards, meter.shares)
            self._slots, self._copies = self.table.slots, {}
            self._share_out(self.table.names)
        if by_parameter:
            assert self.table is not None
            self.detail = detail = Detail(self.table, meter.shares, self.norm, watch=False)
            parts.append(Part(detail.length, lambda grads, device: detail.local(grads, device=device)))
        for rule in self.rules:
            if rule.policy.reads == "units":
                parts.append(self._units_of(rule, meter, shards))
        if any(rule.policy.wants_loss for rule in self.rules):
            parts.append(self.loss)
        self._lanes = Joined(parts) if parts else None
        if self.table is not None:
            self._bind_policies(meter.ranks)

    def _units_of(self, rule: Rule, meter: Meter, shards: Sequence[GradShard]) -> Part:
        assert self.table is not None
        units = Units(meter.ranks, self.table, shards, meter.shares, frozenset(rule.names))
        rule.units = units

        def local(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
            return units.local(gradients, [shard.witness() for shard in shards], device)

        return Part(units.length, local)

    def _share_out(self, names: Sequence[str]) -> None:
        owner: dict[int, Rule] = {}
        useless, twice = [], []
        for rule in self.rules[:-1]:
            assert rule.group is not None
            for pattern in rule.group.params:
                found = [slot for slot, name in enumerate(names) if fnmatchcase(name, pattern)]
                if not found:
                    useless.append(f"{pattern!r} of group {rule.group.name!r}")
                for slot in found:
                    other = owner.setdefault(slot, rule).group
                    if other is not None and other is not rule.group:
                        twice.append(f"{names[slot]!r} in {other.name!r} and {rule.group.name!r}")
        if useless:
            raise ConfigError(
                f"clip.groups: expected patterns that match parameters, found {_few(useless)}, which match "
                f"none; the model has {_few([repr(name) for name in names])}"
            )
        if twice:
            raise ConfigError(
                f"clip.groups: expected each parameter in one group at most, found {_few(twice)}"
            )
        rest = self.rules[-1]
        for rule in self.rules:
            rule.slots = tuple(i for i in range(len(names)) if owner.get(i, rest) is rule)
            rule.names = tuple(names[i] for i in rule.slots)
            rule.applies = bool(rule.slots) or self.is_single

    def _bind_policies(self, ranks: Ranks) -> None:
        error: DistnormError | None = None
        try:
            for rule in self.rules:
                rule.policy.bind(rule.names)
        except DistnormError as caught:
            error = caught
        ranks.raise_together(error)

    # ---- as indices, wherever the norms are

    def members(self, rule: Rule, device: torch.device) -> Tensor:
        """The places of a rule's parameters in the table."""
        return self._copy(f"members {self.rules.index(rule)}", rule.slots, device)

    def numels(self, device: torch.device) -> Tensor:
        """The number of elements of each parameter of the table."""
        assert self.table is not None
        return self._copy("numels", self.table.numels, device)

    def places(self, device: torch.device) -> Tensor:
        """For each of this rank's shards the place of its parameter among the members of all rules."""
        if ("places", device) in self._copies:  # every step asks, and there may be thousands
            return self._copies["places", device]
        place = {slot: i for i, slot in enumerate(slot for rule in self.rules for slot in rule.slots)}
        return self._copy("places", [place[slot] for slot in self._slots], device)

    def shards_of(self, rule: Rule, shards: int) -> list[int]:
        """Positions, among so many shards of this rank, of those of a rule's parameters."""
        slots = frozenset(rule.slots)
        if self.table is None:  # then there is one rule
            return list(range(shards))
        return [i for i, slot in enumerate(self._slots) if slot in slots]

    def _copy(self, name: str, values: Sequence[int], device: torch.device) -> Tensor:
        if (name, device) not in self._copies:
            self._copies[name, device] = torch.tensor(values, dtype=torch.int64).to(device)
        return self._copies[name, device]

    # ---- what a checkpoint needs

    def state_dict(self) -> dict[str, Any]:
        """The policies' states, of numbers, strings and lists."""
        groups = {rule.group.name: rule.policy.state_dict() for rule in self.rules if rule.group is not None}
        return {"policy": self.default.state_dict(), "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a `state_dict`, or begin anew; if it doesn't fit, nothing has changed.

        Raises:
            DistnormError: it is of other policies, groups or parameters.
        """
        fresh = self._made()
        if state is not None:
            self._fill(fresh, state)
        for new, rule in zip(fresh, self.rules, strict=True):
            if self.table is not None:
                new.policy.bind(rule.names)
        for new, rule in zip(fresh, self.rules, strict=True):
            rule.policy = new.policy

    def _fill(self, fresh: Sequence[Rule], state: Mapping[str, Any]) -> None:
        groups = state.get("groups")
        names = {rule.group.name for rule in fresh if rule.group is not None}
        if not isinstance(groups, Mapping) or set(groups) != names:
            found = sorted(map(str, groups)) if isinstance(groups, Mapping) else groups
            raise DistnormError(f"expected the states of the groups {sorted(names)}, found {found!r}")
        for rule in fresh:  # a policy refuses what is no state of its own
            rule.policy.load_state_dict(
                state.get("policy", {}) if rule.group is None else groups[rule.group.name]
            )


def _few(facts: Sequence[str]) -> str:
    more = len(facts) - _SHOWN
    return ", ".join(facts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def max_norm_of(rule: Rule, clip: ClipConfig) -> float:
    """The configured max norm of a rule, inf where there is none."""
    if rule.policy.reads == "nothing":  # its bound is that of elements
        return math.inf
    value = clip.max_norm if rule.group is None else rule.group.max_norm
    return math.inf if value is None else value
