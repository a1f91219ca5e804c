"""Megatron's claims against facts: what attributes say of who counts, and what the ranks hold.

Two kinds of lies make a wrong norm, silently. What is said to be one tensor on several ranks is several: then
its values, or its gradients, differ. What is said to be several is one: then its gradient is the same on all,
bit for bit. Values alone don't show that: LayerNorms begin as ones, biases as zeros, and upcycled experts as
copies of each other. A gradient whose elements are all alike shows nothing, and is passed over.

All functions here are collective: every rank must call them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import CoverageError, DistnormError, ReplicaError
from distnorm.integrations.megatron_reasons import Reason, against_module, of_gradients, of_values
from distnorm.plan.collectives import Ranks
from distnorm.plan.join import join
from distnorm.plan.plan import differing, piece_groups, raise_named, spread, to_host
from distnorm.plan.terms import stable_hash
from distnorm.sources.megatron import Axes, Claims, Held
from distnorm.sources.megatron_optimizers import Run

_EXPECTED = "attributes that say what the ranks hold"
_ADVICE = (
    "Megatron counts, reduces and clips by these attributes. Set them where the module is made: "
    "tensor_model_parallel and partition_dim on pieces alone, allreduce=False on routed experts alone, "
    "shared=True on the copy of a tied weight alone, and sequence_parallel=True where a gradient has to be "
    "summed over the tensor-parallel ranks."
)
_TOLERANCE = 1e-3  # of norms of gradients that should be replicas


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the elements of tensors.

    Args:
        prints: a hash of the bits and the size of each; 0 where it is missing.
        varies: whether its elements differ from each other, so that equal bits are no chance.
    """

    prints: Sequence[int]
    varies: Sequence[bool]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> Facts:
        """Read them. Waits for their devices. Not collective."""
        there = {i: t.detach() for i, t in enumerate(tensors) if t is not None and t.numel()}
        sums = to_host([kernels.checksum(t) for t in there.values()])
        unlike = to_host([(t.reshape(-1) != t.reshape(-1)[0]).any().long() for t in there.values()])
        prints, varies = [0] * len(tensors), [False] * len(tensors)
        for (i, tensor), bits, differs in zip(there.items(), sums, unlike, strict=True):
            prints[i], varies[i] = stable_hash(f"{bits} {tensor.dtype} {tensor.numel()}"), bool(differs)
        return cls(prints, varies)


def check_claims(ranks: Ranks, held: Sequence[Held], axes: Axes, facts: Facts) -> None:
    """Compare attributes with each other, with modules, and with the parameters' values.

    Args:
        ranks: who takes part.
        held: this rank's parameters.
        axes: along which they differ.
        facts: of their values.

    Raises:
        CoverageError: attributes differ between ranks, or from what a module says; or they say that a
            parameter is several.
        ReplicaError: they say that several parameters are one.
    """
    _compare_claims(ranks, held)
    _raise(ranks, held, [against_module(each) for each in held], CoverageError)
    unlike = _differ(ranks, [each.name + _part(each) for each in held], facts.prints)
    unlike_tp = _differ(ranks, [f"{each.name} {each.axis.members}" for each in held], facts.prints)
    reasons: list[Reason] = [of_values(*each, axes) for each in zip(held, unlike, unlike_tp, strict=True)]
    _raise(ranks, held, reasons, ReplicaError)
    same = _agree(ranks, [_along_ep(each, axes) for each in held], facts.prints)
    owners = {id(each.owner) for each, is_same in zip(held, same, strict=True) if not is_same}
    reasons = [
        f"allreduce=False, and the same values on all expert-parallel ranks {list(axes.ep.members)}"
        if not each.claims.allreduce
        and not each.is_expert
        and is_same
        and (varies or id(each.owner) not in owners)
        else None
        for each, is_same, varies in zip(held, same, facts.varies, strict=True)
    ]
    _raise(ranks, held, reasons, CoverageError)


def names_of_shared(ranks: Ranks, held: Sequence[Held], facts: Facts) -> dict[str, str]:
    """The name of the parameter whose copy each one with ``shared=True`` is, by its own.

    Raises:
        CoverageError: no parameter without the attribute has the values of one that has it.
    """
    rows = [[p, each.claims.shared] for p, each in zip(facts.prints, held, strict=True)]
    has_copy = _flags(join(ranks, torch.tensor(rows, dtype=torch.int64).view(-1, 2), _any_second))
    found = zip(held, facts.prints, facts.varies, has_copy, strict=True)
    mine = [(bits, each.name, each.claims.shared) for each, bits, varies, is_so in found if varies and is_so]
    originals: dict[int, set[str]] = {}
    for theirs in ranks.gather(mine):
        for bits, name, is_copy in theirs:
            originals.setdefault(bits, set()).update(() if is_copy else (name,))
    lost = [
        "shared=True, and no parameter without it has the same values"
        if each.claims.shared and varies and not originals[bits]
        else None
        for each, bits, varies in zip(held, facts.prints, facts.varies, strict=True)
    ]
    _raise(ranks, held, lost, CoverageError)
    return {name: min(originals[bits]) for bits, name, is_copy in mine if is_copy}


def check_gradients(ranks: Ranks, runs: Sequence[Run], axes: Axes, twins: Sequence[int]) -> bool:
    """Compare attributes with the gradients of one step.

    Args:
        ranks: who takes part.
        runs: what this rank's optimizers step.
        axes: along which parameters differ.
        twins: for each run a hash of its parameter's values; 0 where these are all alike.

    Returns:
        Whether there was any gradient that shows something, on some rank.

    Raises:
        CoverageError: what is said to be several parameters has one gradient.
    """
    facts = Facts.of([run.gradient for run in runs])
    of_tp = _agree(ranks, [_along_tp(run) for run in runs], facts.prints)
    of_ep = _agree(ranks, [f"{_along_ep(run.held, axes)} {_extent(run)}" for run in runs], facts.prints)
    keys = [
        f"{twin} {_extent(run)} {bits}" for twin, run, bits in zip(twins, runs, facts.prints, strict=True)
    ]
    of_twins = _differ(ranks, keys, [stable_hash(run.held.name) for run in runs])
    reasons: list[Reason] = []
    for i, run in enumerate(runs):
        claims, reason = run.held.claims, None
        if not facts.varies[i]:
            pass
        elif run.held.is_cut and of_tp[i]:
            members = list(run.held.axis.members)
            reason = (
                f"tensor_model_parallel=True, and the same gradient on all tensor-parallel ranks {members}"
            )
        elif not claims.allreduce and of_ep[i]:
            reason = f"allreduce=False, and one gradient on all of {list(axes.ep.members)}"
        elif twins[i] and of_twins[i]:
            reason = "no shared=True, and values and gradient of a parameter of another name"
        reasons.append(reason)
    _raise(ranks, [run.held for run in runs], reasons, CoverageError)
    return ranks.any(any(facts.varies))[0]


def explained(ranks: Ranks, error: ReplicaError, runs: Sequence[Run], axes: Axes) -> ReplicaError:
    """The error of gradients that differ between replicas, with the attributes that may be wrong."""
    norms = [0.0 if run.gradient is None else float(run.gradient.double().norm()) for run in runs]
    numbers = torch.tensor(norms, dtype=torch.float64).view(torch.int64).tolist()
    rows = _rows([_along_tp(run) for run in runs], numbers)
    unlike = _flags(join(ranks, rows, _unlike_norms))
    mine = [
        f"parameter '{run.held.name}': {of_gradients(run.held, axes)}"
        for run, is_unlike in zip(runs, unlike, strict=True)
        if is_unlike and not run.held.is_cut
    ]
    several = ranks.gather([ranks.shortened(text, 3) for text in list(dict.fromkeys(mine))[:3]])
    hints = list(dict.fromkeys(text for texts in several for text in texts))
    return ReplicaError("\n".join([str(error), *hints, *([_ADVICE] if hints else [])]))


def _compare_claims(ranks: Ranks, held: Sequence[Held]) -> None:
    facts = []
    for field in fields(Claims):
        if field.name == "shared":  # which only one of several copies has
            continue
        values = [getattr(each.claims, field.name) for each in held]
        keys = [f"{each.place} {field.name}" for each in held]
        unlike = _differ(ranks, keys, [stable_hash(repr(value)) for value in values])
        named = zip(held, values, unlike, strict=True)
        facts += [(each.name, f"{field.name}={value}") for each, value, is_so in named if is_so]
    raise_named(ranks, facts, CoverageError, "the same attributes on all ranks", _ADVICE)


def _raise(ranks: Ranks, held: Sequence[Held], reasons: Sequence[Reason], kind: type[DistnormError]) -> None:
    facts = [(each.name, reason) for each, reason in zip(held, reasons, strict=True) if reason is not None]
    raise_named(ranks, list(dict.fromkeys(facts)), kind, _EXPECTED, _ADVICE)


# ---- who is compared with whom


def _part(each: Held) -> str:
    return f" part {each.axis.index}" if each.is_cut else ""


def _extent(run: Run) -> str:
    return f"{run.start}:{run.stop}"


def _along_tp(run: Run) -> str:
    return f"{run.held.name} {run.held.axis.members} {_extent(run)}"


def _along_ep(each: Held, axes: Axes) -> str:
    return f"{each.place} {axes.ep.members}{_part(each)}"


def _rows(keys: Sequence[str], values: Sequence[int]) -> Tensor:
    rows = [[stable_hash(key), 0, value] for key, value in zip(keys, values, strict=True)]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3)


def _flags(answers: Tensor) -> list[bool]:
    return [bool(answer) for answer in answers.view(-1).tolist()]


def _differ(ranks: Ranks, keys: Sequence[str], values: Sequence[int]) -> list[bool]:
    """Whether those of the same key have several values, over all ranks."""
    return _flags(join(ranks, _rows(keys, values), differing))


def _agree(ranks: Ranks, keys: Sequence[str], values: Sequence[int]) -> list[bool]:
    """Whether there are several of the same key, and they have one value."""
    return _flags(join(ranks, _rows(keys, values), _same_and_several))


def _same_and_several(rows: Tensor) -> Tensor:
    of, count = piece_groups(rows)
    several = torch.bincount(of, minlength=count)[of] > 1
    return (several & (differing(rows).view(-1) == 0)).long().view(-1, 1)


def _any_second(rows: Tensor) -> Tensor:
    """[m, (key, flag)] -> [m, 1]: whether any row of the key has the flag."""
    keys, of = torch.unique(rows[:, 0], return_inverse=True)
    return (
        torch.zeros(len(keys), dtype=torch.int64).scatter_reduce_(0, of, rows[:, 1], "amax")[of].view(-1, 1)
    )


def _unlike_norms(rows: Tensor) -> Tensor:
    of, count = piece_groups(rows)
    norms = rows[:, 2].contiguous().view(torch.float64)
    most = norms.new_zeros(count).scatter_reduce_(0, of, norms, "amax")
    return (spread(norms, of, count) > _TOLERANCE * most)[of].long().view(-1, 1)
