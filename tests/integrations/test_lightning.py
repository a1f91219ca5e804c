"""Lightning's Trainer with `DistnormCallback`, against one process in fp64."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from distnorm import ConfigError, NonFiniteGradientError, testing
from distnorm.integrations import lightning as adapter
from distnorm.testing import dense_norm
from tests.integrations import light
from tests.integrations.light import NAMES, Lit, Manual, Watch, fitted
from tests.integrations.tiny import MAX_NORM, MOMENTUM, RATE, STEPS, Net, check_trained, oracle, same, samples

os.environ["DS_ACCELERATOR"] = "cpu"
testing.preload("deepspeed", "lightning.pytorch", "lightning.pytorch.strategies", "tests.integrations.light")

CLIP = {"clip": {"max_norm": MAX_NORM}}
SKIP = {"clip": {"max_norm": MAX_NORM, "nonfinite": "skip"}}
WORLDS = {"ddp": 2, "fsdp1": 2, "fsdp1-orig": 2, "fsdp2": 2, "tp": 2, "fsdp2xtp": 4, "zero2": 2, "zero3": 2}


def check(found: dict[str, Any], tolerance: float = 1e-5, loss_scale: float = 1.0) -> None:
    assert len(found["logged"]) == STEPS and all(sorted(row) == sorted(NAMES) for row in found["logged"])
    check_trained(found["logged"], found["weights"], oracle(loss_scale), tolerance)


HISTORY = {**SKIP["clip"], "policy": {"name": "zclip", "warmup": 2}}


def interrupted(kind: str, folder: str) -> dict[str, Any]:
    """A run of two epochs, whose second step is infinite, and one that goes on from the first's end."""
    config = {"clip": HISTORY, "monitor": {"every": 2}}
    watch = Watch()
    save = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    bad = Lit(sharded="fsdp2" in kind, bad_step=1)
    straight = fitted(kind, config, bad, callbacks=[watch, save], max_epochs=2)
    resumed = fitted(kind, config, ckpt=f"{folder}/epoch=0.ckpt", max_epochs=2)
    return {"watched": watch.weights, "straight": straight, "resumed": resumed}


def everything(kind: str, folder: str) -> dict[str, Any]:
    """All that is asked of a strategy: starting ranks costs more than their steps."""
    found: dict[str, Any] = {"trained": [fitted(kind, CLIP)]}
    found["taken over"] = fitted(kind, None, None, 2, gradient_clip_val=MAX_NORM)
    if kind in ("ddp", "fsdp2xtp"):
        found["trained"].append(fitted(kind, CLIP, Manual(sharded=kind == "fsdp2xtp")))
    if kind != "fsdp1-orig":  # saving its state on the CPU, torch (2.13) reads memory that it has freed
        found["interrupted"] = interrupted(kind, folder)
    if kind == "ddp":
        pairs = [(precision, fused) for precision in ("bf16-mixed", "16-mixed") for fused in (False, True)]
        found["mixed"] = [fit_in(*pair) for pair in pairs]
        found["error"] = error_of(fitted, kind, CLIP, Lit(bad_step=1))
    if kind in ("fsdp1", "tp", "fsdp2xtp"):
        found["error"] = error_of(fit_without_distnorm, kind)
    return found


def error_of(body: Any, *args: Any) -> str:
    """The type of what it raises."""
    try:
        body(*args)
    except Exception as error:
        return type(error).__name__
    return ""


def fit_without_distnorm(kind: str) -> None:
    run = light.trainer(kind, None, gradient_clip_val=MAX_NORM)
    run.fit(Lit(sharded="fsdp2" in kind), light.loader(kind))


@pytest.mark.parametrize("kind", WORLDS)
def test_every_strategy(ranks: Any, kind: str, tmp_path: Path) -> None:
    """Norm, update and log against one process, with one micro-batch a step and with two, by automatic and
    manual optimization, and in mixed precision; Lightning's own limit; skip and resume, bit for bit."""
    for found in ranks(WORLDS[kind], everything, kind, str(tmp_path), timeout=300):
        for each in found["trained"]:
            check(each)
        check_taken_over(kind, found["taken over"])
        if kind != "fsdp1-orig":
            check_interrupted(**found["interrupted"])
        if kind == "ddp":
            assert found["error"] == "NonFiniteGradientError"  # on every rank
            for each in found["mixed"]:
                check_mixed_precision(*each)
        if kind in ("fsdp1", "tp", "fsdp2xtp"):  # else Lightning has learnt it: mend docs/integrations.md
            assert found["error"]


def check_taken_over(kind: str, found: dict[str, Any]) -> None:
    """`gradient_clip_val` is in force, and is put back."""
    # Lightning divides the loss by the number of micro-batches, and DeepSpeed divides it again, with distnorm
    # or without: the gradient that steps is that much smaller.
    check(found, loss_scale=0.5 if kind.startswith("zero") else 1.0)
    assert found["clip_val"] == MAX_NORM
    assert not found["leftover"]


def check_interrupted(watched: Any, straight: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert straight["state"]["clippers"][0]["steps"] == 2 * STEPS
    assert [row["skipped"] for row in straight["logged"] if "skipped" in row] == [0, 1, 0, 0, 0, 0]
    assert same(watched[0], watched[1]) and not same(watched[1], watched[2])
    assert resumed["state"] == straight["state"]
    assert resumed["logged"] == straight["logged"][-len(resumed["logged"]) :]
    assert same(resumed["weights"], straight["weights"])


@pytest.mark.parametrize("settings", [{}, {"fused": True}], ids=["plain", "fused"])
@pytest.mark.parametrize("make", [Lit, Manual])
def test_in_one_process(make: Any, settings: dict[str, Any]) -> None:
    found = fitted("one", CLIP, make(**settings))
    check(found)
    assert not found["leftover"]


def test_skip_and_resume_in_one_process(tmp_path: Path) -> None:
    check_interrupted(**interrupted("one", str(tmp_path)))


# ---- the second clipper


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


def check_mixed_precision(found: dict[str, Any], seen: list[dict[str, Tensor]]) -> None:
    """The norm and the update are those of the gradients that there are; fp32 rounds each step of the update
    at most six times: the norm, the coefficient, the product, momentum's two, and the weight's own."""
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
