"""Settings of one section that another section can't do, refused before a run begins, with line and column.

The library refuses the same during the run, where it doesn't know the line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from distnorm.config.clip_models import ClipConfig
from distnorm.config.monitor_models import MonitorConfig
from distnorm.config.policy_models import AnyPolicy
from distnorm.config.section import Conflict

LARGEST_ORDER = 10_000.0
"""The largest finite order of a norm that can be measured."""
LARGEST_PARAMETER_ORDER = 6.5
"""The largest finite order of a norm that can be measured of single parameters."""
_UNITS_ORDER = 2.0
_SUMMED = ("cosines", "updates", "slices", "spectral")

BEYOND_TOTAL = {
    "per_tensor": "has a coefficient for each parameter",
    "adagc": "has a coefficient for each parameter",
    "agc": "has a coefficient for each output unit",
    "value": "multiplies nothing",
}
"""What policies do that use more than the total norm."""


def of_norm(order: float, clip: ClipConfig, monitor: MonitorConfig) -> Iterator[Conflict]:
    """Orders that can't be measured, or not in the detail that policies, groups or the monitor need."""
    if LARGEST_ORDER < order < math.inf:
        yield Conflict(("norm.type",), f"expected at most {LARGEST_ORDER:g}, or inf; found {order:g}")
        return
    is_too_high = LARGEST_PARAMETER_ORDER < order < math.inf
    for policy, at in _policies(clip):
        keys = (f"{at}policy.name", f"{at}policy", "norm.type")
        if policy.name == "agc" and order != _UNITS_ORDER:
            text = "which goes by the 2-norms of output units"
            yield Conflict(keys, f"expected norm.type 2 under policy agc, {text}, found {order:g}")
        elif policy.name in ("per_tensor", "adagc") and is_too_high:
            yield _too_high(keys, f"under policy {policy.name}", order)
    if clip.groups and is_too_high:
        yield _too_high(("clip.groups", "norm.type"), "with clip.groups", order)
    if monitor.every is not None and is_too_high:
        yield _too_high(("monitor.every", "norm.type"), "with monitor.every", order)
    for key in _SUMMED:
        if order == math.inf and getattr(monitor, key):
            text = (
                f"expected a finite norm.type with monitor.{key}, whose sums no maximum can carry, found inf"
            )
            yield Conflict((f"monitor.{key}", "norm.type"), text)


def of_apply(clip: ClipConfig) -> Iterator[Conflict]:
    """Why an optimizer can't multiply by the coefficient that the configuration leads to."""
    if clip.apply != "optimizer":
        return
    name = clip.policy.name
    if clip.groups:
        text = "clip.groups, which have coefficients of their own"
        yield _not_optimizer("clip.groups", text)
    elif name in BEYOND_TOTAL:
        yield _not_optimizer("clip.policy", f"policy {name}, which {BEYOND_TOTAL[name]}")
    if clip.nonfinite == "zero":
        yield _not_optimizer("clip.nonfinite", "nonfinite: zero, which no optimizer can do")


def of_backend(backend: str, clip: ClipConfig) -> Iterator[Conflict]:
    """What the gradients of a backend don't allow."""
    if backend == "deepspeed":
        yield from _of_deepspeed(clip)
    if backend == "fsdp1":
        for policy, at in _policies(clip):
            if policy.name == "agc":
                keys = (f"{at}policy.name", f"{at}policy", "train.parallel.backend")
                text = "which goes by output units: FSDP1 flattens parameters and forgets their rows"
                yield Conflict(keys, f"expected backend fsdp2 or ddp under policy agc, {text}, found fsdp1")


def _of_deepspeed(clip: ClipConfig) -> Iterator[Conflict]:
    backend, alike = "train.parallel.backend", "whose step scales all gradients alike"
    under = "under backend deepspeed"
    if clip.apply == "optimizer":
        text = f"expected apply auto or scale {under}, whose step scales the gradients, found optimizer"
        yield Conflict(("clip.apply", backend), text)
    if clip.overlap:
        text = f"expected overlap = false {under}, whose step holds the gradients, found true"
        yield Conflict(("clip.overlap", backend), text)
    if clip.groups:
        yield Conflict(("clip.groups", backend), f"expected none {under}, {alike}, found {len(clip.groups)}")
    if clip.policy.name in BEYOND_TOTAL:
        text = f"expected a policy that goes by the total norm {under}, {alike}, found {clip.policy.name}"
        yield Conflict(("clip.policy.name", "clip.policy", backend), text)


def _policies(clip: ClipConfig) -> Iterator[tuple[AnyPolicy, str]]:
    """Every policy in use, and the path before its key."""
    yield clip.policy, "clip."
    for i, group in enumerate(clip.groups):
        yield group.policy, f"clip.groups.[{i}]."


def _too_high(keys: tuple[str, ...], where: str, order: float) -> Conflict:
    text = f"expected an order up to {LARGEST_PARAMETER_ORDER:g}, or inf, {where}"
    return Conflict(keys, f"{text}, for norms of single parameters; found norm.type {order:g}")


def _not_optimizer(key: str, found: str) -> Conflict:
    text = "expected fused optimizers, which multiply by one number, to be enough for all that is clipped"
    return Conflict(("clip.apply", key), f"{text}, found {found}")
