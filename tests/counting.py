"""What a call does, as torch's profiler sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distnorm import kernels
from distnorm.kernels import addresses, dispatch, eager, gpu, native
from distnorm.measure.fast_path import FastPath
from distnorm.measure.meter import Meter

HOST_READS = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::_unique2",
}


def collectives_and_reads(call: Callable[[], object]) -> tuple[dict[str, int], dict[str, int]]:
    """How often each collective ran, and each operator that waits for the device to read a value."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    counted = Counter({event.key: event.count for event in profiler.key_averages()})
    collectives = {key: n for key, n in counted.items() if key.startswith(("c10d::", "_c10d_functional::"))}
    return collectives, {key: n for key, n in counted.items() if key in HOST_READS}


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The same, where Triton's kernels take that memory: in its interpreter, or none at all."""

    def usable(device: torch.device) -> bool:
        return device.type == "cpu"

    read = FastPath.read
    with (
        as_on_an_accelerator(),
        mock.patch.object(FastPath, "read", read),
        mock.patch.object(gpu, "usable", usable),
    ):
        yield


@contextmanager
def as_on_an_accelerator() -> Iterator[None]:
    """Take the CPU's memory for a device's: nothing there is on the host, nor for compiled C, and whoever
    doesn't have to read results doesn't."""

    def never(tensor: Tensor) -> bool:
        return False

    def none_fits(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [], list(tensors)

    with (
        mock.patch.object(Meter, "listens", property(lambda meter: meter.waits)),
        mock.patch.object(FastPath, "read", lambda path, holders: None),
        mock.patch.multiple(kernels, on_host=never, split=none_fits),
        mock.patch.object(addresses, "on_host", never),
        mock.patch.object(dispatch, "on_host", never),
        mock.patch.object(eager, "on_host", never),
        mock.patch.object(native, "split", none_fits),
    ):
        yield
