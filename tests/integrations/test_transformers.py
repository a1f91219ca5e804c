"""transformers' Trainer: norm, update and log against one process in fp64, on every topology it has."""

from __future__ import annotations

import functools
import json
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import distnorm
from distnorm.testing import dense_norm
from tests.integrations import hf, hf_ranks
from tests.integrations.tiny import same

hf_ranks.preload()

TIMEOUT = 300.0
pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Llama as a checkpoint, and a tiny Qwen3 in a folder of its own."""
    folder = tmp_path_factory.mktemp("llama")
    hf.llama().save_pretrained(folder)
    hf.qwen().save_pretrained(folder / "qwen")
    return str(folder)


def check(log: list[dict[str, float]], found: dict[str, Tensor], norms: list[float], true: Any) -> None:
    """What was logged, and the weights, against the oracle's."""
    assert len(log) == len(norms)
    for entry, norm in zip(log, norms, strict=True):
        coefficient = min(1.0, hf.MAX_NORM / (norm + 1e-6))
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert entry["clip_coef"] == pytest.approx(coefficient, rel=1e-5)
        assert entry["grad_norm_clipped"] == pytest.approx(norm * coefficient, rel=1e-5)
        assert (entry["clip_threshold"], entry["skipped"]) == (hf.MAX_NORM, 0.0)
    assert hf.furthest(found, true) < 1e-5


WORLDS = {"ddp": 2, "fsdp2": 2, "tp": 2, "fsdp2_by_transformers": 2, "fsdp2_x_tp": 4}
ENGINES = {f"zero{stage}": 2 for stage in range(4)}


@pytest.mark.parametrize(("topology", "world"), [*WORLDS.items(), *ENGINES.items()])
def test_every_topology(ranks, tmp_path, saved, topology, world):
    """Norm, update and log against one process, with one micro-batch a step and with two; skip and resume,
    bit for bit."""
    for found in ranks(world, hf_ranks.everything, topology, str(tmp_path), saved, timeout=TIMEOUT):
        for log, weights in found["trained"]:
            check(log, weights, *hf.oracle())
        check_interrupted(found["interrupted"])
        if topology in ("ddp", "fsdp2"):
            log, weights, limit = found["callback"]
            check(log, weights, *hf.oracle())
            assert limit == hf.MAX_NORM  # as it was
        if topology == "ddp":
            check(*found["lora"], *of_lora())
        if topology == "fsdp2":
            check_bf16(found["bf16"][0], torch.bfloat16)
            check_bf16(found["bf16"][1], torch.float32)  # by autocast
        if topology == "tp":
            check_replicated_norms(*found["qwen"])


def test_one_rank(ranks, tmp_path):
    [found] = ranks(1, hf_ranks.trained, "ddp", str(tmp_path), "", (2,), timeout=TIMEOUT)
    check(*found[0], *hf.oracle())


@functools.cache
def of_lora() -> tuple[list[float], dict[str, Tensor]]:
    model = hf_ranks.lora()
    norms, true = hf.dense_steps(model)
    assert 0 < sum(p.requires_grad for p in model.parameters()) < len(true)
    return norms, true


def check_interrupted(found: dict[str, Any]) -> None:
    straight, resumed = found["straight"], found["resumed"]
    first, second, third, last = straight["steps"]
    assert [entry["skipped"] for entry in straight["log"]] == [0.0, 1.0, 0.0, 0.0]
    assert same(first["weights"], second["weights"])
    assert len(first["moments"]) > 0
    assert all(map(torch.equal, first["moments"], second["moments"]))
    assert first["rate"] == second["rate"] != third["rate"]  # the schedule waits, as after an overflow
    assert not same(second["weights"], third["weights"])
    assert straight["state"]["steps"] == hf_ranks.STEPS
    assert resumed["state"] == straight["state"]
    assert same(resumed["steps"][-1]["weights"], last["weights"])
    assert len(resumed["steps"]) == 2


def check_bf16(steps: list[hf_ranks.Step], dtype: torch.dtype) -> None:
    """The norm is that of the gradients as their dtype holds them; a product is rounded once."""
    assert len(steps) == hf.STEPS
    for norm, before, after, coefficient in steps:
        assert {g.dtype for g in before.values()} == {dtype}
        assert norm == pytest.approx(dense_norm(before), rel=1e-6)
        assert coefficient == pytest.approx(min(1.0, hf.MAX_NORM / (norm + 1e-6)), rel=1e-6)
        rounding = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps  # and the coefficient's
        for name, gradient in before.items():
            exact = gradient.double() * coefficient
            assert bool(((after[name].double() - exact).abs() <= exact.abs() * rounding).all()), name


def check_replicated_norms(one: list[hf_ranks.Step], two: list[hf_ranks.Step]) -> None:
    """With accumulation transformers 5.24 reduces what it has accumulated for such norms again in every
    micro-batch: those gradients aren't those of one process. Their norm is exact all the same."""
    for steps in (one, two):
        norms = [norm for norm, *_ in steps]
        assert norms == [pytest.approx(dense_norm(held), rel=1e-6) for _, held, *_ in steps]
    true_norms, _ = of_qwen()
    assert [norm for norm, *_ in one] == [pytest.approx(norm, rel=1e-5) for norm in true_norms]


@functools.cache
def of_qwen() -> tuple[list[float], dict[str, Tensor]]:
    return hf.dense_steps(hf.qwen())


def test_without_a_process_group(tmp_path):
    trainer = hf_ranks.trainer_of("plain", tmp_path)
    trainer.train()
    check(hf_ranks.logged(trainer), hf_ranks.weights(trainer), *hf.oracle())


# ---- one clipper


@pytest.mark.parametrize(
    ("limit", "config", "in_force"),
    [
        (0.3, None, 0.3),
        (0.3, {"clip": {"nonfinite": "skip"}}, 0.3),
        (0.3, {"clip": {"max_norm": 0.3}}, 0.3),
        (0.0, {"clip": {"max_norm": 0.3}}, 0.3),
        (0.0, None, None),
    ],
)
def test_the_trainers_limit_is_taken_over(tmp_path, monkeypatch, limit, config, in_force):
    def second_clipper(*_: Any, **__: Any) -> None:
        raise AssertionError("something else clips, or measures")

    for name in ("clip_grad_norm_", "clip_grads_with_norm_", "get_total_norm"):
        monkeypatch.setattr(torch.nn.utils, name, second_clipper)
    trainer = hf_ranks.trainer_of("plain", tmp_path, config=config, max_grad_norm=limit, max_steps=1)
    trainer.train()
    [entry] = hf_ranks.logged(trainer)
    assert trainer.clipper.config.clip.max_norm == in_force
    true = hf.oracle()[0][0]
    assert entry["grad_norm"] == pytest.approx(true, rel=1e-5)
    assert entry["grad_norm_clipped"] == pytest.approx(in_force or true, rel=1e-5)


def test_the_trainers_default_limit_is_1(tmp_path):
    trainer = hf_ranks.trainer_of("plain", tmp_path, max_grad_norm=1.0, max_steps=1)
    trainer.train()
    assert trainer.clipper.config.clip.max_norm == 1.0


@pytest.mark.parametrize("clip", [{"max_norm": 0.3}, {"policy": "agc"}])
def test_another_limit_than_the_trainers_is_refused_by_its_key(tmp_path, clip):
    with pytest.raises(
        distnorm.ConfigError, match=r"TrainingArguments\.max_grad_norm: expected 0, or .* 1\.0"
    ):
        hf_ranks.trainer_of("plain", tmp_path, config={"clip": clip}, max_grad_norm=1.0)


def test_the_configuration_may_be_a_field_or_a_class_attribute(tmp_path):
    from transformers import Trainer

    from distnorm.integrations.transformers import DistnormMixin

    class Mine(DistnormMixin, Trainer):
        distnorm: ClassVar = {"norm": {"type": "inf"}}

    trainer = hf_ranks.trainer_of("plain", tmp_path, base=Mine)
    assert trainer._config.norm.type == float("inf")
    trainer.args.distnorm = {"norm": {"type": 3.0}}
    made = Mine(hf.llama(), trainer.args, train_dataset=hf.data())
    assert made._config.norm.type == 3.0


def test_the_trainers_own_clipping_can_not_come_first():
    from transformers import Trainer

    from distnorm.integrations.transformers import DistnormMixin

    with pytest.raises(distnorm.DistnormError, match="DistnormMixin to be named before Trainer"):
        type("Mine", (Trainer, DistnormMixin), {})
    other = type("Other", (DistnormMixin,), {})
    with pytest.raises(distnorm.DistnormError, match="with the method _clip_grad_norm, as version"):
        type("Mine", (other, object), {"__doc__": ""})()


# ---- steps that don't happen


@pytest.mark.parametrize("kind", ["mixin", "callback"])
@pytest.mark.parametrize("restores", [False, True])
def test_skip_and_resume_in_one_process(tmp_path, kind, restores):
    check_interrupted(hf_ranks.interrupted("plain", str(tmp_path), "", kind, restores))


def test_a_spike_is_skipped(tmp_path):
    """The third step's loss is multiplied by 1000, and so is its norm."""
    from transformers import Trainer

    from distnorm.integrations.transformers import DistnormMixin

    class Spiking(DistnormMixin, Trainer):
        before: dict[str, Tensor]

        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, *args, **kwargs)
            if self.state.global_step == 2:
                self.before = hf.whole(model.named_parameters())
            return loss * (1000 if self.state.global_step == 2 else 1)

    config = {"clip": {"policy": {"name": "skip_spikes", "window": 4, "after": 2}}}
    trainer = hf_ranks.trainer_of("plain", tmp_path, base=Spiking, config=config)
    trainer.train()
    assert [entry["skipped"] for entry in hf_ranks.logged(trainer)] == [0.0, 0.0, 1.0]
    assert same(trainer.before, hf_ranks.weights(trainer))


def test_policies_get_the_loss_of_the_whole_step(tmp_path):
    config = {"clip": {"policy": {"name": "skip_spikes", "on": "loss", "window": 4, "after": 4}}}
    trainer = hf_ranks.trainer_of("plain", tmp_path, config=config, accumulation=2)
    trainer.train()
    losses = [entry["loss"] for entry in hf_ranks.logged(trainer)]
    history = numbers(trainer.clipper.state_dict())
    for loss in losses:
        assert any(number == pytest.approx(loss, rel=1e-5) for number in history), (loss, history)


def numbers(state: Any) -> list[float]:
    """All floats in a state."""
    if isinstance(state, dict | list | tuple):
        values = state.values() if isinstance(state, dict) else state
        return [number for value in values for number in numbers(value)]
    return [state] if isinstance(state, float) else []


# ---- the log


def test_steps_that_log_nothing_read_nothing(tmp_path):
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import Trainer

    from distnorm.integrations import transformers as ours

    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_local_scalar_dense" in str(func):
                reads.append(func)
            return func(*args, **(kwargs or {}))

    class Watched(ours.DistnormMixin, Trainer):
        def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
            with Reads():
                norm = super()._get_grad_norm(*args, **kwargs)
            assert isinstance(norm, Tensor)
            return norm

    trainer = hf_ranks.trainer_of("plain", tmp_path, base=Watched, logging_steps=3, max_grad_norm=0.0)
    trainer.train()
    assert reads == []
    [entry] = hf_ranks.logged(trainer)
    assert entry["grad_norm"] == pytest.approx(
        hf.dense_steps(hf.llama(), max_norm=float("inf"))[0][2], rel=1e-5
    )


def test_layers_of_monitored_steps_are_logged(tmp_path):
    config = {"monitor": {"every": 2, "dir": str(tmp_path)}}
    trainer = hf_ranks.trainer_of("plain", tmp_path, config=config, max_steps=2)
    trainer.train()
    first, second = ({k: v for k, v in e.items() if "/" in k} for e in hf_ranks.logged(trainer))
    of_layers = second or first
    assert bool(first) != bool(second)
    model = hf.llama().double()
    norms = hf.oracle()[0]
    squares = sum(value**2 for value in of_layers.values())
    assert squares**0.5 == pytest.approx(norms[1 if second else 0], rel=1e-5)
    assert len(of_layers) > model.config.num_hidden_layers


@pytest.mark.parametrize("kind", ["mixin", "callback"])
def test_the_last_steps_row_is_written(tmp_path, kind):
    from transformers import Trainer

    from distnorm.integrations.transformers import DistnormCallback

    config = {"monitor": {"dir": str(tmp_path)}}
    if kind == "mixin":
        trainer = hf_ranks.trainer_of("plain", tmp_path, config=config)
    else:
        callbacks = [DistnormCallback(config)]
        trainer = hf_ranks.trainer_of("plain", tmp_path, base=Trainer, callbacks=callbacks)
    trainer.train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    norms = [json.loads(line)["grad_norm"] for line in lines]
    assert norms == [pytest.approx(norm, rel=1e-5) for norm in hf.oracle()[0]]


def test_a_helper_that_steps_counts_nothing(tmp_path):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    trainer = hf_ranks.trainer_of(
        "plain", tmp_path, config={"clip": {"policy": "zclip"}}, optim="adamw_torch"
    )
    trainer.train()
    before = trainer.clipper.state_dict()
    trainer.optimizer.optimizer.state.clear()
    get_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer)
    assert trainer.clipper.state_dict() == before
    assert before["steps"] == hf.STEPS


def test_train_may_be_called_again(tmp_path):
    trainer = hf_ranks.trainer_of("plain", tmp_path)
    trainer.train()
    trainer.train()
    assert trainer.clipper.state_dict()["steps"] == hf.STEPS
    assert len(hf_ranks.logged(trainer)) == hf.STEPS


# ---- the callback


def test_the_callback_refuses_another_limit(tmp_path):
    from transformers import Trainer

    from distnorm.integrations.transformers import DistnormCallback

    callbacks = [DistnormCallback({"clip": {"max_norm": 0.3}})]
    trainer = hf_ranks.trainer_of("plain", tmp_path, base=Trainer, callbacks=callbacks)
    with pytest.raises(distnorm.ConfigError, match=r"TrainingArguments\.max_grad_norm: expected 0, or 0\.3"):
        trainer.train()


def test_the_callback_refuses_deepspeed():
    from distnorm.integrations.transformers import DistnormCallback

    optimizer = type("DeepSpeedOptimizerWrapper", (), {})()
    with pytest.raises(distnorm.DistnormError, match="use DistnormMixin"):
        DistnormCallback().on_train_begin(None, None, None, optimizer=optimizer)


# ---- trainers made of it


def test_trls_trainers(tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from distnorm.integrations.transformers import DistnormMixin

    class Mine(DistnormMixin, SFTTrainer):
        pass

    words = Tokenizer(models.WordLevel({str(i): i for i in range(hf.VOCABULARY)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1", pad_token="2")
    settings = hf.arguments(tmp_path, max_length=None, bf16=False, gradient_checkpointing=False)
    samples = Dataset.from_list([{"input_ids": row.tolist()} for row in hf.rows()])
    given = {"train_dataset": samples, "processing_class": tokenizer}
    trainer = Mine(hf.llama(), SFTConfig(**settings), **given, distnorm={"clip": {"nonfinite": "skip"}})
    trainer.train()
    check(hf_ranks.logged(trainer), hf_ranks.weights(trainer), *hf.oracle())
