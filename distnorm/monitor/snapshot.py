"""A look at single layers: what it adds to one step's all-reduce, and what the reply says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm.config import MonitorConfig
from distnorm.measure.exchange import Lanes
from distnorm.measure.norms import Norm
from distnorm.monitor import LayerRow
from distnorm.payload.noise import NoiseScalePayload
from distnorm.payload.parameters import ParameterStatistics
from distnorm.payload.payload import PayloadParts
from distnorm.payload.replicas import Divergence, ReplicaChecksums
from distnorm.plan.collectives import Ranks
from distnorm.plan.model_table import make_model_table
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard


@dataclass(frozen=True, slots=True)
class Findings:
    """What one look found.

    Args:
        rows: of all layers, in model order.
        first_bad: the first parameter with an element that isn't finite, and a rank that counted one.
        diverged: parameters whose replicas differ.
        small: the mean over ranks of the squared norm of their own gradients, before these were reduced.
    """

    rows: tuple[LayerRow, ...]
    first_bad: tuple[str, int | None] | None
    diverged: tuple[Divergence, ...]
    small: float | None


class Look:
    """The lanes of a monitored step, for one set of shards; the same number on every rank.

    Collective: every rank must make one, with the shards of one plan.

    Args:
        config: what a layer is, and whether replicas are compared.
        ranks: who takes part.
        norm: the configured norm.
        shards: what this rank holds.
        shares: what it counts of each.
        noise: a lane of its own, or `None` on all ranks.

    Raises:
        ConfigError: on every rank; see `ParameterStatistics` and `ReplicaChecksums`.
    """

    def __init__(
        self,
        config: MonitorConfig,
        ranks: Ranks,
        norm: Norm,
        shards: Sequence[GradShard],
        shares: Sequence[Share],
        noise: NoiseScalePayload | None = None,
    ) -> None:
        table = make_model_table(ranks, shards, shares)
        self._detail = ParameterStatistics(table, shards, shares, norm, by=config.by, weights=True)
        self._replicas = ReplicaChecksums(table) if config.replicas else None
        self.noise = noise
        parts: list[Lanes] = [self._detail]
        parts += [part for part in (self._replicas, noise) if part is not None]
        self._lanes = PayloadParts(parts)

    @property
    def length(self) -> int:
        """Number of lanes."""
        return self._lanes.length

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """This rank's lanes, [length] fp64."""
        return self._lanes.local(gradients, device)

    def read(self, reduced: Tensor, loss_scale: float = 1.0) -> Findings:
        """What the reduced lanes say, [length] fp64 in the host's memory, of gradients without the scale."""
        lanes, *others = self._lanes.split(reduced)
        stats = self._detail.read(lanes)
        nothing = [None] * len(self._detail.layer_names)
        columns = (
            (stats.norm / loss_scale).tolist(),
            (stats.rms / loss_scale).tolist(),
            nothing if stats.max is None else (stats.max / loss_scale).tolist(),
            stats.zero_fraction.tolist(),
            nothing if stats.grad_to_weight is None else (stats.grad_to_weight / loss_scale).tolist(),
        )
        rows = tuple(
            LayerRow(layer, norm, rms, largest, zeros, _known(ratio, norm))
            for layer, norm, rms, largest, zeros, ratio in zip(
                self._detail.layer_names, *columns, strict=True
            )
        )
        diverged = () if self._replicas is None else self._replicas.diverged(others[0])
        small = None if self.noise is None else float(others[-1].numpy()[0])
        return Findings(rows, self._detail.first_bad(lanes), diverged, small)


def _known(ratio: float | None, norm: float) -> float | None:
    """The ratio to weights; `None` where these are all zero, and so there is none."""
    return None if ratio is not None and math.isnan(ratio) and not math.isnan(norm) else ratio
