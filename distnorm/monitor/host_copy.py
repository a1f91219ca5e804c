"""A device's values on their way to the host, without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


class Fetch:
    """A copy of values in the host's memory, from the moment when the device has made it.

    Args:
        values: fp64, on any device; nobody may change them afterwards. On CUDA the copy goes to pinned
            memory, behind what the current stream has still to do; elsewhere it is made at once.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values.cpu()

    @property
    def has_arrived(self) -> bool:
        """Whether `values` waits for nothing."""
        return self._event is None or self._event.query()  # type: ignore[no-untyped-call]

    def values(self) -> Tensor:
        """The values in the host's memory. Waits for the device."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._values
