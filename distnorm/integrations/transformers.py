"""transformers' `Trainer`, and those made of it, such as TRL's: a mixin, or a callback where none can be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distnorm.clipper import GradClipper
from distnorm.config import Config, load_config
from distnorm.errors import DistnormError
from distnorm.hooks import Handle, attach
from distnorm.hooks.deepspeed import EngineClipper
from distnorm.integrations.accelerate import AcceleratedClipper
from distnorm.integrations.common import LateState, log_values, missing
from distnorm.integrations.taking_over import ConfigSource, taken_over

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    raise missing("transformers", error) from error

_LIMIT = "TrainingArguments.max_grad_norm"
_STATE = "distnorm"
_SEAMS = (
    *("_clip_grad_norm", "_get_grad_norm", "_prepare_for_training", "_finalize_training"),
    "_save_checkpoint",
)

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class DistnormMixin(_Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` that measures, clips and logs by distnorm; to be named before the trainer.

    `TrainingArguments.max_grad_norm`, whose default is 1.0, becomes `clip.max_norm` where the configuration
    has none, and is refused where both are set and differ; 0 leaves the limit to the configuration. The
    norm that the Trainer logs is distnorm's, before clipping, and beside it stand `grad_norm_clipped`,
    `clip_coef`, `clip_threshold`, `skipped`, and where `monitor.every` is set the layers' norms. Steps that
    log nothing wait for no device. Policies that go by the loss get the step's, but not under DeepSpeed,
    which clips inside backward. A step that distnorm skips is one of `max_steps`, but as after an overflow
    in fp16 the learning rate's schedule doesn't advance. Checkpoints keep the histories.

    Args:
        args, kwargs: the trainer's own.
        distnorm: the configuration, as for `GradClipper`; or a field `distnorm` of the training arguments;
            or a class attribute.

    Raises:
        ConfigError: the configuration is wrong, or `max_grad_norm` is another limit.
        DistnormError: a trainer is named before the mixin, or is of a version without the methods it needs.

    Example:
        >>> class MyTrainer(DistnormMixin, Trainer): ...
        >>> MyTrainer(model, args, train_dataset=data, distnorm={"clip": {"nonfinite": "skip"}}).train()
    """

    distnorm: ConfigSource = None
    _clipping: AcceleratedClipper | None = None
    _loss: Tensor | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse what would leave the Trainer's own clipping in place.

        Raises:
            DistnormError: a trainer is named before the mixin.
        """
        super().__init_subclass__(**kwargs)
        for kind in cls.__mro__[: cls.__mro__.index(DistnormMixin)]:
            if not issubclass(kind, DistnormMixin) and hasattr(kind, _SEAMS[0]):
                raise DistnormError(
                    f"expected DistnormMixin to be named before {kind.__name__}, found class {cls.__name__} "
                    "with it behind, where the trainer's own clipping comes first"
                )

    def __init__(self, *args: Any, distnorm: ConfigSource = None, **kwargs: Any) -> None:
        for seam in _SEAMS:
            if not hasattr(super(), seam):
                raise DistnormError(
                    f"expected a transformers.Trainer with the method {seam}, as version 5.24 has it, found "
                    f"none in {type(self).__name__}"
                )
        super().__init__(*args, **kwargs)
        sources = (distnorm, getattr(self.args, "distnorm", None), self.distnorm)
        given = next((source for source in sources if source is not None), None)
        self._config = taken_over(given, self.args.max_grad_norm, _LIMIT)

    @property
    def clipper(self) -> GradClipper | EngineClipper | None:
        """What clips, once training has begun."""
        return None if self._clipping is None else self._clipping.clipper

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._clipping is not None:  # of an earlier call of train()
            self._clipping.close()
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._clipping = AcceleratedClipper(self.accelerator, prepared[0], self._config)
        self._clipping.load_state_dict(_stored(self.state.stateful_callbacks.get(_STATE)))
        self._clipping.plan()
        return prepared

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`; keeps the loss for policies that go by it."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._loss = loss if self._loss is None else self._loss + loss
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        assert self._clipping is not None and self.clipper is not None
        if isinstance(self.clipper, GradClipper):
            self.clipper.note(loss=self._loss)
        self._loss = None
        return self._clipping.clip()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with what distnorm measured beside the Trainer's `grad_norm`."""
        if "grad_norm" in logs:
            logs.update(_floats(self.clipper))
        super().log(logs, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.clipper is not None:
            self.clipper.flush()  # the last step's row, and on an accelerator its error
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._clipping is not None:
            self.state.stateful_callbacks[_STATE] = _exported(self._clipping.state_dict())
        super()._save_checkpoint(*args, **kwargs)


class DistnormCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Clips by distnorm in every step of a `transformers.Trainer` that can't be subclassed.

    `TrainingArguments.max_grad_norm` is taken over as `DistnormMixin` does, and is 0 while training runs, so
    that the Trainer measures, and clips nothing. What distnorm measured replaces and joins `grad_norm` in
    the Trainer's `log_history` and in what callbacks after this one are given; those before it, as the
    Trainer's reporters are, see the Trainer's own norm.

    Args:
        config: as for `GradClipper`. A policy that goes by the loss needs `DistnormMixin`, and so does
            DeepSpeed, whose engine a callback is not given.

    Attributes:
        handle: what `attach` returned, while training runs.

    Example:
        >>> Trainer(model, args, train_dataset=data, callbacks=[DistnormCallback("clip.yaml")]).train()
    """

    def __init__(self, config: ConfigSource = None) -> None:
        self._source = config
        self._late = LateState()
        self.handle: Handle | None = None
        self._limit = 0.0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Attach to the Trainer's optimizer. Collective, as every rank's callback is called.

        Raises:
            ConfigError: as `DistnormMixin`.
            DistnormError: as `attach`; or the Trainer uses DeepSpeed.
        """
        if type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":
            raise DistnormError(
                "DistnormCallback: expected a trainer without DeepSpeed, whose engine a callback is not "
                "given, found one with it; use DistnormMixin"
            )
        self._detach(args)  # of a train() that raised
        config = taken_over(self._source, args.max_grad_norm, _LIMIT)
        self._late = LateState()
        self._late.load_state_dict(_stored(state.stateful_callbacks.get(type(self).__name__)))
        state.stateful_callbacks.setdefault(type(self).__name__, {})  # a run without it was saved
        self.handle = attach(model, optimizer, config)
        self._limit, args.max_grad_norm = args.max_grad_norm, 0.0
        self._late.bind(self.handle.clipper)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Let the learning rate's schedule wait where the step was skipped, as after an overflow in fp16."""
        if self.handle is None or self.handle.last is None or getattr(optimizer, "scaler", None) is not None:
            return
        clipper = self.handle.clipper
        if clipper.rules.may_skip:
            optimizer._is_overflow = bool(self.handle.last.skipped)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write what distnorm measured into the Trainer's log."""
        if logs is not None and "grad_norm" in logs and self.handle is not None:
            values = _floats(self.handle.clipper)
            logs.update(values)
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach, and put the Trainer's limit back."""
        self._detach(args)

    def _detach(self, args: Any) -> None:
        if self.handle is not None:
            self._late.bind(None)
            self.handle.remove()
            self.handle.clipper.close()
            self.handle, args.max_grad_norm = None, self._limit

    def state(self) -> dict[str, Any]:
        """What the Trainer saves: the configuration, and the histories."""
        source = self._source
        if isinstance(source, Config | Mapping):
            source = load_config(source).model_dump(mode="json")
        elif isinstance(source, Path):
            source = str(source)
        return {**_exported(self._late.state_dict()), "args": {"config": source}}


def _exported(state: Mapping[str, Any]) -> dict[str, Any]:
    """A clipper's state as the Trainer's file keeps that of callbacks."""
    return {"args": {}, "attributes": {"saved": dict(state)}}


def _stored(kept: Any) -> Mapping[str, Any]:
    """The clipper's state in what the Trainer keeps; empty where there is none."""
    newest = kept[-1] if isinstance(kept, list) and kept else kept
    return newest["attributes"]["saved"] if newest else {}


def _floats(clipper: GradClipper | EngineClipper | None) -> dict[str, float]:
    return {} if clipper is None else {name: float(value) for name, value in log_values(clipper).items()}
