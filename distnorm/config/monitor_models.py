"""The keys of `monitor`: what is monitored, which alerts there are, and where rows go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, field_validator

from distnorm.config.section import AS_TUPLE, Conflict, Count, Location, PositiveInt, Section

_KINDS = ("parameter", "module", "depth")
_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}

Text = Annotated[str, Field(min_length=1)]
Address = Annotated[
    str,
    Field(
        pattern=r"^(https?://\S+|\$[A-Za-z_][A-Za-z0-9_]*)$",
        examples=["https://host/path", "$ENVIRONMENT_VARIABLE"],
    ),
]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Factor = Annotated[float, Field(gt=1, allow_inf_nan=False)]


def _layers(value: object) -> object:
    if isinstance(value, str) and value in _KINDS:
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(text, str) and text for text in value):
        return tuple(value)
    raise ValueError


# One validator for both forms, so that a mistake is one problem; a tuple, so that a config can be hashed.
By = Annotated[
    Literal["parameter", "module", "depth"] | tuple[str, ...],
    PlainValidator(_layers),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": list(_KINDS)},
                {"type": "array", "items": _TEXT, "minItems": 1},
            ]
        }
    ),
]


_ON_MONITORED_STEPS = {
    "replicas": "replicas are compared",
    "cosines": "cosines are measured",
    "updates": "updates are measured",
    "slices": "slices are measured",
    "spectral": "spectral norms are estimated",
}


class NotifyConfig(Section):
    """Whom alerts reach: by a command, a webhook, or both. Neither can hold a training up, or end it."""

    command: Annotated[tuple[Text, ...], Field(min_length=1), AS_TUPLE] | None = Field(
        None,
        description="A program and its arguments, such as [notify-send, distnorm]. It gets the alerts in "
        "words as one more argument, and as JSON on its standard input; no shell takes part.",
    )
    webhook: Address | None = Field(
        None,
        description="An address that gets the alerts as JSON by POST, their words under text, as Slack and "
        "Mattermost read them; or $NAME, an environment variable that has it, so that no file does.",
    )
    every: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        60.0,
        description="Seconds between two messages; alerts in between are sent together in the next.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        """A message goes somewhere."""
        if self.command is None and self.webhook is None:
            yield Conflict(("command", "webhook"), "expected command, webhook or both, found neither")


class AlertsConfig(Section):
    """When there is an alert; null switches a rule off. A monitored step is one that measures layers."""

    vanishing: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        1e-9,
        description="A layer vanishes whose norm falls under this, after it has been 1,000 times as large; "
        "a layer that never had a gradient to speak of, such as an unused one, is left alone.",
    )
    drop: OpenFraction | None = Field(
        1e-3, description="A layer vanishes whose norm falls under this share of its own average."
    )
    falling: OpenFraction | None = Field(
        1e-4,
        description="Gradients vanish with depth where the norms of numbered blocks fall from one end of the "
        "model to the other to this share, by the trend over all of them; needs 4 blocks.",
    )
    exploding: Factor | None = Field(
        10.0,
        description="A layer explodes whose norm is more than so many times its own average; up to the "
        "1.5th power of this for a layer whose norm varies much anyway.",
    )
    clip_rate: OpenFraction | None = Field(
        None,
        description="An alert is given where more than this share of a full window's steps is clipped. Null "
        "by default: many healthy runs clip on every step.",
    )
    non_finite: bool = Field(True, description="Whether a norm that is inf or NaN gives an alert.")
    warmup: PositiveInt = Field(
        5,
        description="Monitored steps in which a layer has a gradient, before drop and exploding go by its "
        "average.",
    )
    hysteresis: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        2.0,
        description="An alert is given again only after the value was better than the bound by this factor.",
    )
    cooldown: PositiveInt = Field(100, description="Steps between two alerts of one kind for one layer.")
    notify: NotifyConfig | None = Field(None, description="Whom alerts reach, beside log and files.")


class PrometheusConfig(Section):
    """Where Prometheus scrapes rank 0."""

    port: Annotated[int, Field(ge=1, le=65535)] = Field(description="The port.")
    host: Text = Field(
        "127.0.0.1",
        description="The address to listen at. There is no password: at any other than loopback, such as "
        "0.0.0.0, everybody reads the metrics who reaches it.",
    )


class SinksConfig(Section):
    """Where rows and alerts go besides the JSONL files; one that fails is dropped with a warning."""

    tensorboard: bool = Field(
        False, description="Event files in the folder tensorboard of the run; extra: tensorboard."
    )
    wandb: bool = Field(
        False,
        description="Weights & Biases: the run that is active, else one of its own, in WANDB_PROJECT or "
        "distnorm; offline where WANDB_MODE says so; extra: wandb.",
    )
    prometheus: PrometheusConfig | None = Field(
        None, description="Where rank 0 serves metrics to Prometheus; a number is a port; extra: prometheus."
    )

    @field_validator("prometheus", mode="before", json_schema_input_type=int | PrometheusConfig | None)
    @classmethod
    def _port_alone(cls, value: object) -> object:
        return {"port": value} if isinstance(value, int) and not isinstance(value, bool) else value


class SliceConfig(Section):
    """Stacked parameters of which each slice is reported too."""

    params: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), AS_TUPLE] = Field(
        description="Patterns of parameters' names, with * and ?, such as *.experts.w1. Every pattern "
        "matches one at least, and no parameter is in two entries."
    )
    dim: Count = Field(0, description="The dim along which they are stacked.")
    size: PositiveInt = Field(
        1, description="So many neighbouring indices are one slice: 1 for experts, the head's size for heads."
    )


class MonitorConfig(Section):
    """What is monitored, and where rows and alerts go."""

    every: PositiveInt | None = Field(
        None,
        description="Every so many steps the statistics of single layers are added to the step's all-reduce; "
        "null never does.",
    )
    by: By = Field(
        "parameter",
        description="What a layer is: a parameter, a module, or what has one depth; or a list of patterns, "
        'such as "*.attn.*", each of which is a layer that holds all parameters it matches.',
    )
    clip_rate_window: PositiveInt = Field(
        100, description="Steps over which clip_rate, the share of clipped steps, is taken."
    )
    stop_after: PositiveInt | None = Field(
        None,
        description="So many steps in a row whose norm is inf or NaN raise NonFiniteGradientError on all "
        "ranks; null never does.",
    )
    replicas: bool = Field(
        False,
        description="Whether monitored steps compare replicated gradients between replicas, bit by bit.",
    )
    cosines: bool = Field(
        False,
        description="Whether monitored steps measure the cosine of gradient and weight, and the share of the "
        "gradient that is radial.",
    )
    updates: bool = Field(
        False,
        description="Whether monitored steps measure the newest update, whatever the optimizer: its norm, "
        "its ratio to the weight, and its cosine with the gradient. From the step before until then each "
        "rank keeps a copy of the weights that it counts.",
    )
    slices: Annotated[tuple[SliceConfig, ...], AS_TUPLE] = Field(
        (), description="Slices of stacked parameters that are reported too, such as experts and heads."
    )
    spectral: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AS_TUPLE] = Field(
        (),
        description="Patterns of weight matrices whose spectral norm and stable rank are estimated, by half "
        "a power iteration on each monitored step, which goes on from the one before.",
    )
    spectral_vectors: Annotated[int, Field(ge=1, le=64)] = Field(
        4,
        description="How many vectors iterate together: more come close sooner, and each costs 8 bytes a row "
        "of every such matrix in the all-reduce.",
    )
    fingerprints: PositiveInt | None = Field(
        None,
        description="Of so many steps, the newest, each rank keeps a fingerprint of every gradient's bits, "
        "taken in the read that gives the norm. Where a step is suspicious, the trainer computes it again, "
        "and names rank and parameter of each gradient that is another one then. Null keeps none.",
    )
    dir: Location | None = Field(
        None,
        description="Folder for metrics.jsonl, layers.jsonl and alerts.jsonl; distnorm's trainer uses "
        "train.output_dir instead. Rows that the files hold of steps that are made again are dropped.",
    )
    alerts: AlertsConfig = Field(default_factory=AlertsConfig, description="When there is an alert.")
    sinks: SinksConfig = Field(default_factory=SinksConfig, description="Where rows go besides JSONL.")
    console: Literal["auto", "plain", "rich"] = Field(
        "auto",
        description="What the trainer prints: a line a step (plain), or a progress bar (rich, an extra); "
        "auto is a bar on a terminal, where rich is installed.",
    )

    @property
    def has_alerts(self) -> bool:
        """Whether there can be alerts at all."""
        alerts = self.alerts
        rules = (alerts.vanishing, alerts.drop, alerts.falling, alerts.exploding, alerts.clip_rate)
        return alerts.non_finite or self.replicas or any(rule is not None for rule in rules)

    def conflicts(self) -> Iterator[Conflict]:
        """What only monitored steps do."""
        for key, does in _ON_MONITORED_STEPS.items():
            if getattr(self, key) and self.every is None:
                text = f"expected monitor.every, which says when {does}, found null"
                yield Conflict((key, "every"), text)
