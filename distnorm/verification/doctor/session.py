"""`distnorm.doctor`: from the caller's arguments to the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from distnorm.errors import DistnormError
from distnorm.plan.collectives import Ranks, ranks_of
from distnorm.sources import GradOf, Layout, Sharded, modules_of, named_tensors, read_once
from distnorm.verification.axes import lines_of, merge_lines
from distnorm.verification.doctor.batch import batch_fault
from distnorm.verification.doctor.examining import examine, fits_whole, is_large, note_on_large, to_fetch
from distnorm.verification.doctor.holdings import Held, read_holdings, remember_gradients, weights_held
from distnorm.verification.doctor.judging import Verdict, diagnose, is_right, judge
from distnorm.verification.doctor.localising import Localiser, Parting, Traced
from distnorm.verification.doctor.meeting import Case, meet
from distnorm.verification.doctor.mistakes import Circumstances, Explanation, Mistake
from distnorm.verification.doctor.preparing import prepare
from distnorm.verification.doctor.recording import Recorder
from distnorm.verification.doctor.report import DoctorReport, find_cause
from distnorm.verification.doctor.tracing import refuse_compiled

_EXAMINED = 64  # wrong parameters that are explained, the first in the order of the forward
_WHOLE_EXAMINED = 4  # large ones among them that are looked at whole, where no block explains them
_IN_ANY_PLACE = (Mistake.UNEXPLAINED, Mistake.REPLICAS)  # elements may be in other places


def doctor(
    target: Any,
    *,
    reference: Callable[..., Any] | nn.Module | str | Path,
    group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    tied: Iterable[Sequence[str]] = (),
    parts: int = 1,
    microbatches: int = 1,
    trace: bool = False,
    sharded: Sharded = None,
    grad_of: GradOf = None,
) -> Examination:
    """Compare every gradient of a step with the same model's in one process, and explain differences.

    Use it around a forward and backward, up to where the gradients are final and before they are clipped::

        with distnorm.doctor(model, reference=reference, mesh=mesh) as examination:
            loss(model(tokens)).backward()
        print(examination.report)

    Collective: every rank of `group` must enter and leave it. Gradients are left as they are, but that hooks
    see them. Turn dropout off: two runs with other random numbers can't be compared.

    Args:
        target: as for `GradClipper`, with names of the whole model.
        reference: the other side. A callable, run on the first rank of the group only: ``reference()``, or
            ``reference(part, parts)``, runs forward and backward of the same model with the same weights in
            one process over the same global batch (or over one of `parts` equal slices of its rows, with the
            loss normalised as for all of it), issues no collective, and returns the model with its gradients.
            Or such a model, after its backward. Or the folder of a `distnorm.dump`.
        group: the ranks that hold the model; default: the whole world, or this process alone.
        mesh: the device mesh of all ranks, whose axes are named in what is found; DTensors' own are known.
        tied: groups of names that are one parameter, as for `GradClipper`.
        parts: into how many slices the reference's batch may be cut to explain a difference: the number of
            data-parallel ranks, times that of micro-batches.
        microbatches: how many micro-batches the step has.
        trace: compare what goes in and out of every module too, to say where the runs part. It needs a
            callable reference, and memory for that one's activations on the first rank.
        sharded, grad_of: as for `GradClipper`, of the target: plain tensors that are pieces, and where its
            gradients are. The reference's are in ``grad``.

    Returns:
        A context manager; its `report` is a `DoctorReport` afterwards, the same on every rank.

    Raises:
        DistnormError: on every rank: the reference fails, or gradients can't be read.
    """
    layout = (tuple(tuple(names) for names in tied), sharded, grad_of)
    return Examination(target, reference, group, mesh, layout, parts, microbatches, trace)


class Examination:
    """What `distnorm.doctor` returns; `report` is there after the block.

    Attributes:
        report: what was found; `None` before, and where the block raised.
    """

    report: DoctorReport | None = None

    def __init__(
        self,
        target: Any,
        reference: Any,
        group: ProcessGroup | None,
        mesh: DeviceMesh | None,
        layout: tuple[tuple[tuple[str, ...], ...], Sharded, GradOf],
        parts: int,
        microbatches: int,
        trace: bool,
    ) -> None:
        self._target = read_once(target)
        self._tied, self._sharded, self._grad_of = layout
        self._reference, self._group, self._mesh = reference, group, mesh
        self._parts, self._microbatches, self._trace = parts, microbatches, trace

    def __enter__(self) -> Examination:
        self._ranks = ranks = Ranks(self._group)
        if ranks.is_simulated:
            raise DistnormError("doctor: expected ranks that exist, found torch's fake process group")
        axes = axes_of(ranks, self._target, self._mesh)
        self._around = Circumstances(axes, self._microbatches, self._parts)
        with ranks.together():
            if self._trace:
                refuse_compiled(modules_of(self._target), "the model")
        with ranks.together():
            self._layout = Layout.of(None, self._tied, self._sharded, self._grad_of)
            pieces = weights_held(self._target, self._layout)
        self._prepared = prepare(ranks, self._target, pieces, self._reference, self._tied, self._trace)
        with ranks.together():
            self._before = remember_gradients(self._target, self._layout)
            shapes = self._prepared.shapes if self._trace else None
            self._recorder = Recorder(modules_of(self._target), ranks.rank, shapes, self._around)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.remove()
        if kind is None:
            self.report = self._examine()

    def _examine(self) -> DoctorReport:
        ranks, prepared = self._ranks, self._prepared
        with ranks.together():
            pieces = weights_held(self._target, self._layout)
        prepared.finish(ranks, pieces)
        with ranks.together():
            held = read_holdings(ranks.rank, self._target, self._layout, self._before, prepared.digests)
        cases = {case.name: case for case in meet(ranks, held, prepared.reference)}
        verdicts = _gathered(ranks, [judge(case, prepared.reference) for case in cases.values()])
        seen = self._recorder
        traced = ranks.gather(Traced(seen.rows, seen.records, seen.tokens, seen.modules))
        batch, forward, backward = self._first_says(traced, verdicts)
        verdicts = self._explained(held, cases, verdicts, batch)
        verdicts = [self._inferred(v, forward, backward) for v in verdicts]
        return DoctorReport(
            ranks.size,
            tuple(verdicts),
            find_cause(verdicts, batch, forward, backward),
            batch,
            forward,
            backward,
            tuple(prepared.notes),
        )

    def _first_says(
        self, traced: Sequence[Traced], verdicts: Sequence[Verdict]
    ) -> tuple[str | None, Parting | None, Parting | None]:
        """What the first rank alone knows: whether the batches are the same, and where the runs part."""
        batch, forward, backward = None, None, None
        with self._ranks.together():
            watched = self._prepared.watched
            if watched is not None:
                batch = batch_fault([one.rows for one in traced], watched.rows)
                if self._trace and batch is None and not all(map(is_right, verdicts)):
                    local = Localiser(watched, self._prepared.shaken, dict(enumerate(traced)), self._around)
                    forward = local.forward()
                    backward = None if forward is not None else local.backward()
        said: tuple[str | None, Parting | None, Parting | None]
        said = self._ranks.gather((batch, forward, backward))[0]
        return said

    def _explained(
        self, held: Sequence[Held], cases: Mapping[str, Case], verdicts: Sequence[Verdict], batch: str | None
    ) -> list[Verdict]:
        open_ = [v.name for v in verdicts if not v.is_wrong and not is_right(v)]
        names = open_[:_EXAMINED]
        if not names:
            return list(verdicts)
        reference = self._prepared.reference
        wanted = to_fetch(self._ranks, reference, cases, names)
        self._prepared.run_parts(self._ranks, self._parts if batch is None else 1, wanted)
        by_name = {verdict.name: verdict for verdict in verdicts}
        explained = self._diagnosed(held, cases, by_name, names, False)
        self._prepared.forget_parts()
        large = [name for name in names if is_large(reference.known[name].shape)]
        if large:
            self._prepared.notes.append(note_on_large())
        again = [n for n in large if explained[n].explanations[0].mistake in _IN_ANY_PLACE]
        again = [n for n in again if fits_whole(reference.known[n].shape, reference)][:_WHOLE_EXAMINED]
        explained |= self._diagnosed(held, cases, by_name, again, True)
        late = (Explanation(Mistake.UNEXPLAINED, "not examined: too many before it are wrong"),)
        for name in open_[_EXAMINED:]:
            explained[name] = replace(by_name[name], explanations=late)
        return [explained.get(verdict.name, verdict) for verdict in verdicts]

    def _diagnosed(
        self,
        held: Sequence[Held],
        cases: Mapping[str, Case],
        verdicts: Mapping[str, Verdict],
        names: Sequence[str],
        whole: bool,
    ) -> dict[str, Verdict]:
        ranks, reference = self._ranks, self._prepared.reference
        found = [
            diagnose(case, pieces, verdicts[case.name], reference, self._around)
            for case, pieces in examine(ranks, held, reference, cases, names, whole)
        ]
        return {verdict.name: verdict for verdict in _gathered(ranks, found)}

    def _inferred(self, verdict: Verdict, forward: Parting | None, backward: Parting | None) -> Verdict:
        """What the trace says of a gradient that nothing else explains."""
        if not verdict.is_wrong or verdict.explanations[0].mistake is not Mistake.UNEXPLAINED:
            return verdict
        first = verdict.explanations[0]
        parting = forward or backward
        if parting is not None:
            text = f"the {'forward' if parting.is_forward else 'backward'} parts {parting.place}"
            inferred = Explanation(Mistake.ACTIVATIONS, text, first.ranks)
        elif self._trace and self._prepared.run is not None:
            text = (
                "what its module is given is right, forward and backward; consistent with a missing or wrong "
                "reduction of the gradient itself"
            )
            inferred = Explanation(Mistake.UNREDUCED, text, first.ranks)
        else:
            return verdict
        return replace(verdict, explanations=(inferred, *verdict.explanations[1:]))


def _gathered(ranks: Ranks, found: Sequence[Verdict]) -> list[Verdict]:
    verdicts = [verdict for theirs in ranks.gather(list(found)) for verdict in theirs]
    return sorted(verdicts, key=lambda verdict: (verdict.place, verdict.name))


def axes_of(ranks: Ranks, target: Any, mesh: DeviceMesh | None) -> Mapping[str, Sequence[tuple[int, ...]]]:
    """The mesh axes of more than one rank, in numbers of the group. Collective.

    Where no mesh is in sight, DDP's ranks, or else all, are one axis.
    """
    tensors: list[Tensor] = [tensor for _, tensor in named_tensors(target)]
    members = list(range(ranks.size)) if ranks.group is None else list(ranks_of(ranks.group))
    mine = {name: list(lines) for name, lines in lines_of(tensors, mesh).items()}
    for module in modules_of(target):
        for inner in module.modules():
            if isinstance(inner, DistributedDataParallel):
                line = tuple(dist.get_process_group_ranks(inner.process_group))
                if not any(line in lines for lines in mine.values()):
                    mine["ddp"] = [line]
    merged = merge_lines(ranks.gather(mine), members)
    whole = {n: lines for n, lines in merged.items() if not n.startswith("world (")} or {
        "world": [tuple(members)]
    }
    numbered = {n: [tuple(map(members.index, line)) for line in lines] for n, lines in whole.items()}
    return {n: lines for n, lines in numbered.items() if any(len(line) > 1 for line in lines)}
