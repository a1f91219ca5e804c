"""What Megatron-core's optimizers hold of the model's parameters, at the moment their step begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from distnorm.errors import UnsupportedGradientError
from distnorm.sources.megatron import Held


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of a model's parameter that one of this rank's optimizers steps.

    Args:
        held: the parameter.
        holder: what the optimizer steps: the parameter, a copy of it, or a part of one of these.
        start: first element.
        stop: end of the elements.
        attribute: where the holder's gradient is.
    """

    held: Held
    holder: Tensor
    start: int
    stop: int
    attribute: str

    def between(self, start: int, stop: int) -> Tensor:
        """The values of some elements, in the parameter's shape if that is all of them."""
        return self._cut(self.holder.detach(), start, stop)

    def gradient(self, start: int, stop: int) -> Tensor | None:
        """This step's gradient of some elements, once the optimizer has prepared it."""
        found = getattr(self.holder, self.attribute, None)
        return None if found is None else self._cut(found, start, stop)

    def _cut(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        shape = self.held.parameter.shape
        flat = tensor.view(-1)[start - self.start : stop - self.start]
        return flat.view(shape) if flat.numel() == shape.numel() else flat


@dataclass(frozen=True, slots=True)
class Run:
    """Elements `start` to `stop` of a parameter, within one part of it.

    Args:
        part: what the optimizer steps.
        start: first element.
        stop: end of the elements.
        name: what all ranks call the parameter's elements that this rank's model has.
    """

    part: Part
    start: int
    stop: int
    name: str

    @property
    def held(self) -> Held:
        """The parameter."""
        return self.part.held

    @property
    def is_whole(self) -> bool:
        """Whether it is all that this rank's model has of the parameter."""
        return (self.start, self.stop) == (0, self.held.parameter.numel())

    @property
    def gradient(self) -> Tensor | None:
        """This step's gradient, once the optimizer has prepared it."""
        return self.part.gradient(self.start, self.stop)

    def cut(self, at: Sequence[int]) -> Iterator[Run]:
        """The same elements, as several runs."""
        ends = [self.start, *(end for end in at if self.start < end < self.stop), self.stop]
        for start, stop in pairwise(ends):
            yield replace(self, start=start, stop=stop)


def parts_of(optimizer: Any, held: Sequence[Held]) -> list[Part]:
    """What the optimizer, or those that it chains, step of these parameters.

    Raises:
        UnsupportedGradientError: it is no optimizer that is known, or steps something else.
    """
    by_id = {id(each.parameter): each for each in held}
    parts = []
    for inner in inner_optimizers(optimizer):
        attribute = "grad"
        if getattr(inner.config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False):
            attribute = "decoupled_grad"
        for parameter, holder, start, stop in _stepped(inner, attribute):
            if id(parameter) not in by_id:
                raise UnsupportedGradientError(
                    f"expected {type(inner).__name__} to step parameters of the model chunks, found one of "
                    f"shape {tuple(parameter.shape)} that is in none of them; give all of the rank's chunks"
                )
            parts.append(Part(by_id[id(parameter)], holder, start, stop, attribute))
    return parts


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers that a `ChainedOptimizer` chains, or the optimizer alone; without those of nothing.

    Raises:
        UnsupportedGradientError: it is none of Megatron's.
    """
    chained = getattr(optimizer, "chained_optimizers", None)
    found = [optimizer] if chained is None else list(chained)
    for each in (optimizer, *found):
        lacks = [name for name in ("prepare_grads", "get_grad_norm", "step") if not hasattr(each, name)]
        if lacks or "LayerWise" in type(each).__name__ or _is_fsdp(each):
            raise UnsupportedGradientError(
                "expected a MegatronOptimizer, or a ChainedOptimizer of some, without Megatron-FSDP; found "
                f"{type(each).__name__}" + (f", which has no {lacks[0]}" if lacks else "")
            )
    return [each for each in found if not getattr(each, "is_stub_optimizer", False)]


def _is_fsdp(optimizer: Any) -> bool:
    return bool(getattr(getattr(optimizer, "ddp_config", None), "use_megatron_fsdp", False))


def _stepped(optimizer: Any, attribute: str) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Model's parameter, what is stepped, and the elements that this is."""
    if hasattr(optimizer, "_get_model_param_range_map"):  # the distributed optimizer
        copies = "shard_fp32_from_float16_groups" if attribute == "grad" else "shard_float16_groups"
        for models, shards in (("model_float16_groups", copies), ("model_fp32_groups", "shard_fp32_groups")):
            for parameter, holder in _pairs(getattr(optimizer, models), getattr(optimizer, shards)):
                held = optimizer._get_model_param_range_map(parameter)["param"]
                yield parameter, holder, held.start, held.end
    elif hasattr(optimizer, "fp32_from_float16_groups"):
        for parameter, holder in _pairs(optimizer.float16_groups, optimizer.fp32_from_float16_groups):
            yield parameter, holder, 0, parameter.numel()
        for group in optimizer.fp32_from_fp32_groups:
            yield from ((p, p, 0, p.numel()) for p in group)
    else:
        yield from ((p, p, 0, p.numel()) for p in optimizer.get_parameters())


def _pairs(groups: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]]) -> Iterator[Any]:
    for group, other in zip(groups, others, strict=True):
        yield from zip(group, other, strict=True)
