"""The reference's run, in one process: watched, and with its weights shaken in their last bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distnorm import kernels
from distnorm.errors import DistnormError
from distnorm.sources import Tied, checked_tied, named_tensors
from distnorm.sources.targets import canonical_names
from distnorm.verification.doctor.batch import row_digests
from distnorm.verification.doctor.reference import Values
from distnorm.verification.doctor.shaking import Shaken, refuse_written
from distnorm.verification.doctor.tracing import WEIGHTS, Boundary, Tracer, refuse_compiled

Run = Callable[..., Any]
"""``run(part, parts)``, or ``run()``: the model after the backward of a part of the batch, or all."""

SHAKES = 2
"""How often the reference runs with other last bits."""


@dataclass(slots=True)
class Watched:
    """What was seen of one run.

    Args:
        calls: for each module, by `id`, which call of all it was first called by.
        rows: digests of the rows that the model was given.
        trace: tensors at module boundaries by call, in the order in which they arose.
    """

    calls: dict[int, int] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    trace: dict[Boundary, dict[int, Tensor]] = field(default_factory=dict)


def takes_parts(run: Run) -> bool:
    """Whether a reference can be asked for parts of the batch."""
    try:
        inspect.signature(run).bind(0, 1)
    except TypeError:
        return False
    return True


def run_whole(run: Run, tied: Tied, trace: bool, shake: int | None = None) -> tuple[Values, Watched, Any]:
    """Run the reference over the whole batch.

    Args:
        run: the reference.
        tied: groups of names that are one parameter.
        trace: whether tensors at module boundaries are kept.
        shake: seed of the changes of the weights' last bits; `None` for none. They are taken back.

    Returns:
        Weights and gradients, what was seen, and what the reference returned.

    Raises:
        DistnormError: it returned nothing with parameters, or ran no module.
    """
    watched = Watched()
    with torch.random.fork_rng(), _watching(watched, trace, shake):
        target = run(0, 1) if takes_parts(run) else run()
        values = _taken(target, tied)
    if trace and not watched.trace:
        raise DistnormError(
            "reference: expected it to call modules eagerly where trace=True, found no call of any: is it "
            "under torch.compile?"
        )
    return values, watched, target


def run_part(run: Run, tied: Tied, part: int, parts: int) -> Values:
    """The gradients that one part of the batch gives."""
    with torch.random.fork_rng(), _watching(Watched(), False, None):
        return _taken(run(part, parts), tied)


def _taken(target: Any, tied: Tied) -> Values:
    """The values of a run, whose gradients go: the next one would add to those of modules that it calls
    past the model itself, and the sum would pass for rounding."""
    values = values_of(target, tied)
    for _, tensor in named_tensors(target):
        tensor.grad = None
    return values


def values_of(target: Any, tied: Tied) -> Values:
    """Weights and gradients of a whole model, no copies of them.

    Raises:
        DistnormError: it isn't one.
    """
    if target is None:
        raise DistnormError("reference: expected it to return the model after its backward, found None")
    named = named_tensors(target)
    names = canonical_names([name for name, _ in named], None, checked_tied(tied))
    values = Values({}, {}, {})
    with kernels.plain_operators(), torch.no_grad():
        for name, (_, tensor) in zip(names, named, strict=True):
            if hasattr(tensor, "to_local"):
                raise DistnormError(f"reference: expected plain tensors, found '{name}' to be a DTensor")
            values.weights[name] = tensor.detach()
            values.gradients[name] = None if tensor.grad is None else tensor.grad.detach()
            values.trains[name] = tensor.requires_grad
    return values


@contextmanager
def _watching(watched: Watched, trace: bool, shake: int | None) -> Iterator[None]:
    """See the modules that run, and what the first of them, the model itself, is given."""
    original = nn.Module.__call__
    roots: list[nn.Module] = []
    tracers: list[Tracer] = []
    shaken: list[Shaken] = []

    def on_tensor(boundary: Boundary, call: int, tensor: Tensor) -> None:
        kept = tensor.detach() if boundary.kind in WEIGHTS else tensor.detach().clone()
        watched.trace.setdefault(boundary, {})[call] = kept

    def watching(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not roots:
            roots.append(module)
            if trace:
                refuse_compiled([module], "the reference")
            module.zero_grad(set_to_none=True)  # of the run before, where a reference gives one model twice
            if shake is not None:
                shaken.append(Shaken(list(module.parameters()), shake))
            if trace:
                tracers.append(Tracer(module, on_tensor))
        if module is roots[0]:
            watched.rows += row_digests(args, kwargs)
        watched.calls.setdefault(id(module), len(watched.calls))
        return original(module, *args, **kwargs)

    nn.Module.__call__ = watching  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
        for tracer in tracers:
            tracer.remove()
        written = [parameter for weights in shaken for parameter in weights.restore()]
    refuse_written(written)


def places_of(target: Any, tied: Tied, watched: Watched) -> dict[str, int]:
    """Each parameter's place in the order of the forward: by the first call of a module that has it."""
    owners: dict[int, int] = {}
    modules = [target] if isinstance(target, nn.Module) else [m for m in target if isinstance(m, nn.Module)]
    for root in modules:
        for module in root.modules():
            at = watched.calls.get(id(module), 1 << 20)
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners[id(parameter)] = min(at, owners.get(id(parameter), 1 << 30))
    named = named_tensors(target)
    names = canonical_names([name for name, _ in named], None, checked_tied(tied))
    order = sorted(range(len(named)), key=lambda i: (owners.get(id(named[i][1]), 1 << 20), i))
    return {names[i]: place for place, i in enumerate(order)}


def joined(calls: Mapping[int, Tensor]) -> Tensor:
    """All calls of a boundary along the first dim; where they have no such dim, the first call."""
    tensors = [calls[call] for call in sorted(calls)]
    return torch.cat(tensors) if tensors[0].ndim else tensors[0]


def shapes_of(watched: Watched) -> dict[Boundary, tuple[int, ...]]:
    """The shapes of a reference's trace, which ranks need to place their pieces."""
    return {boundary: tuple(joined(calls).shape) for boundary, calls in watched.trace.items()}
