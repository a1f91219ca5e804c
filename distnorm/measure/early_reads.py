"""What reads gradients before a step does, or in place of that, where the configuration asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from distnorm.config import Config
from distnorm.measure.fingerprints import FingerprintedReads, Kept
from distnorm.measure.meter import Meter
from distnorm.measure.overlap import Overlap


def early_reads(
    config: Config, meter: Meter, modules: Sequence[nn.Module], kept: Kept, next_step: Callable[[], int]
) -> Overlap | FingerprintedReads | None:
    """What reads early, if anything does. Collective where ``clip.overlap`` is set.

    Args:
        config: the clipper's.
        meter: has a plan.
        modules: those of the target.
        kept: where fingerprints are kept.
        next_step: gives the number of the step that is measured next.

    Raises:
        ConfigError: as `Overlap`; or gradients are elsewhere than in `grad`.
    """
    of_plan = (meter.norm, meter.shards, meter.shares)
    keep = config.monitor.fingerprints
    prints = FingerprintedReads(*of_plan, kept, keep, next_step) if keep else None
    if config.clip.overlap and meter.norm.kernel is not None:
        with meter.ranks.together():
            meter.layout.refuse_overlap()
            return Overlap(*of_plan, modules, prints)
    return prints
