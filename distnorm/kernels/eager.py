"""Reading and scaling tensors with torch's own operators, on any device.

A block of elements is converted to fp64 in a buffer that stays in the cache, so that a norm is as
exact as fp64 and no full-size copy is ever made. Small tensors share a block: the number of operator
calls follows the number of bytes, not the number of tensors.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from distnorm.kernels.addresses import on_host
from distnorm.kernels.modes import is_captured
from distnorm.kernels.native import Kernel

# fp64 elements in a block. CPU: 2 MiB, which the caches still hold when it is read again, and large enough
# that converting it outweighs the two operator calls. Elsewhere a launch costs more than a cache miss.
_BLOCK = {"cpu": 1 << 18}
_BLOCK_ELSEWHERE = 1 << 24
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}


def mode_of(tensors: Sequence[Tensor]) -> AbstractContextManager[object]:
    """The mode in which a new tensor goes together with FakeTensors; for other tensors nothing."""
    mode: AbstractContextManager[object] | None = getattr(tensors[0], "fake_mode", None) if tensors else None
    return nullcontext() if mode is None else mode


def blocks(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Give the elements of all tensors of one device as 1-d fp64 blocks, complex ones as magnitudes.

    A block is overwritten by the next one: use it up before asking for another.
    """
    elements = sum(tensor.numel() for tensor in tensors)
    if not elements:
        return
    device = tensors[0].device
    size = min(_BLOCK.get(device.type, _BLOCK_ELSEWHERE), elements)
    with mode_of(tensors):
        buffer = torch.empty(size, dtype=torch.float64, device=device)
    for parts in _packed(tensors, size):
        yield _fill(buffer, parts)


def _packed(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Cut and group the tensors, flattened, into lists of at most `size` elements."""
    parts: list[Tensor] = []
    room = size
    for tensor in tensors:
        flat = tensor.reshape(-1)
        start, stop = 0, flat.numel()
        while start < stop:
            end = min(stop, start + room)
            parts.append(flat if end - start == stop else flat[start:end])
            room -= end - start
            start = end
            if room == 0:
                yield parts
                parts, room = [], size
    if parts:
        yield parts


def _fill(buffer: Tensor, parts: list[Tensor]) -> Tensor:
    parts = [_widened(part) for part in parts]
    if len(parts) == 1:
        return buffer[: parts[0].numel()].copy_(parts[0])
    total = sum(part.numel() for part in parts)
    return torch.cat(parts, out=buffer[:total])


def _widened(part: Tensor) -> Tensor:
    if part.is_complex():
        return part.to(torch.complex128).abs()
    # On CPU fp16 goes to fp64 an element at a time, but to fp32 by vector instructions; both are exact.
    # float8 can't be put together with other dtypes.
    return part.float() if part.dtype is torch.float16 or part.dtype in _FLOAT8 else part


def summary(tensor: Tensor, kernel: Kernel) -> Tensor:
    """One row, [4] fp64, of `distnorm.kernels.summaries`, of a tensor that is not empty."""
    parts = []
    for block in blocks([tensor]):
        zeros, bad = (block == 0).sum(), block.isfinite().logical_not_().sum()
        squares = torch.dot(block, block)
        largest = block.abs_().amax()
        by_kernel = {Kernel.SQUARES: squares, Kernel.LARGEST: largest}
        statistic = by_kernel[kernel] if kernel in by_kernel else block.sum()
        parts.append(torch.stack([statistic, largest, zeros.double(), bad.double()]))
    if len(parts) == 1:
        return parts[0]
    stacked = torch.stack(parts)
    row = stacked.sum(dim=0)
    row[1] = stacked[:, 1].amax()
    if kernel is Kernel.LARGEST:
        row[0] = row[1]
    return row


def row_squares(tensor: Tensor) -> Tensor:
    """The sum of squares of magnitudes of each index along dim 0, [rows] fp64."""
    if not tensor.numel():
        with mode_of([tensor]):
            return torch.zeros(len(tensor), dtype=torch.float64, device=tensor.device)
    flat = tensor.detach().reshape(len(tensor), -1)
    most = max(1, _BLOCK.get(flat.device.type, _BLOCK_ELSEWHERE) // flat.shape[1])
    return torch.cat([_widened(rows).double().square().sum(dim=1) for rows in torch.split(flat, most)])


def checksum(tensor: Tensor) -> Tensor:
    """Sum a tensor's bits, weighted by position, modulo 2**64: equal for equal bits, 0-d int64.

    Odd weights keep a change of any single element visible; elements that trade places change the sum.
    """
    bits = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    bits = torch.view_as_real(bits).reshape(-1) if bits.is_complex() else bits
    bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    size = min(_BLOCK.get(bits.device.type, _BLOCK_ELSEWHERE), max(bits.numel(), 1))
    with mode_of([tensor]):
        weights = torch.arange(1, 2 * size, 2, dtype=torch.int64, device=bits.device)
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for block in torch.split(bits, size) if bits.numel() else ():
        held = block.to(torch.int64)
        total = total * 0x5DEECE66D + (held * weights[: held.numel()]).sum()
    return total


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """The values, [n] fp64, without waiting for the device."""
    if is_captured():
        # A copy in a graph reads the host's memory at every replay; a fill brings its value along.
        return torch.stack([torch.full((), v, dtype=torch.float64, device=device) for v in values])
    made = torch.tensor(values, dtype=torch.float64, device="cpu")
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def moved(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The value on a device, without a wait; save in the host's memory, where it could be read too soon."""
    return value.to(device=device, dtype=dtype, non_blocking=device.type != "cpu")


def scale_(tensors: Sequence[Tensor], coef: Tensor) -> None:
    """Multiply every tensor in place by a 0-d coefficient that stays on its device.

    The coefficient is rounded to fp32, and to fp64 for fp64 and complex128 tensors; each product is
    rounded once, to the tensor's dtype, save that of bf16 and fp16 tensors, which is an fp32 number first.
    """
    for (device, dtype), members in _by_kind(tensors).items():
        exact = dtype in (torch.float64, torch.complex128)
        factor = moved(coef, device, torch.float64 if exact else torch.float32)
        if dtype in _FLOAT8:
            for part, wide in _widened_parts(members):
                part.copy_(wide.mul_(factor))
        else:
            torch._foreach_mul_(members, factor)


def scale_each_(tensors: Sequence[Tensor | None], coefs: Tensor) -> None:
    """Multiply every tensor in place by its own of [tensors] coefficients, with the roundings of `scale_`."""
    on: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}
    for i, tensor in enumerate(tensors):
        if tensor is None:
            continue
        exact = tensor.dtype in (torch.float64, torch.complex128)
        kind = (tensor.device, torch.float64 if exact else torch.float32)
        if kind not in on:
            on[kind] = moved(coefs, *kind).unbind()
        factor = on[kind][i]
        if tensor.dtype in _FLOAT8:
            scale_([tensor], factor)
            continue
        # Beside a tensor with dims one without any would be rounded to that one's dtype first.
        tensor.mul_(factor.view(1) if tensor.dim() else factor)


def scale_rows_(tensors: Sequence[Tensor], coefs: Tensor) -> None:
    """Multiply each index along dim 0 of every tensor in place by its own of [rows of all tensors]
    coefficients, with the roundings of `scale_`."""
    on: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}
    counts = list(map(len, tensors))
    for i, tensor in enumerate(tensors):
        if not tensor.numel():
            continue
        exact = tensor.dtype in (torch.float64, torch.complex128)
        kind = (tensor.device, torch.float64 if exact else torch.float32)
        if kind not in on:
            on[kind] = torch.split(moved(coefs, *kind), counts)
        factors = on[kind][i].view(-1, *[1] * (tensor.dim() - 1))
        if tensor.dtype in _FLOAT8:
            tensor.copy_(tensor.to(kind[1]) * factors)
        else:
            tensor.mul_(factors)


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """Put every element within plus and minus `bound`, in place; NaN stays. Of complex ones both parts."""
    real = [torch.view_as_real(t.conj() if t.is_conj() else t) if t.is_complex() else t for t in tensors]
    for (_, dtype), members in _by_kind(real).items():
        if dtype in _FLOAT8:
            for part, wide in _widened_parts(members):
                part.copy_(wide.clamp_(-bound, bound))
        else:
            limit = _in_range(bound, dtype)
            torch._foreach_clamp_max_(members, limit)
            torch._foreach_clamp_min_(members, -limit)


def _in_range(bound: float, dtype: torch.dtype) -> float:
    """What a bound beyond a dtype's range is rounded to, of which torch's operators take inf alone."""
    info = torch.finfo(dtype)
    if bound <= info.max:
        return bound
    halfway = info.max / (1 - info.eps / 2) * (1 - info.eps / 4)  # to the power of two above the range
    return info.max if bound < halfway else math.inf


def zero_unless_(tensors: Sequence[Tensor], keep: Tensor) -> None:
    """Set every element to zero, NaN and inf too, unless the 0-d bool tensor `keep` is true."""
    if on_host(keep) and bool(keep):  # there is no device to wait for, and nothing to do
        return
    for (device, dtype), members in _by_kind(tensors).items():
        drop = ~moved(keep, device)
        for tensor in members:  # zero is all bits zero, in every kind of float8 too
            (tensor.view(torch.uint8) if dtype in _FLOAT8 else tensor).masked_fill_(drop, 0)


def _widened_parts(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of float8 tensors, which torch's operators can't compute with, and an fp32 copy of each."""
    for tensor in tensors:
        size = _BLOCK.get(tensor.device.type, _BLOCK_ELSEWHERE)
        for part in torch.split(tensor.view(-1), size) if tensor.is_contiguous() else (tensor,):
            yield part, part.float()


def _by_kind(tensors: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.device, tensor.dtype].append(tensor)
    return kinds
