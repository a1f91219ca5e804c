"""Which parameters make a layer, by their names alone, and the statistics of a layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from distnorm.errors import ConfigError

_NUMBER = re.compile(r"(^|\.)[0-9]+(?=\.|$)")
_STAGE = re.compile(r"pp[0-9]+\.")  # what a pp_mesh puts before a name


@dataclass(frozen=True, slots=True)
class Layers:
    """Groups of parameters; a parameter may be in several of them, or in none.

    Args:
        names: of the layers.
        members: (parameter, layer) by their places, for every parameter of every layer.
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class LayerStats:
    """What was found of each layer before clipping, [layers] fp64 each.

    The elements of a missing gradient count as elements, and not as zeros.

    Args:
        norm: of the configured order.
        rms: root of the mean of the squares, whatever the order.
        zero_fraction: how many of the elements are exactly 0.
        max: the largest magnitude; `None` where the table has no rows.
        grad_to_weight: 2-norm of the gradient over that of the weight, whatever the order, NaN where the
            weight is 0, or was not read; `None` where weights aren't sent at all.
        bad: [parameters] how many elements are inf or NaN; for p = inf each replica counts its own.
    """

    norm: Tensor
    rms: Tensor
    zero_fraction: Tensor
    max: Tensor | None
    grad_to_weight: Tensor | None
    bad: Tensor


def layers_of(names: Sequence[str], by: str | Sequence[str]) -> Layers:
    """Group parameters to layers, in the order of their first parameters; patterns keep their own order.

    Args:
        names: of the parameters.
        by: ``parameter``: each by itself; ``module``: those that differ in the last part of their names only;
            ``depth``: those alike up to the first number between dots (``blocks.2``), or, without one, in
            their first part; or globs, of which each makes one layer of all that it matches.

    Raises:
        ConfigError: `by` is something else, or a pattern matches no parameter.
    """
    if not isinstance(by, str):
        return _by_patterns(names, tuple(by))
    if by not in _LAYER_OF:
        raise ConfigError(f"monitor.by: expected {', '.join(_LAYER_OF)}, or a list of patterns; found {by!r}")
    own = [_LAYER_OF[by](name) for name in names]
    place = {layer: i for i, layer in enumerate(dict.fromkeys(own))}
    return Layers(tuple(place), tuple((i, place[layer]) for i, layer in enumerate(own)))


def _by_patterns(names: Sequence[str], patterns: tuple[str, ...]) -> Layers:
    members = [
        (i, layer)
        for layer, pattern in enumerate(patterns)
        for i, name in enumerate(names)
        if fnmatchcase(name, pattern)
    ]
    matching = {layer for _, layer in members}
    if useless := [pattern for layer, pattern in enumerate(patterns) if layer not in matching]:
        raise ConfigError(
            f"monitor.by: expected patterns that match parameters, found {useless}, which do not"
        )
    return Layers(patterns, tuple(members))


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def _depth(name: str) -> str:
    number = _NUMBER.search(name)
    if number is not None:
        return name[: number.end()]
    stage = _STAGE.match(name)
    start = stage.end() if stage else 0
    return name[:start] + name[start:].partition(".")[0]


_LAYER_OF: dict[str, Callable[[str], str]] = {"parameter": str, "module": _module, "depth": _depth}


def grouped(values: Tensor, sizes: Tensor, how: str) -> Tensor:
    """[groups] the ``sum`` or ``max`` of each run of so many values; 0 of none, and NaN where one is NaN.

    Unlike a scatter it adds in a fixed order, so that all GPUs find the same bits.
    """
    found: Tensor = torch.segment_reduce(values, how, lengths=sizes, initial=0, unsafe=True)
    return found
