"""Slices of stacked parameters, such as the experts of a layer or the heads of a projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

import numpy as np

from distnorm.config import SliceConfig
from distnorm.errors import ConfigError
from distnorm.payload.dots import Operands
from distnorm.payload.flat import refuse_flat
from distnorm.plan.collectives import Ranks
from distnorm.plan.model_table import ModelTable
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard


@dataclass(frozen=True, slots=True)
class _Part:
    """Neighbouring indices of one slice that this rank counts: of the shard, the dim, and the run there."""

    shard: int
    dim: int
    start: int
    stop: int
    slot: int


class Slices:
    """Which slices a model has, and what this rank counts of them. Collective: every rank must make one.

    Args:
        ranks: who takes part.
        table: the model's parameters.
        shards: what this rank holds.
        shares: what it counts of each; replicas share the indices along the dim.
        config: `monitor.slices`.

    Attributes:
        names: of all slices, as they are indexed: ``w[3]``, ``w[0:64]``, ``w[:, 3]``.
        of: the parameter of each slice.
        numels: elements of each slice.
        slots: for each of `parts` the place of its slice in `names`.
        sliced: positions of this rank's shards that are sliced.

    Raises:
        ConfigError: a pattern matches no parameter, or two the same; or it has no such dim, or `size` doesn't
            divide it. On every rank.
        UnsupportedGradientError: a shard is a run of a flat parameter; on every rank.
    """

    def __init__(
        self,
        ranks: Ranks,
        table: ModelTable,
        shards: Sequence[GradShard],
        shares: Sequence[Share],
        config: Sequence[SliceConfig],
    ) -> None:
        names, self.of, self.numels = list[str](), list[str](), list[int]()
        ways: dict[int, tuple[SliceConfig, int]] = {}  # by parameter: how, and the place of its first slice
        for slot, name in _in_order(table, config):
            each = _checked(name, table.shapes[slot], [c for c in config if _matches(c, name)])
            ways[slot] = each, len(names)
            new = _names(name, each, table.shapes[slot][each.dim])
            names += new
            self.of += [name] * len(new)
            self.numels += [table.numels[slot] // max(len(new), 1)] * len(new)
        self.names = tuple(names)
        held = [i for i, shard in enumerate(shards) if shard.numel and table.slots[i] in ways]
        expected = "shards along dims, of which monitor.slices are slices"
        refuse_flat(ranks, (shards[i] for i in held), expected, "take the pattern out")
        self.sliced = frozenset(held)
        self._parts = [part for i in held for part in _parts(i, shards[i], shares[i], *ways[table.slots[i]])]
        self._shapes = {i: _shape(shards[i]) for i in held}
        self.slots = np.array([part.slot for part in self._parts], dtype=np.int64)

    def parts(self, tensors: Sequence[Operands]) -> list[Operands]:
        """What this rank counts of the slices, for each of `slots`, of the local tensors of all shards."""
        return [
            tuple(
                None
                if t is None
                else t.reshape(self._shapes[p.shard]).narrow(p.dim, p.start, p.stop - p.start)
                for t in tensors[p.shard]
            )
            for p in self._parts
        ]


def _matches(config: SliceConfig, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in config.params)


def _in_order(table: ModelTable, config: Sequence[SliceConfig]) -> list[tuple[int, str]]:
    """The parameters that are sliced, in the order of the model."""
    useless = [
        pattern
        for each in config
        for pattern in each.params
        if not any(fnmatchcase(name, pattern) for name in table.names)
    ]
    if useless:
        raise ConfigError(f"monitor.slices: expected patterns that match parameters, found {useless}")
    return [(i, name) for i, name in enumerate(table.names) if any(_matches(c, name) for c in config)]


def _checked(name: str, shape: tuple[int, ...], found: Sequence[SliceConfig]) -> SliceConfig:
    each = found[0]
    if len(found) > 1:
        raise ConfigError(f"monitor.slices: expected each parameter in one entry, found {name!r} in two")
    if each.dim >= len(shape) or shape[each.dim] % each.size:
        raise ConfigError(
            f"monitor.slices: expected a dim {each.dim} whose size is a multiple of {each.size}, found "
            f"{name!r} of shape {shape}"
        )
    return each


def _names(name: str, each: SliceConfig, size: int) -> list[str]:
    before = ":, " * each.dim
    if each.size == 1:
        return [f"{name}[{before}{i}]" for i in range(size)]
    return [f"{name}[{before}{i}:{i + each.size}]" for i in range(0, size, each.size)]


def _shape(shard: GradShard) -> tuple[int, ...]:
    """The local shape; a whole parameter may come flat."""
    return shard.global_shape if shard.numel == shard.global_numel else shard.shape


def _parts(i: int, shard: GradShard, share: Share, each: SliceConfig, first: int) -> list[_Part]:
    whole = shard.numel == shard.global_numel
    indices = np.arange(shard.global_shape[each.dim]) if whole else shard.indices(each.dim).numpy()
    begin, end = (len(indices) * k // share.replicas for k in (share.index, share.index + 1))
    runs = groupby(range(begin, end), key=lambda place: int(indices[place]) // each.size)
    return [
        _Part(i, each.dim, places[0], places[-1] + 1, first + which)
        for which, places in ((which, list(places)) for which, places in runs)
    ]
