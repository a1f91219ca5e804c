"""Whether replicas of a gradient were reduced: found in every step, by one more element of the all-reduce.

Each replica takes the same small sample of the gradient and turns it into a number x that a last-bit
difference moves by little, and another gradient by much. Weights of replicas add up to zero, so the sum of
weighted x over all ranks, the difference, vanishes where replicas are equal.

    x = sum(r_k g_k) / sum(|g_k|) + log2(sum(|g_k|)),  r_k = +1 or -1 by position

Most replicas have equal bits, and where results are read on the host, the bits of x are compared so, as
integers in the packed header, at no cost. If they differ, the ranks compare their gradients whole; if these
are equal but for their last digits, the difference of x travels from then on, in an element of its own, and
the ranks learn which rounding is usual here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import ReplicaError
from distnorm.plan.collectives import Ranks
from distnorm.plan.join import join
from distnorm.plan.plan import Share, identity_rows, piece_groups, raise_named, spread
from distnorm.plan.wording import SHARDED
from distnorm.sources.shards import PACKED, GradShard

Ints = npt.NDArray[np.int64]

_ROUNDING = 1e-9  # of fp64 sums of equal numbers
_MARGIN = 64  # so many units in the last place may replicas differ where nobody can compare them
_IRRATIONALS = (2**0.5, 3**0.5, 5**0.5, 7**0.5)
_ODD = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 8  # shards a step where each sample costs launches of its own: which of them changes by step


@dataclass(slots=True)
class ReplicaCheck:
    """Compares replicas in every step of one plan. Made by all ranks together.

    Args:
        positions: of this rank's shards that have replicas.
        weights: [positions] of their numbers; over all replicas of a shard they add up to zero.
        integer_weights: [positions] the same for the bits of these numbers, modulo 2**64.
        keys: [positions] hashes of their identities.
        unread_tolerance: what the difference may be where nobody reads it; the same on every rank.
        turns: in so many steps each shard has its turn, where not all are sampled in each.
        tolerance: what the difference may be before gradients are compared whole, as `learn` leaves it. It
            starts at that of equal bits, which most replicas have: what rounding of a low precision might
            explain would hide a gradient that was never reduced.
    """

    positions: Ints
    weights: npt.NDArray[np.float64]
    integer_weights: Ints
    keys: Ints
    unread_tolerance: float
    turns: int
    tolerance: float = _ROUNDING
    _step: int = 0
    _weights_on: dict[torch.device, Tensor] = field(default_factory=dict)
    _compared: tuple[Any, Any, Any] = (None, None, None)  # a table, which rows are compared, and these
    _rows_of: Ints | None = None  # whose weights are kept on the device, row by row
    _of_rows: Tensor | None = None

    @classmethod
    def of(cls, ranks: Ranks, shards: Sequence[GradShard], shares: Sequence[Share]) -> ReplicaCheck:
        """Collective: every rank must call it, with the shards of one plan."""
        held = [i for i, share in enumerate(shares) if share.replicas > 1]
        # The first replica against the mean of all; a factor for each shard, so that shards don't cancel.
        factors = [0.5 + (shares[i].key >> 20 & 0xFFFF) / 0xFFFF for i in held]
        first = [(shares[i].index == 0) - 1 / shares[i].replicas for i in held]
        units = [(shares[i].key >> 8 & 0xFFFFF) | 1 for i in held]  # odd, so that no bit is lost
        whole = [(shares[i].replicas - 1 if shares[i].index == 0 else -1) for i in held]
        own = [i for i in held if shares[i].index == 0]
        noise = sum(_eps(shards[i].holder.dtype) ** 2 for i in own)
        total = torch.tensor([noise, len(own)], dtype=torch.float64, device=ranks.device())
        squares, count = ranks.all_reduce_(total, "sum").tolist()
        return cls(
            np.array(held, dtype=np.int64),
            np.array(factors) * np.array(first),
            np.array(units, dtype=np.int64) * np.array(whole, dtype=np.int64),
            np.array([shares[i].key for i in held], dtype=np.int64),
            _ROUNDING + _MARGIN * math.sqrt(squares),
            max(1, math.ceil(count / _AT_ONCE)),
        )

    def numbers_at(self, table: kernels.AddressTable, places: Ints) -> npt.NDArray[np.float64]:
        """[positions] the x of each gradient in the CPU's memory; 0 of those that are missing.

        Args:
            table: where gradients lie.
            places: [positions] the place of each of ours in the table; -1 where it has no gradient.
        """
        if self._compared[0] is not table:  # it is the same one while no gradient moves
            there = places >= 0
            self._compared = table, there, table.rows(places[there])
        _, there, rows = self._compared
        numbers = np.zeros(len(places))
        numbers[there] = numbers_of_samples(kernels.samples(rows).numpy())
        return numbers

    def numbers_of(self, gradients: Sequence[Tensor | None]) -> npt.NDArray[np.float64]:
        """`numbers_at` of gradients anywhere. Waits for their devices."""
        numbers = np.zeros(len(self.positions))
        for k, i in enumerate(self.positions.tolist()):
            gradient = gradients[i]
            if gradient is not None and not hasattr(gradient, "fake_mode"):  # a dry run has no values
                numbers[k] = numbers_of_samples(kernels.samples_of([gradient]).cpu().numpy())[0]
        return numbers

    def bits(self, numbers: npt.NDArray[np.float64]) -> int:
        """This rank's summand of the comparison of bits."""
        # The header keeps low bits only, so the product moves a change of any bit there.
        mixed = (numbers.view(np.uint64) * _ODD >> np.uint64(32)).astype(np.int64)
        return int((self.integer_weights * mixed).sum())

    def difference(self, numbers: npt.NDArray[np.float64]) -> float:
        """This rank's summand of the comparison of numbers."""
        return float(self.weights @ numbers)

    def of_tensors(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """`difference`, 0-d fp64 on a device, of gradients anywhere. No device is waited for."""
        if not (is_captured := kernels.is_captured()):
            self._step += 1
        total = torch.zeros((), dtype=torch.float64, device=device)
        by_device: dict[torch.device, dict[int, Tensor]] = defaultdict(dict)
        for k, i in enumerate(self.positions.tolist()):
            gradient = gradients[i]
            # Every replay is of the same step, so in that one all have their turn.
            if gradient is not None and (is_captured or self._has_turn(gradient.device, k)):
                by_device[gradient.device][k] = gradient
        for here, members in by_device.items():
            weights = self._weights_of(list(members), here, is_captured=is_captured)
            samples = kernels.samples_of(list(members.values()))
            total += kernels.moved(_weighted(weights, samples), device)
        return total

    def of_table(self, place: kernels.DeviceTable, places: Ints, device: torch.device) -> Tensor:
        """`of_tensors` of gradients on a GPU, by one launch for all of them.

        Args:
            place: where they lie.
            places: [positions] the row of each of ours there; -1 where it has no gradient.
            device: of the result.
        """
        weights = self._of_rows if self._rows_of is places else None
        if weights is None:
            of_rows = np.zeros(place.each.shape[0])
            of_rows[places[places >= 0]] = self.weights[places >= 0]
            weights = kernels.on_device(of_rows.tolist(), place.device)
            if not kernels.is_captured():  # a graph's memory is its own
                self._rows_of, self._of_rows = places, weights
        return kernels.moved(_weighted(weights, kernels.samples_at(place)), device)

    def _weights_of(self, which: list[int], device: torch.device, *, is_captured: bool) -> Tensor:
        every = self._weights_on.get(device)
        if is_captured and every is not None:  # a graph brings along each new number by a launch of its own
            return every if len(which) == len(every) else torch.stack([every[k] for k in which])
        weights = kernels.on_device(self.weights[which].tolist(), device)
        if every is None and type(weights) is Tensor:
            self._weights_on[device] = kernels.on_device(self.weights.tolist(), device)
        return weights

    def _has_turn(self, device: torch.device, k: int) -> bool:
        return kernels.samples_are_cheap(device) or int(self.keys[k]) % self.turns == self._step % self.turns

    def is_suspect(self, difference: float) -> bool:
        """Whether gradients have to be compared whole; with a NaN they have."""
        return not abs(difference) <= self.tolerance

    def exceeds_rounding(self, difference: Tensor) -> Tensor:
        """Whether a difference that nobody reads is more than rounding explains, 0-d bool; a NaN is."""
        return ~(difference.abs() <= self.unread_tolerance)

    def learn(self, difference: float) -> None:
        """Raise the tolerance: replicas with this difference were found equal but for their last digits."""
        self.tolerance = max(self.tolerance, 4 * abs(difference))


def _eps(dtype: torch.dtype) -> float:
    has_digits = (dtype.is_floating_point or dtype.is_complex) and dtype not in PACKED
    return torch.finfo(dtype).eps if has_digits else 0.0


def _weighted(weights: Tensor, samples: Tensor) -> Tensor:
    """The sum of weighted x, 0-d fp64, of [n] weights and [n, 2] samples."""
    signed, magnitudes = samples.unbind(dim=1)
    numbers = torch.where(magnitudes == 0, 0.0, signed / magnitudes + magnitudes.log2())
    return (weights * numbers).sum()


def numbers_of_samples(samples: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[n, (signed sum, sum of magnitudes)] -> [n] the x of each sample; 0 of zeros."""
    signed, magnitudes = samples.T
    with np.errstate(all="ignore"):
        numbers: npt.NDArray[np.float64] = signed / magnitudes + np.log2(magnitudes)
    numbers[magnitudes == 0] = 0.0
    return numbers


def compare_replicas(
    ranks: Ranks,
    shards: Sequence[GradShard],
    shares: Sequence[Share],
    gradients: Sequence[Tensor | None],
    apart_from: Container[int] = (),
    *,
    finite_only: bool = False,
) -> None:
    """Compare all gradients that have replicas, to half of their dtype's digits.

    Replicas may differ in the last bits: each may have computed the gradient for itself. So norms are
    compared, and products with fixed vectors, in which elements of another sign or order show. Collective.

    Args:
        ranks: who takes part.
        shards, shares, gradients: this rank's.
        apart_from: positions of those that are not compared, on any rank.
        finite_only: whether gradients that aren't finite are left to the total norm, which is not known yet.

    Raises:
        ReplicaError: replicas hold different gradients, or only some of them hold one.
    """
    if any(hasattr(gradient, "fake_mode") for gradient in gradients):  # a dry run has no values
        return
    held = [
        i for i, share in enumerate(shares) if share.replicas > 1 and shards[i].numel and i not in apart_from
    ]
    found = {i: _compared(gradients[i]) for i in held}
    if finite_only:
        found = {i: numbers for i, numbers in found.items() if math.isfinite(numbers[0])}
    with kernels.plain_operators():
        values = torch.tensor(list(found.values()), dtype=torch.float64, device="cpu")
        values = values.view(-1, 2 + len(_IRRATIONALS))
        identities = identity_rows([shards[i] for i in found])
        rows = torch.cat([identities, values.view(torch.int64)], dim=1)
        differs = join(ranks, rows, _differing).view(-1).tolist()
        raise_named(
            ranks,
            [
                (shards[i].name, _described(numbers))
                for (i, numbers), bad in zip(found.items(), differs, strict=True)
                if bad
            ],
            ReplicaError,
            "the same gradient on every replica",
            "Replicas' gradients must be reduced (by DDP, FSDP, or an all-reduce of your own) before they "
            f"are measured; for parameters that are none give whole-model names, pp_mesh, or {SHARDED}.",
        )


def _compared(gradient: Tensor | None) -> list[float]:
    """What is compared of one gradient: norm, or -1 for none; tolerance; products with fixed vectors."""
    if gradient is None:
        return [-1.0] + [0.0] * (1 + len(_IRRATIONALS))
    tolerance = math.sqrt(_eps(gradient.dtype))
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    sums = torch.zeros(1 + len(_IRRATIONALS), dtype=torch.float64, device=gradient.device)
    first = 0
    for block in kernels.blocks([gradient]):
        stop = first + len(block)
        places = torch.arange(first, stop, dtype=torch.float64, device=gradient.device)
        # Fractions of multiples of an irrational number are spread evenly over 0 to 1; of variance 1 here.
        vectors = [((places * number).frac_() - 0.5) * math.sqrt(12) for number in _IRRATIONALS]
        sums += torch.stack([torch.dot(block, other) for other in (block, *vectors)])
        first = stop
    squares, *products = sums.tolist()
    return [math.sqrt(squares), tolerance, *products]


def _described(numbers: Sequence[float]) -> str:
    value, _, product, *_ = numbers
    if value < 0:
        return "no gradient"
    return f"a gradient of norm {value:.9g} (product with a fixed vector {product:.9g})"


def _differing(rows: Tensor) -> Tensor:
    """[m, (name, piece, norm, tolerance, products ...)] -> [m, 1]: whether replicas differ."""
    of, count = piece_groups(rows)
    norms, tolerance, *products = rows[:, 2:].contiguous().view(torch.float64).unbind(1)
    finite = norms.isfinite()
    unlike = spread(finite.long(), of, count) > 0
    norms = torch.where(finite, norms, 0.0)
    most, allowed = (
        torch.zeros_like(norms[:count]).scatter_reduce_(0, of, v, "amax") for v in (norms, tolerance)
    )
    for numbers in (norms, *products):
        unlike |= spread(torch.where(finite, numbers, 0.0), of, count) > most * allowed
    return unlike[of].long().view(-1, 1)
