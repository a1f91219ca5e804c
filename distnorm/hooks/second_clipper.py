"""Second clippers: optimizers that clip inside their own step, by their settings; and torch's functions.

While something is attached, torch's functions are wrapped where they are looked up, in `torch.nn.utils` and
its module, and put back afterwards. A name that was imported from there before, or bound as a default, is the
function itself, and is left alone: of these `clip_grad_norm_` is seen all the same, by what it calls;
`clip_grad_value_`, `clip_grads_with_norm_`, and clippers of other origin are not.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from distnorm.clipper import GradClipper
from distnorm.errors import ConfigError, DistnormError
from distnorm.hooks.wrapping import wrapped

_FUNCTIONS = (
    (torch.nn.utils, "clip_grad_norm_"),
    (torch.nn.utils, "clip_grad_value_"),
    (torch.nn.utils, "clip_grads_with_norm_"),
    (clip_grad, "clip_grad_norm_"),
    (clip_grad, "clip_grad_value_"),
    (clip_grad, "_clip_grads_with_norm_"),  # which `clip_grad_norm_` calls
)

_KEY = re.compile(r"max_grad_norm|grad_clip\w*|clip_grad\w*|percentile_clipping")
_OFF = {"percentile_clipping": 100}  # the other keys are limits, and 0 or inf is none


_clipped: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def note_clipped(optimizers: Iterable[object]) -> Callable[[], None]:
    """Have `refuse_other_clippers` refuse these torch optimizers; the function returned ends that."""
    noted = [each for each in optimizers if isinstance(each, Optimizer)]
    _clipped.update(noted)

    def end() -> None:
        _clipped.difference_update(noted)

    return end


def refuse_other_clippers(given: Sequence[Any]) -> None:
    """Refuse optimizers whose gradients would be clipped twice, and wrappers of such.

    Raises:
        ConfigError: an optimizer clips inside its own step; the key is named.
        DistnormError: an optimizer is attached to already.
    """
    for optimizer in (each for outer in given for each in wrapped(outer)):
        refuse_second_clipper(optimizer)
        if isinstance(optimizer, Optimizer) and optimizer in _clipped:
            raise DistnormError(
                f"expected an optimizer that nothing is attached to, found {type(optimizer).__name__}, which "
                "clips already; call remove() of its handle first"
            )


def refuse_second_clipper(optimizer: object, path: str = "") -> None:
    """Refuse an optimizer, or a wrapper of one, that clips gradients in its own step.

    Raises:
        ConfigError: a setting in a parameter group, or of the optimizer, says so; `path` and its key name it.
    """
    for settings in _settings(optimizer):
        for key, value in settings.items():
            if _KEY.fullmatch(str(key)) and _is_on(key, value):
                raise ConfigError(
                    f"{path}{key}: expected {_OFF.get(key, 0)}, found {value}: {type(optimizer).__name__} "
                    "would clip a second time, inside its own step"
                )


def _settings(optimizer: object) -> Iterator[Mapping[str, Any]]:
    yield from getattr(optimizer, "param_groups", ())
    yield getattr(optimizer, "__dict__", {})
    yield getattr(getattr(optimizer, "args", None), "__dict__", {})  # where bitsandbytes keeps its own


def _is_on(key: str, value: object) -> bool:
    if not isinstance(value, (int, float)):
        return False
    return value < _OFF[key] if key in _OFF else 0 < value < float("inf")


class TorchClips:
    """Notes calls of torch's clipping functions for gradients that are clipped here.

    Args:
        clipper: of these gradients.
    """

    def __init__(self, clipper: GradClipper) -> None:
        self._clipper, self.is_paused = clipper, False
        self._noted: tuple[str, Tensor, Tensor] | None = None  # function, a parameter, and its gradient

    def listen(self) -> Callable[[], None]:
        """Begin; the function returned ends it."""
        return _listen(self)

    def note(self, function: str, parameters: Sequence[Tensor]) -> None:
        """Note a call."""
        if self.is_paused or getattr(self._clipper, "grad_place", None) is not None:
            return  # torch clips what is in `grad`
        ours = set(map(id, self._clipper.parameters))
        clipped = [p for p in parameters if id(p) in ours and p.grad is not None]
        if clipped:
            smallest = min(clipped, key=Tensor.numel)  # it is kept alive, since a new one may get its `id`
            assert smallest.grad is not None
            self._noted = function, smallest, smallest.grad

    def refuse(self) -> None:
        """Let the next measurement raise, on all ranks, if these gradients were clipped."""
        noted, self._noted = self._noted, None
        if noted is not None and noted[1].grad is noted[2]:  # else backward has made others since
            error = ConfigError(
                f"torch.nn.utils.{noted[0]}: expected no clipper beside distnorm, which is attached, found a "
                "call for the same parameters since the last step, so the true norm is lost; remove the call "
                "and set clip.max_norm, or give it max_norm=inf, which only measures"
            )
            if not hasattr(self._clipper, "refuse_next"):  # one of simulated ranks, which meet nobody else
                raise error
            self._clipper.refuse_next(error)


_listeners: list[weakref.ref[TorchClips]] = []
_wrapped: list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]] = []


def _listen(listener: TorchClips) -> Callable[[], None]:
    reference = weakref.ref(listener)
    if not _wrapped:
        for home, name in _FUNCTIONS:
            if (function := getattr(home, name, None)) is not None:
                _wrapped.append((home, name, _noted(function, name.lstrip("_")), function))
                setattr(home, name, _wrapped[-1][2])
    _listeners.append(reference)

    def stop() -> None:
        _listeners[:] = [each for each in _listeners if each is not reference and each() is not None]
        if _listeners:
            return
        while _wrapped:
            home, name, wrapper, function = _wrapped.pop()
            if getattr(home, name, None) is wrapper:  # another's wrapper around it stays, and calls ours
                setattr(home, name, function)

    return stop


def _noted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(function)
    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a graph can't note its calls
            return function(parameters, *args, **kwargs)
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        result = function(given, *args, **kwargs)
        limits = [*args[:1], *(kwargs[key] for key in ("max_norm", "clip_value") if key in kwargs)]
        if not math.isinf(float(limits[0])):
            for listener in [alive for each in _listeners if (alive := each()) is not None]:
                listener.note(name, given)
        return result

    return clip
