"""Parcels between ranks: objects, and tensors some MiB at a time."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from distnorm.plan.collectives import Ranks

_ROUND_BYTES = 4 << 20  # of tensors that a rank is sent in one round, a single larger tensor excepted
_AT_ONCE = 4  # ranks that one rank serves in one round, where all of them ask it for all that they get


@dataclass(frozen=True, slots=True)
class Want:
    """A tensor that this rank asks another one for.

    Args:
        rank: whom it asks.
        key: by which that rank knows the tensor.
        shape: its shape.
        dtype: its dtype.
    """

    rank: int
    key: Any
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


def pull(
    ranks: Ranks, wants: Sequence[Want], give: Callable[[Any], Tensor], *, in_turns: bool = False
) -> Iterator[tuple[Want, Tensor]]:
    """Get tensors from other ranks, and yield them on the CPU in the order asked for.

    Collective: every rank must use up the iterator. A few MiB are on their way to a rank at a time.

    Args:
        ranks: who takes part.
        wants: what this rank asks for; of itself too.
        give: from a key to the tensor that another rank asks for.
        in_turns: whether all ask the same rank, which then serves some of them after the others.
    """
    rounds = _rounds(wants)
    counts = ranks.gather(len(rounds))
    first, total = _schedule(counts, ranks.rank, in_turns)
    asked: list[list[tuple[int, Any]]] = [[] for _ in range(ranks.size)]
    for turn, some in enumerate(rounds, first):
        for want in some:
            if want.rank != ranks.rank:
                asked[want.rank].append((turn, want.key))
    due: dict[int, list[tuple[int, Any]]] = defaultdict(list)
    for rank, requests in enumerate(deliver(ranks, asked)):
        for turn, key in requests:
            due[turn].append((rank, key))
    for turn in range(total):
        some = rounds[turn - first] if first <= turn < first + len(rounds) else []
        arrived = _one_round(ranks, some, due.pop(turn, []), give)
        for want in some:
            if want.rank == ranks.rank:
                yield want, give(want.key).detach().cpu()
            else:
                bits = arrived[want.rank][: want.nbytes].clone()  # at an address that any dtype may have
                arrived[want.rank] = arrived[want.rank][want.nbytes :]
                yield want, bits.view(want.dtype).view(want.shape)


def _rounds(wants: Sequence[Want]) -> list[list[Want]]:
    rounds: list[list[Want]] = []
    filled = _ROUND_BYTES + 1
    for want in wants:
        if filled + want.nbytes > _ROUND_BYTES:
            rounds.append([])
            filled = 0
        rounds[-1].append(want)
        filled += want.nbytes
    return rounds


def _schedule(counts: Sequence[int], rank: int, in_turns: bool) -> tuple[int, int]:
    """The first round of a rank, and how many rounds there are."""
    if not in_turns:
        return 0, max(counts)
    lengths = [max(counts[at : at + _AT_ONCE]) for at in range(0, len(counts), _AT_ONCE)]
    return sum(lengths[: rank // _AT_ONCE]), sum(lengths)


def _one_round(
    ranks: Ranks, wants: Sequence[Want], due: Sequence[tuple[int, Any]], give: Callable[[Any], Tensor]
) -> dict[int, Tensor]:
    """The bytes that each rank sends this one."""
    if ranks.size == 1:
        return {}
    coming, going = dict.fromkeys(range(ranks.size), 0), dict.fromkeys(range(ranks.size), 0)
    for want in wants:
        coming[want.rank] += want.nbytes if want.rank != ranks.rank else 0
    letters = []
    for rank, key in due:  # by rank
        letters.append(_bits(give(key)))
        going[rank] += len(letters[-1])
    mail = torch.cat(letters) if letters else torch.empty(0, dtype=torch.uint8, device="cpu")
    arrived = ranks.exchange(mail.view(-1, 1), going, coming).view(-1)
    return dict(enumerate(torch.split(arrived, list(coming.values()))))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def deliver(ranks: Ranks, parcels: Sequence[Any]) -> list[Any]:
    """Give every rank the parcel for it, and return what each rank had for this one. Collective.

    Args:
        ranks: who takes part.
        parcels: anything that can be pickled, one for each rank; tensors go by `pull`.
    """
    if ranks.size == 1:
        return list(parcels)
    letters = [pickle.dumps(parcel, protocol=5) for parcel in parcels]
    ones = dict.fromkeys(range(ranks.size), 1)
    sizes = torch.tensor([len(letter) for letter in letters], dtype=torch.int64, device="cpu")
    coming = ranks.exchange(sizes.view(-1, 1), ones, ones).view(-1).tolist()
    mail = torch.frombuffer(bytearray(b"".join(letters)), dtype=torch.uint8).view(-1, 1)
    arrived = ranks.exchange(mail, dict(enumerate(sizes.tolist())), dict(enumerate(coming)))
    parts = torch.split(arrived.view(-1), coming)
    return [pickle.loads(part.numpy().tobytes()) for part in parts]
