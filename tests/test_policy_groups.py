"""`GradClipper` by its policies and groups: sharded as unsharded, by dense formulas, at one all-reduce."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distnorm
from distnorm.policies import groups as rules
from tests import oracle
from tests.counting import as_on_an_accelerator, collectives_and_reads
from tests.refusals import TIMEOUT, Heard, heard, with_gradient

R = Replicate()
# name -> shape, placements over a 2 x 2 mesh (none: a plain tensor on every rank), and whether its gradient
# arrives partial over the second axis
MODEL: dict[str, tuple[tuple[int, ...], tuple[Any, ...] | None, bool]] = {
    "tok.weight": ((6, 5), (Shard(0), Shard(1)), False),
    "a.weight": ((4, 6), (Shard(1), Shard(0)), False),
    "a.bias": ((5,), (Shard(0), R), False),
    "norm.weight": ((7,), (R, R), True),
    "b.weight": ((3, 4), None, False),
    "b.scale": ((), None, False),
    "z": ((3,), None, False),  # complex
}
ZCLIP = {"name": "zclip", "warmup": 3, "z_t": 0.5, "alpha": 0.5}
ADAGC = {"name": "adagc", "warmup": 2, "beta": 0.5}
SPIKES = {"name": "skip_spikes", "k": 1.0, "window": 4, "after": 2}
POLICIES: dict[str, dict[str, Any]] = {
    "constant": {"max_norm": 2.0},
    "schedule": {"max_norm": 2.0, "policy": {"name": "schedule", "warmup": 3, "warmup_factor": 0.1}},
    "value": {"max_norm": 0.3, "policy": "value"},
    "per_tensor": {"max_norm": 1.5, "policy": "per_tensor"},
    "rms": {"max_norm": 0.5, "policy": {"name": "per_tensor", "rms": True}},
    "agc": {"policy": {"name": "agc", "lambda": 0.5}},
    "percentile": {"policy": {"name": "percentile", "p": 40, "window": 3}},
    "zclip": {"policy": ZCLIP},
    "zclip mean": {"policy": {**ZCLIP, "clip_option": "mean", "skip_update_on_spike": True}},
    "aggc": {"policy": {"name": "aggc", "raise_small": True, "beta": 0.5}},
    "adagc": {"policy": ADAGC},
    "skip_spikes": {"max_norm": 4.0, "policy": SPIKES},
    "loss": {"max_norm": 4.0, "policy": {**SPIKES, "on": "loss"}},
    "groups": {
        "max_norm": 1.0,
        "policy": "per_tensor",
        "groups": [
            {"name": "norms", "params": ["norm.*"], "policy": ZCLIP},
            {"params": ["a.*"], "max_norm": 0.7, "norm": "shared"},
            {"params": ["tok.*"], "policy": {"name": "agc", "lambda": 0.5}},
            {"params": ["*.scale"], "policy": "value", "max_norm": 0.25},
            {"params": ["z"], "policy": ADAGC},
            {"params": ["b.weight"], "policy": {"name": "aggc", "beta": 0.5}},
        ],
    },
}  # fmt: skip
STEPS = 7


def whole(name: str, step: int) -> Tensor:
    """The whole gradient of a parameter; step -1 is the parameter itself."""
    generator = torch.Generator().manual_seed(1000 * list(MODEL).index(name) + step + 1)
    dtype = torch.complex128 if name == "z" else torch.float64
    spread = 1.0 if step < 0 else (1.0, 0.5, 2.0, 0.7, 5.0, 0.9, 1.1)[step]
    return torch.randn(MODEL[name][0], dtype=dtype, generator=generator) * spread


def missing(name: str, step: int) -> bool:
    return name == "b.weight" and step == 1


def parameters(mesh: DeviceMesh | None) -> dict[str, nn.Parameter]:
    made = {}
    for name, (_, placements, _) in MODEL.items():
        tensor = whole(name, -1)
        if mesh is not None and placements is not None:
            tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
        made[name] = nn.Parameter(tensor)
    return made


def set_gradients(made: Mapping[str, nn.Parameter], step: int) -> None:
    for name, parameter in made.items():
        gradient = whole(name, step)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            gradient = distribute_tensor(gradient, mesh, placements, src_data_rank=None)
            if MODEL[name][2]:  # halves add up exactly
                gradient = DTensor.from_local(gradient.to_local() / 2, mesh, (R, Partial()))
        parameter.grad = None if missing(name, step) else gradient


def gathered(parameter: nn.Parameter) -> Any:
    gradient = parameter.grad
    if gradient is None:
        return None
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).numpy().copy()


def play(clip: Mapping[str, Any], order: float = 2.0, sharded: bool = True) -> list[Any]:
    """What each step reported, and the whole gradients after it."""
    made = parameters(init_device_mesh("cpu", (2, 2)) if sharded else None)
    clipper = distnorm.GradClipper(made, {"norm": {"type": order}, "clip": dict(clip)})
    results = []
    for step in range(STEPS):
        set_gradients(made, step)
        if not sharded or dist.get_rank() % 2:  # two ranks have a loss, and it is their mean that counts
            part = 0 if not sharded else dist.get_rank() - 2
            clipper.note(loss=torch.tensor((2.0, 3.0, 2.5, 9.0, 2.0, 2.2, 8.0)[step] + part))
        result = clipper.clip()
        results.append((result.to_dict(), {name: gathered(parameter) for name, parameter in made.items()}))
    return results


def play_all(cases: list[tuple[dict[str, Any], float]]) -> list[Any]:
    return [play(clip, order) for clip, order in cases]


def flat(results: Mapping[str, Any]) -> dict[str, Any]:
    groups = results.get("groups", {})
    rest = {key: value for key, value in results.items() if key != "groups"}
    return {**rest, **{f"{name} {k}": value for name, of in groups.items() for k, value in of.items()}}


@pytest.mark.slow
def test_sharded_is_as_unsharded_for_every_policy(ranks: Any) -> None:
    lean = {key: value for key, value in POLICIES["groups"].items() if key != "groups"}
    no_agc = [group for group in POLICIES["groups"]["groups"] if group["params"] != ["tok.*"]]
    other = [({**lean, "groups": no_agc}, order) for order in (1.0, math.inf)]
    other += [(POLICIES[name], math.inf) for name in ("per_tensor", "loss", "zclip")]
    cases = [(clip, 2.0) for clip in POLICIES.values()] + other
    names = [
        *POLICIES,
        "groups, p = 1",
        "groups, p = inf",
        "per_tensor, p = inf",
        "loss, p = inf",
        "zclip, inf",
    ]
    found = ranks(4, play_all, cases, timeout=240)
    for position, (name, (clip, order)) in enumerate(zip(names, cases, strict=True)):
        expected = play(clip, order, sharded=False)
        for results in (rank[position] for rank in found):
            for (ours, gradients), (theirs, dense) in zip(results, expected, strict=True):
                assert flat(ours) == pytest.approx(flat(theirs), rel=1e-12, nan_ok=True), name
                exactly = [
                    key for key in flat(theirs) if key.endswith(("threshold", "skipped", "was_clipped"))
                ]
                assert [flat(ours)[key] for key in exactly] == [flat(theirs)[key] for key in exactly], name
                for parameter, gradient in gradients.items():
                    if dense[parameter] is None:
                        assert gradient is None
                    else:
                        np.testing.assert_allclose(gradient, dense[parameter], rtol=1e-12, err_msg=name)
                after = oracle.dense([g for g in gradients.values() if g is not None], order)
                if not math.isnan(theirs["clipped_norm"]):
                    assert ours["clipped_norm"] == pytest.approx(after, rel=1e-12), name
        acts = [theirs["skipped"] if name in ("skip_spikes", "loss") else theirs["was_clipped"]
                for theirs, _ in expected]  # fmt: skip
        assert any(acts) != (name == "value"), name


# ---- dense formulas


def dense_clipped(policy: str, name: str, gradient: np.ndarray) -> np.ndarray:
    if policy == "value":
        return np.clip(gradient.real, -0.3, 0.3) + (
            1j * np.clip(gradient.imag, -0.3, 0.3) if name == "z" else 0
        )
    if policy == "per_tensor":
        return gradient * min(1.0, 1.5 / oracle.dense([gradient]))
    weight = whole(name, -1).numpy()
    if weight.ndim < 2:
        return gradient * min(1.0, 0.5 * max(oracle.dense([weight]), 1e-3) / oracle.dense([gradient]))
    rows = zip(gradient, weight, strict=True)
    return np.stack([g * min(1.0, 0.5 * max(oracle.dense([w]), 1e-3) / oracle.dense([g])) for g, w in rows])


@pytest.mark.parametrize("policy", ["value", "per_tensor", "agc"])
def test_gradients_are_what_the_formula_says(policy: str) -> None:
    for step, (results, gradients) in enumerate(play(POLICIES[policy], sharded=False)):
        exact = {n: dense_clipped(policy, n, whole(n, step).numpy()) for n in MODEL if not missing(n, step)}
        for name, gradient in exact.items():
            # Norms of parameters are rounded to fp32 before a coefficient is made of them.
            np.testing.assert_allclose(
                gradients[name], gradient, rtol=1e-13 if policy != "per_tensor" else 6e-8
            )
        assert math.isnan(results["total_norm"]) == (policy == "value")
        assert results["is_finite"] is True and results["skipped"] is False
        if policy != "value":
            assert results["clipped_norm"] == pytest.approx(oracle.dense(exact.values()), rel=6e-8)


def test_groups_have_their_own_norm_or_the_shared_one() -> None:
    made = {
        "a.w": with_gradient(3.0),
        "b.w": with_gradient(4.0),
        "c": with_gradient(12.0),
        "d": with_gradient(5.0),
    }
    groups = [
        {"params": ["a.*"], "max_norm": 1.0},
        {"name": "shared", "params": ["b.*"], "max_norm": 2.0, "norm": "shared"},
    ]
    clipper = distnorm.GradClipper(made, {"clip": {"max_norm": 6.5, "groups": groups}})
    total = math.sqrt(9 + 16 + 144 + 25)
    coefs = {"a.w": 1 / 3, "b.w": 2 / total, "c": 0.5, "d": 0.5}
    measured = clipper.measure()
    assert (float(measured.total_norm), float(measured.groups["a.*"].total_norm)) == pytest.approx(
        (total, 3.0)
    )
    assert float(measured.groups["shared"].threshold) == 2.0 and not measured.groups["shared"].was_clipped
    result = clipper.clip()
    for name, parameter in made.items():
        before = {"a.w": 3.0, "b.w": 4.0, "c": 12.0, "d": 5.0}[name]
        assert float(parameter.grad) == pytest.approx(before * coefs[name], rel=1e-6), name
    assert float(result.clip_coef) == pytest.approx(min(coefs.values()), rel=1e-6)
    after = math.hypot(1.0, 8 / total, 6.5)
    assert (float(result.total_norm), float(result.clipped_norm)) == pytest.approx((total, after), rel=1e-6)
    assert float(result.threshold) == 6.5
    assert result.to_dict()["groups"]["shared"] == pytest.approx(
        {
            "total_norm": 4.0,
            "clip_coef": 2 / total,
            "clipped_norm": 8 / total,
            "threshold": 2.0,
            "was_clipped": True,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize(("nonfinite", "left"), [("skip", [math.inf, 4.0]), ("zero", [0.0, 0.0])])
def test_a_gradient_that_is_not_finite_concerns_all_groups(nonfinite: str, left: list[float]) -> None:
    made = {"a": with_gradient(math.inf), "b": with_gradient(4.0)}
    clip = {
        "nonfinite": nonfinite,
        "max_norm": 1.0,
        "groups": [{"params": ["b"], "max_norm": 1.0, "policy": ZCLIP}],
    }
    clipper = distnorm.GradClipper(made, {"clip": clip})
    result = clipper.clip()
    assert [float(p.grad) for p in made.values()] == left
    assert (bool(result.skipped), bool(result.is_finite)) == (nonfinite == "skip", False)
    assert clipper.state_dict()["groups"]["b"]["steps"] == 0, "no history takes such a step"


def test_a_loss_is_of_one_step_even_if_that_raises() -> None:
    made = with_gradient(math.nan)
    clipper = distnorm.GradClipper([made], {"clip": POLICIES["loss"]})
    clipper.note(loss=1.0)
    with pytest.raises(distnorm.NonFiniteGradientError):
        clipper.clip()
    made.grad = torch.ones(1)
    with pytest.raises(distnorm.DistnormError, match="found none on any rank"):
        clipper.clip()


# ---- mistakes, on every rank alike


def refused(clip: dict[str, Any], order: float = 2.0) -> Heard:
    made = {"a.weight": with_gradient(1.0), "b.weight": with_gradient(1.0)}
    return heard(lambda: distnorm.GradClipper(made, {"norm": {"type": order}, "clip": clip}).clip())


MISTAKES = [
    ({"groups": [{"params": ["a.*", "c.*"]}]}, 2.0, "found 'c.*' of group 'a.*', which match none"),
    (
        {"groups": [{"params": ["a.*"]}, {"name": "all", "params": ["*"]}]},
        2.0,
        "found 'a.weight' in 'a.*' and 'all'",
    ),
    ({"policy": "agc"}, math.inf, "expected norm.type 2 under policy agc, .* found inf"),
    ({"policy": "per_tensor"}, 9.0, "expected an order up to 6.5"),
    ({"policy": {"name": "skip_spikes", "on": "loss"}}, 2.0, r"found none on any rank: call note\(loss"),
]  # fmt: skip


def refused_all() -> list[Heard]:
    return [refused(clip, order) for clip, order, _ in MISTAKES]


@pytest.mark.slow
def test_mistakes_are_refused_on_every_rank(ranks: Any) -> None:
    for said in ranks(2, refused_all, timeout=TIMEOUT):
        for (kind, message), (_, _, fact) in zip(said, MISTAKES, strict=True):
            assert kind in ("ConfigError", "DistnormError") and re.search(
                fact.replace("'c.*'", "'c..'"), message
            )


# ---- what it costs


def costs() -> dict[str, Any]:
    found = {}
    for name, clip in POLICIES.items():
        made = parameters(init_device_mesh("cpu", (2, 1)))
        clipper = distnorm.GradClipper(made, {"clip": {**clip, "nonfinite": "skip"}})
        for step in range(3):  # the first agrees on partial gradients; on a device the first loss is read
            for parameter, name_ in zip(made.values(), made, strict=True):
                gradient = whole(name_, step)
                if isinstance(parameter, DTensor):
                    gradient = distribute_tensor(
                        gradient, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )
                parameter.grad = gradient
            clipper.note(loss=1.0)
            with as_on_an_accelerator() if step else nullcontext():
                seen = collectives_and_reads(clipper.clip) if step > 1 else clipper.clip()
        payload = clipper.rules.payload
        found[name] = (*seen, 0 if payload is None else payload.length)
    return found


@pytest.mark.slow
def test_one_all_reduce_a_step_and_no_host_read(ranks: Any) -> None:
    parameters, units, loss = len(MODEL), 6 + 4 + 1 + 1 + 3 + 1 + 1, 2
    extra = {"per_tensor": parameters, "rms": parameters, "adagc": parameters, "agc": 2 * units, "loss": loss}
    extra["groups"] = parameters + 2 * 6
    for found in ranks(2, costs):
        for name, (collectives, reads, length) in found.items():
            assert collectives == ({} if name == "value" else {"c10d::allreduce_": 1}), name
            assert reads == {}, name
            assert length == extra.get(name, 0), name


def test_total_norm_policies_need_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a table was made")

    monkeypatch.setattr(rules, "make_model_table", refuse)
    for name in ("constant", "schedule", "percentile", "zclip", "skip_spikes", "value"):
        distnorm.GradClipper([with_gradient(1.0)], {"clip": POLICIES[name]}).clip()
    with pytest.raises(AssertionError):
        distnorm.GradClipper([with_gradient(1.0)], {"clip": POLICIES["per_tensor"]})


# ---- state


def test_the_state_is_of_these_policies_and_groups(tmp_path: Path) -> None:
    def clipper(clip: Mapping[str, Any], *names: str) -> distnorm.GradClipper:
        made = {name: with_gradient(3.0, 1.0) for name in names or MODEL}
        return distnorm.GradClipper(made, {"clip": dict(clip)})

    one, other = clipper(POLICIES["groups"]), clipper(POLICIES["groups"])
    for _ in range(4):
        one.clip()
    state = one.state_dict()
    other.load_state_dict(state)
    assert other.state_dict() == state and state["version"] == 2 and state["steps"] == 4
    for wrong, fact in (
        ({**state, "groups": {}}, "expected the states of the groups"),
        ({**state, "policy": {"policy": "zclip"}}, "expected the state of policy per_tensor"),
        (
            {
                **state,
                "groups": {**state["groups"], "z": {"policy": "adagc", "steps": 1, "gamma": {"y": 1.0}}},
            },
            "'y'",
        ),
    ):
        with pytest.raises(distnorm.DistnormError, match=fact):
            other.load_state_dict(wrong)
        assert other.state_dict() == state, "nothing has changed"
    with pytest.raises(distnorm.DistnormError, match="state of policy zclip"):
        clipper(POLICIES["zclip"]).load_state_dict({**state, "groups": {}})
    other.load_state_dict({"version": 1, "steps": 9})
    begun = other.state_dict()
    assert begun["steps"] == 9 and begun["groups"]["norms"]["steps"] == 0
    checkpoint.save({"clipper": one}, checkpoint_id=tmp_path, no_dist=True)
    checkpoint.load({"clipper": other}, checkpoint_id=tmp_path, no_dist=True)
    assert other.state_dict() == one.state_dict()


def test_parameters_that_come_get_their_rule() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = with_gradient(3.0)

    module = Grows()
    clipper = distnorm.GradClipper(module, {"clip": {"max_norm": 1.0, "policy": "per_tensor"}})
    clipper.clip()
    module.b = with_gradient(4.0)
    result = clipper.clip()
    assert (float(module.b.grad), float(result.clipped_norm)) == pytest.approx((1.0, math.sqrt(2)), rel=1e-6)
