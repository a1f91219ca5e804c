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
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from distnorm.kernels.addresses import CODES, PLAIN, is_dense
from distnorm.kernels.device_table import DeviceTable, on
from distnorm.kernels.marks import FiniteMarks
from distnorm.kernels.native import Kernel

_LOG = logging.getLogger("distnorm")
BLOCK = 1024
"""Elements that a program's 128 threads take at once."""


@cache
def triton_code() -> ModuleType:
    """The kernels. Triton is imported here, where there is a GPU to use it on."""
    return import_module("distnorm.kernels.gpu_code")


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
    gpu_code = triton_code()
    rows = torch.zeros(1, 2, dtype=torch.int64, device=device)
    out = torch.empty(1, dtype=torch.float64, device=device)
    with on(device):
        gpu_code.partials[(1,)](rows, 0, out, gpu_code.DTYPES[0], int(Kernel.SQUARES), BLOCK)


def fits(tensor: Tensor) -> bool:
    """Whether the kernels can read and scale it: dense memory of a usable GPU, and a real dtype."""
    return tensor.dtype in CODES and type(tensor) in PLAIN and usable(tensor.device) and is_dense(tensor)


def split(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that fit; the rest."""
    fitting: list[Tensor] = []
    rest: list[Tensor] = []
    for tensor in tensors:
        (fitting if fits(tensor) else rest).append(tensor)
    return fitting, rest


def statistic(
    table: DeviceTable,
    kernel: Kernel,
    marks: FiniteMarks | None = None,
    tensors: Sequence[Tensor] = (),
    *,
    per_tensor: bool = False,
    header: int | None = None,
    write_parts: Callable[[Tensor, Kernel], None] | None = None,
) -> Tensor:
    """The statistic of all elements, [1] fp64, or of each tensor's, [tensors]; 0 where there are none.

    Args:
        table: where they are.
        kernel: which statistic.
        marks: gets the numbers of the table's chunks, which cost nothing more.
        tensors: those of the table, for `marks`.
        per_tensor: whether each tensor's is asked for.
        header: a whole number below 2**53 that the result begins with, before the statistic: [2] then.
        write_parts: what writes the statistic of each chunk, in place of the launch that reads all.
    """
    gpu_code = triton_code()
    runs = table.each if per_tensor else table.all
    if not table.kinds:
        return torch.zeros(len(runs), dtype=torch.float64, device=table.device)
    # From torch's allocator, which keeps memory for the streams and graphs that use it.
    parts = table.parts
    if parts is None:
        parts = torch.empty(table.rows.shape[0], dtype=torch.float64, device=table.device)
    programs = runs.shape[0]
    out = torch.empty(programs + (header is not None), dtype=torch.float64, device=table.device)
    with on(table.device):
        table.ready()
        if write_parts is not None:
            write_parts(parts, kernel)
        for code, first, rows in table.kinds if write_parts is None else ():
            dtype = gpu_code.DTYPES[code]
            gpu_code.partials[(rows,)](table.rows, first, parts, dtype, int(kernel), BLOCK)
        gpu_code.totals[(programs,)](parts, runs, out, header or 0, header is not None, int(kernel), BLOCK)
    if marks is not None:
        marks.add(tensors, parts, table.each)
    return out


def scale_(table: DeviceTable, coef: Tensor, keep: Tensor | None = None) -> None:
    """Multiply every element in place, with the roundings of `distnorm.kernels.eager.scale_`.

    A coefficient of 1 changes nothing: no element is read. Autograd's version counter is not changed: see
    `torch.autograd.graph.increment_version`.

    Args:
        table: where they are.
        coef: 0-d.
        keep: 0-d bool; where it is false, every element is set to zero instead, NaN and inf too.
    """
    gpu_code = triton_code()
    factor = coef.to(table.device, torch.float64, non_blocking=True)
    if keep is not None:
        factor = factor.where(keep.to(table.device, non_blocking=True), gpu_code.ZERO)
    with on(table.device):
        table.ready()
        for code, first, rows in table.kinds:
            gpu_code.scale[(rows,)](table.rows, first, factor, gpu_code.DTYPES[code], BLOCK)


def scale_each_(table: DeviceTable, coefs: Tensor) -> None:
    """`scale_` of each tensor by its own of [tensors] coefficients, in one launch for each dtype."""
    gpu_code = triton_code()
    factors = coefs.to(table.device, torch.float64, non_blocking=True).contiguous()
    with on(table.device):
        table.ready()
        for code, first, rows in table.kinds:
            gpu_code.scale_each[(rows,)](table.rows, first, factors, gpu_code.DTYPES[code], BLOCK)


def zero_unless_(table: DeviceTable, keep: Tensor) -> None:
    """Set every element to zero unless `keep`, a 0-d bool tensor, is true: then none is touched."""
    gpu_code = triton_code()
    kept = keep.to(table.device, non_blocking=True).view(torch.uint8)
    with on(table.device):
        table.ready()
        for code, first, rows in table.kinds:
            gpu_code.zero_unless[(rows,)](table.rows, first, kept, gpu_code.DTYPES[code], BLOCK)


def clamp_(table: DeviceTable, bound: float) -> None:
    """Put every element within plus and minus a bound, in place; NaN stays."""
    gpu_code = triton_code()
    low, high = struct.unpack("<ii", struct.pack("<d", bound))
    with on(table.device):
        table.ready()
        for code, first, rows in table.kinds:
            gpu_code.clamp[(rows,)](table.rows, first, high, low, gpu_code.DTYPES[code], BLOCK)
