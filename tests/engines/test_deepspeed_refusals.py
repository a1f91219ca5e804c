"""What can't be hooked is refused on every rank, by name, and nothing is changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from distnorm import ConfigError, DistnormError, UnsupportedGradientError, load_config
from distnorm.hooks import Handle
from distnorm.hooks.deepspeed import DeepSpeedHook, is_engine
from distnorm.hooks.deepspeed.verdict import Verdict
from distnorm.plan.collectives import Ranks
from distnorm.policies.deciding import Decider
from distnorm.sources import UNDECLARED
from distnorm.step import Step
from tests.engines.rig import make_engine, make_net, use_deepspeed


def attempt(engine: Any, **settings: Any) -> tuple[str, str]:
    before = dict(vars(engine)), dict(vars(engine.optimizer)) if engine.optimizer else {}
    try:
        DeepSpeedHook(engine, {"clip": {"max_norm": 1.0}}, **settings)
    except DistnormError as error:
        after = dict(vars(engine)), dict(vars(engine.optimizer)) if engine.optimizer else {}
        assert [list(one) for one in before] == [list(one) for one in after]
        return type(error).__name__, str(error)
    return "", ""


def one_bit() -> Any:
    engine = make_engine(0)  # before 0.19 DeepSpeed had such an optimizer

    class OnebitAdam(torch.optim.SGD):
        pass

    OnebitAdam.__module__ = "deepspeed.runtime.fp16.onebit.adam"
    OnebitAdam.__qualname__ = "OnebitAdam"
    engine.optimizer.__class__ = OnebitAdam
    return engine


def subclassed() -> Any:
    engine = make_engine(2)
    kind = type(engine.optimizer)
    engine.optimizer.__class__ = type("ZenFlowZeroOptimizer", (kind,), {})
    return engine


def own_clipping() -> Any:
    engine = make_engine(2)
    engine.optimizer.optimizer.param_groups[0]["max_grad_norm"] = 0.5
    return engine


def nvme() -> Any:
    engine = make_engine(3)
    engine.optimizer.swap_optimizer = True
    return engine


def no_optimizer() -> Any:
    deepspeed = use_deepspeed()
    return deepspeed.initialize(
        model=make_net(), config={"train_micro_batch_size_per_gpu": 1}, dist_init_required=False
    )[0]


def other_version() -> Any:
    engine = make_engine(0, "bf16")

    class FP16_UnfusedOptimizer(type(engine.optimizer)):
        def step(self, closure: Any = None) -> None:
            raise AssertionError

    FP16_UnfusedOptimizer.__module__ = "deepspeed.runtime.fp16.unfused_optimizer"
    FP16_UnfusedOptimizer.__qualname__ = "FP16_UnfusedOptimizer"
    engine.optimizer.__class__ = FP16_UnfusedOptimizer
    return engine


def refuse_all() -> dict[str, tuple[str, str]]:
    makers = [one_bit, subclassed, own_clipping, nvme, no_optimizer, other_version]
    found = {make.__name__: attempt(make()) for make in makers}
    engine = make_engine(1)
    assert is_engine(engine) and not is_engine(engine.module)
    DeepSpeedHook(engine, {"clip": {"max_norm": 1.0}})
    found["twice"] = attempt(engine)
    return found


def test_what_cant_be_hooked_is_refused_by_name(engine_ranks):
    expected = {
        "one_bit": (UnsupportedGradientError, "OnebitAdam"),
        "subclassed": (UnsupportedGradientError, "ZenFlowZeroOptimizer"),
        "own_clipping": (ConfigError, "optimizer.params.max_grad_norm"),
        "nvme": (UnsupportedGradientError, "zero_optimization.offload_optimizer.device: nvme"),
        "no_optimizer": (UnsupportedGradientError, "without an optimizer"),
        "other_version": (DistnormError, "get_weight_norm"),
        "twice": (UnsupportedGradientError, "attached to already"),
    }
    for found in engine_ranks(2, refuse_all, timeout=180):
        for name, (kind, words) in expected.items():
            assert found[name][0] == kind.__name__ and words in found[name][1], (name, found[name])


ZERO = {"clip": {"max_norm": 1.0, "nonfinite": "zero"}}
OF_MANY = ("value", "per_tensor", "agc", "adagc")


def refuse_what_engines_leave_no_room_for() -> list[str]:
    engine, found = make_engine(2), []
    groups = {"groups": [{"params": ["*"]}]}
    for clip in ({"apply": "optimizer"}, {"overlap": True}, groups, *({"policy": name} for name in OF_MANY)):
        try:
            DeepSpeedHook(engine, {"clip": clip})
        except ConfigError as error:
            found.append(str(error))
    hook = DeepSpeedHook(engine, {"clip": {"max_norm": 1.0}})
    # Only the engine's own step measures and clips.
    assert not [name for name in ("clip", "decide", "measure") if hasattr(hook.clipper, name)]
    with pytest.raises(
        DistnormError, match=r"paused: expected a torch optimizer's handle, found that of Deep"
    ):
        hook.paused()
    shown = repr(Handle(hook.clipper, hook))
    assert shown.startswith("Handle(DeepSpeedEngine; EngineClipper(") and "max_norm 1.0" in shown, shown
    return found


def test_settings_and_calls_that_are_the_engines_own_are_refused(engine_ranks):
    for found in engine_ranks(2, refuse_what_engines_leave_no_room_for, timeout=240):
        assert "found apply optimizer and overlap false" in found[0] and "overlap true" in found[1]
        assert found[2].startswith("clip.groups: expected none with a DeepSpeed engine")
        for name, message in zip(OF_MANY, found[3:], strict=True):
            assert message.startswith("clip.policy: expected one that goes by") and name in message


def step_without_the_group() -> str:
    engine = make_engine(0)
    DeepSpeedHook(engine, ZERO)
    engine.backward(engine(torch.ones(2, 7)).sum())
    torch.distributed.destroy_process_group()
    with pytest.raises(DistnormError) as caught:
        engine.step()
    return str(caught.value)


def test_a_group_that_was_destroyed_is_refused_with_what_an_engine_can_do(engine_ranks):
    for message in engine_ranks(2, step_without_the_group):
        assert "found that it was destroyed; make the engine anew, attach" in message


def test_gradients_stay_where_ranks_of_a_device_measured_another_set_and_zero_is_asked_for():
    """Nobody has read there that they did, so the total norm is NaN though every gradient is finite."""
    total_norm, agreed = torch.tensor(math.nan, dtype=torch.float64), torch.tensor(False)
    outcome = Decider(Step(load_config(ZERO), Ranks(), UNDECLARED).groups).decide(total_norm, None, agreed)
    assert outcome.decision is not None
    gradient = torch.tensor([8.0, 4.0])
    Verdict(outcome.result, outcome.decision, 4.0, skips=False, error=None).rescale_([gradient])
    assert gradient.tolist() == [2.0, 1.0]


def test_without_deepspeed_nothing_is_an_engine(monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "deepspeed", raising=False)
    assert not is_engine(object())


@pytest.mark.parametrize("module", ["distnorm.hooks.deepspeed", "distnorm.sources.deepspeed"])
def test_deepspeed_is_not_imported_by_us(module):
    import subprocess
    import sys

    code = f"import sys, {module}; print('deepspeed' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240
    )
    assert done.stdout == "False\n"
