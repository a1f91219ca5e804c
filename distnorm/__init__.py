"""The exact norm of the gradient of the whole model, and clipping by it, on any topology.

This is the catalogue. A name is imported at its first use, so commands that need no torch don't wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distnorm.clipper import GradClipper
    from distnorm.config import Config, load_config
    from distnorm.errors import (
        ConfigError,
        CoverageError,
        DisagreementError,
        DistnormError,
        LostRankError,
        NonFiniteGradientError,
        ReplicaError,
        RunError,
        UnsupportedGradientError,
    )
    from distnorm.functional import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
    from distnorm.hooks import Handle, attach
    from distnorm.monitor import Alert, LayerRow, Monitor
    from distnorm.policies.qk_clip import QkHeads, clip_qk_
    from distnorm.policies.results import ClipResult, GroupResult
    from distnorm.sources import Piece
    from distnorm.verification import VerifyReport, verify
    from distnorm.verification.doctor import DoctorReport, doctor, dump

__version__ = "0.2.0"

__all__ = [
    "Alert",
    "ClipResult",
    "Config",
    "ConfigError",
    "CoverageError",
    "DisagreementError",
    "DistnormError",
    "DoctorReport",
    "GradClipper",
    "GroupResult",
    "Handle",
    "LayerRow",
    "LostRankError",
    "Monitor",
    "NonFiniteGradientError",
    "Piece",
    "QkHeads",
    "ReplicaError",
    "RunError",
    "UnsupportedGradientError",
    "VerifyReport",
    "attach",
    "clip_grad_norm_",
    "clip_grads_with_norm_",
    "clip_qk_",
    "doctor",
    "dump",
    "get_total_norm",
    "load_config",
    "verify",
]

_HOMES = {
    "clipper": ("GradClipper",),
    "config": ("Config", "load_config"),
    "errors": (
        "ConfigError",
        "CoverageError",
        "DisagreementError",
        "DistnormError",
        "LostRankError",
        "NonFiniteGradientError",
        "ReplicaError",
        "RunError",
        "UnsupportedGradientError",
    ),
    "functional": ("clip_grad_norm_", "clip_grads_with_norm_", "get_total_norm"),
    "hooks": ("Handle", "attach"),
    "monitor": ("Alert", "LayerRow", "Monitor"),
    "policies.qk_clip": ("QkHeads", "clip_qk_"),
    "policies.results": ("ClipResult", "GroupResult"),
    "sources": ("Piece",),
    "verification": ("VerifyReport", "verify"),
    "verification.doctor": ("DoctorReport", "doctor", "dump"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
