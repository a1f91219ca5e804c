"""Every policy decides alike on every topology, in every step, and goes on on another one as if it had not
stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from distnorm import Config

from .tiny import rank_count, rows, shipped, train

RTOL = 1e-9
LICENSE = Path(__file__).parents[2] / "LICENSE"
SMALL = (
    f"train.data.path={LICENSE}",
    "train.model={dim: 16, layers: 2, heads: 4, context: 8, tie_embeddings: true}",
    "train.optimizer.lr=0.02",
)
GROUPS = (
    "clip.groups=[{name: norms, params: ['*norm*'], max_norm: 0.05, policy: {name: zclip, warmup: 3}},"
    " {params: ['blocks.1.mlp.*'], max_norm: 0.2, policy: per_tensor},"
    " {name: ends, params: [tok.weight], max_norm: 0.2, norm: shared}]",
)
POLICIES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "schedule": ("clip.policy={name: schedule, curve: linear,"
                 " points: [{step: 0, factor: 1}, {step: 9, factor: 0.1}]}",),
    "value": ("clip.max_norm=0.001", "clip.policy=value"),
    "per_tensor": ("clip.max_norm=0.05", "clip.policy=per_tensor"),
    "agc": ("clip.max_norm=null", "clip.policy={name: agc, lambda: 0.001}"),
    "percentile": ("clip.max_norm=null", "clip.policy={name: percentile, p: 30, window: 4}"),
    "zclip": ("clip.max_norm=null", "clip.policy={name: zclip, warmup: 2, z_t: 0.2, alpha: 0.5}"),
    "adagc": ("clip.max_norm=null", "clip.policy={name: adagc, warmup: 2, warmup_max_norm: 0.5, beta: 0.5}"),
    "skip_spikes": ("clip.policy={name: skip_spikes, k: 0.2, window: 4, after: 2}",),
    "skip_spikes on loss": ("clip.policy={name: skip_spikes, k: 0.2, window: 4, after: 2, 'on': loss}",
                            "train.optimizer.lr=1"),  # so large that the loss rises
    "groups": GROUPS,
}  # fmt: skip
KEYS = {"step", "loss", "grad_norm", "clip_coef", "clipped_norm", "threshold", "clipped", "finite", "skipped"}
DECIDED = ("threshold", "clipped", "skipped")


STEPS, FEW = "train.steps=5", "train.parallel.microbatches=2"


def train_all(configs: Sequence[Config]) -> None:
    for config in configs:
        assert train(config)[0] == 0


def configured(topology: str, folder: Path, policies: Sequence[str], *overrides: str) -> list[Config]:
    return [shipped(topology, folder / policy, *SMALL, *POLICIES[policy], *overrides) for policy in policies]


def start(ranks: Callable[..., list[Any]], configs: Sequence[Config]) -> None:
    ranks(rank_count(configs[0]), train_all, configs, timeout=240)


@pytest.mark.slow
def test_one_process_and_many_ranks_decide_alike(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    train_all(configured("single", tmp_path / "one", list(POLICIES), STEPS))
    on_eight = ["groups", "zclip", "adagc"]
    start(ranks, configured("pp2_fsdp2_tp2", tmp_path / "many", on_eight, STEPS, FEW))
    start(
        ranks, configured("fsdp2_tp2", tmp_path / "many", [p for p in POLICIES if p not in on_eight], STEPS)
    )
    for policy in POLICIES:
        one, many = (rows(tmp_path / where / policy) for where in ("one", "many"))
        assert len(one) == 5 and all(row.keys() >= KEYS for row in [*one, *many]), policy
        for ours, theirs in zip(many, one, strict=True):
            assert [ours[key] for key in DECIDED] == [theirs[key] for key in DECIDED], (policy, ours, theirs)
            for key in ("loss", "grad_norm", "clip_coef", "clipped_norm"):
                assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=RTOL, nan_ok=True), policy
            assert thresholds(ours) == thresholds(theirs)
        changed = [row["skipped"] if "skip" in policy else row["clipped"] for row in one]
        assert any(changed) != (policy == "value"), f"{policy} that never does anything would test nothing"
    assert rows(tmp_path / "many" / "groups")[0]["groups"].keys() == {"norms", "blocks.1.mlp.*", "ends"}


ALL_AT_ONCE = (
    "train.steps=20",
    "clip.policy={name: percentile, p: 30, window: 6}",
    "clip.groups=[{name: zclip, params: ['*norm*'], policy: {name: zclip, warmup: 2, z_t: 0.2, alpha: 0.5}},"
    " {name: adagc, params: ['*.attn.*'], max_norm: null, policy: {name: adagc, warmup: 12, beta: 0.5}},"
    " {name: spikes, params: ['*.w1.*'], policy: {name: skip_spikes, k: 1.5, window: 8, after: 4}},"
    " {name: schedule, params: ['*.w2.*'], max_norm: 0.2, policy: {name: schedule, warmup: 12,"
    " curve: linear, points: [{step: 2, factor: 1}, {step: 18, factor: 0.1}], warmup_factor: 2}}]",
)


@pytest.mark.slow
def test_another_topology_goes_on_bit_for_bit(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    first = (*SMALL, *ALL_AT_ONCE, "train.steps=10", "train.checkpoint.every=10")
    resume = f"train.checkpoint.resume_from={tmp_path / 'first'}"
    train(shipped("single", tmp_path / "straight", *SMALL, *ALL_AT_ONCE))
    start(ranks, [shipped("fsdp2_tp2", tmp_path / "first", *first)])
    start(ranks, [shipped("pp2_tied", tmp_path / "second", *SMALL, *ALL_AT_ONCE, resume)])
    straight = rows(tmp_path / "straight")
    parted = [*rows(tmp_path / "first"), *rows(tmp_path / "second")]
    assert [row["step"] for row in parted] == list(range(1, 21))
    for ours, theirs in zip(parted, straight, strict=True):
        assert [ours[key] for key in DECIDED] == [theirs[key] for key in DECIDED]
        assert thresholds(ours) == thresholds(theirs)
        for name, group in theirs["groups"].items():
            assert ours["groups"][name]["clip_coef"] == pytest.approx(group["clip_coef"], rel=RTOL)
    coefs = {name: [row["groups"][name]["clip_coef"] for row in straight] for name in straight[0]["groups"]}
    assert all(min(of[10:]) < 1 for name, of in coefs.items() if name != "spikes"), coefs
    assert any(row["skipped"] for row in straight[10:])


def thresholds(row: dict[str, Any]) -> dict[str, float]:
    return {name: group["threshold"] for name, group in row.get("groups", {}).items()}
