"""The environment that the tests run in is complete."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import distnorm

ROOT = Path(__file__).parent.parent


def installed(requirement: str) -> bool:
    if "platform_system" in requirement and platform.system() not in requirement:
        return True
    try:
        return bool(importlib.metadata.version(re.split(r"[<>=!~ ;\[]", requirement)[0]))
    except importlib.metadata.PackageNotFoundError:
        return False


def missing(*extras: str) -> list[str]:
    """What the package requires with these extras, and those that they name, and is not installed."""
    lines = [line.partition(";") for line in importlib.metadata.requires("distnorm") or []]
    needed, seen, ahead = [], set(), ["", *extras]
    while ahead:
        seen.add(extra := ahead.pop())
        for requirement, _, condition in lines:
            if re.findall(r"extra == ['\"](.*?)['\"]", condition) == ([extra] if extra else []):
                needed.append(f"{requirement};{condition}")
                others = re.findall(r"^distnorm\[(.*)\]", requirement)
                ahead += [name for each in others for name in each.split(",") if name not in seen]
    assert len(needed) >= 14, "torch, pyyaml, pydantic, numpy, six tools, plotly, three sinks and the console"
    return [line for line in needed if not installed(line)]


def test_what_the_quick_form_needs_is_installed():
    assert missing("dev") == []


def test_what_is_installed_is_this_tree():
    assert Path(distnorm.__file__).parent == ROOT / "distnorm"
    assert importlib.metadata.version("distnorm") == distnorm.__version__
