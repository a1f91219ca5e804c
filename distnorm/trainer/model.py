"""A decoder-only byte-level transformer, whole or one pipeline stage of it.

No parameter's gradient is zero by construction: linears have no bias, because a key's would cancel in the
softmax. A stage is the whole model with the other stages' layers taken out, so names stay as they are.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distnorm import Config
from distnorm.trainer.seeds import generator

VOCABULARY = 256
"""A token is a byte."""

TIED_NAMES = ("tok.weight", "head.weight")
"""The two names of the one embedding where `train.model.tie_embeddings` is set."""

# Embeddings start far larger than an optimizer's step: small ones can pass through zero, where the norm after
# them has no bounded gradient, and float32 runs of two topologies would part within a few steps.
_EMBEDDING_STD = 0.7
_LINEAR_STD = 0.04
_ROTARY_BASE = 10000.0


class Attention(nn.Module):
    """Causal self-attention with rotary positions; under tensor parallel it holds some of the heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        mixed = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
        out: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return out


def _rotate(x: Tensor) -> Tensor:
    """Turn each pair of a head's numbers by an angle in proportion to the position."""
    half = x.shape[-1] // 2
    table = _rotation if type(x) is Tensor else _rotation.__wrapped__  # a dry run's is not to be kept
    cos, sin = table(x.shape[-2], half, x.dtype, x.device)
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


@lru_cache(maxsize=8)
def _rotation(length: int, pairs: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    # In fp64, and rounded once: a float32 table would spoil float64 runs.
    powers = torch.arange(pairs, dtype=torch.float64, device=device) / max(pairs, 1)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), _ROTARY_BASE**-powers)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class FeedForward(nn.Module):
    """The layer's two-linear MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, 4 * dim, bias=False)
        self.w2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.gelu(self.w1(x)))
        return out


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Transformer(nn.Module):
    """The model. `tok`, or `norm` and `head`, are `None` on the pipeline stages that hold neither end.

    Args:
        config: `train.model` gives the sizes.
    """

    tok: nn.Embedding | None
    norm: nn.LayerNorm | None
    head: nn.Linear | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.train.model
        self.tok = nn.Embedding(VOCABULARY, model.dim)
        self.blocks = nn.ModuleDict(
            {str(layer): Block(model.dim, model.heads) for layer in range(model.layers)}
        )
        self.norm = nn.LayerNorm(model.dim)
        self.head = nn.Linear(model.dim, VOCABULARY, bias=False)
        self.logit_scale = model.dim**-0.5  # the head is as large as the embedding, which it may be
        self.tie_embeddings = model.tie_embeddings
        self.tie()

    def tie(self) -> None:
        """Make the embedding and the head one parameter, where the config says so and both are here."""
        if self.tie_embeddings and self.tok is not None and self.head is not None:
            self.head.weight = self.tok.weight

    def keep_stage(self, stage: int, stages: int) -> None:
        """Take out every layer that pipeline stage `stage` of `stages` doesn't hold.

        A tied head of the last stage is then a parameter of its own, and the trainer sums the two gradients.
        """
        layers = len(self.blocks)
        mine = range(stage * layers // stages, (stage + 1) * layers // stages)
        for layer in range(layers):
            if layer not in mine:
                del self.blocks[str(layer)]
        if stage > 0:
            self.tok = None
        if stage < stages - 1:
            self.norm = self.head = None

    def forward(self, x: Tensor) -> Tensor:
        """Bytes of shape (batch, context) to logits; between stages, activations of (batch, context, dim)."""
        if self.tok is not None:
            x = self.tok(x)
        for block in self.blocks.values():
            x = block(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x) * self.logit_scale)
        return x


def build_model(config: Config) -> Transformer:
    """Build the whole model on CPU in float64, its weights a function of `train.seed` alone.

    Every topology starts from these values, cast to `train.dtype` and then sharded.
    """
    model = Transformer(config).double()
    dice = generator(config.train.seed, "weights")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                std = _initial_std(name, config.train.model.layers)
                parameter.normal_(0.0, std, generator=dice)
    return model


def parameter_count(config: Config) -> int:
    """Number of elements of the whole model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


def _initial_std(name: str, layers: int) -> float:
    if name in TIED_NAMES:
        return _EMBEDDING_STD
    adds_to_residual = name.endswith(("wo.weight", "w2.weight"))
    return float(_LINEAR_STD / (2 * layers) ** 0.5) if adds_to_residual else _LINEAR_STD


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy over all tokens, in nats; computed in float32 at least."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
