"""Every framework that has an adapter is installed where their tests are to run: none is skipped unseen."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integrations.conftest import ARE_ASKED_FOR, FRAMEWORKS, MISSING


def test_all_frameworks_are_installed() -> None:
    if not ARE_ASKED_FOR:
        pytest.skip(
            "tests of adapters need large frameworks: ./launch/test_frameworks.sh installs and runs them"
        )
    assert not MISSING


def test_distnorm_imports_none_of_them() -> None:
    code = f"""
import sys, distnorm
distnorm.GradClipper, distnorm.attach, distnorm.clip_grad_norm_
print([name for name in {FRAMEWORKS!r} if name in sys.modules])
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout == "[]\n"
