"""One norm and one decision a step, from gradients that still bear the loss scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distnorm import kernels, policies
from distnorm.clipper import ClipResult, GradClipper, clip_result
from distnorm.config import Config
from distnorm.errors import ConfigError, DistnormError, NonFiniteGradientError
from distnorm.policies import Decision
from distnorm.shards import GradShard


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
    """

    def __init__(
        self,
        shards: list[GradShard],
        config: str | Path | Mapping[str, Any] | Config | None,
        group: ProcessGroup | None,
    ) -> None:
        self._given = shards
        super().__init__([], config, group=group)
        if self.config.clip.apply == "optimizer" or self.config.clip.overlap:
            raise ConfigError(
                "clip: expected apply auto or scale, and overlap false, with a DeepSpeed engine, whose step "
                f"holds and scales the gradients; found apply {self.config.clip.apply} and overlap "
                f"{str(self.config.clip.overlap).lower()}"
            )

    def judge(self, loss_scale: float, *, is_scaled: bool) -> Verdict:
        """Measure this step's gradients and decide. Collective: every rank must call it.

        Args:
            loss_scale: what the gradients bear.
            is_scaled: whether the loss is scaled at all: then a step whose norm is not finite never happens,
                whatever `clip.nonfinite` says, since it is the scale that has to change.
        """
        mode = self.config.clip.nonfinite
        error: NonFiniteGradientError | None = None
        with torch.no_grad():
            try:
                scaled_norm = self._meter.measure((), lambda: self._shards).total_norm
            except NonFiniteGradientError as caught:
                error = caught
                found = caught.total_norm
                scaled_norm = torch.tensor(found, dtype=torch.float64, device=self._meter.ranks.device())
            total_norm = scaled_norm / loss_scale
            decision = policies.constant(total_norm, self._max_norm, mode)
            result = clip_result(total_norm, decision)
        self._steps += 1
        self.last = result
        skips = (is_scaled or mode in ("skip", "raise")) and not bool(result.is_finite)
        return Verdict(result, decision, loss_scale, skips, error)

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
