"""The reference, made ready: run on the first rank, or found in a dump; and what all ranks know of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distnorm.errors import DistnormError
from distnorm.plan.collectives import Ranks
from distnorm.sources import Tied, named_tensors
from distnorm.verification.doctor.blocks import Block, shape_of
from distnorm.verification.doctor.holdings import Weight
from distnorm.verification.doctor.recording import Shapes
from distnorm.verification.doctor.reference import (
    Known,
    Reference,
    Values,
    copied_blocks,
    relative_differences,
    unlike_parts,
    weight_digests,
)
from distnorm.verification.doctor.running import (
    SHAKES,
    Run,
    Watched,
    places_of,
    run_part,
    run_whole,
    shapes_of,
    takes_parts,
    values_of,
)

if TYPE_CHECKING:
    from distnorm.verification.doctor.dumping import Dumped

_MARGIN = 4.0
"""Times the difference that the last bits of the weights make. That is one rounding of each weight; another
order of summation and a cut at every layer round each intermediate result anew."""
_ROUNDINGS = 32.0
"""Units in the last place, where nothing was shaken."""
_PARTS_ELEMENTS = 1 << 22
"""Elements of the parts' gradients that a rank keeps in any case; more only up to half of its share of the
model's."""


@dataclass(slots=True)
class Prepared:
    """A reference, as far as it is ready.

    Args:
        reference: the other side.
        digests: of the reference's pieces of pieces held here; `None` where they are known after the step.
        shapes: the shapes of its trace.
        watched: what was seen of its run, on the first rank.
        shaken: what was seen of its runs with other last bits, likewise.
        notes: what has to be said of it.
        run: runs it.
        model: what the caller runs, in place of that.
        dump: where it was written, in place of both.
        tied: groups of names that are one parameter.
    """

    reference: Reference
    digests: Mapping[Weight, str | None] | None = None
    shapes: Shapes = field(default_factory=dict)
    watched: Watched | None = None
    shaken: Sequence[Watched] = ()
    notes: list[str] = field(default_factory=list)
    run: Callable[..., Any] | None = None
    model: Any = None
    dump: Dumped | None = None
    tied: Tied = ()

    def finish(self, ranks: Ranks, pieces: Sequence[Weight]) -> None:
        """Read what is there only after the step: a model that the caller ran, or a dump. Collective.

        Args:
            ranks: who takes part.
            pieces: of the weights that this rank holds.
        """
        if self.dump is not None:
            with ranks.together():
                self.digests = self.dump.digests(pieces)
            with ranks.together():
                self.reference.gradients = self.dump.blocks(list(self.reference.mine(ranks.rank)))
        elif self.model is not None:
            with ranks.together():
                values = values_of(self.model, self.tied) if ranks.rank == 0 else None
                places = {} if values is None else {name: i for i, name in enumerate(values.weights)}
            self.reference = _reference(ranks, values, places)
            self.digests = weight_digests(ranks, pieces, values)
            self.reference.gradients = copied_blocks(ranks, self.reference, values)

    def run_parts(self, ranks: Ranks, parts: int, wanted: Mapping[str, Sequence[Block]]) -> None:
        """Have the reference run over parts of its batch. Collective.

        Args:
            ranks: who takes part.
            parts: how many.
            wanted: the blocks that are kept, by parameter, the most wanted first; alike on every rank.
        """
        run = self.run
        if parts < 2 or run is None or not takes_parts(run):
            return
        kept = self._affordable(parts, wanted)
        note = None
        for part in range(parts):
            values = None
            if ranks.rank == 0:
                try:
                    values = run_part(run, self.tied, part, parts)
                except Exception as error:  # such as of a batch that has no such part; the rest is reported
                    note = f"the reference's parts are not used: it raised {error!r}"
            has = None if values is None else self.reference.alike(values, kept)
            note, has = ranks.gather((note, has))[0]
            if note is not None:
                break
            assert has is not None
            self.reference.part_names.append(has)
            self.reference.parts.append(copied_blocks(ranks, self.reference, values, has, kept))
        note = note or unlike_parts(ranks, self.reference, kept)
        if note is not None:
            self.notes.append(note)
            self.forget_parts()

    def forget_parts(self) -> None:
        """Let the parts' gradients go."""
        self.reference.parts, self.reference.part_names = [], []

    def _affordable(self, parts: int, wanted: Mapping[str, Sequence[Block]]) -> dict[str, Sequence[Block]]:
        known, spread = self.reference.known, self.reference.spread
        share = sum(prod(one.shape) for one in known.values()) // self.reference.size
        held: Counter[int] = Counter()
        kept: dict[str, Sequence[Block]] = {}
        for name, some in wanted.items():
            more: Counter[int] = Counter()
            for block in some:
                more[spread.owner(name, block)] += parts * prod(shape_of(block))
            if all(held[rank] + count <= max(_PARTS_ELEMENTS, share // 2) for rank, count in more.items()):
                held += more
                kept[name] = some
        return kept


def prepare(
    ranks: Ranks, examined: Any, pieces: Sequence[Weight], reference: Any, tied: Tied, trace: bool
) -> Prepared:
    """Run a callable reference, or see what else it is. Collective.

    Args:
        ranks: who takes part.
        examined: the model under examination.
        pieces: of its weights that this rank holds.
        reference: as for `distnorm.doctor`.
        tied: groups of names that are one parameter.
        trace: whether the reference's tensors at module boundaries are kept.
    """
    if isinstance(reference, str | Path):
        from distnorm.verification.doctor.dumping import Dumped

        with ranks.together():
            dump = Dumped(Path(reference))
        prepared = Prepared(Reference(dump.known, ranks.size), notes=list(dump.notes), dump=dump)
        if ranks.rank == 0:
            prepared.watched = Watched(rows=list(dump.rows))
        return prepared
    if isinstance(reference, torch.nn.Module | Sequence) or not callable(reference):
        with ranks.together():
            if ranks.rank == 0 and reference is not None:
                _refuse_the_same(examined, reference)
        note = "tolerances are those of the dtype's roundings: only a callable reference can be shaken"
        return Prepared(Reference({}, ranks.size), model=reference, tied=tied, notes=[note])
    return _run(ranks, examined, pieces, reference, tied, trace)


def _run(
    ranks: Ranks, examined: Any, pieces: Sequence[Weight], run: Run, tied: Tied, trace: bool
) -> Prepared:
    """Run a callable reference: as it is, and with other last bits."""
    values, watched, known = None, None, {}
    with ranks.together():
        if ranks.rank == 0:
            values, watched, target = run_whole(run, tied, trace)
            _refuse_the_same(examined, target)
            known = known_of(values, places_of(target, tied, watched))
            del target  # a function may make a new one each time
    reference = Reference(ranks.gather(known)[0], ranks.size)
    digests = weight_digests(ranks, pieces, values)
    reference.gradients = copied_blocks(ranks, reference, values)
    values = None
    moved: dict[str, float] = {}
    shaken: list[Watched] = []
    for seed in range(SHAKES):
        with ranks.together():
            if ranks.rank == 0:
                assert watched is not None
                values, seen, _ = run_whole(run, tied, trace, seed + 1)
                shaken.append(seen)
                _refuse_other_rows(watched, seen)
        for name, difference in relative_differences(ranks, reference, values).items():
            moved[name] = max(difference, moved.get(name, 0.0))
        values = None
    with ranks.together():
        if ranks.rank == 0:
            _refuse_chance(moved)
    reference.known = with_tolerances(reference.known, moved)
    shapes = ranks.gather(shapes_of(watched) if watched is not None else {})[0] if trace else {}
    return Prepared(reference, digests, shapes, watched, shaken, run=run, tied=tied)


def _refuse_the_same(examined: Any, reference: Any) -> None:
    ours = {id(tensor) for _, tensor in named_tensors(examined)}
    for name, tensor in named_tensors(reference):
        if id(tensor) in ours:
            raise DistnormError(
                f"reference: expected a model of its own, found '{name}' to be the examined model's; "
                "two equal models prove nothing"
            )


def _refuse_other_rows(one: Watched, other: Watched) -> None:
    if one.rows != other.rows:
        raise DistnormError(
            "reference: expected the same batch in every run, found other rows in the second; "
            "take the batch once, before the function that runs the model"
        )


def _refuse_chance(moved: Mapping[str, float]) -> None:
    """Refuse tolerances that a gradient of zeros would keep."""
    typical = sorted(moved.values())[len(moved) // 2] if moved else 0.0
    if not _MARGIN * typical < 1:
        raise DistnormError(
            f"reference: expected runs that differ by rounding, found a relative difference of {typical:.2g} "
            "between two of one batch; turn off what is random in it, such as dropout"
        )


def _reference(ranks: Ranks, values: Values | None, places: Mapping[str, int]) -> Reference:
    return Reference(ranks.gather({} if values is None else known_of(values, places))[0], ranks.size)


def known_of(values: Values, places: Mapping[str, int]) -> dict[str, Known]:
    """What every rank gets to know of a reference's parameters, with tolerances by the dtype alone.

    Args:
        values: the whole model's.
        places: each parameter's place in the order of the forward.
    """
    known = {}
    for name, weight in values.weights.items():
        gradient = values.gradients[name]
        eps = torch.finfo((weight if gradient is None else gradient).dtype).eps
        known[name] = Known(
            tuple(weight.shape),
            weight.dtype,
            values.trains[name],
            places.get(name, 1 << 20),
            _ROUNDINGS * eps,
            None if gradient is None else gradient.dtype,
        )
    return known


def with_tolerances(known: Mapping[str, Known], moved: Mapping[str, float]) -> dict[str, Known]:
    """Parameters with the tolerances that follow from what was shaken.

    Args:
        known: the parameters.
        moved: by how much the last bits of the weights change each gradient; empty where that is unknown.
    """
    if not moved:
        return dict(known)
    typical = sorted(moved.values())[len(moved) // 2]
    found = {}
    for name, one in known.items():
        roundings = max(moved.get(name, 0.0), typical) + torch.finfo(one.gradient or one.dtype).eps
        found[name] = replace(one, tolerance=_MARGIN * roundings)
    return found
