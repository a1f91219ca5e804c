"""A few elements of each tensor, by which replicas are compared in every step at next to no cost.

A sample is up to 64 elements, in at most 4 runs that are spread over the tensor by its number of elements
alone. Two sums describe it: one with fixed pseudo-random signs, which replicas that differ seldom share, and
that of magnitudes, which says how large a difference is. Both are added up in one fixed order, so equal
elements give the same bits by compiled code and by torch's operators, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distnorm.kernels import eager, gpu, gpu_statistics, native
from distnorm.kernels.addresses import AddressTable
from distnorm.kernels.device_table import DeviceTable, table_of

# native.c and gpu_statistics_code.py have the same numbers.
_RUNS, _RUN = 4, 16
_SAMPLE = _RUNS * _RUN
_SIGNS = 0xB5297A4D68E31DA4


def samples(table: AddressTable) -> Tensor:
    """The two sums of each row of a table of the CPU's memory, by compiled code, [rows, 2] fp64 on the CPU.

    The tensors are some that `split` found fitting, and contiguous: elements are taken as they lie in memory.
    """
    return native.samples(table, _SIGNS)


def samples_of(tensors: Sequence[Tensor]) -> Tensor:
    """The two sums of each of the tensors of one device, which is not waited for.

    Args:
        tensors: of any strides; complex ones count as pairs of real numbers, float8 ones by their values.

    Returns:
        [tensors, 2] fp64 on that device; zeros of an empty tensor, NaN where the sample has one.
    """
    if not tensors:
        return torch.zeros(0, 2, dtype=torch.float64, device="cpu")
    if all(map(Tensor.is_contiguous, tensors)) and not native.split(tensors)[1]:
        return samples(AddressTable.of(tensors))
    taken = [i for i, tensor in enumerate(tensors) if tensor.is_contiguous() and gpu.fits(tensor)]
    table = table_of([tensors[i] for i in taken]) if taken else None
    if table is None:
        return _by_torch(tensors)
    found = gpu_statistics.samples(table, _SIGNS)
    if len(taken) == len(tensors):
        return found
    rows = dict(zip(taken, found.unbind(), strict=True))
    left = [i for i in range(len(tensors)) if i not in rows]
    rows |= dict(zip(left, _by_torch([tensors[i] for i in left]).unbind(), strict=True))
    return torch.stack([rows[i] for i in range(len(tensors))])


def samples_at(place: DeviceTable) -> Tensor:
    """The two sums of each row of contiguous tensors on a GPU, [rows, 2] fp64 there, not waited for."""
    return gpu_statistics.samples(place, _SIGNS)


def samples_are_cheap(device: torch.device) -> bool:
    """Whether `samples_of` is one pass or launch for all tensors there, and not some operators for each."""
    return device.type == "cpu" or gpu.usable(device)


def _by_torch(tensors: Sequence[Tensor]) -> Tensor:
    device = tensors[0].device
    with eager.mode_of(tensors):
        padding = torch.zeros(_SAMPLE, dtype=torch.float64, device=device)
        places = torch.arange(_SAMPLE, dtype=torch.int64, device=device)
    parts: list[Tensor] = []
    for tensor in tensors:
        taken = _sample(tensor.detach())
        parts += [*taken, padding[sum(part.numel() for part in taken) :]]
    rows = torch.cat([part.to(torch.float64) for part in parts]).view(len(tensors), _SAMPLE)
    # As a signed number, which has the same bits.
    signs = 1 - 2 * ((_SIGNS - (1 << 64)) >> places & 1)
    return torch.stack([_added(rows * signs), _added(rows.abs())], dim=1)


def _sample(tensor: Tensor) -> list[Tensor]:
    """The elements of a tensor's sample, in at most 4 parts."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    numel = tensor.numel()
    if numel <= _SAMPLE:
        return [tensor.reshape(-1)]
    starts = [run * (numel - _RUN) // (_RUNS - 1) for run in range(_RUNS)]
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        return [flat[start : start + _RUN] for start in starts]
    with eager.mode_of([tensor]):
        steps = torch.arange(_RUN, dtype=torch.int64, device=tensor.device)
    places = torch.cat([steps + start for start in starts])
    index: list[Tensor] = []
    for size in reversed(tensor.shape):  # torch.unravel_index copies the shape from the host's memory
        index.insert(0, places % size)
        places = places // size
    return [tensor[tuple(index)]]


def _added(rows: Tensor) -> Tensor:
    half = _SAMPLE // 2
    while half:
        rows = rows[:, :half] + rows[:, half : 2 * half]
        half //= 2
    return rows[:, 0]
