"""What can't be hooked, by name; and the second clipper, which is switched off."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

from distnorm.errors import UnsupportedGradientError
from distnorm.hooks.deepspeed.adapters import WRAPPERS, Adapter, TorchOptimizer
from distnorm.hooks.deepspeed.patches import Patches
from distnorm.hooks.second_clipper import refuse_second_clipper

_LOG = logging.getLogger("distnorm")
_COMPRESSING = "deepspeed.runtime.fp16.onebit."


def adapter_class(engine: Any) -> type[Adapter]:
    """The adapter for an engine's optimizer.

    Raises:
        UnsupportedGradientError: the engine, or its optimizer, can't be hooked; it is named, and so is the
            setting that made it so.
    """
    for fact in _obstacles(engine):
        raise UnsupportedGradientError(f"expected a DeepSpeed engine that can be hooked, found {fact}")
    optimizer = engine.optimizer
    name = _name(optimizer)
    if name in WRAPPERS:
        return WRAPPERS[name]
    if isinstance(optimizer, torch.optim.Optimizer):
        return TorchOptimizer
    known = ", ".join(sorted(wrapper.rpartition(".")[2] for wrapper in WRAPPERS))
    raise UnsupportedGradientError(f"expected a torch optimizer or one of {known}, found {name}")


def _obstacles(engine: Any) -> Iterator[str]:
    optimizer = engine.optimizer
    if "_take_model_step" in vars(engine):
        yield "an engine that something else is attached to already"
    if optimizer is None or type(optimizer).__name__ in ("DummyOptim", "DeepSpeedZeRoOffload"):
        yield "an engine without an optimizer"
        return
    inner = getattr(optimizer, "optimizer", optimizer)
    if any(_qualified(base).startswith(_COMPRESSING) for base in type(inner).__mro__):
        yield f"optimizer {type(inner).__name__}, which compresses gradients inside its own step"
    if inner is not optimizer and "muon" in type(inner).__name__.lower():
        yield f"optimizer {type(inner).__name__}, which replaces gradients before a wrapper's norm"
    if any(base.__name__ == "DeepSpeedHybridEngine" for base in type(engine).__mro__):
        yield "DeepSpeedHybridEngine (hybrid_engine.enabled)"
    settings = {
        "compile.deepcompile": engine.is_deepcompile_enabled(),
        "optimizer.params.legacy_fusion": getattr(optimizer, "fused_adam_legacy", False),
        "optimizer.type: Lamb with fp16": getattr(optimizer, "fused_lamb_legacy", False),
        "torch_autocast.dtype: float16": getattr(engine, "torch_autocast_z0_gradscaler", None)
        or getattr(optimizer, "torch_autocast_gradscaler", None),
        "zero_optimization.zenflow": getattr(engine, "zenflow", False),
        "zero_optimization.offload_optimizer.device: nvme": getattr(optimizer, "swap_optimizer", False),
    }
    yield from (key for key, is_set in settings.items() if is_set)


def retire_engines_clipping(engine: Any, patches: Patches, *, quiet: bool) -> None:
    """Switch the engine's own clipping off, and log it unless `quiet`.

    Raises:
        ConfigError: the optimizer clips as well, inside its own step.
    """
    refuse_second_clipper(getattr(engine.optimizer, "optimizer", engine.optimizer), "optimizer.params.")
    value = engine.gradient_clipping()
    if value > 0 and not quiet:
        _LOG.warning(
            "DeepSpeed's gradient_clipping = %s is switched off: distnorm clips this engine's gradients%s",
            value,
            ""
            if "gradient_clipping" in _config_keys(engine)
            else " (the key is absent, and its default is not off)",
        )
    # A wrapper's own `clip_grad` goes into checkpoints, for runs without distnorm too, and so stays as it is.
    patches.set(engine, "gradient_clipping", lambda: 0.0)


def _config_keys(engine: Any) -> Any:
    return getattr(engine._config, "_param_dict", {})


def _name(instance: object) -> str:
    return _qualified(type(instance))


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
