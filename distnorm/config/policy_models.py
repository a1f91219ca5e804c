"""The policies' keys and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from distnorm.config.section import (
    AS_TUPLE,
    Count,
    Finite,
    Fraction,
    NotNegative,
    Positive,
    PositiveInt,
    Section,
)

# A window is sorted or summed in every step.
Window = Annotated[int, Field(ge=2, le=2**20)]
_NONFINITE = "Norms that are not finite don't count."


class ConstantPolicy(Section):
    """Clip to max_norm."""

    name: Literal["constant"] = Field(description="Clip to max_norm.")


class SchedulePoint(Section):
    """A place on the curve."""

    step: Count = Field(description="The step, counted from 0.")
    factor: NotNegative = Field(description="What max_norm is multiplied by there.")


class SchedulePolicy(Section):
    """Clip to max_norm times a factor that follows a curve over the steps."""

    name: Literal["schedule"] = Field(description="Clip to max_norm times a factor that follows a curve.")
    curve: Literal["constant", "linear", "cosine", "steps"] = Field(
        "constant",
        description="How the factor goes from point to point; constant is 1 everywhere and has no points.",
    )
    points: Annotated[tuple[SchedulePoint, ...], AS_TUPLE] = Field(
        (), description="Steps, in rising order, and the factors of max_norm there."
    )
    warmup: Count = Field(0, description="The first so many steps have another threshold ...")
    warmup_factor: NotNegative = Field(1.0, description="... which is multiplied by this.")


class ValuePolicy(Section):
    """Put every element within plus and minus max_norm; nothing is measured."""

    name: Literal["value"] = Field(description="Put every element within plus and minus max_norm.")


class PerTensorPolicy(Section):
    """Clip every parameter to max_norm by its own norm."""

    name: Literal["per_tensor"] = Field(description="Clip every parameter to max_norm by its own norm.")
    rms: bool = Field(False, description="Whether the root mean square stands for the norm.")


class AgcPolicy(Section):
    """Clip every output unit by the norm of its weights; max_norm is null."""

    name: Literal["agc"] = Field(description="Clip every output unit by the norm of its weights.")
    lambda_: Positive = Field(0.01, alias="lambda", description="The largest ratio of gradient to weights.")
    eps: Positive = Field(1e-3, description="Weights of a smaller norm count as of this one.")


class PercentilePolicy(Section):
    """Clip to a percentile of the norms so far; max_norm bounds it."""

    name: Literal["percentile"] = Field(description="Clip to a percentile of the norms so far.")
    p: Annotated[float, Field(ge=0, le=100)] = Field(10.0, description="The percentile.")
    window: Window | None = Field(
        1024, description=f"How many of the newest norms are kept; null keeps all. {_NONFINITE}"
    )


class ZClipPolicy(Section):
    """Clip norms that stand out from those before; max_norm bounds the threshold."""

    name: Literal["zclip"] = Field(description="Clip norms that stand out from those before.")
    alpha: Fraction = Field(0.97, description="The decay of mean and variance.")
    z_t: Positive = Field(2.5, description="So many standard deviations above the mean a norm is clipped.")
    warmup: Window = Field(25, description=f"How many norms are only collected first. {_NONFINITE}")
    eps: Positive = Field(1e-6, description="Added to the standard deviation.")
    mode: Literal["zscore", "percentile"] = Field(
        "zscore",
        description="How norms that stand out are clipped; percentile: to mean + z_t * standard deviation.",
    )
    clip_option: Literal["adaptive_scaling", "mean"] = Field(
        "adaptive_scaling",
        description="To what zscore clips them: the farther out the lower, or to the mean.",
    )
    clip_factor: Positive = Field(1.0, description="What the threshold of adaptive_scaling is multiplied by.")
    skip_update_on_spike: bool = Field(
        False, description="Whether norms that are clipped leave mean and variance alone."
    )


class AdaGcPolicy(Section):
    """Clip every parameter by what its own norm has been; max_norm is null."""

    name: Literal["adagc"] = Field(description="Clip every parameter by what its own norm has been.")
    lambda_: Positive = Field(
        1.05, alias="lambda", description="How far above its history a norm may be, as a factor."
    )
    beta: Fraction = Field(0.98, description="The decay of the history.")
    warmup: Count = Field(100, description=f"Steps that are clipped by the total norm first. {_NONFINITE}")
    warmup_max_norm: Positive = Field(1.0, description="What the total norm is clipped to in these.")
    eps: NotNegative = Field(
        0.0, description="Added to norms that a coefficient is divided by; its authors' code has 1e-8."
    )
    warmup_gamma: Literal["clipped", "unclipped"] = Field(
        "clipped", description="Which norms of warm-up the history begins with the smallest of."
    )


class AggcPolicy(Section):
    """Keep the norm within an interval around what it has been; max_norm is null."""

    name: Literal["aggc"] = Field(
        description="Keep the norm, such as that of a group, within an interval around what it has been."
    )
    beta: Fraction = Field(0.95, description="The decay of the running mean.")
    low: NotNegative = Field(0.95, description="The interval's lower end, as a multiple of the mean.")
    high: NotNegative = Field(0.6, description="Its upper end.")
    min_norm: NotNegative = Field(0.0, description="The lower end is this at least.")
    raise_small: bool = Field(False, description="Whether smaller norms are raised to the lower end.")
    max_down: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.9, description="The smallest coefficient of a step; null: no such bound."
    )
    max_up: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = Field(
        1.1, description="The largest coefficient of a step; null: no such bound."
    )
    low_late: NotNegative | None = Field(0.98, description="low, later in the run; null: as before.")
    high_late: NotNegative | None = Field(0.7, description="high, later in the run; null: as before.")
    total_steps: PositiveInt | None = Field(
        None, description="Steps of the run; null: low and high don't change."
    )
    switch: Fraction = Field(0.4, description="When they begin to change, as a share of total_steps ...")
    transition: Fraction = Field(0.3, description="... and how long it takes them.")


class SkipSpikesPolicy(Section):
    """Skip steps whose norm or loss stands out; the others are clipped to max_norm."""

    name: Literal["skip_spikes"] = Field(description="Skip steps whose norm or loss stands out.")
    k: Positive = Field(6.0, description="So many standard deviations above the mean a step is skipped.")
    window: Window = Field(128, description=f"How many of the newest values are kept. {_NONFINITE}")
    after: Window = Field(64, description="How many there must be; at most window.")
    on: Literal["norm", "loss"] = Field(
        "norm", description="Which value is judged; a loss has to be handed in with every step."
    )
    above: Finite | None = Field(None, description="A bound above which a step is skipped in any case.")


AnyPolicy = (
    ConstantPolicy
    | SchedulePolicy
    | ValuePolicy
    | PerTensorPolicy
    | AgcPolicy
    | PercentilePolicy
    | ZClipPolicy
    | AdaGcPolicy
    | AggcPolicy
    | SkipSpikesPolicy
)
NAMES: tuple[str, ...] = tuple(
    get_args(kind.model_fields["name"].annotation)[0] for kind in get_args(AnyPolicy)
)


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class _OrName:
    """In the JSON Schema: a name alone is enough."""

    @staticmethod
    def __get_pydantic_json_schema__(core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"enum": list(NAMES), "type": "string"}, handler(core)]}


PolicyChoice = Annotated[AnyPolicy, Field(discriminator="name"), BeforeValidator(_named), _OrName()]


def default_policy() -> AnyPolicy:
    """Clip to max_norm."""
    return ConstantPolicy(name="constant")
