"""A tiny Llama, its data, and what one process in fp64 makes of them: the oracle of the Hugging Face tests.

Every step sees the whole data set, so the order in which a trainer draws it is of no consequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distnorm.testing import dense_norm

SAMPLES, LENGTH, VOCABULARY = 8, 8, 64
RATE, MAX_NORM, STEPS = 0.5, 0.5, 3


def llama(**settings: Any) -> nn.Module:
    """The same weights in every process, whatever its rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes(), **settings}))


def qwen() -> nn.Module:
    """A model with norms inside attention, whose weights all heads share."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**sizes(), head_dim=8))


def sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    }


def rows() -> Tensor:
    """[SAMPLES, LENGTH] tokens."""
    return torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def data() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in rows()]


def arguments(folder: str | Path, world: int = 1, accumulation: int = 1, **settings: Any) -> dict[str, Any]:
    """For TrainingArguments: SGD without schedule, every step logged, and nothing saved."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": SAMPLES // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_NORM,
        **settings,
    }


def dense_steps(
    model: nn.Module, steps: int = STEPS, max_norm: float = MAX_NORM
) -> tuple[list[float], dict[str, Tensor]]:
    """Train in fp64 with everything in one process: the norms before clipping, and the weights at the end."""
    model = model.double()
    norms = []
    for _ in range(steps):
        model.zero_grad()
        model(input_ids=rows(), labels=rows()).loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        norms.append(dense_norm({name: p.grad for name, p in trained.items() if p.grad is not None}))
        coefficient = min(1.0, max_norm / (norms[-1] + 1e-6))
        with torch.no_grad():
            for parameter in trained.values():
                assert parameter.grad is not None
                parameter -= RATE * coefficient * parameter.grad
    return norms, {name: p.detach() for name, p in model.named_parameters()}


@functools.cache
def oracle() -> tuple[list[float], dict[str, Tensor]]:
    return dense_steps(llama())


def whole(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole weights by their names in the model, whatever wraps it. Collective for DTensors."""
    found = {}
    for name, parameter in parameters:
        for wrapper in ("module.", "_fsdp_wrapped_module.", "_orig_mod."):
            name = name.replace(wrapper, "")
        full = getattr(parameter, "full_tensor", None)
        found[name] = (parameter if full is None else full()).detach().clone()
    return found


def furthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest distance between two sets of weights, of the same names."""
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - expected[name]).abs().max()) for name in expected)
