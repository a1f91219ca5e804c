"""Fingerprints of what this rank counts of each gradient, in the read that gives the statistic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from distnorm import kernels
from distnorm.measure.gradients import Gradients
from distnorm.measure.norms import Norm
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard

Kept = dict[int, dict[str, int | Tensor]]
"""By step and name. On a GPU a fingerprint is a 0-d tensor, which nobody has waited for."""

_ODD = 0x2545F4914F6CDD1D  # so that multiplying by it loses no bit of 64


def by_name(prints: Iterable[tuple[str, int | Tensor]]) -> dict[str, int | Tensor]:
    """Fingerprints by name, those of several tensors of one name, as tied ones are, in one number: a change
    of any one of them changes it."""
    found: dict[str, int | Tensor] = {}
    for name, print_ in prints:
        found[name] = print_ if name not in found else _joined(found[name], print_)
    return found


def _joined(first: int | Tensor, second: int | Tensor) -> int | Tensor:
    both = first * _ODD + second  # a tensor's wraps at 64 bits by itself
    return both if isinstance(both, Tensor) else (both + (1 << 63)) % (1 << 64) - (1 << 63)


class FingerprintedReads:
    """Gives the statistic with the bits that it has anyway, and keeps the fingerprints of the newest steps.

    Where compiled code reads the CPU's memory, one read gives both; elsewhere gradients are read again.

    Args:
        norm: which norm.
        shards: what this rank holds.
        shares: what it counts of each.
        kept: where fingerprints are kept.
        keep: of how many steps.
        number: says which step is being measured.
    """

    reads_before = False

    def __init__(
        self,
        norm: Norm,
        shards: Sequence[GradShard],
        shares: Sequence[Share],
        kept: Kept,
        keep: int,
        number: Callable[[], int],
    ) -> None:
        self._norm, self._names = norm, [shard.name for shard in shards]
        counted = [(share.start, share.stop - share.start) for share in shares]
        self._counted: npt.NDArray[np.int64] = np.array(counted, dtype=np.int64).reshape(-1, 2)
        self._kept, self._keep, self._number = kept, keep, number

    def close(self) -> None:
        """Nothing is held."""

    def take(self, gradients: Gradients) -> Tensor | None:
        """The statistic, [1], of all gradients; `None` where it has to be taken apart."""
        if gradients.fake is not None:
            return None
        table, places = gradients.addresses()
        if table is not None and len(places):
            starts, numels = (np.ascontiguousarray(column) for column in self._counted[places].T)
            kernel = self._norm.kernel
            found = kernels.printed_statistic(table.part(starts, numels), kernel or kernels.Kernel.SQUARES)
            if found is not None:
                self._remember(zip(map(self._names.__getitem__, places), found[1].tolist(), strict=True))
                return None if kernel is None else found[0]
        prints: list[tuple[str, int | Tensor]] = []
        for name, (start, count), tensor in zip(self._names, self._counted, gradients.tensors, strict=True):
            if tensor is not None:
                prints.append((name, kernels.checksum(tensor.reshape(-1)[start : start + count])))
        self._remember(prints)
        return None

    def _remember(self, prints: Iterable[tuple[str, int | Tensor]]) -> None:
        self._kept.pop(number := self._number(), None)
        self._kept[number] = by_name(prints)
        while len(self._kept) > self._keep:
            del self._kept[next(iter(self._kept))]
