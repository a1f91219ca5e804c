"""Lightning's `Trainer`: a `Callback` that clips by distnorm under every strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from distnorm.errors import ConfigError, DistnormError
from distnorm.hooks import Handle, attach
from distnorm.hooks.deepspeed import is_engine
from distnorm.hooks.wrapping import parameters_of
from distnorm.integrations.common import LateState, log_values, missing
from distnorm.integrations.taking_over import ConfigSource, taken_over
from distnorm.policies.results import ClipResult
from distnorm.sources import Target, Tied, named_tensors

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ModuleNotFoundError as error:
    raise missing("lightning", error) from error


class DistnormCallback(Callback):  # type: ignore[misc]
    """Measures, clips and logs by distnorm in every step of a Lightning `Trainer`.

    It attaches as training starts, after the sanity steps, to what the strategy has made of model and
    optimizers, and clips where gradients are final: after accumulation, unscaling, and everybody's
    ``on_before_optimizer_step``. It works with every strategy that distnorm knows the gradients of, with
    automatic and manual optimization. With several optimizers each clips its own parameters by their own
    norm, as Lightning does.

    The Trainer's ``gradient_clip_val`` becomes `clip.max_norm` where the configuration has none, and is
    refused where both are set and differ; while training runs the Trainer's own clipping is off, and an
    explicit ``clip_gradients`` is refused. On steps at which the Trainer logs, ``grad_norm`` (before
    clipping), ``grad_norm_clipped``, ``clip_coef``, ``clip_threshold`` and ``skipped`` are logged, and where
    `monitor.every` is set the layers' norms; other steps wait for no device. With several optimizers these
    names end in ``/0``, ``/1`` and so on. The Trainer's checkpoints keep the histories.

    Args:
        config: as for `GradClipper`.
        tied: as for `GradClipper`.

    Example:
        >>> Trainer(strategy="fsdp", callbacks=[DistnormCallback({"clip": {"max_norm": 1.0}})]).fit(model)
    """

    def __init__(self, config: ConfigSource = None, *, tied: Tied = ()) -> None:
        self._config, self._tied = config, tied
        self._states = [LateState()]
        self._logged: list[ClipResult | None] = []
        self._trainer_clips: tuple[Any, Any] | None = None
        self.handles: list[Handle] = []

    @property
    def last(self) -> ClipResult | None:
        """The newest result of the first optimizer; `None` before the first step and after training."""
        return self.handles[0].last if self.handles else None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach. Collective, as every rank's Trainer calls it.

        Raises:
            ConfigError: something else clips as well, or the configuration is wrong; the key is named.
            DistnormError: as `attach`.
        """
        self._detach(trainer)  # of a fit() that raised
        model, optimizers = trainer.strategy.model, list(trainer.optimizers)
        _refuse_other_clipping(trainer, pl_module)
        config = taken_over(self._config, *_limit(trainer, model))
        if is_engine(model):
            self.handles = [attach(model, config=config, tied=self._tied)]
        else:
            for target, optimizer in zip(_targets(model, optimizers), optimizers, strict=True):
                self.handles.append(attach(target, optimizer, config, tied=self._tied))
        self._trainer_clips = trainer.gradient_clip_val, trainer.precision_plugin
        trainer.gradient_clip_val = None
        trainer.precision_plugin.clip_gradients = _refuse_to_clip
        self._states += [LateState() for _ in self.handles[len(self._states) :]]
        for state, handle in zip(self._states, self.handles, strict=False):
            state.bind(handle.clipper)
        self._logged = [handle.last for handle in self.handles]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log the step that this batch has ended, if it has."""
        if not (trainer._logger_connector.should_update_logs or trainer.fast_dev_run):
            return
        for number, handle in enumerate(self.handles):
            if handle.last is not self._logged[number]:
                self._logged[number] = handle.last
                end = f"/{number}" if len(self.handles) > 1 else ""
                values = {name + end: value for name, value in log_values(handle.clipper).items()}
                layers = {name: value for name, value in values.items() if isinstance(value, float)}
                self.log_dict({name: value for name, value in values.items() if name not in layers})
                # Lightning repeats what was logged once in every later step of the epoch.
                for logger in trainer.loggers if layers else ():
                    logger.log_metrics(layers, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put everything back, and keep the state for a later fit."""
        self._detach(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put everything back, and raise nothing beside what was raised."""
        with suppress(DistnormError):
            self._detach(trainer)

    def state_dict(self) -> dict[str, Any]:
        """As `GradClipper.state_dict`, of each optimizer; empty where there is nothing to keep."""
        states = [state.state_dict() for state in self._states]
        return {"clippers": states} if any(states) else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As `GradClipper.load_state_dict`; Lightning calls it before training starts, so it is kept."""
        kept = state_dict.get("clippers", [])
        self._states += [LateState() for _ in kept[len(self._states) :]]
        for state, each in zip(self._states, kept, strict=False):
            state.load_state_dict(each)

    def _detach(self, trainer: Any) -> None:
        handles, self.handles = self.handles, []
        for handle in handles:
            handle.remove()
        if self._trainer_clips is not None:
            trainer.gradient_clip_val, plugin = self._trainer_clips
            vars(plugin).pop("clip_gradients", None)
            self._trainer_clips = None
        for state, handle in zip(self._states, handles, strict=False):
            state.bind(None)
            handle.clipper.close()


def _limit(trainer: Any, model: Any) -> tuple[float | None, str]:
    """What the framework would clip to, and its key. Lightning gives DeepSpeed its own, or the user did."""
    if is_engine(model):
        return float(model.gradient_clipping()), "gradient_clipping"
    return trainer.gradient_clip_val, "gradient_clip_val"


def _targets(model: nn.Module, optimizers: Sequence[Any]) -> list[Target]:
    if len(optimizers) == 1:
        return [model]
    steppers = [set(map(id, parameters_of(optimizer))) for optimizer in optimizers]
    named = named_tensors(model)
    return [[(name, tensor) for name, tensor in named if id(tensor) in each] for each in steppers]


def _refuse_other_clipping(trainer: Any, pl_module: Any) -> None:
    if is_overridden("configure_gradient_clipping", pl_module):
        raise ConfigError(
            "configure_gradient_clipping: expected Lightning's own, found that of "
            f"{type(pl_module).__name__}: it would clip a second time; remove it, and set clip.max_norm"
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise ConfigError(
            "gradient_clip_algorithm: expected norm, found value; remove it and gradient_clip_val, and set "
            f"clip.policy to value and clip.max_norm to {trainer.gradient_clip_val}"
        )


def _refuse_to_clip(optimizer: object, clip_val: float = 0.0, *_: Any, **__: Any) -> None:
    if clip_val > 0:
        raise ConfigError(
            f"clip_gradients: expected distnorm alone to clip, found a call with gradient_clip_val "
            f"{clip_val}; remove the call, and set clip.max_norm"
        )
