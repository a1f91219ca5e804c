"""What the doctor found, alike on every rank: for people, as JSON, and as what a page needs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from distnorm.verification.doctor.judging import Verdict
from distnorm.verification.doctor.localising import Parting
from distnorm.verification.doctor.mistakes import Explanation, Mistake
from distnorm.verification.doctor.page import page
from distnorm.verification.ranks import rank_list

_WIDTH, _SHOWN = 110, 12


@dataclass(frozen=True, slots=True)
class Cause:
    """What explains all that was found, or the first of it.

    Args:
        where: a parameter, a module, or the batch, in words.
        explanation: the mistake there.
        parameters: the parameters that it is about, nearest first.
    """

    where: str
    explanation: Explanation
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What `distnorm.doctor` found; the same on every rank. `str(report)` is for people.

    Args:
        ranks: number of ranks that took part.
        verdicts: one for each parameter of either side, in the order of the forward.
        cause: what explains what was found; `None` where nothing is wrong.
        batch: how the batches differ; `None` where they don't, or weren't seen on both sides.
        forward: where the forward passes part; `None` where they don't, or nothing was traced.
        backward: where the backward passes part, likewise.
        notes: what wasn't or couldn't be compared.
    """

    ranks: int
    verdicts: tuple[Verdict, ...]
    cause: Cause | None
    batch: str | None = None
    forward: Parting | None = None
    backward: Parting | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether every gradient was compared and is right; dead parameters on both sides are not."""
        return self.cause is None and not self.dead and any(v.difference is not None for v in self.verdicts)

    @property
    def wrong(self) -> tuple[Verdict, ...]:
        """The parameters with which something is wrong, in the order of the forward."""
        return tuple(verdict for verdict in self.verdicts if verdict.is_wrong)

    @property
    def dead(self) -> tuple[str, ...]:
        """Parameters whose gradient is zero or absent on both sides, which proves nothing."""
        return tuple(verdict.name for verdict in self.verdicts if verdict.is_dead)

    def to_json(self) -> str:
        """The report as one JSON object."""
        facts: dict[str, Any] = {
            "ok": self.ok,
            "ranks": self.ranks,
            "cause": self.cause and asdict(self.cause),
            "batch": self.batch,
            "dead": self.dead,
            "notes": self.notes,
            "parameters": [asdict(verdict) for verdict in self.verdicts],
        }
        for name, parting in (("forward", self.forward), ("backward", self.backward)):
            facts[name] = parting and {"place": parting.place, **asdict(parting)}
        return json.dumps(facts, indent=1, default=str)

    def to_html(self) -> str:
        """The report as one HTML page, with the model's layers in the order of the forward."""
        facts = [(name, f"parts {p.place}") for name, p in self._partings()]
        if self.dead:
            facts.append(("dead", _listed(self.dead)))
        facts += [("note", note) for note in self.notes]
        cause = None if self.cause is None else f"{self.cause.where}: {_sentence(self.cause.explanation)}"
        return page(self.verdicts, self._headline(), cause, facts, self.ok)

    def _partings(self) -> list[tuple[str, Parting]]:
        both = (("forward", self.forward), ("backward", self.backward))
        return [(name, parting) for name, parting in both if parting is not None]

    def _headline(self) -> str:
        compared = [v for v in self.verdicts if v.difference is not None and not v.is_dead]
        head = "every gradient is right" if self.ok else f"{len(self.wrong)} parameters are wrong"
        if not self.ok and not self.wrong:
            head = "no proof: " + ("the batches differ" if self.batch else "not every gradient is alive")
        return f"doctor: {head} ({self.ranks} ranks, {len(compared)} of {len(self.verdicts)} compared)"

    def __str__(self) -> str:
        compared = [v for v in self.verdicts if v.difference is not None and not v.is_dead]
        lines = [self._headline()]
        if self.cause is not None:
            lines += _wrapped("  cause    ", f"{self.cause.where}: {_sentence(self.cause.explanation)}")
        for name, parting in self._partings():
            text = f"parts {parting.place}, by {parting.difference:.2g}"
            lines += _wrapped(f"  {name} ".ljust(11), text)
        if self.dead:
            text = f"zero or absent on both sides, which proves nothing: {_listed(self.dead)}"
            lines += _wrapped("  dead     ", text)
        for note in self.notes:
            lines += _wrapped("  note     ", note)
        return "\n".join([*lines, *self._table(compared)])

    def _table(self, compared: Sequence[Verdict]) -> list[str]:
        if not self.wrong:
            if not compared:
                return []
            worst = max(compared, key=lambda v: (v.difference or 0.0) / (v.tolerance or 1.0))
            return [
                f"  largest difference {worst.difference:.2g} of {worst.tolerance:.2g} allowed: {worst.name}"
            ]
        width = min(44, max(len(v.name) for v in self.wrong[:_SHOWN]))
        lines = [f"  {'parameter'.ljust(width)}  difference  allowed  cosine   scale"]
        before: list[str] = []
        for verdict in self.wrong[:_SHOWN]:
            numbers = (verdict.difference, verdict.tolerance, verdict.cosine, verdict.scale)
            shown = "  ".join("     -" if n is None else f"{n:9.3g}" for n in numbers)
            lines.append(f"  {verdict.name.ljust(width)} {shown}")
            sentences = [_sentence(explanation) for explanation in verdict.explanations]
            for text in sentences if sentences != before else ["the same"]:
                lines += _wrapped("      ", text)
            before = sentences
        if len(self.wrong) > _SHOWN:
            lines.append(f"  and {len(self.wrong) - _SHOWN} more")
        return lines


def _sentence(explanation: Explanation) -> str:
    where = f" ({rank_list(list(explanation.ranks))})" if explanation.ranks else ""
    also = f"; also consistent with: {' or '.join(explanation.others)}" if explanation.others else ""
    return f"{explanation.mistake.value}: {explanation.text}{where}{also}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _wrapped(head: str, text: str) -> list[str]:
    rest = " " * len(head)
    return textwrap.wrap(
        text, _WIDTH, initial_indent=head, subsequent_indent=rest, break_long_words=False
    ) or [head]


def find_cause(
    verdicts: Sequence[Verdict], batch: str | None, forward: Parting | None, backward: Parting | None
) -> Cause | None:
    """What explains all that was found, or the first of it.

    A difference of weights or batches explains everything after it; then what is missing; then the place
    where the forward passes part, and then the backward passes; then a factor that all have; then the first
    parameter, in the order of the forward, whose gradient a mistake of its own explains.
    """
    wrong = [verdict for verdict in verdicts if verdict.is_wrong]
    for kinds in ((Mistake.WEIGHTS,), (Mistake.MISSING, Mistake.EXTRA, Mistake.COVERAGE)):
        for verdict in wrong:
            found = next((e for e in verdict.explanations if e.mistake in kinds), None)
            if found is not None:
                return Cause(verdict.name, found, (verdict.name,))
        if batch is not None:
            return Cause("the batch", Explanation(Mistake.BATCH, batch))
    if not wrong:
        return None
    common = _common_factor(verdicts)
    if common is not None:
        names = tuple(verdict.name for verdict in wrong)
        return Cause("every parameter", common, names)
    parting = forward or backward
    if parting is not None:
        explanation = next(iter(parting.explanations), None) or Explanation(
            Mistake.UNEXPLAINED, "no mistake that the doctor knows explains it"
        )
        return Cause(parting.place, explanation, _near(parting, verdicts))
    own = [v for v in wrong if v.explanations[0].mistake is not Mistake.UNEXPLAINED]
    first = (own or wrong)[0]
    if not own:  # what spreads backward comes from the last of them
        first = wrong[-1]
    return Cause(first.name, first.explanations[0], (first.name,))


def _common_factor(verdicts: Sequence[Verdict]) -> Explanation | None:
    alive = [v for v in verdicts if v.difference is not None and not v.is_dead]
    first = alive[0].explanations[0] if alive and alive[0].explanations else None
    if len(alive) < 2 or first is None or first.mistake is not Mistake.SCALED:
        return None
    for verdict in alive:
        if [e.text for e in verdict.explanations] != [first.text]:
            return None
    return Explanation(
        Mistake.SCALED,
        f"{first.text}, and so is every other: the loss is normalised otherwise, or the reduction is",
        first.ranks,
        first.axes,
        first.factor,
        first.others,
    )


def _near(parting: Parting, verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """Parameters of the module at which the runs part, or else of the one before."""
    for module in (parting.boundary.module, parting.after):
        names = tuple(v.name for v in verdicts if module and v.name.startswith(f"{module}."))
        if names:
            return names
    return ()
