"""Which kernel takes which tensors: compiled code what it can, torch's operators the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from distnorm.kernels import eager, gpu, native


def measure_spans(spans: native.Spans, kernel: native.Kernel) -> Tensor:
    """The statistic of spans: [1] fp64 on the CPU."""
    return torch.tensor([native.statistic(spans, kernel)], dtype=torch.float64)


def measure(tensors: Sequence[Tensor], kernel: native.Kernel) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Measure what compiled code can of tensors of one device.

    Returns:
        Its statistic, [1] fp64 on that device, or none if there was nothing for it; and the tensors that it
        left.
    """
    if tensors and tensors[0].is_cuda:
        fitting, rest = gpu.split(tensors)
        table = gpu.table_of(fitting) if fitting else None
        return ([], tensors) if table is None else ([gpu.statistic(table, kernel)], rest)
    fitting, rest = native.split(tensors)
    if not fitting:
        return [], rest
    return [measure_spans(native.Spans.of(fitting), kernel)], rest


def scale_spans_(spans: native.Spans, coef: Tensor) -> bool:
    """Multiply what lies in spans, as `scale_` does; whether anything was changed. Autograd is not told."""
    factor = float(coef.cpu().numpy())
    if factor != 1:
        native.scale_(spans, factor)
    return factor != 1


def scale_(tensors: Sequence[Tensor], coef: Tensor) -> None:
    """Multiply every tensor in place by a 0-d coefficient that stays on its device.

    The roundings are those of `distnorm.kernels.eager.scale_`, bit for bit. A coefficient of 1 costs no pass
    if it is in the host's memory, or compiled code takes the tensors.
    """
    if coef.device.type == "cpu":  # there is no device to wait for
        factor = float(coef.numpy())
        if factor == 1:
            return
        fitting, tensors = native.split(tensors)
        if fitting:
            torch.autograd.graph.increment_version(fitting)
            native.scale_(native.Spans.of(fitting), factor)
    fitting, rest = gpu.split(tensors)
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for tensor in fitting:
        by_device[tensor.device].append(tensor)
    for members in by_device.values():
        table = gpu.table_of(members)
        if table is None or table.overlap:
            rest += members
        else:
            torch.autograd.graph.increment_version(members)
            gpu.scale_(table, coef)
    eager.scale_(rest, coef)
