"""What recipes_runs.py's runs share: a recipe's lines, the gradients that steps used, a small model."""

from __future__ import annotations

import re
import runpy
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[1]
MAX_NORM, VOCABULARY, LENGTH = 1.0, 32, 8
Clipped = tuple[list[Tensor], list[Tensor], float]
"""This rank's gradients without clipping and with it, and the norm that the trainer reports."""


def recipe(title: str, **known: Any) -> dict[str, Any]:
    """Run the lines of docs/recipes.md, and return what they define."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    code = re.search(rf"^## {re.escape(title)}\n.*?```python\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert code is not None, title
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.py"
        file.write_text(code[1], encoding="utf-8")
        return runpy.run_path(str(file), known)


steps: list[list[Tensor]] = []
"""The gradients that each step of an optimizer used: whole ones, but parts where an optimizer holds parts."""


def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in found]
    steps.append([g.detach().to(torch.float64, copy=True) for g in whole])


class Tiny(nn.Module):
    """A language model as far as a trainer can see, whose gradients are longer than the limit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        logits = 30 * self.head(self.body(self.embed(input_ids)).tanh())
        if labels is None:
            return logits
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def rows() -> Tensor:
    """Other tokens on each rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(rank))


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Tiny()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.children(), model):
        fully_shard(part, mesh=mesh)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)
