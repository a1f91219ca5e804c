"""From what the caller has (modules, parameters, gradients) to `GradShard` objects.

One file for each framework; none imports another, and none imports a framework that the caller has
not imported already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from distnorm.errors import DistnormError
from distnorm.sources import declared, dtensor, fsdp1, plain
from distnorm.sources.declared import Piece, Sharded
from distnorm.sources.elsewhere import GradOf, GradPlace
from distnorm.sources.inventory import Inventory, Managers, Replicated
from distnorm.sources.layout import UNDECLARED, Layout
from distnorm.sources.recognition import recognise
from distnorm.sources.shards import GradShard, Source
from distnorm.sources.targets import (
    Fleeting,
    Tied,
    canonical_names,
    checked_tied,
    modules_of,
    named_tensors,
    read_once,
)

Target = Tensor | nn.Module | Iterable[Any]
"""One tensor, a module, or an iterable of tensors, of (name, tensor) pairs or of modules."""

__all__ = [
    "UNDECLARED",
    "Fleeting",
    "GradOf",
    "GradPlace",
    "Inventory",
    "Layout",
    "Managers",
    "Piece",
    "Replicated",
    "Sharded",
    "Source",
    "Target",
    "Tied",
    "checked_tied",
    "modules_of",
    "named_tensors",
    "read_once",
    "recognise",
    "shards_of",
]


def shards_of(
    named: Sequence[tuple[str, Tensor]],
    source: Source,
    *,
    target: Target = (),
    layout: Layout = UNDECLARED,
) -> list[GradShard]:
    """Describe every tensor's local piece.

    Args:
        named: names and tensors, as `named_tensors` gives them.
        source: what is measured of them.
        target: what they were named from. FSDP1's parameters are found by its modules.
        layout: how the whole model lies on the ranks.

    Raises:
        UnsupportedGradientError: a tensor that can't be described, named.
        ConfigError: a tensor is not the piece that it is declared to be, named.
        DistnormError: gradients were given where parameters are meant, or one name twice.
    """
    is_gradient = source is Source.GRADIENT
    if is_gradient and layout.place is None and named and all(_never_has_grad(t) for _, t in named):
        raise DistnormError(
            f"expected parameters, found {len(named)} tensors that hold no gradient and require none; "
            "were gradients passed where parameters are meant?"
        )
    plain_names = [fsdp1.plain_name(name, tensor) for name, tensor in named]
    names = canonical_names(plain_names, layout.stage, layout.tied)
    homes = fsdp1.homes(modules_of(target))
    shards: list[GradShard] = []
    place = layout.place if is_gradient else None
    for name, (_, tensor) in zip(names, named, strict=True):
        shard: GradShard
        is_flat = id(tensor) in homes or fsdp1.holds(tensor)
        if (piece := layout.declared.piece(name, tensor)) is not None:
            shard = declared.shard(name, tensor, source, piece, "FSDP1's, whose modules" if is_flat else None)
        elif is_flat:
            shard = fsdp1.shard(name, tensor, source, homes)
        else:
            shard = (dtensor if dtensor.holds(tensor) else plain).shard(name, tensor, source)
        shards.append(shard if place is None else replace(shard, place=place))
    return shards


def _never_has_grad(tensor: Tensor) -> bool:
    return not isinstance(tensor, nn.Parameter) and not tensor.requires_grad and tensor.grad is None
