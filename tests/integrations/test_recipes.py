"""docs/recipes.md, and docs/integrations.md on Lightning and torchtitan, run as they stand."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm
from distnorm.testing import dense_norm

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def blocks(document: str) -> dict[str, list[str]]:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    return {title: BLOCK.findall(body) for title, body in SECTION.findall(text)}


RECIPES = blocks("recipes.md")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`modules("a.b.c", name=value)` puts a module where an import finds it."""

    def put(path: str, **contents: Any) -> ModuleType:
        parent, _, name = path.rpartition(".")
        module = ModuleType(path)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, path, module)
        if parent:
            if parent not in sys.modules:
                put(parent)
            monkeypatch.setattr(sys.modules[parent], name, module, raising=False)
        return module

    yield put


def gradients() -> tuple[nn.Module, float]:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    (1e3 * model(torch.randn(4, 8)).square().mean()).backward()
    return model, dense_norm({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def clipped(model: nn.Module) -> float:
    return dense_norm({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def run(title: str, **known: Any) -> dict[str, Any]:
    (code,) = RECIPES[title]
    exec(code, known)
    return known


def theirs(*_: Any, **__: Any) -> float:
    raise AssertionError("the trainer's own function is still called")


def test_every_recipe_is_at_most_six_lines_and_is_tested() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert len(RECIPES) == 9
    for title, (code,) in RECIPES.items():
        assert len([line for line in code.splitlines() if line]) <= 6, title
        assert f'"{title}"' in text, title


def test_verl(modules: Any) -> None:
    seam = modules("verl.workers.engine.fsdp.transformer_impl", fsdp2_clip_grad_norm_=theirs)
    run("verl")
    model, norm = gradients()
    assert seam.fsdp2_clip_grad_norm_(model.parameters(), max_norm=1.0).item() == pytest.approx(norm)
    assert clipped(model) == pytest.approx(1.0, rel=1e-5)


def test_openrlhf(monkeypatch: pytest.MonkeyPatch) -> None:
    """That an engine can be attached to is shown in tests/engines; here, that it is the actor's."""
    seen: list[Any] = []
    monkeypatch.setattr(distnorm, "attach", lambda engine, config: seen.append((engine, config)))
    run("OpenRLHF", actor=SimpleNamespace(model="engine"))
    assert seen == [("engine", {"clip": {"max_norm": 1.0}})]


def test_prime_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchtitan.distributed import utils

    monkeypatch.setattr(utils, "clip_grad_norm_", theirs)
    run("prime-rl")
    copied: dict[str, Any] = {}
    exec("from torchtitan.distributed.utils import clip_grad_norm_", copied)
    model, norm = gradients()
    found: Tensor = copied["clip_grad_norm_"](model.parameters(), max_norm=1.0, ep_enabled=False)
    assert found.item() == pytest.approx(norm)
    assert found.device.type == "cpu"
    assert clipped(model) == pytest.approx(1.0, rel=1e-5)


def test_slime_and_torchtune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", theirs)
    run("slime, torchtune")
    for call in (
        lambda p: nn.utils.clip_grad_norm_(p, 1.0),
        lambda p: nn.utils.clip_grad_norm_(p, max_norm=1.0),
    ):
        model, norm = gradients()
        assert call(model.parameters()).item() == pytest.approx(norm)
        assert clipped(model) == pytest.approx(1.0, rel=1e-5)


def test_nemo_rl(modules: Any) -> None:
    seam = modules("nemo_rl.models.policy.dtensor_policy_worker", get_grad_norm=theirs)
    run("NeMo-RL")
    model, norm = gradients()
    found = seam.get_grad_norm(model.parameters(), dp_cp_group=None, tp_group=None, dtype=torch.float32)
    assert found == pytest.approx(norm)
    assert clipped(model) == norm


def test_axolotl(modules: Any) -> None:
    modules("axolotl.integrations.base", BasePlugin=object)
    modules("distnorm.integrations.transformers", DistnormCallback=lambda: "callback")
    assert run("axolotl")["DistnormPlugin"]().add_callbacks_pre_trainer(None, None) == ["callback"]


def test_veomni(modules: Any) -> None:
    seam = modules("veomni.distributed.clip_grad_norm", veomni_clip_grad_norm=theirs)
    run("VeOmni")
    model, norm = gradients()
    assert seam.veomni_clip_grad_norm(model, 1.0) == pytest.approx(norm)
    assert clipped(model) == pytest.approx(1.0, rel=1e-5)


def test_composer(modules: Any) -> None:
    event = SimpleNamespace(AFTER_TRAIN_BATCH="after_train_batch")
    modules("composer", Algorithm=object, Event=event)
    clip, logged = run("Composer")["Clip"](), {}
    assert clip.match("after_train_batch", None) and not clip.match("batch_end", None)
    model, norm = gradients()
    clip.apply("after_train_batch", SimpleNamespace(model=model), SimpleNamespace(log_metrics=logged.update))
    assert logged["grad_norm"] == pytest.approx(norm)
    assert clipped(model) == pytest.approx(1.0, rel=1e-5)


def train_with_ray(code: str, port: int) -> dict[str, float]:
    """In Ray Train's local mode, where the workers are started by torchrun, or as here."""
    dist.destroy_process_group()  # Ray makes its own
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    known: dict[str, Any] = {}
    exec(code, known)
    trainer = TorchTrainer(known["train_loop_per_worker"], scaling_config=ScalingConfig(num_workers=0))
    result = trainer.fit()
    assert result.error is None
    return result.metrics


def test_ray_train(ranks: Any) -> None:
    """The package itself."""
    (code,) = RECIPES["Ray Train"]
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    first, second = ranks(2, train_with_ray, code, port)
    assert first == second and first["grad_norm"] > 0


# ---- docs/integrations.md


SNIPPETS = {title: found for title, found in blocks("integrations.md").items()}


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightnings_snippet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = SNIPPETS["Lightning"]
    exec(code, {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert all(f"'{name}'" in printed for name in ("grad_norm", "grad_norm_clipped", "clip_coef", "skipped"))


@pytest.mark.filterwarnings("ignore")
def test_fabrics_snippet() -> None:
    (code,) = SNIPPETS["Fabric"]
    known: dict[str, Any] = {"__name__": "__main__"}
    exec(code, known)
    assert known["clipping"].last.total_norm.float() == known["norm"] > 0


def test_torchtitans_snippets(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchtitan.distributed import utils
    from torchtitan.trainer import Trainer

    from tests.integrations.titan import Tiny

    monkeypatch.setattr(utils, "clip_grad_norm_", theirs)
    function, trainer = SNIPPETS["torchtitan"]
    exec(function, {})
    monkeypatch.setattr(Trainer, "__init__", Tiny.__init__)  # a small one
    known: dict[str, Any] = {}
    exec(trainer, known)
    made = known["MyTrainer"]("one")
    assert set(made.checkpointer.states) == {"distnorm"}
