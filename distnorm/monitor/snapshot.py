"""The layer snapshot: what a monitored step adds to its all-reduce, and the rows that come out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm.config import MonitorConfig
from distnorm.measure.exchange import Payload
from distnorm.measure.norms import Norm
from distnorm.monitor.records import LayerRow
from distnorm.payload.noise import NoiseScalePayload
from distnorm.payload.parameters import ParameterStatistics
from distnorm.payload.payload import PayloadParts
from distnorm.payload.replicas import Divergence, ReplicaChecksums
from distnorm.plan.collectives import Ranks
from distnorm.plan.model_table import make_model_table
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard


@dataclass(frozen=True, slots=True)
class SnapshotRows:
    """What one snapshot found.

    Args:
        layers: a row for each layer, in the order of the model.
        first_nonfinite: the first parameter with an element that isn't finite, and a rank that holds one.
        divergences: parameters whose replicas differ.
        own_squares: the mean over ranks of the squared norm of their own gradients, before the reduction.
    """

    layers: tuple[LayerRow, ...]
    first_nonfinite: tuple[str, int | None] | None
    divergences: tuple[Divergence, ...]
    own_squares: float | None


class LayerSnapshot:
    """The payload of a monitored step, for one set of shards.

    Collective: every rank must make one, with the shards of one plan.

    Args:
        config: what a layer is, and whether replicas are compared.
        ranks: who takes part.
        norm: the configured norm.
        shards: what this rank holds.
        shares: what it counts of each.
        noise: the payload of the noise scale, or `None` on all ranks.

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
        self._statistics = ParameterStatistics(table, shards, shares, norm, by=config.by, weights=True)
        self._checksums = ReplicaChecksums(table) if config.replicas else None
        self._noise = noise
        parts: tuple[Payload | None, ...] = (self._statistics, self._checksums, noise)
        self._parts = PayloadParts([part for part in parts if part is not None])

    @property
    def length(self) -> int:
        """Number of fp64 values, the same on every rank."""
        return self._parts.length

    @property
    def data_ranks(self) -> int:
        """How many ranks the noise scale compares; 0 where there is none."""
        return 0 if self._noise is None else self._noise.replicas

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """This rank's values, [length] fp64 on the device, of its gradients in the order of the shards."""
        return self._parts.local(gradients, device)

    def read(self, reduced: Tensor, loss_scale: float = 1.0) -> SnapshotRows:
        """What the reduced values say, [length] fp64 in the host's memory, of gradients without the scale."""
        of_layers, *others = self._parts.split(reduced)
        found = self._statistics.read(of_layers)
        unknown = [None] * len(self._statistics.layer_names)
        columns = (
            (found.norm / loss_scale).tolist(),
            (found.rms / loss_scale).tolist(),
            unknown if found.max is None else (found.max / loss_scale).tolist(),
            found.zero_fraction.tolist(),
            unknown if found.grad_to_weight is None else (found.grad_to_weight / loss_scale).tolist(),
        )
        layers = tuple(
            LayerRow(layer, norm, rms, largest, zeros, _known(ratio, norm))
            for layer, norm, rms, largest, zeros, ratio in zip(
                self._statistics.layer_names, *columns, strict=True
            )
        )
        divergences = () if self._checksums is None else self._checksums.diverged(others[0])
        own_squares = None if self._noise is None else float(others[-1].numpy()[0])
        return SnapshotRows(layers, self._statistics.first_bad(of_layers), divergences, own_squares)


def _known(ratio: float | None, norm: float) -> float | None:
    """The ratio to weights; `None` where all weights are zero or unread, and so there is none."""
    return None if ratio is not None and math.isnan(ratio) and not math.isnan(norm) else ratio
