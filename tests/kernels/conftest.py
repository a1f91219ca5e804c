"""Triton's interpreter searches for what to patch, and patches it, at every call; here it does both once."""

from __future__ import annotations

import inspect
import os
from functools import cache
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    @cache
    def _builtins(package: Any) -> list[tuple[str, Any]]:
        return [(n, m) for n, m in inspect.getmembers(package) if interpreter.tl.core.is_builtin(m)]

    def _patch(package: Any, builder: Any, *rest: Any) -> None:
        for name, member in _builtins(package):
            interpreter._patch_attr(package, name, member, builder, *rest)

    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = _patch

    _patched: set[str] = set()  # what functions of these modules see, and nothing undoes

    def _call(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.fn.__module__ not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(self.fn.__module__)
        return self.rewrite()(*arguments, **named)

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "InterpretedFunction"):
        interpreter.InterpretedFunction.__call__ = _call
