"""One step's local gradients, held until they are scaled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from distnorm import kernels


class Gradients:
    """The local gradients of one step, in the order of the shards."""

    def __init__(
        self, tensors: Sequence[Tensor | None], scale_: Callable[[Tensor], None] | None = None
    ) -> None:
        self.tensors, self._scale_ = list(tensors), scale_

    def scale_(self, coef: Tensor) -> None:
        """Multiply all by one coefficient."""
        if self._scale_ is not None:
            self._scale_(coef)
        else:
            kernels.scale_(self._present(range(len(self.tensors))), coef)

    def scale_each_(self, coefs: Tensor) -> None:
        """Multiply each by its own of [shards] coefficients."""
        there = [i for i, tensor in enumerate(self.tensors) if tensor is not None]
        kernels.scale_each_(self._present(there), coefs if len(there) == len(self.tensors) else coefs[there])

    def clamp_(self, bound: float, members: Sequence[int]) -> None:
        """Put the elements of some within plus and minus a bound."""
        kernels.clamp_(self._present(members), bound)

    def zero_unless_(self, keep: Tensor) -> None:
        """Set all to zero unless the 0-d bool is true."""
        kernels.zero_unless_(self._present(range(len(self.tensors))), keep)

    def _present(self, members: Sequence[int]) -> list[Tensor]:
        return [tensor for i in members if (tensor := self.tensors[i]) is not None]
