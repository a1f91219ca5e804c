"""The gradient noise scale, where norms before and after the reduction over data ranks are at hand.

B_simple = S / |G|^2 of McCandlish et al. 2018 (arXiv 1812.06162, appendix A.1): the batch at which the noise
of a gradient is as large as the gradient. With the squared norm s of one rank's gradient, averaged over R
ranks, and b of their mean:

    |G|^2 = (R b - s) / (R - 1)        S = (s - b) / (1 - 1/R)

Both are averaged over monitored steps, each by itself, before they are divided. The unit is the batch of one
rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.measure.fingerprints import FingerprintedReads
from distnorm.measure.norms import Norm
from distnorm.measure.overlap import Overlap
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import Share

# Weight of the past at each monitored step.
_BETA = 0.9
_ORDER = 2


class NoiseScalePayload:
    """One value: the mean over ranks of the squared norm of their own gradients.

    Args:
        overlap: reads gradients before they are reduced.
        replicas: R.
    """

    length = 1

    def __init__(self, overlap: Overlap, replicas: int) -> None:
        self._overlap, self.replicas = overlap, replicas

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """This rank's summand, [1] fp64; NaN if its gradient has changed since backward."""
        before = self._overlap.before
        if before is None:
            return torch.full((1,), math.nan, dtype=torch.float64, device=device)
        return kernels.moved(before, device) / self.replicas


def noise_scale_payload(
    ranks: Ranks, norm: Norm, shares: Sequence[Share], overlap: Overlap | FingerprintedReads | None
) -> NoiseScalePayload | None:
    """The payload, where all of every rank's gradient goes through DDP under `clip.overlap`, and p is 2.

    Collective: every rank must call it, after it planned. `None` on all ranks, or on none.
    """
    if not isinstance(overlap, Overlap) or norm.order != _ORDER:
        return None
    alike = all(share.replicas == overlap.replicas for share in shares if share.stop > share.start)
    found = set(ranks.gather(overlap.replicas if alike else 0))
    return (
        NoiseScalePayload(overlap, overlap.replicas)
        if found == {overlap.replicas} and overlap.replicas > 1
        else None
    )


class NoiseScale:
    """The averages. They are kept over changes of the set of parameters."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, replicas: int, small: float, big: float) -> None:
        """Add a monitored step's squared norms s and b; values that are not finite are ignored."""
        if math.isfinite(small) and math.isfinite(big):
            signal = (replicas * big - small) / (replicas - 1)
            noise = (small - big) / (1 - 1 / replicas)
            self._signal = _BETA * self._signal + (1 - _BETA) * signal
            self._noise = _BETA * self._noise + (1 - _BETA) * noise

    @property
    def value(self) -> float | None:
        """The scale; `None` while the noise hides the signal, and before the first monitored step."""
        return max(self._noise, 0.0) / self._signal if self._signal > 0 else None

    def state(self) -> list[float]:
        return [self._signal, self._noise]

    def load(self, state: Sequence[float]) -> None:
        self._signal, self._noise = state
