"""What the library's fast path makes of the same gradients, as facts that can travel to the root."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from distnorm.clipper import GradClipper
from distnorm.config import ClipConfig, Config
from distnorm.errors import DistnormError, NonFiniteGradientError
from distnorm.policies.results import ClipResult
from distnorm.verification.declared import Place
from distnorm.verification.oracle import Truth, gather_truth
from distnorm.verification.pieces import Layout
from distnorm.verification.ranks import Ranks, rank_list
from distnorm.verification.scaling import Before, scaling_faults

# A threshold nearer to the norm than this would leave half-precision gradients hardly changed.
_CLIPS_VISIBLY = 0.9


@dataclass(frozen=True, slots=True)
class Arguments:
    """The caller's arguments, read once."""

    target: Any
    config: Config
    group: ProcessGroup | None
    pp_mesh: DeviceMesh | None
    tied: tuple[tuple[str, ...], ...]
    named: list[tuple[str, Tensor]]
    layouts: Mapping[int, Layout]
    place: Place
    sharded: Any = None

    def clipper(self, max_norm: float | None) -> GradClipper:
        """Make a clipper with this max norm that raises wherever it can't measure. Collective."""
        clip = ClipConfig(max_norm=max_norm, overlap=self.config.clip.overlap)
        config = self.config.model_copy(update={"clip": clip})
        where = {"group": self.group, "pp_mesh": self.pp_mesh, "tied": self.tied}
        declared = {"sharded": self.sharded, "grad_of": self.place.given}
        return GradClipper(self.target, config, **where, **declared)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank got: a result, or why there is none."""

    norm: float = math.nan
    coefficient: float = math.nan
    threshold: float = math.nan
    bits: tuple[str, str] = ("", "")
    refusal: str | None = None
    non_finite: bool = False
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Whether the scaling can be checked, and with which threshold; `own` where it is not the caller's."""

    max_norm: float | None
    own: bool = False
    impossible: str | None = None


@dataclass(frozen=True, slots=True)
class Clipped:
    """What clip() did: every rank's outcome, and the gathered state of gradients that had been partial."""

    outcomes: Mapping[int, Outcome]
    partial: Truth | None


def measure_all(ranks: Ranks, args: Arguments) -> Mapping[int, Outcome]:
    """Measure with the caller's configuration; collective. The outcomes by rank, on the root."""
    clipper_of = args.clipper
    return _gather(ranks, lambda: clipper_of(args.config.clip.max_norm).measure())


def choose_threshold(truth: Truth, measured: Mapping[int, Outcome], max_norm: float | None) -> Plan:
    """Take the caller's threshold where it clips visibly, else half of the norm."""
    norms = [outcome.norm for outcome in measured.values()]
    if refusal_of(measured):
        return Plan(None, impossible="not checked, since GradClipper refuses to measure (see norm)")
    if not math.isfinite(truth.norm) or not all(map(math.isfinite, norms)):
        return Plan(None, impossible="")
    smallest = min(truth.norm, *norms)
    if smallest == 0:
        return Plan(None, impossible="")
    if max_norm is not None and max_norm < _CLIPS_VISIBLY * smallest:
        return Plan(max_norm)
    return Plan(smallest / 2, own=True)


def clip_all(
    ranks: Ranks, args: Arguments, plan: Plan, befores: Sequence[Before], partial: Sequence[str]
) -> Clipped:
    """Clip, and compare every gradient with what it was; collective."""
    outcomes = _gather(ranks, lambda: args.clipper(plan.max_norm).clip(), befores)
    after = None
    if partial:
        named = [(name, tensor) for name, tensor in args.named if name in partial]
        after = gather_truth(ranks, named, args.config.norm.type, args.layouts, args.place.of)
    return Clipped(outcomes, after)


def _gather(
    ranks: Ranks, call: Callable[[], ClipResult], befores: Sequence[Before] = ()
) -> Mapping[int, Outcome]:
    """Run the fast path on every rank. What it raises on purpose is a finding; anything else ends verify."""
    crash: Exception | None = None
    outcome = Outcome()
    try:
        outcome = _outcome(call())
    except DistnormError as error:
        outcome = Outcome(
            refusal=f"{type(error).__name__}: {error}", non_finite=isinstance(error, NonFiniteGradientError)
        )
    except Exception as error:
        crash = error

    def compare() -> Outcome:
        if crash is not None:
            raise crash
        if outcome.refusal is not None:
            return outcome
        return replace(outcome, faults=tuple(scaling_faults(befores, outcome.coefficient)))

    outcome = ranks.each("running GradClipper", compare)
    return dict(zip(ranks.members, ranks.gather(outcome), strict=False))


def _outcome(result: ClipResult) -> Outcome:
    norm, coefficient = float(result.total_norm), float(result.clip_coef)
    return Outcome(
        norm,
        coefficient,
        float(result.threshold),
        (f"{result.total_norm.dtype} {norm.hex()}", f"{result.clip_coef.dtype} {coefficient.hex()}"),
    )


def refusal_of(outcomes: Mapping[int, Outcome]) -> str:
    """The errors that the ranks got, each text once."""
    by_text: dict[str, list[int]] = {}
    for rank, outcome in outcomes.items():
        if outcome.refusal and not outcome.non_finite:
            by_text.setdefault(outcome.refusal, []).append(rank)
    return "; ".join(f"{text} (on {rank_list(where)})" for text, where in by_text.items())
