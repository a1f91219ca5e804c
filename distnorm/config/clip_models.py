"""The keys of clipping: one policy for all parameters, and groups that have their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distnorm.config.policy_models import PolicyChoice, SchedulePolicy, SkipSpikesPolicy, default_policy
from distnorm.config.section import AS_TUPLE, Conflict, Section, Threshold

_MAX_NORM = "The threshold: gradients whose norm is larger are scaled down to it. "
_POLICY = (
    "How the threshold is found: a name, or a mapping with the name and the policy's parameters. "
    "percentile and zclip never go above max_norm; agc, adagc and aggc have none."
)


class GroupConfig(Section):
    """Parameters that are clipped by themselves."""

    name: str = Field("", description="What it is called where it is reported; empty: its first pattern.")
    params: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), AS_TUPLE] = Field(
        description="Patterns of parameters' names, with * and ?. Every pattern matches one at least, and no "
        "parameter is in two groups."
    )
    max_norm: Threshold = Field(None, description=_MAX_NORM + "null or inf never clips.")
    policy: PolicyChoice = Field(default_factory=default_policy, description=_POLICY)
    norm: Literal["own", "shared"] = Field(
        "own", description="Which norm the policy goes by: that of the group, or that of the whole model."
    )

    @model_validator(mode="before")
    @classmethod
    def _with_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("name", "") == "":
            params = data.get("params")
            if isinstance(params, (list, tuple)) and params and isinstance(params[0], str):
                return {**data, "name": params[0]}
        return data


class ClipConfig(Section):
    """When and how gradients are scaled."""

    max_norm: Threshold = Field(
        None,
        description=_MAX_NORM + "null measures only; inf never clips.",
    )
    nonfinite: Literal["raise", "raise_now", "skip", "zero", "propagate"] = Field(
        "raise",
        description="What happens where the norm is inf or NaN. raise is an error: on the CPU in the step"
        " itself; on an accelerator, which nothing waits for, the gradients become zero, "
        "fused optimizers leave the step out, and the next one raises. raise_now is an error "
        "in the step itself on every device, and waits. skip leaves out the optimizer's step."
        " zero sets the gradients to zero. propagate leaves the outcome to the arithmetic.",
    )
    apply: Literal["auto", "scale", "optimizer"] = Field(
        "auto",
        description="Who multiplies by the coefficient under attach: scale is a pass over the gradients; "
        "optimizer is the step of a fused torch optimizer itself; auto is optimizer where that can be.",
    )
    overlap: bool = Field(
        False,
        description="Whether each gradient is read as soon as backward has finished it, so that little of "
        "the norm's cost is left afterwards; under FSDP2, DDP, or neither.",
    )
    policy: PolicyChoice = Field(default_factory=default_policy, description=_POLICY)
    groups: Annotated[tuple[GroupConfig, ...], AS_TUPLE] = Field(
        (), description="Parameters that have a policy and a threshold of their own."
    )

    def conflicts(self) -> Iterator[Conflict]:
        """Policies whose keys contradict each other, and groups of one name."""
        yield from _policy_conflicts(self, "")
        named: dict[str, int] = {}
        for i, group in enumerate(self.groups):
            yield from _policy_conflicts(group, f"groups.[{i}].")
            if group.name in named:
                first = named[group.name]
                yield Conflict(
                    (f"groups.[{i}].name", f"groups.[{i}].params", f"groups.[{first}].name"),
                    f"expected another name than that of groups[{first}], found {group.name!r}",
                )
            named.setdefault(group.name, i)


def _policy_conflicts(owner: ClipConfig | GroupConfig, at: str) -> Iterator[Conflict]:
    policy, max_norm = owner.policy, owner.max_norm
    if policy.name in ("agc", "adagc", "aggc") and max_norm is not None:
        yield Conflict(
            (f"{at}max_norm", f"{at}policy"),
            f"expected max_norm = null under policy {policy.name}, which has no max norm, found {max_norm}",
        )
    if isinstance(policy, SkipSpikesPolicy) and policy.after > policy.window:
        yield Conflict(
            (f"{at}policy.after", f"{at}policy.window", f"{at}policy"),
            f"expected at most policy.window = {policy.window}, which never holds more, found {policy.after}",
        )
    if isinstance(policy, SchedulePolicy):
        yield from _schedule_conflicts(policy, at)


def _schedule_conflicts(policy: SchedulePolicy, at: str) -> Iterator[Conflict]:
    keys = (f"{at}policy.points", f"{at}policy.curve", f"{at}policy")
    steps = [point.step for point in policy.points]
    if policy.curve == "constant" and steps:
        yield Conflict(keys, f"expected no points under curve constant, found {len(steps)}")
    if policy.curve != "constant" and not steps:
        yield Conflict(keys, f"expected points under curve {policy.curve}, found none")
    for i in range(1, len(steps)):
        if steps[i] <= steps[i - 1]:
            yield Conflict(
                (f"{at}policy.points.[{i}].step", f"{at}policy"),
                f"expected a step after {steps[i - 1]}, that of the point before, found {steps[i]}",
            )
