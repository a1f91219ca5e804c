"""What the attack does to gradients between two steps. All ranks make the same choices."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.attack_oracle import Piece, Values, is_readable, local_of

CHECKED, MAY_REFUSE = "measured", "may be refused"
GUARD = 77.0


class Quiet(Tensor):
    """Computes as a tensor does, but for what it multiplies in place."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mul_" in getattr(func, "__name__", ""):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


class Plain(Tensor):
    pass


class Opaque(Tensor):
    """Whose operators alone know its elements."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of an opaque tensor")


@dataclass(eq=False)
class Scene:
    """One rank's model, and what its gradients are made of.

    Args:
        pieces: what it holds.
        rank, world: of this process.
        scale: of this step's values.
        guards: memory that no call may change.
        gone: gradients that were replaced, and live.
        frozen: parameters that were frozen for this step.
    """

    pieces: list[Piece]
    rank: int
    world: int
    scale: float = 1.0
    guards: list[Tensor] = field(default_factory=list)
    gone: list[Tensor] = field(default_factory=list)
    frozen: list[Tensor] = field(default_factory=list)
    has_extra: bool = False
    change_set: Callable[[random.Random], None] = lambda dice: None

    def values(self, i: int, dice: random.Random) -> Values:
        """New values for this rank's piece of a gradient, cut from what all ranks draw alike."""
        piece = self.pieces[i]
        whole = np.random.default_rng(dice.getrandbits(32)).standard_normal(piece.numel) * self.scale
        found: Values = whole[piece.index]
        return found

    def local(self, i: int) -> Tensor | None:
        gradient = self.pieces[i].holder.grad
        return None if gradient is None else local_of(gradient)

    def is_tidy(self, i: int) -> bool:
        """Whether a gradient is there, and as backward would have left it."""
        piece, local = self.pieces[i], self.local(i)
        holder = piece.local_holder
        if local is None or not is_readable(local) or type(local) is not Tensor or piece.complete is not None:
            return False
        fits = local.dtype is holder.dtype and local.shape == holder.shape and local.is_contiguous()
        return fits and not (local.is_inference() or local.requires_grad or local._is_zerotensor())

    def put(self, i: int, tensor: Tensor, dice: random.Random) -> None:
        """Make a tensor the (local) gradient, whatever its dtype and shape are."""
        holder, old = self.pieces[i].holder, self.local(i)
        keeps = dice.random() < 0.5
        if old is not None:
            self.gone.append(old)
        if isinstance(holder, DTensor):
            if not (keeps and isinstance(holder.grad, DTensor)):
                holder.grad = None
                made = DTensor(torch.zeros_like(holder._local_tensor), holder._spec, requires_grad=False)  # type: ignore[call-arg]
                holder.grad = made
            holder.grad._local_tensor = tensor  # type: ignore[union-attr]
            return
        holder.grad = None
        try:
            holder.grad = tensor
        except (RuntimeError, TypeError):
            holder.grad = torch.zeros_like(holder)
            with suppress(RuntimeError):  # torch refuses it before we can
                holder.grad.data = tensor


def made(values: Values, shape: Sequence[int], dtype: torch.dtype, before: int = 0) -> Tensor:
    """A tensor in the middle of memory that no gradient has."""
    count = int(np.prod(shape))
    base = torch.full((before + 2 * count + 5,), GUARD, dtype=dtype)
    found = base[before : before + count].view(tuple(shape))
    fill(found, values)
    return found


def fill(tensor: Tensor, values: Values) -> None:
    with torch.no_grad():
        numbers = torch.from_numpy(np.array(values)).reshape(tensor.shape)
        if tensor.is_complex():
            tensor.copy_(torch.complex(numbers, numbers.flip(0) if numbers.dim() else numbers))
        elif tensor.numel():
            tensor.copy_(numbers.to(tensor.dtype))


def current(scene: Scene, i: int) -> Tensor | None:
    """A gradient that is there and can be copied."""
    local = scene.local(i)
    fits = local is not None and is_readable(local) and scene.pieces[i].complete is None
    return local if fits else None


# ---- changes: each returns what must come of it, or None where it can't be made


def _absent(scene: Scene, i: int, dice: random.Random) -> str | None:
    scene.pieces[i].holder.grad = None
    return CHECKED


def _absent_on_one(scene: Scene, i: int, dice: random.Random) -> str | None:
    if dice.randrange(scene.world) == scene.rank:
        scene.pieces[i].holder.grad = None
    return CHECKED


def _all_absent(scene: Scene, i: int, dice: random.Random) -> str | None:
    for piece in scene.pieces:
        piece.holder.grad = None
    return CHECKED


def _zero(scene: Scene, i: int, dice: random.Random) -> str | None:
    for k in range(len(scene.pieces)):
        local = current(scene, k)
        if local is not None and not local.is_inference():
            with torch.no_grad(), suppress(RuntimeError):  # torch refuses it where elements share memory
                local.zero_()
    return CHECKED


def _laid_out(make: Callable[[Tensor, random.Random], Tensor | None], result: str = CHECKED) -> Any:
    """A change that puts the same values elsewhere, on every rank or on one."""

    def change(scene: Scene, i: int, dice: random.Random) -> str | None:
        which, own = dice.randrange(-1, scene.world), random.Random(dice.random())
        local = current(scene, i)
        if local is not None and which in (-1, scene.rank):
            other = make(local.detach(), own)
            if other is not None:
                scene.put(i, other, own)
        return result

    return change


def _new(t: Tensor, dice: random.Random) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _freed_first(scene: Scene, i: int, dice: random.Random) -> str | None:
    """The allocator gives its memory to one of another dtype."""
    local = current(scene, i)
    if local is not None:
        dtype = dice.choice((torch.bfloat16, torch.float16, torch.float64))
        values = local.detach().clone()
        scene.pieces[i].holder.grad = None
        del local
        gc.collect()
        scene.put(i, values if values.is_complex() else values.to(dtype).clone(), dice)
    return CHECKED


def _elsewhere(t: Tensor, dice: random.Random) -> Tensor | None:
    """In the same storage, at another offset."""
    held = t.untyped_storage().nbytes() // t.element_size()
    if t.numel() == 0 or held < t.storage_offset() + 2 * t.numel() or not t.is_contiguous():
        return None
    base = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())  # type: ignore[call-overload]
    start = t.storage_offset() + t.numel()
    other: Tensor = base[start : start + t.numel()].view(t.shape)
    return other.copy_(t)


def _strided(t: Tensor, dice: random.Random) -> Tensor:
    step, before = dice.choice((2, 3)), dice.randrange(3)
    base = torch.full((before + step * t.numel() + 1,), GUARD, dtype=torch.float64).to(t.dtype)
    strides, reach = [], step
    for size in reversed(t.shape):
        strides.append(reach)
        reach *= size
    return base.as_strided(t.shape, strides[::-1], before).copy_(t)


def _permuted(t: Tensor, dice: random.Random) -> Tensor:
    dims = list(range(t.dim()))
    dice.shuffle(dims)
    back = [dims.index(d) for d in range(t.dim())]
    return t.permute(dims).clone(memory_format=torch.contiguous_format).permute(back)


def _expanded(scene: Scene, i: int, dice: random.Random) -> str | None:
    """One number, or one row, for all: on some ranks repeated by strides, on others copied."""
    local, which = current(scene, i), dice.randrange(-1, scene.world)
    if local is None or not local.dim():
        return CHECKED
    fill(row := torch.zeros((1,) * local.dim(), dtype=local.dtype), np.array([scene.scale]))
    other = row.expand(local.shape)
    scene.put(i, other if which in (-1, scene.rank) else other.clone(), dice)
    return CHECKED


def _folded(scene: Scene, i: int, dice: random.Random) -> str | None:
    """Elements that overlap as those of a Hankel matrix."""
    shape = scene.pieces[i].local_holder.shape
    if len(shape) == 2 and (local := current(scene, i)) is not None and not local.is_complex():
        base = torch.full((sum(shape) + 3,), scene.scale, dtype=local.dtype)
        scene.put(i, base.as_strided(shape, (1, 1), 1), dice)
    return MAY_REFUSE


def _retyped(scene: Scene, i: int, dice: random.Random) -> str | None:
    """Another dtype at the same address."""
    dtype = dice.choice((torch.bfloat16, torch.float16, torch.float64, torch.float32, torch.float8_e4m3fn))
    local, which = current(scene, i), dice.randrange(-1, scene.world)
    if local is None or not local.is_contiguous() or local.is_complex() or local.is_inference():
        return CHECKED
    values = local.detach().double().to(dtype)
    offset = local.storage_offset() * local.element_size()
    fits = offset % dtype.itemsize == 0
    room = local.untyped_storage().nbytes() >= offset + local.numel() * dtype.itemsize
    if which in (-1, scene.rank) and fits and room:
        other: Tensor = torch.empty(0, dtype=dtype)
        at = (offset // dtype.itemsize, local.shape)
        other.set_(local.untyped_storage(), *at)  # type: ignore[call-overload]
        scene.put(i, other.copy_(values), dice)
    else:
        scene.put(i, values, dice)
    return CHECKED


def _converted(scene: Scene, i: int, dice: random.Random) -> str | None:
    dtype = dice.choice((torch.bfloat16, torch.float16, torch.float64, torch.float32, torch.float8_e5m2))
    local = current(scene, i)
    if local is not None and not local.is_complex():
        scene.put(i, local.detach().to(dtype), dice)
    return CHECKED


def _shrunk(scene: Scene, i: int, dice: random.Random) -> str | None:
    """Its storage is too small, or empty; on one rank or on all."""
    local, which, empty = scene.local(i), dice.randrange(-1, scene.world), dice.random() < 0.5
    if _owns(scene, i) and local is not None and local.nbytes and which in (-1, scene.rank):
        local.untyped_storage().resize_(0 if empty else local.storage_offset() * local.element_size() + 1)
    return CHECKED  # the oracle knows


def _restored(scene: Scene, i: int, dice: random.Random) -> str | None:
    """Its storage is freed, and there again, elsewhere."""
    local = current(scene, i)
    if _owns(scene, i) and local is not None and local.is_contiguous():
        values, size = local.clone(), local.untyped_storage().nbytes()
        local.untyped_storage().resize_(0)
        scene.gone.append(torch.full((size,), 3, dtype=torch.uint8))
        local.untyped_storage().resize_(size + 64 * dice.randrange(3))
        local.detach().copy_(values)
    return CHECKED


def _owns(scene: Scene, i: int) -> bool:
    """Whether no other gradient, nor guard, has the storage, and it can be resized."""
    local = scene.local(i)
    if local is None or local.layout is not torch.strided or local.is_meta or local._is_zerotensor():
        return False
    if type(local).__torch_dispatch__ is not Tensor.__torch_dispatch__ or local.is_inference():
        return False
    if torch._C._is_cow_tensor(local) or not local.untyped_storage().resizable():  # type: ignore[attr-defined]
        return False
    mine = local.untyped_storage()._cdata
    others = [scene.local(k) for k in range(len(scene.pieces)) if k != i] + list(scene.guards)
    storages = [o.untyped_storage()._cdata for o in others if o is not None and o.layout is torch.strided]
    return mine not in storages


def _pair(scene: Scene, i: int, dice: random.Random) -> int | None:
    """Another parameter of the same shape and dtype, on every rank."""
    mine = scene.pieces[i]
    for k, other in enumerate(scene.pieces):
        same = other.holder.shape == mine.holder.shape and other.holder.dtype is mine.holder.dtype
        spec = getattr(other.holder, "placements", None) == getattr(mine.holder, "placements", None)
        if k != i and same and spec:
            return k
    return None


def _shared(scene: Scene, i: int, dice: random.Random) -> str | None:
    """One tensor is the gradient of two parameters."""
    k, kind = _pair(scene, i, dice), dice.randrange(3)
    if k is None or (local := current(scene, i)) is None:
        return None
    if kind == 0 and local.dtype is scene.pieces[k].holder.dtype and type(local) is Tensor:
        scene.pieces[k].holder.grad = None
        scene.pieces[k].holder.grad = scene.pieces[i].holder.grad
    else:
        scene.put(k, local if kind == 1 else local.detach()[:], dice) if local.dim() else None
    return CHECKED


def _swapped(scene: Scene, i: int, dice: random.Random) -> str | None:
    k = _pair(scene, i, dice)
    if k is None or current(scene, i) is None or current(scene, k) is None:
        return None
    a, b = scene.pieces[i].holder, scene.pieces[k].holder
    first, second = a.grad, b.grad
    kinds = [(tensor.dtype, tensor.shape) for tensor in (a, b, first, second)]  # type: ignore[union-attr]
    if kinds[:2] != kinds[2:] or kinds[0] != kinds[1]:  # changed before
        return None
    a.grad = b.grad = None
    a.grad, b.grad = second, first
    return CHECKED


def _overlapping(scene: Scene, i: int, dice: random.Random) -> str | None:
    """Two gradients are views that overlap, or lie side by side, in one buffer."""
    k, shift = _pair(scene, i, dice), dice.choice((0.3, 0.5, 1.0, 1.0))
    if k is None or current(scene, i) is None or current(scene, k) is None:
        return None
    holder = scene.pieces[i].local_holder
    if holder.shape != scene.pieces[k].local_holder.shape:
        return None
    count, step = holder.numel(), int(shift * holder.numel())
    values = np.random.default_rng(dice.getrandbits(32)).standard_normal(count + step + 1) * scene.scale
    fill(base := torch.zeros(count + step + 1, dtype=holder.dtype), values)
    scene.put(i, base[:count].view(holder.shape), dice)
    scene.put(k, base[step : step + count].view(holder.shape), dice)
    return CHECKED


def _subclass(t: Tensor, dice: random.Random) -> Tensor:
    return t.clone().as_subclass(dice.choice((Plain, Quiet)))


def _parameter(t: Tensor, dice: random.Random) -> Tensor:
    return nn.Parameter(t.clone(), requires_grad=False)


def _opaque(scene: Scene, i: int, dice: random.Random) -> str | None:
    local, which = current(scene, i), dice.randrange(-1, scene.world)
    if local is not None and which in (-1, scene.rank) and type(local) is Tensor:
        scene.put(i, local.detach().clone().as_subclass(Opaque), random.Random(0))
    return CHECKED


def _negated(t: Tensor, dice: random.Random) -> Tensor:
    return torch._neg_view(t.neg())


def _conjugated(t: Tensor, dice: random.Random) -> Tensor:
    return t.conj().resolve_conj().conj() if t.is_complex() else t.clone()


def _odd_number(scene: Scene, i: int, dice: random.Random) -> str | None:
    """NaN or inf in one element of the whole gradient."""
    value, at = dice.choice((float("nan"), float("inf"), -float("inf"))), dice.random()
    piece, local = scene.pieces[i], current(scene, i)
    if local is None or local.is_inference() or "float8" in str(local.dtype):
        return None
    mine = np.flatnonzero(piece.index == int(at * piece.numel))
    if len(mine) and local.dim() and local.numel():
        where = np.unravel_index(int(mine[0]), tuple(local.shape))
        local.detach().as_subclass(Tensor)[tuple(int(x) for x in where)] = value
    return CHECKED


def _frozen(scene: Scene, i: int, dice: random.Random) -> str | None:
    holder = scene.pieces[i].holder
    if dice.random() < 0.5:
        holder.grad = None
    holder.requires_grad_(False)
    scene.frozen.append(holder)
    return CHECKED


def _differentiable(scene: Scene, i: int, dice: random.Random) -> str | None:
    """A gradient of a graph, as create_graph leaves it; or a leaf that asks for one."""
    local, is_leaf = current(scene, i), dice.random() < 0.5
    if local is not None and not isinstance(scene.pieces[i].holder, DTensor) and not local.is_inference():
        source = local.detach().clone().requires_grad_()
        scene.put(i, source if is_leaf else source * 1, dice)
    return CHECKED


def _reshaped(scene: Scene, i: int, dice: random.Random) -> str | None:
    """Another shape of as many elements."""
    local = current(scene, i)
    if local is not None and type(local) is Tensor:
        other = local.detach().reshape(-1) if local.dim() != 1 else local.detach().reshape(1, -1)
        scene.put(i, other.clone(), dice)
    return MAY_REFUSE


def _larger(scene: Scene, i: int, dice: random.Random) -> str | None:
    local = current(scene, i)
    if local is not None and not local.is_complex() and local.numel():
        scene.put(i, torch.ones(local.numel() + 1, dtype=local.dtype), dice)
    return CHECKED  # the oracle takes it for what can't be read


def _in_place(scene: Scene, i: int, dice: random.Random) -> str | None:
    """A change that autograd is not told of, or not of the DTensor."""
    kind, local = dice.randrange(4), current(scene, i)
    if local is None or type(local) is not Tensor or local.is_inference() or local.is_neg():
        return CHECKED
    gradient = scene.pieces[i].holder.grad
    with torch.no_grad(), suppress(RuntimeError):  # torch refuses it where elements share memory
        if kind == 0:
            local.detach().data.mul_(3) if "float8" not in str(local.dtype) else None
        elif kind == 1 and local.dtype in (torch.float32, torch.float64) and not local.requires_grad:
            if not torch._C._is_cow_tensor(local):  # type: ignore[attr-defined]
                local.detach().numpy()[...] *= 5
        elif kind == 2 and gradient is not None and gradient.dtype is local.dtype and local.is_contiguous():
            torch._foreach_mul_([gradient], 2.0) if "float8" not in str(local.dtype) else None
        elif "float8" not in str(local.dtype):
            local.mul_(7)
    return CHECKED


def _copied_on_write(scene: Scene, i: int, dice: random.Random) -> str | None:
    local, which = current(scene, i), dice.randrange(-1, scene.world)
    if local is not None and which in (-1, scene.rank) and type(local) is Tensor and local.numel():
        origin = local.detach().clone()
        scene.put(i, torch._lazy_clone(origin), dice)
        scene.guards.append(origin)
    return CHECKED


def _inference(t: Tensor, dice: random.Random) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _sparse(scene: Scene, i: int, dice: random.Random) -> str | None:
    local, which = current(scene, i), dice.randrange(-1, scene.world)
    if local is not None and which in (-1, scene.rank) and local.dim() == 2 and type(local) is Tensor:
        scene.put(i, local.detach().clone().to_sparse(), dice)
    return CHECKED


def _integers(t: Tensor, dice: random.Random) -> Tensor:
    return torch.ones(t.shape, dtype=dice.choice((torch.int32, torch.int64, torch.bool)))


def _meta(t: Tensor, dice: random.Random) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


def _nothing(scene: Scene, i: int, dice: random.Random) -> str | None:
    """Zeros that have no memory."""
    if (local := current(scene, i)) is not None:
        zeros = torch._efficientzerotensor(tuple(local.shape), dtype=local.dtype)
        scene.put(i, zeros if dice.random() < 0.7 else torch.zeros_like(local), dice)
    return CHECKED


def _misaligned(t: Tensor, dice: random.Random) -> Tensor:
    """Memory of Python's, at an odd address."""
    if not t.numel() or "float8" in str(t.dtype):
        return t.clone()
    offset = dice.choice((1, 2, 4))
    memory = bytearray(offset + t.nbytes + 7)
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape).copy_(t)


def _set_changed(scene: Scene, i: int, dice: random.Random) -> str | None:
    scene.change_set(dice)
    return CHECKED


def _unequal(scene: Scene, i: int, dice: random.Random) -> str | None:
    """One rank's replica holds something else; where there is none, just that."""
    which, local = dice.randrange(scene.world), current(scene, i)
    if local is not None and which == scene.rank and type(local) is Tensor and local.numel():
        if local.is_inference() or "float8" in str(local.dtype) or not local.is_contiguous():
            return CHECKED
        local.detach().mul_(1.5)
    return CHECKED


CHANGES: dict[str, Callable[[Scene, int, random.Random], str | None]] = {
    "none": _absent,
    "none on one rank": _absent_on_one,
    "none at all": _all_absent,
    "zeroed": _zero,
    "new tensor": _laid_out(_new),
    "freed, then another dtype": _freed_first,
    "another offset": _laid_out(_elsewhere),
    "strided": _laid_out(_strided),
    "permuted": _laid_out(_permuted),
    "expanded": _expanded,
    "folded": _folded,
    "another dtype, same address": _retyped,
    "another dtype": _converted,
    "storage shrunk": _shrunk,
    "storage freed and restored": _restored,
    "shared": _shared,
    "swapped": _swapped,
    "views of one buffer": _overlapping,
    "subclass": _laid_out(_subclass),
    "parameter as gradient": _laid_out(_parameter),
    "opaque subclass": _opaque,
    "negated lazily": _laid_out(_negated),
    "conjugated lazily": _laid_out(_conjugated),
    "not finite": _odd_number,
    "frozen": _frozen,
    "differentiable": _differentiable,
    "another shape": _reshaped,
    "larger": _larger,
    "in place, unseen": _in_place,
    "copy on write": _copied_on_write,
    "inference tensor": _laid_out(_inference, MAY_REFUSE),
    "sparse": _sparse,
    "integers": _laid_out(_integers),
    "meta": _laid_out(_meta),
    "zero tensor": _nothing,
    "odd address": _laid_out(_misaligned),
    "set changed": _set_changed,
    "unequal replicas": _unequal,
}
