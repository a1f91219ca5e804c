"""Exact fingerprints of local gradients, by which a rank that computes otherwise the second time is found.

Silent corruption (a bit that flips in memory, or a core that multiplies wrongly) shows on no replica where
nobody has one. But a micro-batch that is run again on healthy hardware gives the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distnorm import kernels
from distnorm.clipper import GradClipper
from distnorm.errors import DistnormError, NonFiniteGradientError, ReplicaError
from distnorm.measure.fingerprints import by_name
from distnorm.plan.collectives import Ranks
from distnorm.plan.terms import stable_hash
from distnorm.sources import Source, Tied, named_tensors, read_once, shards_of
from distnorm.sources.layout import Layout
from distnorm.sources.shards import PartialGrad

_WHOLE = 1 << 24  # bytes that `kernels.fingerprints` reads all of


class Fingerprints:
    """Fingerprints of this rank's gradients in the last few steps.

    A fingerprint is an integer of all of a gradient's bits: any change of one bit changes it. Recording is
    local, and reads every gradient once more. A `GradClipper` with ``monitor.fingerprints`` takes them in the
    read that gives the norm, of what each rank counts: see `replay`.

    Args:
        target: as for `GradClipper`.
        keep: how many steps are remembered.
        group: the ranks that compare; default: the whole world, or this process alone.
        tied: groups of names that are one parameter.
    """

    def __init__(
        self, target: Any, keep: int = 8, *, group: ProcessGroup | None = None, tied: Tied = ()
    ) -> None:
        self._target, self._keep, self._group, self._tied = read_once(target), keep, group, tied
        self._steps: OrderedDict[int, dict[str, int]] = OrderedDict()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are remembered, oldest first."""
        return tuple(self._steps)

    def record(self, step: int) -> None:
        """Remember the gradients of a step, before they are clipped. Local."""
        self._steps[step] = self._now()
        while len(self._steps) > self._keep:
            self._steps.popitem(last=False)

    def differing(self, step: int) -> list[tuple[int, str]]:
        """Compare the gradients that are here now, of the same batch run again, with those of a step.

        Collective: every rank must call it, with the same step.

        Returns:
            The rank in the group, and the parameter, of each gradient whose bits are others; the same on
            every rank.

        Raises:
            DistnormError: the step isn't remembered on some rank.
        """
        ranks = Ranks(self._group)
        with ranks.together():
            if step not in self._steps:
                raise DistnormError(f"expected one of the steps {list(self._steps)}, found {step}")
            before, now = self._steps[step], self._now()
        return _gathered(ranks, before, now)

    def replay(self, compute: Callable[[], object], step: int | None = None) -> list[tuple[int, str]]:
        """Compute a micro-batch again, and compare it with what was recorded. Collective, as `differing`.

        Args:
            compute: fills the gradients as the recorded step had them, with the same weights; on every rank.
            step: which one; default: the newest.
        """
        at = next(reversed(self._steps), -1) if step is None else step
        compute()
        return self.differing(at)

    def _now(self) -> dict[str, int]:
        with kernels.plain_operators(), torch.no_grad():
            named = named_tensors(self._target)
            shards = shards_of(named, Source.GRADIENT, target=self._target, layout=Layout.of(tied=self._tied))
            names, local = [], []
            for shard in shards:
                if (found := shard.read()) is not None:
                    names.append(shard.name)
                    local.append(found.tensor if isinstance(found, PartialGrad) else found)
            return {n: int(p) for n, p in by_name(zip(names, fingerprints_of(local), strict=True)).items()}


def replay(
    clipper: GradClipper, compute: Callable[[], object], step: int | None = None
) -> list[tuple[int, str]]:
    """Compute a step's gradients again on suspicion, and name those whose bits are others the second time.

    Collective: every rank must call it, after `clip` and before the optimizer changes the weights. What is in
    the gradients afterwards is what `compute` left there, unclipped.

    Args:
        clipper: one with ``monitor.fingerprints``.
        compute: fills the gradients again from the same micro-batch, on every rank.
        step: one of those in ``clipper.fingerprints``; default: the newest.

    Returns:
        The rank in the group, and the parameter, of each gradient that differs; the same on every rank. Of
        replicas each rank compares the part that it counts.

    Raises:
        DistnormError: on every rank: fingerprints of the step aren't kept on some rank.
    """
    ranks = Ranks(clipper.join_process_group)
    with ranks.together():
        kept = clipper.fingerprints
        at = next(reversed(kept), -1) if step is None else step
        if at not in kept:
            raise DistnormError(
                "expected a step whose fingerprints are kept (monitor.fingerprints), "
                f"found {at} of {list(kept)}"
            )
    compute()
    with suppress(NonFiniteGradientError, ReplicaError):  # which the fingerprints, taken before, say better
        clipper.measure()
    now = clipper.fingerprints
    return _gathered(ranks, kept[at], now[next(reversed(now))])


def _gathered(ranks: Ranks, before: Mapping[str, int], now: Mapping[str, int]) -> list[tuple[int, str]]:
    mine = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return [(rank, name) for rank, names in enumerate(ranks.gather(mine)) for name in names]


def fingerprints_of(tensors: Sequence[Tensor]) -> list[int]:
    """A fingerprint of each tensor's bits, all of them read. Local."""
    chunks = [list(_chunks(tensor)) for tensor in tensors]
    flat = [chunk for of_one in chunks for chunk in of_one]
    found: Sequence[int] | None = None
    if flat and all(chunk.is_cpu for chunk in flat):
        rows = kernels.fingerprints(kernels.AddressTable.of(flat))
        found = None if rows is None else rows.tolist()
    if found is None:
        found = [int(kernels.checksum(chunk)) for chunk in flat]
    each, at = [], 0
    for of_one in chunks:
        each.append(stable_hash(repr(list(found[at : at + len(of_one)]))))
        at += len(of_one)
    return each


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    plain = tensor.detach().contiguous().view(-1)
    yield from torch.split(plain, max(1, _WHOLE // plain.element_size())) if plain.numel() else ()
