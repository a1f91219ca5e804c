"""Which kernel takes which tensors: compiled code what it can, torch's operators the others."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from distnorm.kernels import eager, gpu, gpu_statistics, native
from distnorm.kernels.addresses import AddressTable, Ints, on_host
from distnorm.kernels.device_table import DeviceTable, table_of
from distnorm.kernels.located import statistic_at
from distnorm.kernels.marks import FiniteMarks


def fingerprints(table: AddressTable) -> Ints | None:
    """A fingerprint of each row's bytes, [rows]: equal fingerprints mean that the bytes have not changed.

    Every byte of up to 16 MiB is read; of more, 64 bytes of every 1024, and both ends. Any change to what is
    read shows, elements that trade places too.

    Returns:
        `None` where there is no compiled code, or the table is not of the CPU's memory.
    """
    if table.device.type != "cpu" or native.library() is None:
        return None
    return native.fingerprints(table)


def printed_statistic(table: AddressTable, kernel: native.Kernel) -> tuple[Tensor, Ints] | None:
    """The statistic of all elements, and a print of each row, in one read of the CPU's memory.

    A print is a weighed sum of a row's words of 32 bits, modulo 2**64: every change within one word shows,
    words that trade places show, and other changes escape no oftener than by chance.

    Returns:
        The statistic, [1] fp64 with the bits that it has without prints, and prints, [rows]; `None` where
        there is no compiled code, or the table is not of the CPU's memory.
    """
    if table.device.type != "cpu" or native.library() is None:
        return None
    found, prints = native.printed_statistic(table, kernel)
    return torch.tensor([found], dtype=torch.float64, device="cpu"), prints


def measure(
    tensors: Sequence[Tensor], kernel: native.Kernel, marks: FiniteMarks | None = None
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Measure what compiled code can of tensors of one device.

    Args:
        tensors: whose statistic is asked for.
        kernel: which one.
        marks: gets the numbers of those that compiled code reads.

    Returns:
        Its statistic, [1] fp64 on that device, or none if there was nothing for it; and the tensors that it
        left.
    """
    if tensors and _is_on_gpu(tensors[0]):
        fitting, rest = gpu.split(tensors)
        table = table_of(fitting) if fitting else None
        return ([], tensors) if table is None else ([gpu.statistic(table, kernel, marks, fitting)], rest)
    fitting, rest = native.split(tensors)
    if not fitting:
        return [], rest
    if marks is not None:
        marks.add_largest(fitting)
    return [statistic_at(AddressTable.of(fitting), kernel)], rest


def summaries(tensors: Sequence[Tensor], kernel: native.Kernel) -> Tensor:
    """Summarise each of the tensors of one device, which is not waited for.

    Returns:
        [tensors, 4] fp64 on that device: the statistic, the largest magnitude (NaN if one is NaN), the
        number of zeros, and of elements that are not finite. An empty tensor has zeros. Complex ones have
        magnitudes.
    """
    if not tensors:
        return torch.zeros(0, 4, dtype=torch.float64, device="cpu")
    is_gpu = _is_on_gpu(tensors[0])
    taken = [i for i, t in enumerate(tensors) if (gpu.fits(t) if is_gpu else not native.split([t])[1])]
    found = _summarised([tensors[i] for i in taken], kernel) if taken else None
    if found is not None and len(taken) == len(tensors):
        return found
    # No list of positions, which an index would copy to the device.
    rows = {} if found is None else dict(zip(taken, found.unbind(), strict=True))
    with eager.mode_of(tensors):
        nothing = torch.zeros(4, dtype=torch.float64, device=tensors[0].device)
    left = ((i, t) for i, t in enumerate(tensors) if i not in rows)
    rows |= {i: eager.summary(t, kernel) if t.numel() else nothing for i, t in left}
    return torch.stack([rows[i] for i in range(len(tensors))])


def _summarised(tensors: Sequence[Tensor], kernel: native.Kernel) -> Tensor | None:
    if not _is_on_gpu(tensors[0]):
        return native.summaries(AddressTable.of(tensors), kernel)
    table = table_of(tensors)
    return None if table is None else gpu_statistics.summaries(table, kernel)


def row_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sums of squares of magnitudes of each index along dim 0 of tensors of one device.

    Returns:
        [rows of all tensors] fp64 on that device, tensor by tensor.
    """
    if tensors and not native.split(tensors)[1] and all(map(Tensor.is_contiguous, tensors)):
        return native.row_squares(tensors)
    taken = [i for i, tensor in enumerate(tensors) if _has_rows_on_gpu(tensor)]
    table = gpu_statistics.rows_of([tensors[i] for i in taken]) if taken else None
    with eager.mode_of(tensors):
        none = torch.zeros(0, dtype=torch.float64, device=tensors[0].device if tensors else "cpu")
    if table is None:
        return torch.cat([none, *map(eager.row_squares, tensors)])
    if len(taken) == len(tensors):
        return table.squares()
    found = torch.split(table.squares(), [len(tensors[i]) for i in taken])
    rows = dict(zip(taken, found, strict=True))
    return torch.cat([rows[i] if i in rows else eager.row_squares(t) for i, t in enumerate(tensors)])


def _is_on_gpu(tensor: Tensor) -> bool:
    return gpu.usable(tensor.device)


def _has_rows_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and gpu.fits(tensor)


def checksum(tensor: Tensor) -> Tensor:
    """Sum a tensor's bits, weighted by position: see `distnorm.kernels.eager.checksum`."""
    plain = tensor.detach()
    if plain.numel() and plain.is_contiguous() and not native.split([plain])[1]:
        return torch.tensor(native.checksum(plain), dtype=torch.int64, device="cpu")
    return eager.checksum(tensor)


def scale_each_(tensors: Sequence[Tensor | None], coefs: Tensor) -> None:
    """Multiply every tensor in place by its own coefficient.

    The roundings are those of `scale_`. No device is waited for; coefficients in the host's memory of 1 cost
    nothing, and leave every bit alone.

    Args:
        tensors: on any devices; `None` where there is none.
        coefs: [tensors], on one device.
    """
    left = list(tensors)
    for device in dict.fromkeys(t.device for t in tensors if t is not None and gpu.fits(t)):
        here = [t is not None and t.device == device and gpu.fits(t) for t in left]
        # An empty one in place of each other one, so that places in the table are those of coefficients.
        nothing = torch.empty(0, device=device)
        members = [t if t is not None and is_here else nothing for t, is_here in zip(left, here, strict=True)]
        if (table := _to_change(members)) is not None:
            gpu.scale_each_(table, _coefs_at(coefs, device))
            left = [None if is_here else t for t, is_here in zip(left, here, strict=True)]
    if not on_host(coefs):
        eager.scale_each_(left, coefs)
        return
    by_coef: dict[float, list[Tensor]] = defaultdict(list)
    for tensor, factor in zip(left, coefs.tolist(), strict=True):
        if tensor is not None and factor != 1 and tensor.numel():
            by_coef[factor if factor == factor else math.nan].append(tensor)
    for factor, same in by_coef.items():
        scale_(same, torch.tensor(factor, dtype=torch.float64, device="cpu"))


def scale_(tensors: Sequence[Tensor], coef: Tensor) -> None:
    """Multiply every tensor in place by a 0-d coefficient that stays on its device.

    The roundings are those of `distnorm.kernels.eager.scale_`, bit for bit. A coefficient of 1 costs no pass
    if it is in the host's memory, or compiled code takes the tensors.
    """
    if on_host(coef):  # there is no device to wait for
        factor = float(coef)
        if factor == 1:
            return
        fitting, tensors = native.split(tensors)
        if fitting:
            torch.autograd.graph.increment_version(fitting)
            native.scale_(AddressTable.of(fitting), factor)
    tables, rest = _tables_to_change(tensors)
    for table in tables:
        gpu.scale_(table, coef)
    eager.scale_(rest, coef)


def scale_rows_(tensors: Sequence[Tensor], coefs: Tensor) -> None:
    """Multiply each index along dim 0 of every tensor in place by its own coefficient.

    The roundings are those of `scale_`. No device is waited for.

    Args:
        tensors: on any devices, of at least one dim each.
        coefs: [rows of all tensors], tensor by tensor, on one device.
    """
    left = list(tensors)
    for device in dict.fromkeys(t.device for t in tensors if _has_rows_on_gpu(t)):
        here = [t.device == device and _has_rows_on_gpu(t) for t in left]
        # Rows without elements in place of others, so that places in the table are those of coefficients.
        other = [torch.empty(len(t), 0, device=device) for t in left]
        members = [t if is_here else o for t, o, is_here in zip(left, other, here, strict=True)]
        table = gpu_statistics.rows_of(members)
        if table is not None and not table.overlap:
            torch.autograd.graph.increment_version(members)
            table.scale_(_coefs_at(coefs, device).contiguous())
            left = [o if is_here else t for t, o, is_here in zip(left, other, here, strict=True)]
    eager.scale_rows_(left, coefs)


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """Put every element within plus and minus `bound`, in place; NaN stays. Of complex ones both parts."""
    tables, rest = _tables_to_change(tensors)
    for table in tables:
        gpu.clamp_(table, bound)
    eager.clamp_(rest, bound)


def zero_unless_(tensors: Sequence[Tensor], keep: Tensor) -> None:
    """Set every element to zero, NaN and inf too, unless the 0-d bool tensor `keep` is true."""
    if on_host(keep) and bool(keep):  # there is no device to wait for, and nothing to do
        return
    tables, rest = _tables_to_change(tensors)
    for table in tables:
        gpu.zero_unless_(table, keep)
    eager.zero_unless_(rest, keep)


def _tables_to_change(tensors: Sequence[Tensor]) -> tuple[list[DeviceTable], list[Tensor]]:
    """A table for each GPU of what Triton's kernels may change there, and the tensors that are left."""
    fitting, rest = gpu.split(tensors)
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for tensor in fitting:
        by_device[tensor.device].append(tensor)
    tables = []
    for members in by_device.values():
        if (table := _to_change(members)) is None:
            rest += members
        else:
            tables.append(table)
    return tables, rest


def _to_change(tensors: Sequence[Tensor]) -> DeviceTable | None:
    """The table of fitting tensors of one GPU, whose versions are counted up; `None` where programs would
    race for an element, or a graph is being captured that can't have it."""
    table = table_of(tensors)
    if table is None or table.overlap:
        return None
    torch.autograd.graph.increment_version(tensors)
    return table


def _coefs_at(coefs: Tensor, device: torch.device) -> Tensor:
    """Coefficients, [n] fp64, on a GPU."""
    if on_host(coefs):
        return eager.on_device(coefs.tolist(), device)
    return eager.moved(coefs, device, torch.float64)
