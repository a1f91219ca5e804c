"""Accelerate: `clip_with` makes an `Accelerator` clip by distnorm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distnorm.clipper import GradClipper
from distnorm.errors import ConfigError, DistnormError
from distnorm.hooks import amp, attach
from distnorm.hooks.attaching import Handle
from distnorm.hooks.deepspeed import EngineClipper, is_engine
from distnorm.hooks.second_clipper import refuse_other_clippers
from distnorm.hooks.wrapping import parameters_of
from distnorm.integrations.common import LateState
from distnorm.integrations.taking_over import ConfigSource, taken_over
from distnorm.policies.results import ClipResult
from distnorm.sources import Tied


class AcceleratedClipper:
    """Clips one model that an `Accelerator` has prepared; what `clip_with` returns.

    It has the two methods of what `Accelerator.register_for_checkpointing` saves; a state that is loaded
    before the first step is kept until then.

    Args:
        accelerator: an `accelerate.Accelerator`.
        model: what its `prepare` returned; a DeepSpeed engine clips inside its own step from now on.
        config: as for `GradClipper`.
        tied: as for `GradClipper`.

    Raises:
        ConfigError: the configuration is wrong; or the engine's gradient_clipping is another limit.
        DistnormError: as `attach`, of an engine.
    """

    def __init__(
        self, accelerator: Any, model: nn.Module, config: ConfigSource = None, *, tied: Tied = ()
    ) -> None:
        self._accelerator, self._model, self._tied = accelerator, model, tied
        self._config = taken_over(config, None, "")
        self._late = LateState()
        self._handle: Handle | None = None
        self._clipper: GradClipper | EngineClipper | None = None
        if is_engine(model):
            self._attach(model)

    def _attach(self, engine: Any) -> None:
        written = engine._config._param_dict.get("gradient_clipping")  # where absent, DeepSpeed has a default
        self._config = taken_over(self._config, written, "gradient_clipping")
        self._handle = attach(engine, config=self._config, tied=self._tied)
        self._clipper = self._handle.clipper
        self._tell_of_overflow()
        self._late.bind(self._clipper)

    def _tell_of_overflow(self) -> None:
        """At stage 0 in fp32 an engine's optimizer says whether it has skipped only while attached, and
        Accelerate looks whether it does once, as it wraps it."""
        for outer in self._accelerator._optimizers:
            if hasattr(outer, "__has_overflow__"):
                outer.__has_overflow__ = hasattr(outer.optimizer, "overflow")

    @property
    def clipper(self) -> GradClipper | EngineClipper | None:
        """What clips; `None` before the first clip, unless `plan` was called."""
        return self._clipper

    @property
    def last(self) -> ClipResult | None:
        """The newest result, or `None` before the first step."""
        return None if self._clipper is None else self._clipper.last

    def plan(self, max_norm: float | None = None) -> GradClipper | EngineClipper:
        """Make the clipper now, and not as the first step is clipped. Collective: every rank must call it.

        Args:
            max_norm: the limit that the caller sets; it becomes `clip.max_norm` where that is not set.

        Raises:
            ConfigError: the limit is another than `clip.max_norm`; or the configuration expects an overflow
                to be an error, beside a loss scaler, which works by them.
            DistnormError: as `GradClipper`.
        """
        config = taken_over(self._config, max_norm, "max_norm")
        if self._clipper is None:
            self._refuse_overflow_as_error(config.clip.nonfinite)
            refuse_other_clippers(self._accelerator._optimizers)
            clipper = GradClipper(self._model, config, tied=self._tied)
            self._late.bind(clipper)
            self._config, self._clipper = config, clipper
        elif config is not self._config:
            raise ConfigError(
                f"max_norm: expected none, as clip.max_norm was none when the first step was clipped (with "
                f"DeepSpeed: when the engine was attached), found {max_norm}; set clip.max_norm"
            )
        return self._clipper

    def clip(self, max_norm: float | None = None, norm_type: float | None = None) -> Tensor | None:
        """Clip this step's gradients. Collective: every rank must call it, between backward and step.

        A DeepSpeed engine has clipped by then, inside `Accelerator.backward`. Where the step must not happen
        (`clip.nonfinite: skip`, policy skip_spikes), the gradients are dropped, so that no optimizer touches
        parameters or state, and `Accelerator.optimizer_step_was_skipped` says so, for which schedulers wait.

        Args:
            max_norm: as `plan`.
            norm_type: `norm.type`, or `None`.

        Returns:
            0-d fp64, the norm before clipping; NaN, and nothing is done or counted, where gradients are still
            being accumulated; `None` before a DeepSpeed engine's first step.

        Raises:
            ConfigError: an argument differs from the configuration.
            DistnormError: as `GradClipper.clip`.
        """
        if norm_type is not None and norm_type != self._config.norm.type:
            raise ConfigError(
                f"norm_type: expected none, or {self._config.norm.type} as norm.type says, found {norm_type}"
            )
        clipper = self.plan(max_norm)
        if not self._accelerator.sync_gradients:
            return torch.full((), torch.nan, dtype=torch.float64, device=self._accelerator.device)
        if isinstance(clipper, GradClipper):
            return self._clipped(clipper).total_norm
        return None if clipper.last is None else clipper.last.total_norm

    def _clipped(self, clipper: GradClipper) -> ClipResult:
        scaler = self._scaler()
        if scaler is None and not clipper.rules.may_skip:
            return clipper.clip()
        steppers = list(self._steppers(clipper))
        for optimizer in map(_innermost, steppers) if scaler is not None else ():
            amp.unscale(scaler, optimizer, ())
        result = clipper.clip()
        if scaler is not None:
            for optimizer in map(_innermost, steppers):  # all ranks skip, whichever found the overflow
                amp.set_found_inf(scaler, optimizer, ~result.is_finite)
        skips = clipper.rules.may_skip and bool(result.skipped)
        if skips:
            for parameter in clipper.parameters:
                parameter.grad = None
        for outer in steppers:
            outer._is_overflow = skips  # optimizer_step_was_skipped; a scaler's step sets it anew
        return result

    def _scaler(self) -> Any:
        scaler = self._accelerator.scaler
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _steppers(self, clipper: GradClipper) -> Iterator[Any]:
        """The accelerator's optimizers that step this model."""
        known = set(map(id, clipper.parameters))
        for outer in self._accelerator._optimizers:
            if any(id(parameter) in known for parameter in parameters_of(outer)):
                yield outer

    def _refuse_overflow_as_error(self, mode: str) -> None:
        if self._scaler() is not None and mode in ("raise", "raise_now"):
            raise ConfigError(
                "clip.nonfinite: expected skip beside a loss scaler (mixed_precision fp16), which finds its "
                f"scale by steps that overflow, found {mode}"
            )

    def owns(self, parameters: Iterable[Tensor]) -> bool:
        """Whether these are the model's: all that it trains, and none of another model.

        Raises:
            DistnormError: they are some of those that it trains, or not its own alone.
        """
        given, own = set(map(id, parameters)), {id(p): p for p in self._model.parameters()}
        if not given & own.keys():
            return False
        missing = [key for key, p in own.items() if p.requires_grad and key not in given]
        if missing or not given <= own.keys():
            raise DistnormError(
                f"clip_grad_norm_: expected all parameters of the model that distnorm clips, and no others; "
                f"found {len(given - own.keys())} others, and {len(missing)} of those it trains missing; for "
                "a part of a model use clip.groups"
            )
        return True

    def state_dict(self) -> dict[str, Any]:
        """As `GradClipper.state_dict`; before there is a clipper, what was loaded."""
        return self._late.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `GradClipper.load_state_dict`; before there is a clipper the state is kept for it."""
        self._late.load_state_dict(state)

    def close(self) -> None:
        """Write the monitor's last rows, and let a DeepSpeed engine clip by itself again. Not collective."""
        if self._handle is not None:
            self._handle.remove()
            self._tell_of_overflow()
        if self._clipper is not None:
            self._clipper.close()


def clip_with(
    accelerator: Any, model: nn.Module, config: ConfigSource = None, *, tied: Tied = ()
) -> AcceleratedClipper:
    """Have ``accelerator.clip_grad_norm_`` clip a model by distnorm, and its checkpoints keep the histories.

    Collective: every rank must call it, after `prepare`. The loop stays as it is: the method's max_norm
    becomes `clip.max_norm` where the configuration has none, and is refused where both are set and differ;
    it may be left out. It returns distnorm's norm, before clipping. Other models, prepared by the same
    accelerator, are clipped as before, or by a call of their own.

    Args:
        accelerator: an `accelerate.Accelerator`.
        model: what its `prepare` returned.
        config: as for `GradClipper`.
        tied: as for `GradClipper`.

    Returns:
        What clips: its `last` is the newest `ClipResult`.

    Raises:
        ConfigError, DistnormError: as `AcceleratedClipper`.

    Example:
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> clipping = clip_with(accelerator, model, {"clip": {"nonfinite": "skip"}})
        >>> accelerator.backward(loss)
        >>> norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        >>> optimizer.step()
    """
    clipping = AcceleratedClipper(accelerator, model, config, tied=tied)
    beneath = accelerator.clip_grad_norm_

    def clip_grad_norm_(
        parameters: Iterable[Tensor], max_norm: float | None = None, norm_type: float | None = None
    ) -> Tensor | None:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if clipping.owns(parameters):
            return clipping.clip(max_norm, norm_type)
        given = {"max_norm": max_norm, "norm_type": norm_type}
        norm: Tensor | None = beneath(parameters, **{k: v for k, v in given.items() if v is not None})
        return norm

    accelerator.clip_grad_norm_ = clip_grad_norm_
    accelerator.register_for_checkpointing(clipping)
    return clipping


def _innermost(optimizer: Any) -> Any:
    while hasattr(optimizer, "step_was_skipped"):  # an AcceleratedOptimizer
        optimizer = optimizer.optimizer
    return optimizer
