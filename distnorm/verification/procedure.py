"""`verify`, from the caller's arguments to the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from distnorm.config import Config, load_config
from distnorm.errors import DistnormError
from distnorm.sources import GradOf, Sharded
from distnorm.verification import checks
from distnorm.verification.axes import Lines, lines_of, merge_lines
from distnorm.verification.declared import Place, declared_layouts
from distnorm.verification.fast import (
    Arguments,
    Clipped,
    Outcome,
    Plan,
    choose_threshold,
    clip_all,
    measure_all,
)
from distnorm.verification.flat import layouts_of
from distnorm.verification.oracle import Truth, gather_truth
from distnorm.verification.pieces import is_dtensor, local_of, read_parameters
from distnorm.verification.ranks import Ranks
from distnorm.verification.report import VerifyReport
from distnorm.verification.scaling import Before, remember, restore

T = TypeVar("T")


def verify(
    target: Any,
    config: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    group: ProcessGroup | None = None,
    pp_mesh: DeviceMesh | None = None,
    tied: Iterable[Sequence[str]] = (),
    measured: float | Tensor | None = None,
    sharded: Sharded = None,
    grad_of: GradOf = None,
) -> VerifyReport:
    """Prove the gradient's norm, and its clipping, against the whole gradient gathered in fp64.

    Collective: every rank of `group` must call it, after a backward and before the optimizer's step. The
    gradients are left as they were, bit for bit. It takes memory for one more copy of the local gradients
    and, on the first rank, for the largest parameter in fp64; and the time to send every gradient there. It
    is a tool for once, not for every step.

    Args:
        target: as for `GradClipper`: a module, a list of modules, parameters, or (name, parameter) pairs.
        config: as for `GradClipper`. Where its `clip.max_norm` would not clip this gradient, the check of the
            scaling uses half of the norm instead, and says so.
        group: the ranks that hold the model; default: the whole world, or this process alone.
        pp_mesh: as for `GradClipper`: every name that is not tied is prefixed by the stage's coordinate.
        tied: groups of names that are one parameter.
        measured: a norm of the caller's own, a float or a 0-d tensor, to be judged too.
        sharded, grad_of: as for `GradClipper`: plain tensors that are pieces, and where gradients are.

    Returns:
        The report, the same on every rank; `report.ok` says whether every check holds.

    Raises:
        DistnormError: on every rank: arguments or gradients can't be read on some rank, or no rank has any
            gradient.

    Example:
        >>> loss.backward()
        >>> report = distnorm.verify(model, {"clip": {"max_norm": 1.0}})
        >>> print(report)
    """
    ranks = Ranks(group)
    args = ranks.each(
        "reading its arguments", lambda: _read(target, config, group, pp_mesh, tied, sharded, grad_of)
    )
    given = ranks.each("reading the norm handed in", lambda: _read_norm(measured))
    befores = ranks.each("copying the gradients", lambda: remember(args.named, args.place))
    try:
        return _verify(ranks, args, given, befores)
    finally:
        restore(befores)


def _verify(ranks: Ranks, args: Arguments, given: checks.Given, befores: Sequence[Before]) -> VerifyReport:
    truth = gather_truth(ranks, args.named, args.config.norm.type, args.layouts, args.place.of)
    partial = ranks.on_root("looking for gradients", lambda: _partial_names(_known(truth)))
    lines = ranks.each("reading the meshes", lambda: lines_of((t for _, t in args.named), args.pp_mesh))
    facts = _Facts(
        merge_lines(ranks.gather(lines), ranks.members),
        _by_rank(ranks, given),
        _by_rank(ranks, f"norm {args.config.norm!r}, clip {args.config.clip!r}"),
    )
    measure = measure_all(ranks, args)
    plan = ranks.on_root(
        "choosing a threshold", lambda: choose_threshold(_known(truth), measure, args.config.clip.max_norm)
    )
    clipped = clip_all(ranks, args, plan, befores, partial) if plan.impossible is None else None
    return ranks.on_root(
        "writing the report",
        lambda: _report(_known(truth), len(ranks.members), facts, measure, plan, clipped),
    )


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the ranks said beside their gradients; filled on the root only."""

    axes: Lines
    given: Mapping[int, checks.Given]
    configs: Mapping[int, str]


def _report(
    truth: Truth,
    size: int,
    facts: _Facts,
    measured: Mapping[int, Outcome],
    plan: Plan,
    clipped: Clipped | None,
) -> VerifyReport:
    outcomes = [measured, *([clipped.outcomes] if clipped is not None else [])]
    found = [
        checks.check_norm(truth, outcomes, facts.axes),
        *checks.check_given(truth, facts.given, facts.axes),
        checks.check_agreement(
            outcomes, facts.configs, cannot=clipped is None and plan.impossible is not None
        ),
        checks.check_replicas(truth),
        checks.check_coverage(truth),
        checks.check_scaling(truth, plan, clipped),
    ]
    handed_in = next((entry[0] for entry in facts.given.values() if entry is not None), None)
    first = next(iter(measured.values()))
    own = None if first.refusal is not None else first.norm
    return VerifyReport(
        norm_type=truth.p,
        ranks=size,
        parameters=len(truth.norms),
        elements=truth.elements,
        true_norm=truth.norm,
        measured_norm=own if handed_in is None else handed_in,
        checks=tuple(found),
    )


def _read(
    target: Any,
    config: Any,
    group: ProcessGroup | None,
    pp_mesh: DeviceMesh | None,
    tied: Iterable[Sequence[str]],
    sharded: Sharded,
    grad_of: GradOf,
) -> Arguments:
    if not isinstance(target, Tensor | nn.Module | Mapping):
        target = list(target)  # a generator of parameters has no second pass
    groups = tuple(tuple(names) for names in tied)
    stage = None
    if pp_mesh is not None:
        if pp_mesh.ndim != 1:
            raise DistnormError(f"expected a 1-d pp_mesh, found {pp_mesh}")
        stage = f"stage {pp_mesh.get_local_rank()}"
    layouts = layouts_of(target)
    place = Place(grad_of)
    named = read_parameters(target, stage, groups, layouts, place.of)
    named, declared = declared_layouts(named, sharded)
    layouts |= declared
    return Arguments(target, load_config(config), group, pp_mesh, groups, named, layouts, place, sharded)


def _read_norm(measured: float | Tensor | None) -> checks.Given:
    if measured is None:
        return None
    note = ""
    if is_dtensor(measured) and any(placement.is_partial() for placement in measured.placements):  # type: ignore[union-attr]
        note = f"a DTensor with placements {measured.placements} is not final: hand in its full_tensor()"  # type: ignore[union-attr]
    value = local_of(measured) if isinstance(measured, Tensor) else measured
    return float(value), note


def _partial_names(truth: Truth) -> list[str]:
    if not any(piece.gradient is not None for piece in truth.pieces):
        raise DistnormError(
            "expected a gradient on some rank, found none on any: "
            "call verify after backward() and before zero_grad()"
        )
    return sorted(
        {piece.name for piece in truth.pieces if piece.gradient is not None and piece.gradient.partial}
    )


def _by_rank(ranks: Ranks, value: T) -> dict[int, T]:
    return dict(zip(ranks.members, ranks.gather(value), strict=False))


def _known(truth: Truth | None) -> Truth:
    assert truth is not None  # on the root, where alone this is asked
    return truth
