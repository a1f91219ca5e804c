"""Both sides' pieces of a parameter meet on one rank, which the hash of its name chooses.

No rank needs the whole model: every rank judges about 1/W of the parameters, some at a time. Of replicas with
the same bits one travels, and of the others their digests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distnorm.plan.collectives import Ranks
from distnorm.plan.terms import stable_hash
from distnorm.verification.doctor.holdings import Held, Holding
from distnorm.verification.doctor.posting import Packed, deliver
from distnorm.verification.doctor.reference import Expected, Reference

_ROUND_BYTES = 32 << 20  # of values that a rank is sent in one round, a single larger parameter excepted


@dataclass(slots=True)
class Case:
    """One parameter with all that both sides hold of it, on the rank that judges it.

    Args:
        name: the parameter's name.
        holdings: every rank's piece of it, by rank.
        values: local gradients by digest; and by rank what they were before the step, where asked for.
        expected: the reference's.
    """

    name: str
    holdings: list[Holding]
    values: dict[str | int, Tensor] = field(default_factory=dict)
    expected: Expected | None = None


def meet(
    ranks: Ranks,
    held: Sequence[Held],
    reference: Reference,
    names: Sequence[str] | None = None,
) -> Iterator[Case]:
    """Bring both sides of every parameter together, and yield those that this rank judges. Collective.

    Every rank must use up the iterator; a case's tensors are let go of when the next one is asked for.

    Args:
        ranks: who takes part.
        held: what this rank holds.
        reference: the other side.
        names: only these, and for them what they were before the step too; the same on every rank.
    """
    wanted = None if names is None else set(names)
    outgoing: list[list[Holding]] = [[] for _ in range(ranks.size)]
    for mine in held:
        if wanted is None or mine.holding.name in wanted:
            outgoing[home_of(mine.holding.name, ranks.size)].append(mine.holding)
    cases: dict[str, Case] = {}
    for holding in (holding for theirs in deliver(ranks, outgoing) for holding in theirs):
        cases.setdefault(holding.name, Case(holding.name, [])).holdings.append(holding)
    for name in reference.names if wanted is None else ():
        if name not in cases and home_of(name, ranks.size) == ranks.rank:
            cases[name] = Case(name, [])
    rounds = _rounds(list(cases.values()), reference)
    number = torch.tensor([len(rounds)], dtype=torch.int64, device=ranks.device())
    for turn in range(int(ranks.all_reduce_(number, "max"))):
        yield from _one_round(ranks, held, reference, rounds[turn] if turn < len(rounds) else [], wanted)


def home_of(name: str, size: int) -> int:
    """The rank that judges a parameter."""
    return stable_hash(name) % size


def _rounds(cases: Sequence[Case], reference: Reference) -> list[list[Case]]:
    rounds: list[list[Case]] = []
    filled = _ROUND_BYTES + 1
    for case in cases:
        size = reference.bytes_of(case.name) * 2
        if filled + size > _ROUND_BYTES:
            rounds.append([])
            filled = 0
        rounds[-1].append(case)
        filled += size
    return rounds


def _one_round(
    ranks: Ranks, held: Sequence[Held], reference: Reference, cases: list[Case], wanted: set[str] | None
) -> Iterator[Case]:
    asked: list[list[tuple[str | int, str, int]]] = [[] for _ in range(ranks.size)]
    for case in cases:
        known: set[str] = set()
        for holding in case.holdings:
            if holding.gradient is not None and holding.gradient not in known:
                known.add(holding.gradient)
                asked[holding.rank].append((holding.gradient, case.name, holding.position))
            if wanted is not None:
                asked[holding.rank].append((holding.rank, case.name, holding.position))
    answers: list[list[tuple[str | int, str, Packed]]] = []
    for requests in deliver(ranks, asked):
        found = ((key, name, _value(held[at], key)) for key, name, at in requests)
        answers.append([(key, name, Packed.of(value)) for key, name, value in found if value is not None])
    by_name = {case.name: case for case in cases}
    for key, name, packed in (row for rows in deliver(ranks, answers) for row in rows):
        by_name[name].values[key] = packed.tensor()
    expected = reference.fetch(ranks, [case.name for case in cases])
    while cases:
        case = cases.pop()
        case.expected = expected.pop(case.name, None)
        yield case


def _value(held: Held, key: str | int) -> Tensor | None:
    return held.gradient if isinstance(key, str) else held.before
