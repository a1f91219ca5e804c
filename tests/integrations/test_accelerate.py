"""Accelerate: its documentation's loop, against one process in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import distnorm
from distnorm.testing import dense_norm
from tests.integrations import accelerate_ranks, hf, hf_ranks

hf_ranks.preload()

TIMEOUT = 300.0
pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    hf.llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def accelerator() -> Any:
    """One without a process group; `Accelerator`s share their state, which is put back."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield accelerate_ranks.accelerator_of("plain")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def clip_with(*args: Any, **kwargs: Any) -> Any:
    from distnorm.integrations.accelerate import clip_with

    return clip_with(*args, **kwargs)


@pytest.mark.parametrize(
    ("topology", "world", "limit", "config"),
    [
        ("ddp", 2, (hf.MAX_NORM,), None),
        ("fsdp2", 2, (hf.MAX_NORM,), {"clip": {"max_norm": hf.MAX_NORM, "nonfinite": "skip"}}),
        ("fsdp2_x_tp", 4, (), {"clip": {"max_norm": hf.MAX_NORM}}),
        ("zero1", 2, (hf.MAX_NORM,), None),
        ("zero2", 2, (), None),
        ("zero3", 2, (), {"clip": {"max_norm": hf.MAX_NORM}}),
    ],
)
def test_every_topology(ranks, tmp_path, saved, topology, world, limit, config):
    """Norm and update against one process, with one micro-batch a step and with two; skip and resume, bit
    for bit."""
    body = (accelerate_ranks.everything, topology, str(tmp_path), saved, limit, config)
    for rank, found in enumerate(ranks(world, *body, timeout=TIMEOUT)):
        for norms, weights, steps in found["trained"]:
            check_trained(norms, weights, steps)
        check_interrupted(found["interrupted"])
        if topology == "ddp":
            check_overflow(found["overflowing"], rank)
        if topology == "zero2":  # DeepSpeed's own limit is taken over, or refused
            assert "gradient_clipping: expected 0, or 0.3" in found["refusal"]


def check_trained(norms: list[list[float]], weights: dict[str, torch.Tensor], steps: int) -> None:
    true_norms, true = hf.oracle()
    last = [of_step[-1] for of_step in norms]
    assert last == [pytest.approx(norm, rel=1e-5) for norm in true_norms]
    assert all(math.isnan(norm) for of_step in norms for norm in of_step[:-1])
    assert hf.furthest(weights, true) < 1e-5
    assert steps == hf.STEPS  # none while gradients are accumulated


def check_interrupted(found: dict[str, Any]) -> None:
    straight, resumed = found["straight"], found["resumed"]
    first, second, third, last = straight["steps"]
    assert [step["skipped"] for step in straight["steps"]] == [False, True, False, False]
    assert [step["result"] for step in straight["steps"]] == [False, True, False, False]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert len(first["moments"]) > 0
    assert all(map(torch.equal, first["moments"], second["moments"]))
    assert first["rate"] == second["rate"] != third["rate"]  # the schedule waits
    assert straight["state"]["steps"] == 4
    assert resumed["state"] == straight["state"]
    resumed_last = resumed["steps"][-1]["weights"]
    assert all(torch.equal(last["weights"][name], resumed_last[name]) for name in last["weights"])


# ---- one clipper


def test_torchs_functions_have_nothing_to_do(accelerator, monkeypatch):
    def second_clipper(*_: Any, **__: Any) -> None:
        raise AssertionError("something else clips, or measures")

    for name in ("clip_grad_norm_", "clip_grads_with_norm_", "get_total_norm"):
        monkeypatch.setattr(torch.nn.utils, name, second_clipper)
    model, optimizer = accelerate_ranks.prepared(accelerator, "plain")
    clipping = clip_with(accelerator, model)
    [norm] = accelerate_ranks.step(accelerator, model, optimizer, 0.25)
    assert float(norm) == pytest.approx(hf.oracle()[0][0], rel=1e-5)
    assert clipping.clipper.config.clip.max_norm == 0.25
    assert float(clipping.last.clipped_norm) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "first", "later", "message"),
    [
        ({"clip": {"max_norm": 0.5}}, (1.0,), (), "max_norm: expected 0, or 0.5 as clip.max_norm says"),
        ({}, (1.0,), (0.5,), "max_norm: expected 0, or 1.0 as clip.max_norm says, found 0.5"),
        ({}, (), (1.0,), "max_norm: expected none, as clip.max_norm was none"),
        ({}, (1.0, math.inf), (), "norm_type: expected none, or 2.0 as norm.type says, found inf"),
    ],
)
def test_another_limit_is_refused_by_its_key(accelerator, config, first, later, message):
    model, optimizer = accelerate_ranks.prepared(accelerator, "plain")
    clip_with(accelerator, model, config)
    with pytest.raises(distnorm.ConfigError, match=message):
        for limit in (first, later):
            accelerate_ranks.step(accelerator, model, optimizer, *limit)


def test_other_models_are_clipped_as_before(accelerator):
    model, optimizer = accelerate_ranks.prepared(accelerator, "plain")
    other, _ = accelerate_ranks.prepared(accelerator, "plain")
    clipping = clip_with(accelerator, model)
    accelerate_ranks.step(accelerator, model, optimizer, 1.0)
    rows = hf.rows()
    accelerator.backward(other(input_ids=rows, labels=rows).loss)
    norm = accelerator.clip_grad_norm_(other.parameters(), 0.25)
    assert float(norm) == pytest.approx(hf.oracle()[0][0], rel=1e-5)
    assert clipping.state_dict()["steps"] == 1
    with pytest.raises(distnorm.DistnormError, match="all parameters of the model that distnorm clips"):
        accelerator.clip_grad_norm_(list(model.parameters())[1:], 1.0)
    with pytest.raises(distnorm.DistnormError, match="found 21 others"):
        accelerator.clip_grad_norm_([*model.parameters(), *other.parameters()], 1.0)


def test_two_models_have_a_clipper_each(accelerator):
    pairs = [accelerate_ranks.prepared(accelerator, "plain") for _ in range(2)]
    clippings = [clip_with(accelerator, model) for model, _ in pairs]
    for (model, optimizer), limit in zip(pairs, (0.25, 0.5), strict=True):
        accelerate_ranks.step(accelerator, model, optimizer, limit)
    assert [clipping.clipper.config.clip.max_norm for clipping in clippings] == [0.25, 0.5]
    assert [clipping.state_dict()["steps"] for clipping in clippings] == [1, 1]


# ---- steps that don't happen


def dense_stages(steps: int) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Both ranks' stages trained in one process in fp64: norms, and weights of each."""
    stages = [accelerate_ranks.stage(rank).double() for rank in range(2)]
    parameters = {name: p for stage in stages for name, p in stage.named_parameters()}
    norms = []
    for _ in range(steps):
        for stage in stages:
            stage.zero_grad()
            accelerate_ranks.loss_of(stage).backward()
        norms.append(dense_norm({name: p.grad for name, p in parameters.items()}))
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= hf.RATE * min(1.0, hf.MAX_NORM / (norms[-1] + 1e-6)) * parameter.grad
    return norms, [{name: p.detach() for name, p in stage.named_parameters()} for stage in stages]


def check_overflow(seen: list[Any], rank: int) -> None:
    """Under a loss scaler all ranks find it."""
    true_norms, true = dense_stages(2)
    first, second, third = seen
    assert [s[2] for s in (first, second, third)] == [False, True, False]
    assert [s[1] for s in (first, second, third)] == [1024.0, 512.0, 512.0]
    assert [first[0], third[0]] == [pytest.approx(norm, rel=1e-5) for norm in true_norms]
    assert not math.isfinite(second[0])
    assert hf.furthest(second[3], first[3]) == 0
    assert hf.furthest(third[3], true[rank]) < 1e-5


def test_a_spike_under_a_loss_scaler_is_skipped_and_keeps_the_scale(accelerator):
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = accelerate_ranks.stage(0)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.1))
    policy = {"name": "skip_spikes", "window": 4, "after": 2}
    clipping = clip_with(accelerator, model, {"clip": {"policy": policy, "nonfinite": "skip"}})
    for factor in (1, 1, 1000):
        optimizer.zero_grad()
        before = hf.whole(model.named_parameters())
        accelerator.backward(accelerate_ranks.loss_of(model) * factor)
        accelerator.clip_grad_norm_(model.parameters())
        optimizer.step()
        skipped = bool(clipping.last.skipped)
        assert skipped is (factor == 1000)
        assert (hf.furthest(hf.whole(model.named_parameters()), before) == 0) is skipped
        assert accelerator.scaler.get_scale() == 1024.0


def test_beside_a_loss_scaler_an_overflow_is_no_error(accelerator):
    accelerator.scaler = torch.amp.GradScaler("cpu")
    model, optimizer = accelerate_ranks.prepared(accelerator, "plain")
    clip_with(accelerator, model)
    with pytest.raises(distnorm.ConfigError, match=r"clip\.nonfinite: expected skip beside a loss scaler"):
        accelerate_ranks.step(accelerator, model, optimizer, 1.0)


# ---- checkpoints


def test_a_helper_that_steps_counts_nothing(accelerator):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = accelerate_ranks.prepared(accelerator, "plain", adam=True)
    clipping = clip_with(accelerator, model, {"clip": {"policy": "zclip"}})
    accelerate_ranks.step(accelerator, model, optimizer, 1.0)
    before = clipping.state_dict()
    optimizer.optimizer.state.clear()
    get_optimizer_state_dict(model, optimizer.optimizer)
    assert clipping.state_dict() == before


def test_an_optimizer_that_is_attached_is_refused(accelerator):
    model, optimizer = accelerate_ranks.prepared(accelerator, "plain")
    clip_with(accelerator, model)
    handle = distnorm.attach(model, optimizer, {"clip": {"max_norm": 1.0}})
    with pytest.raises(distnorm.DistnormError, match="expected an optimizer that nothing is attached to"):
        accelerate_ranks.step(accelerator, model, optimizer, 1.0)
    handle.remove()
