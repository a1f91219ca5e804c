"""Scaling query and key weights of heads whose attention logits are too large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distnorm import kernels
from distnorm.errors import DistnormError, UnsupportedGradientError
from distnorm.plan.collectives import Ranks
from distnorm.sources import Source, shards_of


@dataclass(frozen=True, slots=True)
class QkHeads:
    """The heads of one attention layer.

    Args:
        max_logits: [heads]; each head's largest attention logit in this step, as the softmax gets it; -inf
            for heads that this rank doesn't compute.
        weights: pairs of a weight and the exponent of gamma by which its rows, along dim 0, are multiplied.
            They are divided evenly among the heads, in their order. A DTensor may be sharded in any way.
        groups: how many key heads there are, where several queries share one; default: as many as queries.
            Each group goes by its largest logit, and weights are divided among the groups.
    """

    max_logits: Tensor
    weights: Sequence[tuple[Tensor, float]]
    groups: int | None = None


@torch.no_grad()
def clip_qk_(
    layers: Mapping[str, QkHeads], threshold: float = 100.0, *, group: ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Bound attention logits, after the optimizer's step: QK-Clip of MuonClip.

    With S a head's largest logit over all ranks, ``gamma = min(1, threshold / S)``, and each of its weights'
    rows is multiplied by gamma to its exponent: ``W_q * gamma ** 0.5``, ``W_k * gamma ** 0.5``. Under
    multi-head latent attention the rotary queries, which share no key, take the exponent 1, and the shared
    rotary keys aren't given. A maximum that isn't finite leaves its head alone.

    Collective: every rank of `group` must call it, with the same layers in the same order. All maxima travel
    in one all-reduce, and no device is waited for.

    Args:
        layers: by any name.
        threshold: tau, above 0.
        group: the ranks that hold these layers; default: the whole world.

    Returns:
        For each layer gamma, [groups] fp64, the same on every rank.

    Raises:
        DistnormError: the threshold is not above 0, rows can't be divided among heads, or a weight is flat.

    Example:
        >>> optimizer.step()
        >>> layers = {"0": QkHeads(max_logits, [(wq.weight, 0.5), (wk.weight, 0.5)])}
        >>> distnorm.clip_qk_(layers, threshold=100.0)

    Reference: Kimi Team, "Kimi K2: open agentic intelligence", arXiv 2507.20534; grouped queries as in
        Megatron-LM.
    """
    _check(layers, threshold)
    if not layers:
        return {}
    ranks = Ranks(group)
    local = [heads.max_logits.detach().reshape(-1) for heads in layers.values()]
    device = ranks.reduce_device(local[0].device)
    packed = torch.cat([kernels.moved(one, device, torch.float64) for one in local])
    is_good = packed.isfinite() | (packed == -torch.inf)
    # A maximum may lose a NaN: what isn't finite travels as inf.
    largest = ranks.all_reduce_(torch.where(is_good, packed, torch.inf), "max")
    gammas, tops = {}, torch.split(largest, [len(one) for one in local])
    for (name, heads), top in zip(layers.items(), tops, strict=True):
        top = top.view(heads.groups or len(top), -1).amax(dim=1)
        gammas[name] = gamma = torch.where((top > threshold) & top.isfinite(), threshold / top, 1.0)
        for weight, exponent in heads.weights:
            _scale_rows_(name, weight, gamma**exponent)
    return gammas


def _check(layers: Mapping[str, QkHeads], threshold: float) -> None:
    if not threshold > 0:
        raise DistnormError(f"threshold: expected a number above 0, found {threshold!r}")
    for name, heads in layers.items():
        count = heads.max_logits.numel()
        groups = heads.groups or count
        rows = [weight.shape[0] for weight, _ in heads.weights]
        if count % groups or any(size % groups for size in rows):
            raise DistnormError(
                f"{name}: expected logits and rows that can be divided among {groups} heads, found {count} "
                f"logits, and {rows} rows"
            )


def _scale_rows_(name: str, weight: Tensor, factors: Tensor) -> None:
    (shard,) = shards_of([(name, weight)], Source.TENSOR)
    if not shard.numel:
        return
    if shard.is_flat:
        raise UnsupportedGradientError(
            f"{name}: expected a weight that is cut along its dims, found a run of a flat parameter; shard "
            "with fully_shard (FSDP2)"
        )
    each = torch.repeat_interleave(factors, shard.global_shape[0] // len(factors))
    if shard.numel < shard.global_numel:
        each = each[kernels.moved(shard.indices(0), each.device)]
    local = shard.witness()
    local.mul_(kernels.moved(each, local.device).view(-1, *[1] * (local.dim() - 1)))
