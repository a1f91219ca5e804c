"""A small mixture of experts, and policy gradients on a small task: norms where tokens and rewards are few."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from docs.pictures import small
from docs.pictures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, label, panels

EXPERTS = 8


class Switch(nn.Module):
    """A router that sends each token to the expert with the highest probability (Fedus et al. 2021)."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.router = nn.Linear(dim, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim)) for _ in range(EXPERTS)
        )
        self.share = torch.zeros(EXPERTS)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chances = self.router(flat).softmax(-1)
        gate, chosen = chances.max(-1)
        self.share = F.one_hot(chosen, EXPERTS).float().mean(0)
        self.balance = EXPERTS * (self.share * chances.mean(0)).sum()
        result = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                result = result.index_add(0, rows, gate[rows, None] * expert(flat[rows]))
        return x + result.view_as(x)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(51)
        self.older, self.newer = nn.Embedding(small.SYMBOLS, 32), nn.Embedding(small.SYMBOLS, 32)
        self.switch, self.head = Switch(), nn.Linear(32, small.SYMBOLS)

    def forward(self, text: Tensor) -> Tensor:
        x = self.older(text[:, :-2]) + self.newer(text[:, 1:-1])
        x = F.layer_norm(x, (32,))
        return F.cross_entropy(self.head(self.switch(x)).flatten(0, 1), text[:, 2:].flatten())


def moe() -> dict[str, Any]:
    """Each expert's share of the tokens and norm of its gradient, with and without a loss that balances them."""
    result: dict[str, Any] = {}
    for name, weight in (("balanced", 0.02), ("free", 0.0)):
        model, stream = Mixture(), small.batches(16, seed=52)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        shares, norms, totals, dense, idle = [], [], [], [], 0
        for _ in range(250):
            optimizer.zero_grad()
            loss = model(next(stream))
            (loss + weight * model.switch.balance).backward()
            each = [small.total_norm(expert) for expert in model.switch.experts]
            total = small.total_norm(model)
            shares.append(model.switch.share.tolist())
            norms.append(each)
            totals.append(total)
            dense.append(math.sqrt(max(0.0, total**2 - sum(e * e for e in each))))
            idle += sum(e == 0 for e in each)
            optimizer.step()
        late, late_norms = np.array(shares[150:]), np.array(norms[150:])
        result[name] = {
            "share": late.mean(0).tolist(),
            "norm": late_norms.mean(0).tolist(),
            "points": [
                [float(a), float(b)]
                for a, b in zip(late[::10].ravel(), late_norms[::10].ravel(), strict=True)
            ],
            "total": float(np.mean(totals[150:])),
            "experts": float(np.mean(np.sqrt((late_norms**2).sum(1)))),
            "dense": float(np.mean(dense[150:])),
            "idle": idle,
            "idle_share": idle / (250 * EXPERTS),
            "busiest": float(late.mean(0).max()),
            "least": float(late.mean(0).min()),
            "correlation": float(np.corrcoef(late.ravel(), late_norms.ravel())[0, 1]),
        }
    return result


def moe_picture(data: dict) -> Figure:
    figure, axes = panels(1, 2, height=2.9, sharey=True)
    for ax, (name, run), color in zip(axes, data["moe"].items(), (BLUE, ORANGE), strict=True):
        x, y = zip(*run["points"], strict=True)
        ax.scatter([100 * a for a in x], y, s=8, alpha=0.35, color=color, lw=0)
        ax.scatter(
            [100 * a for a in run["share"]], run["norm"], s=46, color=color, edgecolor="#fefefe", zorder=3
        )
        ax.axvline(100 / EXPERTS, color=GREY, ls=":", lw=1.2)
        label(ax, "with a balancing loss" if name == "balanced" else "without", "% of the tokens")
    axes[0].set_ylabel("norm of the expert's gradient")
    return figure


class Policy(nn.Module):
    """Writes 5 of 8 symbols for each of 16 prompts, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(53)
        self.prompt, self.place, self.last = nn.Embedding(16, 32), nn.Embedding(5, 32), nn.Embedding(9, 32)
        self.net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))

    def logits(self, prompt: Tensor, text: Tensor) -> Tensor:
        before = torch.cat([torch.full_like(text[:, :1], 8), text[:, :-1]], 1)
        return self.net(self.prompt(prompt)[:, None] + self.place.weight + self.last(before))

    @torch.no_grad()
    def sample(self, prompt: Tensor, draw: torch.Generator) -> Tensor:
        text = torch.zeros(len(prompt), 5, dtype=torch.long)
        for i in range(5):
            chances = self.logits(prompt, text)[:, i].softmax(-1)
            text[:, i] = torch.multinomial(chances, 1, generator=draw)[:, 0]
        return text


def rl() -> dict[str, Any]:
    """Groups of 8 answers, rewarded by 1 if at least 3 of 5 symbols are right: advantages divided by their spread, or not."""
    answers = torch.randint(8, (16, 5), generator=small.generator(54))
    result: dict[str, Any] = {}
    for name in ("divided", "plain"):
        model, draw = Policy(), small.generator(55)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        rewards, norms, silent, entropies = [], [], [], []
        for _ in range(400):
            prompt = torch.randint(16, (8,), generator=draw).repeat_interleave(8)
            text = model.sample(prompt, draw)
            reward = ((text == answers[prompt]).sum(1) >= 3).float().view(8, 8)
            advantage = reward - reward.mean(1, keepdim=True)
            if name == "divided":
                advantage = advantage / (reward.std(1, keepdim=True) + 1e-4)
            log = model.logits(prompt, text).log_softmax(-1)
            chosen = log.gather(-1, text[..., None])[..., 0]
            optimizer.zero_grad()
            (-(advantage.view(-1, 1) * chosen).mean()).backward()
            norms.append(small.total_norm(model))
            rewards.append(float(reward.mean()))
            silent.append(float((reward.std(1) == 0).float().mean()))
            entropies.append(-(log.exp() * log).sum(-1).mean().item())
            optimizer.step()
        zero = [norm for norm, quiet in zip(norms, silent, strict=True) if quiet == 1]
        result[name] = {
            "reward": small.smooth(rewards, 0.9),
            "norm": norms,
            "silent": small.smooth(silent, 0.9),
            "entropy": entropies,
            "first_reward": sum(rewards[:20]) / 20,
            "last_reward": sum(rewards[-50:]) / 50,
            "peak_norm": max(small.smooth(norms, 0.9)),
            "last_norm": sum(norms[-50:]) / 50,
            "silent_last": sum(silent[-50:]) / 50,
            "silent_first": sum(silent[:20]) / 20,
            "all_silent": len(zero),
            "norm_when_silent": max(zero, default=0.0),
        }
    return result


def rl_picture(data: dict) -> Figure:
    figure, axes = panels(1, 3, width=7.8, height=2.7)
    for (name, run), color in zip(data["rl"].items(), (PURPLE, GREEN), strict=True):
        text = "A / spread" if name == "divided" else "A"
        axes[0].plot(run["reward"], color=color, label=text)
        axes[1].plot(run["norm"], color=color, lw=0.4, alpha=0.35)
        axes[1].plot(small.smooth(run["norm"], 0.9), color=color)
        axes[2].plot([100 * x for x in run["silent"]], color=color)
    label(axes[0], "mean reward", "step", legend=True, ylim=(0, 1.02))
    label(axes[1], "norm of the gradient", "step", ylim=(0, None))
    label(axes[2], "% of groups without signal", "step", ylim=(0, 102))
    return figure


RUNS = {"moe": moe, "rl": rl}
PICTURES = {"moe_experts": moe_picture, "rl_norms": rl_picture}
