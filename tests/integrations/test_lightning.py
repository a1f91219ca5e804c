"""Lightning's Trainer with `DistnormCallback`, against one process in fp64."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from distnorm import ConfigError, NonFiniteGradientError, testing
from distnorm.integrations import lightning as adapter
from distnorm.testing import dense_norm
from tests.integrations import light
from tests.integrations.light import NAMES, Lit, Manual, fitted
from tests.integrations.tiny import MAX_NORM, MOMENTUM, RATE, STEPS, Net, oracle, samples

os.environ["DS_ACCELERATOR"] = "cpu"
testing.preload("deepspeed", "lightning.pytorch", "lightning.pytorch.strategies", "tests.integrations.light")

CLIP = {"clip": {"max_norm": MAX_NORM}}
SKIP = {"clip": {"max_norm": MAX_NORM, "nonfinite": "skip"}}
WORLDS = {"ddp": 2, "fsdp1": 2, "fsdp1-orig": 2, "fsdp2": 2, "tp": 2, "fsdp2xtp": 4, "zero2": 2, "zero3": 2}


def check(found: dict[str, Any], tolerance: float = 1e-5, loss_scale: float = 1.0) -> None:
    norms, weights = oracle(loss_scale)
    assert len(found["logged"]) == STEPS
    for row, norm in zip(found["logged"], norms, strict=True):
        assert sorted(row) == sorted(NAMES)
        assert row["grad_norm"] == pytest.approx(norm, rel=tolerance)
        assert row["grad_norm_clipped"] == pytest.approx(min(norm, MAX_NORM), rel=tolerance)
        assert row["clip_coef"] == pytest.approx(min(1.0, MAX_NORM / (norm + 1e-6)), rel=tolerance)
        assert row["clip_threshold"] == pytest.approx(MAX_NORM)
        assert row["skipped"] == 0
    assert found["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found["weights"][name].double(), weight, rtol=tolerance, atol=tolerance)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", WORLDS)
def test_norm_update_and_log_are_those_of_one_process(ranks: Any, kind: str, accumulation: int) -> None:
    # Lightning divides the loss by the number of micro-batches, and DeepSpeed divides it again, with distnorm
    # or without: the gradient that steps is that much smaller.
    loss_scale = 1 / accumulation if kind.startswith("zero") else 1.0
    for found in ranks(WORLDS[kind], fitted, kind, CLIP, None, accumulation):
        check(found, loss_scale=loss_scale)


@pytest.mark.parametrize("settings", [{}, {"fused": True}], ids=["plain", "fused"])
@pytest.mark.parametrize("make", [Lit, Manual])
def test_in_one_process(make: Any, settings: dict[str, Any]) -> None:
    found = fitted("one", CLIP, make(**settings))
    check(found)
    assert not found["leftover"]


def fit_manual(kind: str) -> dict[str, Any]:
    return fitted(kind, CLIP, Manual(sharded=kind == "fsdp2xtp"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2xtp"])
def test_manual_optimization(ranks: Any, kind: str) -> None:
    for found in ranks(WORLDS[kind], fit_manual, kind):
        check(found)


# ---- the second clipper


def fit_with_clip_val(kind: str) -> dict[str, Any]:
    return fitted(kind, None, gradient_clip_val=MAX_NORM)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "tp", "zero2"])
def test_gradient_clip_val_is_taken_over_and_put_back(ranks: Any, kind: str) -> None:
    for found in ranks(WORLDS[kind], fit_with_clip_val, kind):
        check(found)
        assert found["clip_val"] == MAX_NORM
        assert not found["leftover"]


def fit_without_distnorm(kind: str) -> None:
    run = light.trainer(kind, None, gradient_clip_val=MAX_NORM)
    run.fit(Lit(sharded="fsdp2" in kind), light.loader(kind))


@pytest.mark.parametrize("kind", ["fsdp1", "tp", "fsdp2xtp"])
def test_what_lightning_itself_refuses(ranks: Any, kind: str) -> None:
    """If this fails, Lightning has learnt it, and docs/integrations.md says something wrong."""
    assert all(ranks(WORLDS[kind], fit_without_distnorm, kind, expect_errors=True))


def test_another_limit_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"gradient_clip_val: .* clip\.max_norm .* found 1\.0"):
        fitted("one", CLIP, gradient_clip_val=1.0)


def test_clipping_by_value_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"gradient_clip_algorithm: .* clip\.policy"):
        fitted("one", None, gradient_clip_val=1.0, gradient_clip_algorithm="value")


class ClipsItself(Lit):
    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None: ...


class ClipsByHand(Manual):
    def manual_backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        super().manual_backward(loss)
        self.clip_gradients(self.optimizers(), gradient_clip_val=1.0)


@pytest.mark.parametrize(
    ("model", "key"), [(ClipsItself, "configure_gradient_clipping"), (ClipsByHand, "clip_gradients")]
)
def test_a_models_own_clipping_is_refused(model: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: .*"):
        fitted("one", CLIP, model())


# ---- steps that don't happen, or don't count


def fit_skipping(kind: str) -> dict[str, Any]:
    sharded = "fsdp2" in kind
    before = fitted(kind, SKIP, Lit(sharded=sharded), steps=1)
    after = fitted(kind, SKIP, Lit(sharded=sharded, bad_step=1), steps=2)
    return {"before": before["weights"], **after}


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2", "tp", "fsdp2xtp", "zero2", "one"])
def test_skip_leaves_parameters_bit_for_bit(ranks: Any, kind: str) -> None:
    outcomes = [fit_skipping(kind)] if kind == "one" else ranks(WORLDS[kind], fit_skipping, kind)
    for found in outcomes:
        assert same(found["before"], found["weights"])
        assert [row["skipped"] for row in found["logged"]] == [0, 1]


def fit_raising(kind: str) -> None:
    fitted(kind, CLIP, Lit(bad_step=1))


def test_raise_is_an_error_on_every_rank(ranks: Any) -> None:
    failures = ranks(2, fit_raising, "ddp", expect_errors=True)
    assert [failure.type_name for failure in failures] == ["NonFiniteGradientError"] * 2


def test_an_exception_puts_everything_back() -> None:
    callback = adapter.DistnormCallback()
    run = light.trainer("one", callback, gradient_clip_val=MAX_NORM)
    with pytest.raises(NonFiniteGradientError):
        run.fit(Lit(bad_step=1), light.loader("one"))
    assert run.gradient_clip_val == MAX_NORM
    assert "clip_gradients" not in vars(run.precision_plugin)
    assert not callback.handles
    assert callback.state_dict()["clippers"][0]["steps"] == 1


def test_sanity_steps_count_no_step() -> None:
    callback = adapter.DistnormCallback(CLIP)
    run = light.trainer("one", callback, num_sanity_val_steps=2)
    run.fit(Lit(), light.loader("one"), light.loader("one"))
    assert callback.state_dict()["clippers"][0]["steps"] == STEPS


# ---- checkpoints

HISTORY = {"clip": {"policy": {"name": "zclip", "warmup": 2}}, "monitor": {"every": 2}}


def fit_resumed(kind: str, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    sharded, path = "fsdp2" in kind, str(Path(folder) / "saved.ckpt")
    straight = fitted(kind, HISTORY, Lit(sharded=sharded), max_epochs=2)
    fitted(kind, HISTORY, Lit(sharded=sharded), save=path)
    return straight, fitted(kind, HISTORY, Lit(sharded=sharded), ckpt=path, max_epochs=2)


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp1", "fsdp2xtp", "zero2"])
def test_resume_restores_histories_bit_for_bit(ranks: Any, kind: str, tmp_path: Path) -> None:
    both = fit_resumed(kind, str(tmp_path)) if kind == "one" else None
    for straight, resumed in [both] if both else ranks(WORLDS[kind], fit_resumed, kind, str(tmp_path)):
        assert straight["state"]["clippers"][0]["steps"] == 2 * STEPS
        assert resumed["state"] == straight["state"]
        assert resumed["logged"] == straight["logged"][-len(resumed["logged"]) :]
        assert same(resumed["weights"], straight["weights"])


# ---- precision


class Seeing(Lit):
    """Keeps the gradients that the optimizer is about to get, without the loss's scale."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None and self.fused else 1.0  # a power of two
        self.seen.append(
            {name: p.grad / scale for name, p in self.net.named_parameters() if p.grad is not None}
        )


def fit_in(precision: str, fused: bool) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    model, settings = Seeing(fused=fused), {}
    if precision == "16-mixed":
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**10))]
    else:
        settings["precision"] = precision
    return fitted("ddp", CLIP, model, **settings), model.seen


def trained_by(gradients: list[dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The weights that clipping these and SGD give in fp64, and the magnitudes that are added up for them."""
    weights = {name: (p.detach().double(), p.detach().double().abs()) for name, p in Net().named_parameters()}
    velocity = {name: torch.zeros_like(w) for name, (w, _) in weights.items()}
    for each in gradients:
        coefficient = min(1.0, MAX_NORM / (dense_norm(each) + 1e-6))
        for name, (weight, magnitude) in weights.items():
            velocity[name] = MOMENTUM * velocity[name] + coefficient * each[name].double()
            change = RATE * velocity[name]
            weights[name] = weight - change, magnitude + change.abs()
    return weights


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(ranks: Any, precision: str, fused: bool) -> None:
    """The norm and the update are those of the gradients that there are; fp32 rounds each step of the update
    at most six times: the norm, the coefficient, the product, momentum's two, and the weight's own."""
    for found, seen in ranks(2, fit_in, precision, fused):
        norms = [dense_norm(each) for each in seen]
        assert [row["grad_norm"] for row in found["logged"]] == pytest.approx(norms, rel=1e-6)
        assert norms == pytest.approx(oracle()[0], rel=0.5)  # without the loss's scale
        assert [row["grad_norm_clipped"] for row in found["logged"]] == [
            pytest.approx(min(norm, MAX_NORM), rel=1e-5) for norm in norms
        ]
        for name, (weight, magnitude) in trained_by(seen).items():
            rounding = 6 * STEPS * torch.finfo(torch.float32).eps * magnitude
            assert bool(((found["weights"][name].double() - weight).abs() <= rounding).all()), name


# ---- the log


def test_several_optimizers_clip_their_own_parameters() -> None:
    class Two(Manual):
        def configure_optimizers(self) -> Any:
            parts = [[*self.net.norm.parameters(), *self.net.up.parameters()], self.net.down.parameters()]
            return [torch.optim.SGD(part, 0.1) for part in parts], []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            first, second = self.optimizers()
            self.zero_grad()
            self.manual_backward(self.loss(batch))
            first.step()
            second.step()

    net, (x, y) = Net().double(), samples()
    (net(x[:8].double()) - y[:8].double()).square().mean().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    expected = [
        dense_norm({n: g for n, g in grads.items() if ("down" in n) == last}) for last in (False, True)
    ]
    row = fitted("one", CLIP, Two())["logged"][0]
    assert sorted(row) == sorted(f"{name}/{number}" for name in NAMES for number in (0, 1))
    assert [row["grad_norm/0"], row["grad_norm/1"]] == pytest.approx(expected, rel=1e-5)


def test_nothing_is_read_on_steps_that_log_nothing() -> None:
    with mock.patch.object(adapter, "log_values", wraps=adapter.log_values) as values:
        found = fitted("one", CLIP, log_every_n_steps=2, steps=5)
    assert values.call_count == len(found["logged"]) == 2


def test_layer_norms_of_monitored_steps_are_logged() -> None:
    rows = fitted("one", {**CLIP, "monitor": {"every": 2}})["logged"]
    layers = [row for row in rows if any("/" in name for name in row)]
    assert len(rows) == STEPS + 1 and len(layers) == 1
    total = sum(value**2 for value in layers[0].values()) ** 0.5
    assert total == pytest.approx(oracle()[0][1], rel=1e-5)
