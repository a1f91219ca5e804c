"""Views that cover the memory of tensors once, so that what is scaled in place is scaled once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distnorm.kernels.addresses import PLAIN, Ints, addresses_of, has_memory


class SharedMemoryError(ValueError):
    """Tensors share memory in a way that no list of views covers once.

    Args:
        fact: what was expected and what was found.
        positions: of two such tensors in the list that was given.
    """

    def __init__(self, fact: str, positions: tuple[int, int]) -> None:
        super().__init__(fact)
        self.positions = positions


def is_all_there(tensor: Tensor) -> bool:
    """Whether a tensor's elements are within its storage, which can be freed or made smaller under it.

    Lazy zeros and meta tensors have no memory, and not even empty ones can be measured or changed.
    """
    if tensor.is_meta or tensor._is_zerotensor():
        return False
    return has_memory(tensor, _extent(tensor))


def memory_of(tensor: Tensor) -> Tensor:
    """A view that has every element of a tensor's memory once.

    Multiplying the view by a real number multiplies the tensor by it. A lazily conjugated or negated tensor
    is viewed as it lies in memory, and an expanded dim is viewed once.

    Raises:
        ValueError: elements share memory in another way.
    """
    if tensor.is_conj():
        tensor = tensor.detach().conj()
    if tensor.is_neg():
        tensor = torch._neg_view(tensor.detach())
    if tensor.is_contiguous():
        return tensor
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.detach().narrow(dim, 0, 1)
    if tensor.numel() and _may_repeat(tensor) and _repeats(tensor):
        raise ValueError(
            f"expected elements with memory of their own, found a tensor of shape {tuple(tensor.shape)} and "
            f"strides {tensor.stride()}, whose elements overlap; clone it"
        )
    return tensor


def once(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that cover every byte of the given ones once.

    Args:
        tensors: views as `memory_of` gives them.

    Returns:
        Those given, where they share nothing; else one flat view in place of each run of memory that several
        of them have parts of.

    Raises:
        SharedMemoryError: some share memory, but not a whole run of one dtype.
    """
    where = [i for i, tensor in enumerate(tensors) if _has_addresses(tensor)]
    apart: list[Tensor] = []
    if len(where) < len(tensors):  # as in a dry run: of what has no memory each object is one
        others = {id(tensor): tensor for tensor in tensors if not _has_addresses(tensor)}
        apart = list(others.values())
    here = [tensors[i] for i in where]
    starts = addresses_of(here)
    ends = starts + np.fromiter(map(_extent, here), np.int64, len(here))
    order = np.argsort(starts, kind="stable")
    if (starts[order][1:] >= ends[order][:-1]).all():
        return [*here, *apart]
    for members in _clusters(starts, ends, order):
        apart += _once(tensors, [where[i] for i in members])
    return apart


def _has_addresses(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and not tensor.is_meta


def _extent(tensor: Tensor) -> int:
    """The bytes from its first element to behind its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _clusters(starts: Ints, ends: Ints, order: Ints) -> list[list[int]]:
    """Positions of tensors whose extents overlap, cluster by cluster; of empty ones each is one."""
    clusters: list[list[int]] = []
    empty: list[list[int]] = []
    reach = -1
    for i in order.tolist():
        if starts[i] == ends[i]:
            empty.append([i])
        elif starts[i] < reach:
            clusters[-1].append(i)
            reach = max(reach, ends[i])
        else:
            clusters.append([i])
            reach = ends[i]
    return clusters + empty


def _once(tensors: Sequence[Tensor], members: list[int]) -> list[Tensor]:
    """`once` of tensors whose extents overlap, though perhaps not their elements."""
    first_like: dict[tuple[object, ...], int] = {}
    for i in members:
        tensor = tensors[i]
        like = (tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride())
        first_like.setdefault(like, i)
    distinct = list(first_like.values())
    if len(distinct) == 1:
        return [tensors[distinct[0]]]
    runs = [_runs(tensors[i]) for i in distinct]
    of = np.repeat(distinct, [len(run) for run in runs])
    starts, ends = np.concatenate(runs).T
    order = np.argsort(starts, kind="stable")
    starts, ends, of = starts[order], ends[order], of[order]
    reach = np.maximum.accumulate(ends)
    shared = np.flatnonzero(starts[1:] < reach[:-1])
    if not len(shared):
        return [tensors[i] for i in distinct]
    first, second = int(of[shared[0]]), int(of[shared[0] + 1])
    fact = _obstacle([tensors[i] for i in distinct], bool((starts[1:] > reach[:-1]).any()))
    if fact is not None:
        raise SharedMemoryError(fact, (min(first, second), max(first, second)))
    base = tensors[int(of[0])].detach()
    return [base.as_strided((int(reach[-1] - starts[0]) // base.element_size(),), (1,))]


def _obstacle(tensors: Sequence[Tensor], has_gaps: bool) -> str | None:
    """Why one flat view can't stand for tensors that share memory."""
    dtypes = sorted({str(tensor.dtype) for tensor in tensors})
    if len(dtypes) > 1:
        return f"expected memory of one dtype, found {' and '.join(dtypes)} in the same"
    base = tensors[0]
    if any((tensor.data_ptr() - base.data_ptr()) % base.element_size() for tensor in tensors):
        return "expected elements that are the same or apart, found some that have bytes in common"
    if len({tensor.untyped_storage()._cdata for tensor in tensors}) > 1:
        return "expected one storage, found several that have bytes in common"
    if has_gaps:
        return "expected a whole run of memory, found views with gaps that have elements in common; clone one"
    return None


def _runs(tensor: Tensor) -> Ints:
    """[runs, 2] first byte and last of what a tensor has without gaps."""
    size = tensor.element_size()
    starts, length = np.array([tensor.data_ptr()], dtype=np.int64), size
    dims = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, many in dims:
        if many == 1:
            continue
        if stride * size == length and len(starts) == 1:
            length *= many
        else:
            starts = (starts[:, None] + np.arange(many) * stride * size).reshape(-1)
    return np.stack([starts, starts + length], axis=1)


def _may_repeat(tensor: Tensor) -> bool:
    """Whether its strides don't rule out that elements share memory."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _repeats(tensor: Tensor) -> bool:
    places = np.zeros(1, dtype=np.int64)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        places = (places[:, None] + np.arange(size) * stride).reshape(-1)
    return len(np.unique(places)) < len(places)
