"""Tokens that ranks send to each other are compared one by one, in any order."""

from __future__ import annotations

import torch

from distnorm.verification.doctor.exchanging import exchange_axes, factor_of_tokens, scaled_tokens
from distnorm.verification.doctor.mistakes import Circumstances, Mistake
from distnorm.verification.doctor.sketch import sketch_rows
from distnorm.verification.doctor.tracing import INPUT, Boundary

EP = Circumstances({"ep": [(0, 1)], "pp": [(0, 2)]})


def sketches(tokens: torch.Tensor) -> torch.Tensor:
    return sketch_rows(tokens, ((0, tokens.shape[1], tokens.shape[1]),))


def test_tokens_are_found_among_the_references_whatever_their_order_and_number() -> None:
    whole = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(0))
    some = whole.flatten(0, 1)[torch.tensor([5, 59, 5, 0, 31])]
    expected = sketches(whole.flatten(0, 1))
    factor = factor_of_tokens(sketches(3 * some), expected, 1e-5)
    assert factor is not None and abs(factor - 3) < 1e-5
    assert factor_of_tokens(sketches(some + 0.5 * torch.ones(16)), expected, 1e-2) is None
    assert (
        factor_of_tokens(sketches(some * torch.tensor([1.0, 1, 1, 1, 2]).view(-1, 1)), expected, 1e-5) is None
    )

    def said(first: torch.Tensor, second: torch.Tensor) -> tuple[Mistake, float | None] | None:
        inner = [(Boundary("experts.0", INPUT), {0: sketches(first), 1: sketches(second)}, whole, 1e-5)]
        found = scaled_tokens(inner, EP)
        return None if found is None else (found.mistake, found.factor and round(found.factor, 4))

    assert said(some, some) is None
    assert said(2 * some, 2 * some[:1]) == (Mistake.SCALED, 2.0)
    assert said(2 * some, some.roll(1, 1)) is None  # strangers: no factor explains them


def test_experts_of_their_own_are_what_ranks_exchange_tokens_for() -> None:
    mine = {0: frozenset({"moe", "moe.0"}), 1: frozenset({"moe", "moe.1"}), 2: frozenset({"moe", "moe.7"})}
    assert exchange_axes("moe", mine, EP) == ("ep",)
    assert exchange_axes("moe.0", mine, EP) == ()
    alike = dict.fromkeys(range(3), frozenset({"mlp", "mlp.up"}))
    assert exchange_axes("mlp", alike, EP) == ()
