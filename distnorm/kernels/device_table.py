"""Address tables in a GPU's memory, as gpu_code reads them.

To send one from the host takes a copy of memory that the device can read by itself ("pinned"), which nobody
waits for. Such memory is dear to allocate, so a few buffers of it take turns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distnorm.kernels.addresses import AddressTable, Ints

_REMEMBERED = 16  # tables
_HERE = nullcontext()  # can be entered again and again


@dataclass(slots=True)
class _Pinned:
    """A buffer whose contents may be on their way to the device."""

    values: Tensor
    sent: torch.cuda.Event | None = None

    def is_free(self, count: int) -> bool:
        if len(self.values) < count:
            return False
        return self.sent is None or bool(self.sent.query())  # type: ignore[no-untyped-call]


class PinnedRing:
    """Pinned buffers that take turns. Another is made only while the device is behind with all of them."""

    def __init__(self) -> None:
        self._buffers: list[_Pinned] = []

    def send(self, values: Ints, to: Tensor) -> None:
        """Copy int64 numbers over those of a tensor of the same shape, in the order of its current stream."""
        if to.device.type != "cuda":
            to.copy_(torch.from_numpy(values))
            return
        buffer = self._free(values.size)
        staged = buffer.values[: values.size].view(values.shape)
        staged.numpy()[...] = values
        to.copy_(staged, non_blocking=True)
        buffer.sent = torch.cuda.current_stream(to.device).record_event()

    def _free(self, count: int) -> _Pinned:
        free = next((buffer for buffer in self._buffers if buffer.is_free(count)), None)
        if free is None:
            # One that was too small for what is sent now is let go as soon as it has arrived.
            self._buffers = [buffer for buffer in self._buffers if not buffer.is_free(0)]
            free = _Pinned(torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=True))
            self._buffers.append(free)
        return free


_ring = PinnedRing()
_captured: list[Resident] = []


class Resident:
    """Int64 numbers of the host in a GPU's memory, which one stream after the other uses.

    Args:
        values: the numbers.
        device: where they get to, by a copy that nobody waits for.

    Attributes:
        device: where they are.
        there: the numbers, in their shape.
        is_captured: whether a graph reads them.
    """

    def __init__(self, values: Ints, device: torch.device) -> None:
        self.device, self.is_captured = device, False
        self.there = torch.empty(values.shape, dtype=torch.int64, device=device)
        self._stream: torch.cuda.Stream | None = None
        with on(device):
            _ring.send(values, self.there)
            if device.type == "cuda":
                self._stream = torch.cuda.current_stream(device)

    def ready(self) -> None:
        """Before each use: let the current stream wait for what that of the last use has still to do with it.

        In a graph that is being captured they stay as they are for ever: the graph reads them as long as that
        lives, and nothing announces its end.
        """
        if self._stream is None:
            return
        if is_capturing(self.device):
            self.is_captured = True
            _captured.append(self)
            return
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream != self._stream.cuda_stream:
            stream.wait_stream(self._stream)
            self.there.record_stream(stream)
            self._stream = stream


class DeviceTable(Resident):
    """An address table as gpu_code reads it. It keeps no tensor alive: use it while the tensors are there.

    Args:
        addresses: what it is made from.
        device: where it lies, and the tensors.
        is_shared: whether several callers may use it at the same time; else it has memory to work in.

    Attributes:
        chunks: how the rows are cut, wherever they lie.
        kinds: code, first chunk and number of chunks of each dtype.
        rows: [chunks, 2] int64; see `Chunks.at`.
        each, all: [rows or 1, 2] int64 from which to which chunk each row goes, or all together.
        parts: [chunks] fp64 to work in; `None` where the table is shared.
    """

    _spare: Tensor | None = None

    def __init__(self, addresses: AddressTable, device: torch.device, *, is_shared: bool = True) -> None:
        self.addresses, self.chunks = addresses, addresses.chunks
        self.kinds = self.chunks.kinds
        rows, runs = self.chunks.at(addresses.starts), self.chunks.runs
        super().__init__(np.concatenate([rows, runs, [[0, len(rows)]]]), device)
        self.rows, self.each, self.all = torch.split(self.there, [len(rows), len(runs), 1])
        self.parts: Tensor | None = None
        if not is_shared:
            self.parts = torch.empty(len(rows), dtype=torch.float64, device=device)

    @property
    def overlap(self) -> bool:
        """Whether some element is in two rows."""
        return self.addresses.overlap

    def lend_parts(self) -> Tensor:
        """What the newest statistic has left in `parts`; nothing writes there until parts are lent again."""
        lent, spare = self.parts, self._spare
        assert lent is not None
        self.parts, self._spare = torch.empty_like(lent) if spare is None else spare, lent
        return lent

    def ready(self) -> None:
        """See `Resident.ready`; the memory to work in goes along."""
        before = self._stream
        super().ready()
        if self._stream is not None and self._stream is not before:
            for held in (self.parts, self._spare):
                if held is not None:
                    held.record_stream(self._stream)

    def moved(self, addresses: AddressTable) -> DeviceTable:
        """The table of the same rows at other addresses, for the one caller of this one.

        It is written over this one, by one copy that nobody waits for, unless a graph reads this one.
        """
        if self.is_captured:
            return DeviceTable(addresses, self.device, is_shared=False)
        with on(self.device):
            self.ready()
            self.addresses = addresses
            _ring.send(self.chunks.at(addresses.starts), self.rows)
        return self


_tables: OrderedDict[tuple[object, ...], DeviceTable] = OrderedDict()


def table_of(tensors: Sequence[Tensor]) -> DeviceTable | None:
    """The table of dense tensors of one device, made anew only if they have moved.

    Returns:
        `None` where a graph is being captured and no step before it had its tensors at these addresses:
        a copy from the host's memory is no part of a graph.
    """
    addresses = AddressTable.of(tensors)
    device, key = addresses.device, addresses.key
    table = _tables.get(key)
    if is_capturing(device):
        return table
    if table is None:
        table = _tables[key] = DeviceTable(addresses, device)
        if len(_tables) > _REMEMBERED:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return table


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of the device, if that is CUDA's, captures a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device. Does nothing for the CPU, where its interpreter runs."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
