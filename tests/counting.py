"""What a call does, as torch's profiler sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

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
