"""Statistics of single tensors, of their rows and of their samples on an NVIDIA GPU, of all tensors at once.

The tensors are some that `distnorm.kernels.gpu.fits` takes, all on one GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distnorm.kernels.addresses import SIZES, AddressTable, Ints
from distnorm.kernels.gpu import _BLOCK, DeviceTable, _on
from distnorm.kernels.native import Kernel

_REMEMBERED = 16  # tables of rows


def summaries(table: DeviceTable, kernel: Kernel) -> Tensor:
    """Of each tensor: see `distnorm.kernels.summaries`."""
    from distnorm.kernels import gpu_code
    from distnorm.kernels import gpu_statistics_code as code

    total, count = len(table.rows), len(table.each)
    parts = torch.empty(4, total, dtype=torch.float64, device=table.device)
    out = torch.empty(count, 4, dtype=torch.float64, device=table.device)
    with _on(table.device):
        for kind, first, rows in table.kinds:
            dtype = gpu_code.DTYPES[kind]
            code.summary_parts[(rows,)](table.rows, first, total, parts, dtype, int(kernel), _BLOCK)
        if count:
            code.summary_totals[(count,)](parts, total, table.each, out, int(kernel), _BLOCK)
    return out


def samples(table: DeviceTable, signs: int) -> Tensor:
    """Of each tensor: see `distnorm.kernels.samples`. All of them are contiguous."""
    from distnorm.kernels import gpu_statistics_code as code

    out = torch.empty(len(table.each), 2, dtype=torch.float64, device=table.device)
    # Chunks come dtype by dtype: where those of each begin, be there any or not.
    begin = [sum(rows for kind, _, rows in table.kinds if kind < of) for of in range(1, 4)]
    as_int64 = signs - (1 << 64) if signs >> 63 else signs
    with _on(table.device):
        if len(out):
            code.samples[(len(out),)](table.rows, table.each, *begin, out, as_int64)
    return out


@dataclass
class RowTable:
    """Where rows of contiguous tensors lie, as the kernels read it. It keeps no tensor alive.

    Args:
        tensors: each of at least one dim; an index along dim 0 is a row.

    Attributes:
        device: theirs.
        count: the number of rows of all of them.
        length: so many numbers have the rows and the parts of those that were cut.
        kinds: code, first program and number of programs of each dtype.
        overlap: whether some element is in two tensors.
    """

    tensors: Sequence[Tensor]
    device: torch.device = field(init=False)
    count: int = field(init=False)
    length: int = field(init=False)
    kinds: list[tuple[int, int, int]] = field(init=False)
    overlap: bool = field(init=False)
    _table: Tensor = field(init=False)
    _cut: Tensor = field(init=False)
    _seen: set[int] = field(init=False, default_factory=set)
    _copied: torch.cuda.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        whole = AddressTable.of(self.tensors)
        self.device, self.overlap = whole.device, whole.overlap
        table, cut, self.kinds = self._laid_out(whole)
        self.tensors = ()
        flat = torch.from_numpy(np.concatenate([table.reshape(-1), cut.reshape(-1)]))
        if self.device.type == "cuda":
            flat = flat.pin_memory().to(self.device, non_blocking=True)
            stream = torch.cuda.current_stream(self.device)
            self._copied = stream.record_event()
            self._seen.add(stream.cuda_stream)
        self._table, self._cut = flat[: table.size].view(-1, 5), flat[table.size :].view(-1, 3)

    def _laid_out(self, whole: AddressTable) -> tuple[Ints, Ints, list[tuple[int, int, int]]]:
        rows = np.array([len(tensor) for tensor in self.tensors], dtype=np.int64)
        self.count, size = int(rows.sum()), whole.chunk_size
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
        place = np.where(is_cut, self.count + np.cumsum(is_cut) - 1, number)
        self.length = self.count + int(is_cut.sum())
        begins = is_cut & (part == 0)
        cut = np.stack([place[begins], place[begins] + parts[of][begins], number[begins]], axis=1)
        codes, starts, counts = np.unique(whole.codes[of], return_index=True, return_counts=True)
        kinds = list(zip(codes.tolist(), starts.tolist(), counts.tolist(), strict=True))
        return np.stack([address, taken, width, place, number], axis=1), cut, kinds

    def ready(self) -> None:
        """Let the current stream wait for the copy, once, and the memory for the stream."""
        if self._copied is None:
            return
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in self._seen:
            stream.wait_event(self._copied)
            self._table.record_stream(stream)
            self._seen.add(stream.cuda_stream)

    def squares(self) -> Tensor:
        """Of each row: see `distnorm.kernels.row_squares`."""
        from distnorm.kernels import gpu_code
        from distnorm.kernels import gpu_statistics_code as code

        out = torch.empty(self.length, dtype=torch.float64, device=self.device)
        with _on(self.device):
            for kind, first, programs in self.kinds:
                code.row_squares[(programs,)](self._table, first, out, gpu_code.DTYPES[kind], _BLOCK)
            if len(self._cut):
                code.row_totals[(len(self._cut),)](self._cut, out, _BLOCK)
        return out[: self.count]

    def scale_(self, coefs: Tensor) -> None:
        """Multiply each row in place by its own of [count] coefficients, fp64 on the tables' device."""
        from distnorm.kernels import gpu_code
        from distnorm.kernels import gpu_statistics_code as code

        with _on(self.device):
            for kind, first, programs in self.kinds:
                code.scale_rows[(programs,)](self._table, first, coefs, gpu_code.DTYPES[kind], _BLOCK)


_tables: OrderedDict[tuple[object, ...], RowTable] = OrderedDict()
# Graphs read these as long as they live, and nothing announces their end.
_captured: dict[int, RowTable] = {}


def rows_of(tensors: Sequence[Tensor]) -> RowTable | None:
    """The table of rows of these tensors, made anew only if they have moved.

    Returns:
        `None` where a graph is being captured and no step before it had its tensors at these addresses.
    """
    whole = AddressTable.of(tensors)
    key = (whole.key, tuple(map(len, tensors)))
    table = _tables.get(key)
    with _on(whole.device):
        if whole.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if table is not None:
                _captured[id(table)] = table
            return table
        if table is None:
            table = _tables[key] = RowTable(tensors)
            if len(_tables) > _REMEMBERED:
                _tables.popitem(last=False)
        _tables.move_to_end(key)
        table.ready()
    return table
