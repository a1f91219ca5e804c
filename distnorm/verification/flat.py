"""FSDP1: which elements of its flat parameters a rank holds, cut anew from the sizes laid end to end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from distnorm.errors import UnsupportedGradientError
from distnorm.verification.pieces import Layout, clean_name


def layouts_of(target: Any) -> dict[int, Layout]:
    """Find the layout of every parameter that FSDP1 manages, by the `id` of what its module shows."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or isinstance(target, Tensor):
        return {}
    items = target.values() if isinstance(target, Mapping) else target
    found: dict[int, Layout] = {}
    for module in [target] if isinstance(target, nn.Module) else items:
        for unit in module.modules() if isinstance(module, nn.Module) else ():
            if isinstance(unit, fsdp.FullyShardedDataParallel) and unit._handle is not None:
                is_whole = unit.sharding_strategy is fsdp.ShardingStrategy.NO_SHARD
                found.update(_layouts_in(unit, 1 if is_whole else dist.get_world_size(unit.process_group)))
    return found


def _layouts_in(unit: Any, parts: int) -> dict[int, Layout]:
    flat = unit._handle.flat_param
    if any(flat._param_extensions):
        raise UnsupportedGradientError(
            f"parameter '{flat._fqns[0]}': expected plain tensors under FSDP1, found DTensors"
        )
    # torch cuts as `chunk` does, and pads the last parts to the length of the first
    held = -(-sum(flat._numels_with_padding) // parts)
    low = dist.get_rank(unit.process_group) * held if parts > 1 else 0
    if not unit._use_orig_params:
        return {id(flat): Layout((held * parts,), (((low, low + held),),))}
    shown = {clean_name(name, unit): tensor for name, tensor in unit.named_parameters(remove_duplicate=False)}
    found: dict[int, Layout] = {}
    spans = zip(flat._fqns, flat._shapes, _spans(flat), strict=True)
    for name, shape, (start, size) in spans:
        if parts == 1:
            layout = Layout(tuple(shape), tuple(((0, n),) if n else () for n in shape))
        else:
            begin, end = max(low - start, 0), min(low + held - start, size)
            layout = Layout((size,), (((begin, end),) if begin < end else (),))
        found[id(shown[clean_name(name, unit)])] = layout
    return found


def _spans(flat: Any) -> Iterator[tuple[int, int]]:
    """Where each parameter starts, and its size; alignment leaves gaps between them."""
    at = 0
    for size, is_gap in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not is_gap:
            yield at, size
        at += size
