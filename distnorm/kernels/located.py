"""What lies at known addresses, measured and scaled by the compiled code of its device."""

from __future__ import annotations

import torch
from torch import Tensor

from distnorm.kernels import gpu, native
from distnorm.kernels.addresses import AddressTable
from distnorm.kernels.device_table import DeviceTable, is_capturing
from distnorm.kernels.taken import TakenParts

Located = AddressTable | DeviceTable
"""Where tensors of one device lie, for the compiled code of that device."""


def has_kernel(tensor: Tensor) -> bool:
    """Whether compiled code can read and scale this very tensor where it lies."""
    return gpu.fits(tensor) or not native.split([tensor])[1]


def located(table: AddressTable, before: Located | None = None) -> Located | None:
    """The rows of a table, for the compiled code of their device.

    Args:
        table: of tensors that compiled code can read.
        before: what this returned for the same rows at other addresses, which is not used any more.

    Returns:
        `None` where a graph is being captured, of which it can't be a part.

    Raises:
        ValueError: there is no memory at an address.
    """
    if not gpu.usable(table.device):
        return table.merged
    table.require_memory()
    if is_capturing(table.device):
        return None
    if isinstance(before, DeviceTable):
        return before.moved(table)
    return DeviceTable(table, table.device, is_shared=False)


def statistic_at(place: Located, kernel: native.Kernel, taken: TakenParts | None = None) -> Tensor:
    """The statistic of what lies there, by compiled code: [1] fp64 on its device, which is not waited for.

    Args:
        place: where it is.
        kernel: which statistic.
        taken: what was taken of it before.
    """
    if isinstance(place, DeviceTable):
        return gpu.statistic(place, kernel, write_parts=None if taken is None else taken.partials)
    return torch.tensor([native.statistic(place, kernel)], dtype=torch.float64, device="cpu")


def headed_statistic_at(
    place: DeviceTable, kernel: native.Kernel, header: int, taken: TakenParts | None = None
) -> Tensor:
    """A header below 2**53 and the statistic of what lies on a GPU, [2] fp64 there, not waited for."""
    write_parts = None if taken is None else taken.partials
    return gpu.statistic(place, kernel, header=header, write_parts=write_parts)


def scale_at_(place: Located, coef: Tensor, keep: Tensor | None = None) -> bool:
    """Multiply what lies there, by compiled code, as `scale_` does.

    Args:
        place: where it is.
        coef: 0-d.
        keep: 0-d bool; where it is false all becomes zero instead. For a GPU's memory only.

    Returns:
        Whether anything may have changed. Autograd's version counter is not changed.
    """
    if isinstance(place, DeviceTable):
        gpu.scale_(place, coef, keep)
        return True
    assert keep is None
    factor = float(coef)
    if factor != 1:
        native.scale_(place, factor)
    return factor != 1
