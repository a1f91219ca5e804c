"""Fingerprints of what this rank counts of each gradient, in the read that gives the statistic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
                self._remember({self._names[i]: n for i, n in zip(places, found[1].tolist(), strict=True)})
                return None if kernel is None else found[0]
        prints: dict[str, int | Tensor] = {}
        for name, (start, count), tensor in zip(self._names, self._counted, gradients.tensors, strict=True):
            if tensor is not None:
                prints[name] = kernels.checksum(tensor.reshape(-1)[start : start + count])
        self._remember(prints)
        return None

    def _remember(self, prints: dict[str, int | Tensor]) -> None:
        self._kept.pop(number := self._number(), None)
        self._kept[number] = prints
        while len(self._kept) > self._keep:
            del self._kept[next(iter(self._kept))]
