"""Megatron-core: `attach_optimizer` makes its optimizer measure and clip by distnorm, once a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from distnorm.clipper import GradClipper
from distnorm.errors import ConfigError, DistnormError, ReplicaError
from distnorm.hooks.deepspeed.patches import Patches
from distnorm.hooks.second_clipper import note_clipped, refuse_other_clippers
from distnorm.hooks.wrapping import wrapped
from distnorm.integrations.megatron_claims import (
    Facts,
    check_claims,
    check_gradients,
    explained,
    names_of_shared,
)
from distnorm.integrations.taking_over import ConfigSource, taken_over
from distnorm.plan.collectives import Ranks
from distnorm.plan.cutting import cuts_inside
from distnorm.policies.results import ClipResult
from distnorm.sources import Piece
from distnorm.sources.megatron import Axes, held_by
from distnorm.sources.megatron_optimizers import Run, inner_optimizers, parts_of


class MegatronClipper:
    """Clips the steps of one of Megatron's optimizers; what `attach_optimizer` returns.

    Args:
        optimizer: a `MegatronOptimizer`, or a `ChainedOptimizer` of several.
        chunks: this rank's model chunks.
        config: as for `GradClipper`.
        pg_collection: the process groups that the model was made with.
        group: as for `GradClipper`.

    Attributes:
        clipper: the `GradClipper`; its state belongs in the checkpoint.
    """

    def __init__(
        self,
        optimizer: Any,
        chunks: Sequence[nn.Module],
        config: ConfigSource,
        pg_collection: Any,
        group: ProcessGroup | None,
    ) -> None:
        self._ranks, self._patches = Ranks(group), Patches()
        with self._ranks.together():
            inner = inner_optimizers(optimizer)
            _refuse_twice(optimizer, inner)
            self._axes = Axes.of(pg_collection)
            settings = getattr(optimizer, "config", None)  # which a chain of nothing has not
            self._limit = float(getattr(settings, "clip_grad", 0.0) or 0.0)
            scales = any(getattr(each, "grad_scaler", None) is not None for each in inner)
            taken = taken_over(config, self._limit, "clip_grad")
        self._scales = self._ranks.any(scales)[0]
        self._runs, self._twins = self._described(optimizer, chunks)
        views = [run.part.between(run.start, run.stop).requires_grad_() for run in self._runs]
        self._run_of = {id(view): run for view, run in zip(views, self._runs, strict=True)}
        named = [(f"{i}.{self._run_of[id(view)].held.name}", view) for i, view in enumerate(views)]
        says: dict[str, Any] = {"sharded": self._piece_of, "grad_of": self._gradient_of}
        self.clipper = GradClipper(named, taken, group=group, **says)
        self._has_compared, self._is_fresh = False, False
        self._install(optimizer, inner)

    @property
    def last(self) -> ClipResult | None:
        """The newest result, or `None` before the first step."""
        return self.clipper.last

    def remove(self) -> None:
        """Put everything back. Not collective."""
        self._patches.undo()
        self._end_note()

    # ---- once

    def _described(self, optimizer: Any, chunks: Sequence[nn.Module]) -> tuple[list[Run], list[int]]:
        """What this rank's optimizers step, cut where those of other ranks end; and hashes of values."""
        ranks, axes = self._ranks, self._axes
        with ranks.together():
            held = held_by(chunks, axes)
            facts = Facts.of([each.parameter for each in held])
            parts = parts_of(optimizer, held)
        check_claims(ranks, held, axes, facts)
        names = names_of_shared(ranks, held, facts)
        found = zip(held, facts.prints, facts.varies, strict=True)
        values = {id(each.parameter): bits if varies else 0 for each, bits, varies in found}
        runs = []
        for part in parts:
            bits = values[id(part.held.parameter)]
            part = replace(part, held=replace(part.held, name=names.get(part.held.name, part.held.name)))
            where = f" part {part.held.axis.index}" if part.held.is_cut else ""
            # Copies of one tensor are cut alike, be they said to be tied or not.
            runs.append(Run(part, part.start, part.stop, str(bits) if bits else part.held.name + where))
        cuts = cuts_inside(ranks, runs)
        runs = [
            short for run in runs for short in run.cut(cuts.get(run.name, ())) if short.start < short.stop
        ]
        return runs, [values[id(run.held.parameter)] for run in runs]

    def _piece_of(self, name: str, tensor: Tensor) -> Piece:
        run = self._run_of[id(tensor)]
        return run.held.piece(run.start, run.stop)

    def _gradient_of(self, tensor: Tensor) -> Tensor | None:
        return self._run_of[id(tensor)].gradient

    def _install(self, optimizer: Any, inner: Sequence[Any]) -> None:
        patches = self._patches
        self._end_note = note_clipped(_torch_optimizers(inner))
        for name, wrapper in (
            ("prepare_grads", self._prepared),
            ("step_with_ready_grads", self._stepped),
            ("step", self._reported),
        ):
            patches.add(optimizer, name, partial(wrapper, getattr(optimizer, name)))
        for each in inner:
            if each is not optimizer:
                patches.add(each, "clip_grad_norm", _refuse_part)
                patches.add(each, "get_grad_norm", _refuse_part)
        patches.add(optimizer, "get_grad_norm", self.get_grad_norm)
        patches.add(optimizer, "clip_grad_norm", self.clip_grad_norm)
        configs = [getattr(each, "config", None) for each in (optimizer, *inner)]
        for settings in {id(config): config for config in configs if config is not None}.values():
            patches.add(settings, "clip_grad", 0.0)  # what the optimizer would do by itself

    # ---- in each step

    def _prepared(self, prepare: Callable[[], bool]) -> bool:
        overflows = prepare()
        if self._scales:  # Megatron asks fewer ranks, and those that left a step out would be waited for
            overflows = self._ranks.any(overflows)[0]
        self._is_fresh = False
        if not overflows:
            self._clip()
        return overflows

    def _stepped(self, step: Callable[[], bool]) -> bool:
        last, self._is_fresh = self.clipper.last, False
        if self.clipper.rules.may_skip and last is not None and bool(last.skipped):
            return False
        return step()

    def _reported(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self.clipper.last
        outcome = step(*args, **kwargs)
        last = self.clipper.last
        if isinstance(outcome, tuple) and len(outcome) > 1 and outcome[1] is None and last is not before:
            assert last is not None
            outcome = (outcome[0], float(last.total_norm), *outcome[2:])
        return outcome

    def _clip(self) -> None:
        if not self._has_compared:
            self._has_compared = check_gradients(self._ranks, self._runs, self._axes, self._twins)
        try:
            self.clipper.clip()
        except ReplicaError as error:
            raise explained(self._ranks, error, self._runs, self._axes) from error
        self._is_fresh = True

    def get_grad_norm(self) -> float:
        """The norm before clipping, in the place of the optimizer's method. Collective, unless the gradients
        were prepared, and so measured, in this step."""
        result = self.clipper.last if self._is_fresh else self.clipper.measure()
        assert result is not None
        return float(result.total_norm)

    def clip_grad_norm(self, clip_grad: float) -> float:
        """Clip, unless the gradients were prepared, and so clipped, in this step. Collective.

        Raises:
            ConfigError: `clip_grad` is another limit than what was taken over.
            DistnormError: as `GradClipper.clip`.
        """
        if clip_grad not in (0.0, self._limit, self.clipper.config.clip.max_norm):
            raise ConfigError(
                f"clip_grad: expected {self._limit}, as when distnorm was attached, found {clip_grad}"
            )
        if not self._is_fresh:
            self._clip()
        return self.get_grad_norm()


def attach_optimizer(
    optimizer: Any,
    model_chunks: nn.Module | Sequence[nn.Module],
    config: ConfigSource = None,
    *,
    pg_collection: Any = None,
    group: ProcessGroup | None = None,
) -> MegatronClipper:
    """Have an optimizer of Megatron-core measure, clip and report by distnorm, on every layout.

    Collective: every rank must call it, before the first step, with the model's parameters gathered. In
    ``optimizer.step()`` the gradient of the whole model is measured and clipped once, when the optimizer has
    prepared it; ``step`` returns distnorm's norm, before clipping, as a float, and so do ``get_grad_norm``
    and ``clip_grad_norm``. ``config.clip_grad`` becomes `clip.max_norm` where the configuration has none, is
    refused where both are set and differ, and is 0 while attached. Where the step must not happen
    (`clip.nonfinite: skip`, policy skip_spikes), ``step`` returns False first. Steps that Megatron leaves out
    as the loss scale was too large are not measured, and don't count.

    The attributes of parameters (``tensor_model_parallel``, ``partition_dim``, ``allreduce``, ``shared``,
    ``sequence_parallel``) are compared with what the ranks hold: with modules and values here, with gradients
    in the first step that has some, and whenever replicas differ.

    Args:
        optimizer: a `MegatronOptimizer`, with or without the distributed optimizer, or a `ChainedOptimizer`.
        model_chunks: this rank's model, or its interleaved stages.
        config: as for `GradClipper`.
        pg_collection: the `ProcessGroupCollection` that the model was made with; default: Megatron's global
            groups.
        group: as for `GradClipper`.

    Returns:
        What clips: its `last` is the newest `ClipResult`; ``clipper.state_dict()`` belongs in the checkpoint.

    Raises:
        CoverageError, ReplicaError: an attribute says what is not so; parameter and attribute are named.
        ConfigError: the configuration is wrong, or ``clip_grad`` is another limit.
        UnsupportedGradientError: the optimizer is none of these; Megatron-FSDP is not supported.

    Example:
        >>> optimizer = get_megatron_optimizer(optimizer_config, model)
        >>> clipping = attach_optimizer(optimizer, model, {"clip": {"nonfinite": "skip"}})
        >>> update_successful, grad_norm, num_zeros_in_grad = optimizer.step()
    """
    chunks = [model_chunks] if isinstance(model_chunks, nn.Module) else list(model_chunks)
    return MegatronClipper(optimizer, chunks, config, pg_collection, group)


def _refuse_twice(optimizer: Any, inner: Sequence[Any]) -> None:
    for each in (optimizer, *inner):  # alone, or as one of a chain
        if {"prepare_grads", "clip_grad_norm"} & vars(each).keys():
            raise DistnormError(
                f"expected an optimizer that nothing is attached to, found {type(each).__name__}, which "
                "clips already; call remove() of what clips it first"
            )
    refuse_other_clippers(_torch_optimizers(inner))


def _torch_optimizers(inner: Sequence[Any]) -> list[object]:
    """All that steps inside of Megatron's optimizers: torch's, or wrappers of such."""
    held = (getattr(each, "optimizer", None) for each in inner)
    return [each for outer in held if outer is not None for each in wrapped(outer)]


def _refuse_part(*args: Any) -> float:
    raise DistnormError(
        "expected the norm of the whole model to be asked for, found a call of one of several chained "
        "optimizers; call the ChainedOptimizer's method"
    )
