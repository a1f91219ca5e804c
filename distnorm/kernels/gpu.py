"""The local statistic and the scaling of an NVIDIA GPU's tensors, all of a dtype in one launch.

Tensors, orders and devices that this can't do are left to `distnorm.kernels.eager`, and so is everything
where there is no Triton, or where the environment variable ``DISTNORM_TRITON`` is 0.

All sums are fp64's from the first element on: an fp32 sum of squares overflows at 1e20, vanishes at 1e-25,
and is not within one unit in the last place. No sum depends on which program ran first, so the bits are the
same for the same elements, shapes and addresses modulo 16 bytes.
"""

from __future__ import annotations

import logging
import os
import struct
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from distnorm.kernels.addresses import CODES, PLAIN, AddressTable, is_dense
from distnorm.kernels.marks import FiniteMarks
from distnorm.kernels.native import Kernel

_LOG = logging.getLogger("distnorm")
_BLOCK = 1024  # elements that a program's 128 threads take at once
_REMEMBERED = 16  # tables


@cache
def usable(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU that has bf16, and Triton is there and works."""
    if device.type != "cuda" or torch.version.cuda is None or os.environ.get("DISTNORM_TRITON") == "0":
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        if find_spec("triton") is None:
            raise ImportError("there is no Triton; pip install triton")
        _try_out(device)
    except Exception as error:  # whatever an unsuitable Triton raises must not cost a norm
        _LOG.info("gradients on %s are read by torch's operators, not by Triton's kernels: %s", device, error)
        return False
    return True


def _try_out(device: torch.device) -> None:
    """Launch a kernel on no element. Raises what stands in the way, such as that there is no C compiler."""
    from distnorm.kernels import gpu_code

    rows = torch.zeros(1, 2, dtype=torch.int64, device=device)
    out = torch.empty(1, dtype=torch.float64, device=device)
    with _on(device):
        gpu_code.partials[(1,)](rows, 0, out, gpu_code.DTYPES[0], int(Kernel.SQUARES), _BLOCK)


def fits(tensor: Tensor) -> bool:
    """Whether the kernels can read and scale it: dense memory of a usable GPU, and a real dtype."""
    plain = tensor.dtype in CODES and tensor.is_cuda and type(tensor) in PLAIN
    return plain and usable(tensor.device) and is_dense(tensor)


def split(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that fit; the rest."""
    fitting: list[Tensor] = []
    rest: list[Tensor] = []
    for tensor in tensors:
        (fitting if fits(tensor) else rest).append(tensor)
    return fitting, rest


@dataclass
class DeviceTable:
    """An address table as the kernels read it. It keeps no tensor alive: use it while the tensors are there.

    Args:
        addresses: what it was made from.
        device: where it lies, and the tensors.
    """

    addresses: AddressTable
    device: torch.device
    kinds: list[tuple[int, int, int]] = field(init=False)
    overlap: bool = field(init=False)
    rows: Tensor = field(init=False)
    each: Tensor = field(init=False)
    all: Tensor = field(init=False)
    _seen: set[int] = field(init=False, default_factory=set)
    _copied: torch.cuda.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        rows, runs, self.kinds = self.addresses.chunks()
        self.overlap = self.addresses.overlap
        flat = torch.from_numpy(np.concatenate([rows, runs, [[0, len(rows)]]]))
        if self.device.type == "cuda":
            flat = flat.pin_memory().to(self.device, non_blocking=True)
            stream = torch.cuda.current_stream(self.device)
            self._copied = stream.record_event()
            self._seen.add(stream.cuda_stream)
        self.rows, self.each, self.all = torch.split(flat, [len(rows), len(runs), 1])

    def ready(self) -> None:
        """Let the current stream wait for the copy, once, and the memory for the stream."""
        if self._copied is None:
            return
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in self._seen:
            stream.wait_event(self._copied)
            self.rows.record_stream(stream)
            self._seen.add(stream.cuda_stream)


_tables: OrderedDict[tuple[object, ...], DeviceTable] = OrderedDict()
# Graphs read these as long as they live, and nothing announces their end.
_captured: dict[int, DeviceTable] = {}


def table_of(tensors: Sequence[Tensor]) -> DeviceTable | None:
    """The table of tensors of one device that `split` found fitting, made anew only if they have moved.

    Returns:
        `None` where a graph is being captured and no step before it had its tensors at these addresses:
        a copy from the host's memory is no part of a graph.
    """
    addresses = AddressTable.of(tensors)
    device, key = addresses.device, addresses.key
    table = _tables.get(key)
    with _on(device):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if table is not None:
                _captured[id(table)] = table
            return table
        if table is None:
            table = _tables[key] = DeviceTable(addresses, device)
            if len(_tables) > _REMEMBERED:
                _tables.popitem(last=False)
        _tables.move_to_end(key)
        table.ready()
    return table


def statistic(
    table: DeviceTable,
    kernel: Kernel,
    marks: FiniteMarks | None = None,
    tensors: Sequence[Tensor] = (),
    *,
    per_tensor: bool = False,
) -> Tensor:
    """The statistic of all elements, [1] fp64, or of each tensor's, [tensors]; 0 where there are none.

    Args:
        table: where they are.
        kernel: which statistic.
        marks: gets the numbers of the table's chunks, which cost nothing more.
        tensors: those of the table, for `marks`.
        per_tensor: whether each tensor's is asked for.
    """
    from distnorm.kernels import gpu_code

    runs = table.each if per_tensor else table.all
    if not table.kinds:
        return torch.zeros(len(runs), dtype=torch.float64, device=table.device)
    # From torch's allocator, which keeps memory for the streams and graphs that use it.
    parts = torch.empty(len(table.rows), dtype=torch.float64, device=table.device)
    out = torch.empty(len(runs), dtype=torch.float64, device=table.device)
    with _on(table.device):
        for code, first, rows in table.kinds:
            dtype = gpu_code.DTYPES[code]
            gpu_code.partials[(rows,)](table.rows, first, parts, dtype, int(kernel), _BLOCK)
        gpu_code.totals[(len(out),)](parts, runs, out, int(kernel), _BLOCK)
    if marks is not None:
        marks.add(tensors, parts, table.each)
    return out


def scale_(table: DeviceTable, coef: Tensor) -> None:
    """Multiply every element in place, with the roundings of `distnorm.kernels.eager.scale_`.

    A coefficient of 1 changes nothing: no element is read. Autograd's version counter is not changed: see
    `torch.autograd.graph.increment_version`.
    """
    from distnorm.kernels import gpu_code

    factor = coef.to(table.device, torch.float64, non_blocking=True)
    with _on(table.device):
        for code, first, rows in table.kinds:
            gpu_code.scale[(rows,)](table.rows, first, factor, gpu_code.DTYPES[code], _BLOCK)


def scale_each_(table: DeviceTable, coefs: Tensor) -> None:
    """`scale_` of each tensor by its own of [tensors] coefficients, in one launch for each dtype."""
    from distnorm.kernels import gpu_code

    factors = coefs.to(table.device, torch.float64, non_blocking=True).contiguous()
    with _on(table.device):
        for code, first, rows in table.kinds:
            gpu_code.scale_each[(rows,)](table.rows, first, factors, gpu_code.DTYPES[code], _BLOCK)


def zero_unless_(table: DeviceTable, keep: Tensor) -> None:
    """Set every element to zero unless `keep`, a 0-d bool tensor, is true: then none is touched."""
    from distnorm.kernels import gpu_code

    kept = keep.to(table.device, non_blocking=True).view(torch.uint8)
    with _on(table.device):
        for code, first, rows in table.kinds:
            gpu_code.zero_unless[(rows,)](table.rows, first, kept, gpu_code.DTYPES[code], _BLOCK)


def clamp_(table: DeviceTable, bound: float) -> None:
    """Put every element within plus and minus a bound, in place; NaN stays."""
    from distnorm.kernels import gpu_code

    low, high = struct.unpack("<ii", struct.pack("<d", bound))
    with _on(table.device):
        for code, first, rows in table.kinds:
            gpu_code.clamp[(rows,)](table.rows, first, high, low, gpu_code.DTYPES[code], _BLOCK)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device. Does nothing for the CPU, where its interpreter runs."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
