"""Parcels between ranks: objects, with tensors as their bits."""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distnorm.plan.collectives import Ranks


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor's bits, as they travel."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Packed:
        """Copy a tensor of any device."""
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        size = flat.numel() * flat.element_size()
        return cls(flat.dtype, tuple(flat.shape), ctypes.string_at(flat.data_ptr(), size) if size else b"")

    def tensor(self) -> Tensor:
        """The tensor again, on the CPU."""
        if not self.data:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype).reshape(self.shape)


def deliver(ranks: Ranks, parcels: Sequence[Any]) -> list[Any]:
    """Give every rank the parcel for it, and return what each rank had for this one. Collective.

    Args:
        ranks: who takes part.
        parcels: anything that can be pickled, one for each rank.
    """
    if ranks.size == 1:
        return list(parcels)
    letters = [pickle.dumps(parcel, protocol=5) for parcel in parcels]
    ones = dict.fromkeys(range(ranks.size), 1)
    sizes = torch.tensor([len(letter) for letter in letters], dtype=torch.int64, device="cpu")
    coming = ranks.exchange(sizes.view(-1, 1), ones, ones).view(-1).tolist()
    mail = torch.frombuffer(bytearray(b"".join(letters)), dtype=torch.uint8).view(-1, 1)
    arrived = ranks.exchange(mail, dict(enumerate(sizes.tolist())), dict(enumerate(coming)))
    parts = torch.split(arrived.view(-1), coming)
    return [pickle.loads(part.numpy().tobytes()) for part in parts]
