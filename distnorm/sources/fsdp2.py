"""FSDP2 (`fully_shard`): the sharded parameters behind a module, and whether their gradients are complete.

Outside of its sharded state a module shows other tensors than those that hold the gradients. What a backward
pass without gradient synchronisation leaves is held by FSDP2 itself and not by any parameter.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distnorm import kernels


def _groups(module: nn.Module) -> Iterator[Any]:
    """FSDP2's parameter groups of this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not hasattr(fsdp, "FSDPModule") or not isinstance(module, fsdp.FSDPModule):
        return
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12 a module has one group at most
        groups = [state._fsdp_param_group]
    yield from (group for group in groups if group is not None)


def managed_parameters(module: nn.Module) -> Iterator[Tensor]:
    """The sharded parameters that FSDP2 manages for this very module."""
    for group in _groups(module):
        yield from map(_sharded, group.fsdp_params)


def _sharded(managed: Any) -> Tensor:
    """The sharded parameter itself; what has replaced it, of which FSDP2 learns in its next forward only."""
    info = managed._module_info
    shown = info.module._parameters.get(info.param_name) if managed.sharded_state.name == "SHARDED" else None
    sharded: Tensor = managed.sharded_param if shown is None else shown
    return sharded


def gathered_parameters(module: nn.Module) -> Iterator[Tensor]:
    """What this very module shows in their place while FSDP2 has them gathered."""
    for group in _groups(module):
        for managed in group.fsdp_params:
            if (gathered := getattr(managed, "_unsharded_param", None)) is not None:
                yield gathered


def sharded_parameters(module: nn.Module) -> Mapping[tuple[int, str], Tensor]:
    """The sharded parameter for every (id of a module, name of its parameter) that FSDP2 manages inside."""
    found: dict[tuple[int, str], Tensor] = {}
    for inner in module.modules():
        for group in _groups(inner):
            for managed in group.fsdp_params:
                info = managed._module_info
                owners = [(info.module, info.param_name)]
                owners += zip(info.shared_modules, info.shared_param_names, strict=True)
                found |= {(id(owner), name): _sharded(managed) for owner, name in owners}
    return found


class UnreducedGradients:
    """Finds gradients that FSDP2 still holds back.

    Args:
        modules: those that manage parameters, without the modules inside them.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._groups = [weakref.ref(group) for module in modules for group in _groups(module)]
        # FSDP2 makes those of a group once, together; their memory is freed while it is sharded.
        self._unsharded: list[Tensor] = []
        self._unknown = list(self._groups)

    def find(self) -> Iterator[tuple[Tensor, str]]:
        """Sharded parameters whose gradients are not complete, each with the reason."""
        groups = [group for group in (ref() for ref in self._groups) if group is not None]
        if self._unknown:
            self._unknown = [ref for ref in self._unknown if not self._knows(ref())]
        for group in groups:
            if group._partial_reduce_output is not None:
                yield group.fsdp_params[0].sharded_param, _NOT_ALL_REDUCED
            if group.mp_policy.reduce_dtype is not None or group.mp_policy.param_dtype is not None:
                held_back = (p for p in group.fsdp_params if p.unsharded_accumulated_grad is not None)
                yield from ((p.sharded_param, _NOT_SYNCHRONISED) for p in held_back)
        if kernels.first_with_gradient(self._unsharded) >= 0:
            for managed in (p for group in groups for p in group.fsdp_params):
                unsharded = getattr(managed, "_unsharded_param", None)
                if unsharded is not None and unsharded.grad is not None:
                    yield managed.sharded_param, _NOT_SYNCHRONISED

    def _knows(self, group: Any) -> bool:
        """Whether the unsharded parameters of a group are known."""
        if group is None:
            return True
        if not group.fsdp_params or not hasattr(group.fsdp_params[0], "_unsharded_param"):
            return False
        made = [getattr(managed, "_unsharded_param", None) for managed in group.fsdp_params]
        known = {id(tensor) for tensor in self._unsharded}
        self._unsharded += [tensor for tensor in made if tensor is not None and id(tensor) not in known]
        return all(tensor is not None for tensor in made)


GATHERED = (
    "expected a parameter as FSDP2 shards it, found the gathered one that the module shows meanwhile, whose "
    "gradient FSDP2 takes away; pass the module itself, or call its reshard() before parameters()"
)
_NOT_ALL_REDUCED = (
    "expected a gradient that FSDP2 has reduced over all axes, found one that is not all-reduced over "
    "replicas; call set_requires_all_reduce(True) before the last backward pass"
)
_NOT_SYNCHRONISED = (
    "expected a gradient that FSDP2 has reduced, found what a backward pass without gradient synchronisation "
    "left; call set_requires_gradient_sync(True) before the last backward pass"
)
