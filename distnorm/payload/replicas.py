"""Whether replicas of a gradient have the same bits, and whose differ: a faulty device, or a desync.

Each rank writes the checksum of every gradient that has replicas into values that only it writes, as two
halves that fp64 holds exactly. So any reduction is a gather, all 64 bits are compared, and one flipped bit
always shows. The cost is 16 bytes for each replicated shard of each rank, and one reading of all of each such
gradient, on the steps that ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import ConfigError
from distnorm.plan.model_table import MOST_ROWS, ModelTable

_HALF = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Divergence:
    """Replicas of a parameter whose gradients differ.

    Args:
        name: the parameter's.
        ranks: ascending; those with another gradient than most of its replicas, all of them where there is no
            "most", as with two.
    """

    name: str
    ranks: tuple[int, ...]


class ReplicaChecksums:
    """The payload of the checksums of one set of shards.

    Args:
        table: the model's parameters.

    Raises:
        ConfigError: the table has no rows. It is the same on every rank, and so is this error.
    """

    def __init__(self, table: ModelTable) -> None:
        if table.rows is None:
            raise ConfigError(
                f"monitor.replicas: expected at most {MOST_ROWS} shards over all ranks, found more; "
                "set it to false"
            )
        self._table, self._rows = table, table.rows
        self._checked = np.flatnonzero(self._rows.replicated)
        start = self._rows.start
        first, last = np.searchsorted(self._checked, (start, start + len(self._rows.mine))).tolist()
        self._mine = slice(first, last)
        self._shards = [self._rows.mine[row - start] for row in self._checked[self._mine].tolist()]
        # Replicas one behind the other, and where each begins.
        self._order = np.argsort(self._rows.identities[self._checked], kind="stable")
        found = self._rows.identities[self._checked][self._order]
        self._begins = np.flatnonzero(np.diff(found, prepend=-1))

    @property
    def length(self) -> int:
        """Number of values."""
        return 2 * len(self._checked)

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """This rank's values, [length] fp64. No device is waited for.

        Args:
            gradients: of all shards, in their order: the whole local ones. A missing one counts as zeros do.
            device: where the values are to be.
        """
        values = torch.zeros(2, len(self._checked), dtype=torch.float64, device=device)
        mine = [gradients[i] for i in self._shards]
        sums = [
            torch.zeros((), dtype=torch.int64, device=device) if g is None else kernels.checksum(g)
            for g in mine
        ]
        if sums:
            stacked = torch.stack([kernels.moved(one, device) for one in sums])
            values[:, self._mine] = torch.stack([(stacked >> 32) & _HALF, stacked & _HALF]).double()
        return values.view(-1)

    def diverged(self, reduced: Tensor) -> tuple[Divergence, ...]:
        """The parameters whose replicas differ, in the table's order.

        Args:
            reduced: [length], in the host's memory.
        """
        if not self._checked.size:
            return ()
        values = reduced.numpy().reshape(2, -1)[:, self._order]
        sizes = np.diff(self._begins, append=len(self._order))
        differs = (values != np.repeat(values[:, self._begins], sizes, axis=1)).any(axis=0)
        found: dict[int, set[int]] = {}
        for one in np.flatnonzero(np.logical_or.reduceat(differs, self._begins)).tolist():
            run = slice(self._begins[one], self._begins[one] + sizes[one])
            rows = self._checked[self._order[run]]
            slot = int(self._rows.slots[rows[0]])
            odd = _odd(list(map(tuple, values[:, run].T.tolist())))
            found.setdefault(slot, set()).update(self._rows.ranks[rows[odd]].tolist())
        return tuple(
            Divergence(self._table.names[slot], tuple(sorted(found[slot]))) for slot in sorted(found)
        )


def _odd(values: list[tuple[float, ...]]) -> list[int]:
    """Places of the values that are unlike most others, or all places if none has more than others."""
    counts = sorted((values.count(value), value) for value in set(values))
    most = counts[-1]
    if len(counts) > 1 and counts[-2][0] == most[0]:
        return list(range(len(values)))
    return [i for i, value in enumerate(values) if value != most[1]]
