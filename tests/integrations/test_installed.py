"""Every framework that has an adapter is installed where their tests are to run: none is skipped unseen."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

from tests.integrations.conftest import FRAMEWORKS, MISSING
from tests.test_environment import ROOT, installed, missing

CURE = "./launch/test.sh installs it; ./launch/test.sh --quick runs the tests that do without"


def test_all_frameworks_are_installed() -> None:
    assert MISSING == [], CURE


def test_what_the_full_form_needs_is_installed() -> None:
    assert missing("dev", "deepspeed", "report", "frameworks") == [], CURE


def test_what_is_installed_is_of_this_pyproject() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project]")[2]
    named = re.findall(r'[\[ ]"(\w[\w-]+(?:\[\w+\])?>=[^"]*)"', project)
    assert len(named) >= 24
    for line in named:
        assert installed(line), f"{line} is in pyproject.toml; the installed metadata is older than it"


def test_each_framework_has_the_version_that_the_constraints_name() -> None:
    lines = (ROOT / "launch" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    packages = ["megatron-core" if name == "megatron" else name for name in FRAMEWORKS]
    assert set(packages) <= pinned.keys()
    assert {name: importlib.metadata.version(name) for name in packages} == {n: pinned[n] for n in packages}


def test_distnorm_imports_none_of_them() -> None:
    """Nor do the adapters that need no class of their framework."""
    code = f"""
import sys, distnorm, distnorm.integrations.accelerate, distnorm.integrations.fabric
import distnorm.integrations.megatron
distnorm.GradClipper, distnorm.attach, distnorm.clip_grad_norm_
print([name for name in {FRAMEWORKS!r} if name in sys.modules])
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True
    )
    assert found.stdout == "[]\n"
