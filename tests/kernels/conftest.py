"""Triton's interpreter patches its language at every call; here it finds only once what there is to patch."""

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
