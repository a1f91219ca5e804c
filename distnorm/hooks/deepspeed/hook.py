"""When: as the engine's step begins, which for every kind of engine is `_take_model_step`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import ProcessGroup

from distnorm.config import Config
from distnorm.errors import DistnormError, NonFiniteGradientError
from distnorm.hooks.deepspeed.adapters import Adapter
from distnorm.hooks.deepspeed.patches import Patches
from distnorm.hooks.deepspeed.refusals import adapter_class, retire_engines_clipping
from distnorm.hooks.deepspeed.verdict import EngineClipper
from distnorm.plan.collectives import Ranks
from distnorm.plan.cutting import cuts_inside
from distnorm.sources import Tied, checked_tied
from distnorm.sources import deepspeed as source
from distnorm.sources.deepspeed import Piece


def is_engine(target: object) -> bool:
    """Whether this is a DeepSpeed engine; false wherever the caller never imported DeepSpeed."""
    module = sys.modules.get("deepspeed")
    return module is not None and isinstance(target, module.DeepSpeedEngine)


class DeepSpeedHook:
    """Measures and clips in every step of a `DeepSpeedEngine` or `PipelineEngine`.

    Collective: every rank of `group` must make one, at the same point, between two steps.

    Args:
        engine: the engine, with its optimizer.
        config: a path to a YAML file, a mapping, a `Config`, or `None` for the defaults (measure only).
        group: the ranks that hold the model; default: the whole world.
        tied: groups of names that are one parameter. A `PipelineModule`'s tied layers are known without.

    Attributes:
        clipper: the clipper at work; its `last` is the newest `ClipResult`.

    Raises:
        UnsupportedGradientError: the engine or its optimizer can't be hooked; it is named.
        ConfigError: the optimizer clips as well; the key is named.
        DistnormError: as `GradClipper`.
    """

    def __init__(
        self,
        engine: Any,
        config: str | Path | Mapping[str, Any] | Config | None = None,
        *,
        group: ProcessGroup | None = None,
        tied: Tied = (),
    ) -> None:
        ranks = Ranks(group)
        self._patches = Patches()
        self._engine = engine
        self._error: NonFiniteGradientError | None = None
        try:
            adapter, pieces = self._described(ranks, tied)
            shards = source.shards(pieces, cuts_inside(ranks, pieces))
            self.clipper = EngineClipper(shards, config, group)
            self._install(ranks, adapter)
        except BaseException:
            self._patches.undo()
            raise

    @property
    def optimizers(self) -> list[object]:
        """The engine, which steps its optimizer."""
        return [self._engine]

    def paused(self) -> NoReturn:
        """Refused: in each of the engine's steps the hook decides whether it overflows."""
        raise DistnormError(
            f"paused: expected a torch optimizer's handle, found that of {type(self._engine).__name__}, "
            "whose own step needs distnorm's norm; call remove() of the handle, and attach again afterwards"
        )

    def remove(self) -> None:
        """Put everything back. A second call does nothing."""
        self._patches.undo()

    def _described(self, ranks: Ranks, tied: Tied) -> tuple[Adapter, list[Piece]]:
        with ranks.together():
            first = {name: names[0] for names in checked_tied(tied) for name in names}
            names = source.whole_model_names(self._engine)
            names = {key: first.get(name, name) for key, name in names.items()}
            adapter = adapter_class(self._engine)(self._engine, names)
            pieces = adapter.pieces()
        return adapter, pieces

    def _install(self, ranks: Ranks, adapter: Adapter) -> None:
        engine, is_pipeline = self._engine, hasattr(type(self._engine), "train_batch")
        outermost = "train_batch" if is_pipeline else "step"
        with ranks.together():
            retire_engines_clipping(engine, self._patches, quiet=ranks.rank != 0)
            adapter.install(self._patches)
            take_step, step = engine._take_model_step, getattr(engine, outermost)
            self._patches.set(engine, "_take_model_step", self._measured(take_step, adapter))
            self._patches.set(engine, outermost, self._raising(step))
        if adapter.is_between_steps:
            adapter.forget()

    def _measured(self, take_step: Callable[..., Any], adapter: Adapter) -> Callable[..., Any]:
        engine = self._engine

        def take_measured_step(*args: Any, **kwargs: Any) -> Any:
            adapter.wait_for_gradients()
            verdict = self.clipper.judge(adapter.loss_scale, is_scaled=engine.fp16_enabled())
            adapter.verdict, self._error = verdict, verdict.error
            try:
                adapter.impose()
                taken = take_step(*args, **kwargs)
            finally:
                adapter.forget()
                adapter.verdict = None
            engine._global_grad_norm = verdict.result.total_norm
            if hasattr(engine.optimizer, "_global_grad_norm"):
                engine.optimizer._global_grad_norm = verdict.result.total_norm
            return taken

        return take_measured_step

    def _raising(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """An engine's step that raises when it is over.

        By then its counters and its loss scale have moved on, so a caller that catches the error can go on.
        """

        def raising_step(*args: Any, **kwargs: Any) -> Any:
            outcome = step(*args, **kwargs)
            error, self._error = self._error, None
            if error is not None:
                raise error
            return outcome

        return raising_step
