"""Lightning's `Fabric`: `clip_with` makes ``fabric.clip_gradients`` clip by distnorm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distnorm.clipper import GradClipper
from distnorm.errors import ConfigError, DistnormError
from distnorm.hooks import amp
from distnorm.hooks.deepspeed import is_engine
from distnorm.hooks.second_clipper import refuse_other_clippers
from distnorm.hooks.wrapping import hookable, parameters_of
from distnorm.integrations.common import LateState
from distnorm.integrations.taking_over import ConfigSource, taken_over
from distnorm.policies.results import ClipResult
from distnorm.sources import Tied


class FabricClipper:
    """Clips one model that a `Fabric` has set up; what `clip_with` returns.

    Its two methods of state let ``fabric.save`` and ``fabric.load`` keep the histories; a state that is
    loaded before the first step is kept until then.

    Args:
        fabric: a `lightning.fabric.Fabric`.
        config: as for `GradClipper`.
        tied: as for `GradClipper`.
    """

    def __init__(self, fabric: Any, config: ConfigSource = None, *, tied: Tied = ()) -> None:
        self._fabric, self._tied = fabric, tied
        self._config = taken_over(config, None, "")
        self._late = LateState()
        self._clipper: GradClipper | None = None
        self._module: object = None

    @property
    def clipper(self) -> GradClipper | None:
        """What clips; `None` before the first clip."""
        return self._clipper

    @property
    def last(self) -> ClipResult | None:
        """The newest result, or `None` before the first step."""
        return None if self._clipper is None else self._clipper.last

    def clip(
        self,
        module: Any,
        optimizer: Any,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float | str | None = None,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip this step's gradients, as ``Fabric.clip_gradients`` does. Collective: every rank must call it.

        Where the step must not happen (`clip.nonfinite: skip`, policy skip_spikes), the gradients are
        dropped, so that the optimizer touches neither parameters nor state; beside a loss scaler all ranks
        skip together.

        Args:
            module: what ``fabric.setup`` returned.
            optimizer: that which ``fabric.setup`` returned with it.
            clip_val: none; clipping by value is `clip.policy`.
            max_norm: becomes `clip.max_norm` where that is not set.
            norm_type: `norm.type`, or `None`.
            error_if_nonfinite: without a meaning here: `clip.nonfinite` decides.

        Returns:
            0-d fp32, the norm before clipping.

        Raises:
            ConfigError: an argument differs from the configuration.
            DistnormError: as `GradClipper.clip`; or the module is another, or a DeepSpeed engine.
        """
        if clip_val is not None:
            raise ConfigError(
                f"clip_val: expected none, found {clip_val}; set clip.policy to value, and clip.max_norm"
            )
        own = self._config.norm.type
        if norm_type is not None and float(norm_type) != own:
            raise ConfigError(f"norm_type: expected none, or {own} as norm.type says, found {norm_type}")
        clipper = self._planned(_unwrapped(module), optimizer, max_norm)
        return self._clipped(clipper, optimizer).total_norm.to(torch.float32)

    def _planned(self, module: Any, optimizer: Any, max_norm: float | None) -> GradClipper:
        config = taken_over(self._config, max_norm, "max_norm")
        if self._clipper is None:
            if is_engine(module):
                raise DistnormError(
                    "expected another strategy than DeepSpeed, whose engine clips inside its own step, found "
                    "it; call distnorm.attach(engine), and not fabric.clip_gradients"
                )
            refuse_other_clippers([optimizer])
            self._clipper = GradClipper(module, config, tied=self._tied)
            self._config, self._module = config, module
            self._late.bind(self._clipper)
        elif module is not self._module:
            raise DistnormError(
                "expected the module of the first clip, found another; call clip_with for each"
            )
        elif config is not self._config:
            raise ConfigError(f"max_norm: expected none, as in the first clip, found {max_norm}")
        return self._clipper

    def _clipped(self, clipper: GradClipper, optimizer: Any) -> ClipResult:
        scaler = getattr(self._fabric.strategy.precision, "scaler", None)
        steppers = hookable(optimizer)
        if scaler is not None and scaler.is_enabled():
            for inner in steppers:
                amp.unscale(scaler, inner, ())
            result = clipper.clip()
            for inner in steppers:
                amp.set_found_inf(scaler, inner, ~result.is_finite | result.skipped)
            return result
        result = clipper.clip()
        if clipper.rules.may_skip and result.skipped:
            for parameter in parameters_of(optimizer):
                parameter.grad = None
        return result

    def state_dict(self) -> dict[str, Any]:
        """As `GradClipper.state_dict`; before there is a clipper, what was loaded."""
        return self._late.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As `GradClipper.load_state_dict`; before there is a clipper the state is kept for it."""
        self._late.load_state_dict(state_dict)


def clip_with(fabric: Any, config: ConfigSource = None, *, tied: Tied = ()) -> FabricClipper:
    """Have ``fabric.clip_gradients`` clip by distnorm, from now on, and ``fabric.load`` restore its state.

    Not collective, but every rank must call it. The loop stays as it is: the method's max_norm becomes
    `clip.max_norm` where the configuration has none, and is refused where both are set and differ; it may be
    left out. It returns distnorm's norm, before clipping, on every strategy, FSDP and ModelParallel included.

    Args:
        fabric: a `lightning.fabric.Fabric`, which clips one model.
        config: as for `GradClipper`.
        tied: as for `GradClipper`.

    Returns:
        What clips: its `last` is the newest `ClipResult`, and it belongs in what ``fabric.save`` is given.

    Example:
        >>> clipping = clip_with(fabric, {"clip": {"nonfinite": "skip"}})
        >>> fabric.backward(loss)
        >>> norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
        >>> optimizer.step()
    """
    clipping = FabricClipper(fabric, config, tied=tied)
    fabric.clip_gradients = clipping.clip
    fabric.load = _loading_into(clipping, fabric.load)
    return clipping


def _loading_into(clipping: FabricClipper, load: Callable[..., Any]) -> Callable[..., Any]:
    """``Fabric.load``, that restores a clipper under every strategy.

    Under FSDP and ModelParallel Fabric's own puts the saved state in the clipper's place in the caller's
    dict, and restores nothing.
    """

    @functools.wraps(load)
    def loading(path: Any, state: dict[str, Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        keys = [key for key, value in (state or {}).items() if value is clipping]
        remainder = load(path, state, *args, **kwargs)
        for key in keys:
            assert state is not None
            if state[key] is not clipping:
                clipping.load_state_dict(state[key])
                state[key] = clipping
        return remainder

    return loading


def _unwrapped(module: Any) -> Any:
    """What the strategy has made of a model, without Fabric's own wrapper."""
    return getattr(module, "_forward_module", module)
