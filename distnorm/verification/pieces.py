"""What this rank holds, read from torch alone: each parameter's name, its index set and its bits.

The library's own sources are left aside on purpose: what they get wrong has to show here.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distnorm.errors import DistnormError, UnsupportedGradientError

Extents = tuple[tuple[tuple[int, int], ...], ...]
"""For each dim of the whole parameter, the runs ``(start, stop)`` of indices that a piece holds, in order."""

_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Gradient:
    """What is known of a local gradient without its values, save for their digest and norm."""

    extents: Extents
    partial: tuple[tuple[int, int, int, str], ...]  # (mesh axis, coordinate, size of the axis, reduce op)
    shape: tuple[int, ...]
    dtype: torch.dtype
    digest: str
    norm: float


@dataclass(frozen=True, slots=True)
class Piece:
    """The piece of one parameter that one rank holds; `index` finds it on that rank."""

    rank: int
    index: int
    name: str
    global_shape: tuple[int, ...]
    extents: Extents
    shape: tuple[int, ...]
    digest: str
    gradient: Gradient | None


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a whole parameter, and what of it a piece holds that does not say so itself."""

    shape: tuple[int, ...]
    extents: Extents


GradientOf = Callable[[Tensor], Tensor | None]
"""From a parameter to its gradient."""


def in_grad(tensor: Tensor) -> Tensor | None:
    """Where gradients are, where nothing else is said."""
    return tensor.grad


def read_parameters(
    target: Any,
    stage: str | None = None,
    tied: Iterable[Sequence[str]] = (),
    layouts: Mapping[int, Layout] = MappingProxyType({}),
    gradient_of: GradientOf = in_grad,
) -> list[tuple[str, Tensor]]:
    """List a target's parameters under their names in the whole model, each tensor once."""
    same = {name: group[0] for group in tied for name in group}
    seen: set[int] = set()
    found = []
    for name, tensor in _pairs(target):
        if id(tensor) in seen or (gradient_of(tensor) is None and not tensor.requires_grad):
            continue
        seen.add(id(tensor))
        if getattr(tensor, "_fsdp_flattened", False) and id(tensor) not in layouts:
            raise UnsupportedGradientError(
                f"parameter '{name}': expected the FSDP1 model itself, found what FSDP1 has flattened alone"
            )
        found.append((same.get(name, name if stage is None else f"{stage}:{name}"), tensor))
    return found


def _pairs(target: Any) -> list[tuple[str, Tensor]]:
    if isinstance(target, Tensor):
        return [("0", target)]
    if isinstance(target, nn.Module):
        return [(clean_name(name, target), parameter) for name, parameter in target.named_parameters()]
    items = list(target.items() if isinstance(target, Mapping) else target)
    pairs: list[tuple[str, Tensor]] = []
    for position, item in enumerate(items):
        if isinstance(item, nn.Module):
            pairs += _pairs(item)
        elif isinstance(item, Tensor):
            pairs.append((str(position), item))
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            pairs.append((str(item[0]), item[1]))
        else:
            raise DistnormError(f"expected tensors, pairs or modules, found {type(item).__name__}")
    return pairs


def clean_name(name: str, module: nn.Module) -> str:
    """Drop from a name what DDP, torch.compile and activation checkpointing put into it."""
    kept: list[str] = []
    at: Any = module
    for part in name.split("."):
        wraps = part == "module" and isinstance(at, DistributedDataParallel)
        if not wraps and part not in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
            kept.append(part)
        at = getattr(at, part, None)
    return ".".join(kept)


def is_dtensor(tensor: object) -> bool:
    """Whether this is a DTensor; false wherever nobody has imported DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """The values that this rank holds, sharing memory with the tensor."""
    with torch.no_grad():
        return tensor.to_local() if is_dtensor(tensor) else tensor.detach()  # type: ignore[attr-defined]


def describe(
    rank: int, index: int, name: str, tensor: Tensor, p: float, layout: Layout | None, gradient_of: GradientOf
) -> Piece | None:
    """Describe one parameter's local piece; `None` on a rank outside its mesh."""
    if is_dtensor(tensor) and tensor.device_mesh.get_coordinate() is None:  # type: ignore[attr-defined]
        return None
    values = local_of(tensor)
    gradient = None
    if (found := gradient_of(tensor)) is not None:
        local = local_of(found)
        if local.layout is not torch.strided:
            raise UnsupportedGradientError(
                f"parameter '{name}': expected a dense gradient, found layout {local.layout}"
            )
        gradient = Gradient(
            extents_of(found) if layout is None else layout.extents,
            _partial_of(found, name),
            tuple(local.shape),
            local.dtype,
            digest(local),
            p_norm(local, p),
        )
    return Piece(
        rank,
        index,
        name,
        tuple(tensor.shape) if layout is None else layout.shape,
        extents_of(tensor) if layout is None else layout.extents,
        tuple(values.shape),
        digest(values),
        gradient,
    )


def _partial_of(gradient: Any, name: str) -> tuple[tuple[int, int, int, str], ...]:
    if not is_dtensor(gradient):
        return ()
    mesh, found = gradient.device_mesh, []
    for axis, placement in enumerate(gradient.placements):
        if placement.is_partial():
            op = str(getattr(placement, "reduce_op", placement))
            if type(placement).__name__ != "Partial" or op not in ("sum", "avg"):
                raise UnsupportedGradientError(
                    f"parameter '{name}': expected a Partial of sum or avg, found {placement}"
                )
            found.append((axis, mesh.get_coordinate()[axis], mesh.size(axis), op))
    return tuple(found)


def extents_of(tensor: Any) -> Extents:
    """Which indices of each dim of the whole tensor the local piece holds."""
    if not is_dtensor(tensor):
        return tuple(((0, size),) if size else () for size in tensor.shape)
    mesh, local = tensor.device_mesh, local_of(tensor)
    coordinate = mesh.get_coordinate()
    cuts: dict[int, list[tuple[int, int, int]]] = {}
    for axis, placement in enumerate(tensor.placements):
        if hasattr(placement, "dim"):  # Shard and _StridedShard; torch 2.13's is_shard() denies the latter
            cut = (mesh.size(axis), coordinate[axis], int(getattr(placement, "split_factor", 1)))
            cuts.setdefault(placement.dim % tensor.ndim, []).append(cut)
    return tuple(
        dim_runs(size, cuts.get(dim, []), local.shape[dim] if local.ndim == tensor.ndim else None)
        for dim, size in enumerate(tensor.shape)
    )


def dim_runs(
    size: int, cuts: list[tuple[int, int, int]], held: int | None = None
) -> tuple[tuple[int, int], ...]:
    """Cut a dim as its placements do: `cuts` are (parts, which, split factor) in the order of mesh axes.

    A strided shard was cut after the axes to its right whose sizes multiply to its split factor, so it is cut
    in that order here. Where the factor matches none (views make such), or the order leaves another number of
    elements than the `held` ones, the dim is cut by torch's own definition, left to right.
    """
    whole: tuple[tuple[int, int], ...] = ((0, size),) if size else ()
    order = _order_made(cuts)
    made = whole
    for parts, which, _ in order or []:
        made = _chunk(made, parts, which)
    if order is not None and held in (None, _length(made)):
        return made
    defined = whole
    for parts, which, factor in cuts:
        runs = [_chunk(_chunk(defined, factor, run), parts, which) for run in range(factor)]
        defined = _join(run for part in runs for run in part)
    return made if order is not None and _length(defined) != held else defined


def _order_made(cuts: list[tuple[int, int, int]]) -> list[tuple[int, int, int]] | None:
    order: list[tuple[int, int, int]] = []
    for cut in reversed(cuts):
        before = [math.prod(parts for parts, _, _ in order[:k]) for k in range(len(order) + 1)]
        if cut[2] not in before:
            return None
        order.insert(before.index(cut[2]), cut)
    return order


def _chunk(runs: tuple[tuple[int, int], ...], parts: int, which: int) -> tuple[tuple[int, int], ...]:
    step = -(-_length(runs) // parts)
    start, stop, at, kept = which * step, (which + 1) * step, 0, []
    for low, high in runs:
        begin, end = max(low, low + start - at), min(high, low + stop - at)
        if begin < end:
            kept.append((begin, end))
        at += high - low
    return tuple(kept)


def _join(runs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for low, high in runs:
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return tuple(joined)


def _length(runs: tuple[tuple[int, int], ...]) -> int:
    return sum(high - low for low, high in runs)


def digest(tensor: Tensor) -> str:
    """A digest of a tensor's dtype, shape and bits."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    sha = hashlib.sha256(f"{flat.dtype} {tuple(flat.shape)}".encode())
    if flat.numel():  # read in place: neither a copy nor numpy is needed
        sha.update((ctypes.c_char * (flat.numel() * flat.element_size())).from_address(flat.data_ptr()))
    return sha.hexdigest()


def p_norm(tensor: Tensor, p: float) -> float:
    """The p-norm of a tensor's elements in fp64, scaled by the largest so that no power overflows."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    chunks = torch.split(tensor.detach().reshape(-1), _CHUNK) if tensor.numel() else ()
    return combine(
        [_chunk_norm(chunk.to(wide).abs(), p) for chunk in chunks],
        p,
    )


def _chunk_norm(magnitudes: Tensor, p: float) -> float:
    largest = float(magnitudes.max())  # NaN wins over everything else
    if largest == 0 or not math.isfinite(largest) or math.isinf(p):
        return largest
    total = float((magnitudes / largest).pow(p).sum())
    return float(largest * total ** (1 / p))


def combine(norms: Iterable[float], p: float) -> float:
    """The p-norm of what has these p-norms piece by piece."""
    norms = list(norms)
    if any(math.isnan(norm) for norm in norms):
        return math.nan
    largest = max(norms, default=0.0)
    if largest == 0 or math.isinf(largest) or math.isinf(p):
        return largest
    return float(largest * math.fsum((norm / largest) ** p for norm in norms) ** (1 / p))
