"""Statistics of single tensors, of their rows and of their samples on an NVIDIA GPU, of all tensors at once.

The tensors are some that `distnorm.kernels.gpu.fits` takes, all on one GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from distnorm.kernels.addresses import SIZES, AddressTable, Ints
from distnorm.kernels.device_table import DeviceTable, Resident, is_capturing, on
from distnorm.kernels.gpu import BLOCK, triton_code
from distnorm.kernels.native import Kernel

_REMEMBERED = 16  # tables of rows


@cache
def statistics_code() -> ModuleType:
    """The kernels. Triton is imported here."""
    return import_module("distnorm.kernels.gpu_statistics_code")


def summaries(table: DeviceTable, kernel: Kernel) -> Tensor:
    """Of each tensor: see `distnorm.kernels.summaries`."""
    gpu_code, code = triton_code(), statistics_code()
    total, count = len(table.rows), len(table.each)
    parts = torch.empty(4, total, dtype=torch.float64, device=table.device)
    out = torch.empty(count, 4, dtype=torch.float64, device=table.device)
    with on(table.device):
        table.ready()
        for kind, first, rows in table.kinds:
            dtype = gpu_code.DTYPES[kind]
            code.summary_parts[(rows,)](table.rows, first, total, parts, dtype, int(kernel), BLOCK)
        if count:
            code.summary_totals[(count,)](parts, total, table.each, out, int(kernel), BLOCK)
    return out


def samples(table: DeviceTable, signs: int) -> Tensor:
    """Of each tensor: see `distnorm.kernels.samples`. All of them are contiguous."""
    code = statistics_code()
    out = torch.empty(len(table.each), 2, dtype=torch.float64, device=table.device)
    # Chunks come dtype by dtype: where those of each begin, be there any or not.
    begin = [sum(rows for kind, _, rows in table.kinds if kind < of) for of in range(1, 4)]
    as_int64 = signs - (1 << 64) if signs >> 63 else signs
    with on(table.device):
        table.ready()
        if len(out):
            code.samples[(len(out),)](table.rows, table.each, *begin, out, as_int64)
    return out


class RowTable(Resident):
    """Where rows of contiguous tensors lie, as the kernels read it. It keeps no tensor alive.

    Args:
        tensors: each of at least one dim; an index along dim 0 is a row.

    Attributes:
        count: the number of rows of all of them.
        length: so many numbers have the rows and the parts of those that were cut.
        kinds: code, first program and number of programs of each dtype.
        overlap: whether some element is in two tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        whole = AddressTable.of(tensors)
        self.overlap = whole.overlap
        rows = np.array([len(tensor) for tensor in tensors], dtype=np.int64)
        self.count = int(rows.sum())
        table, cut, self.length, self.kinds = _laid_out(whole, rows)
        super().__init__(np.concatenate([table.reshape(-1), cut.reshape(-1)]), whole.device)
        self._table, self._cut = self.there[: table.size].view(-1, 5), self.there[table.size :].view(-1, 3)

    def squares(self) -> Tensor:
        """Of each row: see `distnorm.kernels.row_squares`."""
        from distnorm.kernels import gpu_code

        code = statistics_code()
        out = torch.empty(self.length, dtype=torch.float64, device=self.device)
        with on(self.device):
            self.ready()
            for kind, first, programs in self.kinds:
                code.row_squares[(programs,)](self._table, first, out, gpu_code.DTYPES[kind], BLOCK)
            if len(self._cut):
                code.row_totals[(len(self._cut),)](self._cut, out, BLOCK)
        return out[: self.count]

    def scale_(self, coefs: Tensor) -> None:
        """Multiply each row in place by its own of [count] coefficients, fp64 on the tables' device."""
        from distnorm.kernels import gpu_code

        code = statistics_code()
        with on(self.device):
            self.ready()
            for kind, first, programs in self.kinds:
                code.scale_rows[(programs,)](self._table, first, coefs, gpu_code.DTYPES[kind], BLOCK)


def _laid_out(whole: AddressTable, rows: Ints) -> tuple[Ints, Ints, int, list[tuple[int, int, int]]]:
    size, count = whole.chunk_size, rows.sum()
    widths = whole.numels // np.maximum(rows, 1)
    parts = np.maximum(-(-widths // size), 1)  # of each row: it is cut where they are several
    at_once = np.where(parts > 1, 1, size // np.maximum(widths, 1))
    many = -(-rows // at_once) * parts
    order = np.argsort(whole.codes, kind="stable")
    of = np.repeat(order, many[order])
    first = np.cumsum(many[order]) - many[order]
    j = np.arange(len(of)) - np.repeat(first, many[order])
    row, part = j // parts[of] * at_once[of], j % parts[of]
    taken = np.minimum(at_once[of], rows[of] - row)
    width = np.minimum(widths[of] - part * size, size)
    address = whole.starts[of] + (row * widths[of] + part * size) * SIZES[whole.codes[of]]
    number = (np.cumsum(rows) - rows)[of] + row
    is_cut = parts[of] > 1
    place = np.where(is_cut, count + np.cumsum(is_cut) - 1, number)
    begins = is_cut & (part == 0)
    cut = np.stack([place[begins], place[begins] + parts[of][begins], number[begins]], axis=1)
    codes, starts, counts = np.unique(whole.codes[of], return_index=True, return_counts=True)
    kinds = list(zip(codes.tolist(), starts.tolist(), counts.tolist(), strict=True))
    table = np.stack([address, taken, width, place, number], axis=1)
    return table, cut, int(count + is_cut.sum()), kinds


_tables: OrderedDict[tuple[object, ...], RowTable] = OrderedDict()


def rows_of(tensors: Sequence[Tensor]) -> RowTable | None:
    """The table of rows of these tensors, made anew only if they have moved.

    Returns:
        `None` where a graph is being captured and no step before it had its tensors at these addresses.
    """
    whole = AddressTable.of(tensors)
    key = (whole.key, tuple(map(len, tensors)))
    table = _tables.get(key)
    if is_capturing(whole.device):
        return table
    if table is None:
        table = _tables[key] = RowTable(tensors)
        if len(_tables) > _REMEMBERED:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return table
