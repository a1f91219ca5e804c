"""transformers' Trainer: norm, update and log against one process in fp64, on every topology it has."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import distnorm
from distnorm.testing import dense_norm
from tests.integrations import hf, hf_ranks

hf_ranks.preload()

TIMEOUT = 120.0
pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Llama as a checkpoint."""
    folder = tmp_path_factory.mktemp("llama")
    hf.llama().save_pretrained(folder)
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


@pytest.mark.parametrize(
    ("topology", "world"),
    [("ddp", 1), ("ddp", 2), ("fsdp2", 2), ("tp", 2), ("fsdp2_by_transformers", 2), ("fsdp2_x_tp", 4)],
)
def test_every_topology_is_clipped_as_one_process_would(ranks, tmp_path, saved, topology, world):
    """With one micro-batch a step, and with two."""
    results = ranks(world, hf_ranks.trained, topology, str(tmp_path), saved, (1, 2), timeout=TIMEOUT)
    for of_rank in results:
        for log, found in of_rank:
            check(log, found, *hf.oracle())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeeds_engine_is_clipped_as_one_process_would(ranks, tmp_path, stage):
    """With one micro-batch a step, and with two."""
    body = (hf_ranks.trained, f"zero{stage}", str(tmp_path), "", (1, 2))
    for of_rank in ranks(2, *body, timeout=TIMEOUT):
        for log, found in of_rank:
            check(log, found, *hf.oracle())


def test_without_a_process_group(tmp_path):
    trainer = hf_ranks.trainer_of("plain", tmp_path)
    trainer.train()
    check(hf_ranks.logged(trainer), hf_ranks.weights(trainer), *hf.oracle())


def test_adapters_of_peft(ranks, tmp_path):
    model = hf_ranks.lora()
    norms, true = hf.dense_steps(model)
    assert 0 < sum(p.requires_grad for p in model.parameters()) < len(true)
    for log, found in ranks(2, hf_ranks.trained_lora, str(tmp_path), timeout=TIMEOUT):
        check(log, found, norms, true)


@pytest.mark.parametrize(("autocasts", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_bf16_is_measured_exactly_and_clipped_within_its_rounding(ranks, tmp_path, autocasts, dtype):
    """The norm is that of the gradients as their dtype holds them; a product is rounded once."""
    for of_rank in ranks(2, hf_ranks.trained_in_bf16, str(tmp_path), autocasts, timeout=TIMEOUT):
        assert len(of_rank) == hf.STEPS
        for norm, before, after, coefficient in of_rank:
            assert {g.dtype for g in before.values()} == {dtype}
            assert norm == pytest.approx(dense_norm(before), rel=1e-6)
            assert coefficient == pytest.approx(min(1.0, hf.MAX_NORM / (norm + 1e-6)), rel=1e-6)
            rounding = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps  # and the coefficient's
            for name, gradient in before.items():
                exact = gradient.double() * coefficient
                assert bool(((after[name].double() - exact).abs() <= exact.abs() * rounding).all()), name


def test_under_tensor_parallelism_the_norm_is_that_of_the_gradients_transformers_holds(ranks, tmp_path):
    """With accumulation transformers 5.24 reduces what it has accumulated for such norms again in every
    micro-batch: those gradients aren't those of one process. Their norm is exact all the same."""
    hf.qwen().save_pretrained(tmp_path)
    norms, _ = hf.dense_steps(hf.qwen())
    for accumulation in (1, 2):
        body = (hf_ranks.trained_with_replicated_norms, str(tmp_path), str(tmp_path), accumulation)
        for of_rank in ranks(2, *body, timeout=TIMEOUT):
            found = [norm for norm, *_ in of_rank]
            assert found == [pytest.approx(dense_norm(held), rel=1e-6) for _, held, *_ in of_rank]
            if accumulation == 1:
                assert found == [pytest.approx(norm, rel=1e-5) for norm in norms]


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


@pytest.mark.parametrize(
    ("topology", "world", "by_callback"),
    [
        *[("plain", 0, False), ("plain", 0, True), ("ddp", 2, False), ("fsdp2", 2, False)],
        *[("tp", 2, False), ("fsdp2_x_tp", 4, False)],
    ],
)
def test_a_skipped_step_leaves_everything_bit_for_bit(ranks, tmp_path, saved, topology, world, by_callback):
    config = {"clip": {"nonfinite": "skip"}}
    body = (hf_ranks.skipping, topology, str(tmp_path), config, by_callback, saved)
    runs = ranks(world, *body, timeout=TIMEOUT) if world else [hf_ranks.skipping(*body[1:])]
    for first, second, third in runs:
        assert [step["skipped"] for step in (first, second, third)] == [0.0, 1.0, 0.0]
        assert same(first["weights"], second["weights"])
        assert len(first["moments"]) > 0
        assert all(map(torch.equal, first["moments"], second["moments"]))
        assert first["rate"] == second["rate"] != third["rate"]  # the schedule waits, as after an overflow
        assert not same(second["weights"], third["weights"])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


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


# ---- checkpoints


@pytest.mark.parametrize(
    ("topology", "world", "kind", "restores"),
    [
        ("plain", 0, "mixin", False),
        ("plain", 0, "mixin", True),
        ("plain", 0, "callback", False),
        ("plain", 0, "callback", True),
        ("fsdp2", 2, "mixin", False),
    ],
)
def test_a_resumed_run_has_the_same_histories_bit_for_bit(ranks, tmp_path, topology, world, kind, restores):
    body = (hf_ranks.resumed, topology, str(tmp_path), kind, restores)
    runs = ranks(world, *body, timeout=TIMEOUT) if world else [hf_ranks.resumed(*body[1:])]
    for (state, found), (state_resumed, found_resumed) in runs:
        assert state["steps"] == 4
        assert state == state_resumed
        assert same(found, found_resumed)


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


@pytest.mark.parametrize(("topology", "world"), [("ddp", 2), ("fsdp2", 2)])
def test_the_callback_clips_as_one_process_would(ranks, tmp_path, topology, world):
    for log, found, limit in ranks(world, hf_ranks.by_callback, topology, str(tmp_path), timeout=TIMEOUT):
        check(log, found, *hf.oracle())
        assert limit == hf.MAX_NORM  # as it was


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
