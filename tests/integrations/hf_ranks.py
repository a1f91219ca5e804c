"""What the ranks of the Hugging Face tests do."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from distnorm import testing
from tests.integrations import hf

_PRELOADED = (
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.trainer",
    "transformers.distributed.mixin",
    "accelerate",
    "torchdata.stateful_dataloader",
    "peft",
    "deepspeed",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports torch's compiler, as stage 3 does
    "distnorm.integrations.transformers",
    "distnorm.integrations.accelerate",
    "tests.integrations.hf",
    "tests.integrations.hf_ranks",
    "tests.integrations.accelerate_ranks",
)
WRAPPED = ["LlamaDecoderLayer"]
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": WRAPPED}}
NATIVE = {"tp": (2, 1), "fsdp2_by_transformers": (1, 2), "fsdp2_x_tp": (2, 2)}


def preload() -> None:
    """Have the ranks' server import what they need, once; to be called as tests are collected."""
    if importlib.util.find_spec("deepspeed") is not None:
        os.environ["DS_ACCELERATOR"] = "cpu"  # as it is imported
    testing.preload(*(name for name in _PRELOADED if importlib.util.find_spec(name.split(".")[0])))


def prepare() -> None:
    """What a launcher and a user would set, and quiet; nothing in the tests' own process."""
    if not dist.is_initialized():
        return
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500", DS_ACCELERATOR="cpu", DS_BUILD_OPS="0")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def pretend_gpus() -> None:
    """Accelerate refuses FSDP and meshes where it finds CPUs only; it is told otherwise, and stays there."""
    from accelerate import DistributedType, PartialState

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def model_of(topology: str, saved: str) -> nn.Module:
    if topology not in NATIVE:
        return hf.llama()
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    tp, fsdp = NATIVE[topology]
    sizes = DistributedConfig(tp_size=tp, fsdp_size=fsdp)
    model: nn.Module = LlamaForCausalLM.from_pretrained(saved, distributed_config=sizes, dtype=torch.float32)
    return model


def settings_of(topology: str) -> dict[str, Any]:
    if topology == "fsdp2":
        return SHARDED
    if topology.startswith("zero"):
        import deepspeed

        # It would compile its shared-memory collectives for the CPU, and has no switch for it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        stage: dict[str, Any] = {
            "zero_optimization": {"stage": int(topology[-1])},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": "auto",
        }
        return {"deepspeed": {**stage, **dict.fromkeys(auto, "auto")}}
    return {}


def trainer_of(
    topology: str,
    folder: str | Path,
    *,
    saved: str = "",
    config: Any = None,
    model: nn.Module | None = None,
    base: type | None = None,
    accumulation: int = 1,
    callbacks: Any = None,
    **settings: Any,
) -> Any:
    from transformers import Trainer, TrainingArguments

    from distnorm.integrations.transformers import DistnormMixin

    kind = base or type("MyTrainer", (DistnormMixin, Trainer), {})
    tp = NATIVE.get(topology, (1, 1))[0]
    world = (dist.get_world_size() if dist.is_initialized() else 1) // tp
    given = {**settings_of(topology), **settings}
    made = TrainingArguments(**hf.arguments(folder, world, accumulation, **given))
    if topology == "fsdp2" or topology in NATIVE:
        pretend_gpus()
    own = {} if config is None else {"distnorm": config}
    model = model_of(topology, saved) if model is None else model
    return kind(model, made, train_dataset=hf.data(), callbacks=callbacks, **own)


def logged(trainer: Any) -> list[dict[str, float]]:
    """What the Trainer has logged of its steps."""
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def weights(trainer: Any) -> dict[str, Tensor]:
    if not trainer.is_deepspeed_enabled:
        return hf.whole(trainer.model_wrapped.named_parameters())
    import deepspeed

    found = {}
    for name, parameter in trainer.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def trained(
    topology: str, folder: str, saved: str, accumulations: tuple[int, ...]
) -> list[tuple[list[dict[str, float]], dict[str, Tensor]]]:
    """Three steps, each time by a new Trainer."""
    results = []
    for accumulation in accumulations:
        trainer = trainer_of(topology, folder, saved=saved, accumulation=accumulation)
        trainer.train()
        results.append((logged(trainer), weights(trainer)))
    return results


def by_callback(topology: str, folder: str) -> tuple[list[dict[str, float]], dict[str, Tensor], float]:
    from transformers import Trainer

    from distnorm.integrations.transformers import DistnormCallback

    trainer = trainer_of(topology, folder, base=Trainer, callbacks=[DistnormCallback()])
    trainer.train()
    return logged(trainer), weights(trainer), trainer.args.max_grad_norm


def lora() -> nn.Module:
    """The tiny Llama with adapters whose second factors aren't zero."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(hf.llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def trained_lora(folder: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    trainer = trainer_of("ddp", folder, model=lora())
    trainer.train()
    return logged(trainer), weights(trainer)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    return hf.whole((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)


Step = tuple[float, dict[str, Tensor], dict[str, Tensor], float]


def recorded(topology: str, folder: str, model: nn.Module, **settings: Any) -> list[Step]:
    """Each step: the norm logged, the whole gradients before and after clipping, and the coefficient."""
    from transformers import Trainer

    from distnorm.integrations.transformers import DistnormMixin

    seen: list[Step] = []

    class Recording(DistnormMixin, Trainer):
        def _clip_grad_norm(self, model: Any) -> Any:
            before = whole_gradients(model)
            norm = super()._clip_grad_norm(model)
            coefficient = float(self.clipper.last.clip_coef)
            seen.append((float(norm), before, whole_gradients(model), coefficient))
            return norm

    trainer = trainer_of(topology, folder, base=Recording, model=model, **settings)
    trainer.train()
    norms = [torch.tensor(norm).item() for norm, *_ in seen]
    assert [entry["grad_norm"] for entry in logged(trainer)] == norms
    return seen


def trained_in_bf16(folder: str, autocasts: bool) -> list[Step]:
    model = hf.llama() if autocasts else hf.llama().bfloat16()
    return recorded("fsdp2", folder, model, bf16=autocasts)


def trained_with_replicated_norms(folder: str, saved: str, accumulation: int) -> list[Step]:
    """Under tensor parallelism, a model whose heads share the weights of a norm."""
    from transformers import Qwen3ForCausalLM
    from transformers.distributed import DistributedConfig

    sizes = DistributedConfig(tp_size=2)
    model = Qwen3ForCausalLM.from_pretrained(f"{saved}/qwen", distributed_config=sizes, dtype=torch.float32)
    return recorded("tp", folder, model, accumulation=accumulation)


def poison(model: nn.Module, step: int, rank: int = 0) -> None:
    """Make one gradient of one rank's batch infinite in one step, counted from 1."""
    calls = [0]

    def infinite(gradient: Tensor) -> Tensor:
        calls[0] += 1
        here = not dist.is_initialized() or dist.get_rank() == rank
        return gradient.fill_(torch.inf) if calls[0] == step and here else gradient

    [head] = [module for name, module in model.named_modules() if name.endswith("lm_head")]
    head.register_full_backward_pre_hook(lambda _, gradients: tuple(infinite(g.clone()) for g in gradients))


def keeping() -> type:
    """A Trainer that keeps weights and optimizer in memory: a model that transformers has sharded as it was
    loaded has a checkpoint of its weights alone (5.24), and no run goes on from it."""
    from transformers import Trainer

    from distnorm.integrations.transformers import DistnormMixin

    kept: dict[str, Any] = {}

    class Keeping(DistnormMixin, Trainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super()._save_checkpoint(*args, **kwargs)
            parts = {"optimizer": self.optimizer, "schedule": self.lr_scheduler, "model": self.model}
            states = {name: copied(part.state_dict()) for name, part in parts.items()}
            kept[f"{self.args.output_dir}/checkpoint-{self.state.global_step}"] = states

        def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
            self.model.load_state_dict(kept[checkpoint]["model"])

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                self.optimizer.load_state_dict(kept[checkpoint]["optimizer"])
                self.lr_scheduler.load_state_dict(kept[checkpoint]["schedule"])

    return Keeping


def copied(state: Any) -> Any:
    """With tensors of their own, whose storage need not be one that Python can copy."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), state)


HISTORY = {"clip": {"nonfinite": "skip", "policy": {"name": "zclip", "warmup": 2}}}
STEPS = 4


def interrupted(
    topology: str, folder: str, saved: str = "", kind: str = "mixin", restores: bool = False
) -> dict[str, Any]:
    """A run of four steps, the second of which is infinite on the last rank, and one that goes on from its
    checkpoint of the second: what there is after each step, and the clipper's state at the end."""
    from transformers import Trainer, TrainerCallback

    from distnorm.integrations.transformers import DistnormCallback

    seen: list[dict[str, Any]] = []

    class Recording(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"].optimizer
            states = [value for each in optimizer.state.values() for value in each.values()]
            moments = [getattr(value, "full_tensor", value.clone)() for value in states]
            rate = kwargs["lr_scheduler"].get_last_lr()[0]
            seen.append({"weights": weights(trainer), "moments": moments, "rate": rate})

    by_callback = kind == "callback"
    base = Trainer if by_callback else None
    if topology in NATIVE:
        base = keeping()
    found: dict[str, Any] = {}
    for part, checkpoint in (("straight", None), ("resumed", f"{folder}/checkpoint-2")):
        seen = []
        model = model_of(topology, saved)
        if part == "straight":
            poison(model, 2, rank=dist.get_world_size() - 1 if dist.is_initialized() else 0)
        trainer = trainer_of(
            topology,
            folder,
            model=model,
            base=base,
            config=None if by_callback else HISTORY,
            callbacks=[Recording(), *([DistnormCallback(HISTORY)] if by_callback else [])],
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=2,
            save_only_model=topology in NATIVE,
            optim="adamw_torch",
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            restore_callback_states_from_checkpoint=restores,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == STEPS
        if by_callback:
            [callback] = [c for c in trainer.callback_handler.callbacks if isinstance(c, DistnormCallback)]
            state = callback.state()["attributes"]["saved"]
        else:
            state = trainer.clipper.state_dict()
        found[part] = {"steps": seen, "state": state, "log": logged(trainer)}
    return found


def everything(topology: str, folder: str, saved: str) -> dict[str, Any]:
    """All that is asked of a topology: starting ranks costs more than their steps."""
    prepare()
    found: dict[str, Any] = {"trained": trained(topology, f"{folder}/trained", saved, (1, 2))}
    found["interrupted"] = interrupted(topology, f"{folder}/interrupted", saved)
    if topology in ("ddp", "fsdp2"):
        found["callback"] = by_callback(topology, f"{folder}/callback")
    if topology == "ddp":
        found["lora"] = trained_lora(f"{folder}/lora")
    if topology == "fsdp2":
        # Autocast stays in the environment, where transformers looks for it.
        found["bf16"] = [trained_in_bf16(f"{folder}/bf16", autocasts) for autocasts in (False, True)]
    if topology == "tp":
        found["qwen"] = [
            trained_with_replicated_norms(f"{folder}/qwen", saved, accumulation) for accumulation in (1, 2)
        ]
    return found
