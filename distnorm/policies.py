"""From a total norm to a threshold and a coefficient; everything stays on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm.errors import ConfigError

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done with the gradients; 0-d fp64 tensors.

    Args:
        coef: what every gradient is multiplied by.
        threshold: the max norm in force; inf where none is.
        may_clip: whether the coefficient can be other than 1.
        zero: whether gradients are set to zero instead where the norm is not finite.
    """

    coef: Tensor
    threshold: Tensor
    may_clip: bool = True
    zero: bool = False


def check_max_norm(max_norm: float | None) -> float:
    """The threshold as a float, inf for `None`.

    Raises:
        ConfigError: negative, NaN, or no number.
    """
    if max_norm is None:
        return math.inf
    try:
        value = float(max_norm)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(max_norm, bool) or not value >= 0:
        raise ConfigError(f"max_norm: expected a number of at least 0, inf, or null; found {max_norm!r}")
    return value


def constant(total_norm: Tensor, max_norm: float, nonfinite: str = "propagate") -> Decision:
    """Clip to a fixed threshold: ``coef = min(1, max_norm / (total_norm + 1e-6))``.

    Args:
        total_norm: 0-d fp64.
        max_norm: the threshold; inf never clips.
        nonfinite: what a total norm that is not finite does: ``"skip"`` and ``"raise"`` leave the
            gradients alone (coef 1), ``"zero"`` makes them zero (coef 0), ``"propagate"`` lets the
            formula run, as torch does.

    Reference: Pascanu et al., "On the difficulty of training recurrent neural networks",
        arXiv 1211.5063; `torch.nn.utils.clip_grad_norm_` for the 1e-6.
    """
    threshold = torch.full_like(total_norm, max_norm)
    may_clip = not math.isinf(max_norm)
    coef = (max_norm / (total_norm + EPS)).clamp(max=1.0) if may_clip else torch.ones_like(total_norm)
    if nonfinite == "propagate":
        return Decision(coef, threshold, may_clip)
    zero = nonfinite == "zero"
    coef = torch.where(total_norm.isfinite(), coef, 0.0 if zero else 1.0)
    return Decision(coef, threshold, may_clip, zero)
