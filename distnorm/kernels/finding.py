"""Address lookup: finds gradients that were read with care once, checks each in every step, holds them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distnorm.kernels import native, walking
from distnorm.kernels.addresses import CODES, HOST, AddressTable, Ints, addresses_of, has_memory


@dataclass(frozen=True, slots=True)
class Found:
    """Gradients where they were found. Their memory stays until it is dropped.

    Args:
        addresses: [gradients] of the first elements of the (local) tensors, until the finder is called again.
        tensors: gives the (local) tensors themselves, in their order; of DTensors those that the parameters
            have now, which are the same ones until the caller's code runs.
    """

    addresses: Ints
    tensors: Callable[[], list[Tensor]]
    _held: Any  # a list of the tensors; or a capsule that holds them, or their memory
    _compiled: ctypes.PyDLL | None = None  # what made the capsule

    def replaced(self, addresses: Ints, tensors: Callable[[], list[Tensor]]) -> Found:
        """What keeps the same memory, with the addresses and tensors of parts of it."""
        return Found(addresses, tensors, self._held, self._compiled)

    def mark_changed(self) -> None:
        """Tell autograd that every plain gradient is changed in place; of local tensors nobody counts."""
        if self._compiled is None:
            torch.autograd.graph.increment_version(self._held)
        else:
            self._compiled.distnorm_changed(self._held)


class Finder:
    """Finds the gradients of the same parameters step after step, by compiled C++ where there is some.

    Args:
        gradients: as a careful reading found them, each of exactly the class `torch.Tensor`, or each of
            exactly `DTensor`: local tensors are meant then, and addresses are theirs.
        are_given: whether calls get the gradients themselves, in place of parameters.

    Raises:
        ValueError: a (local) tensor is none that it could find again: of exactly `torch.Tensor`, contiguous,
            on one device with the others, and of a dtype that compiled code knows.
    """

    def __init__(self, gradients: Sequence[Tensor], *, are_given: bool = False) -> None:
        self._kind, self._specs = _kind_of(gradients)
        tensors = [self._local(gradient) for gradient in gradients]
        self._dtypes = [tensor.dtype for tensor in tensors]
        self._device = tensors[0].device if tensors else HOST
        compiled = native.library() if self._device.type == "cpu" else None
        known = CODES if compiled is None else compiled.code
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in known or not _fits(tensor, tensor.numel(), tensor.dtype, self._device):
                raise ValueError(
                    f"expected (local) gradients that are dense and contiguous on {self._device}, found "
                    f"gradient {i}: {type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
                )
        self.table = AddressTable.of(tensors)
        """Where the tensors were when it was made; `table.at(found.addresses)` is where they are."""
        self._numels = self.table.numels.tolist()
        self._found: Ints = np.empty(len(tensors), dtype=np.int64)
        self._scratch = np.empty_like(self._found)
        self._compiled: ctypes.PyDLL | None = None
        self._are_given = are_given
        self._asks = not are_given  # whether compiled code may be there one day

    def __call__(self, holders: Sequence[Tensor]) -> Found | None:
        """Find the gradients of the parameters, and check each.

        Args:
            holders: as many parameters, in the order of the gradients given.

        Returns:
            `None` if one has no gradient, or one of another class, dtype, size, device, layout or spec, or
            whose memory is not its own and all there: then all have to be read with care.
        """
        if len(holders) != len(self._numels):
            return None
        if self._compiled is None and self._asks:
            self._take(walking.library(len(holders)))
        if self._compiled is None:
            return self._by_attributes(holders)
        listed = holders if isinstance(holders, list | tuple) else list(holders)
        held = self._compiled.distnorm_find(listed, self._address)
        if held is None:
            return None
        if self._specs is None:
            return Found(self._found, partial(self._compiled.distnorm_tensors, held), held, self._compiled)
        return Found(self._found, partial(self._locals, listed), held, self._compiled)

    def _take(self, compiled: ctypes.PyDLL | None) -> None:
        if compiled is None:
            return
        names = ("_spec", "_local_tensor")
        slots = (-1, -1) if self._specs is None else walking.slots_of(compiled, self._kind, names)
        if slots is None:  # this torch keeps things elsewhere
            self._asks = False
            return
        arrays = (self.table.numels, self.table.codes, self._found, self._scratch)
        places = [id(self._specs), id(self._device), *(array.ctypes.data for array in arrays)]
        # walk.cpp's struct: what it points to lives as long as the finder.
        self._expected = np.array([*places, id(self._kind), *slots], dtype=np.int64)
        self._address = self._expected.ctypes.data
        self._compiled = compiled

    def _by_attributes(self, holders: Sequence[Tensor]) -> Found | None:
        held: list[Tensor] = []
        specs = self._specs or [None] * len(holders)
        for holder, spec, numel, dtype in zip(holders, specs, self._numels, self._dtypes, strict=True):
            gradient: Any = holder if self._are_given else holder.grad
            if type(gradient) is not self._kind:
                return None
            if spec is not None and not self._has(spec, gradient):
                return None
            tensor = self._local(gradient)
            if not _fits(tensor, numel, dtype, self._device):
                return None
            held.append(tensor)
        return Found(addresses_of(held), lambda: list(held), held)

    @staticmethod
    def _has(spec: Any, gradient: Any) -> bool:
        return gradient._spec is spec or bool(gradient._spec == spec)

    def _locals(self, holders: Sequence[Any]) -> list[Tensor]:
        return [self._local(holder.grad) for holder in holders]

    def _local(self, gradient: Any) -> Tensor:
        local: Tensor = gradient if self._specs is None else gradient._local_tensor
        return local


def _kind_of(gradients: Sequence[Any]) -> tuple[type, list[Any] | None]:
    """The one class of all gradients; and of DTensors what each one's `_spec` is."""
    module = sys.modules.get("torch.distributed.tensor")
    dtensor = Tensor if module is None else module.DTensor
    kind = type(gradients[0]) if gradients else Tensor
    for i, gradient in enumerate(gradients):
        if type(gradient) is not kind or kind not in (Tensor, dtensor):
            raise ValueError(
                "expected gradients of exactly torch.Tensor, or of exactly DTensor, found gradient "
                f"{i} of {type(gradient).__name__}"
            )
    return kind, None if kind is Tensor else [gradient._spec for gradient in gradients]


def _fits(tensor: Tensor, numel: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this is just such a tensor on the device, and all of it is there."""
    return (
        type(tensor) is Tensor
        and tensor.dtype is dtype
        and tensor.device == device
        and not tensor.is_meta
        and tensor.layout is torch.strided
        and tensor.numel() == numel
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not tensor.is_inference()
        and not tensor._is_zerotensor()
        and not torch._C._is_cow_tensor(tensor)  # type: ignore[attr-defined]
        and has_memory(tensor, numel * tensor.element_size())
    )
