"""The payload from which every rank reads the statistics of single parameters.

The cost is 8 bytes a value, and one reading of the gradients, on the steps that ask for it. With n parameters
and r rows (ranks times the parameters that each holds a piece of) these are 2n + 2r values, n more with
weights, and n more for orders other than 2.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import numpy as np
import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import ConfigError
from distnorm.measure.norms import Norm
from distnorm.payload.columns import Columns
from distnorm.payload.indices import Indices
from distnorm.payload.layers import LayerStats, grouped, layers_of
from distnorm.plan.model_table import MOST_ROWS, ModelTable
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard


class ParameterStatistics:
    """The payload of one set of shards: norms of parameters, and in monitored steps statistics of layers.

    Args:
        table: the model's parameters.
        shards: what this rank holds.
        shares: what this rank counts of each of its shards.
        norm: the configured norm.
        by: what a layer is: see `layers_of`.
        layers: whether layers are read; without it only norms of parameters are sent.
        weights: whether norms of weights are sent too. Those of frozen parameters, which may be of a kind
            that can't be read, are left out.

    Raises:
        ConfigError: `by` is wrong; or the order, or the number of ranks, leaves no room for the statistics.
            The table is the same on every rank, and so is this error.
    """

    def __init__(
        self,
        table: ModelTable,
        shards: Sequence[GradShard],
        shares: Sequence[Share],
        norm: Norm,
        *,
        by: str | Sequence[str] = "parameter",
        layers: bool = True,
        weights: bool = False,
    ) -> None:
        if norm.width > 1:
            raise ConfigError(
                f"norm.type: expected an order up to 6.5, or inf, for norms of single parameters; "
                f"found {norm.order:g}"
            )
        self._is_sum = norm.op == "sum"
        if table.rows is None and not self._is_sum:
            raise ConfigError(
                f"norm.type: expected a finite order for norms of single parameters of more than {MOST_ROWS} "
                f"shards, found {norm.order:g}"
            )
        self.table, self.norm = table, norm
        self._shards, self._shares = tuple(shards), tuple(shares)
        self._layers = layers_of(table.names, by)
        self._columns = self._laid_out(layers, weights)
        members = np.array(self._layers.members, dtype=np.int64).reshape(-1, 2)
        members = members[members[:, 1].argsort(kind="stable")]
        self._indices = Indices()
        self._indices["numels"] = table.numels
        self._indices["members"] = members[:, 0]
        self._indices["sizes"] = np.bincount(members[:, 1], minlength=len(self._layers.names))

    def _laid_out(self, layers: bool, weights: bool) -> Columns:
        by_row, has_rows = not self._is_sum, self.table.rows is not None
        columns = {"squares": by_row}
        if self._is_sum and self.norm.kernel is not kernels.Kernel.SQUARES:
            columns["statistic"] = by_row
        if layers:
            columns["zeros"] = by_row
        if weights:
            columns["weights"] = by_row
        if layers or by_row:
            columns["bad"] = has_rows
            if has_rows:
                columns["largest"] = True
        return Columns(self.table, columns)

    @property
    def length(self) -> int:
        """Number of values."""
        return self._columns.length

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Of the layers, in the order of their statistics."""
        return self._layers.names

    # ---- this rank's summand

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """This rank's values, [length] fp64. No device is waited for.

        Args:
            gradients: of all shards, in their order: the whole local ones, of which the shares are read.
                Missing ones add nothing.
            device: where the values are to be.
        """
        vector = torch.zeros(self.length, dtype=torch.float64, device=device)
        counted, count = self._counted(gradients), len(self._shards)
        read = list(counted)
        if "weights" in self._columns:  # together: on a GPU these are fewer launches
            read += self._counted(trained_weights(self._shards, gradients))
        measured = _by_tensor(read, device, _squares)
        statistic, largest, zeros, bad = measured[:count].unbind(dim=1)
        if not self._is_sum:  # a maximum may lose a NaN, so it travels as a half of a bad element
            bad = bad + largest.isnan() * 0.5
            statistic, largest = (torch.where(x.isnan(), 0.0, x) for x in (statistic, largest))
        found = {"squares": statistic, "largest": largest, "zeros": zeros, "bad": bad}
        if "statistic" in self._columns:
            found["statistic"] = _by_tensor(counted, device, self._statistics)[:, 0]
        if "weights" in self._columns:
            found["weights"] = measured[count:, 0]
        for column, of_shards in found.items():
            self._columns.put(vector, column, of_shards)
        return vector

    def _counted(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [
            tensor
            if tensor is None or s.stop - s.start == tensor.numel()
            else tensor.reshape(-1)[s.start : s.stop]
            for tensor, s in zip(tensors, self._shares, strict=True)
        ]

    def _statistics(self, tensors: Sequence[Tensor]) -> Tensor:
        if self.norm.kernel is not None:
            return kernels.summaries(tensors, self.norm.kernel)
        return torch.stack([self.norm.statistic([tensor], tensor.device) for tensor in tensors])

    # ---- what the ranks found together

    def read(self, reduced: Tensor) -> LayerStats:
        """What was found of the layers, on the device of the reduced values, [length] fp64; needs `layers`.

        It reads the same from a copy in the host's memory.
        """
        columns = self._columns
        elements = self._by_layer(self._numels(reduced)).clamp_(min=1)
        squares = self._by_layer(self._sums(reduced, "squares"))
        largest = self._by_layer(self._largest(reduced), "max") if "largest" in columns else None
        statistic = self._by_layer(self._sums(reduced, self._statistic)) if self._is_sum else largest
        assert statistic is not None
        ratio = None
        if "weights" in columns:
            weights = self._by_layer(self._sums(reduced, "weights"))
            ratio = torch.where(weights == 0, torch.nan, (squares / weights).sqrt())
        return LayerStats(
            norm=self.norm.finalise(statistic.view(1, -1)),
            rms=(squares / elements).sqrt(),
            zero_fraction=self._by_layer(self._sums(reduced, "zeros")) / elements,
            max=largest,
            grad_to_weight=ratio,
            bad=columns.by_parameter(columns.of(reduced, "bad").floor(), "bad", "sum"),
        )

    def parameter_norms(self, reduced: Tensor) -> Tensor:
        """The norm of each parameter of the whole model, [parameters] fp64."""
        statistic = self._sums(reduced, self._statistic) if self._is_sum else self._largest(reduced)
        return self.norm.finalise(statistic.view(1, -1))

    def squares(self, reduced: Tensor) -> tuple[Tensor, Tensor]:
        """The squared 2-norms of gradients and weights, [parameters] fp64 each; needs `weights`."""
        return self._sums(reduced, "squares"), self._sums(reduced, "weights")

    @property
    def members(self) -> tuple[tuple[int, int], ...]:
        """(parameter, layer) by their places."""
        return self._layers.members

    def by_layer(self, of_parameters: Tensor) -> Tensor:
        """[layers] the sums over the parameters of each layer."""
        return self._by_layer(of_parameters)

    def first_bad(self, reduced: Tensor) -> tuple[str, int | None] | None:
        """The first parameter with an element that is not finite, and the lowest rank that counted one.

        Args:
            reduced: [length], in the host's memory, with `layers`.

        Returns:
            `None` if all are finite; the rank is `None` where the table has no rows.
        """
        found = np.flatnonzero(self._columns.of(reduced, "bad").numpy())
        if not found.size:
            return None
        rows = self.table.rows
        if rows is None:
            return self.table.names[found[0]], None
        slots = rows.slots[found]
        row = found[slots.argmin()]  # the first of equals, and rows come by rank
        return self.table.names[slots.min()], int(rows.ranks[row])

    @property
    def _statistic(self) -> str:
        return "statistic" if "statistic" in self._columns else "squares"

    def _sums(self, reduced: Tensor, column: str) -> Tensor:
        """[parameters] of sums over the model. For p = inf replicas don't share, and the first one counts."""
        values = self._columns.of(reduced, column)
        if self._is_sum:
            return values
        firsts = torch.where(self._columns.is_first(values), values, 0.0)
        sums = self._columns.by_parameter(firsts, column, "sum")
        return self._with_nan(sums, reduced) if column == "squares" else sums

    def _largest(self, reduced: Tensor) -> Tensor:
        values = self._columns.of(reduced, "largest")
        largest = self._columns.by_parameter(values, "largest", "max")
        return largest if self._is_sum else self._with_nan(largest, reduced)

    def _with_nan(self, values: Tensor, reduced: Tensor) -> Tensor:
        bad = self._columns.of(reduced, "bad")
        has_nan = self._columns.by_parameter(bad - bad.floor(), "bad", "max") > 0
        return torch.where(has_nan, torch.nan, values)

    def _by_layer(self, values: Tensor, how: str = "sum") -> Tensor:
        members = values[self._indices.at("members", values)]
        return grouped(members, self._indices.at("sizes", values), how)

    def _numels(self, like: Tensor) -> Tensor:
        return self._indices.at("numels", like).double()


def trained_weights(
    shards: Sequence[GradShard], gradients: Sequence[Tensor | None], wanted: Container[int] | None = None
) -> list[Tensor | None]:
    """The local values of parameters: of frozen ones, which may not be readable, only with a gradient.

    Args:
        shards: what this rank holds.
        gradients: theirs.
        wanted: positions of the shards that are meant; default: all.
    """
    return [
        shard.witness()
        if (wanted is None or i in wanted) and (gradient is not None or shard.holder.requires_grad)
        else None
        for i, (shard, gradient) in enumerate(zip(shards, gradients, strict=True))
    ]


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    return kernels.summaries(tensors, kernels.Kernel.SQUARES)


def _by_tensor(
    tensors: Sequence[Tensor | None], device: torch.device, measure: Callable[[Sequence[Tensor]], Tensor]
) -> Tensor:
    """What `measure` gives of the tensors of each device, [tensors, ...]; zeros for missing ones."""
    parts = []
    for here in dict.fromkeys(t.device for t in tensors if t is not None):
        nothing = torch.empty(0, device=here)
        mine = [t if t is not None and t.device == here else nothing for t in tensors]
        parts.append(kernels.moved(measure(mine), device))
    if not parts:
        return torch.zeros(len(tensors), 4, dtype=torch.float64, device=device)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)
