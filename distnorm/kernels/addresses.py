"""Where tensors lie in memory: one table for every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Ints = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Each dtype's code in native.c, walk.cpp and gpu_code.py."""
SIZES = np.array([dtype.itemsize for dtype in CODES], dtype=np.int64)
"""Bytes of an element, by code."""
PLAIN = {Tensor, nn.Parameter}
"""The classes whose memory is what they say."""
HOST = torch.device("cpu")

_LEAST_CHUNK = 1 << 12
_CHUNKS = 1 << 14  # about as many as keep the largest GPU busy to the end


@dataclass(frozen=True, eq=False)
class AddressTable:
    """Where tensors of one device lie. It keeps none of them alive: use it while they are there.

    Args:
        device: of all of them.
        starts, numels, codes: [tensors] address of the first element that is meant, number of elements, and
            dtype by `CODES`.
        offsets: [tensors] bytes between each tensor's own first element and the one that is meant.
    """

    device: torch.device
    starts: Ints
    numels: Ints
    codes: Codes
    offsets: Ints

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> AddressTable:
        """Whole tensors of one device, each of them dense and of a dtype in `CODES`.

        Raises:
            ValueError: a tensor reaches beyond its storage, which was freed or made smaller.
        """
        numels = np.fromiter(map(Tensor.numel, tensors), np.int64, len(tensors))
        codes = np.fromiter((CODES[tensor.dtype] for tensor in tensors), np.int32, len(tensors))
        _require_memory(tensors, numels * SIZES[codes])
        device = tensors[0].device if tensors else HOST
        return cls(device, addresses_of(tensors), numels, codes, np.zeros_like(numels))

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is the table of these very tensors, as `of` makes it."""
        same = np.array_equal(self.starts, addresses_of(tensors))
        return same and self.numels.tolist() == list(map(Tensor.numel, tensors))

    def part(self, starts: Ints, numels: Ints) -> AddressTable:
        """Of each tensor `numels` elements from `starts` on."""
        skipped, numels = starts * SIZES[self.codes], np.ascontiguousarray(numels)
        return AddressTable(self.device, self.starts + skipped, numels, self.codes, self.offsets + skipped)

    def rows(self, which: Ints) -> AddressTable:
        """Some of the tensors, by position."""
        starts, numels, codes = self.starts[which], self.numels[which], self.codes[which]
        return AddressTable(self.device, starts, numels, codes, self.offsets[which])

    def at(self, addresses: Ints) -> AddressTable:
        """The same parts of tensors whose own first elements are at these addresses."""
        return AddressTable(self.device, addresses + self.offsets, self.numels, self.codes, self.offsets)

    @cached_property
    def total(self) -> int:
        """The number of elements."""
        return int(self.numels.sum())

    @property
    def bytes(self) -> int:
        """The number of bytes of all elements."""
        return int((self.numels * SIZES[self.codes]).sum())

    @property
    def dtypes(self) -> list[torch.dtype]:
        """[tensors] Each one's."""
        known = list(CODES)
        return [known[code] for code in self.codes.tolist()]

    @cached_property
    def merged(self) -> AddressTable:
        """The same elements in as few rows as there can be: neighbours in one flat buffer are one, and none
        is empty.

        Raises:
            ValueError: there is no memory at an address.
        """
        self.require_memory()
        held = self.numels > 0
        starts, numels, codes = self.starts[held], self.numels[held], self.codes[held]
        ends = starts + numels * SIZES[codes]
        apart = (starts[1:] != ends[:-1]) | (codes[1:] != codes[:-1])
        first = np.flatnonzero(np.concatenate([[True], apart])[: len(starts)])
        merged = np.add.reduceat(numels, first) if len(first) else numels
        offsets = np.zeros(len(first), dtype=np.int64)
        return AddressTable(self.device, starts[first], merged, codes[first], offsets)

    def require_memory(self) -> None:
        """Refuse addresses at which there is none.

        Raises:
            ValueError: one is null, though elements are to be there.
        """
        if ((self.starts == 0) & (self.numels > 0)).any():
            raise ValueError("expected tensors with memory, found one whose storage was freed")

    @cached_property
    def overlap(self) -> bool:
        """Whether some element is in two rows: then threads or programs that write would race for it."""
        held = self.numels > 0
        order = np.argsort(starts := self.starts[held])
        ends = starts + (self.numels * SIZES[self.codes])[held]
        return bool((starts[order][1:] < ends[order][:-1]).any())

    @cached_property
    def arguments(self) -> tuple[int, int, int, int]:
        """The number of rows, and where the three arrays of them begin, as native.c takes them."""
        arrays = (self.starts, self.numels, self.codes)
        pointers = [array.ctypes.data for array in arrays]
        return (len(self.starts), pointers[0], pointers[1], pointers[2])

    @cached_property
    def key(self) -> tuple[object, ...]:
        """What is equal for tables of the same rows."""
        return (self.device, self.starts.tobytes(), self.numels.tobytes(), self.codes.tobytes())

    @property
    def chunk_size(self) -> int:
        """The most elements that one program of a GPU takes: a power of two, so that chunks stay aligned."""
        size = _LEAST_CHUNK
        while size * _CHUNKS < self.total:
            size *= 2
        return size

    @cached_property
    def chunks(self) -> Chunks:
        """How gpu_code reads the rows, wherever they lie."""
        size = self.chunk_size
        order = np.argsort(self.codes, kind="stable")
        count = -(-self.numels[order] // size)
        last = np.cumsum(count)
        runs = np.empty((len(order), 2), dtype=np.int64)
        runs[order] = np.stack([last - count, last], axis=1)
        of = np.repeat(order, count)
        start = (np.arange(len(of)) - runs[of, 0]) * size
        codes, first, many = np.unique(self.codes[of], return_index=True, return_counts=True)
        kinds = list(zip(codes.tolist(), first.tolist(), many.tolist(), strict=True))
        numels = np.minimum(self.numels[of] - start, size)
        return Chunks(of, start * SIZES[self.codes[of]], numels, runs, kinds)


@dataclass(frozen=True, eq=False)
class Chunks:
    """How rows of a table are cut for gpu_code, dtype by dtype. Where they lie changes nothing of it.

    Args:
        of: [chunks] the row of each.
        offsets: [chunks] bytes between the start of the row and that of the chunk.
        numels: [chunks] elements.
        runs: [rows, 2] from which to which chunk each row goes.
        kinds: code, first chunk and number of chunks of each dtype.
    """

    of: Ints
    offsets: Ints
    numels: Ints
    runs: Ints
    kinds: list[tuple[int, int, int]]

    def at(self, starts: Ints) -> Ints:
        """[chunks, 2] of rows that start at these addresses: the address of each, and its number of elements
        plus 2**32 times its row."""
        return np.stack([starts[self.of] + self.offsets, self.numels + (self.of << 32)], axis=1)


def addresses_of(tensors: Sequence[Tensor]) -> Ints:
    """[tensors] address of each one's first element."""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


def on_host(tensor: Tensor) -> bool:
    """Whether its values can be read at once: in the CPU's memory, and of no class that only pretends."""
    return type(tensor) is Tensor and tensor.is_cpu


def is_dense(tensor: Tensor) -> bool:
    """Whether it is contiguous but for the order of its dims, and what it says is what lies in memory."""
    if tensor.is_neg() or tensor._is_zerotensor():
        return False
    if tensor.is_contiguous():
        return True
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda dim: -strides[dim])).is_contiguous()


def has_memory(tensor: Tensor, size: int) -> bool:
    """Whether a dense tensor's elements, `size` bytes, are all within its storage."""
    if not size:
        return True
    storage = tensor.untyped_storage()
    return storage.nbytes() >= tensor.storage_offset() * tensor.element_size() + size


def _require_memory(tensors: Sequence[Tensor], sizes: Ints) -> None:
    for tensor, size in zip(tensors, sizes.tolist(), strict=True):
        if not has_memory(tensor, size):
            held = tensor.untyped_storage().nbytes()
            raise ValueError(
                f"expected a tensor with memory for its {tensor.numel()} elements, found a storage of "
                f"{held} bytes: its storage was freed or made smaller"
            )
