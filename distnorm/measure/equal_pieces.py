"""Whether pieces that the caller declared are copies of one tensor, and so counted once for each.

Coverage can't show it: copies that are declared to be pieces add up to a larger parameter. Equal values alone
don't either, as norms begin as ones and biases as zeros, nor do equal gradients, as the rows of a last layer
may have. So pieces are suspect whose values *and* gradients have equal bits, where the gradient's elements
differ from each other. Even these may be pieces, which began alike, by one seed on every rank, and were
trained alike ever since. Nothing tells the two apart, so they are named in a warning, and nothing is refused.

Most pieces have other values when they are planned, and gradients are only read of those that have not, in
the first steps of a plan.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.plan.collectives import Ranks
from distnorm.plan.join import join
from distnorm.plan.plan import described, has_values, identity_rows, piece_of, to_host
from distnorm.plan.terms import stable_hash
from distnorm.sources.declared import DeclaredShard
from distnorm.sources.shards import GradShard

_STEPS = 8  # in which gradients are read, at most: some are zero in the first
_log = logging.getLogger("distnorm")


@dataclass(slots=True)
class EqualPieces:
    """The declared pieces of one plan that have the values of another piece. Made by all ranks together.

    Args:
        ranks: who takes part.
        positions: of those of this rank whose gradients have not been compared yet.
        names, pieces: the parameter of each position, and which piece of it this is, as a text.
        rows: {position: [2] hashes of name and piece}.
        steps: in how many further steps gradients are compared.
    """

    ranks: Ranks
    positions: list[int]
    names: dict[int, str]
    pieces: dict[int, str]
    rows: dict[int, Tensor]
    steps: int = _STEPS

    @classmethod
    def of(cls, ranks: Ranks, shards: Sequence[GradShard]) -> EqualPieces | None:
        """Find them by the parameters' values; `None` if no rank has any. Collective: every rank must call
        it, with the shards of one plan. Waits for their devices."""
        with kernels.plain_operators():
            declared = [
                i
                for i, shard in enumerate(shards)
                if isinstance(shard, DeclaredShard)
                and 0 < shard.numel < shard.global_numel
                and has_values(shard)
            ]
            rows = identity_rows([shards[i] for i in declared])
            has_twin = _have_twins(ranks, rows, _prints([shards[i].witness() for i in declared]))
            found = [k for k, is_so in enumerate(has_twin) if is_so]
            if not ranks.any(bool(found))[0]:
                return None
            at = [declared[k] for k in found]
            return cls(
                ranks,
                at,
                {i: shards[i].name for i in at},
                {i: piece_of(shards[i]) for i in at},
                {i: rows[k] for i, k in zip(at, found, strict=True)},
            )

    def compare(self, gradients: Sequence[Tensor | None]) -> None:
        """Compare this step's gradients, and warn once of each parameter whose pieces have equal ones.
        Collective. Waits for their devices."""
        if not self.steps:
            return
        self.steps -= 1
        with kernels.plain_operators():
            there = [i for i in self.positions if gradients[i] is not None]
            tensors = [gradient for i in there if (gradient := gradients[i]) is not None]
            unlike = to_host([_varies(tensor) for tensor in tensors])
            shown = [k for k, varies in enumerate(unlike) if varies]
            rows = [self.rows[there[k]] for k in shown]
            has_twin = _have_twins(
                self.ranks,
                torch.stack(rows) if rows else torch.empty(0, 2, dtype=torch.int64, device="cpu"),
                _prints([tensors[k] for k in shown]),
            )
            self._warn([there[k] for k, is_so in zip(shown, has_twin, strict=True) if is_so])
            compared = {there[k] for k in shown}
            self.positions = [i for i in self.positions if i not in compared]
            if not self.ranks.any(bool(self.positions))[0]:
                self.steps = 0

    def _warn(self, positions: Sequence[int]) -> None:
        facts = [
            (self.names[i], f"{self.pieces[i]} with values and gradient of another piece, bit for bit,")
            for i in positions
        ]
        lines = described(self.ranks, facts, "pieces that differ")
        if lines and self.ranks.rank == 0:
            _log.warning(
                "%s\nIf these ranks hold copies of one tensor, it counts once for each of them: leave it out "
                "of sharded=. If they are pieces, which began with equal values (one seed on every rank?) "
                "and are trained alike ever since, the norm is right.",
                "\n".join(lines),
            )


def _have_twins(ranks: Ranks, rows: Tensor, prints: Sequence[int]) -> list[bool]:
    """Whether another piece of the same name has the same print."""
    column = torch.tensor(prints, dtype=torch.int64, device="cpu").view(-1, 1)
    answers = join(ranks, torch.cat([rows, column], dim=1), _twins)
    return [bool(answer) for answer in answers.view(-1).tolist()]


def _twins(rows: Tensor) -> Tensor:
    """[m, (name, piece, print)] -> [m, 1]: whether another piece of the name has the print."""
    if not len(rows):
        return rows[:, :1]
    distinct = torch.unique(rows, dim=0)  # replicas of one piece are one
    _, of, pieces = torch.unique(distinct[:, [0, 2]], dim=0, return_inverse=True, return_counts=True)
    _, at = torch.unique(rows, dim=0, return_inverse=True)  # in the same order
    have: Tensor = pieces[of][at] > 1
    return have.long().view(-1, 1)


def _varies(tensor: Tensor) -> Tensor:
    """Whether its elements differ from each other, 0-d int64."""
    flat = (tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor).reshape(-1)
    return (flat != flat[0]).any().long()


def _prints(tensors: Sequence[Tensor]) -> list[int]:
    """A hash of the bits, dtype and shape of each."""
    sums = to_host([kernels.checksum(tensor) for tensor in tensors])
    return [
        stable_hash(f"{bits} {tensor.dtype} {tuple(tensor.shape)}")
        for bits, tensor in zip(sums, tensors, strict=True)
    ]
