"""What one rank adds to the all-reduce so that every rank can read the statistics of single parameters.

The lanes of a `Detail` stand behind a measurement's own in the same vector. A sum has a lane for each
parameter of the model. What can't be added up has a lane for each row of the table, which only one rank
writes: there any reduction is a gather, so maxima are exact, and one sees whose they are. Under a maximum
(p = inf) all lanes are of that kind.

The cost is 8 bytes a lane, and one reading of the gradients, on the steps that ask for it. With n parameters
and r rows (ranks times the parameters that each holds a piece of) these are 2n + 2r lanes, n more with
weights, and n more for orders other than 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import ConfigError
from distnorm.measure.norms import Norm
from distnorm.payload.layers import LayerStats, grouped, layers_of
from distnorm.plan.model_table import MOST_ROWS, Ints, Table, first_device
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard


class Detail:
    """The lanes for one set of shards.

    Args:
        table: the model's parameters.
        shares: what this rank counts of each of its shards.
        norm: the configured norm.
        by: what a layer is: see `layers_of`.
        watch: whether layers are read; without it only the norms of parameters have lanes.
        weights: whether the local weights are handed in with the gradients.

    Raises:
        ConfigError: `by` is wrong; or the order, or the number of ranks, leaves no room for the lanes. The
            table is the same on every rank, and so is this error.
    """

    def __init__(
        self,
        table: Table,
        shares: Sequence[Share],
        norm: Norm,
        *,
        by: str | Sequence[str] = "parameter",
        watch: bool = True,
        weights: bool = False,
    ) -> None:
        if norm.width > 1:
            raise ConfigError(
                f"norm.type: expected an order up to 6.5, or inf, for norms of single parameters; "
                f"found {norm.order:g}"
            )
        self.table, self.norm = table, norm
        self._shares = tuple(shares)
        self._added = norm.op == "sum"
        if table.rows is None and not self._added:
            raise ConfigError(
                f"norm.type: expected a finite order for norms of single parameters of more than {MOST_ROWS} "
                f"shards, found {norm.order:g}"
            )
        self._layers = layers_of(table.names, by)
        self._lanes = self._laid_out(watch, weights)
        self._arrays = self._numbers()
        self._indices: dict[tuple[str, torch.device], Tensor] = {}  # the arrays, where they were needed

    def _numbers(self) -> dict[str, Ints]:
        members = np.array(self._layers.members, dtype=np.int64).reshape(-1, 2)
        members = members[members[:, 1].argsort(kind="stable")]
        numbers: dict[str, object] = {
            **{"slots": self.table.slots, "numels": self.table.numels},
            **{
                "members": members[:, 0],
                "sizes": np.bincount(members[:, 1], minlength=len(self._layers.names)),
            },
        }
        if (rows := self.table.rows) is not None:
            numbers |= {
                **{"mine": rows.mine, "firsts": rows.firsts, "by slot": rows.slots.argsort(kind="stable")},
                "holders": _counts(rows.slots, len(self.table.names)),
            }
        return {name: np.array(values, dtype=np.int64) for name, values in numbers.items()}

    def _laid_out(self, watch: bool, weights: bool) -> dict[str, slice]:
        by_parameter, rows = len(self.table.names), self.table.rows
        by_row = 0 if rows is None else len(rows.slots)
        added = by_parameter if self._added else by_row
        lanes = {"squares": added}
        if self._added and self.norm.kernel is not kernels.Kernel.SQUARES:
            lanes["statistic"] = added
        if watch:
            lanes["zeros"] = added
        if weights:
            lanes["weights"] = added
        if watch or not self._added:
            lanes["bad"] = by_row if rows is not None else by_parameter
            if rows is not None:
                lanes["largest"] = by_row
        stops = np.cumsum(list(lanes.values())).tolist()
        return {
            lane: slice(stop - size, stop) for (lane, size), stop in zip(lanes.items(), stops, strict=True)
        }

    @property
    def length(self) -> int:
        """Number of lanes."""
        return int(max(lane.stop for lane in self._lanes.values()))

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Of the layers, in the order of their statistics."""
        return self._layers.names

    def _is_by_row(self, lane: str) -> bool:
        return self.table.rows is not None and (not self._added or lane in ("bad", "largest"))

    # ---- this rank's summand

    def local(
        self,
        gradients: Sequence[Tensor | None],
        weights: Sequence[Tensor] | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """This rank's lanes, [length] fp64. No device is waited for.

        Args:
            gradients: of all shards, in their order: the whole local ones, of which the shares are read.
                Missing ones add nothing.
            weights: their parameters' local values, likewise, where the lanes are made for them.
            device: where the lanes are to be; default: where the first gradient is.
        """
        vector = torch.zeros(self.length, dtype=torch.float64, device=device or first_device(gradients))
        counted = self._cut(gradients)
        statistic, largest, zeros, bad = _by_tensor(counted, vector.device, _squares).unbind(dim=1)
        if not self._added:  # a maximum may lose a NaN, so it travels as a half of a bad element
            bad = bad + largest.isnan() * 0.5
            statistic, largest = (torch.where(x.isnan(), 0.0, x) for x in (statistic, largest))
        self._put(vector, "squares", statistic)
        self._put(vector, "largest", largest)
        self._put(vector, "zeros", zeros)
        self._put(vector, "bad", bad)
        if "statistic" in self._lanes:
            self._put(vector, "statistic", _by_tensor(counted, vector.device, self._statistics)[:, 0])
        if "weights" in self._lanes:
            assert weights is not None
            self._put(vector, "weights", _by_tensor(self._cut(weights), vector.device, _squares)[:, 0])
        return vector

    def _cut(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
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

    def _put(self, vector: Tensor, lane: str, of_shards: Tensor) -> None:
        if lane not in self._lanes:
            return
        lanes = vector[self._lanes[lane]]
        if self._is_by_row(lane):
            rows = self.table.rows
            assert rows is not None
            mine = of_shards[self._index("mine", vector.device)]
            lanes[rows.start : rows.start + len(rows.mine)] = mine
        else:
            lanes.index_add_(0, self._index("slots", vector.device), of_shards)

    # ---- what the ranks found together

    def read(self, reduced: Tensor) -> LayerStats:
        """What was found of the layers, on the device of the reduced lanes, [length] fp64; with `watch` only.

        It reads the same from a copy in the host's memory.
        """
        elements = self._of_layers(self._numels(reduced.device)).clamp_(min=1)
        squares = self._of_layers(self._sums(reduced, "squares"))
        largest = self._of_layers(self._largest(reduced), "max") if "largest" in self._lanes else None
        statistic = self._of_layers(self._sums(reduced, self._statistic)) if self._added else largest
        assert statistic is not None
        ratio = None
        if "weights" in self._lanes:
            weights = self._of_layers(self._sums(reduced, "weights"))
            ratio = torch.where(weights == 0, torch.nan, (squares / weights).sqrt())
        return LayerStats(
            norm=self.norm.finalise(statistic.view(1, -1)),
            rms=(squares / elements).sqrt(),
            zero_fraction=self._of_layers(self._sums(reduced, "zeros")) / elements,
            max=largest,
            grad_to_weight=ratio,
            bad=self._of_parameters("bad", reduced[self._lanes["bad"]].floor(), "sum"),
        )

    def parameter_norms(self, reduced: Tensor) -> Tensor:
        """The norm of each parameter of the whole model, [parameters] fp64."""
        statistic = self._sums(reduced, self._statistic) if self._added else self._largest(reduced)
        return self.norm.finalise(statistic.view(1, -1))

    def parameter_rms(self, reduced: Tensor) -> Tensor:
        """The root of the mean square of each parameter of the whole model, [parameters] fp64."""
        return (self._sums(reduced, "squares") / self._numels(reduced.device).clamp(min=1)).sqrt()

    def first_bad(self, reduced: Tensor) -> tuple[str, int | None] | None:
        """The first parameter with an element that is not finite, and the lowest rank that counted one.

        Args:
            reduced: [length], in the host's memory, of lanes with `watch`.

        Returns:
            `None` if all are finite; the rank is `None` where the table has no rows.
        """
        found = np.flatnonzero(reduced[self._lanes["bad"]].numpy())
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
        return "statistic" if "statistic" in self._lanes else "squares"

    def _sums(self, reduced: Tensor, lane: str) -> Tensor:
        """[parameters] of sums over the model. For p = inf replicas don't share, and the first one counts."""
        lanes = reduced[self._lanes[lane]]
        if self._added:
            return lanes
        assert self.table.rows is not None
        firsts = self._index("firsts", lanes.device).bool()
        sums = self._of_parameters(lane, torch.where(firsts, lanes, 0.0), "sum")
        return self._with_nan(sums, reduced) if lane == "squares" else sums

    def _largest(self, reduced: Tensor) -> Tensor:
        largest = self._of_parameters("largest", reduced[self._lanes["largest"]], "max")
        return largest if self._added else self._with_nan(largest, reduced)

    def _with_nan(self, values: Tensor, reduced: Tensor) -> Tensor:
        bad = reduced[self._lanes["bad"]]
        has_nan = self._of_parameters("bad", bad - bad.floor(), "max") > 0
        return torch.where(has_nan, torch.nan, values)

    def _of_parameters(self, lane: str, values: Tensor, how: str) -> Tensor:
        if not self._is_by_row(lane):
            return values
        assert self.table.rows is not None
        by_slot = values[self._index("by slot", values.device)]
        return grouped(by_slot, self._index("holders", values.device), how)

    def _of_layers(self, values: Tensor, how: str = "sum") -> Tensor:
        members = values[self._index("members", values.device)]
        return grouped(members, self._index("sizes", values.device), how)

    def _numels(self, device: torch.device) -> Tensor:
        return self._index("numels", device).double()

    def _index(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._indices:
            self._indices[name, device] = torch.from_numpy(self._arrays[name]).to(device)
        return self._indices[name, device]


def _counts(groups: Ints, count: int) -> Ints:
    return np.bincount(groups, minlength=count)


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


class ParameterStatistics(Detail):
    """The statistics with the shards whose weights are read."""

    def __init__(
        self,
        table: Table,
        shards: Sequence[GradShard],
        shares: Sequence[Share],
        norm: Norm,
        *,
        by: str | Sequence[str],
        weights: bool,
    ) -> None:
        super().__init__(table, shares, norm, by=by, weights=weights)
        self._held = tuple(shards)

    def local(  # type: ignore[override]
        self, gradients: Sequence[Tensor | None], device: torch.device
    ) -> Tensor:
        return super().local(gradients, [shard.witness() for shard in self._held], device)
