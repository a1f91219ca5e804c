"""The layer snapshot: what a monitored step adds to its all-reduce, and the rows that come out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm.config import MonitorConfig
from distnorm.measure.exchange import Payload
from distnorm.measure.norms import Norm
from distnorm.monitor.layer_numbers import derived, of_matrices, of_model, slice_rows
from distnorm.monitor.records import LayerRow
from distnorm.payload.finite_loss import LossFiniteness
from distnorm.payload.noise import NoiseScalePayload
from distnorm.payload.parameters import ParameterStatistics
from distnorm.payload.payload import PayloadParts
from distnorm.payload.products import Products, ProductStatistics
from distnorm.payload.replicas import Divergence, ReplicaChecksums
from distnorm.payload.slices import Slices
from distnorm.payload.spectral import SpectralNorms
from distnorm.plan.collectives import Ranks
from distnorm.plan.model_table import make_model_table
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard


@dataclass(frozen=True, slots=True)
class SnapshotRows:
    """What one snapshot found.

    Args:
        layers: a row for each layer, in the order of the model; then one for each slice.
        first_nonfinite: the first parameter with an element that isn't finite, and a rank that holds one.
        divergences: parameters whose replicas differ.
        own_squares: the mean over ranks of the squared norm of their own gradients, before the reduction.
        model: for the step's row: numbers of all parameters together, and whether losses are finite.
    """

    layers: tuple[LayerRow, ...]
    first_nonfinite: tuple[str, int | None] | None
    divergences: tuple[Divergence, ...]
    own_squares: float | None
    model: Mapping[str, float | bool | None]


class LayerSnapshot:
    """The payload of a monitored step, for one set of shards.

    Collective: every rank must make one, with the shards of one plan.

    Args:
        config: what a layer is, and what is measured besides.
        ranks: who takes part.
        norm: the configured norm.
        shards: what this rank holds.
        shares: what it counts of each.
        losses: has this rank's loss.
        noise: the payload of the noise scale, or `None` on all ranks.

    Raises:
        ConfigError: on every rank; see `ParameterStatistics`, `ReplicaChecksums`, `ProductStatistics`,
            `Slices` and `SpectralNorms`.
        UnsupportedGradientError: on every rank; see `Slices` and `SpectralNorms`.
    """

    def __init__(
        self,
        config: MonitorConfig,
        ranks: Ranks,
        norm: Norm,
        shards: Sequence[GradShard],
        shares: Sequence[Share],
        losses: LossFiniteness,
        noise: NoiseScalePayload | None = None,
    ) -> None:
        table = make_model_table(ranks, shards, shares)
        self._statistics = ParameterStatistics(table, shards, shares, norm, by=config.by, weights=True)
        self._checksums = ReplicaChecksums(table) if config.replicas else None
        self._losses, self._noise = losses, noise
        self._slices = Slices(ranks, table, shards, shares, config.slices) if config.slices else None
        self._products: ProductStatistics | None = None
        if config.cosines or config.updates or config.slices:
            self._products = ProductStatistics(
                table,
                shards,
                shares,
                norm,
                cosines=config.cosines,
                updates=config.updates,
                slices=self._slices,
            )
        self._spectral: SpectralNorms | None = None
        if config.spectral:
            self._spectral = SpectralNorms(
                ranks, table, shards, shares, norm, config.spectral, config.spectral_vectors
            )
        parts: tuple[Payload | None, ...] = (
            self._statistics,
            self._checksums,
            self._products,
            self._spectral,
            self._losses,
            noise,
        )
        self._parts = PayloadParts([part for part in parts if part is not None])

    @property
    def length(self) -> int:
        """Number of fp64 values, the same on every rank."""
        return self._parts.length

    @property
    def data_ranks(self) -> int:
        """How many ranks the noise scale compares; 0 where there is none."""
        return 0 if self._noise is None else self._noise.replicas

    def prepare_next(self, is_next: bool) -> None:
        """Get ready for the next step, whose update is still to come, if that is a monitored one."""
        if self._products is not None:
            self._products.keep(is_next)

    def advance(self, reduced: Tensor) -> None:
        """Take in what a step's values were reduced to, [length] fp64, for the next monitored step."""
        if self._spectral is not None:
            place = self._parts.place_of(self._spectral)
            self._spectral.advance(reduced[place])

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """This rank's values, [length] fp64 on the device, of its gradients in the order of the shards."""
        return self._parts.local(gradients, device)

    def read(self, reduced: Tensor, loss_scale: float = 1.0) -> SnapshotRows:
        """What the reduced values say, [length] fp64 in the host's memory, of gradients without the scale."""
        parts = iter(self._parts.split(reduced))
        of_layers = next(parts)
        divergences = () if self._checksums is None else self._checksums.diverged(next(parts))
        products, sliced = Products(), Products()
        if self._products is not None:
            products, sliced = self._products.read(next(parts))
        spectral = {} if self._spectral is None else self._spectral.read(next(parts))
        is_loss_finite = self._losses.read(next(parts))
        own_squares = None if self._noise is None else float(next(parts).numpy()[0])
        layers = self._layers(of_layers, products, spectral, loss_scale)
        if self._slices is not None:
            layers += slice_rows(self._slices, sliced, loss_scale)
        model: dict[str, float | bool | None] = {}
        if self._products is not None:
            model |= of_model(*self._statistics.squares(of_layers), products)
        if is_loss_finite is not None:
            model["loss_finite"] = is_loss_finite
        first = self._statistics.first_bad(of_layers)
        return SnapshotRows(tuple(layers), first, divergences, own_squares, model)

    def _layers(
        self, reduced: Tensor, products: Products, spectral: Mapping[int, float], loss_scale: float
    ) -> list[LayerRow]:
        statistics = self._statistics
        found = statistics.read(reduced)
        unknown = [None] * len(statistics.layer_names)
        columns = (
            (found.norm / loss_scale).tolist(),
            (found.rms / loss_scale).tolist(),
            unknown if found.max is None else (found.max / loss_scale).tolist(),
            found.zero_fraction.tolist(),
            unknown if found.grad_to_weight is None else (found.grad_to_weight / loss_scale).tolist(),
        )
        sums = {name: getattr(products, name) for name in Products.__slots__}
        by_layer = {name: None if of is None else statistics.by_layer(of) for name, of in sums.items()}
        squares = statistics.squares(reduced)
        grad, weight = map(statistics.by_layer, squares)
        more = derived(grad, weight, Products(**by_layer))
        more |= of_matrices(spectral, squares[1], statistics.members, len(unknown))
        return [
            LayerRow(
                layer,
                norm,
                rms,
                largest,
                zeros,
                _known(ratio, norm),
                **{key: values[i] for key, values in more.items()},
                of=None,
            )
            for i, (layer, norm, rms, largest, zeros, ratio) in enumerate(
                zip(statistics.layer_names, *columns, strict=True)
            )
        ]


def _known(ratio: float | None, norm: float) -> float | None:
    """The ratio to weights; `None` where all weights are zero or unread, and so there is none."""
    return None if ratio is not None and math.isnan(ratio) and not math.isnan(norm) else ratio
