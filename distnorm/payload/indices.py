"""Integer arrays, copied once to each device that needs them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from distnorm import kernels
from distnorm.plan.model_table import Ints


class Indices:
    """Arrays by name, as int64 tensors on any device: the same tensors in every step."""

    def __init__(self) -> None:
        self._arrays: dict[Hashable, Ints | Sequence[int]] = {}
        self._copies: dict[tuple[Hashable, torch.device], Tensor] = {}

    def __setitem__(self, name: Hashable, values: Ints | Sequence[int]) -> None:
        self._arrays[name] = values

    def at(self, name: Hashable, like: Tensor) -> Tensor:
        """One array on the device of another tensor."""
        device, values = like.device, self._arrays[name]
        if type(like) is not Tensor:  # of a dry run: not to be kept for real steps
            with kernels.mode_of([like]):
                return torch.tensor(np.array(values, dtype=np.int64), device=device)
        if (name, device) not in self._copies:
            kernels.refuse_capture(
                "expected gradients that a step before has had too, found others; call clip() once with the "
                "same gradients before the capture"
            )
            self._copies[name, device] = torch.from_numpy(np.array(values, dtype=np.int64)).to(device)
        return self._copies[name, device]
