"""The optimizer over parameters of several layouts."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from distnorm import Config


def make_optimizer(parameters: Iterable[Tensor], config: Config) -> Optimizer:
    """Make the optimizer, one parameter group for each mesh that parameters live on.

    A fused step passes a group's tensors to one operator, which refuses DTensors of two meshes in a call.
    """
    by_mesh: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        by_mesh.setdefault(mesh, []).append(parameter)
    groups = [{"params": group} for group in by_mesh.values()]
    chosen = config.train.optimizer
    # Not fused is foreach on a GPU and one tensor at a time on CPU, torch's own defaults.
    fused = True if chosen.fused else None
    if chosen.name == "sgd":
        if set(by_mesh) != {None}:
            fused = None  # torch's fused SGD takes no DTensor
        return SGD(groups, lr=chosen.lr, weight_decay=chosen.weight_decay, fused=fused)
    return AdamW(groups, lr=chosen.lr, weight_decay=chosen.weight_decay, fused=fused)
