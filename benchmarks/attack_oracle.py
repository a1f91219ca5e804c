"""What a step of the attack must do, worked out from memory itself, without a line of the library's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Values = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
ABSENT, PRESENT, UNREADABLE = 0, 1, 2
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


@dataclass(eq=False)
class Piece:
    """What one rank holds of one parameter.

    Args:
        name: the parameter's.
        holder: the parameter.
        index: [elements] where its elements are in the whole parameter.
        numel: of the whole parameter.
        everywhere: the indices of all ranks.
        complete: what a partial gradient adds up to here, where the gradient is partial.
    """

    name: str
    holder: Tensor
    index: Ints
    numel: int
    everywhere: list[Ints] = field(default_factory=list)
    complete: Values | None = None

    @property
    def local_holder(self) -> Tensor:
        return local_of(self.holder)


def local_of(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_readable(tensor: Tensor) -> bool:
    """Whether there is a number for each element."""
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.is_cpu:
        return False
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return False
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    if tensor._is_zerotensor():
        return False
    if not tensor.numel():
        return True
    return tensor.untyped_storage().nbytes() >= (max_place(tensor) + 1) * tensor.element_size()


def max_place(tensor: Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + reach)


def places(tensor: Tensor) -> Ints:
    """[elements] where each is in its storage, counted in elements."""
    at = np.full(1, tensor.storage_offset(), dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        at = (at[:, None] + np.arange(size) * stride).reshape(-1)
    return at


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload, no-any-return]


def elements(content: Tensor, dtype: torch.dtype, start: int) -> Values:
    """The numbers in bytes, from the byte `start` on."""
    size = dtype.itemsize
    whole = content[start : start + (len(content) - start) // size * size].clone()
    found: Values = whole.view(REAL.get(dtype, dtype)).double().numpy()
    return found


@dataclass(eq=False)
class Block:
    """One storage before the call, and which elements of it are gradients."""

    storage: torch.UntypedStorage
    content: Tensor
    parts: list[tuple[torch.dtype, Ints, int]] = field(default_factory=list)

    def problem(self, expected: Callable[[int, Values], Values] | None) -> str | None:
        now = bytes_of(self.storage)
        if len(now) != len(self.content):
            return f"a storage has {len(now)} bytes and had {len(self.content)}"
        is_free = np.zeros(len(now), dtype=bool)
        for dtype, at, i in self.parts if expected is not None else ():
            assert expected is not None
            size = REAL.get(dtype, dtype).itemsize
            is_free[(at[:, None] * size + np.arange(size)).reshape(-1)] = True
            wanted = expected(i, elements(self.content, dtype, 0)[at])
            found = elements(now, dtype, 0)[at]
            if dtype.is_complex:  # the arithmetic of a product with NaN or inf mixes both parts
                pairs = np.isnan(wanted.reshape(-1, 2)).any(axis=1).repeat(2) & np.isnan(found)
                wanted = np.where(pairs, found, wanted)
            if not is_close(found, wanted, dtype):
                odd = np.flatnonzero(~(np.isclose(found, wanted, rtol=1e-3) | (found == wanted)))[:6]
                return f"gradient {i} of {dtype} became {found[odd]} at {odd}, expected {wanted[odd]}"
        same = now.numpy() == self.content.numpy()
        if not (same | is_free).all():
            return f"bytes {np.flatnonzero(~(same | is_free))[:6]} of {len(now)} changed that are no gradient"
        return None


def is_close(found: Values, wanted: Values, dtype: torch.dtype) -> bool:
    """Whether numbers are the wanted ones but for one rounding, and those of norm and coefficient to fp32."""
    facts = torch.finfo(REAL.get(dtype, dtype))
    relative = 0.75 * facts.eps + 3e-7
    with np.errstate(over="ignore"):
        top = float(facts.max)
        near = np.abs(found - wanted) <= relative * np.abs(wanted) + 2 * facts.tiny * facts.eps
    lost = (np.abs(wanted) > top * (1 - facts.eps)) & ~np.isfinite(found)
    return bool((near | (found == wanted) | (np.isnan(found) & np.isnan(wanted)) | lost).all())


class Picture:
    """One rank's gradients before a call, and all memory that the call could meet."""

    def __init__(self, pieces: Sequence[Piece], guards: Sequence[Tensor]) -> None:
        self.pieces = pieces
        self.states: list[int] = []
        self.values: list[Values] = []
        self.blocks: dict[int, Block] = {}
        self.copies: list[tuple[Tensor, Tensor, int]] = []  # of memory that a look would change
        self.shares_oddly = False
        # Replicas of few digits may differ by so much that a difference of one of them doesn't show.
        grads = [p.holder.grad for p in pieces if p.holder.grad is not None]
        kept = {p.holder.dtype for p in pieces} | {local_of(gradient).dtype for gradient in grads}
        self.is_coarse = not kept <= {torch.float32, torch.float64}
        self.shares = False
        for i, piece in enumerate(pieces):
            state, values = self._look(i, piece)
            self.states.append(state)
            self.values.append(values)
        for guard in guards:
            if torch._C._is_cow_tensor(guard):  # type: ignore[attr-defined]
                self.copies.append((guard, guard.clone(), -1))
            elif guard.untyped_storage().nbytes():
                self._block(guard)
        self._find_sharing()

    def _look(self, i: int, piece: Piece) -> tuple[int, Values]:
        none = np.zeros(len(piece.index))
        gradient = piece.holder.grad
        if gradient is None:
            return ABSENT, none
        local = local_of(gradient)
        if not is_readable(local):
            return UNREADABLE, none
        if piece.complete is not None:
            return PRESENT, np.abs(piece.complete)
        plain = local.detach().as_subclass(Tensor)
        if torch._C._is_cow_tensor(plain) or plain._is_zerotensor():  # type: ignore[attr-defined]
            copy = plain.clone()
            self.copies.append((plain, copy, i))
            return PRESENT, _magnitudes(copy.reshape(-1).to(torch.complex128).numpy())
        if local.numel() != len(piece.index):
            return UNREADABLE, none
        if not local.numel():
            return PRESENT, none
        at = places(plain)
        if plain.is_complex():
            at = np.stack([2 * at, 2 * at + 1], axis=1).reshape(-1)
        block = self._block(plain)
        block.parts.append((plain.dtype, at, i))
        found = elements(block.content, plain.dtype, 0)[at]
        return PRESENT, np.hypot(found[::2], found[1::2]) if plain.is_complex() else np.abs(found)

    def _block(self, tensor: Tensor) -> Block:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.blocks:
            self.blocks[storage.data_ptr()] = Block(storage, bytes_of(storage).clone())
        return self.blocks[storage.data_ptr()]

    def _find_sharing(self) -> None:
        for block in self.blocks.values():
            seen: dict[int, Any] = {}
            for dtype, at, _ in block.parts:
                size = REAL.get(dtype, dtype).itemsize
                like = (dtype, at.tobytes())
                is_odd = False
                for byte in np.unique(at[:, None] * size + np.arange(size)).tolist():
                    other = seen.setdefault(byte, like)
                    self.shares |= other is not like
                    is_odd |= other != like
                self.shares_oddly |= is_odd

    def problem(self, expected: Callable[[int, Values], Values] | None) -> str | None:
        """What isn't as expected now; `None` for `expected`: nothing may have changed."""
        for block in self.blocks.values():
            if (found := block.problem(expected)) is not None:
                return found
        for tensor, copy, i in self.copies:
            old = _numbers(copy)
            wanted = old if i < 0 or expected is None else expected(i, old)
            if not is_close(_numbers(tensor.clone()), wanted, tensor.dtype):
                return f"gradient {i} (a copy on write or zero tensor) isn't what it must be"
        for i, piece in enumerate(self.pieces):
            if piece.complete is None or expected is None or piece.holder.grad is None:
                continue
            found_now = _numbers(local_of(piece.holder.grad).detach())
            if not is_close(found_now, expected(i, piece.complete), piece.holder.dtype):
                return f"gradient {i}, which was partial, became {found_now[:6]}"
        return None


def _numbers(tensor: Tensor) -> Values:
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    found: Values = flat.double().numpy()
    return found


def _magnitudes(values: npt.NDArray[np.complex128]) -> Values:
    return np.hypot(values.real, values.imag)


@dataclass(eq=False)
class Truth:
    """What all ranks hold together.

    Args:
        whole: [elements] magnitudes of each parameter's gradient, of those elements that have one.
        must_refuse: whether the call can't be right.
        may_refuse: whether it need not be measured.
        shares, shares_oddly: whether gradients share memory, and not as one tensor.
        is_unequal: whether replicas hold different gradients.
        differs: whether by more than a few digits, or only some of them hold one.
        trouble: how many ranks found something wrong before.
    """

    whole: list[Values]
    must_refuse: bool
    may_refuse: bool
    shares: bool
    shares_oddly: bool
    trouble: float
    is_unequal: bool = False
    differs: bool = False

    def norm(self, order: float, which: Sequence[int] | None = None) -> float:
        chosen = range(len(self.whole)) if which is None else which
        values = np.concatenate([np.zeros(1), *(self.whole[i] for i in chosen)])
        largest = float(values.max())
        if math.isnan(largest) or np.isnan(values).any():
            return math.nan
        if largest == 0 or math.isinf(largest) or math.isinf(order):
            return largest
        return float(largest * math.fsum((values / largest) ** order) ** (1 / order))


def gather(values: Sequence[float] | Values) -> Values:
    """[ranks, n]"""
    mine = torch.as_tensor(np.asarray(values, dtype=np.float64))
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    found: Values = torch.stack(rows).numpy()
    return found


def agree(picture: Picture, trouble: bool, may_refuse: bool) -> Truth:
    """Put the ranks' gradients together. Collective."""
    pieces = picture.pieces
    odd = [float(x) for x in (trouble, picture.shares, picture.shares_oddly, may_refuse, picture.is_coarse)]
    longest = sum(1 + max(map(len, piece.everywhere)) for piece in pieces) + len(odd)
    mine = np.concatenate(
        [np.array(odd), *(np.r_[s, v] for s, v in zip(picture.states, picture.values, strict=True))]
    )
    rows = gather(np.pad(mine, (0, longest - len(mine))))
    at = [len(odd)] * len(rows)
    shares, shares_oddly, may_refuse, is_coarse = (bool(rows[:, column].any()) for column in range(1, 5))
    truth = Truth([], False, may_refuse, shares, shares_oddly, float(rows[:, 0].sum()))
    for piece in pieces:
        whole, is_there = np.zeros(piece.numel), np.zeros(piece.numel, dtype=bool)
        states: dict[bytes, float] = {}
        kinds = set()
        for rank, index in enumerate(piece.everywhere):
            state = rows[rank, at[rank]]
            values = rows[rank, at[rank] + 1 : at[rank] + 1 + len(index)]
            at[rank] += 1 + len(index)
            kinds.add(state)
            truth.must_refuse |= state == UNREADABLE and len(index) > 0
            truth.may_refuse |= state == UNREADABLE
            if states.setdefault(index.tobytes(), state) != state:
                truth.differs |= len(index) > 0
            if state == PRESENT:
                old = is_there[index]
                if not np.array_equal(whole[index][old], values[old], equal_nan=True):
                    truth.is_unequal, truth.may_refuse = True, True
                    truth.differs |= not is_coarse and _differ(whole[index], values)
                whole[index], is_there[index] = values, True
        truth.may_refuse |= len(kinds) > 1
        truth.whole.append(whole[is_there])
    return truth


def _differ(one: Values, other: Values) -> bool:
    """Whether by more than a few digits, in their norms too."""
    norms = [float(np.sqrt(np.square(values).sum())) for values in (one, other)]
    return all(map(math.isfinite, norms)) and abs(norms[0] - norms[1]) > 0.3 * max(norms)


@dataclass(frozen=True)
class Rules:
    """How gradients are clipped.

    Args:
        policy: ``constant``, ``per_tensor``, ``groups`` or ``value``.
        max_norm: the threshold.
        order: of the norm.
        nonfinite: as in the configuration.
        pattern: of the names that ``groups`` has a threshold of twice `max_norm` for.
    """

    policy: str
    max_norm: float
    order: float
    nonfinite: str
    pattern: str

    def change(self, truth: Truth, names: Sequence[str]) -> Callable[[int, Values], Values]:
        """What becomes of a gradient's elements."""
        if self.policy == "value":
            return lambda i, old: np.clip(old, -self.max_norm, self.max_norm)
        coefs, total = self.coefs(truth, names), truth.norm(self.order)
        if not math.isfinite(total) and self.nonfinite in ("skip", "zero"):
            factor = 1.0 if self.nonfinite == "skip" else 0.0
            return lambda i, old: old if factor else np.zeros_like(old)

        def scaled(i: int, old: Values) -> Values:
            with np.errstate(invalid="ignore"):
                return old if coefs[i] == 1 else old * coefs[i]

        return scaled

    def coefs(self, truth: Truth, names: Sequence[str]) -> list[float]:
        if self.policy == "per_tensor":
            norms = [truth.norm(self.order, [i]) for i in range(len(names))]
            return [n if math.isnan(n) else self.max_norm / max(n, self.max_norm) for n in norms]
        if self.policy == "groups":
            own = [i for i, name in enumerate(names) if fnmatch(name, self.pattern)]
            rest = [i for i in range(len(names)) if i not in own]
            mine = _coef(2 * self.max_norm, truth.norm(self.order, own))
            others = _coef(self.max_norm, truth.norm(self.order, rest))
            return [mine if i in own else others for i in range(len(names))]
        return [_coef(self.max_norm, truth.norm(self.order))] * len(names)


def _coef(threshold: float, norm: float) -> float:
    return norm if math.isnan(norm) else min(1.0, threshold / (norm + 1e-6))
