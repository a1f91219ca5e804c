"""Gradients on a GPU that are measured during backward, and checked by the device itself.

A launch measures each chunk of the gradients that have become final, and fingerprints its bytes. When the
step is measured, one launch fingerprints all chunks again, and the next keeps the partial sums, or reads all
chunks if a single one has other bytes now. So the sum has the bits that it has without overlap, the host
waits for nothing, and a gradient that was not taken costs what it did.

Fingerprints of gradients of up to 1 MiB have every byte. Of larger ones they have 64 bytes of each KiB, so of
these the host also compares addresses and the versions that autograd counts; if one is not the same, all
gradients are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from distnorm import kernels
from distnorm.measure.gradients import Gradients
from distnorm.measure.norms import Norm
from distnorm.sources.shards import GradShard

State = tuple[int, int, int]
"""Address and versions of a gradient; equal ones say that autograd has seen no change."""


class GpuOverlap:
    """Measures gradients as `Overlap` announces them, once a step has found where they lie.

    Args:
        norm: which norm; one that compiled code can do.
        shards: what this rank holds.
    """

    def __init__(self, norm: Norm, shards: Sequence[GradShard]) -> None:
        self._norm, self._shards = norm, shards
        self._taken: kernels.TakenParts | None = None
        self._rows: dict[int, int] = {}  # of the table, by position
        self._states: dict[int, State | None] = {}  # of what was taken
        self._waiting: dict[int, dict[int, State]] = {}  # what is final and was not taken yet, by stream
        self._waiting_bytes: dict[int, int] = {}

    @property
    def is_ready(self) -> bool:
        """Whether gradients of the next backward can be taken."""
        return self._taken is not None

    def read(self, i: int) -> None:
        """A gradient is final. It is measured with others, as soon as they are large enough together."""
        gradient, taken = self._shards[i].holder.grad, self._taken
        if taken is None or gradient is None or i not in self._rows:
            return
        stream = kernels.stream_of(taken.table.device)
        key = 0 if stream is None else stream.cuda_stream
        waiting = self._waiting.setdefault(key, {})
        if i not in waiting:
            self._waiting_bytes[key] = self._waiting_bytes.get(key, 0) + self._bytes[self._rows[i]]
        waiting[i] = state_of(gradient)
        if self._waiting_bytes[key] >= kernels.LEAST:
            del self._waiting_bytes[key]
            self._take_waiting(self._waiting.pop(key))

    def _take_waiting(self, waiting: Mapping[int, State]) -> None:
        held = {i: self._shards[i].holder.grad for i in waiting}
        same = {i: g for i, g in held.items() if g is not None and state_of(g) == waiting[i]}
        for i in self._take({i: local_of(gradient) for i, gradient in same.items()}):
            self._states[i] = waiting[i]

    def read_reduced(self, pieces: Sequence[tuple[int, Tensor]]) -> None:
        """These elements will be gradients; `mark` follows when they are."""
        for i in self._take(dict(pieces)):
            self._states[i] = None

    def mark(self, which: Sequence[int]) -> None:
        """Gradients are final that were measured before."""
        for i in which:
            gradient = self._shards[i].holder.grad
            if i in self._states and gradient is not None:
                self._states[i] = state_of(gradient)

    def _take(self, tensors: Mapping[int, Tensor]) -> list[int]:
        """Measure tensors, by position, that may be or become gradients; those that the table knows."""
        taken, kernel = self._taken, self._norm.kernel
        fitting = [i for i, tensor in tensors.items() if self._fits(i, tensor)]
        if taken is None or kernel is None or not fitting:
            return []
        rows = np.array([self._rows[i] for i in fitting], dtype=np.int64)
        taken.take(rows, kernels.addresses_of([tensors[i] for i in fitting]), kernel)
        stream = kernels.stream_of(taken.table.device)
        if stream is not None:
            for i in fitting:  # their memory isn't another tensor's before the launch is over
                tensors[i].record_stream(stream)
        return fitting

    def _fits(self, i: int, tensor: Tensor) -> bool:
        row, taken = self._rows.get(i), self._taken
        return (
            taken is not None
            and row is not None
            and type(tensor) is Tensor
            and tensor.device == taken.table.device
            and tensor.dtype is self._dtypes[row]
            and tensor.numel() == self._shards[i].numel
            and tensor.is_contiguous()
            and not tensor.is_neg()
            and kernels.is_all_there(tensor)
        )

    def take(self, gradients: Gradients) -> kernels.TakenParts | None:
        """What was measured of the gradients; `None` if they all have to be read."""
        (place, positions), taken = gradients.on_gpu() or (None, np.empty(0, np.int64)), self._taken
        again = {i: state for w in self._waiting.values() for i, state in w.items() if i in self._states}
        self._waiting, self._waiting_bytes = {}, {}
        if again:  # accumulated since they were taken
            self._take_waiting(again)
        states, self._states = self._states, {}
        if taken is not None and taken.table is place and self._are_unchanged(states):
            return taken.lend()
        if taken is not None:
            taken.forget()
        if taken is None or taken.table is not place:
            self._learn(place, positions)
        return None

    def _are_unchanged(self, states: Mapping[int, State | None]) -> bool:
        assert self._taken is not None
        sampled = self._taken.is_sampled
        for i, state in states.items():
            if (row := self._rows.get(i)) is not None and sampled[row]:
                gradient = self._shards[i].holder.grad
                if gradient is None or state != state_of(gradient):
                    return False
        return bool(states)

    def _learn(self, table: kernels.DeviceTable | None, positions: np.ndarray) -> None:
        """From now on take parts of this table's rows."""
        self._taken, self._rows = None, {}
        if table is None or table.is_captured or table.addresses.bytes < kernels.LEAST:
            return
        self._taken = kernels.TakenParts(table)
        self._rows = {i: row for row, i in enumerate(positions.tolist())}
        self._bytes: list[int] = self._taken.bytes.tolist()
        self._dtypes = table.addresses.dtypes


def local_of(gradient: Tensor) -> Tensor:
    """The tensor in this process's memory."""
    local: Tensor = getattr(gradient, "_local_tensor", gradient)
    return local


def versions_of(gradient: Tensor) -> tuple[int, int]:
    """How often autograd has seen the gradient and its local tensor change."""
    return _version_of(gradient), _version_of(local_of(gradient))


def state_of(gradient: Tensor) -> State:
    """Where it lies, and its versions."""
    return (local_of(gradient).data_ptr(), *versions_of(gradient))


def _version_of(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors count no changes
