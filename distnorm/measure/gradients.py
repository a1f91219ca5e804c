"""One step's local gradients: read with care, and held until they have been scaled."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DistnormError, UnsupportedGradientError
from distnorm.measure import partials
from distnorm.measure.norms import Norm
from distnorm.measure.replica_check import ReplicaCheck
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard, PartialGrad, Reading, measurable

Ints = npt.NDArray[np.int64]
Given = Mapping[int, Tensor] | None
"""Local gradients, by position, that a graph hands over in place of those that parameters have."""

Coefficients = Literal["one", "of parameters", "of units"]
"""Which of a step's gradients, or parts of them, are multiplied by coefficients of their own."""


class Gradients:
    """The gradients of one step, in the order of the shards.

    While this object exists, nothing can free their memory.

    Args:
        tensors: this rank's local gradients, after partial ones were reduced; `None` where there is none.
        problems: what is wrong with gradients that can't be measured.

    Attributes:
        marks: which of them are not finite, where `statistic` was asked for it.
        taken: what a GPU has measured of them before.
    """

    def __init__(self, tensors: Sequence[Tensor | None], problems: Sequence[DistnormError] = ()) -> None:
        self._tensors, self.problems = list(tensors), list(problems)
        self._memory: list[Tensor | None] = self._tensors
        self._once: list[Tensor] | None = None
        self.marks: kernels.FiniteMarks | None = None
        self.taken: kernels.TakenParts | None = None

    @property
    def tensors(self) -> list[Tensor | None]:
        """The local gradients."""
        return self._tensors

    @property
    def device(self) -> torch.device:
        """Where the first of them is; the CPU if there is none."""
        return next((t.device for t in self.tensors if t is not None), torch.device("cpu"))

    @property
    def fake(self) -> Tensor | None:
        """One of a dry run, which has no values; `None` outside of dry runs."""
        first = next((tensor for tensor in self._tensors if tensor is not None), None)
        return None if type(first) is Tensor else first

    def raise_problems(self) -> None:
        """Raise what is wrong with this rank's gradients, if anything is."""
        if self.problems:
            raise self.problems[0]

    def presence(self, weights: dict[int, int]) -> int:
        """The sum of the weights of those that are there, by position."""
        return sum(weight for i, weight in weights.items() if self.tensors[i] is not None)

    def is_empty(self) -> bool:
        """Whether there is none."""
        return all(tensor is None for tensor in self.tensors)

    def statistic(
        self, norm: Norm, shares: Sequence[Share], device: torch.device, *, marks: bool = False
    ) -> Tensor:
        """The statistic, [width] fp64 on a device, of what this rank counts, wherever it is.

        Args:
            norm: which norm.
            shares: what this rank counts of each.
            device: of the result.
            marks: whether `marks` is needed afterwards.
        """
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        positions: dict[int, list[int]] = defaultdict(list)
        for i, (gradient, share) in enumerate(zip(self.tensors, shares, strict=True)):
            if gradient is not None and share.start < share.stop:
                all_of_it = share.stop - share.start == gradient.numel()
                counted = gradient if all_of_it else gradient.reshape(-1)[share.start : share.stop]
                by_device[gradient.device].append(counted)
                positions[id(counted)].append(i)
        self.marks = kernels.FiniteMarks(positions) if marks else None
        statistics = [kernels.moved(norm.statistic(by_device[d], d, self.marks), device) for d in by_device]
        return norm.reduce(torch.stack(statistics)) if statistics else norm.zeros(device)

    def headed_statistic(
        self, norm: Norm, device: torch.device, header: int, *, marks: bool = False
    ) -> Tensor | None:
        """A header and the statistic as one tensor, [2] fp64 on a device, where one kernel writes both."""
        return None

    def clip_(self, reduced: Tensor, terms: kernels.ClipTerms) -> kernels.Clipped | None:
        """All that follows the all-reduce, where one kernel does it: see `kernels.clip_at_`."""
        return None

    def replica_numbers(self, check: ReplicaCheck) -> npt.NDArray[np.float64]:
        """What is compared of replicas. Waits for the gradients' devices."""
        return check.numbers_of(self.tensors)

    def replica_difference(self, check: ReplicaCheck, device: torch.device) -> Tensor:
        """By how much replicas differ, this rank's summand on a device. Waits for nothing."""
        return check.of_tensors(self.tensors, device)

    def addresses(self) -> tuple[kernels.AddressTable | None, Ints]:
        """Where the gradients lie in the CPU's memory, and the position of each; `None` if some lie
        elsewhere, or are not contiguous."""
        there = {i: tensor for i, tensor in enumerate(self._tensors) if tensor is not None}
        tensors = list(there.values())
        fit = not kernels.split(tensors)[1] and all(map(Tensor.is_contiguous, tensors))
        return kernels.AddressTable.of(tensors) if fit else None, np.array(list(there), dtype=np.int64)

    def on_gpu(self) -> tuple[kernels.DeviceTable, Ints] | None:
        """Where on a GPU that lies which this rank counts, and the position of each row, if it was found."""
        return None

    def lay_out(self, shards: Sequence[GradShard], coefficients: Coefficients) -> None:
        """Find views by which each element in memory is multiplied once, even where gradients share memory.

        If there are none, that is a problem, noted before any rank has changed a gradient.
        """
        views: list[Tensor | None] = []
        for shard, tensor in zip(shards, self._tensors, strict=True):
            try:
                views.append(None if tensor is None else _writable(tensor))
            except ValueError as error:
                self.problems.append(refusal(shard, str(error)))
                views.append(None)
        self._memory = views
        there = {i: view for i, view in enumerate(views) if view is not None}
        try:
            self._once = kernels.once(list(there.values()))
        except kernels.SharedMemoryError as error:
            positions = list(there)
            names = " and ".join(f"'{shards[positions[at]].name}'" for at in error.positions)
            self.problems.append(refusal(shards[positions[error.positions[0]]], f"{error} ({names})"))
            return
        if coefficients == "of units":
            self._refuse_shared_units(shards)
        if len(self._once) < len(there) and coefficients != "one":
            alone = list(map(id, self._once))
            first = next(i for i, view in there.items() if not _took(alone, id(view)))
            fact = "expected memory of its own, as coefficients are each gradient's own, found shared memory"
            self.problems.append(refusal(shards[first], fact))

    def _refuse_shared_units(self, shards: Sequence[GradShard]) -> None:
        for shard, tensor, view in zip(shards, self._tensors, self._memory, strict=True):
            if tensor is None or view is None or len(shard.global_shape) < 2:
                continue
            if len(view) != len(tensor):
                fact = "expected memory of its own for each output unit, whose coefficients differ; clone it"
                self.problems.append(refusal(shard, fact))

    @property
    def is_plain(self) -> bool:
        """Whether each gradient is contiguous memory of its own."""
        same = all(map(is_, self._memory, self._tensors))
        there = sum(tensor is not None for tensor in self._tensors)
        return same and (self._once is None or len(self._once) == there)

    def scale_(self, coef: Tensor, keep: Tensor | None = None) -> None:
        """Multiply all by a 0-d coefficient, in place, each element in memory once; or set all to zero,
        unless the 0-d bool tensor `keep` is true."""
        kernels.scale_(self._parts(), coef)
        if keep is not None:
            self.zero_unless_(keep)

    def scale_each_(self, coefs: Tensor) -> None:
        """Multiply each by its own of [shards] coefficients, in place."""
        kernels.scale_each_(self.views(), coefs)

    def clamp_(self, bound: float, members: Sequence[int]) -> None:
        """Put every element of some gradients, by position, within plus and minus a bound."""
        memory = self.views()
        kernels.clamp_([view for view in (memory[i] for i in members) if view is not None], bound)

    def zero_unless_(self, keep: Tensor) -> None:
        """Set all to zero, NaN and inf too, unless a 0-d bool tensor is true."""
        kernels.zero_unless_(self._parts(), keep)

    def views(self) -> list[Tensor | None]:
        """What to multiply in place of each gradient: its elements in memory, each once."""
        return self._memory

    def _parts(self) -> list[Tensor]:
        return [v for v in self.views() if v is not None] if self._once is None else self._once


def read_with_care(
    shards: Sequence[GradShard], given: Given = None
) -> tuple[list[Reading], list[DistnormError]]:
    """Read this step's gradients, each checked; and the errors of those that can't be measured.

    Args:
        shards: whose gradients.
        given: what is read in place of the parameters' gradients.
    """
    readings: list[Reading] = []
    problems: list[DistnormError] = []
    for i, shard in enumerate(shards):
        reading: Reading = None
        try:
            reading = shard.read() if given is None else _given(shard, given.get(i))
        except UnsupportedGradientError as error:
            problems.append(refusal(shard, str(error)))
        misfit = _misfit(shard, reading)
        if misfit:
            problems.append(refusal(shard, misfit))
            reading = None
        readings.append(reading)
    return readings, problems


def _given(shard: GradShard, gradient: Tensor | None) -> Tensor | None:
    refused = None if shard.gate is None else shard.gate.refusal()
    if refused is not None:
        raise UnsupportedGradientError(refused)
    return None if gradient is None else measurable(gradient)


def _misfit(shard: GradShard, reading: Reading) -> str | None:
    local, expected = reading, shard.shape
    if isinstance(reading, PartialGrad):
        if fact := partials.misfit(reading):
            return fact
        local, expected = reading.tensor, shard.wide_shape(reading.wide)
    assert not isinstance(local, PartialGrad)
    if local is None or tuple(local.shape) == expected or not (local.numel() or math.prod(expected)):
        return None
    return f"expected the shape {expected}, found {tuple(local.shape)}"


def completed(
    shards: Sequence[GradShard],
    readings: Sequence[Reading],
    problems: Sequence[DistnormError],
    *,
    store: bool,
) -> Gradients:
    """The readings as gradients. A partial one that was not reduced is a problem, unless it is empty; one
    that is only uncut is cut."""
    tensors: list[Tensor | None] = []
    late = list(problems)
    for shard, reading in zip(shards, readings, strict=True):
        if not isinstance(reading, PartialGrad):
            tensors.append(reading)
        elif not reading.axes or not reading.tensor.numel():
            tensor = shard.narrowed(reading.tensor, reading.wide)
            if store:
                tensor = tensor.clone(memory_format=torch.contiguous_format)
                shard.store(tensor)
            tensors.append(tensor)
        else:
            tensors.append(None)
            late.append(
                refusal(shard, "its gradient is Partial now, and other ranks can't be asked to reduce it")
            )
    return Gradients(tensors, late)


def _took(numbers: list[int], number: int) -> bool:
    """Take a number out of a list, if it is there."""
    is_there = number in numbers
    if is_there:
        numbers.remove(number)
    return is_there


def _writable(tensor: Tensor) -> Tensor:
    """`kernels.memory_of` of what torch lets be changed in place.

    Raises:
        ValueError: it doesn't, or elements share memory.
    """
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("expected a tensor that can be changed here, found one of inference mode; clone it")
    return kernels.memory_of(tensor)


def refusal(shard: GradShard, fact: str) -> DistnormError:
    """The error that names a shard's parameter."""
    return UnsupportedGradientError(f"parameter '{shard.name}': {fact}")
