"""The other side: the same model in one process on the first rank, or a dump of another run.

Its gradients lie in blocks, evenly on all ranks: no rank but the first, which runs it, ever has all of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distnorm.plan.collectives import Ranks
from distnorm.verification.doctor.blocks import Block, Spread, shape_of
from distnorm.verification.doctor.holdings import Weight, select
from distnorm.verification.doctor.posting import Want, deliver, pull
from distnorm.verification.pieces import digest


@dataclass(frozen=True, slots=True)
class Known:
    """What every rank knows of one of the reference's parameters.

    Args:
        shape: its global shape.
        dtype: dtype of the weight.
        trains: whether it requires a gradient.
        place: its place in the order of the forward.
        tolerance: the relative difference that rounding alone explains.
        gradient: dtype of the gradient; `None` where there is none.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trains: bool
    place: int
    tolerance: float
    gradient: torch.dtype | None


@dataclass(slots=True)
class Values:
    """What one process has of its whole model after a backward: weights and gradients by name, no copies."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    trains: dict[str, bool]

    def block(self, name: str, block: Block) -> Tensor:
        """A block of a gradient."""
        gradient = self.gradients[name]
        assert gradient is not None
        return select(gradient, tuple((limits,) for limits in block))


Blocks = dict[tuple[str, Block], Tensor]


@dataclass(slots=True)
class Reference:
    """One side of a comparison.

    Args:
        known: what all ranks know, alike on each.
        size: number of ranks.

    Attributes:
        spread: which rank has which blocks.
        gradients: this rank's blocks of the gradients.
        parts: of the gradients of parts of the batch, likewise, some blocks where they are known.
        part_names: the parameters of which each part has a gradient; alike on every rank.
    """

    known: Mapping[str, Known]
    size: int
    spread: Spread = field(init=False)
    gradients: Blocks = field(default_factory=dict)
    parts: list[Blocks] = field(default_factory=list)
    part_names: list[set[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.known = dict(sorted(self.known.items(), key=lambda item: item[1].place))
        self.spread = Spread({name: known.shape for name, known in self.known.items()}, self.size)

    def mine(self, rank: int) -> Iterator[tuple[str, Block]]:
        """The blocks of gradients that a rank has."""
        for name, block in self.spread.blocks(rank):
            if self.known[name].gradient is not None:
                yield name, block

    def alike(self, values: Values | None, names: Iterable[str]) -> set[str]:
        """The parameters of which another run has a gradient too, of the same kind."""
        found = set()
        for name in () if values is None else names:
            known, gradient = self.known[name], None if values is None else values.gradients.get(name)
            if gradient is not None and (gradient.dtype, tuple(gradient.shape)) == (
                known.gradient,
                known.shape,
            ):
                found.add(name)
        return found

    def block(self, name: str, block: Block) -> Tensor:
        """A block of a gradient that this rank has; zeros where the reference has no gradient."""
        found = self.gradients.get((name, block))
        if found is None:
            return torch.zeros(shape_of(block), dtype=self.known[name].dtype, device="cpu")
        return found


def pull_blocks(
    ranks: Ranks,
    reference: Reference,
    values: Values | None,
    names: Container[str] | None = None,
    only: Mapping[str, Sequence[Block]] | None = None,
) -> Iterator[tuple[tuple[str, Block], Tensor]]:
    """Give every rank its blocks of the first rank's gradients. Collective, as `pull`.

    Args:
        ranks: who takes part.
        reference: which rank has which blocks.
        values: on the first rank, what they are of.
        names: of these parameters only; alike on every rank.
        only: of these blocks of them only; alike on every rank.
    """
    wants = []
    for name, block in reference.mine(ranks.rank):
        dtype = reference.known[name].gradient
        if (names is None or name in names) and (only is None or block in only[name]):
            assert dtype is not None
            wants.append(Want(0, (name, block), shape_of(block), dtype))

    def give(key: tuple[str, Block]) -> Tensor:
        assert values is not None
        return values.block(*key)

    for want, tensor in pull(ranks, wants, give, in_turns=True):
        yield want.key, tensor


def copied_blocks(
    ranks: Ranks,
    reference: Reference,
    values: Values | None,
    names: Container[str] | None = None,
    only: Mapping[str, Sequence[Block]] | None = None,
) -> Blocks:
    """Copies of this rank's blocks of the first rank's gradients. Collective, as `pull_blocks`."""
    found = {}
    for key, block in pull_blocks(ranks, reference, values, names, only):
        is_own = ranks.rank == 0 and values is not None  # a view of what the next run overwrites
        found[key] = block.clone() if is_own else block
    return found


def relative_differences(ranks: Ranks, reference: Reference, values: Values | None) -> dict[str, float]:
    """By how much the gradients of another run differ, relative to the reference's norms. Collective.

    Args:
        ranks: who takes part.
        reference: with its gradients.
        values: on the first rank, those of the other run.
    """
    apart: Counter[str] = Counter()
    square: Counter[str] = Counter()
    names = ranks.gather(reference.alike(values, reference.known))[0]
    for (name, block), other in pull_blocks(ranks, reference, values, names):
        first = reference.gradients[name, block].double()
        square[name] += float(first.square().sum())  # type: ignore[assignment]
        apart[name] += float((first - other.double()).square().sum())  # type: ignore[assignment]
    sums = ranks.gather((dict(square), dict(apart)))
    found: dict[str, float] = {}
    for name in names:
        norm, moved = (math.sqrt(sum(one[i].get(name, 0.0) for one in sums)) for i in range(2))
        found[name] = moved / norm if norm else 0.0
    return found


def unlike_parts(ranks: Ranks, reference: Reference, names: Collection[str]) -> str | None:
    """Say of which parameter the parts' gradients, of the blocks that are kept, don't add up. Collective."""
    apart: Counter[str] = Counter()
    square: Counter[str] = Counter()
    for name, block in reference.mine(ranks.rank) if reference.parts else ():
        if name not in names:
            continue
        whole = reference.gradients[name, block].double()
        square[name] += float(whole.square().sum())  # type: ignore[assignment]
        parts = [part[name, block] for part in reference.parts if (name, block) in part]
        if parts:
            for part in parts:
                whole -= part
            apart[name] += float(whole.square().sum())  # type: ignore[assignment]
    sums = ranks.gather((dict(square), dict(apart)))
    for name in sorted(names):
        norm, rest = (math.sqrt(sum(one[i].get(name, 0.0) for one in sums)) for i in range(2))
        if rest > 4 * reference.known[name].tolerance * norm:
            return (
                f"the reference's parts are not used: those of '{name}' don't add up to its gradient; "
                "each must be normalised by the whole batch's tokens, and be given an equal slice of it"
            )
    return None


def weight_digests(ranks: Ranks, pieces: Sequence[Weight], values: Values | None) -> dict[Weight, str | None]:
    """The digests that pieces of the weights have in the reference. Collective.

    Args:
        ranks: who takes part.
        pieces: this rank's.
        values: on the first rank, the whole model's.

    Returns:
        For each of this rank's pieces the digest; `None` where the reference has no such piece.
    """
    to_first = [list(pieces), *([] for _ in range(ranks.size - 1))]
    known: dict[Weight, str | None] = {}
    answers: list[list[str | None]] = []
    for theirs in deliver(ranks, to_first):
        for piece in theirs:
            if piece not in known and values is not None:
                known[piece] = digest_of(piece, values.weights.get(piece.name))
        answers.append([known.get(piece) for piece in theirs])
    return dict(zip(pieces, deliver(ranks, answers)[0], strict=True))


def digest_of(piece: Weight, whole: Tensor | None) -> str | None:
    """The digest of a piece of a whole weight; `None` where it is no piece of that."""
    if whole is None or piece.global_shape not in (tuple(whole.shape), (whole.numel(),)):
        return None
    return digest(select(whole.detach(), piece.index).to(piece.dtype).reshape(piece.shape))
