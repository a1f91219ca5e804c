"""A recorded series of total norms, with spikes and steps that are not finite, and how a test plays it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from distnorm.policies import Decision, Policy, StepStatistics

NAN, INF = math.nan, math.inf
# fmt: off
NORMS: tuple[float, ...] = (
    NAN, 2.7886, 2.3617, 2.0459, 2.6417, 2.0457, 2.3885, 2.472, 2.2757, 8.2628,
    2.4306, 2.2704, 2.0393, 2.3109, 2.5396, 1.9274, 2.3962, NAN, 1.8308, 2.2709,
    2.1315, 2.1988, 1.6281, 1.5913, 1.6938, 2.0148, 1.7724, 1.9541, 2.097, 1.9596,
    INF, NAN, 1.652, 1.6538, 1.9818, 2.1308, 1.6843, 1.9654, 1.6296, 1.9764,
    118.42, 135.3, 1.8449, 1.9827, 1.5317, 1.8008, 1.5508, 1.941, 1.5905, 1.5207,
    1.5978, 1.5273, 1.5268, 1.8833, 2.1919, 1.6976, 1.6354, 1.7307, 1.48, 1.6501,
    1.7628, 1.9165, 1.4024, 1.6409, 1.7228, 1.4909, 1.7396, 1.5811, 1.6125, 1.525,
    1.6888, 1.7932, 1.2979, 1.5847, 1.5522, 1.5055, 1.7703, 11.44, INF, 1.4512,
    1.5022, 1.9256, 1.699, 1.3143, 1.3962, 1.406, 1.4647, 1.4454, 1.485, 1.2616,
    1.3532, 1.3926, 1.6858, 1.2639, 1.3878, 1.2873, 8.8465, 1.2578, 1.2105, 1.8464,
    1.301, 1.6295, 1.4229, 1.7522, 1.5046, 1.4014, 1.506, 1.1495, 1.396, 1.3261,
    1.427, 1.1239, 1.2045, 1.325, 1.6332, 1.5561, 1.1461, 1.099, 1.3631, 1.5021,
    1.1968, 1.5547, 1.2888, 1.279, 1.2838, 1.5274, 1.1246, 1.274, 1.2908, 1.2501,
    1.1229, 1.0693, 1.2117, 15.448, NAN, 1.1411, 1.2374, 1.2665, 1.1992, 1.0439,
    1.1634, 1.14, 1.0807, 1.2677, 1.2217, 1.3724, 0.94229, 1.099, 1.2942, 1.0454,
    1.2256, 1.0625, 1.0055, 0.93942, 0.96869, 1.2615, 1.1848, 0.9113, 1.1317, 1.0248,
    2718.3, 1.042, 1.1171, 1.1314, 1.441, 0.97695, 1.1936, 1.0163, 1.0956, 1.4748,
    1.1366, 1.1298, 1.3562, 1.2025, 1.2779, 1.1761, 1.1242, 1.0039, 0.91062, 1.1459,
    1.1156, 1.1408, 1.0661, 1.2515, 1.1491, 0.96269, 1.0151, 1.0639, 1.1298, 0.90831,
    0.90398, 1.0577, 1.2066, 1.0419, 0.98645, 1.1003, 0.87238, 0.81664, 1.0728, 0.98658,
)
# fmt: on
# How much of the total norm's square each of four parameters has, and the steps without a gradient of one.
SHARES = (0.5, 0.3, 0.19, 0.01)
NUMELS = (64, 8, 1, 0)
NAMES = ("wte", "blocks.0.w", "blocks.1.w", "head")


def f32(value: float) -> float:
    """The value rounded to fp32, in plain Python."""
    return float(struct.unpack("f", struct.pack("f", value))[0]) if math.isfinite(value) else value


def parameter_norms(step: int, total: float) -> list[float]:
    """Four parameters' norms that belong to a recorded total norm: one spikes by itself, one is late, and
    what isn't finite is the first one's alone."""
    finite = total if math.isfinite(total) else 1.0
    norms = [f32(finite * math.sqrt(share)) for share in SHARES]
    norms[1] = f32(norms[1] * (9.0 if step % 23 == 22 else 1.0))
    norms[2] = 0.0 if step % 7 == 3 else norms[2]
    norms[3] = 0.0 if step < 50 else norms[3]
    if not math.isfinite(total):
        norms[0] = total
    return norms


def fp64(value: float | Sequence[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def seen(
    step: int, total: float, loss: float | None = None, order: Sequence[int] = (0, 1, 2, 3)
) -> StepStatistics:
    """One step of the series; `order` is the order in which a topology has its parameters."""
    norms = parameter_norms(step, total)
    return StepStatistics.of(
        fp64(total),
        loss=None if loss is None else fp64(loss),
        parameter_norms=fp64([norms[i] for i in order]),
        numels=fp64([float(NUMELS[i]) for i in order]),
        unit_norms=fp64([total, 0.0, 0.02, 3.0]),
        unit_weight_norms=fp64([5.0, 1.0, 0.0, 400.0]),
    )


def play(policy: Policy, series: Iterable[float] = NORMS, first: int = 0, **more: Any) -> list[Decision]:
    return [policy.decide(seen(first + i, total, **more)) for i, total in enumerate(series)]


def through_json(policy: Policy) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps(policy.state_dict()))
    return state


def plain(decision: Decision) -> dict[str, Any]:
    """A decision as numbers, NaN as a string so that it equals itself."""
    fields = ("coef", "threshold", "skip", "each")
    found = {name: getattr(decision, name) for name in fields}
    numbers = {name: None if value is None else value.tolist() for name, value in found.items()}
    return json.loads(
        json.dumps(
            {**numbers, "rest": [decision.may_clip, decision.zero_unless is not None, decision.clamp]}
        ),
        parse_constant=str,
    )
