"""Weights with other last bits, in place: shaken twice with the same seed they are what they were."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distnorm.errors import DistnormError
from distnorm.verification.doctor.blocks import cut
from distnorm.verification.doctor.holdings import select

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Shaken:
    """Weights of which about each is changed by one or two units in the last place, until `restore`.

    Zeros, subnormal and non-finite numbers stay. Nothing is copied: bits that are flipped are drawn again.

    Args:
        parameters: the weights.
        seed: which bits.
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.is_floating_point()]
        self._seed = seed
        self._flip(set())
        self._versions = [parameter._version for parameter in self._parameters]

    def restore(self) -> list[Tensor]:
        """Take the changes back; returns the parameters that somebody wrote to meanwhile, which stay."""
        both = zip(self._parameters, self._versions, strict=True)
        written = [parameter for parameter, version in both if parameter._version != version]
        self._flip({id(parameter) for parameter in written})
        return written

    def _flip(self, but: set[int]) -> None:
        dice = torch.Generator("cpu").manual_seed(self._seed)
        with torch.no_grad():
            for parameter in self._parameters:
                kind, exponent = _INTEGERS[parameter.dtype.itemsize], _exponent(parameter.dtype)
                bits = parameter.detach().view(kind)
                for block in cut(tuple(bits.shape)):
                    some = select(bits, tuple((limits,) for limits in block))
                    flips = torch.randint(1, 3, some.shape, generator=dice, dtype=kind, device="cpu")
                    inner = some & exponent
                    is_normal = (inner != 0) & (inner != exponent)
                    if id(parameter) not in but:
                        some.bitwise_xor_(flips.to(some.device) * is_normal)


def _exponent(dtype: torch.dtype) -> int:
    """The bits of a number's exponent, which flips of its last bits leave alone."""
    mantissa = round(-math.log2(torch.finfo(dtype).eps))
    return ((1 << (8 * dtype.itemsize - 1)) - 1) >> mantissa << mantissa


def refuse_written(written: Sequence[Tensor]) -> None:
    """Refuse a run that changes the weights it is to be compared with.

    Raises:
        DistnormError: something was written to.
    """
    if written:
        raise DistnormError(
            "reference: expected a run that leaves its weights as they are, found one of shape "
            f"{tuple(written[0].shape)} changed by it; leave the optimizer's step out"
        )
