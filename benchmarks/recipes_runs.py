"""One recipe of docs/recipes.md in its trainer: what benchmarks/recipes.py runs, where that is installed.

    torchrun --nproc-per-node 2 benchmarks/recipes_runs.py verl result.json

Each function trains one step twice from the same weights: without clipping, to see gradients, and with the
recipe. A hook on torch's optimizers sees the gradients that each step uses. With the recipe it is always the
trainer's own function that calls the clip function; docstrings say what of a trainer is passed by.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from recipes_model import LENGTH, MAX_NORM, VOCABULARY, Clipped, Tiny, recipe, record, rows, sharded, steps
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import distnorm


def verl() -> Clipped:
    """`FSDPEngine.optimizer_step`, on an engine made without its constructor, which asks for a GPU."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    def trained(step: Callable[[FSDPEngine], float]) -> float:
        engine = object.__new__(FSDPEngine)
        engine.module, engine.optimizer = sharded()
        engine.optimizer_config = SimpleNamespace(clip_grad=MAX_NORM)
        engine.scaler, engine._qat_enabled = None, False
        engine.module(rows(), rows()).loss.backward()
        return step(engine)

    dist.init_process_group("gloo")
    trained(lambda engine: engine.optimizer.step())  # verl's own function asks for a GPU
    recipe("verl")
    norm = trained(FSDPEngine.optimizer_step)
    return *steps, norm


def torchtune() -> Clipped:
    """`train()` of full_finetune_distributed.py, whose constructor is passed by: it loads a checkpoint."""
    import torchao.quantization

    for name in ("int4_weight_only", "int8_dynamic_activation_int4_weight", "quantize_"):
        vars(torchao.quantization).setdefault(name, None)  # gone from the torchao that this torch can import
    import torchtune.training as training

    file = Path(training.__file__).parents[2] / "recipes" / "full_finetune_distributed.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)  # `tune run` runs the file too
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Loader(list[Any]):
        sampler, state_dict = MagicMock(), MagicMock()

    def trained(limit: float | None) -> dict[str, Any]:
        made, logged = object.__new__(module.FullFinetuneRecipeDistributed), {}
        model, optimizer = sharded()
        vars(made).update(
            {"_model": model, "_optimizer": optimizer, "_optimizer_in_bwd": False, "_lr_scheduler": None},
            _dataloader=Loader([{"input_ids": rows(), "labels": rows()}]),
            _loss_fn=nn.CrossEntropyLoss(),
            _device=torch.device("cpu"),
            _profiler=MagicMock(),
            _checkpoint_client=MagicMock(),
            _metric_logger=SimpleNamespace(log_dict=lambda values, step: logged.update(values)),
            _clip_grad_norm=limit,
            **{"_is_rank_zero": dist.get_rank() == 0, "_steps_per_epoch": 1},
            **{"_gradient_accumulation_steps": 1, "_log_every_n_steps": 1, "_log_peak_memory_stats": False},
            activations_handling_ctx=nullcontext(),
            ignore_labels_cache=torch.full((4, 1), -100),
            profiler_profile_memory=False,
            world_size=dist.get_world_size(),
        )
        vars(made).update(epochs_run=0, total_epochs=1, max_steps_per_epoch=1, global_step=0, seed=0)
        made.train()
        return logged

    dist.init_process_group("gloo")
    for name in ("empty_cache", "reset_peak_memory_stats"):  # torch has them for GPUs alone
        setattr(torch.cpu, name, lambda: None)
    trained(None)
    recipe("slime, torchtune")
    norm = float(trained(MAX_NORM).get("grad_norm", "nan"))  # only rank 0 logs
    return *steps, norm


def axolotl() -> Clipped:
    """axolotl's plugin manager and trainer builder, on one process."""
    from axolotl.core.builders import HFCausalTrainerBuilder
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")),
        pad_token="<pad>",  # noqa: S106
    )
    tokens = rows().tolist()
    data = Dataset.from_dict(
        {"input_ids": tokens, "labels": tokens, "attention_mask": [[1] * LENGTH] * len(tokens)}
    )

    def trained(limit: float) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
        with torch.no_grad():
            model.lm_head.weight.mul_(100)
        cfg = DictDefault(
            {
                "micro_batch_size": 4,
                "batch_size": 4,
                "gradient_accumulation_steps": 1,
                **{"max_steps": 1, "num_epochs": 1},
            },
            learning_rate=0.1,
            optimizer="sgd",
            max_grad_norm=limit,
            logging_steps=1,
            sequence_len=LENGTH,
            output_dir=sys.argv[2] + ".output",
            **{"save_strategy": "no", "val_set_size": 0},
        )
        builder = HFCausalTrainerBuilder(cfg, model, tokenizer)
        builder.train_dataset = data
        trainer = builder.build(1)
        trainer.train()
        return trainer.state.log_history

    trained(0.0)
    PluginManager.get_instance().plugins["distnorm"] = recipe("axolotl")["DistnormPlugin"]()
    (norm, *_) = [row["grad_norm"] for row in trained(MAX_NORM) if "grad_norm" in row]
    return *steps, norm


def veomni() -> Clipped:
    """`BaseTrainer.train_step`, whose constructor is passed by: its communication backend asks for a GPU."""
    recipe("VeOmni")
    from veomni.distributed.parallel_state import init_parallel_state
    from veomni.trainer.base import BaseTrainer

    dist.init_process_group("gloo")
    world = dist.get_world_size()
    init_parallel_state(dp_size=world, dp_shard_size=world, dp_mode="fsdp2", device_type="cpu")
    reported: list[float] = []

    class Trainer(BaseTrainer):
        LOG_SAMPLE = False
        __init__ = on_step_begin = _reset_async_activation_offload_if_enabled = lambda self, **_: None
        sync_before_train_step = model_reshard = _configure_hsdp_allreduce = lambda self, *_: None

        def on_step_end(self, *, grad_norm: float, **_: Any) -> None:
            reported.append(grad_norm)

    def trained() -> None:
        trainer = Trainer()
        trainer.args = SimpleNamespace(
            train=SimpleNamespace(
                optimizer=SimpleNamespace(max_grad_norm=MAX_NORM), enable_batch_invariant_mode=False
            )
        )
        trainer.model, trainer.optimizer = sharded()
        trainer.lr_scheduler, trainer.device = MagicMock(), torch.device("cpu")
        trainer.state = SimpleNamespace(global_step=0)
        trainer.model_fwd_context = trainer.model_bwd_context = nullcontext()
        trainer.train_step(iter([[{"input_ids": rows(), "labels": rows()}]]))

    ours, distnorm.clip_grad_norm_ = distnorm.clip_grad_norm_, lambda *_, **__: torch.tensor(0.0)
    trained()
    distnorm.clip_grad_norm_ = ours
    trained()
    return *steps, reported[-1]


def openrlhf() -> Clipped:
    """`DeepspeedStrategy`'s `prepare`, `backward` and `optimizer_step` under ZeRO 2, with torch's AdamW."""
    import peft  # noqa: F401  transformers then knows that there is no flash_attn

    for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"):
        sys.modules[name] = types.ModuleType(name)  # is built by nvcc; nothing of it is called
    padding = ("index_first_axis", "pad_input", "rearrange", "unpad_input")
    vars(sys.modules["flash_attn.bert_padding"]).update(dict.fromkeys(padding))
    vars(sys.modules["flash_attn.utils.distributed"]).update(all_gather=None)
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled on first use
    from openrlhf.models import Actor
    from openrlhf.utils.deepspeed import DeepspeedStrategy

    class Strategy(DeepspeedStrategy):
        def get_ds_train_config(self, optim_dict: dict[str, Any], *, max_norm: float) -> dict[str, Any]:
            optim_dict["params"]["torch_adam"] = True  # in place of one that is compiled on first use
            config = super().get_ds_train_config(optim_dict, max_norm=max_norm)
            config["zero_optimization"]["reduce_bucket_size"] = 10**6  # "auto" is for transformers' models
            return config

    dist.init_process_group("gloo")
    world = dist.get_world_size()

    def trained(limit: float, after: Callable[[Any], None]) -> float:
        ds = SimpleNamespace(param_dtype="fp32", zpg=1)
        args = SimpleNamespace(ds=ds, train=SimpleNamespace(), optim="adam", local_rank=-1)
        strategy = Strategy(micro_train_batch_size=4, train_batch_size=4 * world, zero_stage=2, args=args)
        adam = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
        settings = {"optim": "adam", "adam": adam, "scheduler_steps": 10, "max_norm": limit}
        actor = Actor(Tiny())
        _, optimizer, schedule = strategy.prepare((actor, settings))
        after(actor)
        strategy.backward(actor.model(rows(), labels=rows()).loss, actor, optimizer)
        strategy.optimizer_step(optimizer, actor, schedule)
        return strategy.get_grad_norm(actor)

    trained(0.0, lambda actor: None)
    handles: list[Any] = []
    trained(MAX_NORM, lambda actor: handles.append(recipe("OpenRLHF", actor=actor)["handle"]))
    half = len(steps) // 2  # DeepSpeed steps each group of parameters by itself
    plain, clipped = ([g for found in part for g in found] for part in (steps[:half], steps[half:]))
    return plain, clipped, float(handles[0].last.total_norm)


def composer() -> Clipped:
    """Composer's `Trainer`."""
    for name in ("nms", "qnms"):  # torchvision, which Composer imports, has these in its CUDA build only
        torch.library.define(
            f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor"
        )
    from composer import ComposerModel, Trainer
    from composer.loggers import InMemoryLogger

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.tiny = Tiny()

        def forward(self, batch: Any) -> Tensor:
            return self.tiny(batch)

        def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
            return nn.functional.cross_entropy(outputs.flatten(0, 1), batch.flatten())

    def trained(*algorithms: Any) -> InMemoryLogger:
        model, logger = Model(), InMemoryLogger()
        Trainer(
            model=model,
            train_dataloader=torch.utils.data.DataLoader(rows(), batch_size=4),
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
            max_duration="1ba",
            device="cpu",
            algorithms=algorithms,
            loggers=logger,
            progress_bar=False,
        ).fit()
        return logger

    dist.init_process_group("gloo")
    trained()
    logged = trained(recipe("Composer")["Clip"]())
    return *steps, float(logged.data["grad_norm"][-1][1])


def main() -> None:
    name, file = sys.argv[1:]
    register_optimizer_step_post_hook(record)
    plain, clipped, norm = globals()[name]()
    summed = torch.stack(
        [sum((g.square().sum() for g in found), torch.zeros(())) for found in (plain, clipped)]
    )
    if name == "openrlhf":  # whose optimizer holds a part on each rank
        dist.all_reduce(summed)
    exact, after = summed.to(torch.float64).sqrt().tolist()
    wanted = MAX_NORM / (exact + 1e-6)
    error = max(
        float((b - wanted * a).abs().max() / b.abs().max()) for a, b in zip(plain, clipped, strict=True)
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        world = dist.get_world_size() if dist.is_initialized() else 1
        found = {"ranks": world, "norm": norm, "exact": exact, "after": after, "error": error}
        Path(file).write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)  # some trainers' threads don't end


if __name__ == "__main__":
    main()
