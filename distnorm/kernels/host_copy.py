"""A device's values on their way to the host."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


class AsyncHostCopy:
    """A copy of a device's values in the host's memory, which arrives without a wait.

    Args:
        values: fp64, on any device; nobody may change them afterwards. On CUDA the copy goes to pinned
            memory, after what the current stream has still to do; elsewhere it is made at once.
        before: a copy of as many values, which nobody reads any more, and whose pinned memory this one takes.
    """

    def __init__(self, values: Tensor, before: AsyncHostCopy | None = None) -> None:
        self._values: Tensor
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            if before is not None and before.has_arrived and before._values.shape == values.shape:
                here = before._values
            else:
                here = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._values = here.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values.clone() if values.is_cpu else values.cpu()

    @property
    def has_arrived(self) -> bool:
        """Whether `values` returns without a wait."""
        return self._event is None or self._event.query()  # type: ignore[no-untyped-call]

    def values(self) -> Tensor:
        """The values in the host's memory. Waits for the device."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._values

    def numbers(self) -> list[float]:
        """The values, by no operator of torch, whatever modes the caller is in. Waits for the device."""
        there = self.values()
        return list((ctypes.c_double * there.shape.numel()).from_address(there.data_ptr()))
