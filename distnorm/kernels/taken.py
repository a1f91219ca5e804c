"""Partial sums on a GPU that are taken before a step is measured, each proved to be of the same bytes.

Nothing here waits on the host for a device. Streams wait for each other by events.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from distnorm.kernels.addresses import CODES, SIZES, Ints
from distnorm.kernels.device_table import DeviceTable, PinnedRing, is_capturing, on
from distnorm.kernels.gpu import BLOCK, triton_code
from distnorm.kernels.native import Kernel

LEAST = 1 << 24
"""Bytes of a table that it is worth while for; also of what one launch takes early."""
WHOLE = 1 << 20
"""Bytes of the largest tensor whose fingerprint has every byte. Of larger ones it has 64 of each KiB."""


@cache
def taken_code() -> ModuleType:
    """The kernels. Triton is imported here."""
    return import_module("distnorm.kernels.gpu_taken_code")


class TakenParts:
    """Records of a table's chunks: partial sum, fingerprint, and the step in which it was made.

    Args:
        table: whose; used by no other caller.

    Attributes:
        is_sampled: [rows] whether a row's fingerprint has only some of its bytes: then the caller must say
            whether it was changed by what can be seen on the host.
    """

    def __init__(self, table: DeviceTable) -> None:
        self.table, self._chunks = table, table.chunks
        count, device = len(self._chunks.of), table.device
        codes, runs = table.addresses.codes, self._chunks.runs
        chunk = table.addresses.chunk_size * SIZES
        self._most = np.maximum(WHOLE // chunk, 1)  # chunks, by dtype
        self.is_sampled = runs[:, 1] - runs[:, 0] > self._most[codes]
        self._packed = self._chunks.numels + (self.is_sampled[self._chunks.of].astype(np.int64) << 32)
        self._ring, self._step, self._lent = PinnedRing(), 1, 0
        self._events: dict[int, torch.cuda.Event] = {}  # of this step's launches, by stream
        self._before: torch.cuda.Event | None = None  # which this step's launches have to wait for
        with on(device):
            self._parts = torch.empty(count, dtype=torch.float64, device=device)
            self._prints = torch.zeros(count, 2, dtype=torch.int64, device=device)
            self._changed = torch.zeros(1, dtype=torch.int64, device=device)
            stream = stream_of(device)
            self._before = None if stream is None else stream.record_event()

    @property
    def bytes(self) -> Ints:
        """[rows] Number of bytes of each row."""
        addresses = self.table.addresses
        return addresses.numels * SIZES[addresses.codes]

    def take(self, rows: Ints, starts: Ints, kernel: Kernel) -> None:
        """Record some rows as they are when the current stream gets there.

        Args:
            rows: their places in the table, each once.
            starts: [rows] where the tensors lie whose parts the rows are.
            kernel: which statistic.
        """
        device = self.table.device
        if is_capturing(device):
            return
        code, gpu_code = taken_code(), triton_code()
        sent, kinds = self._sent(rows, starts + self.table.addresses.offsets[rows])
        with on(device):
            stream = stream_of(device)
            if stream is not None:
                self._wait(stream)
            there = torch.empty(sent.shape, dtype=torch.int64, device=device)
            self._ring.send(sent, there)
            for kind, first, count in kinds:
                given = (there, first, self._parts, self._prints, self._step)
                code.take[(count,)](*given, gpu_code.DTYPES[kind], int(kernel), BLOCK)
            if stream is not None:
                self._events[stream.cuda_stream] = stream.record_event()

    def _sent(self, rows: Ints, starts: Ints) -> tuple[Ints, list[tuple[int, int, int]]]:
        """The chunks of some rows, as `take` reads them, dtype by dtype; and code, first and number of each
        dtype."""
        codes = self.table.addresses.codes[rows]
        order = np.argsort(codes, kind="stable")
        rows, starts, codes = rows[order], starts[order], codes[order]
        first, last = self._chunks.runs[rows].T
        many = last - first
        ends = np.cumsum(many)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + many, many)
        addresses = np.repeat(starts, many) + self._chunks.offsets[places]
        kinds = []
        for code in range(len(CODES)):
            found = np.flatnonzero(codes == code)
            if len(found) and (count := int(many[found].sum())):
                kinds.append((code, int(ends[found[0]] - many[found[0]]), count))
        return np.stack([addresses, self._packed[places], places], axis=1), kinds

    def lend(self) -> TakenParts:
        """Let `partials` use the records of this step, and begin the next."""
        self._lent, self._step = self._step, self._step + 1
        return self

    def partials(self, out: Tensor, kernel: Kernel) -> None:
        """Write the partial sums of the table's chunks as they are now.

        If the bytes of a single one have changed, all are read: samples of a tensor's chunks show together
        that it has changed, and not where.
        """
        code, gpu_code, table = taken_code(), triton_code(), self.table
        self._wait_for_all()
        for kind, first, count in table.kinds:
            most, dtype = int(self._most[kind]), gpu_code.DTYPES[kind]
            given = (table.rows, first, table.each, self._prints, self._changed, self._lent, most)
            code.compare[(count,)](*given, dtype, BLOCK)
        for kind, first, count in table.kinds:
            records = (self._parts, self._prints, self._changed, self._lent)
            code.partials_unless_taken[(count,)](
                table.rows, first, out, *records, gpu_code.DTYPES[kind], int(kernel), BLOCK
            )
        self._settle()

    def were_kept(self) -> Tensor:
        """Whether all records were used when `partials` was called last, 0-d bool on the device."""
        return (self._prints[:, 1] > 0).all()

    def forget(self) -> None:
        """Use none of the records that were made up to now."""
        self._step += 1
        with on(self.table.device):
            self._wait_for_all()
            self._settle()

    def _wait_for_all(self) -> None:
        stream = stream_of(self.table.device)
        if stream is not None:
            self._wait(stream)

    def _wait(self, stream: torch.cuda.Stream) -> None:
        """Let a stream that is to use the records wait for all others that do."""
        if self._before is not None:
            stream.wait_event(self._before)
        for number, event in self._events.items():
            if number != stream.cuda_stream:
                stream.wait_event(event)
        for held in (self._parts, self._prints, self._changed):
            held.record_stream(stream)

    def _settle(self) -> None:
        """From now on to wait for the current stream is enough."""
        self._events.clear()
        stream = stream_of(self.table.device)
        self._before = None if stream is None else stream.record_event()


def stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """The current stream there; `None` for the CPU, where Triton's interpreter runs."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
