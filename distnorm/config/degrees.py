"""Combinations of sizes and degrees that no run can have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distnorm.config.models import TrainConfig


@dataclass(frozen=True, slots=True)
class Conflict:
    """Values that are fine each by itself and impossible together.

    Args:
        keys: the dotted paths of the values, below ``train``, the likeliest culprit first.
        message: what was expected and what was found.
    """

    keys: tuple[str, ...]
    message: str


def conflicts(train: TrainConfig) -> Iterator[Conflict]:
    """Every combination in the trainer's part that can't be run."""
    model, parallel = train.model, train.parallel
    if model.dim % model.heads:
        yield _indivisible("model.dim", model.dim, "model.heads", model.heads)
    if model.heads % parallel.tp:
        yield _indivisible("model.heads", model.heads, "parallel.tp", parallel.tp)
    if parallel.sequence_parallel and model.context % parallel.tp:
        keys = ("parallel.tp", "model.context", "parallel.sequence_parallel")
        under = " under sequence_parallel"
        yield Conflict(keys, _multiple("model.context", model.context, f"parallel.tp = {parallel.tp}{under}"))
    if model.layers < parallel.pp:
        yield Conflict(
            ("parallel.pp", "model.layers"),
            f"expected at most model.layers = {model.layers} stages, found {parallel.pp}",
        )
    else:
        yield from _batch(train)
    yield from _backend(train)


def _backend(train: TrainConfig) -> Iterator[Conflict]:
    parallel = train.parallel
    if parallel.backend != "ddp":
        return
    if parallel.dp_shard > 1:
        yield Conflict(
            ("parallel.dp_shard", "parallel.backend"),
            f"expected dp_shard = 1 under backend ddp, which shards nothing, found {parallel.dp_shard}; "
            "its replicas are dp_replicate",
        )
    if parallel.tp > 1:
        yield Conflict(
            ("parallel.tp", "parallel.backend"),
            f"expected tp = 1 under backend ddp, found {parallel.tp}; "
            "fsdp2 with dp_replicate keeps whole replicas as ddp does",
        )


def _batch(train: TrainConfig) -> Iterator[Conflict]:
    data, parallel = train.data, train.parallel
    factors = {"dp_replicate": parallel.dp_replicate, "dp_shard": parallel.dp_shard}
    microbatch_keys: tuple[str, ...] = ()
    if parallel.pp > 1:
        factors["microbatches"] = parallel.microbatches or 2 * parallel.pp
        microbatch_keys = ("parallel.microbatches", "parallel.pp")
        if factors["microbatches"] < parallel.pp:
            yield Conflict(
                microbatch_keys,
                f"expected at least pp = {parallel.pp} micro-batches, found {parallel.microbatches}",
            )
    divisor = 1
    for factor in factors.values():
        divisor *= factor
    if data.batch_size % divisor:
        product = " * ".join(f"{name} {value}" for name, value in factors.items() if value > 1)
        keys = ("data.batch_size", "parallel.dp_replicate", "parallel.dp_shard", *microbatch_keys)
        yield Conflict(keys, _multiple("data.batch_size", data.batch_size, f"{divisor} ({product})"))


def _indivisible(key: str, value: int, divisor_key: str, divisor: int) -> Conflict:
    return Conflict((divisor_key, key), _multiple(key, value, f"{divisor_key} = {divisor}"))


def _multiple(key: str, value: int, divisor: str) -> str:
    return f"expected {key} to be a multiple of {divisor}, found {value}"
