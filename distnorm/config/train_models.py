"""The keys of the reference trainer, section by section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distnorm.config.section import Location, PositiveInt, Section


class ModelConfig(Section):
    """The reference trainer's byte-level transformer."""

    dim: PositiveInt = Field(128, description="Width of the residual stream; a multiple of heads.")
    layers: PositiveInt = Field(4, description="Number of blocks; at least parallel.pp.")
    heads: PositiveInt = Field(4, description="Attention heads per block; a multiple of parallel.tp.")
    context: PositiveInt = Field(128, description="Sequence length in bytes.")
    tie_embeddings: bool = Field(True, description="Whether embedding and head are one parameter.")


class DataConfig(Section):
    """What the reference trainer reads."""

    path: Location | None = Field(
        None, description="A text file or folder; null reads the Python standard library's source, as bytes."
    )
    batch_size: PositiveInt = Field(
        16, description="Sequences in one step over all ranks, so it is the same for every topology."
    )


class OptimizerConfig(Section):
    """The reference trainer's optimizer."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="Which of torch's optimizers.")
    lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(3e-3, description="Learning rate.")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(0.0, description="Weight decay.")
    fused: bool = Field(True, description="Whether to use the optimizer's fused kernel, where torch has one.")


class ParallelConfig(Section):
    """The topology; the four degrees multiply to the number of ranks, and any of them may be 1."""

    backend: Literal["fsdp2", "fsdp1", "ddp", "deepspeed"] = Field(
        "fsdp2", description="Who holds and reduces the gradients."
    )
    dp_replicate: PositiveInt = Field(
        1, description="Replicas of the model: DDP's, ZeRO stage 0's, or under fsdp2 and fsdp1 those of HSDP."
    )
    dp_shard: PositiveInt = Field(
        1, description="Ranks over which fsdp2, fsdp1 or ZeRO shards each replica; 1 under ddp."
    )
    tp: PositiveInt = Field(1, description="Ranks over which each layer is split (tensor parallelism).")
    pp: PositiveInt = Field(1, description="Stages into which the layers are cut (pipeline parallelism).")
    sequence_parallel: bool = Field(
        False, description="Whether activations between layers are split along the sequence over the tp axis."
    )
    microbatches: PositiveInt | None = Field(
        None,
        description="Micro-batches of a pipelined step, at least pp; null: 2 * pp. Ignored where pp is 1.",
    )


class DeepSpeedConfig(Section):
    """What backend deepspeed needs beside the rest, from which its own JSON is made."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="What ZeRO shards: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."
    )
    offload: bool = Field(
        False, description="Whether the optimizer and its state are on the CPU; needs zero_stage 1, 2 or 3."
    )
    pipeline: bool = Field(
        False,
        description="Whether a PipelineEngine runs the parallel.pp stages; needs zero_stage 0 or 1.",
    )
    config: Location | None = Field(
        None, description="A JSON file with more of DeepSpeed's keys; what is said here is an error there."
    )


class CheckpointConfig(Section):
    """Where the reference trainer saves and resumes."""

    every: PositiveInt | None = Field(None, description="Steps between checkpoints; null saves none.")
    resume_from: Location | None = Field(None, description="A checkpoint's folder; null starts anew.")
