"""The environment that the tests run in is complete."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import distnorm

ROOT = Path(__file__).parent.parent
OF_ADAPTERS = ("transformers", "accelerate", "lightning", "torchtitan", "peft", "ray[train]", "trl")
EXTRAS = ("dev", "deepspeed", "report", "tensorboard", "wandb", "prometheus", "rich")


def installed(requirement: str) -> bool:
    if "platform_system" in requirement and platform.system() not in requirement:
        return True
    try:
        return bool(importlib.metadata.version(re.split(r"[<>=!~ ;\[]", requirement)[0]))
    except importlib.metadata.PackageNotFoundError:
        return False


def test_everything_that_the_package_and_its_extras_name_is_installed():
    requirements = importlib.metadata.requires("distnorm") or []
    needed = [
        line
        for line in requirements
        if "extra ==" not in line or re.search(rf"extra == ['\"]({'|'.join(EXTRAS)})['\"]", line)
    ]
    assert len(needed) >= 16, (
        "torch, pyyaml, pydantic, numpy, six tools, plotly, deepspeed, three sinks and the console"
    )
    assert [line for line in needed if not installed(line)] == []


def test_what_is_installed_is_this_tree():
    assert Path(distnorm.__file__).parent == ROOT / "distnorm"
    assert importlib.metadata.version("distnorm") == distnorm.__version__
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project]")[2]
    for line in re.findall(r'[\[ ]"(\w[\w-]+>=[^"]*)"', project):
        if line.split(">=")[0] in OF_ADAPTERS:  # tests/integrations/test_installed.py asks for these
            continue
        assert installed(line), f"{line} is in pyproject.toml; the installed metadata is older than it"
