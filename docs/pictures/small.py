"""A small language, a small transformer, and a loop that trains it: what most runs of the guide are made of.

In the language each symbol depends on the two before it, so there is something to learn (about 3.5 nats at the start,
1.7 at best) and nothing to download.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SYMBOLS = 32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def language(seed: int = 1) -> Tensor:
    """The chances of the next symbol after each two, of shape (32, 32, 32)."""
    older, newer = torch.tensor([1.2, 2.4])[:, None, None] * torch.randn(
        2, SYMBOLS, SYMBOLS, generator=generator(seed)
    )
    return torch.softmax(older[:, None] + newer[None], -1)


def batches(size: int, length: int = 24, seed: int = 2, chances: Tensor | None = None) -> Iterator[Tensor]:
    """Texts of the language without end, `size` at a time, each of length + 1 symbols."""
    chances, draw = language() if chances is None else chances, generator(seed)
    ends = chances.cumsum(-1)
    while True:
        text = torch.empty(size, length + 1, dtype=torch.long)
        text[:, :2] = torch.randint(SYMBOLS, (size, 2), generator=draw)
        for i in range(2, length + 1):
            chosen = torch.rand(size, 1, generator=draw)
            text[:, i] = torch.searchsorted(ends[text[:, i - 2], text[:, i - 1]], chosen)[:, 0].clamp_(
                max=SYMBOLS - 1
            )
        yield text


class Block(nn.Module):
    """Attention and a two-layer network, each after a LayerNorm and beside a shortcut."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        size, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(size, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(size, length, dim))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(
        self, dim: int = 32, layers: int = 2, heads: int = 2, length: int = 24, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.token, self.place = nn.Embedding(SYMBOLS, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, SYMBOLS, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.5 if name.startswith(("token", "place")) else 0.5 * dim**-0.5)

    def forward(self, text: Tensor) -> Tensor:
        """The mean loss of predicting each symbol from those before it."""
        x = self.token(text[:, :-1]) + self.place.weight[: text.shape[1] - 1]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def total_norm(model: nn.Module) -> float:
    """The global 2-norm of the gradient, in fp64."""
    return math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    )


def scale(model: nn.Module, factor: float) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(factor)


@dataclass
class Trace:
    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)


def train(
    model: nn.Module,
    data: Iterator[Tensor],
    steps: int,
    optimizer: torch.optim.Optimizer,
    lr: Callable[[int], float] | None = None,
    max_norm: float | None = None,
    tamper: Callable[[int], None] | None = None,
) -> Trace:
    """Train, and keep loss and norm before clipping. `tamper` may change gradients before they are measured."""
    trace = Trace()
    for step in range(steps):
        if lr is not None:
            optimizer.param_groups[0]["lr"] = lr(step)
        optimizer.zero_grad()
        loss = model(next(data))
        loss.backward()
        if tamper is not None:
            tamper(step)
        norm = total_norm(model)
        trace.loss.append(loss.item())
        trace.norm.append(norm)
        if max_norm is not None and norm > max_norm:
            scale(model, max_norm / norm)
        optimizer.step()
    return trace


def smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """A running mean with the weight 1 - keep for each new value, corrected at the start."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


def warmup_cosine(peak: float, steps: int, warmup: int, end: float = 0.0) -> Callable[[int], float]:
    """A learning rate that rises for `warmup` steps and falls to `end` along half a cosine."""

    def lr(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return lr
