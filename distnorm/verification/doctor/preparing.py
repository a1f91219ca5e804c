"""The reference, made ready: run on the first rank, or found in a dump; and what all ranks know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distnorm.errors import DistnormError
from distnorm.plan.collectives import Ranks
from distnorm.sources import Tied, named_tensors
from distnorm.verification.doctor.recording import Shapes
from distnorm.verification.doctor.reference import Known, Live, Reference, Values
from distnorm.verification.doctor.running import (
    SHAKES,
    Watched,
    places_of,
    relative_differences,
    run_part,
    run_whole,
    shapes_of,
    takes_parts,
    values_of,
)

_MARGIN = 4.0
"""Times the difference that the last bits of the weights make. That is one rounding of each weight; another
order of summation and a cut at every layer round each intermediate result anew."""
_ROUNDINGS = 32.0
"""Units in the last place, where nothing was shaken."""


@dataclass(slots=True)
class Prepared:
    """A reference, as far as it is ready.

    Args:
        reference: the other side.
        shapes: the shapes of its trace.
        watched: what was seen of its run, on the first rank.
        shaken: what was seen of its runs with other last bits, likewise.
        notes: what has to be said of it.
    """

    reference: Reference
    shapes: Shapes = field(default_factory=dict)
    watched: Watched | None = None
    shaken: Sequence[Watched] = ()
    notes: list[str] = field(default_factory=list)
    run: Callable[..., Any] | None = None
    model: Any = None
    tied: Tied = ()
    values: Values | None = None

    def finish(self, ranks: Ranks) -> None:
        """Read what is there only after the step: a model that the caller ran. Collective."""
        if self.model is None:
            return
        with ranks.together():
            values = values_of(self.model, self.tied) if ranks.rank == 0 else None
            places = {} if values is None else {name: i for i, name in enumerate(values.weights)}
        self.reference = _live(ranks, values, places, {})

    def run_parts(self, ranks: Ranks, parts: int, names: set[str]) -> None:
        """Have the reference run over parts of its batch. Collective."""
        run = self.run
        if not isinstance(self.reference, Live) or parts < 2 or run is None or not takes_parts(run):
            return
        found: list[Mapping[str, torch.Tensor | None]] = []
        note = None
        with ranks.together():
            if ranks.rank == 0 and self.values is not None:
                try:
                    found = [run_part(run, self.tied, part, parts, names) for part in range(parts)]
                    note = self._unlike_parts(found, names)
                except Exception as error:  # such as of a batch that has no such part; the rest is reported
                    note = f"the reference's parts are not used: it raised {error!r}"
        note = ranks.gather(note)[0]
        if note is not None:
            self.notes.append(note)
            found = []
        self.reference = Live(self.reference.known, self.values, found)

    def _unlike_parts(
        self, found: Sequence[Mapping[str, torch.Tensor | None]], names: set[str]
    ) -> str | None:
        assert self.values is not None
        for name in sorted(names):
            whole = self.values.gradients.get(name)
            parts = [gradient for part in found if (gradient := part.get(name)) is not None]
            if whole is None or not parts:
                continue
            total = torch.stack([part.double() for part in parts]).sum(0)
            apart = float((total - whole.double()).norm())
            if apart > 4 * self.reference.known[name].tolerance * float(whole.double().norm()):
                return (
                    f"the reference's parts are not used: those of '{name}' don't add up to its gradient; "
                    "each must be normalised by the whole batch's tokens, and be given an equal slice of it"
                )
        return None


def prepare(ranks: Ranks, examined: Any, reference: Any, tied: Tied, trace: bool) -> Prepared:
    """Run a callable reference, or see what else it is. Collective.

    Args:
        ranks: who takes part.
        examined: the model under examination.
        reference: as for `distnorm.doctor`.
        tied: groups of names that are one parameter.
        trace: whether the reference's tensors at module boundaries are kept.
    """
    if isinstance(reference, str | Path):
        from distnorm.verification.doctor.dumping import Dumped

        with ranks.together():
            dumped = Dumped(Path(reference))
        prepared = Prepared(dumped, notes=list(dumped.notes))
        if ranks.rank == 0:
            prepared.watched = Watched(rows=list(dumped.rows))
        return prepared
    if isinstance(reference, torch.nn.Module | Sequence) or not callable(reference):
        with ranks.together():
            if ranks.rank == 0 and reference is not None:
                _refuse_the_same(examined, reference)
        note = "tolerances are those of the dtype's roundings: only a callable reference can be shaken"
        return Prepared(Live({}, None), model=reference, tied=tied, notes=[note])
    values, watched = None, None
    tolerances: dict[str, float] = {}
    shaken: list[Watched] = []
    places: dict[str, int] = {}
    with ranks.together():
        if ranks.rank == 0:
            values, watched, target = run_whole(reference, tied, trace)
            _refuse_the_same(examined, target)
            places = places_of(target, tied, watched)
            for seed in range(SHAKES):
                other, seen, _ = run_whole(reference, tied, trace, seed + 1)
                shaken.append(seen)
                _refuse_other_rows(watched, seen)
                for name, moved in relative_differences(values, other).items():
                    tolerances[name] = max(moved, tolerances.get(name, 0.0))
            _refuse_chance(tolerances)
    live = _live(ranks, values, places, tolerances)
    shapes = ranks.gather(shapes_of(watched) if watched is not None else {})[0] if trace else {}
    return Prepared(live, shapes, watched, shaken, run=reference, tied=tied, values=values)


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


def _live(ranks: Ranks, values: Values | None, places: Mapping[str, int], moved: Mapping[str, float]) -> Live:
    known = {} if values is None else known_of(values, places, moved)
    return Live(ranks.gather(known)[0], values)


def known_of(values: Values, places: Mapping[str, int], moved: Mapping[str, float]) -> dict[str, Known]:
    """What every rank gets to know of a reference's parameters.

    Args:
        values: the whole model's.
        places: each parameter's place in the order of the forward.
        moved: by how much the last bits of the weights change each gradient; empty where that is unknown.
    """
    typical = sorted(moved.values())[len(moved) // 2] if moved else 0.0
    known = {}
    for name, weight in values.weights.items():
        gradient = values.gradients[name]
        eps = torch.finfo((weight if gradient is None else gradient).dtype).eps
        roundings = _MARGIN * (max(moved.get(name, 0.0), typical) + eps) if moved else _ROUNDINGS * eps
        known[name] = Known(
            tuple(weight.shape), weight.dtype, values.trains[name], places.get(name, 1 << 20), roundings
        )
    return known
