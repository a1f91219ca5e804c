"""Where the values of single parameters stand in a payload.

A column that is added up over ranks has a value for each parameter of the model. What can't be added up has a
value for each row of the model's table, which only one rank writes: there any reduction is a gather, so
maxima are exact, and one sees whose they are. Under a maximum (p = inf) all columns are of that kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
from torch import Tensor

from distnorm.payload.indices import Indices
from distnorm.payload.layers import grouped
from distnorm.plan.model_table import ModelTable


class Columns:
    """Named columns, one behind the other.

    Args:
        table: the model's parameters.
        by_row: for each column, whether it has a value for each row of the table, or for each parameter.

    Attributes:
        length: number of values of all columns.
    """

    def __init__(self, table: ModelTable, by_row: Mapping[str, bool]) -> None:
        self._rows, self._by_row = table.rows, by_row
        rows = 0 if table.rows is None else len(table.rows.slots)
        sizes = [rows if is_by_row else len(table.names) for is_by_row in by_row.values()]
        starts = [0, *accumulate(sizes)]
        self.length = starts[-1]
        self._slices = {
            name: slice(start, start + size) for name, start, size in zip(by_row, starts, sizes, strict=False)
        }
        self._indices = Indices()
        self._indices["slots"] = table.slots
        if table.rows is not None:
            self._indices["mine"] = table.rows.mine
            self._indices["by slot"] = table.rows.slots.argsort(kind="stable")
            self._indices["holders"] = np.bincount(table.rows.slots, minlength=len(table.names))
            self._indices["firsts"] = table.rows.firsts.astype(np.int64)

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def of(self, vector: Tensor, name: str) -> Tensor:
        """One column, a view."""
        return vector[self._slices[name]]

    def put(self, vector: Tensor, name: str, of_shards: Tensor) -> None:
        """Write what was found of this rank's shards, [shards], if there is such a column."""
        if name not in self:
            return
        column = self.of(vector, name)
        if self._by_row[name]:
            assert self._rows is not None
            mine = of_shards[self._indices.at("mine", vector)]
            column[self._rows.start : self._rows.start + len(mine)] = mine
        else:
            column.index_add_(0, self._indices.at("slots", vector), of_shards)

    def by_parameter(self, values: Tensor, name: str, how: str) -> Tensor:
        """[parameters] the ``sum`` or ``max`` of a column's values, or of others in their order."""
        if not self._by_row[name]:
            return values
        by_slot = values[self._indices.at("by slot", values)]
        return grouped(by_slot, self._indices.at("holders", values), how)

    def is_first(self, like: Tensor) -> Tensor:
        """[rows] whether the row is that of the first of its replicas."""
        return self._indices.at("firsts", like).bool()
