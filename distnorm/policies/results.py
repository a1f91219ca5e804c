"""What a step's measurement and clipping found and did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from distnorm import kernels
from distnorm.config import ClipConfig
from distnorm.policies.decision import Decision


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What was found of and done to one of `clip.groups`; fields as in `ClipResult`.

    Args:
        total_norm: the group's own norm, also where its policy uses the whole model's.
        clip_coef: the smallest that a gradient of the group was multiplied by.
        clipped_norm: the group's own norm after clipping.
        threshold: the max norm in force.
        was_clipped: whether the coefficient is below 1.
    """

    total_norm: Tensor
    clip_coef: Tensor
    clipped_norm: Tensor
    threshold: Tensor
    was_clipped: Tensor

    def __repr__(self) -> str:
        return _in_a_line(self)


@dataclass(frozen=True, slots=True)
class ClipResult:
    """What one `GradClipper.clip` or `GradClipper.measure` found and did.

    All fields but `groups` are 0-d tensors on the gradients' device, the same bits on every rank; nothing has
    been read on the host.

    Args:
        total_norm: fp64; the norm of the whole model's gradient before clipping. NaN under policy value
            alone, which measures nothing.
        clip_coef: fp64; what every gradient was multiplied by (by `measure`: 1); the smallest, where they
            have coefficients of their own.
        clipped_norm: fp64; the norm of the whole model's gradient after clipping. NaN where policy value has
            a part in it: no norm says what a clamp leaves.
        threshold: fp64; the max norm in force, inf where none is; with groups that of all other parameters.
        is_finite: bool; whether the total norm is finite; true where nothing is measured.
        was_clipped: bool; whether the coefficient is below 1.
        skipped: bool; whether the optimizer's step must not happen: by policy skip_spikes, by
            ``clip.nonfinite: skip``, or by ``raise`` where that is raised as the next step begins.
        groups: what was found of and done to each of ``clip.groups``, by name.
    """

    total_norm: Tensor
    clip_coef: Tensor
    clipped_norm: Tensor
    threshold: Tensor
    is_finite: Tensor
    was_clipped: Tensor
    skipped: Tensor
    groups: Mapping[str, GroupResult] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as Python floats and bools; `groups`, where there are any, as a dict of such dicts.

        Waits for the device.
        """
        plain: dict[str, Any] = _plain(self)
        if self.groups:
            plain["groups"] = {name: _plain(group) for name, group in self.groups.items()}
        return plain

    def __repr__(self) -> str:
        """One line; values only where they are in the host's memory, so that no device is waited for."""
        return _in_a_line(self)


def clip_result(total_norm: Tensor, is_finite: Tensor, decision: Decision, skipped: Tensor) -> ClipResult:
    """What a decision that is one coefficient makes of a norm."""
    clipped_norm = total_norm * decision.coef
    if decision.zero_unless is not None:
        clipped_norm = clipped_norm.where(decision.zero_unless, 0.0)
    clipped = decision.coef < 1
    return ClipResult(
        total_norm, decision.coef, clipped_norm, decision.threshold, is_finite, clipped, skipped
    )


def describe_steps(clip: ClipConfig, order: float, count: int, last: ClipResult | None) -> str:
    """What a clipper does and has done, for its `repr`; nothing is read from a device."""
    facts = [f"norm {order:g}", f"max_norm {clip.max_norm}", f"policy {clip.policy.name}"]
    facts += [f"{len(clip.groups)} groups"] if clip.groups else []
    facts.append(f"{count} step{'s' * (count != 1)}")
    if last is not None and kernels.on_host(last.total_norm):
        facts.append(f"last norm {float(last.total_norm):.6g}")
    return ", ".join(facts)


def _tensors(result: ClipResult | GroupResult) -> dict[str, Tensor]:
    values = ((field.name, getattr(result, field.name)) for field in fields(result))
    return {name: value for name, value in values if isinstance(value, Tensor)}


def _plain(result: ClipResult | GroupResult) -> dict[str, Any]:
    return {name: _number(value).item() for name, value in _tensors(result).items()}


def _number(value: Tensor) -> Tensor:
    """The first rank's value of a LocalTensor: all have the same bits, but torch can't read a NaN of all."""
    of_ranks: Mapping[int, Tensor] = getattr(value, "_local_tensors", None) or {0: value}
    return next(iter(of_ranks.values()))


def _in_a_line(result: ClipResult | GroupResult) -> str:
    tensors = _tensors(result)
    if all(map(kernels.on_host, tensors.values())):
        facts = [
            f"{name}={value if isinstance(value, bool) else format(value, '.6g')}"
            for name, value in _plain(result).items()
        ]
    else:  # to_dict() would wait for it
        facts = [f"on {next(iter(tensors.values())).device}"]
    if isinstance(result, ClipResult) and result.groups:
        facts.append(f"groups={dict(result.groups)}")
    return f"{type(result).__name__}({', '.join(facts)})"
