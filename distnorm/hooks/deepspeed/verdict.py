"""One norm and one decision a step, from gradients that are still scaled by the loss scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distnorm import kernels
from distnorm.config import Config, load_config
from distnorm.errors import ConfigError, DistnormError, NonFiniteGradientError
from distnorm.monitor import Monitor
from distnorm.plan.collectives import Ranks
from distnorm.policies import Decision, policy_of
from distnorm.policies.deciding import Outcome
from distnorm.policies.groups import PolicyGroups
from distnorm.policies.results import ClipResult
from distnorm.sources import UNDECLARED
from distnorm.sources.shards import GradShard
from distnorm.step import Step


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done with one step's gradients.

    Args:
        result: what the caller gets.
        decision: threshold and coefficient, of the unscaled norm.
        loss_scale: what the gradients were multiplied by at backward.
        skips: whether the step does not happen.
        error: what is raised once the engine has put the step behind it.
    """

    result: ClipResult
    decision: Decision
    loss_scale: float
    skips: bool
    error: NonFiniteGradientError | None

    def rescale_(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the loss scale and clip them, in place, in one multiplication, and memory that
        some of them share once."""
        memory = kernels.once([kernels.memory_of(gradient) for gradient in gradients])
        if self.decision.may_clip or self.loss_scale != 1:
            kernels.scale_(memory, self.decision.coef / self.loss_scale)
        if self.decision.zero_unless is not None:
            kernels.zero_unless_(memory, self.decision.zero_unless)


class EngineClipper:
    """Clips an engine's gradients, which can be measured only as the engine's own step begins.

    It is the `clipper` of an engine's `Handle`, with those members of `GradClipper` that make sense there.

    Args:
        shards: what this rank holds.
        config: as for `GradClipper`.
        group: as for `GradClipper`.

    Raises:
        ConfigError: the configuration asks for what an engine's step can't do; the key is named.
    """

    def __init__(
        self,
        shards: list[GradShard],
        config: str | Path | Mapping[str, Any] | Config | None,
        group: ProcessGroup | None,
    ) -> None:
        ranks = Ranks(group)
        with ranks.together():
            self.config = load_config(config)
            _check(self.config)
            self._step = Step(self.config, ranks, UNDECLARED, waits=("raise", "raise_now"))
        self._shards = shards
        self._step.plan(lambda: (shards, [(shard.name, shard.holder) for shard in shards]), ())

    @property
    def last(self) -> ClipResult | None:
        """The newest step's result, or `None` before the first."""
        return self._step.last

    @property
    def monitor(self) -> Monitor | None:
        """As `GradClipper.monitor`."""
        return None if self._step.monitor is None else self._step.monitor.monitor

    @property
    def rules(self) -> PolicyGroups:
        """What decides."""
        return self._step.groups

    @property
    def parameters(self) -> list[Tensor]:
        """The module's parameters that this rank holds pieces of."""
        return [shard.holder for shard in self._shards]

    def note(self, *, loss: Tensor | float | None = None, tokens: int | None = None, **facts: float) -> None:
        """As `GradClipper.note`."""
        self._step.note(loss, tokens, facts)

    def flush(self, **facts: Any) -> dict[str, Any] | None:
        """As `GradClipper.flush`."""
        return None if self._step.monitor is None else self._step.monitor.flush(facts)

    def close(self) -> None:
        """As `GradClipper.close`."""
        self._step.close()

    def state_dict(self) -> dict[str, Any]:
        """As `GradClipper.state_dict`."""
        return self._step.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `GradClipper.load_state_dict`."""
        self._step.load_state_dict(state)

    def __repr__(self) -> str:
        return f"EngineClipper({len(self._shards)} pieces, {self._step.describe()})"

    def judge(self, loss_scale: float, *, is_scaled: bool) -> Verdict:
        """Measure this step's gradients and decide. Collective: every rank must call it.

        Args:
            loss_scale: what the gradients were multiplied by.
            is_scaled: whether the loss is scaled at all: then a step whose norm is not finite never happens,
                whatever `clip.nonfinite` says, since it is the scale that has to change.

        Raises:
            DistnormError: a gradient can't be measured, or the process group was destroyed; on every rank.
        """
        step, before = self._step, self._step.count
        if not step.ranks.is_current:
            raise DistnormError(
                "expected the process group that the engine was attached with, found that it was destroyed; "
                "make the engine anew, attach, and give the new handle's clipper the state of this one"
            )
        error: NonFiniteGradientError | None = None
        try:
            outcome = step.take((), scales=False, loss_scale=loss_scale)
        except NonFiniteGradientError as caught:  # by monitor.stop_after the step has been made
            error, made = caught, step.outcome
            if step.count > before and made is not None:
                outcome = made
            else:
                outcome = _make_not_finite(step, caught.total_norm, loss_scale)
        result = outcome.result
        assert outcome.decision is not None
        skips = (is_scaled or self.config.clip.nonfinite in _SKIPPING) and not bool(result.is_finite)
        skips = skips or (step.groups.may_skip and bool(result.skipped))
        return Verdict(result, outcome.decision, loss_scale, skips, error)


def _make_not_finite(step: Step, total_norm: float, loss_scale: float) -> Outcome:
    """Count a step whose measurement raised since its norm is not finite: an engine goes on with it."""
    number = kernels.on_device([total_norm], step.ranks.reduce_device(kernels.HOST))[0]
    payload = step.groups.payload  # it can only be a loss here, which doesn't count in such a step
    nothing = None if payload is None else torch.ones_like(number).expand(payload.length)
    with kernels.Untracked():
        outcome = step.decider.decide(number / loss_scale, nothing)
    step.made(step.count + 1, outcome)
    return outcome


_SKIPPING = ("skip", "raise", "raise_now")


def _check(config: Config) -> None:
    """Refuse a configuration that an engine's step can't do."""
    clip = config.clip
    if clip.apply == "optimizer" or clip.overlap:
        raise ConfigError(
            "clip: expected apply auto or scale, and overlap false, with a DeepSpeed engine, whose step "
            f"holds and scales the gradients; found apply {clip.apply} and overlap "
            f"{str(clip.overlap).lower()}"
        )
    if clip.groups:
        raise ConfigError(
            "clip.groups: expected none with a DeepSpeed engine, whose step scales all gradients alike; "
            f"found {len(clip.groups)}"
        )
    if (policy := policy_of(clip)).reads != "total":
        raise ConfigError(
            "clip.policy: expected one that goes by the total norm with a DeepSpeed engine, whose step "
            f"scales all gradients alike; found {policy.name}"
        )
