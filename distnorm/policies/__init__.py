"""From a step's norms to a threshold and coefficients; everything stays on the device."""

from distnorm.policies.adagc import AdaGc
from distnorm.policies.agc import Agc
from distnorm.policies.aggc import Aggc
from distnorm.policies.decision import EPS, Decision, check_max_norm, handle_nonfinite
from distnorm.policies.factory import policy_of
from distnorm.policies.fixed import Constant, constant
from distnorm.policies.per_tensor import PerTensor
from distnorm.policies.percentile import Percentile
from distnorm.policies.policy import Policy, Reads, StepStatistics
from distnorm.policies.schedule import Schedule
from distnorm.policies.skip_spikes import SkipSpikes
from distnorm.policies.value import Value
from distnorm.policies.zclip import ZClip

__all__ = [
    "EPS",
    "AdaGc",
    "Agc",
    "Aggc",
    "Constant",
    "Decision",
    "PerTensor",
    "Percentile",
    "Policy",
    "Reads",
    "Schedule",
    "SkipSpikes",
    "StepStatistics",
    "Value",
    "ZClip",
    "check_max_norm",
    "constant",
    "handle_nonfinite",
    "policy_of",
]
