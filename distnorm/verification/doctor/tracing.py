"""What goes in and out of every module, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distnorm.errors import DistnormError
from distnorm.verification.pieces import clean_name

INPUT, OUTPUT = "input", "output"
INPUT_GRADIENT, OUTPUT_GRADIENT = "gradient of the input", "gradient of the output"
WEIGHT, WEIGHT_AGAIN = "weight as it is used", "weight as it is used in the backward"
FORWARD, BACKWARD = (INPUT, WEIGHT, OUTPUT), (OUTPUT_GRADIENT, WEIGHT_AGAIN, INPUT_GRADIENT)

WEIGHTS = (WEIGHT, WEIGHT_AGAIN)


@dataclass(frozen=True, slots=True)
class Boundary:
    """A place at which tensors are compared.

    Args:
        module: the module's name in the whole model; empty for the model itself.
        kind: one of this file's six.
        which: the tensor's place among the module's inputs, outputs or own parameters.
    """

    module: str
    kind: str
    which: int = 0


OnTensor = Callable[[Boundary, int, Tensor], None]


class Tracer:
    """Hooks on every module of a model; `remove` takes them away.

    Args:
        root: the model.
        on_tensor: gets every floating-point tensor at every boundary as it arises, and which call of the
            module it belongs to.
    """

    def __init__(self, root: nn.Module, on_tensor: OnTensor) -> None:
        self._on_tensor = on_tensor
        self._handles: list[Any] = []
        self._calls: dict[str, int] = {}
        seen = set()
        for raw, module in root.named_modules():
            name = clean_name(raw, root)
            if name not in seen:  # a wrapper and what it wraps are one module
                seen.add(name)
                self._attach(name, module)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _attach(self, name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return self.enter(name, args, kwargs)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            self._leave(name, module, output)

        # First of all, so that it sees what the caller gives, before a parallel style redistributes it.
        self._handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after))

    def enter(self, name: str, args: Any, kwargs: Any) -> Any:
        """Record a module's inputs. Returns what the module is to be called with: aliases, whose gradients
        are those of this module's alone."""
        if _in_backward():  # a recomputation by activation checkpointing
            return None
        counter = iter(range(1 << 30))
        self._calls[name] = call = self._calls.get(name, -1) + 1

        def one(tensor: Tensor) -> Tensor:
            which = next(counter)
            self._on_tensor(Boundary(name, INPUT, which), call, tensor)
            if not tensor.requires_grad:
                return tensor
            alias = tensor.view_as(tensor)
            self._hook(alias, Boundary(name, INPUT_GRADIENT, which), call)
            return alias

        return _mapped(args, one), _mapped(kwargs, one)

    def _leave(self, name: str, module: nn.Module, output: Any) -> None:
        if _in_backward():
            return
        call = self._calls.get(name, 0)
        self._weights(name, WEIGHT, call, module)
        for which, tensor in enumerate(t for t in tensors_in(output) if t.is_floating_point()):
            self._on_tensor(Boundary(name, OUTPUT, which), call, tensor)
            if tensor.requires_grad:
                self._hook(tensor, Boundary(name, OUTPUT_GRADIENT, which), call, module)

    def _weights(self, name: str, kind: str, call: int, module: nn.Module) -> None:
        """Record a module's own parameters where it uses them: FSDP has gathered them by then."""
        for which, parameter in enumerate(module._parameters.values()):
            if parameter is not None and parameter.is_floating_point():
                self._on_tensor(Boundary(name, kind, which), call, parameter.detach().unsqueeze(0))

    def _hook(self, tensor: Tensor, boundary: Boundary, call: int, module: nn.Module | None = None) -> None:
        def arrived(gradient: Tensor) -> None:
            self._on_tensor(boundary, call, gradient)
            if module is not None and boundary.which == 0:
                self._weights(boundary.module, WEIGHT_AGAIN, call, module)

        self._handles.append(tensor.register_hook(arrived))  # type: ignore[no-untyped-call]


def refuse_compiled(modules: Iterable[nn.Module], whose: str) -> None:
    """Refuse modules that torch.compile would trace with the hooks in them: the hooks would become part of
    the graph, see no values, and compile for each call anew.

    Args:
        modules: what is to be traced.
        whose: what they are, in the error's words: "the model" or "the reference".

    Raises:
        DistnormError: one of them, or of the modules in them, is compiled.
    """
    for root, name, module in ((one, *named) for one in modules for named in one.named_modules()):
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            at = f"its module '{clean_name(name, root)}'" if name else "it"
            raise DistnormError(
                f"doctor: expected {whose} to run eagerly where trace=True, found {at} under torch.compile, "
                "which would compile the doctor's hooks too; leave the trace out, or compile afterwards"
            )


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module takes or gives."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if type(value) is dict:
        return {key: _mapped(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value
