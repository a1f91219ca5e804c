"""From the configuration to a policy."""

from __future__ import annotations

from distnorm.config import ClipConfig, GroupConfig
from distnorm.policies.adagc import AdaGc
from distnorm.policies.agc import Agc
from distnorm.policies.aggc import Aggc
from distnorm.policies.decision import check_max_norm
from distnorm.policies.fixed import Constant
from distnorm.policies.per_tensor import PerTensor
from distnorm.policies.percentile import Percentile
from distnorm.policies.policy import Policy
from distnorm.policies.schedule import Schedule
from distnorm.policies.skip_spikes import SkipSpikes
from distnorm.policies.value import Value
from distnorm.policies.zclip import ZClip

_KINDS: dict[str, type[Policy]] = {
    kind.name: kind
    for kind in (Constant, Schedule, Value, PerTensor, Agc, Percentile, ZClip, AdaGc, Aggc, SkipSpikes)
}


def policy_of(clip: ClipConfig, group: GroupConfig | None = None) -> Policy:
    """A new policy as configured.

    Args:
        clip: what is clipped where no group says otherwise, and ``nonfinite`` for all.
        group: the group whose policy it is to be; None: that of the parameters in no group.
    """
    rule = clip if group is None else group
    fields = type(rule.policy).model_fields
    parameters = {key: getattr(rule.policy, key) for key in fields if key != "name"}
    return _KINDS[rule.policy.name](check_max_norm(rule.max_norm), clip.nonfinite, **parameters)
