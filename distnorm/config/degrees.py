"""Sizes and degrees that no run can have together."""

from __future__ import annotations

from collections.abc import Iterator

from distnorm.config.section import Conflict
from distnorm.config.train_models import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    ModelConfig,
    ParallelConfig,
)


def of_sizes(model: ModelConfig, data: DataConfig, parallel: ParallelConfig) -> Iterator[Conflict]:
    """Sizes of the model and of the batch that the degrees don't divide."""
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
        yield from _batch(data, parallel)


def of_backend(parallel: ParallelConfig) -> Iterator[Conflict]:
    """Degrees that a backend doesn't have."""
    if parallel.backend == "ddp":
        if parallel.dp_shard > 1:
            yield Conflict(
                ("parallel.dp_shard", "parallel.backend"),
                f"expected dp_shard = 1 under backend ddp, which shards nothing, found {parallel.dp_shard}; "
                "its replicas are dp_replicate",
            )
        if parallel.tp > 1:
            yield _needs_one(
                "tp", parallel.tp, "ddp", "fsdp2 with dp_replicate keeps whole replicas as ddp does"
            )
    if parallel.backend in ("fsdp1", "deepspeed") and parallel.tp > 1:
        yield _needs_one("tp", parallel.tp, parallel.backend, "the trainer has tensor parallelism with fsdp2")
    if parallel.backend == "fsdp1" and parallel.pp > 1:
        yield _needs_one("pp", parallel.pp, "fsdp1", "pipelines go with fsdp2, ddp and deepspeed")


def of_deepspeed(
    parallel: ParallelConfig, deepspeed: DeepSpeedConfig, checkpoint: CheckpointConfig, dtype: str
) -> Iterator[Conflict]:
    """What backend deepspeed doesn't do."""
    stage, zero = deepspeed.zero_stage, f"deepspeed.zero_stage = {deepspeed.zero_stage}"
    if stage == 0 and parallel.dp_shard > 1:
        yield Conflict(
            ("parallel.dp_shard", "deepspeed.zero_stage"),
            f"expected dp_shard = 1 under {zero}, which shards nothing, found {parallel.dp_shard}; "
            "its replicas are dp_replicate",
        )
    if stage > 0 and parallel.dp_replicate > 1:
        yield Conflict(
            ("parallel.dp_replicate", "deepspeed.zero_stage"),
            f"expected dp_replicate = 1 under {zero}, found {parallel.dp_replicate}; its ranks are dp_shard",
        )
    if parallel.pp > 1 and not deepspeed.pipeline:
        yield Conflict(
            ("deepspeed.pipeline", "parallel.pp"),
            f"expected pipeline = true under backend deepspeed with pp = {parallel.pp}, found false",
        )
    if deepspeed.pipeline and stage > 1:
        yield Conflict(
            ("deepspeed.zero_stage", "deepspeed.pipeline"),
            f"expected zero_stage 0 or 1 in a pipeline, which DeepSpeed runs with no other, found {stage}",
        )
    if deepspeed.offload and stage == 0:
        yield Conflict(
            ("deepspeed.offload", "deepspeed.zero_stage"),
            f"expected offload = false under {zero}, which leaves the optimizer to torch, found true",
        )
    for key in ("every", "resume_from"):
        if (found := getattr(checkpoint, key)) is not None:
            yield Conflict(
                (f"checkpoint.{key}", "parallel.backend"),
                f"expected {key} = null under backend deepspeed, whose checkpoints are of another kind, "
                f"found {found}",
            )
    if dtype == "float64":
        yield Conflict(
            ("dtype", "parallel.backend"),
            "expected float32 or bfloat16 under backend deepspeed, which reduces no other, found float64",
        )


def _needs_one(degree: str, found: int, backend: str, instead: str) -> Conflict:
    return Conflict(
        (f"parallel.{degree}", "parallel.backend"),
        f"expected {degree} = 1 under backend {backend}, found {found}; {instead}",
    )


def _batch(data: DataConfig, parallel: ParallelConfig) -> Iterator[Conflict]:
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
