"""The frameworks are large: `launch/test_frameworks.sh` installs them, and runs the tests that need them."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

FRAMEWORKS = ("transformers", "accelerate", "peft", "trl", "lightning", "torchtitan", "ray", "megatron")
MISSING = [name for name in FRAMEWORKS if find_spec(name) is None]
ARE_ASKED_FOR = os.environ.get("DISTNORM_FRAMEWORKS") == "1"
collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if (MISSING or not ARE_ASKED_FOR) and path.name not in ("test_common.py", "test_installed.py")
]
