"""The configuration's keys, their types, their limits and what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from distnorm.config import combinations, degrees
from distnorm.config.clip_models import ClipConfig
from distnorm.config.monitor_models import MonitorConfig
from distnorm.config.section import Conflict, Location, Order, PositiveInt, Section
from distnorm.config.train_models import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from distnorm.config.writing import dump


class NormConfig(Section):
    """The norm that is measured."""

    type: Order = Field(
        2.0, description="The p of the p-norm: any number > 0, or inf for the largest element."
    )


class TrainConfig(Section):
    """The reference trainer's part; the library ignores it."""

    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(
        0, description="Seeds the initial weights and the order of the data, the same for every topology."
    )
    steps: PositiveInt = Field(20, description="Optimizer steps to make.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where there is one, else cpu."
    )
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        "float32", description="Of parameters, gradients and arithmetic; float64 is for proofs."
    )
    timeout: PositiveInt | None = Field(
        None,
        description="Seconds that a rank waits for the others in a collective; null: torch's default, and no "
        "error says which rank did not come.",
    )
    output_dir: Location = Field("runs/run", description="Folder for metrics and resolved config.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="Sizes of the model.")
    data: DataConfig = Field(default_factory=DataConfig, description="What is read.")
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="How weights are updated."
    )
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="How ranks share the work.")
    deepspeed: DeepSpeedConfig = Field(
        default_factory=DeepSpeedConfig, description="Backend deepspeed's own; ignored by the others."
    )
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="What is saved.")

    def conflicts(self) -> Iterator[Conflict]:
        """Sizes and degrees that no run can have."""
        yield from degrees.of_sizes(self.model, self.data, self.parallel)
        yield from degrees.of_backend(self.parallel)
        if self.parallel.backend == "deepspeed":
            yield from degrees.of_deepspeed(self.parallel, self.deepspeed, self.checkpoint, self.dtype)


class Config(Section):
    """The configuration of distnorm: frozen, hashable, and right once it exists."""

    norm: NormConfig = Field(default_factory=NormConfig, description="The norm that is measured.")
    clip: ClipConfig = Field(default_factory=ClipConfig, description="When and how gradients are scaled.")
    monitor: MonitorConfig = Field(
        default_factory=MonitorConfig, description="What is monitored, and where the findings go."
    )
    train: TrainConfig = Field(default_factory=TrainConfig, description="The reference trainer's part.")

    def conflicts(self) -> Iterator[Conflict]:
        """What one section asks for and another can't do."""
        yield from combinations.of_norm(self.norm.type, self.clip, self.monitor)
        yield from combinations.of_apply(self.clip)
        yield from combinations.of_backend(self.train.parallel.backend, self.clip)

    def to_yaml(self) -> str:
        """Every key with the value in force, as YAML that `load_config` reads back to an equal `Config`."""
        return dump(self.model_dump())


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a configuration file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
