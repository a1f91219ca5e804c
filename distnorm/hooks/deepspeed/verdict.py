"""One norm and one decision a step, from gradients that still bear the loss scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distnorm import kernels
from distnorm.clipper import GradClipper
from distnorm.config import Config
from distnorm.errors import ConfigError, DistnormError, NonFiniteGradientError
from distnorm.measure.readings import Measured
from distnorm.policies import Decision, policy_of
from distnorm.policies.results import ClipResult
from distnorm.sources.shards import GradShard


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done with one step's gradients.

    Args:
        result: what the caller is told.
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
        """Divide gradients by the loss scale and clip them, in place, in one multiplication."""
        if self.decision.may_clip or self.loss_scale != 1:
            kernels.scale_(gradients, self.decision.coef / self.loss_scale)
        if self.decision.zero:
            kernels.zero_unless_(gradients, self.result.is_finite)


class EngineClipper(GradClipper):
    """The clipper of an engine's gradients. They can be measured only as its step begins, so the engine does.

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
        self._given = shards
        super().__init__([], config, group=group)

    def _check(self) -> None:
        clip = self.config.clip
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

    def judge(self, loss_scale: float, *, is_scaled: bool) -> Verdict:
        """Measure this step's gradients and decide. Collective: every rank must call it.

        Args:
            loss_scale: what the gradients bear.
            is_scaled: whether the loss is scaled at all: then a step whose norm is not finite never happens,
                whatever `clip.nonfinite` says, since it is the scale that has to change.
        """
        mode, lanes = self.config.clip.nonfinite, self._lanes(store=True)
        error: NonFiniteGradientError | None = None
        with torch.no_grad():
            try:
                measured = self._meter.measure((), lambda: self._shards, more=lanes)
            except NonFiniteGradientError as caught:
                error, measured = caught, self._failed(caught)
            finally:
                self._rules.loss.forget()
            outcome = self._decider.decide(measured.total_norm / loss_scale, self._of_rules(measured.more))
            if error is None:
                try:
                    self._made(outcome.result, *self._found(measured), loss_scale)
                except NonFiniteGradientError as caught:  # by monitor.stop_after
                    error = caught
            else:
                self._steps, self.last = self._steps + 1, outcome.result
        result = outcome.result
        assert outcome.decision is not None
        skips = (is_scaled or mode in ("skip", "raise")) and not bool(result.is_finite)
        skips = skips or (self._rules.may_skip and bool(result.skipped))
        return Verdict(result, outcome.decision, loss_scale, skips, error)

    def _failed(self, error: NonFiniteGradientError) -> Measured:
        if self._watch is not None:
            self._watch.failed(self._steps + 1, error)
        device, lanes = self._meter.ranks.device(), self._rules.lanes
        norm = torch.tensor(error.total_norm, dtype=torch.float64, device=device)
        # A loss, which doesn't count in such a step.
        more = None if lanes is None else torch.ones(lanes.length, dtype=torch.float64, device=device)
        return Measured.of(norm, [], more)

    def clip(self) -> NoReturn:
        """Refused: the engine clips in its own step."""
        raise DistnormError("expected the engine's own step() to clip, found a call of clip()")

    def decide(self) -> NoReturn:
        """Refused, as `clip`."""
        raise DistnormError("expected the engine's own step() to clip, found a call of decide()")

    @property
    def parameters(self) -> list[Tensor]:
        return [shard.holder for shard in self._given]

    def measure(self) -> NoReturn:
        """Refused: the gradients are there only as the engine's step begins."""
        raise DistnormError("expected the engine's own step() to measure, found a call of measure()")

    def _read_target(self) -> tuple[list[GradShard], list[str]]:
        return self._given, [shard.name for shard in self._given]
