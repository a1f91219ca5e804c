"""Steps on a GPU, as far as they can be made without one: in Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.kernels.test_triton import run

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton here")


@pytest.mark.slow
def test_in_the_interpreter():
    files = ("tests/kernels/gpu_steps.py", "tests/kernels/gpu_overlap_steps.py")
    found = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")
    assert " passed" in found and " skipped" not in found
